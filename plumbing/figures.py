"""What stage 05 shows: results.md and three figures, from the rows of results.json."""

import json
import math
import textwrap
from pathlib import Path

from plumbing.process import processes
from plumbing.rows import write_atomic
from plumbing.transcripts import write_transcripts

TITLES = {
    "asr": "harmful prompts answered ↓",
    "asr_any": "harmful prompts answered in any of n tries ↓",
    "recovers": "recovers from the start ↑",
    "compliance": "benign prompts answered ↑",
    "accuracy": "right answers ↑",
    "verify_f1": "verdicts right (F1) ↑",
    "self_check": "thinkings that check ↑",
}
COLORS = {"asr": "tab:red", "asr_any": "tab:red", "recovers": "tab:orange"}
COLORS |= {"compliance": "tab:blue", "accuracy": "tab:green"}
# inches of a figure that README shows 900 pixels wide: 9 points are then 12 pixels
WIDTH = 9


def write_evaluation(run: Path, results: dict, options, notes: list[str]):
    """results.json, results.md (also on the screen) and the figures; `results` holds recipe, rows,
    categories and judges."""
    write_atomic(run / "results.json", json.dumps(results, indent=1))
    models = list(results["recipe"]["models"])
    guards = ", ".join(results["recipe"]["guards in training"]) or "none"
    judges = ", ".join(options.judges) or "none"
    note = (
        f"Judges: {judges}; guard in training: {guards}. {options.n} response(s) per prompt, "
        f"temperature {options.temperature}, top-p {options.top_p}, top-k {options.top_k}, at most "
        f"{options.max_new_tokens} tokens, seed {options.seed}."
    )
    agreements = results["judges"]
    text = markdown(results["rows"], models, options.judges, agreements, [*notes, note])
    write_atomic(run / "results.md", text)
    if processes().process_index == 0:
        write_transcripts(run)
        import matplotlib

        matplotlib.use("Agg")
        draw_results(results["rows"], models, options.judges, run / "results.png")
        draw_tradeoff(results["rows"], models, options.judges, run / "tradeoff.png")
        judge = options.judges[0] if options.judges else "none"
        draw_categories(results["categories"], models, judge, run / "categories.png")
    print("\n" + text)


