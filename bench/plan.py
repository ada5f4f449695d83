"""What a stage would do, and by formulas what that would take: the stages' --dry_run, and bench/cost.py's tables."""

import importlib
import os
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from common import add_lora, is_endpoint, judge_style, load_tokenizer, local_name, messages_of, render_chat

# Assumed, not measured: the used share of a card's peak and of its bandwidth, seconds that the hf engine needs to start
# a layer, vLLM's responses at once, mean tokens of a response, a judged text, a critique and a verdict
UTILISATION, SHARE, LAUNCH, VLLM_ROWS = 0.35, 0.5, 7e-4, 256
RESPONSE, ANSWER, CRITIQUE, VERDICT = 1000, 400, 250, 20


class Card(NamedTuple):
    name: str
    memory: float  # bytes
    peak: float  # operations a second, bfloat16, dense
    bandwidth: float  # bytes a second


H100 = Card("H100 80 GB", 80e9, 989e12, 3.35e12)  # data sheet of the SXM one


@cache
class Shape:
    """What a model takes, by its config; its weights are counted on the meta device, where they have no numbers."""

    def __init__(self, name: str, lora_rank: int = 0, lora_targets: tuple[str, ...] = ()):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        c, linear = config.get_text_config(), sum(m.weight.numel() for m in model.modules() if type(m) is nn.Linear)
        self.layers, self.hidden, self.inner = c.num_hidden_layers, c.hidden_size, c.intermediate_size
        size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self.q, self.kv, self.vocabulary = c.num_attention_heads * size, c.num_key_value_heads * size, c.vocab_size
        self.weights = self.trained = sum(p.numel() for p in model.parameters())
        self.head = self.vocabulary * self.hidden
        self.body = linear - self.head
        if lora_rank:
            add_lora(model, lora_rank, 1.0, 0.0, lora_targets, 0)
            self.trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def train_seconds(self, card: Card, rows, read, written, more=0) -> float:
        """Forward and back: 6 operations a weight and token, 4 if it is frozen, `more` for further forward passes. The
        head runs on response tokens, and once more; attention goes by the square of the length."""
        per_weight, length = (6 if self.trained == self.weights else 4) + more, read + written
        flops = per_weight * (self.body * length + self.head * written) + 2 * self.head * written
        flops += (6 + more) * self.layers * self.q * length**2
        return rows * flops / (card.peak * UTILISATION)

    def sample_seconds(self, card: Card, rows, at_once, n, read, written, launch=LAUNCH) -> float:
        """`rows` responses, n to a prompt: reading weights and cache, computing or starting layers, the slowest."""
        numbers = self.weights / at_once + 2 * self.layers * self.kv * (read + written / 2)
        compute, prompts = 2 / (card.peak * UTILISATION), rows / n * read * self.body
        token = max(2 * numbers / (card.bandwidth * SHARE), (self.body + self.head) * compute)
        return rows * written * max(token, launch * self.layers / at_once) + prompts * compute

    def activations(self, tokens, mixed: bool, recompute: bool) -> float:
        """Bytes kept for the backward pass: of all layers, or their inputs and one layer; and logits."""
        hidden, heads, state = (26, 10, 4) if mixed else (12, 8, 2)
        layer = hidden * self.hidden + heads * (self.q + self.kv) + 8 * self.inner
        kept = self.layers * state * self.hidden + layer if recompute else self.layers * layer
        return tokens * kept + 16 * min(2**28, tokens * self.vocabulary)


