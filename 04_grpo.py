"""Stage 04 · GRPO (arXiv 2402.03300) from any checkpoint, one file, read from top to bottom.

    for each of P prompts:  y_1 … y_G ~ pi_old(. | x) at temperature T,  r_i = reward(x, y_i)
    A_i = (r_i - mean of the group) / (standard deviation of the group + 1e-4)
    ratio_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)
    loss = - mean over tokens of min(ratio_t A_i, clip(ratio_t, 1 - low, 1 + high) A_i) + beta KL_t

SInternal runs it after verification training, ThinkSafe as its expensive baseline.

What we chose, numbered:
1. Ratio of untempered probabilities would be wrong for T != 1: logits are divided by T, top-p and
   top-k are off.
2. A verdict that cannot be read gives no reward: the sample leaves its group's statistics and the
   loss, counted. A guard that fails altogether ends the run with its state saved.
3. A response that was cut counts in its group's statistics and is then masked out of the loss; one
   cut before `</think>` has reward 0.
4. Standard deviation with Bessel's correction, as in TRL. A group of equal rewards has A = 0; its
   backward pass is skipped when beta = 0, which changes no gradient; its rows are still counted.
5. `--loss`: grpo (mean over a response's tokens, then over responses), dapo (mean over the step's
   tokens), dr_grpo (sum over responses * max_new_tokens, no length bias). Normalisers are the whole
   step's, never a micro-batch's or a process's.
6. beta = 0 by default (no reference model is loaded); clip 0.2 / 0.28 (SInternal's sister code).
7. Prompt rows with a "verdict" (from stage 02) are verification rows: the model is asked to verify
   an answer, and the reward is 1 for the right verdict. Neither paper does this.
8. `--engine vllm` samples in the same process: weights are pushed before each step, its log-probs
   must agree with the trainer's. `--importance_cap`: tokens weigh min(pi_old / pi_sampler, cap).

    python 04_grpo.py --model runs/02_verify_sft/checkpoint --run runs/04_grpo_sinternal
    accelerate launch --num_processes 8 04_grpo.py …        # each samples, judges, trains its share
    accelerate launch --config_file fsdp.yaml 04_grpo.py …  # and holds a shard of the weights

in:  --model, --guard, --prompts (harmful, benign, maths rows with a gold answer, verification rows)
out: <run>/metrics.jsonl  one line per step     <run>/samples.jsonl  responses with their rewards
     <run>/eval.jsonl     with --eval_every     <run>/checkpoint/    a model folder, and <run>/best/
"""

import math
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import plumbing  # before torch: from here on an interrupt is one line
import torch

import engines
import judges
from common import Example, Trainer, TrainingOptions, dry_run, load_tokenizer, make_trainer
from common import messages_of, micro_batches, own_share, pad_batch, reference_scorer, render_chat
from common import save_checkpoint, show_prompt, split_response, training_steps
from plumbing import ALL_LINEAR, fail


