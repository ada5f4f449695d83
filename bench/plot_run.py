"""Curves of training runs, of stage 04 or of stages 02 and 03, from metrics.jsonl and eval.jsonl.

    python bench/plot_run.py runs/demo/04_grpo_base                       # writes curves.png there
    python bench/plot_run.py runs/a runs/b runs/c --out compared.png      # one over the other

A panel for each column that has a value, and one line for those that are 0 at every step; of a long run, thin lines are single steps and thick ones the mean over the
steps around them. Held-out scores are dots, one for each check. A run that is still going on can be drawn too.
"""

import argparse
import math
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plumbing import KINDS, fail, run_stage  # noqa: E402
from plumbing.rows import json_lines  # noqa: E402

COLUMNS = {  # in metrics.jsonl -> title of its panel
    "reward": "reward ↑",
    **{f"reward_{kind}": f"reward, {kind} ↑" for kind in KINDS},
    "loss": "loss",
    "kl": "KL to the start",
    "entropy": "entropy (nats a token)",
    "clipped": "tokens clipped",
    "zero_spread_groups": "groups without spread",
    "response_tokens": "response length (tokens)",
    "truncated": "responses cut",
    "unparsed": "responses without reward",
    "gradient_norm": "gradient norm",
    "sampler_gap": "gap of sampler and trainer",
}
WIDTH = 9  # inches: at 900 pixels, letters of 8 points are 11 pixels high


def whole_rows(path: Path) -> list[dict]:
    """Rows in the order of their steps, [] if there is no such file; a last line without its end, of a run that is
    writing it just now, is left out."""
    if not path.exists():
        return []
    data = path.read_bytes()
    rows = json_lines(data[: data.rfind(b"\n") + 1].decode("utf-8", "replace"), str(path))
    if any("step" not in row for row in rows):
        fail(f"{path}: rows without a step; that is no file of stage 02, 03 or 04")
    return sorted(rows, key=lambda row: row["step"])


def curves_of(run: Path) -> dict[str, list[tuple[float, float]]]:
    """{title: [(step, value), ...]} of one run; null and what is not finite is left out, and a column or a KL without
    any other value with it."""
    metrics = whole_rows(run / "metrics.jsonl")
    if not metrics:
        fail(f"{run}: no metrics.jsonl with steps; give the run folder of stage 02, 03 or 04")
    columns = [(title, name, metrics) for name, title in COLUMNS.items()]
    checks = whole_rows(run / "eval.jsonl")
    names = dict.fromkeys(name for row in checks for name in row if name != "step")
    columns += [(f"held out: {name}", name, checks) for name in names]
    curves = {}
    for title, name, rows in columns:
        points = [(row["step"], row[name]) for row in rows if is_number(row.get(name))]
        if points and not (name == "kl" and not any(value for _, value in points)):
            curves[title] = points
    return curves


def is_number(value) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def smoothed(values: list[float], window: int) -> list[float]:
    """Means over `window` values around each, fewer at both ends.

    >>> smoothed([0, 3, 0, 3], 3)
    [1.5, 1.0, 2.0, 1.5]
    """
    means, half = [], window // 2
    for i in range(len(values)):
        near = values[max(0, i - half) : i + half + 1]
        means.append(sum(near) / len(near))
    return means


def titles_of(runs: dict[str, dict[str, list]]) -> tuple[list[str], list[str]]:
    """(titles of panels, in COLUMNS' order, then what was held out; titles of those that are 0 at every step)."""
    every = [*COLUMNS.values(), *dict.fromkeys(t for curves in runs.values() for t in curves)]
    panels, zeros = [], []
    for title in dict.fromkeys(every):
        values = [value for curves in runs.values() for _, value in curves.get(title, [])]
        if values:
            (panels if any(values) else zeros).append(title)
    return panels, zeros


def draw(runs: dict[str, dict[str, list]], out: Path):
    """`runs`: {name: its curves}. A panel per title, a colour per run; what is always 0 is one line of words."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles, zeros = titles_of(runs)
    if not titles:
        fail(f"{', '.join(runs)}: no column with a value other than 0; nothing to draw")
    width = min(3, len(titles))
    height = math.ceil(len(titles) / width)
    size = (WIDTH * width / 3, 1.75 * height + 0.6)
    figure, axes = plt.subplots(height, width, figsize=size, squeeze=False, layout="constrained")
    for axis, title in zip(axes.flat, titles):
        for number, (name, curves) in enumerate(runs.items()):
            if title in curves:
                draw_curve(axis, curves[title], f"C{number % 10}", name, title.startswith("held"))
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    for column in range(width):
        lowest = [axis for axis in axes[:, column] if axis.get_visible()][-1]
        lowest.set_xlabel("step", fontsize=8)
    handles = {}
    for axis in axes.flat:
        for handle, name in zip(*axis.get_legend_handles_labels()):
            handles.setdefault(name, handle)
    ncols = max(1, 100 // (max(map(len, handles)) + 8))
    style = {"loc": "outside lower center", "ncols": min(ncols, len(handles)), "fontsize": 9}
    note = textwrap.fill(f"0 at every step: {', '.join(zeros)}", 32 * width) if zeros else None
    figure.legend(handles.values(), handles.keys(), title=note, title_fontsize=8, **style)
    figure.savefig(out, dpi=130)
    plt.close(figure)


def draw_curve(axis, points: list[tuple[float, float]], color: str, name: str, checks: bool):
    steps, values = zip(*points)
    if checks or len(points) < 20:
        axis.plot(steps, values, "o-" if checks else "-", color=color, ms=4, lw=1.5, label=name)
        return
    axis.plot(steps, values, color=color, lw=0.7, alpha=0.35)
    window = 2 * (len(points) // 20) + 1
    axis.plot(steps, smoothed(values, window), color=color, lw=1.8, label=name)


def names_of(folders: list[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart.

    >>> names_of([Path("a/seed0/base"), Path("a/seed1/base")]), names_of([Path("runs/04_grpo")])
    (['seed0/base', 'seed1/base'], ['04_grpo'])
    """
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-length:]) for own in parts]
        if len(set(names)) == len(names):
            break
    return names


def main(arguments: list[str] | None = None):
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser(description=__doc__, **style)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="default: curves.png in the first folder")
    options = parser.parse_args(arguments)
    if len({run.resolve() for run in options.runs}) < len(options.runs):
        fail("the same run folder twice; name it once")
    curves = [curves_of(run) for run in options.runs]
    out = options.out or options.runs[0] / "curves.png"
    if out.suffix.lower() not in (".png", ".pdf", ".svg"):
        fail(f"--out {out}: a figure ends in .png, .pdf or .svg")
    if not out.parent.is_dir():
        fail(f"--out {out}: no folder {out.parent}")
    draw(dict(zip(names_of(options.runs), curves)), out)
    print(f"written: {out}")


if __name__ == "__main__":
    run_stage(main)
