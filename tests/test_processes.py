"""Several processes make what one makes: no row is lost or doubled, and training ends at the same weights."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import started
import torch
import yaml
from conftest import ROOT, load, rows, run_here
from safetensors.torch import load_file
from torture import compare

import plumbing
from common import Example, TokenScorer, pad_batch, save_checkpoint
from plumbing import once_per_row, write_jsonl
from plumbing.several import free_port
from tiny import world

generate, verify, steer, grpo, evaluate = map(
    load, ("01_generate", "02_verify_sft", "03_steer_selfgen", "04_grpo", "05_eval")
)


def environment(sharded: bool) -> dict[str, str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sharded:
        settings = yaml.safe_load((ROOT / "fsdp.yaml").read_text())["fsdp_config"]
        variables |= {k.upper(): str(v) for k, v in settings.items()} | {"ACCELERATE_USE_FSDP": "true"}
    return variables


def launch_two(stage: str, *args) -> subprocess.Popen:
    """Two processes on the CPU, by torchrun: `accelerate launch --cpu --num_processes 2` starts one."""
    launch = ["torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port(), "--", f"{stage}.py"]
    command = [sys.executable, "-m", *map(str, launch), *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment(False), **pipes)


def run_on_two(stage: str, *args, sharded: bool = False) -> str:
    """The same by plumbing/several.py: what it printed. `sharded` is FSDP, with the settings of fsdp.yaml as accelerate
    launch passes them on."""
    what = stage if stage == "scores" else f"{stage}.py"
    command = [*(["tests/sharded.py"] if sharded else []), what, *args]
    done = started.run(["-m", "plumbing.several", 2, *command], environment=environment(sharded))
    assert done.returncode == 0, f"{done.args}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    assert done.stdout.count(f"\n{stage}\n") == (stage != "scores")  # one summary: the first process speaks for both
    return done.stdout


def same_training(one, two):
    a, b = (load_file(folder / "checkpoint/model.safetensors") for folder in (one, two))
    initial = load_file(ROOT / "tiny/lrm/model.safetensors")
    assert all((a[name] - b[name]).abs().max() < 1e-5 for name in a)
    assert max((a[name] - initial[name]).abs().max() for name in a) > 1e-4  # and they are trained
    lines = [rows(folder / "metrics.jsonl") for folder in (one, two)]
    numbers = [[(m["loss"], m.get("kl", 0), m["gradient_norm"]) for m in metrics] for metrics in lines]
    assert len(numbers[0]) > 1 and numbers[0] == [pytest.approx(three, rel=1e-3, abs=1e-6) for three in numbers[1]]


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """Stage 01 on seven prompts, by one process and by two."""
    folder = tmp_path_factory.mktemp("answered")
    lines = (ROOT / "tiny/prompts/train.jsonl").read_text().splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(lines[:455:65]))
    options = ["--prompts", folder / "prompts.jsonl", "--n", 2, "--temperature", 1]
    run_here(generate, "--run", folder / "one", *options)
    run_on_two("01_generate", "--run", folder / "two", *options)
    return folder, options


def by_id(path):
    found = rows(path)
    assert len({row["id"] for row in found}) == len(found)
    return sorted(found, key=lambda row: row["id"])


def test_two_processes_write_the_same_rows(answered):
    folder, _ = answered
    one, two = by_id(folder / "one/responses.jsonl"), by_id(folder / "two/responses.jsonl")
    assert one == two and len(one) == 7
    labels = [by_id(folder / f"{name}/labels.jsonl") for name in ("one", "two")]
    for a, b in zip(*labels):
        p, q = ([v.pop("probability") for v in row["verdicts"]] for row in (a, b))
        assert p == pytest.approx(q, abs=2e-4) and 0 < min(p) and max(p) <= 1
    assert labels[0] == labels[1]
    assert not list((folder / "two").glob("*.process*"))
    order = [row["id"] for row in rows(folder / "prompts.jsonl")]
    written = [row["id"] for row in rows(folder / "two/responses.jsonl")]
    assert (set(written[:4]), set(written[4:])) == (set(order[::2]), set(order[1::2]))  # each process made its share


@pytest.mark.slow
def test_one_of_two_processes_dies_and_two_or_one_go_on(tmp_path):
    """The second process of stage 01 is killed half way, and torchrun ends the first. What both had finished is kept as
    it is, a half line is made again, and so is all that is missing."""
    options = ["--limit", 60, "--n", 2, "--guard", "tiny/gold.py"]
    run_here(generate, "--run", tmp_path / "whole", *options)
    options += ["--batch_tokens", 1]  # one prompt after the other
    run, made = tmp_path / "run", {row["id"]: row for row in rows(tmp_path / "whole/responses.jsonl")}
    two, shard = launch_two("01_generate", "--run", run, *options), run / "responses.process1.jsonl"
    files = [run / "responses.jsonl", shard]
    while not all(file.exists() and file.read_bytes().count(b"\n") > 2 for file in files):
        assert two.poll() is None and not time.sleep(0.01)
    workers = Path(f"/proc/{two.pid}/task/{two.pid}/children").read_text().split()
    [second] = [pid for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(second), signal.SIGKILL)
    two.communicate(timeout=60)
    assert two.returncode
    for file in files:
        found = [json.loads(line) for line in file.read_text().split("\n")[:-1]]  # without a half line
        assert 2 < len(found) < 30  # of its half
        lines = "".join(json.dumps({**row, "source": "kept"}) + "\n" for row in found)
        file.write_text(lines + json.dumps(found[0])[:60] * (file == shard))
        made |= {row["id"]: {**made[row["id"]], "source": "kept"} for row in found}
    shutil.copytree(run, tmp_path / "alone")
    run_on_two("01_generate", "--run", run, *options)
    run_here(generate, "--run", tmp_path / "alone", *options)
    for folder in (run, tmp_path / "alone"):
        assert {row["id"]: row for row in by_id(folder / "responses.jsonl")} == made
        assert by_id(folder / "labels.jsonl") == by_id(tmp_path / "whole/labels.jsonl")
        assert not list(folder.glob("*.process*"))


def test_files_of_several_processes_are_read_together_and_joined(tmp_path):
    path, ids = tmp_path / "x.y.jsonl", "abcdef"
    path.write_text('{"id": "a", "by": 0}\n{"id": "b", "by": 0}\n{"id": "e", "b')
    (tmp_path / "x.y.process1.jsonl").write_text('{"id": "c", "by": 1}\n{"id": "d"')
    (tmp_path / "x.y.process2.jsonl").write_text('{"id": "f", "by": 2}\n')
    (tmp_path / "x.jsonl").write_text('{"id": "d", "by": "another file"}\n')
    asked = []

    def work(todo):
        for row in todo:
            asked.append(row["id"])
            yield [{"id": row["id"], "by": "work"}]

    expected = {"a": 0, "b": 0, "c": 1, "d": "work", "e": "work", "f": 2}
    for _ in range(2):  # the second time there is nothing to do
        done = once_per_row(path, [{"id": i} for i in ids], work)
        assert {i: row["by"] for i, row in done.items()} == expected and asked == ["d", "e"]
        assert {row["id"]: row["by"] for row in by_id(path)} == expected
        assert sorted(p.name for p in tmp_path.iterdir()) == ["x.jsonl", "x.y.jsonl"]


def test_only_the_first_process_writes(monkeypatch, tmp_path, model, tokenizer):
    for module in (plumbing, plumbing.process):
        monkeypatch.setattr(module, "processes", lambda: SimpleNamespace(process_index=1))
    write_jsonl(tmp_path / "x.jsonl", [{"id": "a"}])
    save_checkpoint(model, tokenizer, tmp_path / "checkpoint", "tiny/lrm")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_learn_to_verify_as_one(tmp_path):
    """Seven examples in steps of three, three and one, an example a pass: some passes of the second process count 0."""
    responses, labels = [], []
    for item in world.ITEMS[1:6]:  # two harmful items give two examples each, three harmless ones one
        samples = [{"answer": text} for text in (item.steps, item.refusal)]
        row = {"id": item.name, "prompt": f"how do i make {item.name}?", "harmful": item.harmful, "samples": samples}
        responses.append(row)
        verdicts = [{"safety": "unsafe" if item.harmful else "safe"}, {"safety": "safe"}]
        labels.append({"id": item.name, "verdicts": verdicts})
    (tmp_path / "01").mkdir()
    for name, lines in (("responses", responses), ("labels", labels)):
        (tmp_path / f"01/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "01/options.json").write_text('{"options": {"model": "tiny/lrm"}}')
    options = ["--responses", tmp_path / "01", "--epochs", 1, "--batch_size", 3, "--micro_batch_tokens", 1]
    run_here(verify, "--run", tmp_path / "one", *options)
    run_on_two("02_verify_sft", "--run", tmp_path / "two", *options)
    assert rows(tmp_path / "one/train.jsonl") == rows(tmp_path / "two/train.jsonl")
    assert len(rows(tmp_path / "one/train.jsonl")) == 7
    same_training(tmp_path / "one", tmp_path / "two")
    run_on_two("02_verify_sft", "--run", tmp_path / "sharded", *options, sharded=True)
    same_training(tmp_path / "one", tmp_path / "sharded")


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra, resumed", [(["--lora_rank", 8, "--recompute"], []), (["--loss", "dapo"], ["one", "two"])]
)
def test_grpo_with_sharded_weights(tmp_path, extra, resumed):
    """FSDP ends where one process ends, and either goes on from the other's saved state. The sampler has a copy of its
    own, which must have got the weights of the step: its log-probs are compared with the trainer's."""
    lines = (ROOT / "tiny/prompts/train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join(lines[:455:45]))
    options = ["--prompts", tmp_path / "prompts.jsonl", "--steps", 3, "--batch_size", 8, "--group_size", 4, *extra]
    options += ["--save_every", 2, "--micro_batch_tokens", 512, "--learning_rate", "1e-3", "--beta", 0.1]
    run_here(grpo, "--run", tmp_path / "one", *options)
    run_on_two("04_grpo", "--run", tmp_path / "two", *options, sharded=True)
    same_training(tmp_path / "one", tmp_path / "two")
    for source in resumed:  # from the state before the third step
        on = tmp_path / f"{source}-on"
        shutil.copytree(tmp_path / source, on)
        shutil.rmtree(on / "checkpoint")
        if source == "one":
            run_on_two("04_grpo", "--run", on, *options, sharded=True)
        else:
            run_here(grpo, "--run", on, *options)
        same_training(tmp_path / "one", on)


def test_sharded_scores_and_gradients_in_bfloat16_are_not_rounded_to_it(monkeypatch, model):
    """Computed in bfloat16, but log-probs and sums of gradients come out in float32; accelerate would round both."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    output = run_on_two("scores", sharded=True)
    found = {name: torch.tensor(values) for name, values in json.loads(output.splitlines()[-1]).items()}
    for name, values in found.items():
        assert (values != values.bfloat16().float()).float().mean() > 0.5, name
    examples = [Example([5, 6, 7], [8, 9, 10, 11]), Example([5], [10, 11, 12, 2])]
    exact = TokenScorer(model)(*pad_batch(examples)).log_probs
    assert 1e-4 < (found["log_probs"] - exact).abs().max() < 0.3  # it was bfloat16 inside


@pytest.mark.slow
def test_two_processes_steer_and_train_as_one(answered, tmp_path):
    """With a second try, KL on benign rows, and one process that goes on from a state of two."""
    options = ["--prompts", answered[0] / "prompts.jsonl", "--guard", "tiny/gold.py", "--steering", "none", "prefix"]
    options += ["--epochs", 2, "--batch_size", 4, "--micro_batch_tokens", 1, "--save_every", 2]
    options += ["--benign_loss", "kl", "--lora_dropout", 0, "--learning_rate", "1e-2"]
    run_here(steer, "--run", tmp_path / "one", *options)
    run_on_two("03_steer_selfgen", "--run", tmp_path / "two", *options)
    shutil.copytree(tmp_path / "two", tmp_path / "on")
    shutil.rmtree(tmp_path / "on/checkpoint")
    run_here(steer, "--run", tmp_path / "on", *options)
    kept = rows(tmp_path / "one/train.jsonl")
    assert len(kept) > 4 and {(row["harmful"], row["try"]) for row in kept} == {(False, 1), (True, 2)}
    for name in ("two", "on"):
        for file in ("train.jsonl", "dropped.jsonl"):
            assert rows(tmp_path / "one" / file) == rows(tmp_path / name / file)
        same_training(tmp_path / "one", tmp_path / name)
        a, b = (json.loads((tmp_path / x / "trained.json").read_text()) for x in ("one", name))
        assert a == pytest.approx(b, rel=1e-3) and a["data_kl"] > 1e-3


@pytest.mark.slow
def test_two_processes_evaluate_as_one(tmp_path):
    """Two models, three kinds of rows, three judges, two responses a prompt: responses, verdicts, figures, recipe."""
    for name, lines in (("plain", 240), ("sums", 200)):
        text = (ROOT / f"tiny/prompts/test_{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / f"{name}.jsonl").write_text("".join(text[: lines : lines // 5]))
    test = [{"id": "v", "prompt": "is it safe?", "harmful": True, "verdict": "unsafe"}]
    write_jsonl(tmp_path / "verify.jsonl", test)
    options = ["--bench", *(f"{name}={tmp_path}/{name}.jsonl" for name in ("plain", "sums"))]
    options += ["--verify_test", tmp_path / "verify.jsonl", "--models", "base=tiny/lrm", "other=tiny/expert"]
    options += ["--n", 2, "--temperature", 1]
    run_here(evaluate, "--run", tmp_path / "one", *options)
    run_on_two("05_eval", "--run", tmp_path / "two", *options)
    compared, _ = compare(tmp_path / "one", tmp_path / "two")
    assert compared == 2 * (5 + 5 + 1 + 2 * 3 * 5)  # responses, and verdicts of three judges on two texts of `plain`
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two")]
    for one in found:
        assert {row["metric"] for row in one["rows"]} > {"asr", "compliance", "accuracy", "verify_f1", "self_check"}
        del one["recipe"]["seconds"], one["recipe"]["hardware"]  # which says how many threads
    assert found[0] == found[1]
