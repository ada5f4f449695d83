"""The figures, read back from matplotlib: what is drawn where, nothing hidden, clipped or too small to read."""

import json
import re
import shutil
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from conftest import ROOT  # noqa: E402

from plumbing import figures  # noqa: E402

sys.path.insert(0, str(ROOT / "bench"))
import curves  # noqa: E402
import plot_run  # noqa: E402

JUDGES = ["first", "second:x/y", "third", "fourth:a/long-name-of-a-judge@http://host:8000/v1"]
MODELS = [f"Qwen3-4B+Method-{letter}+GRPO" for letter in "ABCDEFGH"]


def wilson(share, n, z=1.959964):
    """Ends of the shares p that a score test does not refuse: (share - p)² = z² p (1 - p) / n."""
    return sorted(np.roots([1 + z**2 / n, -2 * share - z**2 / n, share**2]).real)


def row(metric, benchmark, value, judge="first", model="a", n=200, decoding="preset", start=""):
    low, high = np.clip(wilson(round(value * n) / n, n), 0, 1)
    return {
        **{"metric": metric, "benchmark": benchmark, "judge": judge, "model": model},
        **{"decoding": decoding, "start": start},
        **{"value": round(value * n) / n, "low": low, "high": high, "n": n},
    }


def drawn(draw, *args):
    """The figure that a function saves and closes."""
    kept, close = [], plt.close
    plt.close = kept.append
    try:
        draw(*args)
    finally:
        plt.close = close
    [figure] = kept
    figure.canvas.draw()
    return figure


def panel(figure, title):
    [axis] = [axis for axis in figure.axes if axis.get_visible() and axis.get_title().replace("\n", " ") == title]
    return axis


def marks(axis):
    """[(x, y, shape)] of the single marks on a panel."""
    lines = [line for line in axis.get_lines() if len(line.get_xdata()) == 1 and line.get_marker() in list("osD^vphPX")]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0]), line.get_marker()) for line in lines]


def crowded():
    """12 panels, 8 models, 4 judges; every value alike, where marks would hide one another."""
    panels = [("asr", "strongreject"), ("asr", "harmbench"), ("asr", "wildjailbreak"), ("asr", "fortress")]
    panels += [("asr_any", "strongreject.think-open"), ("recovers", "strongreject.think-open")]
    panels += [("compliance", "xstest"), ("compliance", "fortress_benign")]
    rows = [row(*pair, 0.5, judge, model) for pair in panels for judge in JUDGES for model in MODELS]
    others = [("accuracy", "math500", "math-verify"), ("accuracy", "gsm8k", "math-verify")]
    others += [("verify_f1", "verify", "stage 02 labels"), ("self_check", "strongreject", "self-checker")]
    return rows + [row(m, b, 0.97, judge, model) for m, b, judge in others for model in MODELS]


def assert_readable(figure):
    """At 900 pixels: letters of 10 and more, no text over another or over the edge."""
    scale = 900 / (figure.get_size_inches()[0] * 72)
    renderer, boxes = figure.canvas.get_renderer(), []
    for axis in [axis for axis in figure.axes if axis.get_visible()]:
        outer = axis.get_subplotspec().is_first_col() or not axis.get_shared_y_axes().get_siblings(axis)[1:]
        ticks = []
        for way, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
            low, high = sorted((low, high))
            if way is axis.xaxis or outer:
                ticks += [t for t, x in zip(way.get_ticklabels(), way.get_ticklocs()) if low <= x <= high]
        texts = [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts, *ticks]
        boxes += [(t.get_text(), t) for t in texts if t.get_text() and t.get_visible()]
    boxes += [(t.get_text(), t) for t in figure.legends[0].get_texts()]
    sizes = {text: t.get_fontsize() * scale for text, t in boxes}
    assert min(sizes.values()) >= 10, sizes
    boxes = [(text, t.get_window_extent(renderer)) for text, t in boxes]
    edge = figure.bbox
    for text, box in boxes:
        assert box.x0 >= edge.x0 - 1 and box.x1 <= edge.x1 + 1 and box.y0 >= edge.y0 - 1 and box.y1 <= edge.y1 + 1, text
    for number, (text, box) in enumerate(boxes):
        for other, second in boxes[:number]:
            assert not box.shrunk(0.9, 0.8).overlaps(second.shrunk(0.9, 0.8)), (text, other)


