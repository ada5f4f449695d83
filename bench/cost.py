"""What each stage costs for each preset before it is run: hours, memory, which machine is enough.

    python bench/cost.py --runs runs/demo     # after `make demo`; writes results/bench/cost.md

The figures are those of bench/plan.py, which has the formulas and what they assume, at the papers'
sizes. They are also held against two published runs, and against the demo's measured times, with
this machine's measured peak and bandwidth.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import timeit
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.plan import ANSWER, COSTS, CRITIQUE, H100, PEAK_SHARES, RESPONSE, SHARE  # noqa: E402
from bench.plan import Card, Plan, Shape, load_stage, peak_share  # noqa: E402
from plumbing import ALL_LINEAR, PRESETS, parse_options, read_jsonl  # noqa: E402
from plumbing.stand_ins import SHAPES, config_of  # noqa: E402

CONFIGS = {
    preset: config_of(row["model"]) for preset, row in PRESETS.items() if row["model"] in SHAPES
}


class Stage(NamedTuple):
    file: str
    rows: list[dict]  # at the papers' sizes
    prompt: int  # tokens of one
    options: str


HARMFUL, MATHS = {"harmful": True}, {"harmful": False, "gold": ""}
WITH_GUARD = "--model {model} --guard {guard}"
WITH_EXPERT = "--model {model} --expert expert@http://localhost"
WITH_JUDGE = "--models base={model} --judges {judge}"
STAGES = {
    "01": Stage("01_generate.py", [HARMFUL] * 3_000, 100, WITH_GUARD),
    "02": Stage("02_verify_sft.py", [HARMFUL] * 6_000, 500 + ANSWER, WITH_EXPERT),
    "03": Stage("03_steer_selfgen.py", [HARMFUL] * 40_000, 100, WITH_GUARD),
    "04 LoRA": Stage("04_grpo.py", [HARMFUL] * 6_000, 100, WITH_GUARD + " --lora_rank 16"),
    "04": Stage("04_grpo.py", [HARMFUL] * 6_000, 100, WITH_GUARD),
    "05": Stage("05_eval.py", [HARMFUL] * 1_313 + [MATHS] * 500, 100, WITH_JUDGE),
}
SHORT = {"engine": "", "micro_batch_tokens": "m ", "batch_tokens": "b "}


class Machine(NamedTuple):
    card: Card
    cards: int
    launch: str  # how a stage is started there
    launch_fsdp: str  # and with FSDP


RTX = Card("RTX 4090 24 GB", 24e9, 165e12, 1.008e12)
LAUNCH, FSDP = "accelerate launch", "accelerate launch --config_file fsdp.yaml"
TWO = "--num_machines 2 --machine_rank 0 --main_process_ip HOST --main_process_port 29500"
TWO += " --num_processes 16"
EIGHT = "--num_processes 8"
MACHINES = {
    "One 24 GB card": Machine(RTX, 1, "python", ""),
    "One 80 GB card": Machine(H100, 1, "python", ""),
    "Eight 80 GB cards": Machine(H100, 8, f"{LAUNCH} {EIGHT}", f"{FSDP} {EIGHT}"),
    "Two machines of eight 80 GB cards": Machine(
        H100, 16, f"{LAUNCH} --multi_gpu {TWO}", f"{FSDP} {TWO}"
    ),
}


class Report(NamedTuple):
    """A training run of Qwen3-0.6B on one H100 that others report."""

    name: str
    tokens_per_second: float
    share: float  # of the card's peak
    length: int  # tokens of a sequence
    lora_rank: int
    recompute: bool


REPORTS = [
    Report("SFT of all weights, 8k tokens, with recompute", 26_000, 0.168, 8192, 0, True),
    Report("RL update, LoRA of rank 16, 16k tokens", 13_342, 0.109, 16_384, 16, False),
]


@cache
def stage_options(folder: Path, preset: str, stage: str):
    module, _ = load_stage(STAGES[stage].file)
    names = {"model": folder / preset, "guard": folder / "qwen3-4b", "judge": folder / "qwen3-8b"}
    line = STAGES[stage].options.format(**names)
    command = [STAGES[stage].file, "--preset", preset, "--engine", "vllm", *line.split()]
    with mock.patch.object(sys, "argv", command):
        return parse_options(module.Options, module.__doc__, bounds={"lora_rank": (0, math.inf)})


def plan(
    folder, preset, stage, card=H100, count=1, fsdp=False, rows=1, response=RESPONSE, **changes
) -> Plan:
    """What bench/plan.py would say with those options; `rows` multiplies the papers' rows and
    steps."""
    options = stage_options(folder, preset, stage)
    if stage[:2] == "04":
        changes["steps"] = options.steps * rows
    new = Plan(replace(options, **changes), STAGES[stage].prompt, response, card, count, fsdp)
    COSTS[stage[:2]](new, new.options, STAGES[stage].rows * rows)
    return new


def fitting(folder, preset, stage, card, count) -> Plan | None:
    """The fastest way that fits the card, the least unlike the preset of nearly equal ones."""
    best, trains = None, stage[:2] in ("02", "03", "04")
    guard = {}
    if stage[:2] == "04" and card == RTX:
        guard = {"guard": str(folder / "qwen3-0.6b")}
    for fsdp, engine, micro_batch, batch in product(
        (False, True) if count > 1 and trains else (False,),
        ("vllm", "hf"),
        (16_384, 8192, 4096, 2048, 1024) if trains else (0,),
        (131_072, 65_536, 32_768, 16_384),
    ):
        changes = {"engine": engine, "batch_tokens": batch, **guard}
        if trains:
            changes["micro_batch_tokens"] = micro_batch
        new = plan(folder, preset, stage, card, count, fsdp, **changes)
        if new.peak() < card.memory and (best is None or new.hours() < 0.95 * best.hours()):
            best = new
    return best


# Against what was measured ------------------------------------------------------------------------
def against_reports(folder: Path) -> list[str]:
    """Prediction against training speeds that others report of Qwen3-0.6B on one H100."""
    heads = ["Qwen3-0.6B on one H100", "published tokens/s", "predicted", "predicted / published"]
    heads += ["published share of the peak", "assumed"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    name, ratios = str(folder / "qwen3-0.6b"), []

    def speed(report: Report, recompute: bool) -> float:
        shape = Shape(name, report.lora_rank, tuple(ALL_LINEAR))
        return report.length / shape.train_seconds(H100, 1, 0, report.length, 2 * recompute)

    for report in REPORTS:
        predicted = speed(report, report.recompute)
        ratios.append(predicted / report.tokens_per_second)
        cells = [f"{report.tokens_per_second:,}", f"{predicted:,.0f}", f"{ratios[-1]:.2f}"]
        cells += [f"{report.share:.1%}", f"{peak_share(Shape(name).weights):.1%}"]
        lines.append(f"| {report.name} | {' | '.join(cells)} |")
    sft, rl = ratios
    again = speed(REPORTS[1], True) / REPORTS[1].tokens_per_second
    return [
        *lines,
        "",
        "Reported by others; not measured here. The formulas say "
        f"{sft:.2f} times the published speed of SFT and {rl:.2f} times",
        f"that of the RL update ({again:.2f} times if it computes its layers again, which we don't",
        "know). All tokens count as response tokens. The assumed share counts every operation; the",
        "published ones agree with a count without those done again.",
    ]


def this_machine() -> Card:
    def best(work) -> float:
        return min(timeit.repeat(work, number=1, repeat=5))

    a, big = torch.randn(2048, 2048), torch.randn(2**26)
    peak = 2 * 2048**3 / best(lambda: torch.mm(a, a))
    bandwidth = 2 * 4 * 2**26 / best(lambda: big.mul_(1.0))
    # numbers of four bytes, where the formulas have two
    return Card("this machine", 0, peak, bandwidth / 2)


def against_demo(runs: Path) -> list[str]:
    """Prediction against the demo: this machine's measured peak and bandwidth, the demo's measured
    tokens."""
    here, tiny = this_machine(), str(ROOT / "tiny/lrm")
    assumed = peak_share(Shape(tiny).weights)
    lines = ["| demo | measured s | predicted s | measured / predicted |", "|---|---|---|---|"]

    shares = {}

    def compare(name: str, measured: float, predicted: float):
        ratio = measured / predicted
        shares[name] = f"{assumed / ratio:.0%}"
        lines.append(f"| {name} | {measured:.1f} | {predicted:.1f} | {ratio:.1f} |")

    options = json.loads((runs / "02_verify_sft/options.json").read_text())["options"]
    rows = read_jsonl(runs / "02_verify_sft/train.jsonl")
    steps = read_jsonl(runs / "02_verify_sft/metrics.jsonl")
    response = sum(step["label_tokens"] for step in steps) / options["epochs"] / len(rows)
    prompt = sum(row["prompt_tokens"] for row in rows) / len(rows)
    lora = Shape(tiny, options["lora_rank"], tuple(options["lora_targets"]))
    predicted = options["epochs"] * lora.train_seconds(here, len(rows), prompt, response)
    compare("02 training", sum(step["seconds"] for step in steps), predicted)
    steps = read_jsonl(runs / "04_grpo_base/metrics.jsonl")
    response = sum(step["response_tokens"] for step in steps) / len(steps)
    active = sum(128 * (1 - step["zero_spread_groups"]) for step in steps)
    predicted = Shape(tiny).train_seconds(here, active, 15, response)
    compare("04 update", sum(step["update_seconds"] for step in steps), predicted)
    predicted = len(steps) * Shape(tiny).sample_seconds(here, 128, 128, 8, 15, response, 0)
    measured = sum(step["sampling_seconds"] for step in steps)
    compare("04 sampling and guard", measured, predicted)
    speed = f"{here.peak / 1e9:.0f} GFLOP/s, {2 * here.bandwidth / 1e9:.1f} GB/s"
    load = f"a load of {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    return [
        *lines,
        "",
        f"Measured here: {speed}, at {load}. The predictions take the",
        f"{assumed:.0%} of the peak that small models use of an H100; here 02 training used "
        f"{shares['02 training']} and 04 update {shares['04 update']}.",
    ]


# cost.md ------------------------------------------------------------------------------------------
HEAD = [f"| preset | {' | '.join(STAGES)} |", "|---" * (1 + len(STAGES)) + "|"]


def machine_table(folder: Path, machine: Machine) -> list[str]:
    """Hours and memory of each preset and stage, and the commands of the last that fits."""
    lines, commands = [*HEAD], {}
    for preset in CONFIGS:
        cells = [preset]
        for stage in STAGES:
            best = fitting(folder, preset, stage, machine.card, machine.cards)
            if best is None:
                cells.append("–")
                continue
            usual = vars(stage_options(folder, preset, stage))
            changes = {k: v for k, v in vars(best.options).items() if v != usual[k]}
            marks = [SHORT[k] + str(v) for k, v in changes.items() if k in SHORT]
            marks += ["sharded"] * best.fsdp
            size = f"{best.peak() / 1e9:.0f} GB"
            cells.append(", ".join([f"{best.hours():.2f} h", size, *marks]))
            changes = {"preset": preset, "engine": best.options.engine, **changes}
            if "guard" in changes:
                changes["guard"] = "Qwen/Qwen3Guard-Gen-0.6B"
            if "LoRA" in stage:
                changes["lora_rank"] = 16
            launch = machine.launch_fsdp if best.fsdp else machine.launch
            options = " ".join(f"--{k} {v}" for k, v in changes.items())
            commands[stage] = f"{launch} {STAGES[stage].file} {options} …"
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "The last that fits, stage by stage:", ""]
    return [*lines, "```bash", *commands.values(), "```", ""]


def growth_table(folder: Path) -> list[str]:
    lines, base = [*HEAD], "qwen3-1.7b"
    changes = {f"{name} instead": (name, {}) for name in ("qwen3-4b", "qwen3-8b")}
    changes["prompts, steps x 2"] = (base, {"rows": 2})
    changes["group 8 -> 16"] = (base, None)
    changes |= {f"responses x {k}": (base, {"response": k * RESPONSE}) for k in (2, 8)}
    for what, (preset, change) in changes.items():
        cells = [what]
        for stage in STAGES:
            group = {"01": {"n": 16}, "04": {"group_size": 16}}.get(stage[:2], {})
            more = plan(folder, preset, stage, **(group if change is None else change))
            cells.append(f"{more.hours() / plan(folder, base, stage).hours():.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    hours = [line.seconds / 3600 for line in plan(folder, "qwen3-0.6b", "03").lines]
    grpo = plan(folder, "qwen3-0.6b", "04").hours()
    return [
        *lines,
        "",
        "ThinkSafe's own on Qwen3-0.6B, GPU and lengths unknown to us: "
        "sampling 0.45 h, SFT 2.6, GRPO 21.3.",
        f"Here: sampling and guard {sum(hours[:-1]):.2f}, SFT {hours[-1]:.2f}, "
        f"100 steps of GRPO {grpo:.2f}.",
    ]


def tables(folder: Path) -> str:
    """cost.md without the demo."""
    for name, config in CONFIGS.items():
        config.save_pretrained(folder / name)
    lines = []
    for name, machine in MACHINES.items():
        lines += [f"## {name}", "", *machine_table(folder, machine)]
    lines += ["## How cost grows, times qwen3-1.7b's hours on one 80 GB card", ""]
    lines += [*growth_table(folder), "", "## Against published runs", "", *against_reports(folder)]
    return "\n".join(lines)


def introduction() -> str:
    shares = [f"{share:.0%} at {size / 1e9:g} B" for size, share in PEAK_SHARES.items()]
    return f"""# What the stages cost

