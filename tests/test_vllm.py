"""The vLLM engine, for real on the CPU: `make test-vllm` (its own environment; skipped where vllm is missing)."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, assert_log_probs, assert_seeds_belong_to_requests, run_stage

pytest.importorskip("vllm")

from common import load_model  # noqa: E402
from engines import Sampling  # noqa: E402
from engines.hf import HfSampler  # noqa: E402
from engines.vllm import VllmSampler  # noqa: E402
from plumbing import PRESETS  # noqa: E402
from common import save_checkpoint  # noqa: E402

PROMPT = json.loads(next(open("tiny/prompts/test_wrapped.jsonl")))["prompt"]


@pytest.fixture(scope="module")
def setup(tokenizer, requests):
    engine = VllmSampler("tiny/lrm", tokenizer)
    yield HfSampler(load_model("tiny/lrm"), tokenizer, 32_768), engine, requests
    engine.close()


def test_greedy_text_equals_our_loop(setup):
    ours, theirs, requests = setup
    greedy = Sampling(40, 0.0)
    a, b = dict(ours.generate(requests, 2, greedy)), dict(theirs.generate(requests, 2, greedy))
    assert [[s.ids for s in a[i]] for i in sorted(a)] == [[s.ids for s in b[i]] for i in sorted(b)]
    assert all(len(b[i]) == 2 and b[i][0].finish == "stop" for i in b)


def test_log_probs_are_those_of_a_full_forward_pass(setup):
    ours, theirs, requests = setup
    for index, samples in theirs.generate(requests, 2, Sampling(20, 0.7, seed=5)):
        for sample in samples:
            assert_log_probs(ours.model, requests[index][1], sample, 0.7, 2e-3)


def test_seeds_belong_to_the_request(setup):
    _, theirs, requests = setup
    assert_seeds_belong_to_requests(theirs, requests)


def test_long_prompts_and_stop_tokens(setup):
    """As long as the model reads, both engines agree; one more is refused in a line. The end token ends a response, is
    in its ids and not in its text."""
    ours, theirs, requests = setup
    room = ours.model.config.max_position_embeddings
    words = requests[0][1] * (room // len(requests[0][1]))
    greedy, long = Sampling(4, 0.0), [("long", words[: room - 4])]
    [[(_, [a])], [(_, [b])]] = (list(engine.generate(long, 1, greedy)) for engine in (ours, theirs))
    assert a.ids == b.ids and len(b.ids) <= 4
    chats = [("0", [{"role": "user", "content": PROMPT}]), ("1", [{"role": "user", "content": "midumon " * room}])]
    for engine in (ours, theirs):
        [(_, [reply])] = engine.replies(chats[:1], 1, Sampling(60, 0.0))
        assert reply.sample.ids[-1] in engine.eos and reply.finish == "stop" and reply.tokens == len(reply.sample.ids)
        assert "<|im_end|>" not in reply.text
        with pytest.raises(SystemExit, match=f"^error: prompt 1 has .* tokens, tiny/lrm reads {room}$"):
            list(engine.replies(chats, 1, greedy))


def test_a_begun_response_goes_on_as_in_our_loop(setup):
    """What the attacker wrote comes back with the reply, tags and all."""
    ours, theirs, _ = setup
    starts = ["<think>\nthe user wants", "<think>\n\n</think>\n\nto make"]
    chats = []
    for start in starts:
        turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": start}]
        chats.append((start, turns))
    a, b = (dict(engine.replies(chats, 1, Sampling(40, 0.0))) for engine in (ours, theirs))
    for index, start in enumerate(starts):
        assert a[index][0].sample.ids == b[index][0].sample.ids
        assert b[index][0].text == a[index][0].text and b[index][0].text.startswith(start)


def test_two_processes_that_share_a_model_write_the_same(setup, monkeypatch):
    """--tensor_parallel 2: each holds half of every layer."""
    ours, _, requests = setup
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    engine = VllmSampler("tiny/lrm", ours.tokenizer, tensor_parallel=2)
    a, b = (dict(one.generate(requests, 1, Sampling(40, 0.0))) for one in (ours, engine))
    engine.close()
    assert [a[i][0].ids for i in sorted(a)] == [b[i][0].ids for i in sorted(b)]


def test_stage_01_samples_and_labels_with_it(tmp_path):
    """Two engines one after the other: the first one is gone before the guard's starts."""
    run_stage("01_generate", "--engine", "vllm", "--run", tmp_path / "run", "--limit", 20, "--n", 4)
    labels = [json.loads(line) for line in (tmp_path / "run/labels.jsonl").open()]
    assert len(labels) == 20 and {v["safety"] for row in labels for v in row["verdicts"]} == {"safe", "unsafe"}


def test_pushed_weights_arrive_and_a_skipped_push_is_caught(setup, tmp_path):
    """After a push, log-probs are those of the new weights, tied head included; without one, they are the old ones'."""
    ours, _, requests = setup
    engine = VllmSampler("tiny/lrm", ours.tokenizer, beside_trainer=True)
    changed = load_model("tiny/lrm")
    with torch.no_grad():
        for p in changed.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.05 * max(p.std(), 0.1))
    save_checkpoint(changed, ours.tokenizer, tmp_path / "new", "tiny/lrm")

    def gap(model):
        gaps = []
        for index, [sample] in engine.generate(requests, 1, Sampling(20, 1.0, seed=3)):
            prompt = requests[index][1]
            logits = model(input_ids=torch.tensor([prompt + sample.ids])).logits[0, len(prompt) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(sample.ids).unsqueeze(1)).squeeze(1)
            gaps.append((torch.tensor(sample.log_probs) - expected).abs().mean().item())
        return sum(gaps) / len(gaps)

    tolerance = PRESETS["tiny"]["04"]["max_sampler_gap"]
    assert gap(ours.model) < tolerance < gap(changed)  # pushing was skipped: what stage 04 stops at
    engine.load_weights(tmp_path / "new")
    assert gap(changed) < tolerance < gap(ours.model)
    engine.close()


def test_stage_04_samples_with_it(tmp_path):
    """Three steps at a high learning rate: the sampler's log-probs stay the trainer's; never pushed, the run stops."""
    options = ["--engine", "vllm", "--steps", 3, "--batch_size", 4, "--guard", "tiny/gold.py", "--learning_rate", 1e-3]
    run_stage("04_grpo", "--run", tmp_path / "run", *options)
    assert all(json.loads(line)["sampler_gap"] < 1e-5 for line in (tmp_path / "run/metrics.jsonl").open())
    skipped = "import engines.vllm, runpy, sys; engines.vllm.VllmSampler.load_weights = lambda *_: None; sys.argv = sys.argv[1:];"
    skipped += "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", skipped, "04_grpo.py", "--run", str(tmp_path / "skipped"), *map(str, options)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "log-probs of sampler and trainer differ" in done.stderr