def test_twelve_panels_of_eight_models_can_be_read(tmp_path):
    figure = drawn(figures.draw_results, crowded(), MODELS, JUDGES, tmp_path / "results.png")
    assert sum(axis.get_visible() for axis in figure.axes) == 12 and (tmp_path / "results.png").stat().st_size > 50_000
    assert_readable(figure)
    titles = [axis.get_title() for axis in figure.axes]
    assert "right answers ↑\nmath500, by math-verify" in titles  # who counted, where no judge did
    kinds = [next(m for m, t in figures.TITLES.items() if title.replace("\n", " ").startswith(t)) for title in titles]
    order = ["asr"] * 4 + ["asr_any", "recovers"] + ["compliance"] * 2 + ["accuracy"] * 2 + ["verify_f1", "self_check"]
    assert kinds == order


def test_no_mark_hides_another(tmp_path):
    figure = drawn(figures.draw_results, crowded(), MODELS, JUDGES, tmp_path / "results.png")
    axis = panel(figure, "benign prompts answered ↑ xstest")
    shown = marks(axis)
    assert len(shown) == 32 and {x for x, _, _ in shown} == {0.5}
    pixels = axis.transData.transform([(x, y) for x, y, _ in shown]) * 72 / figure.dpi  # points
    heights = sorted(pixels[:, 1])
    assert min(np.diff(heights)) >= 3.5  # marks are 4.5 and 6 points wide: at most their edges touch
    assert [round(y) for _, y, shape in shown if shape == "o"] == list(range(8))  # each on its model's line
    for _, y, shape in shown:
        assert abs(y - round(y)) < 0.5
    assert len({shape for _, _, shape in shown}) == 4


def test_legend_is_gray_and_names_the_judges_that_are_seen(tmp_path):
    rows = [row("asr", "x", 0.4, judge) for judge in ("first", "third")] + [row("refusal", "x", 0.4, JUDGES[1])]
    figure = drawn(figures.draw_results, rows, ["a"], JUDGES, tmp_path / "results.png")
    [legend] = figure.legends
    texts = [text.get_text() for text in legend.get_texts()]
    assert texts == ["first judge, first, with 95 % interval", "third"]
    assert {handle.get_color() for handle in legend.legend_handles} == {"dimgray"}
    [mark] = [m for m in marks(panel(figure, "harmful prompts answered ↓ x")) if m[2] != "o"]
    assert legend.legend_handles[1].get_marker() == mark[2]


@pytest.mark.parametrize("values, n, expected", [
    ([1, 0.97, 0.9], 200, (0.85, 1)),
    ([1, 0.97, 0.89], 200, (0, 1)),
    ([1, 0.97, 0.9], 30, (0.7, 1)),  # the interval of 0.9 starts at 0.74
    ([0.9], 5, (0, 1)),  # 1 of 5 wrong: the interval is half the axis
    ([0, 0.03], 200, (0, 0.15)),
    ([0, 0.1], 100, (0, 0.2)),  # the interval of 0.1 ends at 0.17
    ([0, 0.11], 200, (0, 1)),
    ([0, 1], 200, (0, 1)),
])  # fmt: skip
def test_panels_at_an_end_are_zoomed_and_say_so(values, n, expected, tmp_path):
    models = [f"m{i}" for i in range(len(values))]
    rows = [row("asr", "x", value, model=model, n=n) for value, model in zip(values, models)]
    figure = drawn(figures.draw_results, rows, models, ["first"], tmp_path / "results.png")
    axis = panel(figure, "harmful prompts answered ↓ x")
    (low, high), (left, right) = expected, axis.get_xlim()
    assert left == pytest.approx(low, abs=0.031) and right == pytest.approx(high, abs=0.031)
    for line in axis.get_lines():  # nothing is cut off
        assert left <= min(line.get_xdata()) and max(line.get_xdata()) <= right
    note = axis.get_xlabel()
    assert note == ("" if expected == (0, 1) else f"zoomed: {low:g} to {high:g}")
    if note:
        assert axis.get_facecolor() != (1, 1, 1, 1)