class Plan:
    """Lines of (what, seconds, seconds if all responses run to their limit, bytes held, bytes on top while it works).
    `read` is the mean tokens of a prompt, `written` of a response. `together`: all lines hold theirs at once, and the
    guard is asked by the hf engine."""

    def __init__(self, options, read, written=RESPONSE, card=H100, processes=1, sharded=False):
        self.options, self.read, self.written, self.card = options, read, written, card
        self.processes, self.sharded, self.together, self.lines = processes, sharded, False, []

    def samples(self, what, name, prompts, n, limit, mean=None, read=None, times=1, own=True, engine=""):
        """`prompts` are read and n responses written to each, `times` over. Not `own`: by the weights that are trained,
        whose cache is in float32."""
        if is_endpoint(name) or name.endswith(".py"):
            return self.lines.append((f"{name} {what}: not counted", 0, 0, 0, 0))
        m, vllm = Shape(name), (engine or self.options.engine) == "vllm"
        prompts_here, written = -(-prompts // self.processes), (min(mean or self.written, limit), limit)
        read = read or self.read
        at_once = n * max(1, min(prompts_here, self.options.batch_tokens // (read + limit) // n))
        at_once = min(prompts_here * n, VLLM_ROWS) if vllm else at_once
        every = (self.card, prompts_here * n, at_once, n, read)
        cards = self.options.tensor_parallel if vllm else 1
        seconds = [times * m.sample_seconds(*every, w, 0 if vllm else LAUNCH) / cards for w in written]
        on_top = at_once * (read + limit) * m.layers * m.kv * (4 if own else 8)  # the cache
        on_top += at_once / n * read * (6 * m.inner + 8 * m.hidden)  # one layer's pass over the prompts
        if vllm:  # what it is given
            on_top = max(2.2 * m.weights / cards, self.card.memory * (0.5 if self.together else 0.9))
        few, most = (f"{times * prompts * n * w:,.0f}" for w in written)
        text = (
            f"{Path(name).name} ({m.weights:,} weights) {what} {times * prompts:,} x {n}: {few} tokens, at most {most}"
        )
        self.lines.append((text, *seconds, 2 * m.weights * (own and not vllm), on_top))

    def judges(self, name, texts, times=1):
        style, model = judge_style(name)
        limit, engine = importlib.import_module(f"judges.{style}").NEW_TOKENS, "hf" if self.together else ""
        self.samples("judges", model, texts, 1, limit, VERDICT, self.read + ANSWER, times, engine=engine)

    def trains(self, name, steps, rows, limit, mean=None, mixed=False, more=0):
        """`rows` examples in `steps` steps; mixed: weights in float32, computed with in bfloat16; `more` operations a
        weight and token for a reference."""
        o, card, mean, size = self.options, self.card, min(mean or self.written, limit), rows / steps
        m, seconds = Shape(name, o.lora_rank, tuple(o.lora_targets)), []
        for written in (mean, limit):
            passes = min(size, -(-size * (self.read + written) // o.micro_batch_tokens))
            share = -(-passes // self.processes) / passes  # micro-batches are shared out whole
            seconds.append(share * m.train_seconds(card, rows, self.read, written, more + 2 * o.recompute))
        lora = m.trained < m.weights
        held = 2 * m.weights + 16 * m.trained + 4 * m.weights * (mixed and lora)  # 16: float32, gradient, two moments
        held = held / self.processes if self.sharded else held + 4 * m.trained * (self.processes > 1)
        held += 2 * m.weights * (mixed and more > 0 and not lora)  # the reference
        tokens = min(max(o.micro_batch_tokens, self.read + limit), size * (self.read + limit))
        text = f"{Path(name).name} trains {m.trained:,} of {m.weights:,} weights in {steps} steps: "
        text += f"{rows * mean:,.0f} tokens, at most {rows * limit:,}"
        self.lines.append((text, *seconds, held, m.activations(tokens, mixed, o.recompute)))

    def peak(self) -> float:
        held, on_top = zip(*(line[3:] for line in self.lines))
        if not self.together:
            return max(map(sum, zip(held, on_top)))
        at_once = sum if self.options.engine == "vllm" else max  # vLLM sleeps while weights are trained, the last line
        return sum(held) + max(at_once(on_top[:-1]), on_top[-1])


def dry_run(options, name: str, rows: list[dict], costs):
    """Says what a stage would do with `rows`; `costs(plan, options, rows)` is the stage's own account of its work."""
    if os.environ.get("RANK", "0") != "0":
        return
    tokenizer, template = load_tokenizer(local_name(name)), {"enable_thinking": options.enable_thinking}
    ids = [render_chat(tokenizer, messages_of(r["prompt"]), **template)[0] for r in rows[:: 1 + len(rows) // 200]]
    kinds = Counter(row.get("kind") or ("harmful" if row["harmful"] else "benign") for row in rows)
    processes, sharded = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("ACCELERATE_USE_FSDP") == "true"
    plan = Plan(options, sum(map(len, ids)) / len(ids), processes=processes, sharded=sharded)
    costs(plan, options, rows)
    print("dry run: nothing is loaded, computed or written")
    print("\n".join(f"--{k} {' '.join(map(str, v)) if isinstance(v, list) else v}" for k, v in vars(options).items()))
    print(f"\nrows: {', '.join(f'{v} {k}' for k, v in sorted(kinds.items()))}; first prompt as the model reads it:")
    print(tokenizer.decode(ids[0]))
    print(
        f"\nPredicted by formulas, not measured, for {processes * options.tensor_parallel} x {H100.name}: "
        f"{UTILISATION:.0%} of {H100.peak / 1e12:.0f} TFLOP/s, {SHARE:.0%} of {H100.bandwidth / 1e12} TB/s, prompts of "
        f"{plan.read:.0f} tokens, responses of {RESPONSE}, critiques of {CRITIQUE}, judged texts of {ANSWER}; at most: "
        "all responses at their limit. Not counted: loading, saving, a batch's wait for its longest row, later tries "
        "and checks."
    )
    for text, seconds, most, held, on_top in plan.lines:
        print(f"  {text}; {seconds / 3600:.2f} h, at most {most / 3600:.2f}; {(held + on_top) / 1e9:.1f} GB")
    hours, most, peak = (*(sum(line[i] for line in plan.lines) / 3600 for i in (1, 2)), plan.peak() / 1e9)
    fits = "" if peak < H100.memory / 1e9 else ", more than the card has"
    print(f"  in all {hours:.2f} h, at most {most:.2f}; peak {peak:.1f} GB of {H100.memory / 1e9:.0f}{fits}")
