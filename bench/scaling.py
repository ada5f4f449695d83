"""How time and memory grow: sampling and training over group size, length, vocabulary and model size.

    python bench/scaling.py                  # about six minutes on two idle cores
    python bench/scaling.py '{"work": "sample", "group": 8, ...}'      # one point, as the runs above start them

Every point is a process of its own, one thing differs along a curve, everything else is FIXED. Models are
bench/training.py's, thin. Sampling writes exactly `new` tokens a row (nothing ends a response), all rows in one batch;
training is one pass forward and back with LoRA over rows of `length` tokens, half of them labels. Each point is measured
twice, the faster counts. Memory is the largest resident size during the work beyond the size before it, model loaded.

A slope is that of log(cost) over log(size), by least squares over the upper half of a curve's points: 1 is linear.
AT_MOST says how steep it may be: attention looks from every token at every earlier one, so over length time may go
up to 2. Writes results/bench/scaling.{json,md,png}.
"""

import argparse
import json
import math
import random
import statistics
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from bench.clock import settings  # noqa: E402
from bench.speed import OUT, Bench  # noqa: E402
from bench.training import new_model, new_tokenizer  # noqa: E402
from common import Example, TokenScorer, add_lora, pad_batch  # noqa: E402
from engines import Sampling  # noqa: E402
from engines.hf import HfSampler  # noqa: E402
from plumbing import ALL_LINEAR  # noqa: E402

FIXED = {"prompts": 8, "prompt": 128, "group": 8, "new": 32, "rows": 4, "length": 512}
FIXED |= {"vocabulary": 1000, "hidden": 64, "layers": 2}
CURVES = {  # (work, what grows): its values, and what else is not as FIXED
    ("sample", "group"): ([1, 4, 16, 64, 256], {"prompt": 256}),
    ("sample", "new"): ([512, 1024, 2048, 4096, 8192], {"prompts": 1, "group": 4, "prompt": 8}),
    ("train", "length"): ([512, 1024, 2048, 4096, 8192], {"rows": 2}),
    ("sample", "vocabulary"): ([1_000, 8_000, 32_000, 128_000, 256_000], {"group": 16}),
    ("train", "vocabulary"): ([1_000, 8_000, 32_000, 128_000, 256_000], {}),
    ("sample", "hidden"): ([64, 128, 256, 512, 1024], {"layers": 4}),
    ("train", "hidden"): ([64, 128, 256, 512, 1024], {"layers": 4}),
}
AT_MOST = {"wall": 1.1, "memory": 1.1}
AT_MOST_OVER_LENGTH = {"wall": 2.0, "memory": 1.1}
NAMES = {"group": "samples a prompt", "new": "tokens a response", "length": "tokens a row"}
NAMES |= {"vocabulary": "vocabulary", "hidden": "weights of the layers"}
PANELS = [("group",), ("new", "length"), ("vocabulary",), ("hidden",)]


def resident(largest: bool) -> float:
    """This process's resident memory, MB: now, or the largest since `forget_peak`."""
    field = "VmHWM" if largest else "VmRSS"
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field)).split()[1]) / 1e3


def forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def sampling_work(wanted: dict, model):
    """A function that samples: `prompts` prompts of `prompt` tokens, `group` samples each."""
    tokenizer, draw = new_tokenizer(wanted["vocabulary"]), random.Random(0)
    sampler = HfSampler(model, tokenizer, 2**30)  # all rows in one batch
    sampler.eos = set()
    requests = [
        (str(i), [draw.randrange(2, wanted["vocabulary"]) for _ in range(wanted["prompt"])])
        for i in range(wanted["prompts"])
    ]
    return lambda: list(sampler.generate(requests, wanted["group"], Sampling(wanted["new"], 1.0)))


def training_work(wanted: dict, model):
    """A function that trains: `rows` rows of `length` tokens, the second half of each learnt."""
    add_lora(model, 16, 32.0, 0.0, ALL_LINEAR, 0)
    scorer, half, draw = TokenScorer(model), wanted["length"] // 2, random.Random(0)
    rows = [
        [draw.randrange(2, wanted["vocabulary"]) for _ in range(2 * half)]
        for _ in range(wanted["rows"])
    ]
    ids, mask = pad_batch([Example(row[:half], row[half:]) for row in rows])
    return lambda: (-scorer(ids, mask).log_probs.mean()).backward()


def point(wanted: dict) -> dict:
    """Seconds, MB beyond what was there before, and the numbers in the layers' matrices."""
    shape = {key: wanted[key] for key in ("hidden", "layers")}
    model = new_model(wanted["vocabulary"], context=16_384, **shape)
    weights = sum(p.numel() for p in model.model.layers.parameters())
    work = (sampling_work if wanted["work"] == "sample" else training_work)(wanted, model)
    before, walls = resident(largest=False), []
    forget_peak()
    for _ in range(2):
        began = time.perf_counter()
        work()
        walls.append(time.perf_counter() - began)
    return {"wall": min(walls), "memory": resident(largest=True) - before, "weights": weights}