def test_another_judge_far_away_keeps_the_whole_axis(tmp_path):
    rows = [row("asr", "x", 0.0), row("asr", "x", 0.6, "third")]
    figure = drawn(figures.draw_results, rows, ["a"], JUDGES, tmp_path / "results.png")
    assert figure.axes[0].get_xlabel() == "" and figure.axes[0].get_xlim()[1] > 1


def test_interval_of_a_mean_covers_in_19_of_20_draws():
    rng, shares, sizes = np.random.default_rng(0), [0.02, 0.1, 0.3], [200, 100, 150]
    covered, wider = [], []
    for _ in range(1000):
        values = [rng.binomial(n, p) / n for n, p in zip(sizes, shares)]
        rows = [row("asr", "x", value, n=n) for value, n in zip(values, sizes)]
        mean, low, high = figures.mean_of_shares(rows)
        assert mean == pytest.approx(np.mean(values)) and low <= mean <= high
        covered.append(low <= np.mean(shares) <= high)
        wider.append((high - low) / np.mean([r["high"] - r["low"] for r in rows]))
    assert 0.93 <= np.mean(covered) <= 0.975 and max(wider) < 0.8  # narrower than the mean of the intervals


def tradeoff_rows():
    rows = []
    for model, asr, compliance, accuracy in (("a", 0.8, 1, 0.9), ("b", 0, 0.95, 0.9), ("c", 0.02, 0.7, 0.9)):
        rows += [row("asr", "plain", asr, model=model), row("asr", "hard", asr, model=model)]
        rows += [row("compliance", "plain", compliance, model=model)]
        rows += [row("accuracy", "sums", accuracy, "math-verify", model)]
    return rows


def test_tradeoff_shows_zero_intervals_and_the_better_corner(tmp_path):
    figure = drawn(figures.draw_tradeoff, tradeoff_rows(), ["a", "b", "c"], ["first"], tmp_path / "tradeoff.png")
    [axis] = figure.axes  # no colour bar
    assert [(x, y) for x, y, _ in marks(axis)] == [(1, pytest.approx(0.8)), (0.95, 0), (0.7, 0.02)]
    heights = axis.transData.transform([(1, y) for y in (0, 0.01, 0.1, 1)])[:, 1]
    assert axis.bbox.y0 + 5 < heights[0] < heights[1]  # 0 stands on the axis, off its edge
    assert heights[3] - heights[2] == pytest.approx(heights[2] - heights[1])  # decades are as long as each other
    assert [t.get_text() for t in axis.get_yticklabels()] == ["0", "0.01", "0.03", "0.1", "0.3", "1"]
    bars = [segment for bar in axis.collections for segment in bar.get_segments()]
    assert len(bars) == 6
    spans = {tuple(np.round(np.ptp(bar, axis=0), 3)) for bar in bars}
    low, high = wilson(0.95, 200)
    assert (round(high - low, 3), 0.0) in spans  # one benchmark: Wilson's own
    [better] = [text for text in axis.texts if text.get_text() == "better"]
    (x, y), (tail_x, tail_y) = better.xy, better.get_position()
    assert x > 0.95 and y < 0.05 and tail_x < x and tail_y > y and better.arrow_patch
    assert axis.get_ylabel() == "harmful prompts answered ↓\nmean over plain and hard"
    assert axis.get_xlabel() == "benign prompts answered ↑\nplain"
    assert "95 % intervals" in axis.get_title()
    assert_readable(figure)


