import gc
import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import started

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several processes share the cores
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)


def pytest_collection_modifyitems(items):
    """Slow tests first: one that began last would be waited for alone."""
    items.sort(key=lambda item: "slow" not in item.keywords)


def pytest_sessionstart():
    gc.disable()  # until all tests are collected: imports make no garbage


def pytest_collection_finish():
    """What is imported stays, and need not be looked through again: every sampler that closes collects garbage."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """Nor what a file's tests have imported in passing."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


def load(name: str):
    """A numbered stage as a module: its name is no identifier, so `import` cannot."""
    spec = importlib.util.spec_from_file_location("stage_" + name[:2], ROOT / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def run_stage(stage: str, *args, ok: bool = True, typed: bool = False) -> subprocess.CompletedProcess:
    """A stage as a user runs it, from the project's folder; unless it is to be `typed`, with the imports done before."""
    command = [f"{stage}.py", *map(str, args)]
    if typed:
        command = [sys.executable, *command]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    else:
        done = started.run(command)
    assert not ok or done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done


def run_with_hubs(urls, home: Path, *command) -> list[subprocess.CompletedProcess]:
    """A stage as a user types it, with other hubs, all at once, and with nothing of them in a cache; each within 30
    seconds."""
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(home)}
    command = [sys.executable, *map(str, command)]

    def run(url):
        hub = {**environment, "HF_ENDPOINT": url}
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=hub, timeout=30)

    with ThreadPoolExecutor() as pool:  # most of it is waiting
        return list(pool.map(run, urls))


def run_here(stage, *args):
    """A loaded stage with the command line `args`, in this interpreter: its imports are most of a small run."""
    with mock.patch.object(sys, "argv", [Path(stage.__file__).name, *map(str, args)]):
        stage.main()


def refused(stage, *args) -> str:
    """The one line that a loaded stage ends with."""
    import plumbing

    with pytest.raises(SystemExit) as stopped:
        plumbing.run_stage(lambda: run_here(stage, *args))
    line = str(stopped.value)
    assert line.startswith("error: ") and "\n" not in line
    return line


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def next_token_log_probs(net, examples):
    """(N, V) in float64, of every response position in turn: `net`'s plain forward pass on one example at a time."""
    import torch  # not above: the process that hands out the tests needs none

    parts = []
    for prompt, response in examples:
        logits = net(input_ids=torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        parts.append(logits.double().log_softmax(-1))
    return torch.cat(parts)


def assert_log_probs(net, prompt: list[int], sample, temperature: float, tolerance: float):
    """A sample's log-probs are those of a full forward pass at the sampling temperature."""
    import torch

    log_probs = next_token_log_probs(net, [(prompt, sample.ids)]).div(temperature).log_softmax(-1)
    expected = log_probs.gather(1, torch.tensor(sample.ids).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.tensor(sample.log_probs).double(), expected, atol=tolerance, rtol=0)


def assert_seeds_belong_to_requests(sampler, requests):
    """A request's samples are the same alone and in company, and others with another seed."""
    from engines import Sampling

    hot = Sampling(30, 1.5, seed=1)
    together = dict(sampler.generate(requests, 3, hot))
    [alone] = dict(sampler.generate(requests[2:3], 3, hot)).values()
    assert [s.ids for s in alone] == [s.ids for s in together[2]]
    assert len({tuple(s.ids) for samples in together.values() for s in samples}) > len(requests)
    other = dict(sampler.generate(requests, 3, hot._replace(seed=2)))
    assert any(a.ids != b.ids for i in other for a, b in zip(other[i], together[i]))


@pytest.fixture(scope="session")
def tokenizer():
    from common import load_tokenizer

    return load_tokenizer("tiny/lrm")


@pytest.fixture(scope="session")
def model():
    from common import load_model

    return load_model("tiny/lrm")


@pytest.fixture(scope="session")
def requests(tokenizer):
    """What a sampler gets: (key, prompt ids)."""
    from common import render_chat

    prompts = [row["prompt"] for row in rows(ROOT / "tiny/prompts/test_wrapped.jsonl")[::40]]
    found = [(str(i), render_chat(tokenizer, [{"role": "user", "content": p}])[0]) for i, p in enumerate(prompts)]
    assert len({len(ids) for _, ids in found}) > 2  # left padding is at work
    return found