def slope(sizes: list[float], costs: list[float]) -> float:
    """Of log(cost) over log(size), by least squares over the upper half of the points, the middle one included.

    >>> round(slope([1, 2, 4, 8, 16], [9, 9, 1, 4, 16]), 6)
    2.0
    """
    half = len(sizes) // 2
    x, y = ([math.log(value) for value in values[half:]] for values in (sizes, costs))
    return statistics.linear_regression(x, y).slope


def measure(curves: dict, threads: int) -> dict[str, list[dict]]:
    """A row of points for each curve, one process after another."""
    bench, found = Bench(threads, repeats=1), {}
    for (work, what), (values, more) in curves.items():
        rows = found[f"{work} {what}"] = []
        for value in values:
            wanted = {**FIXED, **more, "work": work, what: value}
            one = bench.process("scaling", wanted)
            rows.append({"size": one["weights"] if what == "hidden" else value, **one})
            print(f"{work} over {NAMES[what]}: {rows[-1]}", flush=True)
    return found


def slopes_of(found: dict) -> list[dict]:
    """One row for each curve and cost."""
    rows = []
    for name, points in found.items():
        what = name.split()[1]
        bounds = AT_MOST_OVER_LENGTH if what in ("new", "length") else AT_MOST
        sizes = [one["size"] for one in points]
        for cost, bound in bounds.items():
            found_slope = slope(sizes, [one[cost] for one in points])
            rows.append({"curve": name, "cost": cost, "slope": found_slope, "at most": bound})
    return rows


def table(found: dict, threads: int) -> str:
    lines = [
        "# How cost grows",
        "",
        f"{threads} CPU threads, float32, torch {torch.__version__}; one thing at a time.",
        "",
    ]
    lines += [
        "| | over | from | to | time | memory | slope of time | slope of memory |",
        "|" + "---|" * 8,
    ]
    slopes = {(row["curve"], row["cost"]): row for row in slopes_of(found)}
    for name, points in found.items():
        work, what = name.split()
        first, last = points[0], points[-1]
        cells = [f"{first['size']:,}", f"{last['size']:,}"]
        cells.append(f"{first['wall']:.2f} → {last['wall']:.2f} s")
        cells.append(f"{first['memory']:.0f} → {last['memory']:.0f} MB")
        for cost in ("wall", "memory"):
            row = slopes[name, cost]
            steep = ", **steeper than it should be**" if row["slope"] > row["at most"] else ""
            cells.append(f"{row['slope']:.2f} (at most {row['at most']:g}){steep}")
        lines.append(
            f"| {'sampling' if work == 'sample' else 'training'} | {NAMES[what]} | {' | '.join(cells)} |"
        )
    return "\n".join([*lines, ""])


def short(number: int) -> str:
    """
    >>> short(512), short(32_000), short(2_884_096)
    ('512', '32k', '2.9M')
    """
    if number < 1000:
        return str(number)
    return f"{number / 1e3:.0f}k" if number < 1e6 else f"{number / 1e6:.1f}M"


def draw(found: dict, path: Path):
    """Time above, memory below, a column for each thing that grows; both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    slopes = {(row["curve"], row["cost"]): row["slope"] for row in slopes_of(found)}
    figure, axes = plt.subplots(
        2, len(PANELS), figsize=(13, 6), layout="constrained", squeeze=False
    )
    for column, whats in enumerate(PANELS):
        for name, points in found.items():
            work, what = name.split()
            if what not in whats:
                continue
            for axis, cost in zip(axes[:, column], AT_MOST):
                label = f"{'sampling' if work == 'sample' else 'training'}, slope {slopes[name, cost]:.2f}"
                color = "C0" if work == "sample" else "C1"
                axis.plot(
                    *zip(*((p["size"], p[cost]) for p in points)), "o-", color=color, label=label
                )
        for axis, label in zip(axes[:, column], ("seconds", "MB beyond the model")):
            axis.set(
                xscale="log",
                yscale="log",
                ylabel=label,
                xlabel=" / ".join(NAMES[what] for what in whats),
            )
            ticks = list(axis.lines[-1].get_xdata())
            axis.set_xticks(ticks, [short(tick) for tick in ticks])
            axis.set_xticks([], minor=True)
            axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        return print(json.dumps(point(settings())))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    found = measure(CURVES, options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    about = {
        "threads": options.threads,
        "fixed": FIXED,
        "slopes": slopes_of(found),
        "points": found,
    }
    (options.out / "scaling.json").write_text(json.dumps(about, indent=1) + "\n")
    (options.out / "scaling.md").write_text(table(found, options.threads))
    draw(found, options.out / "scaling.png")
    print(table(found, options.threads))


if __name__ == "__main__":
    main()
