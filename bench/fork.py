"""README's fork, run: GRPO with another reward, six lines, from the base model, and what comes of it.

    python bench/fork.py     # about two minutes on two cores; writes results/fork.md

The reward looks at the thinking alone: 1 if it checks safety. No guard's verdict, no answer is rewarded.
"""

import importlib
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import answer_is_correct  # noqa: E402
from tiny.gold import self_check  # noqa: E402


def reward(row, parsed, verdict, options):
    thinking, answer, state = parsed
    if "gold" in row:
        return float(answer_is_correct(answer, row["gold"]))
    return float(state == "closed" and self_check(thinking))


def main():
    grpo = importlib.import_module("04_grpo")
    grpo.reward = reward
    with mock.patch.object(sys, "argv", ["04_grpo.py", "--run", "runs/fork/04_grpo"]):
        grpo.main()
    models = ["base=tiny/lrm", "checks-rewarded=runs/fork/04_grpo/checkpoint"]
    command = [sys.executable, "05_eval.py", "--run", "runs/fork/05_eval", "--models", *models]
    subprocess.run(command, cwd=ROOT, check=True)
    (ROOT / "results/fork.md").write_text((ROOT / "runs/fork/05_eval/results.md").read_text())


if __name__ == "__main__":
    main()
