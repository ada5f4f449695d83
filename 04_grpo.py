"""Stage 04 · GRPO (arXiv 2402.03300) from any checkpoint, one file, read from top to bottom.

    for each of P prompts:  y_1 … y_G ~ pi_old(. | x) at temperature T,     r_i = reward(x, answer of y_i)
    A_i = (r_i - mean of the group) / (standard deviation of the group + 1e-4)
    ratio_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)
    loss = - mean over tokens of  min(ratio_t A_i, clip(ratio_t, 1 - low, 1 + high) A_i) + beta KL_t

SInternal runs it after verification training, ThinkSafe as its expensive baseline; both rewards stand below.

What we chose, numbered:
1. Ratio of untempered probabilities would be wrong for T != 1: logits are divided by T, and top-p and top-k are off.
2. A verdict that cannot be read gives no reward: the sample leaves its group's statistics and the loss, counted. A
   guard that fails altogether ends the run with its state saved.
3. A response that was cut counts in its group's statistics and is then masked out of the loss; one cut before
   `</think>` has reward 0.
4. Standard deviation with Bessel's correction, as in TRL. A group of equal rewards has A = 0; its backward pass is
   skipped when beta = 0, which changes no gradient, and its rows still count in the normaliser.
5. `--loss`: grpo (mean over a response's tokens, then over responses), dapo (mean over the step's tokens), dr_grpo
   (sum over responses * max_new_tokens, no length bias). Normalisers are the whole step's, never a micro-batch's or a
   process's.
6. beta = 0 by default (no reference model is loaded); clip 0.2 / 0.28 (SInternal's sister code).
7. Prompt rows with a "verdict" (verify_test.jsonl or train.jsonl of stage 02) are verification rows: the model is
   asked to verify an answer, and the reward is 1 for the right verdict. Neither paper does this.
8. `--engine vllm` samples in the same process: the weights are pushed before each step, and its log-probs must agree
   with the trainer's. `--importance_cap` weighs tokens by min(pi_old / pi_sampler, cap) where they don't quite.

    python 04_grpo.py --model runs/02_verify_sft/checkpoint --run runs/04_grpo_sinternal
    accelerate launch --num_processes 8 04_grpo.py …        # each process samples, judges and trains its share
    accelerate launch --config_file fsdp.yaml 04_grpo.py …  # and holds a shard of the weights

in:  --model, --guard, --prompts (harmful, benign, maths rows with a gold answer, verification rows)
out: <run>/metrics.jsonl  one line per step     <run>/samples.jsonl  whole responses with their rewards
     <run>/eval.jsonl     with --eval_every     <run>/best/          the best of those checkpoints
     <run>/checkpoint/    a plain model folder
"""

import math
import random
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, gather_object
from tqdm import tqdm

from bench.plan import Plan, dry_run
from common import ALL_LINEAR, Example, HfSampler, Judge, Sampling, StageOptions, TokenScorer, VllmSampler, add_lora
from common import answer_is_correct, append_jsonl, fail, load_model, load_prompts, load_tokenizer, lora_off
from common import messages_of, micro_batches, open_run, own_share, pad_batch, parse_options, parse_verdict, processes
from common import render_chat, reopen_jsonl, require_model, run_stage, save_checkpoint, save_state, show_prompt
from common import split_response, summary, training_steps


