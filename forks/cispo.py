"""CISPO (MiniMax-M1, arXiv 2506.13585): clip the importance weight, and let every token learn.

    loss_t = - stop_gradient( min(ratio_t, 1 + high) ) A_i log pi(y_t)

PPO's clipping takes a token out of the loss once its ratio has left the range; rare tokens that
begin a reflection ("wait", here "check the answer") leave it first. Here the ratio is a weight with
a cap, and the gradient is that of log pi for every token. No lower bound (the paper's choice), a
mean over the step's tokens (`--loss dapo`). With one update per batch all of this is REINFORCE, so
four, and GRPO with the same mean and four updates as the control. The cap 1 + high is 5, that of
ScaleRL (arXiv 2510.13786), which TRL advises.

    python forks/cispo.py       # about five minutes on two cores
"""

import table  # first: it opens the project's folder for imports


def surrogate(log_probs, old, advantages, lengths, clip_low, clip_high):
    ratio = (log_probs - old).exp().detach()
    weight = ratio.clamp(max=1 + clip_high)
    return -weight * advantages * log_probs, weight < ratio


if __name__ == "__main__":
    grpo = table.stage("04_grpo")
    same = ["--updates_per_batch", 4, "--loss", "dapo"]
    table.run("dapo-4-updates", grpo, *same)  # the control: nothing replaced
    grpo.surrogate = surrogate
    table.run("cispo", grpo, *same, "--clip_high", 4.0)
