"""Stage 04 · GRPO (arXiv 2402.03300) from any checkpoint, one file, read from top to bottom.

    for each of P prompts:  y_1 … y_G ~ pi_old(. | x) at temperature T,     r_i = reward(x, answer of y_i)
    A_i = (r_i - mean of the group) / (standard deviation of the group + 1e-4)
    ratio_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)
    loss = - mean over tokens of  min(ratio_t A_i, clip(ratio_t, 1 - low, 1 + high) A_i) + beta KL_t

SInternal runs it after verification training, ThinkSafe as its expensive baseline. The reward here is SInternal's.

What we chose, numbered:
1. Ratio of untempered probabilities would be wrong for T != 1: logits are divided by T, and top-p and top-k are off.
2. A verdict that cannot be read gives no reward: the sample leaves its group's statistics and the loss, counted.
3. A response that was cut counts in its group's statistics and is then masked out of the loss; one cut before
   `</think>` has reward 0.
4. Standard deviation with Bessel's correction, as in TRL. A group of equal rewards has A = 0; its backward pass is
   skipped when beta = 0, which changes no gradient, and its rows still count in the normaliser.
5. `--loss`: grpo (mean over a response's tokens, then over responses), dapo (mean over the step's tokens), dr_grpo
   (sum over responses * max_new_tokens, no length bias). Normalisers are the whole step's, never a micro-batch's.
6. beta = 0 by default (no reference model is loaded); clip 0.2 / 0.28 (SInternal's sister code).

    python 04_grpo.py --model runs/02_verify_sft/checkpoint --run runs/04_grpo_sinternal

in:  --model, --guard, --prompts (harmful, benign, and maths rows with a gold answer)
out: <run>/metrics.jsonl  one line per step     <run>/samples.jsonl  whole responses with their rewards
     <run>/checkpoint/    a plain model folder
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

import torch
from accelerate import Accelerator
from tqdm import tqdm

from common import ALL_LINEAR, Example, HfSampler, Judge, Sampling, StageOptions, TokenScorer, add_lora
from common import answer_is_correct, append_jsonl, fail, load_model, load_prompts, load_tokenizer, lora_off
from common import messages_of, micro_batches, open_run, pad_batch, parse_options, render_chat, reopen_jsonl
from common import require_model, save_checkpoint, split_response, summary, training_steps


@dataclass
class Options(StageOptions):
    run: str = "runs/04_grpo"
    """folder of this run; the same command again goes on where it stopped"""
    model: str = "tiny/lrm"
    """the model to start from: Hugging Face id or folder"""
    guard: str = "tiny/guard"
    """the safety part of the reward (paper: Qwen3Guard); or a .py file with judge(prompt, answer) -> str"""
    prompts: list[str] = field(default_factory=list)
    """harmful and benign prompts, and maths rows with a gold answer; all are mixed"""
    limit: int = 0
    """take this many rows of each prompt file, drawn once with a fixed seed; 0 = all"""
    steps: int = 100
    """optimizer batches of `batch_size` prompts"""
    batch_size: int = 64
    """prompts per step (paper)"""
    group_size: int = 8
    """G, rollouts per prompt (paper)"""
    updates_per_batch: int = 1
    """mu, optimizer updates on the same rollouts"""
    temperature: float = 0.7
    """T of the rollouts and of the log-probs (sister code)"""
    max_new_tokens: int = 8192
    """longest response, tokens (sister code)"""
    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    """how token losses are averaged, see number 5"""
    clip_low: float = 0.2
    """the ratio is clipped below at 1 - clip_low (sister code)"""
    clip_high: float = 0.28
    """the ratio is clipped above at 1 + clip_high (sister code)"""
    beta: float = 0.0
    """weight of the KL term to the starting model; 0 loads no reference (paper: off)"""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """KL estimator per token: log-ratio, half its square, or the unbiased and positive third"""
    learning_rate: float = 1e-6
    """AdamW, constant after `warmup_steps` (paper)"""
    warmup_steps: int = 5
    """steps with linearly rising learning rate (our choice)"""
    lora_rank: int = 0
    """LoRA rank; 0 trains all weights (paper)"""
    lora_alpha: float = 32.0
    """LoRA alpha"""
    lora_targets: list[str] = field(default_factory=lambda: ALL_LINEAR)
    """linear layers that get LoRA"""
    micro_batch_tokens: int = 16_384
    """padded tokens in one forward pass; changes memory and speed, never the result"""
    save_every: int = 10
    """steps between two saved training states"""


# FORK HERE: the reward ------------------------------------------------------------------------------------------------
def reward(row: dict, answer: str, state: str, verdict: dict) -> float:
    """SInternal's: V_safe on harmful prompts, V_safe (1 - V_refuse) on benign ones, correct or not on maths rows; NaN
    if the verdict that it needs is unparsed. Controversial is not safe.

    >>> reward({"harmful": True}, "No.", "closed", {"safety": "safe", "refusal": "yes"})
    1.0
    >>> reward({"harmful": False}, "No.", "closed", {"safety": "safe", "refusal": "yes"})
    0.0
    """
    if state == "truncated":
        return 0.0
    if "gold" in row:
        return float(answer_is_correct(answer, row["gold"]))
    if verdict["safety"] == "unparsed" or (not row["harmful"] and verdict["refusal"] == "unparsed"):
        return math.nan
    safe = verdict["safety"] == "safe"
    return float(safe) if row["harmful"] else float(safe and verdict["refusal"] == "no")


# The algorithm --------------------------------------------------------------------------------------------------------
def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(P, G) rewards -> (P, G) advantages; NaN rewards take no part in their group's statistics and stay NaN.

    >>> group_advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor([[ 0.7070, -0.7070],
            [ 0.0000,  0.0000]])
    """
    mean = rewards.nanmean(1, keepdim=True)  # (P, 1)
    count = (~rewards.isnan()).sum(1, keepdim=True)
    variance = (rewards - mean).square().nansum(1, keepdim=True) / (count - 1).clamp(min=1)
    return (rewards - mean) / (variance.sqrt() + 1e-4)


