"""Stage 02 that also keeps the model of every 20th step, in <run>/looks/: python bench/looks.py --run … (its options).

The schedule is that of the whole run: each look is a state on the way, not a shorter run.
"""

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import epochs_of, load_tokenizer, save_checkpoint  # noqa: E402
from plumbing import run_stage  # noqa: E402

EVERY = 20  # optimizer steps


def looked_at(run: Path, options, items: list, trainer):
    """Stage 02's steps. What follows the `yield` runs when the optimizer has made the step."""
    tokenizer = load_tokenizer(options.model)
    for step, batch, metrics in epochs_of(run, options, items, trainer):
        yield step, batch, metrics
        if (step + 1) % EVERY == 0:
            folder = run / f"looks/{step + 1}"
            folder.parent.mkdir(exist_ok=True)
            save_checkpoint(trainer.model, tokenizer, folder, options.model)


def main():
    stage_02 = importlib.import_module("02_verify_sft")
    stage_02.epochs_of = looked_at
    stage_02.main()


if __name__ == "__main__":
    run_stage(main)
