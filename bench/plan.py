"""Hours and memory that a stage's command would take, predicted by formulas before it is run.

    python bench/plan.py 04_grpo.py --preset qwen3-4b --engine vllm --prompts prompts.jsonl
    WORLD_SIZE=8 ACCELERATE_USE_FSDP=true python bench/plan.py 04_grpo.py …    # for eight cards
    python bench/plan.py 04_grpo.py --help                                     # the stage's options

STAGE is a stage's file, or a copy of one whose docstring begins with its number ("Stage 04 · …");
what follows it are that stage's own options. The stage checks them and reads its prompts as for
--dry_run; nothing is loaded, computed or written, and no GPU, no vLLM is needed. What the figures
assume is in the first line; bench/cost.py tabulates them for all presets and machines.
"""

import argparse
import importlib
import importlib.util
import math
import os
import re
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import plumbing  # noqa: E402
from common import messages_of, render_chat  # noqa: E402
from judges import judge_style  # noqa: E402
from plumbing import fail, is_endpoint, local_name  # noqa: E402

# Assumed, not measured: the used share of a card's bandwidth, seconds that the hf engine needs to
# start a layer, vLLM's responses at once, mean tokens of a response, a judged text, a critique and
# a verdict
SHARE, LAUNCH, VLLM_ROWS = 0.5, 7e-4, 256
RESPONSE, ANSWER, CRITIQUE, VERDICT = 1000, 400, 250, 20

# The used share of a card's peak, by number of weights: the middle of what published runs of RL
# with LoRA on one H100 report (11 to 27 % at 0.6 B, 22 to 37 % at 4 B); from 8 B on, an assumption
PEAK_SHARES = {0.6e9: 0.19, 4e9: 0.30, 8e9: 0.35}


def peak_share(weights: float) -> float:
    """PEAK_SHARES, by the logarithm of the number of weights in between, constant outside.

    >>> [round(float(peak_share(weights)), 3) for weights in (1e6, 0.6e9, 1.7e9, 4e9, 14e9)]
    [0.19, 0.19, 0.25, 0.3, 0.35]
    """
    return np.interp(math.log(weights), np.log(list(PEAK_SHARES)), list(PEAK_SHARES.values()))


class Card(NamedTuple):
    name: str
    memory: float  # bytes
    peak: float  # operations a second, bfloat16, dense
    bandwidth: float  # bytes a second


H100 = Card("H100 80 GB", 80e9, 989e12, 3.35e12)  # data sheet of the SXM one


@cache
class Shape:
    """What a model takes, by its config; its weights are counted on the meta device, where they
    have no numbers. LoRA of rank r adds r (in + out) weights to each layer named in the targets."""

    def __init__(self, name: str, lora_rank: int = 0, lora_targets: tuple[str, ...] = ()):
        model = plumbing.unloaded(name)
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        c = model.config.get_text_config()
        self.layers, self.hidden = c.num_hidden_layers, c.hidden_size
        self.inner, self.vocabulary = c.intermediate_size, c.vocab_size
        size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        self.q, self.kv = c.num_attention_heads * size, c.num_key_value_heads * size
        self.weights = self.trainable = sum(p.numel() for p in model.parameters())
        self.head = self.vocabulary * self.hidden
        self.body = sum(m.weight.numel() for m in linear.values()) - self.head
        if lora_rank:
            layers = [m for n, m in linear.items() if n.rpartition(".")[2] in lora_targets]
            if not layers:
                fail(f"no linear layer is named {' or '.join(lora_targets)} (--lora_targets)")
            self.trainable = lora_rank * sum(m.in_features + m.out_features for m in layers)

    def train_seconds(self, card: Card, rows, prompt, response, more=0) -> float:
        """Forward and back: 6 operations a weight and token, 4 if it is frozen, `more` for further
        forward passes. The head runs on response tokens, and once more; attention goes by the
        square of the length."""
        per_weight = (6 if self.trainable == self.weights else 4) + more
        length = prompt + response
        operations = per_weight * (self.body * length + self.head * response)
        operations += 2 * self.head * response
        operations += (6 + more) * self.layers * self.q * length**2
        return rows * operations / (card.peak * peak_share(self.weights))

    def sample_seconds(
        self, card: Card, rows, at_once, n, prompt, response, launch=LAUNCH
    ) -> float:
        """`rows` responses, n to a prompt: reading weights and cache, computing or starting layers,
        the slowest."""
        numbers = self.weights / at_once + 2 * self.layers * self.kv * (prompt + response / 2)
        compute = 2 / (card.peak * peak_share(self.weights))
        token = max(2 * numbers / (card.bandwidth * SHARE), (self.body + self.head) * compute)
        prefill = rows / n * prompt * self.body * compute
        return rows * response * max(token, launch * self.layers / at_once) + prefill

    def activations(self, tokens, autocast: bool, recompute: bool) -> float:
        """Bytes kept for the backward pass: of all layers, or their inputs and one layer; and
        logits."""
        hidden, heads, state = (26, 10, 4) if autocast else (12, 8, 2)
        layer = hidden * self.hidden + heads * (self.q + self.kv) + 8 * self.inner
        per_token = self.layers * layer
        if recompute:
            per_token = self.layers * state * self.hidden + layer
        return tokens * per_token + 16 * min(2**28, tokens * self.vocabulary)


