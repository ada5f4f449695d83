"""`make demo`: what reads what, what runs again, what is said; and stages as several processes (plumbing/several.py)."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import started
from conftest import ROOT

STAGES = ["01_generate", "01_heldout", "02_verify_sft", "03_steer_selfgen"]
STAGES += ["04_grpo_base", "04_grpo_sinternal", "04_grpo_thinksafe", "05_eval"]
READS = {  # by the README
    "02_verify_sft": ["01_generate", "01_heldout"],
    "04_grpo_sinternal": ["02_verify_sft"],
    "04_grpo_thinksafe": ["03_steer_selfgen"],
    "05_eval": STAGES[2:-1],
}
# A Python that only says when a stage began and ended, and fails where it is to
PYTHON = """#!/bin/bash
run=$(sed 's/.*--run \\([^ ]*\\).*/\\1/' <<< "$*")
stage=$(basename $run)
echo "begin $stage $OMP_NUM_THREADS" >> "$LOG"
sleep 0.05
[ "$stage" != "$FAILS" ] || { echo "error: $stage has changed" >&2; exit 1; }
mkdir -p $run
echo "$*" > $run/summary.txt
echo "end $stage" >> "$LOG"
"""


class Demo:
    def __init__(self, folder: Path):
        self.runs, self.log = folder / "runs", folder / "log"
        (folder / "venv").mkdir()
        (folder / "venv/ready").touch()
        (folder / "python").write_text(PYTHON)
        (folder / "python").chmod(0o755)
        self.variables = [f"PY={folder}/python", f"VENV={folder}/venv", f"RUNS={self.runs}"]

    def make(self, *options, fails: str = "") -> tuple[subprocess.CompletedProcess, list[str]]:
        """What make says, and the lines of the log."""
        self.log.write_text("")
        environment = {"PATH": os.environ["PATH"], "LOG": str(self.log), "FAILS": fails}
        command = ["make", "demo", *options, *self.variables]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        return done, self.log.read_text().splitlines()


@pytest.fixture
def demo(tmp_path):
    return Demo(tmp_path)


def begun(lines: list[str]) -> list[str]:
    return [line.split()[1] for line in lines if line.startswith("begin")]


def most_at_once(lines: list[str]) -> int:
    running, most = 0, 0
    for line in lines:
        running += 1 if line.startswith("begin") else -1
        most = max(most, running)
    return most


@pytest.mark.parametrize("options, most", [([], 2), (["-j1"], 1), (["-j2"], 2)])
def test_every_stage_runs_once_after_what_it_reads(demo, options, most):
    """Two at a time, whatever -j each with one thread and the same command: so -j changes no row."""
    done, lines = demo.make(*options)
    assert done.returncode == 0, done.stderr
    assert sorted(begun(lines)) == STAGES and most_at_once(lines) == most
    for stage, read in READS.items():
        for other in read:
            assert lines.index(f"end {other}") < lines.index(f"begin {stage} 1"), (stage, other)
    assert all(line.endswith(" 1") for line in lines if line.startswith("begin"))
    commands = {stage: (demo.runs / stage / "summary.txt").read_text() for stage in STAGES}
    for stage, read in READS.items():
        assert all(f"{demo.runs}/{other}" in commands[stage] for other in read)


def test_what_is_finished_is_not_run_again(demo):
    demo.make()
    assert demo.make()[1] == []
    summary = demo.runs / "04_grpo_sinternal/summary.txt"
    summary.unlink()
    assert begun(demo.make()[1]) == ["04_grpo_sinternal", "05_eval"]
    later = time.time() + 60
    os.utime(demo.runs / "01_heldout/summary.txt", (later, later))
    assert begun(demo.make("-n")[1]) == []
    again = begun(demo.make("-j1")[1])
    assert again[0] == "02_verify_sft" and "04_grpo_sinternal" in again and "03_steer_selfgen" not in again


@pytest.mark.parametrize(
    "file", ["03_steer_selfgen.py", "common.py", "engines/hf.py", "plumbing/runs.py", "tiny/gold.py"]
)
def test_changed_code_is_shown_to_the_stage_which_may_refuse_it(demo, file):
    """Make itself decides nothing about code: it runs the stage, whose own check refuses or goes on."""
    demo.make()
    command = ["make", "-n", "-W", file, *demo.variables, f"{demo.runs}/05_eval/summary.txt"]
    what = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    asked = set(re.findall(rf"--run {demo.runs}/(\w+)", what.stdout))
    assert {"03_steer_selfgen", "04_grpo_thinksafe", "05_eval"} <= asked
    assert ("01_generate" in asked) is (file != "03_steer_selfgen.py")


def test_a_stage_that_fails_says_what_to_do(demo):
    done, lines = demo.make(fails="03_steer_selfgen")
    assert done.returncode != 0 and "error: 03_steer_selfgen has changed" in done.stderr
    assert f"rm -r {demo.runs}/03_steer_selfgen begins it anew" in done.stdout + done.stderr
    assert not {"04_grpo_thinksafe", "05_eval"} & set(begun(lines))
    assert demo.make()[0].returncode == 0 and (demo.runs / "05_eval/summary.txt").exists()


# Several processes ----------------------------------------------------------------------------------------------------
SEVERAL = ["-m", "plumbing.several", 2]


def stage_of(folder: Path, body: str) -> Path:
    file = folder / "stage.py"
    head = "import os, sys, time\nrank = os.environ['RANK']\n"
    file.write_text(head + body)
    return file


def test_each_process_has_its_place_and_the_arguments(tmp_path):
    body = "print(rank, os.environ['WORLD_SIZE'], os.environ['LOCAL_RANK'], sys.argv[1:], __name__, flush=True)\n"
    done = started.run([*SEVERAL, stage_of(tmp_path, body), "--run", "x"])
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{r} 2 {r} ['--run', 'x'] __main__" for r in (0, 1)]


@pytest.mark.parametrize("who", ["in '01'", "== '0'", "== '1'"])
def test_a_mistake_is_said_once_and_ends_all(tmp_path, who):
    """In both processes, or in one while the other would wait for an hour."""
    body = f"if rank {who}:\n    raise SystemExit('error: wrong')\ntime.sleep(3600)\n"
    began = time.time()
    done = started.run([*SEVERAL, stage_of(tmp_path, body)])
    assert done.returncode == 1 and done.stderr == "error: wrong\n" and time.time() - began < 60


def test_a_killed_process_ends_the_other(tmp_path):
    body = "os.kill(os.getpid(), 9) if rank == '1' else time.sleep(3600)\n"
    assert started.run([*SEVERAL, stage_of(tmp_path, body)]).returncode == 128 + signal.SIGKILL


@pytest.mark.parametrize("arguments", [[], [2], ["05_eval.py"], [0, "05_eval.py"], [2, "06_eval.py"]])
def test_how_it_is_called(arguments):
    done = started.run(["-m", "plumbing.several", *arguments])
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_an_interrupt_ends_both_in_one_line(tmp_path):
    """As by Ctrl-C in a terminal, which interrupts the whole group."""
    body = "import plumbing\ndef main():\n    os.write(1, f'{rank}\\n'.encode())\n    time.sleep(3600)\nplumbing.run_stage(main)\n"
    command = [sys.executable, *map(str, SEVERAL), str(stage_of(tmp_path, body))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    several = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
    assert {several.stdout.readline().strip() for _ in range(2)} == {"0", "1"}
    time.sleep(0.2)
    os.killpg(several.pid, signal.SIGINT)
    _, errors = several.communicate(timeout=60)
    assert several.returncode == 130 and errors.strip().startswith("stopped: ") and errors.strip().count("\n") == 0