def test_tradeoff_gives_accuracy_only_where_it_differs(tmp_path):
    for accuracy, expected in ((0.9, ["a", "b", "c"]), (0.6, ["a, 0.90", "b, 0.90", "c, 0.60"])):
        rows = tradeoff_rows()
        rows[-1]["value"] = accuracy
        figure = drawn(figures.draw_tradeoff, rows, ["a", "b", "c"], ["first"], tmp_path / "tradeoff.png")
        [legend] = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == expected
        assert ("right answers" in legend.get_title().get_text()) is (accuracy == 0.6)


def test_tradeoff_leaves_attacked_variants_out():
    rows = tradeoff_rows()
    before = figures.tradeoff_points(rows, ["a", "b", "c"], JUDGES)
    rows += [row("asr", "plain.think-open", 1.0, model="b", start="think-open")]
    rows += [row("compliance", "plain.uncut", 0.1, model="b", decoding="uncut")]
    rows += [row("asr", "plain", 1.0, "third", "b")]  # nor another judge's
    assert figures.tradeoff_points(rows, ["a", "b", "c"], JUDGES) == before
    assert before["b"]["asr"][0] == 0 and figures.tradeoff_label("asr", rows, JUDGES).endswith("plain and hard")


def test_tables_and_figures_have_the_same_columns():
    columns = figures.panels(crowded(), JUDGES)
    head = figures.markdown(crowded(), MODELS, JUDGES, {}, []).splitlines()[0]
    assert len(columns) == 12 and re.findall(r"<br>([\w.-]+)", head) == [benchmark for _, benchmark in columns]


# bench/curves.py ------------------------------------------------------------------------------------------------------
def committed_curves():
    return json.loads((ROOT / "results/claims/grpo.json").read_text())["curves"]


def drawn_curves(found, path):
    figure = drawn(curves.figure, found, path)
    return figure, {axis.get_title().split("\n")[0]: axis for axis in figure.axes}


def test_learning_curves_mark_where_the_base_start_is_as_safe(tmp_path):
    found = committed_curves()
    figure, panels = drawn_curves(found, tmp_path / "grpo.png")
    assert_readable(figure)
    assert list(panels) == [*curves.METRICS.values(), "guard's reward ↑"]
    for metric in ("asr test_plain", "asr test_wrapped"):
        goal = np.mean(found["ThinkSafe"][metric]["0"]["values"])
        means = {int(step): np.mean(point["values"]) for step, point in found["base"][metric].items()}
        step = min(step for step, mean in means.items() if mean <= goal + 1e-4)
        [text] = panels[curves.METRICS[metric]].texts
        assert text.get_text().endswith(f"at step {step}") and f"{goal:.3f}" in text.get_text()
        assert text.xy == (step, pytest.approx(means[step], abs=1e-4)) and 40 < step < 100
        [star] = [line for line in panels[curves.METRICS[metric]].get_lines() if line.get_marker() == "*"]
        assert star.get_xdata()[0] == step
        lines = {line.get_label(): line for line in panels[curves.METRICS[metric]].get_lines()}
        assert max(lines["base"].get_xdata()) == 100 and len(lines["base"].get_xdata()) == 11
    halved = {line.get_label(): line for line in panels["guard's reward ↑"].get_lines()}["ThinkSafe-reward"]
    assert halved.get_ydata()[-1] == pytest.approx(found["ThinkSafe-reward"]["reward"]["40"]["mean"] / 2)
    for title, axis in panels.items():  # nothing is cut off
        low, high = axis.get_ylim()
        for line in axis.get_lines():
            assert low <= min(line.get_ydata()) and max(line.get_ydata()) <= high, title


def test_learning_curves_say_where_the_base_start_stays_above(tmp_path):
    found = committed_curves()
    base = found["base"]["asr test_wrapped"]
    found["base"]["asr test_wrapped"] = {step: {**point, "mean": point["mean"] + 0.1} for step, point in base.items()}
    _, panels = drawn_curves(found, tmp_path / "grpo.png")
    [text] = panels["ASR wrapped ↓"].texts
    assert text.get_text().startswith("base: not as low") and text.get_text().endswith("by step 100")