class Work(NamedTuple):
    """One line of a plan."""

    text: str
    seconds: float = 0
    most: float = 0  # seconds if all responses run to their limit
    resident: float = 0  # bytes
    on_top: float = 0  # more bytes while it works


class Plan:
    """Lines of Work. `prompt` is the mean tokens of a prompt, `response` of a response. `together`:
    all lines hold theirs at once, and the guard is asked by the hf engine."""

    def __init__(self, options, prompt, response=RESPONSE, card=H100, processes=1, fsdp=False):
        self.options, self.prompt, self.response, self.card = options, prompt, response, card
        self.processes, self.fsdp, self.together = processes, fsdp, False
        self.lines: list[Work] = []

    def samples(
        self, what, name, prompts, n, limit, mean=None, prompt=None, times=1, own=True, engine=""
    ):
        """`prompts` are read and n responses written to each, `times` over. Not `own`: by the
        weights that are trained, whose cache is in float32."""
        if is_endpoint(name) or name.endswith(".py"):
            self.lines.append(Work(f"{name} {what}: not counted"))
            return
        m, vllm = Shape(name), (engine or self.options.engine) == "vllm"
        mean, prompt = min(mean or self.response, limit), prompt or self.prompt
        prompts_here = math.ceil(prompts / self.processes)
        at_once = self.options.batch_tokens // (prompt + limit) // n
        at_once = n * max(1, min(prompts_here, at_once))
        cards, launch = 1, LAUNCH
        if vllm:
            at_once, launch = min(prompts_here * n, VLLM_ROWS), 0
            cards = self.options.tensor_parallel

        def seconds(tokens):
            rows = times * prompts_here * n
            return m.sample_seconds(self.card, rows, at_once, n, prompt, tokens, launch) / cards

        on_top = at_once * (prompt + limit) * m.layers * m.kv * (4 if own else 8)  # the cache
        # one layer's pass over the prompts
        on_top += at_once / n * prompt * (6 * m.inner + 8 * m.hidden)
        if vllm:  # the share of the card that it gets
            share = 0.5 if self.together else 0.9
            on_top = max(2.2 * m.weights / cards, self.card.memory * share)
        count = times * prompts
        text = f"{Path(name).name} ({m.weights:,} weights) {what} {count:,} x {n}: "
        text += f"{count * n * mean:,.0f} tokens, at most {count * n * limit:,.0f}"
        resident = 2 * m.weights * (own and not vllm)
        self.lines.append(Work(text, seconds(mean), seconds(limit), resident, on_top))

    def judges(self, name, texts, times=1):
        style, model = judge_style(name)
        limit = importlib.import_module(f"judges.{style}").NEW_TOKENS
        engine, prompt = "hf" if self.together else "", self.prompt + ANSWER
        self.samples("judges", model, texts, 1, limit, VERDICT, prompt, times, engine=engine)

    def trains(self, name, steps, rows, limit, mean=None, autocast=False, more=0):
        """`rows` examples in `steps` steps; autocast: weights in float32, computed with in
        bfloat16; `more` operations a weight and token for a reference."""
        o, m = self.options, Shape(name, self.options.lora_rank, tuple(self.options.lora_targets))
        mean, size = min(mean or self.response, limit), rows / steps

        def seconds(tokens):  # micro-batches are shared out whole
            passes = math.ceil(size * (self.prompt + tokens) / o.micro_batch_tokens)
            passes = min(size, passes)
            share = math.ceil(passes / self.processes) / passes
            forwards = more + 2 * o.recompute
            return share * m.train_seconds(self.card, rows, self.prompt, tokens, forwards)

        lora = m.trainable < m.weights
        resident = 2 * m.weights + 4 * m.weights * (autocast and lora)
        resident += 16 * m.trainable  # float32, gradient, two moments
        if self.fsdp:
            resident /= self.processes
        elif self.processes > 1:
            resident += 4 * m.trainable
        resident += 2 * m.weights * (autocast and more > 0 and not lora)  # the reference
        longest = self.prompt + limit
        tokens = min(max(o.micro_batch_tokens, longest), size * longest)
        on_top = m.activations(tokens, autocast, o.recompute)
        text = f"{Path(name).name} trains {m.trainable:,} of {m.weights:,} weights in {steps} steps"
        text += f": {rows * mean:,.0f} tokens, at most {rows * limit:,}"
        self.lines.append(Work(text, seconds(mean), seconds(limit), resident, on_top))

    def hours(self) -> float:
        return sum(line.seconds for line in self.lines) / 3600

    def most_hours(self) -> float:
        return sum(line.most for line in self.lines) / 3600

    def peak(self) -> float:
        if not self.together:
            return max(line.resident + line.on_top for line in self.lines)
        # vLLM sleeps while weights are trained, the last line
        at_once = sum if self.options.engine == "vllm" else max
        on_top = [line.on_top for line in self.lines]
        return sum(line.resident for line in self.lines) + max(at_once(on_top[:-1]), on_top[-1])