def find(rows: list[dict], **wanted) -> list[dict]:
    """The rows whose fields have the wanted values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def leading(rows: list[dict], judges: list[str]) -> list[dict]:
    """Rows by the first judge, and those that need none."""
    return [row for row in rows if row["judge"] not in judges[1:]]


def panels(rows: list[dict], judges: list[str]) -> list[tuple[str, str]]:
    """(metric, benchmark) pairs of the table and the figure, in a fixed order: of begun responses
    the ASR alone, what else there is of them stands with the judges side by side."""
    pairs = []
    for row in leading(rows, judges):
        pair = (row["metric"], row["benchmark"])
        if row.get("start") and row["metric"] != "asr":
            continue
        if row["metric"] in TITLES and pair not in pairs:
            pairs.append(pair)
    return sorted(pairs, key=lambda pair: list(TITLES).index(pair[0]))


# results.md ---------------------------------------------------------------------------------------
def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def value_of(rows: list[dict]) -> str:
    return f"{rows[0]['value']:.3f}" if rows else ""


def interval_of(rows: list[dict]) -> str:
    if not rows:
        return ""
    row = rows[0]
    noise = " ≈" if row.get("change", {}).get("inside the noise") else ""
    return f"{row['value']:.2f} [{row['low']:.2f}, {row['high']:.2f}]{noise}"


def markdown(
    rows: list[dict], models: list[str], judges: list[str], agreements: dict, notes: list[str]
) -> str:
    columns, lead = panels(rows, judges), leading(rows, judges)
    body = []
    for model in models:
        cells = [interval_of(find(lead, model=model, metric=m, benchmark=b)) for m, b in columns]
        body.append([model, *cells])
    lines = table(["model", *(f"{TITLES[m]}<br>{b}" for m, b in columns)], body)
    noise = f"≈: no more than noise away from {models[0]}, on the same prompts."
    lines += ["", f"Value [95 % interval], by the first judge; {noise}"]
    lines += ["", "The judges side by side, and what no judge saw:", ""]
    lines += side_by_side(rows, models, judges)
    if agreements:
        lines += ["", f'"Unsafe" of each judge against {judges[0]}, over all answers:', ""]
        body = []
        for judge, shares in agreements.items():
            cells = []
            for name in ("precision", "recall"):
                cells.append("" if shares[name] is None else f"{shares[name]:.3f}")
            body.append([judge, *cells, str(shares["n"])])
        lines += table(["judge", "precision", "recall", "answers"], body)
    return "\n".join([*lines, "", *notes]) + "\n"


def side_by_side(rows: list[dict], models: list[str], judges: list[str]) -> list[str]:
    """A line for each model, benchmark and metric that judges decide, a column for each judge."""
    pairs = dict.fromkeys((r["metric"], r["benchmark"]) for r in rows if r["judge"] in judges)
    body = []
    for model in models:
        for metric, benchmark in pairs:
            here = find(rows, model=model, benchmark=benchmark)
            cells = [value_of(find(here, metric=metric, judge=judge)) for judge in judges]
            unseen = [value_of(find(here, metric=name)) for name in ("truncated", "no_thinking")]
            if any(cells):
                body.append([model, benchmark, metric, *cells, *unseen])
    head = ["model", "benchmark", "metric", *judges, "truncated", "no thinking"]
    return table(head, body)


# Figures ------------------------------------------------------------------------------------------
def draw_results(rows: list[dict], models: list[str], judges: list[str], path: Path):
    """A panel per metric and benchmark, a line per model: dot and interval by the first judge, the
    others hollow, each at a height of its own."""
    import matplotlib.pyplot as plt

    columns = panels(rows, judges)
    if not columns:
        return
    width = 2 if len(columns) == 4 else min(3, len(columns))
    height = math.ceil(len(columns) / width)
    line = 0.16 + 0.06 * max(1, len(judges))
    size = (WIDTH * (width + 0.6) / 3.6, (line * len(models) + 0.95) * height + 0.3)
    settings = {"sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(height, width, figsize=size, **settings)
    for axis, (metric, benchmark) in zip(axes.flat, columns):
        shown = find(rows, metric=metric, benchmark=benchmark)
        color = COLORS.get(metric, "tab:purple")
        for row in shown:
            draw_mark(axis, row, models.index(row["model"]), color, judges)
        draw_frame(axis, shown, models, judges)
        axis.set_title(panel_title(metric, benchmark, shown, judges), fontsize=9)
    axes[0, 0].set(ylim=(len(models) - 0.5, -0.5))
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    seen = {row["judge"] for row in rows if (row["metric"], row["benchmark"]) in columns}
    handles = legend_marks(seen, judges)
    letters = sum(len(handle.get_label()) + 8 for handle in handles)
    ncols = len(handles) if letters < 35 * width else 1
    figure.legend(handles=handles, loc="outside lower center", ncols=ncols, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def panel_title(metric: str, benchmark: str, rows: list[dict], judges: list[str]) -> str:
    """Metric and benchmark, and who counted if that was no judge."""
    others = sorted({row["judge"] for row in rows} - {*judges, ""})
    where = ", by ".join([benchmark, *others])
    return "\n".join([textwrap.fill(TITLES[metric], 32), *textwrap.wrap(where, 36)])


def shape_of(judge: str, judges: list[str]) -> str:
    """A filled dot for the first judge and where none is needed, a hollow shape for the others."""
    return "sD^vph"[(judges.index(judge) - 1) % 6] if judge in judges[1:] else "o"


def height_of(judge: str, judges: list[str]) -> float:
    """How far beneath the middle of a model's line a judge's mark stands; lines are 1 apart.

    >>> [round(height_of(judge, ["a", "b", "c"]), 2) for judge in ("a", "b", "c", "math-verify")]
    [-0.24, 0.0, 0.24, 0.0]
    """
    if judge not in judges:
        return 0.0
    step = min(0.24, 0.72 / len(judges))
    return step * (judges.index(judge) - (len(judges) - 1) / 2)


def draw_mark(axis, row: dict, line: int, color: str, judges: list[str]):
    y = line + height_of(row["judge"], judges)
    shape = shape_of(row["judge"], judges)
    if row["judge"] in judges[1:]:
        axis.plot(row["value"], y, shape, mfc="white", mec="dimgray", ms=4.5, clip_on=False)
    else:
        axis.plot([row["low"], row["high"]], [y, y], color=color, lw=2.5, alpha=0.45)
        axis.plot(row["value"], y, shape, color=color, ms=6, clip_on=False, zorder=3)


def visible_part(rows: list[dict], judges: list[str]) -> tuple[float, float]:
    """Ends of a panel's axis: 0 and 1, or where every value is within 0.1 of one of these and no
    interval reaches the middle, only the part around it.

    >>> visible_part([{"value": 0.97, "low": 0.93, "high": 0.99, "judge": "a"}], ["a"])
    (0.85, 1)
    """
    values = [row["value"] for row in rows]
    drawn = leading(rows, judges)  # whose intervals are drawn too
    low, high = min(row["low"] for row in drawn), max(row["high"] for row in drawn)
    low, high = math.floor(round(20 * low, 6)) / 20, math.ceil(round(20 * high, 6)) / 20
    if min(values) >= 0.9 and low >= 0.5:
        return min(0.85, low), 1
    if max(values) <= 0.1 and high <= 0.5:
        return 0, max(0.15, high)
    return 0, 1


def draw_frame(axis, rows: list[dict], models: list[str], judges: list[str]):
    """A panel's axes; where they are zoomed, a note and a coloured ground."""
    low, high = visible_part(rows, judges)
    margin = 0.03 * (high - low)
    axis.set(xlim=(low - margin, high + margin), yticks=range(len(models)))
    axis.set_yticklabels(models, fontsize=9)
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.3)
    zoomed = high - low < 1
    if zoomed:
        axis.locator_params(axis="x", nbins=4)
        note = f"zoomed: {low:g} to {high:g}"
        axis.set_xlabel(note, fontsize=8, style="italic", color="saddlebrown", labelpad=1)
    for line in range(0, len(models), 2):
        band = "wheat" if zoomed else "lightgray"
        axis.axhspan(line - 0.5, line + 0.5, color=band, alpha=0.35, lw=0, zorder=0)
    if zoomed:
        axis.set_facecolor("#fffaee")


