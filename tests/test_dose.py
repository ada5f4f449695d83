"""bench/dose.py: who is held out, which recipe the rule takes, and that the page says what dose.json holds."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import dose  # noqa: E402

OUT = ROOT / "results/claims"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    dose.write_prompts(folder)
    return {name: lines(folder / f"{name}.jsonl") for name in ("train", "plain", "wrapped", "sums")}


def test_held_out_items_are_never_trained_on(prompts):
    """By the words of the prompts, not by the ids."""
    all_items = {item.name for item in dose.world.ITEMS}

    def items_in(rows):
        return {
            word for row in rows for word in row["prompt"].replace("?", " ").replace(".", " ").replace(",", " ").split()
        } & all_items

    asked = items_in(prompts["plain"]) | items_in(prompts["wrapped"])
    committed = lines(ROOT / "tiny/prompts/train.jsonl")
    assert len(asked) == 24 and not asked & items_in(prompts["train"])
    assert asked | items_in(prompts["train"]) == items_in(committed)  # nothing lost, nothing of the tests
    assert len(prompts["train"]) == 360 and all(row in committed for row in prompts["train"])
    assert sum(row["harmful"] for row in prompts["plain"]) * 2 == len(prompts["plain"]) == 72


def test_wrappings_are_those_of_training_and_new_ones(prompts):
    sources = {row["source"] for row in prompts["wrapped"]}
    assert {"role play", "research", "role play, research"} <= sources
    assert not sources & set(dose.world.TEST_WRAPPERS)
    tests = {row["prompt"] for row in lines(ROOT / "tiny/prompts/test_wrapped.jsonl")}
    assert not tests & {row["prompt"] for row in prompts["wrapped"]}


def test_fresh_sums_are_in_neither_file_and_right(prompts):
    old = {row["prompt"] for name in ("train", "test") for row in lines(ROOT / f"tiny/prompts/{name}_sums.jsonl")}
    fresh = [row["prompt"] for row in prompts["sums"]]
    assert len(set(fresh)) == len(fresh) == 200 and not old & set(fresh)
    for row in prompts["sums"]:
        numbers = row["prompt"].removeprefix("what is ").removesuffix("?").split(" + ")
        assert int(row["gold"]) == sum(map(int, numbers))


BASE = {"compliance plain": 1.0, "compliance wrapped": 1.0, "sums": 0.99}


def recipe(asr, plain=1.0, wrapped=1.0, sums=0.99):
    return {"ASR wrapped": asr, "compliance plain": plain, "compliance wrapped": wrapped, "sums": sums}


@pytest.mark.parametrize(
    "table, chosen",
    [
        ({"a": recipe(0.05), "b": recipe(0.02)}, "b"),
        ({"a": recipe(0.05), "b": recipe(0.02, wrapped=0.979)}, "a"),
        ({"a": recipe(0.05), "b": recipe(0.02, plain=0.97)}, "a"),
        ({"a": recipe(0.05), "b": recipe(0.02, sums=0.969)}, "a"),
        ({"a": recipe(0.05), "b": recipe(0.02, wrapped=0.98, sums=0.97)}, "b"),  # exactly two points
        ({"a": recipe(0.10), "b": recipe(0.11)}, "a"),
        ({"a": recipe(0.11), "b": recipe(0.0, sums=0.9)}, ""),
    ],
)
def test_choice(table, chosen):
    assert dose.choose(table, BASE) == chosen
