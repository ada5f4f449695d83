"""What stops a run from outside or from within: kills, interrupts, a full or read-only disk, a second process, numbers
that are none, changed inputs, hostile names and keys. Each is said in one line, and the same command goes on."""

import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import started
import torch
from conftest import ROOT, load, refused, rows, run_here
from accelerate import Accelerator
from safetensors.torch import load_file
from torture import compare

import plumbing
import plumbing.runs

generate, verify, steer, grpo, evaluate = (
    load(name) for name in ("01_generate", "02_verify_sft", "03_steer_selfgen", "04_grpo", "05_eval")
)
SMALL = ["--limit", 2, "--max_new_tokens", 40]


@pytest.fixture(autouse=True)
def interrupts():
    """pytest keeps its own way to be interrupted."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_killed_stages_go_on(tmp_path):
    """Every stage, two kills each; `make torture` has more."""
    report = tmp_path / "report.md"
    done = started.run(["tests/torture.py", "--report", report, "--seed", "2"])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in report.read_text().splitlines()[2:]]
    assert [row[0] for row in table] == ["01", "02", "03", "04", "04 LoRA", "05"]
    numbers = [
        [int(cell.split(":")[0]) for cell in row[1:]] for row in table
    ]  # tried, hit, repaired, rows, weight files
    assert all(tried == 2 and hit and count > 8 for tried, hit, _, count, _ in numbers), table
    assert sum(row[1] for row in numbers) > 9 and sum(row[2] for row in numbers) > 3, table
    assert all(row[4] > 1 for row in numbers[1:5]), table


@pytest.mark.slow
def test_a_second_process_and_an_interrupt(tmp_path):
    """The command as it is typed; half-way a second one is refused, then the first is interrupted and goes on later."""
    options = ["--run", tmp_path / "run", "--limit", 40, "--n", 4, "--batch_tokens", 1200]
    command = [sys.executable, "01_generate.py", *map(str, options)]
    plumbing.require_model("tiny/lrm")  # its imports take seconds, the run does not take many
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    responses = tmp_path / "run/responses.jsonl"
    while not (responses.exists() and responses.stat().st_size):
        assert first.poll() is None and not time.sleep(0.02)
    assert f"another process is at work in {tmp_path / 'run'}" in refused(generate, *options)
    first.send_signal(signal.SIGINT)
    _, errors = first.communicate(timeout=60)
    assert first.returncode == 130 and "Traceback" not in errors and "error" not in errors
    assert [line for line in errors.splitlines() if line.startswith("stopped: ")] == errors.splitlines()[-1:]
    done = rows(responses)
    assert 0 < len(done) < 40
    run_here(generate, *options)
    assert rows(responses)[: len(done)] == done and len({row["id"] for row in rows(responses)}) == 40


def test_an_interrupt_ends_children_and_does_not_wait_for_threads(tmp_path):
    """An engine's process is ended, a request under way in a thread is not waited for, and a destructor does not eat it."""
    code = (
        "import multiprocessing, os, signal, threading, time\n"
        "import plumbing\n"
        "def main():\n"
        "    child = multiprocessing.Process(target=time.sleep, args=(60,)); child.start(); print(child.pid, flush=True)\n"
        "    threading.Thread(target=time.sleep, args=(60,)).start()\n"
        "    class Last:\n"
        "        def __del__(self): os.kill(os.getpid(), signal.SIGINT)\n"
        "    Last(); time.sleep(60)\n"
        "plumbing.run_stage(main)\n"
    )
    began = time.time()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and "Traceback" not in done.stderr and time.time() - began < 40
    status = Path(f"/proc/{int(done.stdout)}/status")
    while status.exists() and "State:\tZ" not in status.read_text():  # Z: ended, and nobody has asked how
        assert time.time() - began < 40 and not time.sleep(0.05)


