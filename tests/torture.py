"""Kills every stage at many moments, runs the same command again, and compares what is left with a run never stopped.

    python tests/torture.py --kills 50 --real 3 --report results/torture.md       # make torture

A stage is killed (SIGKILL) by the clock, just before a call that opens, renames or removes something in its run folder,
or in the middle of a line that it appends, or interrupted (SIGINT: it must say so in one line). Most runs are forks of this process, which has imported everything and done
nothing; `--real` of them are the command as a user types it, killed by the clock.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import started
from conftest import ROOT, load, rows

import plumbing
import plumbing.progress

SAMPLING = ["--max_new_tokens", 40, "--temperature", 1]
GRPO = ["--prompts", "{folder}/prompts.jsonl", "--steps", 3, "--batch_size", 2, "--group_size", 4, "--save_every", 1]
GRPO += ["--learning_rate", "1e-3", "--max_new_tokens", 40, "--eval_prompts", "{folder}/heldout.jsonl"]
GRPO += ["--eval_every", 2, "--eval_judge", "tiny/gold.py"]
STAGES = {  # name: (stage, options)
    "01": ("01_generate", ["--prompts", "{folder}/prompts.jsonl", "--n", 4, "--batch_tokens", 600, *SAMPLING]),
    "02": ("02_verify_sft", ["--responses", "{folder}/01/whole", "--epochs", 2, "--batch_size", 4, "--save_every", 1]),
    "03": ("03_steer_selfgen", ["--prompts", "{folder}/prompts.jsonl", "--epochs", 2, "--batch_size", 3, "--save_every",
           2, "--benign_loss", "kl", "--lora_dropout", 0.1, "--batch_tokens", 600, *SAMPLING]),
    "04": ("04_grpo", [*GRPO, "--updates_per_batch", 2, "--beta", 0.04]),
    "04 LoRA": ("04_grpo", [*GRPO, "--lora_rank", 4, "--save_every", 2]),
    "05": ("05_eval", ["--bench", "plain={folder}/heldout.jsonl", "sums={folder}/sums.jsonl", "--models",
           "base=tiny/lrm", "sinternal={folder}/02/whole/checkpoint", "--judges", "tiny/gold.py", "tiny/guard",
           *SAMPLING]),
}  # fmt: skip
CALLS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "shutil.rmtree")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def killer(run: Path, kind: str, moment: int):
    """Sets the trap inside a fork, and counts: {"call": calls that change the run folder, "half": lines appended}."""
    counts, append = {"call": 0, "half": 0}, plumbing.append_jsonl

    def hook(event, arguments):
        if event in CALLS and str(run) in str(arguments[0]):
            counts["call"] += 1
            if kind == "call" and counts["call"] == moment:
                die()

    def append_half(path, lines):
        counts["half"] += 1
        if kind != "half" or counts["half"] < moment:
            return append(path, lines)
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        end = random.randrange(1, len(data))
        with path.open("ab") as file:
            file.write(data[: end - (data[end - 1 : end] == b"\n")])
        die()

    sys.addaudithook(hook)
    for module in (plumbing, plumbing.rows, plumbing.progress):  # wherever its name is bound
        module.append_jsonl = append_half
    return counts


def forked(stage, run: Path, options, kind: str = "", moment=0) -> tuple[int, str, dict]:
    """(exit status, output, counts) of a stage in a fork of this process."""
    log = run.with_suffix(".log")
    child = os.fork()
    if child == 0:
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = open(1, "w", closefd=False)
        sys.argv = [Path(stage.__file__).name, "--run", str(run), *options]
        counts, status = killer(run, kind, moment), 1
        try:
            plumbing.run_stage(stage.main)
            status = 0
        except SystemExit as error:
            print(error)
        finally:
            sys.stdout.flush()
            os.write(1, f"\n{json.dumps(counts)}".encode())
            os._exit(status)
    if kind in ("clock", "interrupt"):
        time.sleep(moment)
        os.kill(child, signal.SIGKILL if kind == "clock" else signal.SIGINT)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = log.read_text(errors="replace")
    return status, text, json.loads(text.splitlines()[-1]) if status == 0 else {}


def real(stage, run: Path, options, seconds: float = 0) -> tuple[int, str]:
    """The command as a user types it, killed after so many seconds."""
    command = [sys.executable, Path(stage.__file__).name, "--run", str(run), *options]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        return 0, process.communicate(timeout=seconds or 600)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        return -signal.SIGKILL, process.communicate()[0]


def comparable(path: Path):
    """(rows without times, the guard's probabilities): what must be the same after any number of kills."""
    found = rows(path)
    key = "step" if "step" in found[0] else "id"
    assert len({row[key] for row in found}) == len(found), f"{path}: a row stands twice"
    found = [{k: v for k, v in row.items() if "seconds" not in k} for row in found]
    text = json.dumps(sorted(found, key=lambda row: row[key]))
    probabilities = [float(p) for p in re.findall(r'"probability": ([\d.]+)', text)]
    return re.sub(r'"probability": [\d.]+', "", text), probabilities


def compare(whole: Path, run: Path) -> tuple[int, int]:
    """(rows, weight files) that are the same in both run folders; anything else is an AssertionError."""
    files = [{str(p.relative_to(folder)) for p in folder.rglob("*")} for folder in (whole, run)]
    assert files[0] == files[1], f"{run}: {files[0] ^ files[1]} in one folder only"
    count, weights = 0, 0
    for name in sorted(files[0]):
        a, b = whole / name, run / name
        if a.suffix == ".jsonl" and a.stat().st_size:
            (text, p), (other_text, q) = comparable(a), comparable(b)
            assert text == other_text and p == pytest.approx(q, abs=2e-4), f"{b}: other rows"  # rounding
            count += len(rows(b))
        elif a.suffix == ".safetensors":
            assert a.read_bytes() == b.read_bytes(), f"{b}: other weights"
            weights += 1
        elif name in ("summary.txt", "trained.json"):
            assert a.read_text().replace(str(whole), "") == b.read_text().replace(str(run), ""), f"{b} differs"
        elif name == "results.json":
            assert json.loads(a.read_text())["rows"] == json.loads(b.read_text())["rows"], f"{b}: other results"
    return count, weights


def torture(name: str, folder: Path, kills: int, real_kills: int, rng: random.Random) -> dict:
    """Chains of kills, each ended by a run to the end and a comparison, until enough kills are tried."""
    number, options = STAGES[name]
    stage, options = load(number), [str(option).format(folder=folder) for option in options]
    whole = folder / name.replace(" ", "-") / "whole"
    whole.parent.mkdir()
    began = time.time()
    status, output, counts = forked(stage, whole, options)
    seconds = time.time() - began
    assert status == 0, output
    found = {
        "tried": 0,
        "hit": 0,
        "call": 0,
        "half": 0,
        "clock": 0,
        "interrupt": 0,
        "rows": 0,
        "weights": 0,
        "repaired": 0,
    }
    chain = 0
    while found["tried"] < kills + real_kills:
        chain += 1
        run, half = whole.with_name(f"run{chain}"), False
        by_hand = found["tried"] >= kills
        for _ in range(1 if by_hand else rng.randint(1, 4)):
            kind = "clock" if by_hand else ("call", "half", "clock", "interrupt")[found["tried"] % 4]
            if by_hand:
                status, output = real(stage, run, options, rng.uniform(3, 4.5 + seconds))
            else:
                last = {"call": counts["call"], "half": max(1, counts["half"] // 2)}.get(kind)
                moment = rng.randint(1, last) if last else rng.uniform(0.05, seconds)
                status, output, _ = forked(stage, run, options, kind, moment)
            stopped = [line for line in output.splitlines() if line.startswith("stopped: ")]
            assert status in (0, 130 if kind == "interrupt" else -signal.SIGKILL), output
            assert "Traceback" not in output and len(stopped) == (status == 130), output
            found["tried"] += 1
            found["hit"] += status != 0
            found[kind] += status != 0
            half = kind == "half" and status != 0
            if status == 0 or half or found["tried"] == kills:
                break
        status, output = real(stage, run, options) if by_hand else forked(stage, run, options)[:2]
        assert status == 0 and "Traceback" not in output, output
        assert not half or output.count("removed a half-written last line") == 1, output
        found["repaired"] += half
        count, weights = compare(whole, run)
        found["rows"] += count
        found["weights"] += weights
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=2, help="of each stage, in forks")
    parser.add_argument("--real", type=int, default=0, help="more of each stage, of the command as it is typed")
    parser.add_argument("--stages", nargs="+", default=list(STAGES), help="needs 01 before 02 and 02 before 05")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    started.import_what_stages_import()
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, source, part in (
            ("prompts", "train", slice(0, 480, 80)),
            ("heldout", "test_plain", slice(0, 240, 60)),
            ("sums", "test_sums", slice(0, 2)),
        ):
            text = (ROOT / f"tiny/prompts/{source}.jsonl").read_text().splitlines(keepends=True)
            (folder / f"{file}.jsonl").write_text("".join(text[part]))
        for name in options.stages:
            began = time.time()
            f = torture(name, folder, options.kills, options.real, random.Random(f"{options.seed} {name}"))
            kinds = f"{f['clock']} by the clock, {f['call']} at a file call, {f['half']} inside a line, {f['interrupt']} interrupted"
            lines.append(
                f"| {name} | {f['tried']} | {f['hit']}: {kinds} | {f['repaired']} | {f['rows']} | {f['weights']} |"
            )
            print(lines[-1], f"{time.time() - began:.0f} s", flush=True)
    head = "| stage | kills tried | hit before the end | half lines repaired | rows compared | weight files equal |"
    text = "\n".join([head, "|---" * 6 + "|", *lines])
    if options.report:
        options.report.write_text(text + "\n")


if __name__ == "__main__":
    main()
