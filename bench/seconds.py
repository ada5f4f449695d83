"""Where the seconds of `make demo` go: it is run with this file in place of Python, which looks on.

    python bench/seconds.py                    # the whole demo, anew; writes results/bench/demo_seconds.{json,md}
    python bench/seconds.py 03_steer_selfgen.py --run runs/x …    # one stage, by the way; <run>/phases.json

A phase is what the outermost of the functions of PHASES takes that is at work; "start" is everything until the stage's
own first line (Python and imports), "rest" what no phase has (reading, checking, statistics). Of stage 05's two
processes the first is shown; "CPU" counts both. Wall seconds mean little on a busy machine: its load is written too."""

import argparse
import functools
import gc
import inspect
import json
import os
import platform
import resource
import runpy
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = "results/bench/demo_seconds"
PHASES = {  # phase: functions, as module.name or module.class.name
    "load": [
        "plumbing.require_model",
        "plumbing.load_whole",
        "common.load_tokenizer",
        "engines.open_sampler",
    ],
    "sample": ["engines.answer_prompts", "engines.base.Sampler.replies"],
    "judge": ["judges.Judge.verdicts", "judges.judge_samples"],
    "train": ["common.TokenScorer.forward", "common.Trainer.backward", "common.Trainer.step"],
    "save": ["common.save_checkpoint", "plumbing.save_state"],
    "figures": ["plumbing.write_evaluation"],
}
PHASES["load"] += [
    "judges.Judge.__init__",
    "engines.open_training_sampler",
    "engines.hf.HfSampler.__init__",
]
PHASES["load"] += ["common.make_trainer", "common.reference_scorer"]
COLUMNS = ["start", *PHASES, "rest"]


class Phases:
    """Wall seconds by phase."""

    def __init__(self):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.depth = 0

    def enter(self):
        self.depth += 1
        return time.time()

    def leave(self, phase: str, began: float):
        self.depth -= 1
        if self.depth == 0:
            self.seconds[phase] += time.time() - began

    def watched(self, function, phase: str):
        """The function, or the generator, with its seconds counted where no other phase is at work."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            began = self.enter()
            try:
                return function(*args, **kwargs)
            finally:
                self.leave(phase, began)

        @functools.wraps(function)
        def steps(*args, **kwargs):
            items = function(*args, **kwargs)
            while True:
                began = self.enter()
                try:
                    item = next(items)
                except StopIteration:
                    return
                finally:
                    self.leave(phase, began)
                yield item

        return steps if inspect.isgeneratorfunction(function) else call

    def watch_all(self):
        import common
        import engines
        import engines.hf
        import judges
        import plumbing

        rooms = {"common": common, "engines": engines, "judges": judges, "plumbing": plumbing}
        for phase, names in PHASES.items():
            for name in names:
                room, *path, last = name.split(".")
                owner = functools.reduce(getattr, path, rooms[room])
                setattr(owner, last, self.watched(getattr(owner, last), phase))
        engines.load_tokenizer = common.load_tokenizer  # which has it by name


def born() -> float:
    """When this process, or the one that it was forked from, began."""
    import psutil

    return psutil.Process(int(os.environ.get("SECONDS_OF", os.getpid()))).create_time()


def one_stage(command: list[str]):
    """The stage as Python would run it, and <run>/phases.json of what it took."""
    began = born()
    sys.path[0] = str(ROOT)
    if command[0] == "-m":  # several processes of a stage: each looks on by itself
        os.environ["SECONDS_OF"] = str(os.getpid())
        sys.argv = [command[1], command[2], __file__, *command[3:]]
        return runpy.run_module(command[1], run_name="__main__")
    gc.disable()  # as plumbing does for a stage, until its imports are done
    sys.argv = command
    phases = Phases()
    phases.watch_all()
    start = time.time() - began
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        wall, times = time.time() - began, resource.getrusage(resource.RUSAGE_SELF)
        run, rank = Path(command[command.index("--run") + 1]), os.environ.get("RANK", "0")
        seconds = {"start": start, **phases.seconds}
        row = {**seconds, "rest": wall - sum(seconds.values()), "wall": wall}
        row |= {"CPU": times.ru_utime + times.ru_stime, "began": began, "ended": began + wall}
        if run.is_dir():
            (run / f"phases{rank}.json").write_text(json.dumps(row))


def read(runs: Path) -> dict[str, dict]:
    """{stage: its row}; the CPU seconds of all of its processes."""
    rows = {}
    for file in sorted(runs.glob("*/phases0.json")):
        row = json.loads(file.read_text())
        row["CPU"] = sum(json.loads(f.read_text())["CPU"] for f in file.parent.glob("phases?.json"))
        rows[file.parent.name] = row
    return rows


def table(report: dict) -> str:
    sys.path.insert(0, str(ROOT))
    from plumbing import figures  # not above: a stage's imports are its own seconds

    shown = [*COLUMNS, "wall", "CPU"]
    stages = sorted(report["stages"].items(), key=lambda pair: pair[1]["began"])
    first, body = stages[0][1]["began"], []
    for stage, row in stages:
        body.append([stage, f"{row['began'] - first:.0f}", *(f"{row[n]:.1f}" for n in shown)])
    totals = [sum(row[name] for _, row in stages) for name in shown]
    body.append(["all", "", *(f"{total:.1f}" for total in totals)])
    lines = figures.table(["stage", "from", *shown], body)
    head = f"`make demo`, by `python bench/seconds.py`: {report['seconds']:.0f} seconds with {report['jobs']}, on "
    head += f"{report['machine']}, load average {report['load before']:.1f} before and {report['load after']:.1f} after."
    what = "Wall seconds by phase; stages run side by side, so that the last line is more than the demo took."
    return "\n".join([head, "", what, "", *lines, ""])


def whole_demo(options):
    runs = Path(options.runs)
    if runs.exists():
        sys.exit(
            f"error: {runs} is there already, and what is finished takes no time; name a new --runs"
        )
    python = f"{sys.executable} {Path(__file__).resolve().relative_to(ROOT)}"
    command = [
        "make",
        "-s",
        *([f"-j{options.jobs}"] if options.jobs else []),
        "demo",
        f"PY={python}",
        f"RUNS={runs}",
    ]
    before, began = os.getloadavg()[0], time.time()
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        sys.exit(f"error: {' '.join(command)} failed, see above")
    report = {"seconds": time.time() - began, "jobs": f"-j{options.jobs or 2}"}
    report |= {"machine": f"{os.cpu_count()} cores ({platform.machine()})", "load before": before}
    report |= {"load after": os.getloadavg()[0], "stages": read(runs)}
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    out.with_suffix(".md").write_text(table(report))
    print(table(report))


def main():
    if len(sys.argv) > 1 and (sys.argv[1] == "-m" or sys.argv[1].endswith(".py")):
        return one_stage(sys.argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", default="runs/seconds", help="a new folder for the runs")
    parser.add_argument("--jobs", type=int, default=0, help="make's -j, if not its own 2")
    parser.add_argument("--out", default=OUT, help="of the .json and the .md")
    whole_demo(parser.parse_args())


if __name__ == "__main__":
    main()