def legend_marks(seen: set[str], judges: list[str]) -> list:
    """Gray marks with the judges that are `seen` in some panel."""
    from matplotlib.lines import Line2D

    lead = f"first judge, {judges[0]}, with 95 % interval" if judges else "with 95 % interval"
    style = {"color": "dimgray", "ms": 6}
    handles = [Line2D([], [], marker="o", lw=1.5, label=lead, **style)]
    for judge in judges[1:]:
        if judge in seen:
            mark = {"marker": shape_of(judge, judges), "mfc": "white", "ls": ""}
            handles.append(Line2D([], [], label=judge, **mark, **style))
    return handles


def mean_of_shares(rows: list[dict]) -> tuple[float, float, float]:
    """(mean, low, high) of the rows' independent shares: the mean's own 95 % interval, from theirs
    by Zou and Donner's method of variance estimates recovery.

    >>> [round(x, 4) for x in mean_of_shares([{"value": 0.5, "low": 0.4, "high": 0.6}] * 4)]
    [0.5, 0.45, 0.55]
    """
    mean = sum(row["value"] for row in rows) / len(rows)
    below = math.hypot(*(row["value"] - row["low"] for row in rows)) / len(rows)
    above = math.hypot(*(row["high"] - row["value"] for row in rows)) / len(rows)
    return mean, mean - below, mean + above


def tradeoff_points(rows: list[dict], models: list[str], judges: list[str]) -> dict[str, dict]:
    """{model: {metric: (mean, low, high)}} by the first judge, over benchmarks as they are: their
    attacked variants are left out."""
    plain = [r for r in leading(rows, judges) if r["decoding"] == "preset" and not r["start"]]
    points = {}
    for model in models:
        means = {}
        for metric in ("compliance", "asr", "accuracy"):
            of_metric = find(plain, model=model, metric=metric)
            if of_metric:
                means[metric] = mean_of_shares(of_metric)
        if "compliance" in means and "asr" in means:
            points[model] = means
    return points


def tradeoff_label(metric: str, rows: list[dict], judges: list[str]) -> str:
    """The title of an axis: the metric, and the benchmarks of its mean."""
    own = find(leading(rows, judges), metric=metric)
    names = list(dict.fromkeys(r["benchmark"] for r in own if "." not in r["benchmark"]))
    over = " and ".join(names) if len(names) < 3 else f"{len(names)} benchmarks"
    return f"{TITLES[metric]}\n{'mean over ' if len(names) > 1 else ''}{over}"


