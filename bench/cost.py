"""What each stage costs for each preset before it is run: hours, memory, and which machine is enough.

    python bench/cost.py --runs runs/demo     # after `make demo`; writes results/bench/cost.md

The figures are those of `--dry_run`, at the papers' sizes; bench/plan.py has the formulas and what they assume. They
are also held against the demo's measured times, with this machine's measured peak and bandwidth.
"""

import argparse
import importlib
import json
import os
import sys
import tempfile
import timeit
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from unittest import mock

from transformers import LlamaConfig, Qwen2Config, Qwen3Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.plan import ANSWER, CRITIQUE, H100, RESPONSE, SHARE, UTILISATION, Card, Plan, Shape  # noqa: E402
from common import parse_options, read_jsonl  # noqa: E402

# From each model's config.json on the hub; heads are 128 wide
FIELDS = ["hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"]
FIELDS += ["vocab_size", "tie_word_embeddings"]
PUBLISHED = {
    "qwen3-0.6b": (Qwen3Config, 1024, 28, 3072, 16, 8, 151_936, True),
    "qwen3-1.7b": (Qwen3Config, 2048, 28, 6144, 16, 8, 151_936, True),
    "qwen3-4b": (Qwen3Config, 2560, 36, 9728, 32, 8, 151_936, True),
    "qwen3-8b": (Qwen3Config, 4096, 36, 12_288, 32, 8, 151_936, False),
    "r1-1.5b": (Qwen2Config, 1536, 28, 8960, 12, 2, 151_936, False),
    "r1-7b": (Qwen2Config, 3584, 28, 18_944, 28, 4, 152_064, False),
    "r1-8b": (LlamaConfig, 4096, 32, 14_336, 32, 8, 128_256, False),
    "r1-14b": (Qwen2Config, 5120, 48, 13_824, 40, 8, 152_064, False),
}
CONFIGS = {name: kind(**dict(zip(FIELDS, values))) for name, (kind, *values) in PUBLISHED.items()}

# Rows at the papers' sizes, tokens of a prompt, options
HARMFUL, MATHS = {"harmful": True}, {"harmful": False, "gold": ""}
STAGES = {
    "01": ("01_generate", [HARMFUL] * 3_000, 100, "--model {model} --guard {guard}"),
    "02": ("02_verify_sft", [HARMFUL] * 6_000, 500 + ANSWER, "--model {model} --expert expert@http://localhost"),
    "03": ("03_steer_selfgen", [HARMFUL] * 40_000, 100, "--model {model} --guard {guard}"),
    "04 LoRA": ("04_grpo", [HARMFUL] * 6_000, 100, "--model {model} --guard {guard} --lora_rank 16"),
    "04": ("04_grpo", [HARMFUL] * 6_000, 100, "--model {model} --guard {guard}"),
    "05": ("05_eval", [HARMFUL] * 1_313 + [MATHS] * 500, 100, "--models base={model} --judges {judge}"),
}
SHORT = {"engine": "", "micro_batch_tokens": "m ", "batch_tokens": "b "}
RTX = Card("RTX 4090 24 GB", 24e9, 165e12, 1.008e12)
LAUNCH, FSDP = "accelerate launch", "accelerate launch --config_file fsdp.yaml"
TWO = "--num_machines 2 --machine_rank 0 --main_process_ip HOST --main_process_port 29500 --num_processes 16"
MACHINES = {  # card, how many, how a stage is started there, and with FSDP
    "One 24 GB card": (RTX, 1, "python", ""),
    "One 80 GB card": (H100, 1, "python", ""),
    "Eight 80 GB cards": (H100, 8, f"{LAUNCH} --num_processes 8", f"{FSDP} --num_processes 8"),
    "Two machines of eight 80 GB cards": (H100, 16, f"{LAUNCH} --multi_gpu {TWO}", f"{FSDP} {TWO}"),
}


@cache
def parsed(folder: Path, preset: str, stage: str):
    name, _, _, line = STAGES[stage]
    line = line.format(model=folder / preset, guard=folder / "qwen3-4b", judge=folder / "qwen3-8b")
    module = importlib.import_module(name)
    with mock.patch.object(sys, "argv", [name, "--preset", preset, "--engine", "vllm", *line.split()]):
        return module, parse_options(module.Options, "")