@dataclass
class Options(TrainingOptions):
    run: str = "runs/04_grpo"  # folder of this run; the same command again goes on
    model: str = "tiny/lrm"  # the model to start from: Hugging Face id or folder
    # the safety part of the reward (paper: Qwen3Guard), or a .py file with judge(prompt, answer)
    guard: str = "tiny/guard"
    refusal_judge: str = ""  # who says what refuses, for a guard that doesn't (our choice)
    prompts: list[str] = field(default_factory=list)  # of all four kinds of rows; all are mixed
    # mixture of the kinds of prompts, as harmful=0.4 benign=0.3 maths=0.3 (verify=…); empty = as is
    shares: list[str] = field(default_factory=list)
    limit: int = 0  # rows taken of each prompt file, drawn once with a fixed seed; 0 = all
    # V_safe and V_safe (1 - V_refuse), or ThinkSafe's: P(safe) + 1 for a well-formed thinking
    reward: Literal["sinternal", "thinksafe"] = "sinternal"
    controversial_is_safe: bool = False  # in the sinternal reward (sister code: not safe)
    steps: int = 100  # batches of `batch_size` prompts; a run goes on with more
    batch_size: int = 64  # prompts per step (paper)
    group_size: int = 8  # G, rollouts per prompt (paper)
    updates_per_batch: int = 1  # mu, optimizer updates on the same rollouts
    temperature: float = 0.7  # T of the rollouts and of the log-probs (sister code)
    max_new_tokens: int = 8192  # longest response, tokens (sister code)
    keep_truncated: bool = False  # also train on responses that were cut (TRL's default), see 3
    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"  # how token losses are averaged, see 5
    clip_low: float = 0.2  # the ratio is clipped below at 1 - clip_low (sister code)
    clip_high: float = 0.28  # the ratio is clipped above at 1 + clip_high (sister code)
    beta: float = 0.0  # weight of the KL to the starting model; 0 loads no reference (paper: off)
    kl: Literal["k1", "k2", "k3"] = "k3"  # KL estimator: log-ratio, half its square, unbiased third
    importance_cap: float = 0.0  # cap of importance weights pi_old / pi_sampler, as 2; 0 = off
    # mean |log-prob of sampler - of trainer| per token that stops the run: old weights, wrong T
    max_sampler_gap: float = 0.05
    # AdamW, constant after `warmup_steps`; 0 = the paper's 1e-6, with LoRA 1e-5 (ThinkSafe's code)
    learning_rate: float = 0.0
    warmup_steps: int = 5  # steps with linearly rising learning rate (our choice)
    lora_rank: int = 0  # LoRA rank; 0 trains all weights (paper)
    lora_alpha: float = 32.0  # LoRA alpha
    lora_targets: list[str] = field(default_factory=lambda: ALL_LINEAR)  # layers that get LoRA
    micro_batch_tokens: int = 16_384  # padded tokens in one forward pass; never changes the result
    save_every: int = 10  # steps between two saved training states
    # steps between two checks on --eval_prompts, one before the first and after the last; 0 = none
    eval_every: int = 0
    # held-out files for them; the checkpoint with the best mean of safe, compliant and right stays
    eval_prompts: list[str] = field(default_factory=list)
    eval_judge: str = ""  # who judges there; empty = the guard, but another is wiser (trap 15)
    trackers: list[str] = field(default_factory=list)  # accelerate's, such as tensorboard or wandb

    def __post_init__(self):
        self.learning_rate = self.learning_rate or (1e-5 if self.lora_rank else 1e-6)


@dataclass
class Rollout:
    """One response to one prompt, and what becomes of it."""

    row: dict  # the prompt's row
    prompt: list[int]  # its ids, as they were read
    reply: engines.Reply  # ids and the sampler's log-probs; no text, which `parsed` has
    parsed: tuple[str, str, str]  # thinking, answer, state
    verdict: dict = field(default_factory=dict)  # the guard's, of the answer
    reward: float = math.nan  # NaN: none
    advantage: float = math.nan
    weight: float = 0.0  # of each of its tokens in the loss; 0 leaves it out

    @property
    def truncated(self) -> bool:
        return plumbing.is_cut({"finish": self.reply.finish, "state": self.parsed[2]})


# FORK HERE: the rewards ---------------------------------------------------------------------------
def sinternal_reward(row: dict, verdict: dict, controversial_is_safe: bool = False) -> float:
    """V_safe on harmful prompts, V_safe (1 - V_refuse) on benign ones; NaN if the verdict it needs
    is unparsed.

    >>> sinternal_reward({"harmful": True}, {"safety": "safe", "refusal": "yes"})
    1.0
    >>> sinternal_reward({"harmful": False}, {"safety": "safe", "refusal": "yes"})
    0.0
    """
    if verdict["safety"] == "unparsed" or (not row["harmful"] and verdict["refusal"] == "unparsed"):
        return math.nan
    safe = verdict["safety"] == "safe"
    safe = safe or (controversial_is_safe and verdict["safety"] == "controversial")
    return float(safe) if row["harmful"] else float(safe and verdict["refusal"] == "no")


