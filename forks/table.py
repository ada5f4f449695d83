"""What every fork ends with: run the changed stage, evaluate its checkpoint, write its row.

    import table                            # first: it opens the project's folder for imports

    grpo = table.stage("04_grpo")
    grpo.reward = my_reward                 # any function of the stage
    table.run("my-reward", grpo)            # runs/forks/my-reward/seed0, a row of results/forks.md

    python forks/my_reward.py --seed 1      # another seed of the same row
    python forks/my_reward.py --steps 80    # a row of its own, "my-reward --steps 80"
    python forks/table.py                   # the rows to compare with, from the demo's checkpoints

A run folder knows the stage's file and its options, but not your fork: change the fork, and delete
its folder."""

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)  # presets name files from here
sys.path.insert(0, str(ROOT))
import plumbing  # noqa: E402
from plumbing import figures  # noqa: E402

DEMO = "runs/demo"
EVALUATION = ["--judges", "tiny/gold.py", "--n", "4", "--decoding", "preset", "uncut"]
EVALUATION += ["--prefill", "think-open"]
COLUMNS = {  # heading -> (benchmark, metric)
    "ASR plain ↓": ("plain", "asr"),
    "ASR wrapped ↓": ("wrapped", "asr"),
    "wrapped, T = 1 ↓": ("wrapped.uncut", "asr"),
    "wrapped, any of 4 ↓": ("wrapped", "asr_any"),
    "thinking begun ↓": ("wrapped.think-open", "asr"),
    "compliance plain ↑": ("plain", "compliance"),
    "compliance wrapped ↑": ("wrapped", "compliance"),
    "sums ↑": ("sums", "accuracy"),
    "verify F1 ↑": ("verify", "verify_f1"),
}
START = {
    "base": "tiny/lrm",
    "SInternal": f"{DEMO}/02_verify_sft/checkpoint",
    "ThinkSafe": f"{DEMO}/03_steer_selfgen/checkpoint",
    "GRPO": f"{DEMO}/04_grpo_base/checkpoint",
    "SInternal+GRPO": f"{DEMO}/04_grpo_sinternal/checkpoint",
}
# these take four updates on a batch, where the others take one: a table of their own
FOUR_UPDATES = ["grpo-4-updates", "gspo", "dapo-4-updates", "cispo"]
NOTE = """\
Mean over seeds (lowest–highest). Unseen items, judged by the exact rule of the miniature world; 4
responses to a prompt at temperature 0.6 with top-p 0.95 and top-k 20, and at T = 1 without cuts.
Seeds are those of training; the evaluation's is 0. A fork takes 40 steps of 16 prompts x 8
responses at a rate of 1e-4, unless its file says otherwise. The rows without a fork are
checkpoints of `make demo`.
"""


def stage(name: str):
    """A numbered stage as a module, whose functions can be replaced."""
    return importlib.import_module(name)


def call(module, *options):
    """A stage with this command line."""
    with mock.patch.object(sys, "argv", [f"{module.__name__}.py", *map(str, options)]):
        module.main()


def run(name: str, module, *options):
    """The stage with `options` and whatever stands on the command line, then its row."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="")  # in place of runs/forks and of results
    own, more = parser.parse_known_args()
    name = " ".join([name, *more])
    folder = Path(own.out or "runs/forks") / name.replace(" ", "") / f"seed{own.seed}"
    call(module, "--run", folder / module.__name__, "--seed", own.seed, *options, *more)
    checkpoint = folder / module.__name__ / "checkpoint"
    write(name, own.seed, evaluated(checkpoint, folder), Path(own.out or "results"))


def evaluated(model: str | Path, folder: Path) -> dict[str, float]:
    """{heading: value} of a model; verify F1 only where the demo has left its test set."""
    line = ["--run", folder / "05_eval", "--models", f"fork={model}", *EVALUATION]
    test = Path(DEMO) / "02_verify_sft/verify_test.jsonl"
    call(stage("05_eval"), *line, *(["--verify_test", test] if test.exists() else []))
    rows = json.loads((folder / "05_eval/results.json").read_text())["rows"]
    values = {(row["benchmark"], row["metric"]): row["value"] for row in rows}
    return {heading: values[key] for heading, key in COLUMNS.items() if key in values}


def write(name: str, seed: int, values: dict[str, float], folder: Path):
    """One seed of a row into forks.json, and forks.md anew from all of it."""
    file = folder / "forks.json"
    rows = json.loads(file.read_text()) if file.exists() else {}
    rows.setdefault(name, {})[str(seed)] = values
    rows = {key: rows[key] for key in [*START, *rows] if key in rows}  # those first
    plumbing.write_atomic(file, json.dumps(rows, indent=1))
    plumbing.write_atomic(folder / "forks.md", markdown(rows))


def markdown(rows: dict[str, dict]) -> str:
    four = {name: rows[name] for name in FOUR_UPDATES if name in rows}
    lines = table_of({name: row for name, row in rows.items() if name not in four})
    if four:
        lines += ["", "## Four updates on a batch", "", *table_of(four)]
    return "\n".join([*lines, "", NOTE])


def table_of(rows: dict[str, dict]) -> list[str]:
    body = []
    for name, seeds in rows.items():
        cells = []
        for heading in COLUMNS:
            values = [values[heading] for values in seeds.values() if heading in values]
            spread = f" ({min(values):.2f}–{max(values):.2f})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.2f}{spread}" if values else "")
        body.append([name, str(len(seeds)), *cells])
    return figures.table(["model", "seeds", *COLUMNS], body)


if __name__ == "__main__":
    for name, model in START.items():
        plumbing.require_model(model)
        write(name, 0, evaluated(model, Path("runs/forks") / name / "seed0"), Path("results"))