Predicted by the formulas of `bench/plan.py`, not measured; nothing here ran on a GPU. Assumed: by
number of weights a share of the peak ({", ".join(shares)}; by the logarithm in
between, constant outside) and {SHARE:.0%} of the bandwidth (H100: {H100.peak / 1e12:.0f} TFLOP/s
in bfloat16, {H100.bandwidth / 1e12} TB/s; RTX 4090: {RTX.peak / 1e12:.0f}, {RTX.bandwidth / 1e12});
prompts of 100 tokens, responses of {RESPONSE}, answers of {ANSWER}, critiques of {CRITIQUE}; 3,000
prompts x 8 for 01, 6,000 rows for 02, 40,000 prompts for 03, 100 steps of 64 x 8 for 04, one model,
1,813 prompts and one judge for 05. The guard has 4 B weights (in 04 on 24 GB 0.6 B), the judge 8 B;
02's expert is an endpoint.

Memory: weights in bfloat16; 16 bytes for each trained weight (float32, gradient, AdamW's two
moments), 4 for each frozen one in 04; with `--recompute`, which these presets set, the inputs of
all layers and one layer of a micro-batch, or of one response at its limit if that is longer;
logits; the hf sampler's cache. vLLM takes 90 % of the card, in 04 half of it. Left out: buffers of
FSDP, gaps of the allocator, saving.

Each cell: hours, GB of a card, and what must differ from the preset: m `--micro_batch_tokens`,
b `--batch_tokens`, where fewer than 16,384 and 131,072 fit or share a step out better; hf: that
engine, not vLLM; sharded: FSDP by fsdp.yaml. –: does not fit.
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder_help = "run folders of `make demo`, to check the formulas against"
    parser.add_argument("--runs", default="runs/demo", help=folder_help)
    runs = ROOT / parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        text = f"{introduction()}\n{tables(Path(folder))}\n"
    if runs.exists():
        text += "\n## Against the demo\n\n" + "\n".join(against_demo(runs)) + "\n"
    out = ROOT / "results/bench/cost.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