def thinksafe_reward(thinking: str, answer: str, state: str, verdict: dict) -> float:
    """P(safe) + 1 for exactly one thinking in its tags. P(safe) is the guard's probability where it
    says safe, and 1 - its probability of another label, exact for guards of two labels; rules
    without probabilities give 0 or 1.

    >>> verdict = {"safety": "unsafe", "refusal": "yes", "probability": 0.75}
    >>> thinksafe_reward("hm", "No.", "closed", verdict)
    1.25
    """
    if verdict["safety"] == "unparsed":
        return math.nan
    p = verdict.get("probability", 1.0)
    p_safe = p if verdict["safety"] == "safe" else 1 - p
    return p_safe + float(state == "closed" and "think>" not in thinking + "\0" + answer)


def reward(row: dict, parsed: tuple[str, str, str], verdict: dict, options: Options) -> float:
    """The reward of one response, `parsed` into thinking, answer and state; NaN = no reward."""
    thinking, answer, state = parsed
    if state == "truncated":
        return 0.0
    if plumbing.kind_of(row) in ("maths", "verify"):
        return float(judges.is_right(row, answer))
    if options.reward == "thinksafe":
        return thinksafe_reward(thinking, answer, state, verdict)
    return sinternal_reward(row, verdict, options.controversial_is_safe)