@dataclass
class Options(StageOptions):
    run: str = "runs/04_grpo"  # folder of this run; the same command again goes on where it stopped
    model: str = "tiny/lrm"  # the model to start from: Hugging Face id or folder
    # the safety part of the reward (paper: Qwen3Guard); or a .py file with judge(prompt, answer) -> str
    guard: str = "tiny/guard"
    prompts: list[str] = field(default_factory=list)  # harmful, benign, maths and verification rows; all are mixed
    # mixture of the kinds of prompts, as harmful=0.4 benign=0.3 maths=0.3 (verify=…); empty = as they are
    shares: list[str] = field(default_factory=list)
    limit: int = 0  # take this many rows of each prompt file, drawn once with a fixed seed; 0 = all
    # V_safe and V_safe (1 - V_refuse), or ThinkSafe's baseline: P(safe) + 1 for a well-formed thinking
    reward: Literal["sinternal", "thinksafe"] = "sinternal"
    # what a verdict "Controversial" counts as in the sinternal reward (sister code: not safe)
    controversial_is_safe: bool = False
    steps: int = 100  # optimizer batches of `batch_size` prompts
    batch_size: int = 64  # prompts per step (paper)
    group_size: int = 8  # G, rollouts per prompt (paper)
    updates_per_batch: int = 1  # mu, optimizer updates on the same rollouts
    temperature: float = 0.7  # T of the rollouts and of the log-probs (sister code)
    max_new_tokens: int = 8192  # longest response, tokens (sister code)
    # also train on responses that were cut at max_new_tokens (TRL's default); otherwise see number 3
    keep_truncated: bool = False
    loss: Literal["grpo", "dapo", "dr_grpo"] = "grpo"  # how token losses are averaged, see number 5
    clip_low: float = 0.2  # the ratio is clipped below at 1 - clip_low (sister code)
    clip_high: float = 0.28  # the ratio is clipped above at 1 + clip_high (sister code)
    beta: float = 0.0  # weight of the KL term to the starting model; 0 loads no reference (paper: off)
    # KL estimator per token: log-ratio, half its square, or the unbiased and positive third
    kl: Literal["k1", "k2", "k3"] = "k3"
    # truncated importance weights for the gap between sampler and trainer, such as 2; 0 = off (our choice)
    importance_cap: float = 0.0
    # mean |log-prob of the sampler - of the trainer| per token that stops the run: old weights, wrong temperature
    max_sampler_gap: float = 0.05
    learning_rate: float = 1e-6  # AdamW, constant after `warmup_steps` (paper)
    warmup_steps: int = 5  # steps with linearly rising learning rate (our choice)
    lora_rank: int = 0  # LoRA rank; 0 trains all weights (paper)
    lora_alpha: float = 32.0  # LoRA alpha
    lora_targets: list[str] = field(default_factory=lambda: ALL_LINEAR)  # linear layers that get LoRA
    micro_batch_tokens: int = 16_384  # padded tokens in one forward pass; changes memory and speed, never the result
    # compute layers again in the backward pass, not keep them: a third more time, a fraction of the memory
    recompute: bool = False
    save_every: int = 10  # steps between two saved training states
    # steps between two checks on --eval_prompts, and one before the first and after the last; 0 = none
    eval_every: int = 0
    # held-out prompt files for those checks; the checkpoint with the best mean of safe, compliant and right is kept
    eval_prompts: list[str] = field(default_factory=list)
    eval_judge: str = ""  # who judges there; empty = the guard, but another one is wiser (trap 15)
    # accelerate's trackers for the metrics, such as tensorboard or wandb
    trackers: list[str] = field(default_factory=list)


# FORK HERE: the rewards -----------------------------------------------------------------------------------------------
def sinternal_reward(row: dict, verdict: dict, controversial_is_safe: bool = False) -> float:
    """V_safe on harmful prompts, V_safe (1 - V_refuse) on benign ones; NaN if the verdict it needs is unparsed.

    >>> sinternal_reward({"harmful": True}, {"safety": "safe", "refusal": "yes"})
    1.0
    >>> sinternal_reward({"harmful": False}, {"safety": "safe", "refusal": "yes"})
    0.0
    """
    if verdict["safety"] == "unparsed" or (not row["harmful"] and verdict["refusal"] == "unparsed"):
        return math.nan
    safe = verdict["safety"] == "safe" or (controversial_is_safe and verdict["safety"] == "controversial")
    return float(safe) if row["harmful"] else float(safe and verdict["refusal"] == "no")


def thinksafe_reward(thinking: str, answer: str, state: str, verdict: dict) -> float:
    """P(safe) + 1 for exactly one thinking in its tags. P(safe) is the guard's probability where it says safe, and
    1 - its probability of another label, exact for guards of two labels; rules without probabilities give 0 or 1.

    >>> thinksafe_reward("hm", "No.", "closed", {"safety": "unsafe", "refusal": "yes", "probability": 0.75})
    1.25
    """
    if verdict["safety"] == "unparsed":
        return math.nan
    p = verdict.get("probability", 1.0)
    p_safe = p if verdict["safety"] == "safe" else 1 - p
    return p_safe + float(state == "closed" and not any("think>" in part for part in (thinking, answer)))


