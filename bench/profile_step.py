"""Where the seconds of a training step go, and how near each part comes to the machine's peak.

    python bench/profile_step.py             # a minute on two idle cores; results/bench/profile.{json,md}

Stage 02's own `train` on bench/training.py's model and its examples of spread lengths, under torch's profiler, which
slows it down a little: both walls are shown. A matrix product belongs to the head if one of its sides is the vocabulary,
to LoRA if one is the rank, else to the frozen weights. Seconds are an operation's own, its callees' left out; what the
operations do not cover is Python's. Attention's operations are counted without the masked half.
"""

import argparse
import importlib
import json
import math
import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import training  # noqa: E402
from common import Trainer, load_tokenizer  # noqa: E402

OUT, RANK = ROOT / "results/bench", 16
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
OPTIMIZER = "clipping and optimizer"
SOFTMAX = "softmax and log-probs over the vocabulary"
GROUPS = ["frozen weights", "LoRA", "head", "attention", SOFTMAX, OPTIMIZER, "rest"]


def group_of(name: str, shapes: list[list[int]], parents: list[str]) -> str:
    """The group of an operation.

    >>> group_of("aten::mm", [[100, 384], [384, 16]], []), group_of("aten::mul", [[9, 32_000]], [])
    ('LoRA', 'softmax and log-probs over the vocabulary')
    """
    sides = {side for shape in shapes for side in shape}
    if OPTIMIZER in [name, *parents]:
        return OPTIMIZER
    if any("attention" in one for one in [name, *parents]):
        return "attention"
    if name in PRODUCTS:
        if training.VOCABULARY in sides:
            return "head"
        return "LoRA" if RANK in sides else "frozen weights"
    return SOFTMAX if training.VOCABULARY in sides else "rest"


def operations(name: str, shapes: list[list[int]]) -> int:
    """Multiplications and additions of a matrix product, or of attention and of its gradient (5 products, not 2).

    >>> operations("aten::mm", [[3, 4], [4, 5]])
    120
    """
    if name in PRODUCTS:
        a, b = [shape for shape in shapes if len(shape) > 1][-2:]
        return 2 * math.prod(a) * b[-1]
    if "flash_attention" in name:
        backward = "backward" in name
        rows, heads, length, width = shapes[1 if backward else 0]
        return (10 if backward else 4) * rows * heads * width * length * length // 2
    return 0


def ancestors(event) -> list[str]:
    names, event = [], event.cpu_parent
    while event:
        names.append(event.name)
        event = event.cpu_parent
    return names


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def train(folder: Path, steps: int, profiler=None) -> dict:
    """Wall and CPU seconds and page faults of all steps but the first; the profiler looks on at those."""
    stage, ends, take_step = importlib.import_module("02_verify_sft"), [], Trainer.step
    examples = training.sft_examples(steps * training.SFT_BATCH, True)

    def watched_step(trainer):
        with torch.profiler.record_function(OPTIMIZER):
            norm = take_step(trainer)
        if profiler and len(ends) == steps - 1:
            profiler.stop()
        ends.append((time.perf_counter(), time.process_time(), page_faults()))
        if profiler and len(ends) == 1:
            profiler.start()
        return norm

    with tempfile.TemporaryDirectory() as run, mock.patch.object(Trainer, "step", watched_step):
        options = stage.Options(model=str(folder), epochs=1, learning_rate=training.RATE)
        stage.train(options, Path(run), examples, load_tokenizer(str(folder)))
    wall, cpu, faults = (after - before for before, after in zip(ends[0], ends[-1]))
    flops = sum(map(training.needed_flops, training.in_batches(examples)[1:]))
    return {"wall": wall, "cpu": cpu, "page faults": faults, "needed gflop": flops / 1e9}


def grouped(events) -> tuple[dict, dict]:
    """Seconds and operations by group, and the seconds of the group "rest" by operation."""
    groups = {name: {"seconds": 0.0, "gflop": 0.0} for name in GROUPS}
    rest = defaultdict(float)
    for event in events:
        shapes = [shape for shape in event.input_shapes if shape]
        group = group_of(event.name, shapes, ancestors(event))
        seconds = event.self_cpu_time_total / 1e6
        groups[group]["seconds"] += seconds
        groups[group]["gflop"] += operations(event.name, shapes) / 1e9
        if group == "rest":
            rest[event.name] += seconds
    return groups, dict(sorted(rest.items(), key=lambda item: -item[1]))


def table(plain: dict, profiled: dict, groups: dict, rest: dict, peak: float) -> str:
    """Markdown; shares of seconds are of the profiled wall, `peak` in GFLOP/s."""
    wall = profiled["wall"]
    about = f"Torch {torch.__version__}, {torch.get_num_threads()} threads"
    lines = [
        "# Where a training step's seconds go",
        "",
        f"{about}, torch.mm at {peak:.0f} GFLOP/s.",
    ]
    lines += [
        "",
        "## Whole",
        "",
        "| | wall s | CPU s | page faults | needed GFLOP | share of the peak |",
    ]
    lines += ["|" + "---|" * 6]
    for name, one in (("as it is", plain), ("under the profiler", profiled)):
        share = one["needed gflop"] / one["wall"] / peak
        cells = [f"{one['wall']:.2f}", f"{one['cpu']:.2f}", f"{one['page faults']:,}"]
        cells += [f"{one['needed gflop']:.0f}", f"{share:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += [
        "",
        "## Parts",
        "",
        "| part | seconds | share | GFLOP | of the peak |",
        "|" + "---|" * 5,
    ]
    for name, one in groups.items():
        speed = "– | –"
        if one["gflop"]:
            speed = f"{one['gflop']:.0f} | {one['gflop'] / one['seconds'] / peak:.2f}"
        lines.append(f"| {name} | {one['seconds']:.2f} | {one['seconds'] / wall:.2f} | {speed} |")
    python = wall - sum(one["seconds"] for one in groups.values())
    lines.append(f"| Python and the profiler | {python:.2f} | {python / wall:.2f} | – | – |")
    lines += ["", "## The rest", "", "| operation | seconds | share |", "|" + "---|" * 3]
    for name, seconds in list(rest.items())[:12]:
        lines.append(f"| `{name}` | {seconds:.2f} | {seconds / wall:.2f} |")
    return "\n".join([*lines, ""])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=4, help="optimizer steps, the first not counted"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        training.make(Path(folder))
        peak = training.matrix_peak()["gflops"]
        plain = train(Path(folder), options.steps)
        profiler = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
        )
        profiled = train(Path(folder), options.steps, profiler)
    groups, rest = grouped(profiler.events())
    found = {"peak": peak, "plain": plain, "profiled": profiled, "groups": groups, "rest": rest}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "profile.json").write_text(json.dumps(found, indent=1) + "\n")
    text = table(plain, profiled, groups, rest, peak)
    (options.out / "profile.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
