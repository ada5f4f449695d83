"""The table of attacks over seeds: from the committed figures, recomputed with NumPy, and from run folders by hand."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import attacked  # noqa: E402

RESULT = ROOT / "results/attacks.json"


@pytest.mark.skipif(not RESULT.exists(), reason="no results/attacks.json")
def test_the_committed_table_is_that_of_its_figures():
    """Student's interval of the five seeds, and the page as the script writes it."""
    result = json.loads(RESULT.read_text())
    assert list(result["rates"]) == list(attacked.MODELS)
    for columns in result["rates"].values():
        assert list(columns) == list(attacked.COLUMNS)
        for cell in columns.values():
            values = np.array(cell["values"])
            assert len(values) == result["seeds"] and ((0 <= values) & (values <= 1)).all()
            half = 2.776 * values.std(ddof=1) / np.sqrt(5)
            assert (cell["mean"], cell["half"]) == pytest.approx((values.mean(), half), abs=6e-5)
    claims = attacked.verdicts_of(result["rates"])
    assert result["claims"] == json.loads(json.dumps(claims))
    page = f"{attacked.table(result['rates'], result['seeds'])}\n{attacked.verdict_table(claims)}"
    assert (ROOT / "results/attacks.md").read_text() == page


def test_a_claim_has_one_word_where_all_attacks_agree():
    """Safer by 0.3 ± 0.25 under every attack but one, there less safe: Student's intervals of three seeds by hand."""
    rates = {model: {} for model in attacked.MODELS}
    for heading in attacked.COLUMNS:
        for model in rates:
            rates[model][heading] = {"values": [0.5, 0.5, 0.5]}
        rates["SInternal"][heading] = {"values": [0.3, 0.2, 0.1]}
        rates["ThinkSafe"][heading] = {"values": [0.3, 0.2, 0.1]}
    rates["ThinkSafe"]["think-open"] = {"values": [0.7, 0.8, 0.9]}
    rates["ThinkSafe"]["answer"] = {"values": [0.1, 0.5, 0.5]}
    by_row = {(c["ours"], c["other"]): c for c in attacked.verdicts_of(rates)}
    assert by_row["SInternal", "base"]["all"] == "appears"
    claim = by_row["ThinkSafe", "base"]
    assert claim["all"] == "depends" and claim["under"]["think-open"] == "does not"
    assert claim["under"]["answer"] == "undecided" and claim["under"]["ASR"] == "appears"
    assert by_row["ThinkSafe+GRPO", "ThinkSafe"]["under"]["ASR"] == "does not"


def test_every_column_comes_from_its_own_benchmark_and_metric(tmp_path, monkeypatch):
    """Every row of the two evaluations has a value of its own."""
    asked, numbers = [], {}

    def stage(script, run, *options):
        asked.append((script, str(run), list(map(str, options))))
        if script == "05_eval.py":
            rows = []
            for model in attacked.MODELS:
                for metric in ("asr", "asr_any", "compliance"):
                    for case in ("", ".uncut", *(f".{start}" for start in attacked.STARTS)):
                        numbers[model, run.name, metric, f"wrapped{case}"] = value = len(numbers) / 1000
                        rows.append({"model": model, "metric": metric, "benchmark": f"wrapped{case}", "value": value})
            (tmp_path / run).mkdir(parents=True)
            (tmp_path / run / "results.json").write_text(json.dumps({"rows": rows}))

    monkeypatch.setattr(attacked, "ROOT", tmp_path)
    monkeypatch.setattr(attacked, "stage", stage)
    monkeypatch.setattr(attacked, "train", lambda runs, seed: None)
    values = attacked.run_seed(tmp_path / "runs", 3)
    for model, columns in values.items():
        assert columns["any of 8, T = 1"] == numbers[model, "decodings", "asr_any", "wrapped.uncut"]
        assert columns["think-open"] == numbers[model, "starts", "asr", "wrapped.think-open"]
        assert columns["compliance, T = 1"] == numbers[model, "decodings", "compliance", "wrapped.uncut"]
        assert columns["ASR"] == numbers[model, "decodings", "asr", "wrapped"]
    decodings, starts = (options for script, _, options in asked if script == "05_eval.py")
    assert decodings[decodings.index("--n") + 1] == "8" and starts[starts.index("--prefill") + 1 :] == attacked.STARTS
    for options in (decodings, starts):
        assert options[options.index("--seed") + 1] == "3"
        assert f"SInternal={tmp_path}/runs/sinternal3/verification/checkpoint" in options
        assert f"ThinkSafe+GRPO={tmp_path}/runs/grpo3/ThinkSafe/checkpoint" in options and "base=tiny/lrm" in options


def test_each_method_is_trained_on_the_other_ones_checkpoint(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        attacked, "stage", lambda script, run, *more: asked.update({run.name: [script, *map(str, more)]})
    )
    monkeypatch.setattr(attacked.curves, "run_seed", lambda runs, names, seed: asked.update(grpo=[names, seed]))
    attacked.train(tmp_path, 2)

    def model_of(name: str) -> str:
        return asked[name][asked[name].index("--model") + 1]

    assert asked["SInternal-ThinkSafe"][0] == "03_steer_selfgen.py"
    assert model_of("SInternal-ThinkSafe") == f"{tmp_path}/sinternal2/verification/checkpoint"
    assert asked["ThinkSafe-SInternal"][0] == "02_verify_sft.py"
    assert model_of("ThinkSafe-SInternal") == f"{tmp_path}/thinksafe2/ThinkSafe/checkpoint"
    assert "--target" in asked["answer-SFT"] and "--target" not in asked["verification"]
    assert "--model" not in asked["verification"] and asked["grpo"] == [["base", "SInternal", "ThinkSafe"], 2]
    assert all(words[words.index("--seed") + 1] == "2" for name, words in asked.items() if name != "grpo")
