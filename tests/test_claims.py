"""The claims' verdicts: from the committed figures, recomputed with NumPy, and the cost of GRPO beside stage 03's."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import curves  # noqa: E402
import verdicts  # noqa: E402

OUT = ROOT / "results/claims"


def seeds(file, name, column):
    return np.array(json.loads((OUT / f"{file}.json").read_text())["table"][name][column]["values"])


def interval(effect):
    half = 2.7764451 * effect.std(ddof=1) / 5**0.5  # Student's t, 4 degrees of freedom
    return effect.mean() - half, effect.mean() + half


def test_committed_verdicts_are_what_the_script_makes():
    rows = verdicts.per_seed()
    found = [verdicts.judged(claim, rows) for claim in verdicts.CLAIMS]
    assert (OUT / "claims.md").read_text() == verdicts.table(found, 5)
    assert json.loads((OUT / "claims.json").read_text())["claims"] == json.loads(json.dumps(found))
    assert (OUT / "claims.md").read_text().strip() in (ROOT / "docs/claims.md").read_text()


@pytest.mark.parametrize("text, file, better, worse, column, verdict", [
    ("learning to verify makes the model answer more safely", "sinternal", "verification", "base", "ASR wrapped ↓", "appears"),
    ("more often than after ordinary SFT", "sinternal", "verification", "answer-SFT", "checked", "undecided"),
    ("reasoning is kept", "sinternal", "verification", "base", "sums ↑", "does not"),
    ("steering is needed", "thinksafe", "ThinkSafe", "no-steering", "ASR + over-refusal ↓", "appears"),
    ("KL on benign prompts helps", "thinksafe", "with-KL", "ThinkSafe", "ASR + over-refusal ↓", "does not"),
])  # fmt: skip
def test_effects_by_numpy(text, file, better, worse, column, verdict):
    effect = (seeds(file, better, column) - seeds(file, worse, column)) * (-1 if "↓" in column else 1)
    claims = json.loads((OUT / "claims.json").read_text())["claims"]
    found = next(claim for claim in claims if claim["text"] == text)
    low, high = found["effect"]["mean"] - found["effect"]["half"], found["effect"]["mean"] + found["effect"]["half"]
    assert (low, high) == pytest.approx(interval(effect), abs=2e-4) and found["verdict"] == verdict


def test_own_answers_teach_more_only_because_there_are_more():
    asr = {
        name: seeds("sinternal", name, "ASR wrapped ↓") for name in ("verification", "other-answers", "half-the-rows")
    }
    assert interval(asr["other-answers"] - asr["verification"])[0] > 0
    assert interval(asr["other-answers"] - asr["half-the-rows"])[1] < 0
    [claim] = [claim for claim in verdicts.CLAIMS if claim.control]
    rows = verdicts.per_seed()
    assert verdicts.judged(claim, rows)["verdict"] == "confounded"
    rows["half-the-rows"] = rows["verification"]  # as if fewer rows were as good
    assert verdicts.judged(claim, rows)["verdict"] == "appears"


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_tokens_of_stage_03_and_of_a_grpo_step(tmp_path, tokenizer):
    """Two prompts, one kept at its second try, three epochs; GRPO with 8 responses of 10 and 20 tokens, half flat."""
    prompts = [json.loads(line) for file in curves.PROMPTS for line in (ROOT / file).open()]
    chats = [[{"role": "user", "content": row["prompt"]}] for row in prompts]
    ids = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) for chat in chats]
    length = {row["id"]: len(i) for row, i in zip(prompts, ids)}
    a, b = prompts[0]["id"], prompts[5]["id"]
    steered, grpo = tmp_path / "thinksafe0/ThinkSafe", tmp_path / "grpo0/base"
    made = [(f"{a}|1", 40, 7), (f"{a}|2", 50, 5), (f"{b}|1", 12, 11)]
    write(steered / "responses.jsonl", [{"id": i, "prompt_tokens": p, "samples": [{"tokens": n}]} for i, p, n in made])
    write(steered / "train.jsonl", [{"id": a, "try": 2}, {"id": b, "try": 1}])
    write(steered / "options.json", [{"options": {"epochs": 3}}])
    write(grpo / "options.json", [{"options": {"batch_size": 2, "group_size": 4}}])
    write(grpo / "metrics.jsonl", [{"response_tokens": n, "zero_spread_groups": 0.5} for n in (10, 20)])
    prompt = sum(length.values()) / len(length)
    assert curves.tokens(tmp_path) == {
        "stage 03": (40 + 7 + 50 + 5 + 12 + 11, 3 * (length[a] + 5 + length[b] + 11)),
        "a GRPO step": (round(2 * prompt + 8 * 15), round(4 * prompt + 4 * 15)),
    }