# What each stage does -----------------------------------------------------------------------------
def steps_of(options, rows: list[dict]) -> int:
    return options.epochs * math.ceil(len(rows) / options.batch_size)


def costs_01(plan: Plan, options, rows: list[dict]):
    plan.samples("answers", options.model, len(rows), options.n, options.max_new_tokens)
    plan.judges(options.guard, len(rows) * options.n)


def costs_02(plan: Plan, options, rows: list[dict]):
    lengths, examples = (options.max_critique_tokens, CRITIQUE), options.epochs * len(rows)
    plan.samples("criticises", options.expert, len(rows), 1, *lengths)
    plan.trains(options.model, steps_of(options, rows), examples, *lengths)


def costs_03(plan: Plan, options, rows: list[dict]):
    name, limit = options.generator or options.model, options.max_new_tokens
    n = 5 if options.steering[0] == "none" else 1
    by_kl = 0
    if options.benign_loss == "kl":
        by_kl = sum(not row["harmful"] for row in rows) / len(rows)
    plan.samples("answers", name, len(rows), n, limit)
    plan.judges(options.guard, len(rows) * n * (1 if options.faithful else 2))
    examples, more = options.epochs * len(rows), 2 * by_kl
    plan.trains(options.model, steps_of(options, rows), examples, limit, more=more)


def costs_04(plan: Plan, options, rows: list[dict]):
    steps, n, limit = options.steps, options.group_size, options.max_new_tokens
    own, plan.together = plan.fsdp or options.engine == "vllm", True
    plan.samples("samples", options.model, options.batch_size, n, limit, times=steps, own=own)
    plan.judges(options.guard, options.batch_size * n, times=steps)
    updates, reference = steps * options.updates_per_batch, 2 * (options.beta > 0)
    examples = updates * options.batch_size * n
    plan.trains(options.model, updates, examples, limit, autocast=True, more=reference)