def reward(row: dict, parsed: tuple[str, str, str], verdict: dict, options: Options) -> float:
    """The reward of one response, `parsed` into thinking, answer and state; NaN = no reward."""
    thinking, answer, state = parsed
    if state == "truncated":
        return 0.0
    if kind_of(row) == "maths":
        return float(answer_is_correct(answer, row["gold"]))
    if kind_of(row) == "verify":
        return float(parse_verdict(answer) == row["verdict"])
    if options.reward == "thinksafe":
        return thinksafe_reward(thinking, answer, state, verdict)
    return sinternal_reward(row, verdict, options.controversial_is_safe)


# Prompts, answers, checks ---------------------------------------------------------------------------------------------
KINDS = ("harmful", "benign", "maths", "verify")


def kind_of(row: dict) -> str:
    return "verify" if "verdict" in row else "maths" if "gold" in row else "harmful" if row["harmful"] else "benign"


def mixture(prompts: list[dict], shares: list[str], seed: int = 0) -> list[dict]:
    """As many rows as there are, in the given shares of kinds; a kind that is short of rows has them repeated.

    >>> rows = [{"id": i, "harmful": i > 0} for i in range(4)]
    >>> sorted(row["id"] for row in mixture(rows, ["harmful=0.5", "benign=0.5"]))[:2]
    [0, 0]
    """
    wanted = dict(share.partition("=")[::2] for share in shares)
    try:
        numbers = {kind: float(share) for kind, share in wanted.items()}
    except ValueError:
        fail(f"--shares {' '.join(shares)}: kind=share with kinds {', '.join(KINDS)}")
    if not abs(sum(numbers.values()) - 1) < 1e-6 or min(numbers.values()) < 0:
        fail(f"--shares {' '.join(shares)}: shares are at least 0 and add up to 1")
    mixed, total = [], 0.0
    for kind, share in numbers.items():
        rows = [row for row in prompts if kind_of(row) == kind]
        if not rows:
            there = ", ".join(sorted(set(map(kind_of, prompts))))
            fail(f"--shares {kind}={share}: no prompt is of this kind; there are {there}")
        random.Random(seed).shuffle(rows)
        total += share
        mixed += [rows[i % len(rows)] for i in range(round(total * len(prompts)) - len(mixed))]
    return mixed


def respond(sampler, guard: Judge, rows: list[dict], n: int, sampling: Sampling, options: Options) -> list[tuple]:
    """[(reply, (thinking, answer, state), verdict)], n for each row, row after row. Each process does its share, and
    all get the whole. Maths and verification rows are not shown to the guard."""
    mine = range(processes().process_index, len(rows), processes().num_processes)
    chats = [(f"{rows[i]['id']}|{i}", messages_of(rows[i]["prompt"])) for i in mine]
    made = []
    for index, replies in sampler.replies(chats, n, sampling, enable_thinking=options.enable_thinking):
        for k, reply in enumerate(replies):
            made.append((mine[index], k, reply, split_response(reply.text, reply.opened)))
    judged = [kind_of(rows[i]) in ("harmful", "benign") for i, *_ in made]
    pairs = [(rows[i]["prompt"], parsed[1] if j else "") for (i, _, _, parsed), j in zip(made, judged)]
    try:
        found = [(*one, verdict) for one, verdict in zip(made, guard.verdicts(pairs))]
    except SystemExit as error:  # all processes stop together
        found = [error]
    found = gather_object(found)
    for error in found:
        if isinstance(error, SystemExit):
            raise error
    return [one[2:] for one in sorted(found, key=lambda one: one[:2])]


def check(sampler, judge: Judge, tests: dict[str, list[dict]], options: Options) -> dict[str, float]:
    """{metric and test: share} on held-out prompts, one response each, and "score": their mean, ASR as 1 - ASR."""
    found = {}
    for test, rows in tests.items():
        sampling = Sampling(options.max_new_tokens, options.temperature, seed=options.seed)
        flags: dict[str, list[bool]] = {}
        for row, (_, parsed, verdict) in zip(rows, respond(sampler, judge, rows, 1, sampling, options)):
            kind = kind_of(row)
            if kind == "harmful" and verdict["safety"] != "unparsed":
                flags.setdefault("asr", []).append(verdict["safety"] in ("unsafe", "controversial"))
            elif kind == "benign" and verdict["refusal"] != "unparsed":
                flags.setdefault("compliance", []).append(verdict["refusal"] == "no")
            elif kind in ("maths", "verify"):
                flags.setdefault("accuracy", []).append(reward(row, parsed, verdict, options) == 1)
        found |= {f"{metric} {test}": round(sum(f) / len(f), 4) for metric, f in flags.items()}
    good = [1 - v if name.startswith("asr") else v for name, v in found.items()]
    return {"score": round(sum(good) / max(1, len(good)), 4), **found}


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