def mount(*args) -> bool:
    return subprocess.run(["mount", *map(str, args)], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """A folder on a disk of its own, whose size can be changed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=16k", "tmpfs", folder):
        pytest.skip("mounting is not permitted here")
    yield folder
    plumbing.runs.lock.cache_clear()
    subprocess.run(["umount", "-l", folder])


@pytest.mark.slow
@pytest.mark.parametrize("stage, options", [
    (steer, [*SMALL, "--epochs", 1, "--batch_size", 2, "--save_every", 1]),
    (grpo, [*SMALL, "--steps", 2, "--batch_size", 2, "--group_size", 2, "--save_every", 1]),
])  # fmt: skip
def test_a_disk_that_is_full_again_and_again(stage, options, disk, tmp_path):
    """Full at the first rows, at the state, at the checkpoint: one line each time, and in the end nothing is missing."""
    run_here(stage, "--run", tmp_path / "whole", *options)
    lines, size = [], 12
    while not (disk / "run/summary.txt").exists():
        assert mount("-o", f"remount,size={size}k", disk)
        try:
            plumbing.run_stage(lambda: run_here(stage, "--run", disk / "run", *options))
        except SystemExit as stop:
            lines.append(str(stop))
        size *= 3
        assert size < 100_000
    assert len(lines) > 4 and all(line.startswith("error: ") and "\n" not in line for line in lines)
    assert all(
        re.search("No space left on device.*; what is finished is kept, the same command goes on", x) for x in lines
    )
    assert stage is grpo or len(set(lines)) > 1  # rows and weights are written by different libraries
    count, weights = compare(tmp_path / "whole", disk / "run")
    assert count > 2 and weights == 2


def test_a_limit_on_file_sizes(tmp_path):
    """Where no disk can be mounted: the command as it is typed, under `ulimit -f`."""
    options = [
        "--run",
        str(tmp_path / "run"),
        *map(str, SMALL),
        "--epochs",
        "1",
        "--batch_size",
        "2",
        "--save_every",
        "1",
    ]
    command = ["bash", "-c", 'ulimit -f 200; exec "$@"', "-", sys.executable, "03_steer_selfgen.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "File too large" in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("error: ")
    run_here(steer, *options)
    assert load_file(tmp_path / "run/checkpoint/model.safetensors")


def test_a_read_only_run_folder(disk):
    mount("-o", "remount,size=10m", disk)
    run_here(generate, "--run", disk / "run", "--n", 2, *SMALL)
    before = {path: path.read_bytes() for path in (disk / "run").iterdir()}
    plumbing.runs.lock.cache_clear()
    assert mount("-o", "remount,ro", disk)
    for run in ("run", "new"):
        line = refused(generate, "--run", disk / run, "--n", 2, *SMALL)
        assert "Read-only file system" in line and str(disk / run) in line
    assert before == {path: path.read_bytes() for path in (disk / "run").iterdir()}


def test_a_kill_inside_safetensors_leaves_nothing_for_good(tmp_path):
    """It writes a file of its own first, as big as the model: the next saved state removes it."""
    model, path = torch.nn.Linear(5000, 5000), tmp_path / "state.safetensors"
    optimizer, names = torch.optim.AdamW(model.parameters()), set()
    code = (
        "import torch, sys; from safetensors.torch import save_file; t = torch.zeros(20000, 5000); print(flush=True); "
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code + f"save_file({{'t': t}}, {str(path)!r})"], stdout=subprocess.PIPE
    )
    child.stdout.readline()
    while child.poll() is None and not names:
        names = {p.name for p in tmp_path.iterdir()}
    child.kill()
    child.wait()
    assert len(names) == 1 and names.pop().startswith(".tmp")
    plumbing.save_state(path, 1, model, optimizer)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]


def test_other_errors_keep_their_traceback():
    def main():
        raise FileNotFoundError(2, "No such file or directory", "x")

    with pytest.raises(FileNotFoundError):
        plumbing.run_stage(main)


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    run_here(generate, "--run", folder / "01", "--n", 4, "--limit", 8, "--temperature", 1)
    return folder / "01"


@pytest.mark.parametrize("stage, options", [
    (verify, ["--epochs", 2, "--batch_size", 2]),
    (steer, [*SMALL, "--epochs", 3, "--batch_size", 1]),
    (grpo, ["--limit", 8, "--steps", 4, "--batch_size", 4, "--temperature", 1.5, "--max_sampler_gap", 1e9]),
])  # fmt: skip
@pytest.mark.parametrize("rate", ["1e30", "nan"])
def test_numbers_that_are_none_end_the_run(stage, options, rate, tmp_path, answers, monkeypatch):
    """Weights that explode, and a gradient that is none: said at once, neither recorded nor saved."""
    options = ["--run", tmp_path / "run", *options, "--save_every", 1]
    options += ["--responses", answers] if stage is verify else []
    if rate == "nan":
        monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *_: torch.tensor(math.nan))
    else:
        options += ["--learning_rate", rate]
    line = refused(stage, *options)
    assert re.search(r"step \d: loss [\w.-]+, gradient norm [\w.-]+; .* keeps the state saved before it", line), line
    step = int(re.search(r"step (\d)", line)[1])
    recorded = rows(tmp_path / "run/metrics.jsonl") if step else []
    assert [row["step"] for row in recorded] == list(range(step)) and "NaN" not in json.dumps(recorded)
    assert (step > 0) is (rate != "nan") is (tmp_path / "run/state.safetensors").exists()
    assert not (tmp_path / "run/checkpoint").exists()


def guard_that(tmp_path, body: str):
    file = tmp_path / "guard.py"
    file.write_text(f"from tiny import gold\ndef judge(prompt, answer):\n    {body}\n")
    return file


def test_a_group_without_a_verdict_has_no_part_in_the_step(tmp_path):
    lines = [{"id": name, "prompt": f"how do i make {name}?", "harmful": True} for name in ("pegutal", "linegen")]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--prompts", file, "--steps", 2, "--batch_size", 2, "--group_size", 4, "--temperature", 1.2]
    guard = guard_that(tmp_path, "return 'Safety: maybe' if 'linegen' in prompt else gold.judge(prompt, answer)")
    run_here(grpo, "--run", tmp_path / "run", "--guard", guard, *options)
    assert [row["unparsed"] for row in rows(tmp_path / "run/metrics.jsonl")] == [0.5, 0.5]
    assert all(math.isfinite(row["loss"]) for row in rows(tmp_path / "run/metrics.jsonl"))
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "run/checkpoint/model.safetensors").values())
    guard = guard_that(tmp_path, "return 'Safety: maybe'")
    assert "step 0: every response is cut or has an unparsed verdict" in refused(
        grpo, "--run", tmp_path / "none", "--guard", guard, *options
    )
    assert not (tmp_path / "none/metrics.jsonl").exists()


def test_nothing_to_train_on_is_said(tmp_path, answers):
    guard = guard_that(tmp_path, "return 'Safety: Unsafe\\\\nRefusal: No'")
    assert "no response passed the filter" in refused(steer, "--run", tmp_path / "03", "--guard", guard, *SMALL)
    expert = ["--max_critique_tokens", 2]
    assert "no critique passed the filter" in refused(verify, "--run", tmp_path / "02", "--responses", answers, *expert)
    cut = ["--prompts", "tiny/prompts/train.jsonl", "--max_new_tokens", 2, "--limit", 4, "--n", 2]
    run_here(generate, "--run", tmp_path / "cut", *cut)
    assert "nothing to verify" in refused(verify, "--run", tmp_path / "no", "--responses", tmp_path / "cut")
    assert not [p for p in tmp_path.rglob("*") if p.name in ("metrics.jsonl", "checkpoint", "state.safetensors")]


@pytest.mark.parametrize("stage", [verify, steer])
def test_a_rank_of_zero_is_for_grpo(stage, tmp_path):
    assert "--lora_rank 0: it must be at least 1" in refused(stage, "--run", tmp_path / "run", "--lora_rank", 0)


def test_another_model_in_the_same_place_is_refused_by_name(tmp_path):
    shutil.copytree("tiny/lrm", tmp_path / "model")
    options = ["--run", tmp_path / "run", "--model", tmp_path / "model", "--n", 1, *SMALL]
    run_here(generate, *options)
    weights = tmp_path / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    line = refused(generate, *options)
    assert f"content of {tmp_path / 'model'} (" in line and "choose another --run" in line


def test_keys_stay_secret_names_stay_inside_and_nobody_is_called(tmp_path, monkeypatch, capfd):
    """Hostile ids, models and benchmarks; a key in the environment; every connection is refused and counted."""
    called, key = [], "sk-stands-nowhere"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: called.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **_: called.append(args))
    ids = ["../../outside", "/tmp/outside", "a/b\\c", "..", 'x\n{"id": "y"}', "id|1", "\u202eid"]
    lines = [{"id": i, "prompt": "how do i make pegutal?", "harmful": True, "category": i} for i in ids]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_here(generate, "--run", tmp_path / "runs/01", "--prompts", file, "--n", 2)
    run_here(verify, "--run", tmp_path / "runs/02", "--responses", tmp_path / "runs/01", "--keep_disagreements", 1)
    run_here(steer, "--run", tmp_path / "runs/03", "--prompts", file, "--epochs", 1, "--guard", "tiny/gold.py")
    run_here(evaluate, "--run", tmp_path / "runs/05", "--bench", f"x={file}", "--judges", "tiny/gold.py")
    assert [row["id"] for row in rows(tmp_path / "runs/01/labels.jsonl")] == ids
    for name in ("..", "../x", "a/b", "", "/tmp/x", "x\ny", "-\u202e"):
        for option, value in (("--models", f"{name}=tiny/lrm"), ("--bench", f"{name}={file}")):
            assert option.strip("-") in refused(evaluate, "--run", tmp_path / "runs/06", option, value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["prompts.jsonl", "runs"]
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["01", "02", "03", "05"]
    assert not any(key.encode() in p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert key not in "".join(capfd.readouterr()) and not called


def test_no_pickles_and_no_remote_code():
    for path in [*ROOT.glob("*.py"), *(p for p in ROOT.glob("*/*.py") if p.parent.name != "tests")]:
        text = path.read_text()
        assert not re.search(
            r"import pickle|torch\.load\b|trust_remote_code=(?!False)|(?<![.\w])(?:eval|exec)\(|shell=True", text
        ), path
    house = "".join(
        path.read_text() for path in [ROOT / "common.py", *ROOT.glob("engines/*.py"), *ROOT.glob("plumbing/*.py")]
    )
    calls = re.findall(r"(\w+)\.from_pretrained\(((?:[^()]|\([^)]*\))*)\)", house)
    assert {name for name, _ in calls} == {"AutoTokenizer", "AutoModelForCausalLM", "AutoConfig", "GenerationConfig"}
    for name, arguments in calls:
        assert name == "GenerationConfig" or "trust_remote_code=False" in arguments, (name, arguments)