def plan(folder, preset, stage, card=H100, count=1, sharded=False, rows=1, written=RESPONSE, **changes) -> Plan:
    """What --dry_run would say with those options; `rows` multiplies the papers' rows and steps."""
    module, options = parsed(folder, preset, stage)
    changes |= {"steps": options.steps * rows} if stage[:2] == "04" else {}
    found = Plan(replace(options, **changes), STAGES[stage][2], written, card, count, sharded)
    module.costs(found, found.options, STAGES[stage][1] * rows)
    return found


def hours(found: Plan) -> float:
    return sum(line[1] for line in found.lines) / 3600


def fitting(folder, preset, stage, card, count) -> Plan | None:
    """The fastest way that fits the card, the least changed of nearly equal ones."""
    best, trains = None, stage[:2] in ("02", "03", "04")
    guard = {"guard": str(folder / "qwen3-0.6b")} if stage[:2] == "04" and card == RTX else {}
    for sharded, engine, tokens, held in product(
        (False, True) if count > 1 and trains else (False,),
        ("vllm", "hf"),
        (16_384, 8192, 4096, 2048, 1024) if trains else (0,),
        (131_072, 65_536, 32_768, 16_384),
    ):
        changes = {"engine": engine, "batch_tokens": held, **guard} | ({"micro_batch_tokens": tokens} if trains else {})
        found = plan(folder, preset, stage, card, count, sharded, **changes)
        if found.peak() < card.memory and (best is None or hours(found) < 0.95 * hours(best)):
            best = found
    return best


def this_machine() -> Card:
    import torch

    def best(work) -> float:
        return min(timeit.repeat(work, number=1, repeat=5))

    a, big = torch.randn(2048, 2048), torch.randn(2**26)
    peak, bandwidth = 2 * 2048**3 / best(lambda: torch.mm(a, a)), 2 * 4 * 2**26 / best(lambda: big.mul_(1.0))
    return Card("this machine", 0, peak, bandwidth / 2)  # numbers of four bytes, where the formulas have two


def check(runs: Path) -> list[str]:
    """Prediction against the demo: this machine's measured peak and bandwidth, the demo's measured tokens."""
    here, tiny = this_machine(), str(ROOT / "tiny/lrm")
    lines = ["| demo | measured s | predicted s | measured / predicted |", "|---|---|---|---|"]
    options = json.loads((runs / "02_verify_sft/options.json").read_text())["options"]
    kept, found = read_jsonl(runs / "02_verify_sft/train.jsonl"), read_jsonl(runs / "02_verify_sft/metrics.jsonl")
    response = sum(row["label_tokens"] for row in found) / options["epochs"] / len(kept)
    prompt = sum(row["prompt_tokens"] for row in kept) / len(kept)
    lora = Shape(tiny, options["lora_rank"], tuple(options["lora_targets"]))
    predicted = options["epochs"] * lora.train_seconds(here, len(kept), prompt, response)
    rows = [("02 training", sum(row["seconds"] for row in found), predicted)]
    found = read_jsonl(runs / "04_grpo_base/metrics.jsonl")
    response = sum(row["response_tokens"] for row in found) / len(found)
    trained = sum(128 * (1 - row["zero_spread_groups"]) for row in found)
    predicted = Shape(tiny).train_seconds(here, trained, 15, response)
    rows.append(("04 update", sum(row["update_seconds"] for row in found), predicted))
    predicted = len(found) * Shape(tiny).sample_seconds(here, 128, 128, 8, 15, response, 0)
    rows.append(("04 sampling and guard", sum(row["sampling_seconds"] for row in found), predicted))
    lines += [f"| {name} | {seen:.1f} | {said:.1f} | {seen / said:.1f} |" for name, seen, said in rows]
    speed = f"{here.peak / 1e9:.0f} GFLOP/s, {2 * here.bandwidth / 1e9:.1f} GB/s"
    return [*lines, "", f"Measured here: {speed}, at a load of {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores."]