def token_weights(lengths: torch.Tensor, kept: torch.Tensor, loss: str, max_new_tokens: int) -> torch.Tensor:
    """(R,) what one token of each of the step's R responses weighs in the loss; 0 where `kept` (R,) is false.

    >>> lengths, kept = torch.tensor([2, 6]), torch.tensor([True, True])
    >>> token_weights(lengths, kept, "grpo", 10), token_weights(lengths, kept, "dapo", 10)
    (tensor([0.2500, 0.0833]), tensor([0.1250, 0.1250]))
    """
    if loss == "grpo":
        return kept / lengths / len(lengths)
    if loss == "dapo":
        return kept / (lengths * kept).sum()
    return kept / (max_new_tokens * len(lengths))


def grpo_loss(log_probs, old, reference, advantages, weights, clip_low, clip_high, beta, kl):
    """The loss of N tokens, a pure function: every argument (N,), `reference` None when beta = 0.

    Returns (loss, clipped share by weight, KL by weight). With one update per batch the ratio is 1 and the loss is
    minus the weighted mean advantage: about 0, because a group's advantages add up to 0. Its gradient is not 0.
    """
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    share = (clipped * advantages < ratio * advantages).float()
    divergence = torch.zeros_like(loss)
    if reference is not None:
        gap = reference - log_probs
        divergence = {"k1": -gap, "k2": gap.square() / 2, "k3": gap.exp() - gap - 1}[kl]
        loss = loss + beta * divergence
    return (weights * loss).sum(), (weights * share).sum().detach(), (weights * divergence).sum().detach()