# bench/plot_run.py ----------------------------------------------------------------------------------------------------
def write_run(folder, steps, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, **{name: of(step) for name, of in columns.items()}} for step in range(steps)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_curves_of_runs_over_one_another(tmp_path):
    """Null columns and an unmeasured KL have no panel, what is always 0 a line of words, a growing file no harm."""
    a = write_run(
        tmp_path / "a/04_grpo", 30, reward=lambda s: s / 30, reward_maths=lambda s: None if s % 2 else 1.0,
        reward_verify=lambda s: None, kl=lambda s: 0.0, clipped=lambda s: 0.0, other=lambda s: 5,
    )  # fmt: skip
    b = write_run(tmp_path / "b/04_grpo", 3, reward=lambda s: 0.5, loss=lambda s: float("nan"), kl=lambda s: s / 10)
    (a / "eval.jsonl").write_text('{"step": 10, "score": 0.7, "asr x": 0.1}\n{"step": 0, "score": 0.5}\n')
    with (b / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    found = dict(zip(plot_run.names_of([a, b]), map(plot_run.curves_of, (a, b))))
    figure = drawn(plot_run.draw, found, tmp_path / "out.png")
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    assert list(panels) == ["reward ↑", "reward, maths ↑", "KL to the start", "held out: score", "held out: asr x"]
    lines = {line.get_label(): line for line in panels["reward ↑"].get_lines()}
    assert list(lines["b/04_grpo"].get_ydata()) == [0.5] * 3
    assert lines["a/04_grpo"].get_ydata()[15] == pytest.approx(15 / 30)  # the mean over steps around it
    [maths] = panels["reward, maths ↑"].get_lines()
    assert list(maths.get_xdata()) == list(range(0, 30, 2))
    [kl] = panels["KL to the start"].get_lines()
    assert kl.get_label() == "b/04_grpo"
    [score] = panels["held out: score"].get_lines()
    assert list(score.get_xdata()) == [0, 10] and score.get_marker() == "o"
    assert figure.legends[0].get_title().get_text() == "0 at every step: tokens clipped"
    assert_readable(figure)


def test_plot_run_as_a_command(tmp_path, capsys):
    run = write_run(tmp_path / "run", 4, loss=lambda s: 1 / (s + 1))
    plot_run.main([str(run)])
    assert (run / "curves.png").stat().st_size > 5000 and capsys.readouterr().out == f"written: {run}/curves.png\n"
    shutil.copy(ROOT / "results/smollm2/04_grpo_metrics.jsonl", run / "metrics.jsonl")
    plot_run.main([str(run), "--out", str(tmp_path / "x.svg")])
    assert "<svg" in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize("metrics, arguments, words", [
    (None, [], "no metrics.jsonl with steps; give the run folder"),
    ("", [], "no metrics.jsonl with steps"),
    ('{"step": 0, "lo', [], "no metrics.jsonl with steps"),
    ("{oh\n", [], "metrics.jsonl, line 1: not JSON"),
    ('{"loss": 1}\n', [], "rows without a step"),
    ('{"step": 0, "loss": 0.0}\n', [], "nothing to draw"),
    ('{"step": 0, "loss": 1}\n', ["run"], "twice"),
    ('{"step": 0, "loss": 1}\n', ["--out", "x.txt"], "--out x.txt: a figure ends in"),
    ('{"step": 0, "loss": 1}\n', ["--out", "no/x.png"], "--out no/x.png: no folder no"),
])  # fmt: skip
def test_plot_run_refuses_in_one_line(metrics, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if metrics is not None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run/metrics.jsonl").write_text(metrics)
    with pytest.raises(SystemExit) as stopped:
        plot_run.main(["run", *arguments])
    line = str(stopped.value)
    assert line.startswith("error: ") and words in line and "\n" not in line
