"""bench/seconds.py: the phases of a stage are whole, apart and in the right place."""

import json
import os
import subprocess
import sys
import time

import pytest
import started
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import seconds  # noqa: E402


def test_the_outermost_phase_counts_alone(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(time, "time", lambda: next(clock))
    phases = seconds.Phases()
    inner = phases.watched(lambda: None, "load")
    outer = phases.watched(lambda: inner(), "judge")
    outer()  # 0 when it begins, 1 when inner does, 2 when it ends
    assert phases.seconds["judge"] == 2 and phases.seconds["load"] == 0
    inner()
    assert phases.seconds["load"] == 1


def test_of_a_generator_only_its_own_steps_count(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    phases = seconds.Phases()

    def steps():
        for _ in range(2):
            now[0] += 5
            yield

    for _ in phases.watched(steps, "sample")():
        now[0] += 100
    assert phases.seconds["sample"] == 10 and phases.depth == 0


@pytest.mark.parametrize("several", [[], ["-m", "plumbing.several", 2]])
def test_a_stage_that_is_looked_at(tmp_path, several):
    options = ["--run", tmp_path / "01", "--limit", 6, "--n", 2]
    done = started.run(["bench/seconds.py", *several, "01_generate.py", *options])
    assert done.returncode == 0 and "\n01_generate\n" in done.stdout, done.stderr
    row = seconds.read(tmp_path)["01"]
    assert sum(row[name] for name in seconds.COLUMNS) == pytest.approx(row["wall"])
    assert min(row[name] for name in ("start", "load", "sample", "judge", "rest")) > 0
    assert row["train"] == row["save"] == row["figures"] == 0
    report = {"stages": {"01": row}, "seconds": 9.0, "jobs": "-j2", "machine": "two", "load before": 0, "load after": 0}
    table = seconds.table(report).splitlines()
    assert table[-2].split("|")[2:5] == [" 0 ", f" {row['start']:.1f} ", f" {row['load']:.1f} "]
    assert json.loads((tmp_path / "01/phases0.json").read_text())["CPU"] <= row["CPU"]


def test_the_page_can_be_made_from_anywhere(tmp_path):
    """As `python bench/seconds.py` starts: only bench/ is where Python looks."""
    row = {name: 1.0 for name in [*seconds.COLUMNS, "wall", "CPU"]} | {"began": 10.0}
    report = {"seconds": 20.4, "jobs": "-j2", "machine": "m", "load before": 0, "load after": 1, "stages": {"01": row}}
    (tmp_path / "report.json").write_text(json.dumps(report))
    code = "import json, seconds; print(seconds.table(json.load(open('report.json'))))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bench")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "20 seconds with -j2" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-3:-1] == ["| 01 | 0 |" + " 1.0 |" * 10, "| all |  |" + " 1.0 |" * 10]