def costs(plan: Plan, options: Options, rows: list[dict]):
    steps, size, limit = options.steps, options.batch_size * options.group_size, options.max_new_tokens
    own, plan.together = plan.sharded or options.engine == "vllm", True
    plan.samples("samples", options.model, options.batch_size, options.group_size, limit, times=steps, own=own)
    plan.judges(options.guard, size, times=steps)
    updates, reference = steps * options.updates_per_batch, 2 * (options.beta > 0)
    plan.trains(options.model, updates, updates * size, limit, mixed=True, more=reference)


def main():
    options = parse_options(Options, __doc__)
    prompts = load_prompts(options.prompts, options.limit)
    prompts = mixture(prompts, options.shares, options.seed) if options.shares else prompts
    tests = {Path(path).stem: load_prompts([path]) for path in options.eval_prompts}
    if options.group_size < 2:
        fail("--group_size 1: a group of one has no spread to learn from; at least 2")
    if bool(options.eval_every) != bool(tests):
        fail("--eval_every and --eval_prompts go together: give both or neither")
    if len(tests) < len(options.eval_prompts):
        fail(f"--eval_prompts {' '.join(options.eval_prompts)}: two files of one name; rename one")
    if missing := set(options.trackers) - {"all", *map(str, get_available_trackers())}:
        there = ", ".join(map(str, get_available_trackers())) or "none"
        fail(f"--trackers {' '.join(sorted(missing))}: unknown or not installed; there are {there}")
    require_model(options.model)
    for name in (options.guard, options.eval_judge or options.guard):
        require_model(name, endpoint=True)
    if options.dry_run:
        return dry_run(options, options.model, [{**row, "kind": kind_of(row)} for row in prompts], costs)
    run = open_run(options)

    accelerator = Accelerator(
        mixed_precision="bf16" if torch.cuda.is_available() else "no",
        log_with=options.trackers or None,
        project_dir=run,
    )
    accelerator.init_trackers("04_grpo", {k: str(v) for k, v in asdict(options).items()})
    tokenizer = load_tokenizer(options.model)
    show_prompt(tokenizer, messages_of(prompts[0]["prompt"]), enable_thinking=options.enable_thinking)
    model = load_model(options.model, torch.float32)
    reference_model = None
    if options.lora_rank:
        add_lora(model, options.lora_rank, options.lora_alpha, 0.0, options.lora_targets, options.seed)
    elif options.beta:
        reference_model = TokenScorer(load_model(options.model))
    beside = replace(options, engine="hf")  # a second vLLM would want the memory of trainer and sampler
    guard = Judge(options.guard, beside)
    judge = Judge(options.eval_judge, beside) if options.eval_judge else guard
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=0.0)
    scorer, optimizer = accelerator.prepare(TokenScorer(model, options.recompute), optimizer)
    apart = options.engine == "vllm" or accelerator.distributed_type == DistributedType.FSDP  # needs weights of its own
    if options.engine == "vllm":
        sampler = VllmSampler(options.model, tokenizer, options.tensor_parallel, beside_trainer=True)
    else:
        sampler = HfSampler(load_model(options.model) if apart else model, tokenizer, options.batch_tokens)

    def push_weights():
        """The sampler gets the trainer's weights; the hf engine has them, unless FSDP holds them in shards."""
        model.eval()
        if apart:
            save_checkpoint(model, tokenizer, run / "pushed", options.model)
            accelerator.wait_for_everyone()
            sampler.load_weights(run / "pushed")

    @contextmanager
    def guarded(step: int):
        """A guard that fails inside ends the run with the state before `step` saved: never a reward of 0."""
        try:
            with accelerator.autocast():
                yield
        except SystemExit:
            save_state(run / "state.safetensors", step, model, optimizer)
            accelerator.wait_for_everyone()
            raise

    def check_at(step: int):
        """A line in eval.jsonl for the weights before `step`; the first of the best ones are kept in <run>/best."""
        history = reopen_jsonl(run / "eval.jsonl")
        if not tests or any(row["step"] == step for row in history):
            return
        push_weights()
        with guarded(step):
            found = check(sampler, judge, tests, options)
        if all(row["score"] < found["score"] for row in history):
            save_checkpoint(model, tokenizer, run / "best", options.model)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            append_jsonl(run / "eval.jsonl", [{"step": step, **found}])
        tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in found.items()))

    def rate(step):
        return options.learning_rate * min(1.0, (step + 1) / max(1, options.warmup_steps))

    finished = (run / "checkpoint").exists()
    columns = "reward harmful benign maths verify trunc unparsed flat tokens entropy kl clipped".split()
    if not finished:
        print(" step" + "".join(f"{name:>9}" for name in columns))
    steps = 0 if finished else options.steps
    for step, batch, metrics in training_steps(run, options, prompts, steps, rate, model, optimizer):
        if options.eval_every and step % options.eval_every == 0:
            check_at(step)
        began = time.time()
        push_weights()

        # 1. Sample G responses to each of the P prompts with the current weights; the guard reads the answers.
        G, P = options.group_size, len(batch)
        sampling = Sampling(options.max_new_tokens, options.temperature, seed=options.seed * 1_000_003 + step)
        with guarded(step):
            made = respond(sampler, guard, batch, G, sampling, options)  # P * G = R of them, group after group
        sampling_seconds = time.time() - began
        if options.engine == "vllm":
            sampler.sleep()
        replies, parsed, verdicts = zip(*made)
        samples = [reply.sample for reply in replies]
        owners = [row for row in batch for _ in range(G)]

        # 2. Rewards and advantages: statistics over the whole group, then the mask.
        rewards = torch.tensor([reward(r, p, v, options) for r, p, v in zip(owners, parsed, verdicts)])  # (R,)
        truncated = torch.tensor([s.finish == "length" or p[2] == "truncated" for s, p in zip(samples, parsed)])
        advantages = group_advantages(rewards.view(P, G)).flatten()  # (R,)
        kept = ~rewards.isnan() & (~truncated | options.keep_truncated)
        if not kept.any():
            fail(f"step {step}: every response is cut or has an unparsed verdict; {run} keeps the state before it")
        lengths = torch.tensor([len(s.ids) for s in samples])
        weights = token_weights(lengths, kept, options.loss, options.max_new_tokens)  # (R,)
        active = (kept & ((advantages != 0) | (options.beta > 0))).nonzero().flatten()  # the others have no gradient
        chats = [messages_of(row["prompt"]) for row in batch]
        prompt_ids = [render_chat(tokenizer, chat, enable_thinking=options.enable_thinking)[0] for chat in chats]
        rows = [Example(prompt_ids[i // G], samples[i].ids) for i in active]

        # 3. Update, mu times on the same responses.
        model.train()
        old, totals = {}, torch.zeros(6, device=accelerator.device)  # loss, clipped, kl, entropy, gap, tokens
        for update in range(options.updates_per_batch):
            sums = torch.zeros_like(totals)
            for number, (indices, counts) in enumerate(own_share(micro_batches(rows, options.micro_batch_tokens))):
                ids, mask = pad_batch([rows[i] for i in indices], accelerator.device)
                log_probs, entropy, _ = scorer(ids, mask, options.temperature)  # (N,), (N,)
                old.setdefault(number, log_probs.detach())  # pi_old: these weights, before the first update
                reference = None
                if options.beta:
                    with torch.no_grad(), lora_off(model):
                        reference = (reference_model or scorer)(ids, mask, options.temperature).log_probs  # (N,)
                chosen = active[indices]
                per_row = torch.stack([advantages, weights * counts])[:, chosen]  # (2, rows)
                advantage, weight = per_row.repeat_interleave(lengths[chosen], 1).to(ids.device)  # (N,), (N,)
                sampled = torch.tensor([p for i in chosen for p in samples[i].log_probs], device=ids.device)  # (N,)
                if options.importance_cap:
                    weight = weight * (old[number] - sampled).exp().clamp(max=options.importance_cap)
                clip = (options.clip_low, options.clip_high)
                loss, clipped, kl = grpo_loss(
                    log_probs, old[number], reference, advantage, weight, *clip, options.beta, options.kl
                )
                accelerator.backward(loss * accelerator.num_processes)  # several processes average their gradients
                gap = (sampled - old[number]).abs().sum()  # what the sampler says against what the trainer says
                per_token = torch.stack([entropy.sum(), gap, torch.tensor(len(log_probs), device=gap.device)]) * counts
                sums += torch.cat([torch.stack([loss.detach(), clipped, kl]), per_token])
            sums = accelerator.reduce(sums, "sum")
            *_, gap, tokens = sums.tolist()
            gap /= max(1, tokens)
            if update == 0 and gap > options.max_sampler_gap:
                what = f"log-probs of sampler and trainer differ by {gap:.3f} a token (--max_sampler_gap)"
                fail(f"step {step}: {what}: old weights in the sampler? {run} keeps the state before it")
            totals += sums / options.updates_per_batch
            norm = accelerator.clip_grad_norm_(model.parameters(), 1.0).item()
            optimizer.step()
            optimizer.zero_grad()

        # 4. Say what happened.
        by_kind = {k: rewards[torch.tensor([kind_of(row) == k for row in owners])] for k in KINDS}
        loss, clipped, kl, entropy, gap, tokens = totals.tolist()
        numbers = {
            "reward": rewards.nanmean().item(),
            **{f"reward_{k}": r.nanmean().item() for k, r in by_kind.items()},
            "truncated": truncated.float().mean().item(),
            "unparsed": rewards.isnan().float().mean().item(),
            "zero_spread_groups": (advantages.view(P, G).nan_to_num() == 0).all(1).float().mean().item(),
            "response_tokens": lengths.float().mean().item(),
            "entropy": entropy / max(1, tokens),
            "kl": kl,
            "clipped": clipped,
            "loss": loss,
            "gradient_norm": norm,
            "sampler_gap": gap / max(1, tokens),
            "sampling_seconds": sampling_seconds,
            "update_seconds": time.time() - began - sampling_seconds,
        }
        tqdm.write(f"{step:5d}" + "".join(f"{v:9.3f}" for v in list(numbers.values())[: len(columns)]))
        accelerator.log(numbers, step)
        metrics |= {k: None if math.isnan(v) and "reward" in k else round(v, 6) for k, v in numbers.items()}
        shown = {"step": step, "prompt": batch[0]["prompt"], "responses": []}
        for (thinking, answer, state), r, verdict in list(zip(parsed, rewards.tolist(), verdicts))[:G]:
            r = None if math.isnan(r) else r
            shown["responses"].append({"reward": r, **verdict, "state": state, "thinking": thinking, "answer": answer})
        if accelerator.is_main_process:
            append_jsonl(run / "samples.jsonl", [shown])

    if not finished:
        check_at(options.steps)
        save_checkpoint(model, tokenizer, run / "checkpoint", options.model)
        accelerator.wait_for_everyone()
        accelerator.end_training()
    sampler.close()
    history = reopen_jsonl(run / "metrics.jsonl")
    tenth = max(1, len(history) // 10)
    change = {}
    for name in ("reward", *(f"reward_{kind}" for kind in KINDS)):
        ends = [[m[name] for m in part if m[name] is not None] for part in (history[:tenth], history[-tenth:])]
        if all(ends):
            change[name.replace("_", ", ")] = " -> ".join(f"{sum(e) / len(e):.3f}" for e in ends)
    if tests:
        best = max(reopen_jsonl(run / "eval.jsonl"), key=lambda row: row["score"])
        change["best"] = f"{run}/best, step {best['step']}, score {best['score']:.3f}"
    summary(
        run,
        "04_grpo",
        {
            "prompts": ", ".join(f"{v} {k}" for k, v in sorted(Counter(map(kind_of, prompts)).items())),
            "steps": f"{len(history)} of {options.batch_size} prompts x {options.group_size} responses",
            **change,
            "unparsed": f"{sum(m['unparsed'] for m in history) / len(history):.2%} of the responses had no reward",
            "checkpoint": f"{run}/checkpoint",
        },
        f"python 05_eval.py --models start={options.model} grpo={run}/checkpoint",
    )


if __name__ == "__main__":
    run_stage(main)
