"""All settings that bench/speed.py tries do the same work, on a model of one narrow layer."""

import random

import pytest
from conftest import ROOT  # noqa: F401  # puts the house on the path

pytest.importorskip("trl")
from bench import speed, training  # noqa: E402
from common import Example  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")


def short_examples(count, spread):
    draw = random.Random(1)
    sizes = [(draw.randint(4, 20), draw.randint(2, 12)) for _ in range(count)]
    return [Example(*([draw.randrange(2, 100) for _ in range(n)] for n in pair)) for pair in sizes]


@pytest.fixture
def bench_model(tmp_path, monkeypatch):
    """A folder with the bench's model, made small; hooks on optimizers end with the test."""
    hooks, register = [], training.register_optimizer_step_post_hook
    small = {"LAYERS": 1, "HIDDEN": 64, "VOCABULARY": 100, "PROMPTS": 4, "LONGEST": 90}
    for name, value in small.items():
        monkeypatch.setattr(training, name, value)
    monkeypatch.setattr(training, "sft_examples", short_examples)
    monkeypatch.setattr(training, "register_optimizer_step_post_hook", lambda f: hooks.append(register(f)))
    training.make(tmp_path / "model")
    yield tmp_path / "model"
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("work", ["sft", "update"])
def test_every_setting_that_is_tried_does_equal_work(bench_model, tmp_path, work):
    fixed = {"work": work, "lengths": "spread", "steps": 2, "rows": 8, "micro_batch_tokens": 4096}
    tried = {f"trl {i}": {"side": "trl", **more} for i, more in enumerate(speed.TRL_TRIED[work])}
    tried |= {f"ours {i}": {"side": "ours", **more} for i, more in enumerate(speed.OURS_TRIED)}
    sides = {}
    for side, more in {"ours": {"side": "ours"}, "trl": {"side": "trl"}, **tried}.items():
        run = tmp_path / side.replace(" ", "_")
        run.mkdir()
        sides[side] = [(training.sft if work == "sft" else training.grpo)({**fixed, **more}, bench_model, run)]
    speed.equal_work(work, sides)
    assert len(sides) == 2 + len(tried) and all(len(one["losses"]) == 2 for [one] in sides.values())


def result(wall, labels=(3, 4), losses=(1.0, 2.0)):
    return {
        "wall": wall,
        "tokens": 100,
        "peak": 10 * wall,
        "label_tokens": [*labels],
        "losses": [*losses],
        "norms": [1.0],
    }


def test_unequal_work_is_refused():
    ours, theirs = [result(1.0)], [result(5.0)]
    speed.equal_work("sft", {"ours": ours, "trl": theirs, "trl best": [result(3.0)]})
    with pytest.raises(AssertionError, match="labels"):
        speed.equal_work("sft", {"ours": ours, "trl": theirs, "trl best": [result(3.0, labels=(3, 5))]})
    with pytest.raises(AssertionError, match="losses"):
        speed.equal_work("sft", {"ours": ours, "trl": theirs, "trl best": [result(3.0, losses=(1.0, 2.1))]})


def test_ratios_to_both_sides_of_trl():
    """100 tokens in 1, 5, and at the best settings 0.5 and 3 seconds, with peaks of 10, 50, 5 and 30 MB."""
    sides = {"ours": [result(1.0)], "trl": [result(5.0)], "ours best": [result(0.5)], "trl best": [result(3.0)]}
    row = speed.compare({"grpo step": sides})["grpo_step"]
    assert (row["speed_vs_trl"], row["speed_vs_trl_best"]) == (5.0, 6.0)
    assert (row["memory_vs_trl"], row["memory_vs_trl_best"]) == (0.2, round(5 / 30, 3))


def test_the_page_is_made_of_what_was_measured():
    """results/bench/speed.md from speed.json, as `python bench/speed.py --parts` makes it of what is saved."""
    bench = speed.Bench(threads=1, repeats=1)
    bench.load()
    assert speed.tables(bench, speed.compare(bench.rows)) == (speed.OUT / "speed.md").read_text()
