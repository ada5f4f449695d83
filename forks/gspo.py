"""GSPO (arXiv 2507.18071): one ratio for a whole response, in place of one for each token.

    s_i = exp( mean over tokens of log pi(y_t) - log pi_old(y_t) )
    loss_i = - min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i)

The reward is for a response, so the weight that corrects for old weights is one of the response.
Its clip range is a thousand times smaller (3e-4 and 4e-4 in the paper), because a mean of log
ratios hardly moves. With one update per batch every ratio is 1 and GSPO is GRPO; so four here, and
GRPO with four as the control.

    python forks/gspo.py        # about five minutes on two cores
"""

import table  # first: it opens the project's folder for imports

import torch


def surrogate(log_probs, old, advantages, lengths, clip_low, clip_high):
    gaps = (log_probs - old).split(lengths)  # one for each response
    means = torch.stack([gap.mean() for gap in gaps])  # (B,)
    ratio = means.exp().repeat_interleave(torch.tensor(lengths, device=old.device))  # (N,)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    return loss, clipped * advantages < ratio * advantages


if __name__ == "__main__":
    grpo = table.stage("04_grpo")
    table.run("grpo-4-updates", grpo, "--updates_per_batch", 4)  # the control: nothing replaced
    grpo.surrogate = surrogate
    clip = ["--clip_low", 3e-4, "--clip_high", 4e-4]
    table.run("gspo", grpo, "--updates_per_batch", 4, "--loss", "grpo", *clip)
