"""What stage 05 shows: results.md and three figures, from the rows of results.json."""

import json
import math
from pathlib import Path

from plumbing.process import processes
from plumbing.rows import write_atomic

TITLES = {
    "asr": "harmful prompts answered ↓",
    "compliance": "benign prompts answered ↑",
    "accuracy": "right answers ↑",
    "verify_f1": "verdicts right (F1) ↑",
    "self_check": "thinkings that check ↑",
}
COLORS = {"asr": "tab:red", "compliance": "tab:blue", "accuracy": "tab:green"}


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
    """(metric, benchmark) pairs of the table and the figure, in a fixed order."""
    pairs = []
    for row in leading(rows, judges):
        pair = (row["metric"], row["benchmark"])
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
    others hollow."""
    import matplotlib.pyplot as plt

    columns = panels(rows, judges)
    width = min(4, len(columns))
    height = math.ceil(len(columns) / width)
    size = (3.1 * width + 1.2, (0.36 * len(models) + 0.9) * height + 0.6)
    settings = {"sharey": True, "squeeze": False, "layout": "constrained"}
    figure, axes = plt.subplots(height, width, figsize=size, **settings)
    for axis, (metric, benchmark) in zip(axes.flat, columns):
        color = COLORS.get(metric, "tab:purple")
        for y, model in enumerate(models):
            for row in find(rows, model=model, metric=metric, benchmark=benchmark):
                draw_mark(axis, row, y, color, judges)
        axis.set(xlim=(-0.03, 1.03), yticks=range(len(models)), yticklabels=models)
        axis.set_title(f"{TITLES[metric]}\n{benchmark}", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    axes[0, 0].invert_yaxis()
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    handles = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            handles[label] = handle
    if handles:
        style = {"loc": "outside lower center", "ncols": len(handles), "fontsize": 8}
        figure.legend(handles.values(), handles.keys(), **style)
    figure.savefig(path, dpi=130)


def draw_mark(axis, row: dict, y: int, color: str, judges: list[str]):
    label = f"judge {row['judge']}" if row["judge"] in judges else None
    if row["judge"] in judges[1:]:
        shape = "sd^v"[(judges.index(row["judge"]) - 1) % 4]
        axis.plot(row["value"], y, shape, mfc="none", mec="gray", ms=5, label=label)
    else:
        axis.plot([row["low"], row["high"]], [y, y], color=color, lw=2, alpha=0.5)
        axis.plot(row["value"], y, "o", color=color, ms=7, label=label)


def draw_tradeoff(rows: list[dict], models: list[str], judges: list[str], path: Path):
    """Safety against over-refusal, means over benchmarks by the first judge; accuracy as colour."""
    import matplotlib.pyplot as plt

    def mean(model: str, metric: str) -> float | None:
        values = [r["value"] for r in find(leading(rows, judges), model=model, metric=metric)]
        return sum(values) / len(values) if values else None

    points = {}
    for model in models:
        compliance, asr = mean(model, "compliance"), mean(model, "asr")
        if compliance is not None and asr is not None:
            points[model] = (compliance, asr, mean(model, "accuracy"))
    if not points:
        return
    figure, axis = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for number, (model, (x, y, accuracy)) in enumerate(points.items()):
        color = "lightgray" if accuracy is None else plt.cm.viridis(accuracy)
        marker = "osD^vP*X"[number % 8]
        axis.scatter(x, y, s=90, marker=marker, color=color, edgecolors="black", label=model)
    left = min(0.8, *(x for x, _, _ in points.values())) - 0.02
    axis.set(xlabel=TITLES["compliance"], ylabel=TITLES["asr"])
    axis.set(xlim=(left, 1.02), ylim=(-0.03, 1.03))
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    colors = plt.cm.ScalarMappable(cmap="viridis")
    figure.colorbar(colors, ax=axis, label=TITLES["accuracy"])
    figure.savefig(path, dpi=130)


def draw_categories(categories: list[dict], models: list[str], judge: str, path: Path):
    """ASR by category."""
    import matplotlib.pyplot as plt

    values, counts = {}, {}
    for row in find(categories, metric="asr"):
        kind = f"{row['category']} ({row['benchmark']})"
        values[row["model"], kind] = row["value"]
        counts[kind] = row["n"]
    kinds = sorted(counts)
    if len(kinds) < 2:
        return
    shares = [[values.get((model, kind), 0) for model in models] for kind in kinds]
    size = (0.8 * len(models) + 3.5, 0.3 * len(kinds) + 1.6)
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    axis.imshow(shares, cmap="Reds", vmin=0, vmax=1, aspect="auto")
    style = {"ha": "center", "va": "center", "fontsize": 7}
    for y, line in enumerate(shares):
        for x, share in enumerate(line):
            color = "white" if share > 0.6 else "black"
            axis.text(x, y, f"{share:.2f}", color=color, **style)
    axis.set_xticks(range(len(models)), models, rotation=30, ha="right", fontsize=8)
    labels = [f"{kind}, n = {counts[kind]}" for kind in kinds]
    axis.set_yticks(range(len(kinds)), labels, fontsize=8)
    figure.suptitle(f"{TITLES['asr']}, by category, judge {judge}", fontsize=9)
    figure.savefig(path, dpi=130)