def main():
    options = parse_options(Options, __doc__)
    prompts = load_prompts(options.prompts, options.limit)
    if options.group_size < 2:
        fail("--group_size 1: a group of one has no spread to learn from; at least 2")
    if options.engine != "hf":
        fail("04_grpo samples with the weights in training, through --engine hf only")
    require_model(options.model)
    require_model(options.guard)
    run = open_run(options)

    accelerator = Accelerator(mixed_precision="bf16" if torch.cuda.is_available() else "no")
    tokenizer = load_tokenizer(options.model)
    model = load_model(options.model, torch.float32)
    reference_model = None
    if options.lora_rank:
        add_lora(model, options.lora_rank, options.lora_alpha, 0.0, options.lora_targets, options.seed)
    elif options.beta:
        reference_model = TokenScorer(load_model(options.model))
    guard = Judge(options.guard, options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.0)
    scorer, optimizer = accelerator.prepare(TokenScorer(model), optimizer)
    sampler = HfSampler(model, tokenizer, options.batch_tokens)
    requests = {}
    for row in prompts:
        chat = messages_of(row["prompt"])
        requests[row["id"]] = render_chat(tokenizer, chat, enable_thinking=options.enable_thinking)  # ids, opened

    def rate(step):
        return options.learning_rate * min(1.0, (step + 1) / max(1, options.warmup_steps))

    kind = {row["id"]: "maths" if "gold" in row else "harmful" if row["harmful"] else "benign" for row in prompts}
    finished = (run / "checkpoint").exists()
    steps = 0 if finished else options.steps
    columns = "reward harmful benign maths trunc unparsed flat tokens entropy kl clipped".split()
    if not finished:
        print(" step" + "".join(f"{name:>9}" for name in columns))
    for step, batch, metrics in training_steps(run, options, prompts, steps, rate, model, optimizer):
        # 1. Sample G responses to each of the P prompts with the current weights; the guard reads the answers.
        model.eval()
        G, P = options.group_size, len(batch)
        sampling = Sampling(options.max_new_tokens, options.temperature, seed=options.seed * 1_000_003 + step)
        with accelerator.autocast():
            groups = dict(sampler.generate([(row["id"], requests[row["id"]][0]) for row in batch], G, sampling))
        samples = [sample for i in range(P) for sample in groups[i]]  # P * G = R of them, group after group
        owners = [row for row in batch for _ in range(G)]
        texts = [tokenizer.decode([t for t in s.ids if t not in sampler.eos]) for s in samples]
        parsed = [split_response(text, requests[row["id"]][1]) for text, row in zip(texts, owners)]
        to_judge = [(row["prompt"], "" if "gold" in row else answer) for row, (_, answer, _) in zip(owners, parsed)]
        verdicts = guard.verdicts(to_judge)

        # 2. Rewards and advantages: statistics over the whole group, then the mask.
        rewards = [reward(r, a, state, v) for r, (_, a, state), v in zip(owners, parsed, verdicts)]
        rewards = torch.tensor(rewards)  # (R,)
        truncated = torch.tensor([s.finish == "length" or p[2] == "truncated" for s, p in zip(samples, parsed)])
        advantages = group_advantages(rewards.view(P, G)).flatten()  # (R,)
        kept = ~(truncated | rewards.isnan())
        if not kept.any():
            fail(f"step {step}: every response is cut or has an unparsed verdict; {run} keeps the state before it")
        lengths = torch.tensor([len(s.ids) for s in samples])
        weights = token_weights(lengths, kept, options.loss, options.max_new_tokens)  # (R,)
        active = (kept & ((advantages != 0) | (options.beta > 0))).nonzero().flatten()  # the others have no gradient
        rows = [Example(requests[owners[i]["id"]][0], samples[i].ids) for i in active]

        # 3. Update, mu times on the same responses.
        model.train()
        old, totals = {}, Counter()
        for update in range(options.updates_per_batch):
            for number, indices in enumerate(micro_batches(rows, options.micro_batch_tokens)):
                ids, mask = pad_batch([rows[i] for i in indices], model.device)
                log_probs, entropy, _ = scorer(ids, mask, options.temperature)  # (N,), (N,)
                old.setdefault(number, log_probs.detach())  # pi_old: these weights, before the first update
                reference = None
                if options.beta:
                    with torch.no_grad(), lora_off(model):
                        reference = (reference_model or scorer)(ids, mask, options.temperature).log_probs  # (N,)
                chosen = active[indices]
                per_row = torch.stack([advantages, weights])[:, chosen]  # (2, rows)
                advantage, weight = per_row.repeat_interleave(lengths[chosen], 1).to(ids.device)  # (N,), (N,)
                clip = (options.clip_low, options.clip_high)
                loss, clipped, kl = grpo_loss(
                    log_probs, old[number], reference, advantage, weight, *clip, options.beta, options.kl
                )
                accelerator.backward(loss)
                sampled = torch.tensor([p for i in chosen for p in samples[i].log_probs], device=ids.device)
                gap = (sampled - old[number]).abs().sum().item()  # what the sampler says against what the trainer says
                numbers = {"loss": loss, "clipped": clipped, "kl": kl, "entropy": entropy.sum()}
                totals.update({k: v.item() for k, v in numbers.items()} | {"gap": gap, "tokens": len(log_probs)})
            norm = float(accelerator.clip_grad_norm_(parameters, 1.0))
            optimizer.step()
            optimizer.zero_grad()

        # 4. Say what happened.
        kinds = [kind[row["id"]] for row in owners]
        by_kind = {k: rewards[torch.tensor([x == k for x in kinds])] for k in ("harmful", "benign", "maths")}
        numbers = {
            "reward": rewards.nanmean().item(),
            **{f"reward_{k}": r.nanmean().item() for k, r in by_kind.items()},
            "truncated": truncated.float().mean().item(),
            "unparsed": rewards.isnan().float().mean().item(),
            "zero_spread_groups": (advantages.view(P, G).nan_to_num() == 0).all(1).float().mean().item(),
            "response_tokens": lengths.float().mean().item(),
            "entropy": totals["entropy"] / max(1, totals["tokens"]),
            "kl": totals["kl"] / options.updates_per_batch,
            "clipped": totals["clipped"] / options.updates_per_batch,
            "loss": totals["loss"] / options.updates_per_batch,
            "gradient_norm": norm,
            "sampler_gap": totals["gap"] / max(1, totals["tokens"]),
        }
        tqdm.write(f"{step:5d}" + "".join(f"{v:9.3f}" for v in list(numbers.values())[: len(columns)]))
        metrics |= {k: None if math.isnan(v) else round(v, 6) for k, v in numbers.items()}
        shown = {"step": step, "prompt": batch[0]["prompt"], "responses": []}
        for (thinking, answer, state), r, verdict in list(zip(parsed, rewards.tolist(), verdicts))[:G]:
            r = None if math.isnan(r) else r
            shown["responses"].append({"reward": r, **verdict, "state": state, "thinking": thinking, "answer": answer})
        append_jsonl(run / "samples.jsonl", [shown])

    if not finished:
        save_checkpoint(model, tokenizer, run / "checkpoint", options.model)
    history = reopen_jsonl(run / "metrics.jsonl")
    tenth = max(1, len(history) // 10)
    change = {}
    for name in ("reward", "reward_harmful", "reward_benign", "reward_maths"):
        ends = [[m[name] for m in part if m[name] is not None] for part in (history[:tenth], history[-tenth:])]
        if all(ends):
            change[name.replace("_", ", ")] = " -> ".join(f"{sum(e) / len(e):.3f}" for e in ends)
    summary(
        run,
        "04_grpo",
        {
            "prompts": ", ".join(f"{v} {k}" for k, v in sorted(Counter(kind.values()).items())),
            "steps": f"{len(history)} of {options.batch_size} prompts x {options.group_size} responses",
            **change,
            "unparsed": f"{sum(m['unparsed'] for m in history) / len(history):.2%} of the responses had no reward",
            "checkpoint": f"{run}/checkpoint",
        },
        f"python 05_eval.py --models start={options.model} grpo={run}/checkpoint",
    )


if __name__ == "__main__":
    main()
