"""A fork of stage 04 with another reward: 1 if the thinking checks safety, whatever it finds.

No guard's verdict and no answer is rewarded, but sums must be right. GRPO from the base model. It
asks what the check is worth by itself. No paper's: ours.

    python forks/checks_rewarded.py     # a minute of training and one of evaluation on two cores
"""

import table  # first: it opens the project's folder for imports

import judges
import plumbing

self_check = plumbing.load_rule("tiny/gold.py", "self_check")


def reward(row, parsed, verdict, options):
    thinking, answer, state = parsed
    if "gold" in row:
        return float(judges.answer_is_correct(answer, row["gold"]))
    return float(state == "closed" and self_check(thinking))


if __name__ == "__main__":
    grpo = table.stage("04_grpo")
    grpo.reward = reward
    table.run("checks-rewarded", grpo)