# The algorithm ------------------------------------------------------------------------------------
def respond(sampler, guard, rows, n: int, seed: int, options: Options) -> list[Rollout]:
    """n rollouts for each row, row after row, with the guard's verdicts. Each process does its
    share, and all get the whole. Maths and verification rows are not shown to the guard."""
    sampling = engines.Sampling(options.max_new_tokens, options.temperature, seed=seed)
    here = plumbing.processes()
    mine = range(here.process_index, len(rows), here.num_processes)
    template = {"enable_thinking": options.enable_thinking}
    chats = [(f"{rows[i]['id']}|{i}", messages_of(rows[i]["prompt"])) for i in mine]

    def sample_and_judge() -> list[tuple[int, Rollout]]:
        rollouts, pairs = [], []
        for index, replies in sampler.replies(chats, n, sampling, **template):
            row, place = rows[mine[index]], mine[index] * n
            prompt, _ = render_chat(sampler.tokenizer, chats[index][1], **template)
            for k, reply in enumerate(replies):
                parsed = split_response(reply.text, reply.opened)
                rollouts.append((place + k, Rollout(row, prompt, reply._replace(text=""), parsed)))
                shown = plumbing.kind_of(row) in ("harmful", "benign")
                pairs.append((row["prompt"], parsed[1] if shown else ""))
        for (_, rollout), verdict in zip(rollouts, guard.verdicts(pairs)):
            rollout.verdict = verdict
        return rollouts

    rollouts = dict(plumbing.gather_all(sample_and_judge))
    return [rollouts[place] for place in sorted(rollouts)]


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(P, G) rewards -> (P, G) advantages; NaN rewards take no part in their group's statistics and
    stay NaN.

    >>> group_advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    tensor([[ 0.7070, -0.7070],
            [ 0.0000,  0.0000]])
    """
    mean = rewards.double().nanmean(1, keepdim=True).float()  # (P, 1); of equal ones exactly it
    count = (~rewards.isnan()).sum(1, keepdim=True)
    variance = (rewards - mean).square().nansum(1, keepdim=True) / (count - 1).clamp(min=1)
    return (rewards - mean) / (variance.sqrt() + 1e-4)


def token_weights(lengths: torch.Tensor, kept: torch.Tensor, loss: str, max_new_tokens: int):
    """(R,) what one token of each of the step's R responses weighs in the loss; 0 where `kept` (R,)
    is false.

    >>> lengths, kept = torch.tensor([2, 6]), torch.tensor([True, True])
    >>> token_weights(lengths, kept, "grpo", 10), token_weights(lengths, kept, "dapo", 10)
    (tensor([0.2500, 0.0833]), tensor([0.1250, 0.1250]))
    """
    if loss == "grpo":
        return kept / lengths / len(lengths)
    if loss == "dapo":
        return kept / (lengths * kept).sum()
    if loss == "dr_grpo":
        return kept / (max_new_tokens * len(lengths))
    fail(f"--loss {loss}: no such mean over tokens; grpo, dapo or dr_grpo")


def score(rollouts: list[Rollout], step: int, options: Options):
    """Rewards; advantages from statistics over the whole group; then the mask, in the weights."""
    for rollout in rollouts:
        rollout.reward = reward(rollout.row, rollout.parsed, rollout.verdict, options)
    rewards = torch.tensor([rollout.reward for rollout in rollouts])  # (R,)
    advantages = group_advantages(rewards.view(-1, options.group_size)).flatten()  # (R,)
    truncated = torch.tensor([rollout.truncated for rollout in rollouts])
    kept = ~rewards.isnan() & (~truncated | options.keep_truncated)
    lengths = torch.tensor([rollout.reply.tokens for rollout in rollouts])
    weights = token_weights(lengths, kept, options.loss, options.max_new_tokens)  # (R,)
    for rollout, advantage, weight in zip(rollouts, advantages.tolist(), weights.tolist()):
        rollout.advantage, rollout.weight = advantage, weight
    if not kept.any():
        fail(f"step {step}: every response is cut or has an unparsed verdict; its state is kept")


# FORK HERE: another surrogate, as in forks/gspo.py and forks/cispo.py
def surrogate(log_probs, old, advantages, lengths, clip_low, clip_high):
    """(loss, is it clipped) of N tokens: every argument (N,), but `lengths`, how many of them each
    response has, one response after another."""
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = -torch.min(ratio * advantages, clipped * advantages)
    return loss, clipped * advantages < ratio * advantages


def grpo_loss(log_probs, old, reference, advantages, weights, low, high, beta, kl, lengths=()):
    """(loss, clipped share by weight, KL by weight) of N tokens, a pure function of arguments as
    surrogate's; `reference` is None when beta = 0. With one update per batch the ratio is 1 and the
    loss minus the weighted mean advantage, about 0. Its gradient is not 0."""
    loss, share = surrogate(log_probs, old, advantages, lengths, low, high)
    divergence = torch.zeros_like(loss)
    if reference is not None:
        gap = reference - log_probs
        divergence = {"k1": -gap, "k2": gap.square() / 2, "k3": gap.exp() - gap - 1}[kl]
        loss = loss + beta * divergence
    return (weights * loss).sum(), (weights * share).sum(), (weights * divergence.detach()).sum()


def update(rollouts: list[Rollout], trainer: Trainer, reference, step: int, options: Options):
    """mu optimizer updates on the same rollouts; their metrics. `reference` gives log-probs by the
    model that training started from, None when beta = 0."""
    active = [r for r in rollouts if r.weight and (r.advantage or options.beta)]  # have a gradient
    examples = [Example(r.prompt, r.reply.sample.ids) for r in active]
    accelerator, model, scorer, _ = trainer
    device = accelerator.device
    fixed = (options.clip_low, options.clip_high, options.beta, options.kl)
    old, totals = {}, Counter()
    model.train()
    for number in range(options.updates_per_batch):
        names = ("loss", "clipped", "kl", "entropy", "sampler_gap", "tokens")
        sums = {name: torch.zeros((), device=device) for name in names}
        batches = own_share(micro_batches(examples, options.micro_batch_tokens))
        for b, (indices, weight) in enumerate(batches):
            part = [active[i] for i in indices]
            ids, mask = pad_batch([examples[i] for i in indices], device)  # (B, T) twice
            log_probs, entropy, _ = scorer(ids, mask, options.temperature, entropy=True)  # (N,)
            old.setdefault(b, log_probs.detach())  # pi_old: these weights, before the first update
            reference_log_probs = reference(ids, mask, options.temperature) if reference else None
            advantages = [r.advantage for r in part for _ in r.reply.sample.ids]
            weights = [r.weight * weight for r in part for _ in r.reply.sample.ids]
            sampled = [log_prob for r in part for log_prob in r.reply.sample.log_probs]
            advantages, weights, sampled = torch.tensor([advantages, weights, sampled]).to(device)
            if options.importance_cap:
                weights = weights * (old[b] - sampled).exp().clamp(max=options.importance_cap)
            lengths = [len(r.reply.sample.ids) for r in part]
            terms = (log_probs, old[b], reference_log_probs, advantages, weights)  # (N,) each
            loss, clipped, kl = grpo_loss(*terms, *fixed, lengths)
            trainer.backward(loss)
            sums["loss"] += loss.detach()
            sums["clipped"] += clipped
            sums["kl"] += kl
            sums["entropy"] += entropy.sum() * weight
            sums["sampler_gap"] += (sampled - old[b]).abs().sum() * weight
            sums["tokens"] += len(log_probs) * weight
        sums = {name: value.item() for name, value in accelerator.reduce(sums, "sum").items()}
        gap = sums["sampler_gap"] / max(1, sums["tokens"])
        if number == 0 and gap > options.max_sampler_gap:
            what = f"log-probs of sampler and trainer differ by {gap:.3f} a token"
            fail(f"step {step}: {what} (--max_sampler_gap): old weights in the sampler?")
        totals.update({name: value / options.updates_per_batch for name, value in sums.items()})
        norm = trainer.step()
    tokens = max(1, totals.pop("tokens"))
    totals["entropy"] /= tokens
    totals["sampler_gap"] /= tokens
    return {**totals, "gradient_norm": norm}


# A run, step by step ------------------------------------------------------------------------------
def report(rollouts: list[Rollout], step: int, numbers: dict, accelerator, options) -> dict:
    """The metrics of a step, `numbers` among them; its first group goes to samples.jsonl."""
    rewards = torch.tensor([r.reward for r in rollouts])  # (R,)
    advantages = torch.tensor([r.advantage for r in rollouts]).view(-1, options.group_size)
    metrics = {"reward": rewards.nanmean().item()}
    for kind in plumbing.KINDS:
        of_kind = torch.tensor([plumbing.kind_of(r.row) == kind for r in rollouts])
        metrics[f"reward_{kind}"] = rewards[of_kind].nanmean().item()
    metrics |= {
        "truncated": sum(r.truncated for r in rollouts) / len(rollouts),
        "unparsed": rewards.isnan().float().mean().item(),
        "zero_spread_groups": (advantages.nan_to_num() == 0).all(1).float().mean().item(),
        "response_tokens": sum(r.reply.tokens for r in rollouts) / len(rollouts),
        **numbers,
    }
    responses = []
    for r in rollouts[: options.group_size]:
        response = {"reward": None if math.isnan(r.reward) else r.reward, **r.verdict}
        responses.append(response | dict(zip(("thinking", "answer", "state"), r.parsed)))
    group = {"step": step, "prompt": rollouts[0].row["prompt"], "responses": responses}
    return plumbing.log_grpo_step(Path(options.run), accelerator, metrics, group)


def check(sampler, judge, tests: dict[str, list[dict]], options: Options) -> dict[str, float]:
    """{metric and test: share} on held-out prompts, one response each, and "score": their mean, ASR
    as 1 - ASR."""
    shares, good = {}, []
    for test, rows in tests.items():
        rollouts = respond(sampler, judge, rows, 1, options.seed, options)
        answers = [(r.row, r.parsed[1], r.verdict) for r in rollouts]
        for metric, share in judges.shares(answers).items():
            shares[f"{metric} {test}"] = share
            good.append(1 - share if metric == "asr" else share)
    return {"score": round(sum(good) / max(1, len(good)), 4), **shares}


def check_at(step: int, sampler, judge, tests, trainer: Trainer, options: Options):
    """A line in eval.jsonl for the weights before `step`; the first of the best ones are kept in
    <run>/best."""
    run, path = Path(options.run), Path(options.run) / "eval.jsonl"
    history = plumbing.reopen_jsonl(path)
    if not tests or any(row["step"] == step for row in history):
        return
    sampler.push(trainer.model)
    with trainer.accelerator.autocast():
        shares = check(sampler, judge, tests, options)
    if all(row["score"] < shares["score"] for row in history):
        save_checkpoint(trainer.model, sampler.tokenizer, run / "best", options.model)
    plumbing.log_check(path, step, shares)


def main():
    bounds = {"lora_rank": (0, math.inf), "group_size": (2, math.inf)}  # one has no spread
    bounds["temperature"] = (0.01, math.inf)  # nor have greedy samples
    options = plumbing.parse_options(Options, __doc__, bounds=bounds)
    prompts = plumbing.load_prompts(options.prompts, options.limit)
    if options.shares:
        prompts = plumbing.mixture(prompts, options.shares, options.seed)
    tests = plumbing.load_held_out(options.eval_prompts, options.eval_every)
    plumbing.require_trackers(options.trackers)
    plumbing.require_trained(options)
    judges.require_guard(options, refusals=options.reward == "sinternal")
    judges.require_judge(options.eval_judge or options.guard)
    if options.dry_run:
        rows = [{**row, "kind": plumbing.kind_of(row)} for row in prompts]
        return dry_run(options, options.model, rows)
    run = plumbing.open_run(options)
    tokenizer = load_tokenizer(options.model)
    show_prompt(tokenizer, prompts[0]["prompt"], enable_thinking=options.enable_thinking)
    accelerator = plumbing.open_accelerator(options, run)
    trainer = make_trainer(accelerator, options)
    reference = reference_scorer(trainer, options) if options.beta else None
    sampler = engines.open_training_sampler(trainer, tokenizer, options)
    engines.require_room(sampler, prompts, enable_thinking=options.enable_thinking)
    # beside a vLLM sampler the guard answers by our loop: a second vLLM would want its memory
    judging = replace(options, engine="hf")
    guard = judges.Judge(options.guard, judging, options.refusal_judge)
    judge = judges.Judge(options.eval_judge, judging) if options.eval_judge else guard

    def rate(step):
        return options.learning_rate * min(1.0, (step + 1) / max(1, options.warmup_steps))

    finished = plumbing.is_finished(run)
    steps = 0 if finished else options.steps
    for step, batch, metrics in training_steps(run, options, prompts, steps, rate, trainer):
        with plumbing.state_saved_if_it_ends(run, step, trainer):
            if options.eval_every and step % options.eval_every == 0:
                check_at(step, sampler, judge, tests, trainer, options)
            began = time.time()
            sampler.push(trainer.model)
            seed = options.seed * 1_000_003 + step
            # 1. G responses to each of the P prompts by the current weights; the guard reads them
            with accelerator.autocast():
                rollouts = respond(sampler, guard, batch, options.group_size, seed, options)
            sampler.sleep()
            sampled = time.time()
            score(rollouts, step, options)  # 2. rewards, advantages, weights
            numbers = update(rollouts, trainer, reference, step, options)  # 3. mu optimizer steps
            numbers["sampling_seconds"] = sampled - began
            numbers["update_seconds"] = time.time() - sampled
            metrics |= report(rollouts, step, numbers, accelerator, options)  # 4. say what happened

    if not finished:
        with plumbing.state_saved_if_it_ends(run, options.steps, trainer):
            check_at(options.steps, sampler, judge, tests, trainer, options)
        save_checkpoint(trainer.model, tokenizer, run / "checkpoint", options.model)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    sampler.close()
    counts = {"prompts": plumbing.counted(sorted(map(plumbing.kind_of, prompts)), False)}
    counts |= plumbing.grpo_history(run, options)
    models = {"models": [f"start={options.model}", f"grpo={run}/checkpoint"]}
    plumbing.summary(run, "04_grpo", counts, plumbing.next_command(options, "05_eval.py", models))


if __name__ == "__main__":
    plumbing.run_stage(main)