def costs_05(plan: Plan, options, rows: list[dict]):
    paths = [pair.partition("=")[2] for pair in options.models]
    texts = len(paths) * options.n * sum(not {"gold", "verdict"} & set(row) for row in rows)
    for path in paths:
        plan.samples("answers", path, len(rows), options.n, options.max_new_tokens)
    for judge in options.judges:
        plan.judges(judge, 2 * texts)
    if options.self_checker:
        plan.judges(options.self_checker, texts)


COSTS = {"01": costs_01, "02": costs_02, "03": costs_03, "04": costs_04, "05": costs_05}


# The command --------------------------------------------------------------------------------------
def load_stage(file: str):
    """(module, number) of a stage's file; its name is no identifier, so `import` cannot."""
    path = next((path for path in (Path(file), ROOT / file) if path.is_file()), None)
    if path is None or path.suffix != ".py":
        fail(f"no stage at {file}; such as 04_grpo.py, and then its options (--help says how)")
    number = re.match(r'"""Stage (\d\d)', path.read_text(encoding="utf-8"))
    if not number or number[1] not in COSTS:
        fail(f"{file} is no stage: its docstring must begin with 'Stage 01' to 'Stage 05'")
    spec = importlib.util.spec_from_file_location(f"plan_of_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module, number[1]


def predict(number: str, options, model: str, rows: list[dict]):
    """Prints what the stage of that number takes for these options and rows."""
    if os.environ.get("RANK", "0") != "0":
        return
    tokenizer, template = plumbing.dry_tokenizer(local_name(model)), options.enable_thinking
    lengths = []
    for row in rows[:: 1 + len(rows) // 200]:
        ids, _ = render_chat(tokenizer, messages_of(row["prompt"]), enable_thinking=template)
        lengths.append(len(ids))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    plan = Plan(options, sum(lengths) / len(lengths), processes=processes, fsdp=fsdp)
    COSTS[number](plan, options, rows)
    least, most = min(PEAK_SHARES), max(PEAK_SHARES)
    print(
        f"Predicted by formulas, not measured, for {processes * options.tensor_parallel} x "
        f"{H100.name}: {PEAK_SHARES[least]:.0%} (of {least / 1e9} B weights or fewer) to "
        f"{PEAK_SHARES[most]:.0%} ({most / 1e9:.0f} B or more) of {H100.peak / 1e12:.0f} TFLOP/s, "
        f"{SHARE:.0%} of {H100.bandwidth / 1e12} TB/s, prompts of {plan.prompt:.0f} tokens, "
        f"responses of {RESPONSE}, critiques of {CRITIQUE}, judged texts of {ANSWER}; at most: all "
        "responses at their limit. Not counted: loading, saving, a batch's wait for its longest "
        "row, later tries and checks."
    )
    for line in plan.lines:
        hours = f"{line.seconds / 3600:.2f} h, at most {line.most / 3600:.2f}"
        print(f"  {line.text}; {hours}; {(line.resident + line.on_top) / 1e9:.1f} GB")
    fits = "" if plan.peak() < H100.memory else ", more than the card has"
    hours = f"{plan.hours():.2f} h, at most {plan.most_hours():.2f}"
    print(f"  in all {hours}; peak {plan.peak() / 1e9:.1f} GB of {H100.memory / 1e9:.0f}{fits}")


def main():
    parser = argparse.ArgumentParser(
        usage="python bench/plan.py STAGE [options of the stage]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = lambda message: fail(f"{message} (--help says how)")
    parser.add_argument("stage", metavar="STAGE", help="such as 04_grpo.py")
    parser.add_argument("options", nargs=argparse.REMAINDER, help="what the stage is called with")
    command = parser.parse_args()
    module, number = load_stage(command.stage)
    module.dry_run = lambda options, model, rows, free=(): predict(number, options, model, rows)
    with mock.patch.object(sys, "argv", [command.stage, *command.options, "--dry_run"]):
        module.main()


if __name__ == "__main__":
    plumbing.run_stage(main)