def tables(folder: Path) -> str:
    """cost.md without the demo."""
    for name, config in CONFIGS.items():
        config.save_pretrained(folder / name)
    lines, head = [], [f"| preset | {' | '.join(STAGES)} |", "|---" * (1 + len(STAGES)) + "|"]
    for machine, (card, count, launch, launch_sharded) in MACHINES.items():
        commands = {}
        lines += [f"## {machine}", "", *head]
        for preset, stage in product(CONFIGS, STAGES):
            if stage == "01":
                lines.append(f"| {preset} |")
            found, usual = fitting(folder, preset, stage, card, count), vars(parsed(folder, preset, stage)[1])
            if found is None:
                lines[-1] += " – |"
                continue
            given = {k: v for k, v in vars(found.options).items() if v != usual[k]}
            marks = [SHORT[k] + str(v) for k, v in given.items() if k in SHORT] + ["sharded"] * found.sharded
            lines[-1] += f" {', '.join([f'{hours(found):.2f} h', f'{found.peak() / 1e9:.0f} GB', *marks])} |"
            given = {"preset": preset, "engine": found.options.engine, **given}
            given |= {"guard": "Qwen/Qwen3Guard-Gen-0.6B"} if "guard" in given else {}
            given |= {"lora_rank": 16} if "LoRA" in stage else {}
            start = f"{launch_sharded if found.sharded else launch} {STAGES[stage][0]}.py"
            commands[stage] = f"{start} {' '.join(f'--{k} {v}' for k, v in given.items())} …"
        lines += ["", "The last that fits, stage by stage:", "", "```bash", *commands.values(), "```", ""]

    lines += ["## How cost grows, times qwen3-1.7b's hours on one 80 GB card", "", *head]
    growth = {f"{name} instead": (name, {}) for name in ("qwen3-4b", "qwen3-8b")}
    growth |= {"prompts, steps x 2": ("qwen3-1.7b", {"rows": 2}), "group 8 -> 16": ("qwen3-1.7b", None)}
    growth |= {f"responses x {k}": ("qwen3-1.7b", {"written": k * RESPONSE}) for k in (2, 8)}
    for what, (preset, changes) in growth.items():
        cells = []
        for stage in STAGES:
            group = {"01": {"n": 16}, "04": {"group_size": 16}}.get(stage[:2], {})
            more = plan(folder, preset, stage, **(group if changes is None else changes))
            cells.append(f"{hours(more) / hours(plan(folder, 'qwen3-1.7b', stage)):.1f}")
        lines.append(f"| {what} | {' | '.join(cells)} |")
    sampling, judging, training = (line[1] / 3600 for line in plan(folder, "qwen3-0.6b", "03").lines)
    grpo = hours(plan(folder, "qwen3-0.6b", "04"))
    lines += ["", "ThinkSafe's own on Qwen3-0.6B, GPU and lengths unknown to us: sampling 0.45 h, SFT 2.6, GRPO 21.3."]
    lines += [f"Here: sampling and guard {sampling + judging:.2f}, SFT {training:.2f}, 100 steps of GRPO {grpo:.2f}."]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", default="runs/demo", help="run folders of `make demo`, to check the formulas against")
    runs = ROOT / parser.parse_args().runs
    with tempfile.TemporaryDirectory() as folder:
        found = tables(Path(folder))
    text = f"""# What the stages cost

Predicted by the formulas of `--dry_run`, not measured; nothing here ran on a GPU. Assumed: {UTILISATION:.0%} of the
peak and {SHARE:.0%} of the bandwidth (H100: {H100.peak / 1e12:.0f} TFLOP/s in bfloat16, {H100.bandwidth / 1e12} TB/s;
RTX 4090: {RTX.peak / 1e12:.0f}, {RTX.bandwidth / 1e12}); prompts of 100 tokens, responses of {RESPONSE}, answers of
{ANSWER}, critiques of {CRITIQUE}; 3,000 prompts x 8 for 01, 6,000 rows for 02, 40,000 prompts for 03, 100 steps of
64 x 8 for 04, one model, 1,813 prompts and one judge for 05. The guard has 4 B weights (in 04 on 24 GB 0.6 B), the
judge 8 B; 02's expert is an endpoint.

Memory: weights in bfloat16; 16 bytes for each trained weight (float32, gradient, AdamW's two moments), 4 for each
frozen one in 04; with `--recompute`, which these presets set, the inputs of all layers and one layer of a micro-batch,
or of one response at its limit if that is longer; logits; the hf sampler's cache. vLLM takes 90 % of the card, in 04
half of it. Left out: buffers of FSDP, gaps of the allocator, saving.

Each cell: hours, GB of a card, and what must differ from the preset: m `--micro_batch_tokens`, b `--batch_tokens`,
where fewer than 16,384 and 131,072 fit or share a step out better; hf: that engine, not vLLM; sharded: FSDP by
fsdp.yaml. –: does not fit.

{found}
"""
    if runs.exists():
        text += "\n## Against the demo\n\n" + "\n".join(check(runs)) + "\n"
    out = ROOT / "results/bench/cost.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
