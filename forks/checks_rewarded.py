"""A fork of stage 04 with another reward: 1 if the thinking checks safety, whatever it finds.

    python forks/checks_rewarded.py     # about two minutes on two cores; writes results/fork.md

No guard's verdict and no answer is rewarded, but sums must be right. GRPO from the base model."""

import importlib
import subprocess
import sys
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import judges  # noqa: E402
import plumbing  # noqa: E402

self_check = plumbing.load_rule("tiny/gold.py", "self_check")


def reward(row, parsed, verdict, options):
    thinking, answer, state = parsed
    if "gold" in row:
        return float(judges.answer_is_correct(answer, row["gold"]))
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
