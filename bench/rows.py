"""Where each row of the claims matrix is trained: bench/matrix.py measures them, bench/verdicts.py
judges.

A row is a checkpoint: a stage with its options, on the checkpoint of another row. All rows have the
same prompts and steps. A *base* is a miniature world with its own base model: 0 is the committed
one, the others are built from another seed, with other items, recipes, prompts and weights.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from claims import HALF, ROOT, SINTERNAL, THINKSAFE, execute, hold_out, stage
from curves import BASE_STEPS, CHECKS, PROMPTS, STEPS

FIRST, SECOND = "01_generate.py", "02_verify_sft.py"
THIRD, FOURTH = "03_steer_selfgen.py", "04_grpo.py"
WORLD_MODELS = ["lrm", "guard", "expert"]
ANSWERS = {  # runs of stage 01 that stage 02 reads -> options
    "01": [],
    "01-half": ["--limit", 242],
    "01-other": [],  # of another model, see answers_of
}


class Row(NamedTuple):
    start: str  # the row whose checkpoint it is trained on, "base" for the world's own model
    script: str
    options: list = []
    answers: str = "01"  # stage 02 only: which run of stage 01 it verifies


class Place(NamedTuple):
    """Where one base is trained with one seed."""

    base: int
    seed: int
    runs: Path  # absolute

    @property
    def world(self) -> Path:
        return self.runs / f"world{self.base}"

    @property
    def home(self) -> Path:
        """The folder that stages are started in: it holds tiny/."""
        return self.world if self.base else ROOT

    def run(self, name: str) -> Path:
        return self.world / f"seed{self.seed}" / name

    def model(self, row: str) -> str:
        return str(self.run(row) / "checkpoint") if row != "base" else "tiny/lrm"


CORE = {
    "answer-SFT": Row("base", SECOND, ["--target", "answer"]),
    "SInternal": Row("base", SECOND),
    "ThinkSafe": Row("base", THIRD),
    "SInternal-ThinkSafe": Row("SInternal", THIRD),
    # ThinkSafe's own answers are nearly all safe: there is nothing to verify but the base model's
    "ThinkSafe-SInternal": Row("ThinkSafe", SECOND),
}
GRPO_STARTS = list(CORE)
# the paper's rank: what does it cost?
CORE["SInternal-rank-16"] = Row("base", SECOND, ["--lora_rank", 16])
# the run from the base is checked every ten steps: how many until it is as safe as ThinkSafe?
CORE["base+GRPO"] = Row("base", FOURTH, CHECKS)
CORE |= {f"{start}+GRPO": Row(start, FOURTH) for start in GRPO_STARTS}
LONGER = f"base+GRPO-{BASE_STEPS}"  # base+GRPO, gone on with
CORE[LONGER] = Row("base", FOURTH, [*CHECKS, "--steps", BASE_STEPS])

PARTS = ("verdict-only", "critique-only", "bare-check")
ABLATIONS = {name: Row("base", SECOND, SINTERNAL[name]) for name in PARTS}
ABLATIONS["other-answers"] = Row("base", SECOND, answers="01-other")
ABLATIONS[HALF] = Row("base", SECOND, answers="01-half")
for variant, options_of_03 in THINKSAFE.items():
    if variant != "ThinkSafe":
        ABLATIONS[variant] = Row("base", THIRD, options_of_03)
ABLATIONS["ThinkSafe-reward+GRPO"] = Row("base", FOURTH, ["--reward", "thinksafe"])
ABLATIONS["beta-0.04+GRPO"] = Row("base", FOURTH, ["--beta", 0.04])
SHARES = ["--shares", "harmful=0.3", "benign=0.3", "maths=0.2", "verify=0.2"]
ABLATIONS["verification-rows+GRPO"] = Row("base", FOURTH, SHARES)
ROWS = {**CORE, **ABLATIONS}
# on the other bases: the methods, both together, and GRPO from the four that there is a claim on
SHORT = ["answer-SFT", "SInternal", "ThinkSafe", "SInternal-ThinkSafe"]
SHORT += ["base+GRPO", "answer-SFT+GRPO", "SInternal+GRPO", "ThinkSafe+GRPO"]


def build(world: Path, base: int, models: list[str]):
    """The world of a base, those of its models that are missing; some minutes each on one core."""
    folder = world / "tiny" if base else world
    if base == 0:  # what is committed is there
        models = [name for name in models if not (ROOT / "tiny" / name).exists()]
    scores = folder / "scores.json"
    built = json.loads(scores.read_text()) if scores.exists() else {}
    if missing := [name for name in models if name not in built]:
        seed = ["--seed", base] if base else []
        words = [ROOT / "tiny/build.py", "--only", *missing, "--out", folder, *seed]
        execute(words, ROOT, f"world {base}")


def prepare(base: int, runs: Path, ablations: bool):
    """What every seed of a base needs: its world, and held-out answers to verify."""
    place = Place(base, 0, runs)
    build(place.world, base, [*WORLD_MODELS, *(["other"] if ablations else [])])
    hold_out(place.world, place.home)


def answers_of(place: Place, name: str) -> Path:
    """The run of stage 01 that has these answers."""
    options = ["--seed", place.seed, *ANSWERS[name]]
    if name == "01-other":
        options += ["--model", place.world / ("tiny/other" if place.base else "other")]
    stage(FIRST, place.run(name), *options, home=place.home)
    return place.run(name)


def train(place: Place, name: str):
    """Trains a row after those that it starts from; a finished one is left as it is."""
    if name == "base":
        return
    row, run = ROWS[name], place.run(name)
    train(place, row.start)
    options = ["--seed", place.seed, "--model", place.model(row.start), *row.options]
    if row.script == SECOND:
        heldout = place.world / "heldout"
        options += ["--responses", answers_of(place, row.answers), "--heldout", heldout]
    if row.script == FOURTH and "--steps" not in row.options:
        options += ["--steps", STEPS]
    if name == "verification-rows+GRPO":  # answers that stage 02 verified, with the guard's labels
        train(place, "SInternal")
        options += ["--prompts", *PROMPTS, place.run("SInternal") / "train.jsonl"]
    if name == LONGER:
        train(place, "base+GRPO")
        go_on_from(place.run("base+GRPO"), run)
    stage(row.script, run, *options, home=place.home)


def go_on_from(finished: Path, run: Path):
    """A copy of a finished run that the stage goes on with: without the summary that says so."""
    if run.exists():
        return
    copy = run.with_name(run.name + ".part")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(finished, copy)
    (copy / "summary.txt").unlink()
    copy.rename(run)