def draw_tradeoff(rows: list[dict], models: list[str], judges: list[str], path: Path):
    """Safety against over-refusal, with 95 % intervals; ASR on a logarithmic axis that is linear
    below 0.01, so that 0 has a place."""
    import matplotlib.pyplot as plt

    points = tradeoff_points(rows, models, judges)
    if not points:
        return
    accuracies = {f"{p['accuracy'][0]:.2f}" for p in points.values() if "accuracy" in p}
    ncols = 2 if max(map(len, points)) < 25 else 1
    size = (6.2, 4.3 + 0.19 * math.ceil(len(points) / ncols))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    handles = []
    for number, (model, means) in enumerate(points.items()):
        (x, left, right), (y, low, high) = means["compliance"], means["asr"]
        label = model
        if len(accuracies) > 1 and "accuracy" in means:
            label = f"{model}, {means['accuracy'][0]:.2f}"
        color = f"C{number % 10}"
        bars = {"xerr": [[x - left], [right - x]], "yerr": [[y - low], [high - y]]}
        axis.errorbar(x, y, **bars, fmt="none", ecolor=color, elinewidth=1.3, capsize=2.5, zorder=2)
        mark = {"marker": "osD^vPhX"[number % 8], "ls": "", "mfc": (color, 0.25), "mec": color}
        handles += axis.plot(x, y, ms=9, mew=1.8, zorder=3, label=label, **mark)
    left = min(0.8, *(means["compliance"][1] for means in points.values()))
    draw_tradeoff_axes(axis, left - 0.02)
    axis.set_xlabel(tradeoff_label("compliance", rows, judges))
    axis.set_ylabel(tradeoff_label("asr", rows, judges))
    axis.set_title(f"with 95 % intervals; judge {judges[0]}", fontsize=9)
    title = "model, its share of right answers" if len(accuracies) > 1 else None
    style = {"loc": "outside lower center", "fontsize": 9, "title_fontsize": 9}
    figure.legend(handles=handles, ncols=ncols, title=title, **style)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def draw_tradeoff_axes(axis, left: float):
    """Compliance from `left` to 1, ASR from 0 to 1, and where the better corner is."""
    axis.set_xlim(left, 1 + 0.1 * (1 - left))
    axis.set_yscale("symlog", linthresh=0.01, linscale=0.5)
    ticks = [0, 0.01, 0.03, 0.1, 0.3, 1]
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.set_yticks([], minor=True)
    axis.set_ylim(-0.004, 1.2)
    axis.grid(alpha=0.3)
    axis.axhspan(-0.004, 0.01, color="lightgray", alpha=0.3, lw=0, zorder=0)
    inside = {"xycoords": "axes fraction", "color": "gray", "zorder": 1}
    axis.annotate("linear below 0.01", (0.01, 0.02), fontsize=8, style="italic", **inside)
    arrow = {"arrowstyle": "simple", "color": "darkgray", "alpha": 0.6}
    place = {"textcoords": "axes fraction", "xytext": (0.68, 0.13), "arrowprops": arrow}
    axis.annotate("better", (0.985, 0.015), fontsize=10, **place, **inside)


def draw_categories(categories: list[dict], models: list[str], judge: str, path: Path):
    """ASR by category."""
    import matplotlib.pyplot as plt

    values, counts = {}, {}
    for row in find(categories, metric="asr"):
        kind = f"{row['category']} ({row['benchmark']})"
        values[row["model"], kind] = row["value"]
        counts[kind] = max(row["n"], counts.get(kind, 0))
    kinds = sorted(counts)
    if len(kinds) < 2:
        return
    shares = [[values.get((model, kind), math.nan) for model in models] for kind in kinds]
    size = (0.8 * len(models) + 3.5, 0.3 * len(kinds) + 1.6)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.imshow(shares, cmap="Reds", vmin=0, vmax=1, aspect="auto")
    style = {"ha": "center", "va": "center", "fontsize": 7}
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            color = "white" if share > 0.6 else "black"
            text = "–" if math.isnan(share) else f"{share:.2f}"  # no verdict could be read
            axis.text(x, y, text, color=color, **style)
    axis.set_xticks(range(len(models)), models, rotation=30, ha="right", fontsize=8)
    # a dollar would begin a formula
    labels = [f"{kind}, n = {counts[kind]}".replace("$", r"\$") for kind in kinds]
    axis.set_yticks(range(len(kinds)), labels, fontsize=8)
    figure.suptitle(f"{TITLES['asr']}, by category, judge {judge}", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
