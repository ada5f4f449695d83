"""Each stage as a user runs it, on a few rows of the miniature world; what it says when the input is wrong."""

import importlib.util
import json
import re
import shutil

import pytest
from conftest import ROOT, load, refused, rows, run_stage

import plumbing.options
from plumbing import PRESETS, load_prompts

generate = load("01_generate")
STAGES = ["01_generate", "02_verify_sft", "03_steer_selfgen", "04_grpo", "05_eval"]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """All five stages, one after the other, small."""
    folder = tmp_path_factory.mktemp("runs")
    out = {}
    out["01"] = run_stage("01_generate", "--run", folder / "01", "--limit", 40, "--n", 4, typed=True)
    heldout = ["--prompts", "tiny/prompts/test_plain.jsonl", "--guard", "tiny/gold.py", "--limit", 12, "--n", 4]
    run_stage("01_generate", "--run", folder / "held", *heldout)
    out["02"] = run_stage(
        "02_verify_sft", "--run", folder / "02", "--responses", folder / "01", "--heldout", folder / "held", typed=True
    )
    out["03"] = run_stage("03_steer_selfgen", "--run", folder / "03", "--limit", 24, "--epochs", 1, typed=True)
    grpo = ["--steps", 3, "--batch_size", 4, "--group_size", 4, "--limit", 20]
    out["04"] = run_stage("04_grpo", "--run", folder / "04", "--model", folder / "02/checkpoint", *grpo, typed=True)
    models = [f"base={ROOT}/tiny/lrm", f"sinternal={folder}/02/checkpoint", f"grpo={folder}/04/checkpoint"]
    test = ["--verify_test", folder / "02/verify_test.jsonl", "--limit", 8]
    out["05"] = run_stage("05_eval", "--run", folder / "05", "--models", *models, *test, typed=True)
    return folder, out


def test_every_stage_ends_with_a_summary_and_the_next_command(runs):
    _, out = runs
    for number, name in zip(out, STAGES):
        assert f"\n{name}\n" in out[number].stdout and "\nnext: " in out[number].stdout


def test_the_first_prompt_and_the_label_mask_are_shown(runs, tokenizer):
    """The ids that are read and trained on, decoded; each stage's rows through transformers' own rendering."""
    folder, out = runs
    asked = {name: rows(folder / name) for name in ("01/responses.jsonl", "02/critiques.jsonl", "03/responses.jsonl")}
    asked |= {
        "04": load_prompts(PRESETS["tiny"]["prompts"], 20)[:1],
        "05": rows(folder / "05/base/plain.responses.jsonl"),
    }

    def chat(prompt: str) -> str:
        turns = [{"role": "user", "content": prompt}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)

    for name, found in asked.items():
        shown = out[name[:2]].stdout.split("first prompt as the model reads it:\n")[1]
        assert any(shown.startswith(chat(row["prompt"])) for row in found), name
    for number, field in (("02", "trained_"), ("03", "")):
        first = rows(folder / number / "train.jsonl")[0]
        assert first["harmful"]  # so that stage 03 has steered it
        thinking, answer = first[f"{field}thinking"], first[f"{field}answer"]
        mask = f"first example, no loss:\n{chat(first['prompt'])}\nfirst example, trained on:\n"
        assert f"{mask}<think>\n{thinking}\n</think>\n\n{answer}<|im_end|>\n" in out[number].stdout


def test_01_writes_every_prompt_once_with_its_labels(runs):
    folder, _ = runs
    responses, labels = rows(folder / "01/responses.jsonl"), rows(folder / "01/labels.jsonl")
    assert len({r["id"] for r in responses}) == len(responses) == len(labels) == 40
    assert all(len(r["samples"]) == 4 for r in responses) and all(len(r["verdicts"]) == 4 for r in labels)
    assert {v["safety"] for r in labels for v in r["verdicts"]} >= {"safe", "unsafe"}


def test_labels_of_a_model_carry_their_probability_and_those_of_a_rule_none(runs):
    folder, _ = runs
    model, rule = ([v for r in rows(folder / f"{n}/labels.jsonl") for v in r["verdicts"]] for n in ("01", "held"))
    assert all(0 < v["probability"] <= 1 for v in model if v["safety"] in ("safe", "unsafe"))
    assert rule and not any("probability" in v for v in rule)


def test_02_trains_on_agreeing_critiques_only(runs):
    folder, _ = runs
    kept, dropped = rows(folder / "02/train.jsonl"), rows(folder / "02/dropped.jsonl")
    critiques = rows(folder / "02/critiques.jsonl")
    assert len(kept) + len(dropped) == len(critiques) and len(kept) > 10
    assert all(r["verdict"] == r["label"] and r["trained_thinking"] for r in kept) and all(r["reason"] for r in dropped)
    assert not any("<think>" in r["prompt"] for r in kept)  # the thinking of the answer is not shown


def test_03_trains_on_unsteered_prompts(runs):
    folder, _ = runs
    kept, sampled = rows(folder / "03/train.jsonl"), rows(folder / "03/responses.jsonl")
    steering = load("03_steer_selfgen").STEERING["prefix"].split("\n")[0]
    assert not any(steering in r["prompt"] or steering in r["thinking"] for r in kept)
    assert all((steering in r["prompt"]) is r["harmful"] for r in sampled)
    assert len(kept) + len(rows(folder / "03/dropped.jsonl")) == len(sampled)


def test_04_has_one_line_per_step(runs):
    folder, _ = runs
    metrics = rows(folder / "04/metrics.jsonl")
    assert [m["step"] for m in metrics] == [0, 1, 2] and len(rows(folder / "04/samples.jsonl")) == 3
    assert all(m["sampler_gap"] < 1e-4 for m in metrics)  # the sampler's log-probs are the trainer's
    assert all(abs(m["loss"]) < 0.2 for m in metrics)


def test_05_holds_the_promised_rows(runs):
    folder, _ = runs
    found = json.loads((folder / "05/results.json").read_text())
    assert set(found) == {"recipe", "rows", "categories", "judges"}
    keys = {
        "model",
        "benchmark",
        "prompts",
        "decoding",
        "start",
        "split",
        "metric",
        "judge",
        "value",
        "low",
        "high",
        "n",
    }
    assert all(
        set(r) - {"change"} == keys and r["low"] <= r["value"] <= r["high"] and r["n"] > 0 for r in found["rows"]
    )
    have = {(r["model"], r["metric"]) for r in found["rows"]}
    metrics = "asr asr_response asr_lenient compliance accuracy verify_f1 self_check truncated unparsed".split()
    assert have >= {(m, x) for m in ("base", "sinternal", "grpo") for x in metrics}
    assert {r["judge"] for r in found["rows"] if r["metric"] == "asr"} == {"tiny/gold.py", "tiny/judge", "tiny/guard"}
    made = found["recipe"]["models"]["grpo"]["made by"]
    assert made["guard"] == "tiny/guard" and made["steps"] == 3
    assert (folder / "05/results.png").stat().st_size > 10_000 and "| base |" in (folder / "05/results.md").read_text()


def test_checkpoints_load_in_transformers(runs):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, _ = runs
    for stage in ("02", "03", "04"):
        model = AutoModelForCausalLM.from_pretrained(folder / stage / "checkpoint")
        assert not any("lora" in n.lower() or n.endswith(".A") for n, _ in model.named_parameters())
        assert AutoTokenizer.from_pretrained(folder / stage / "checkpoint").chat_template


def test_the_same_command_again_changes_nothing(runs):
    folder, _ = runs
    before = (folder / "01/responses.jsonl").read_bytes(), (folder / "01/labels.jsonl").read_bytes()
    run_stage("01_generate", "--run", folder / "01", "--limit", 40, "--n", 4)
    assert before == ((folder / "01/responses.jsonl").read_bytes(), (folder / "01/labels.jsonl").read_bytes())


def test_01_goes_on_after_a_cut(runs, tmp_path):
    """Half the rows and half a line are gone; the same command brings back the same rows."""
    folder, _ = runs
    shutil.copytree(folder / "01", tmp_path / "01")
    whole = rows(folder / "01/responses.jsonl")
    lines = (tmp_path / "01/responses.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "01/responses.jsonl").write_text("".join(lines[:20]) + lines[20][:30])
    (tmp_path / "01/labels.jsonl").write_text("")
    done = run_stage("01_generate", "--run", tmp_path / "01", "--limit", 40, "--n", 4)
    assert "half-written last line (30 bytes)" in done.stdout
    again = rows(tmp_path / "01/responses.jsonl")
    assert sorted(again, key=lambda r: r["id"]) == sorted(whole, key=lambda r: r["id"])
    assert len(rows(tmp_path / "01/labels.jsonl")) == 40


@pytest.mark.slow
@pytest.mark.parametrize("stage, options", [
    ("03_steer_selfgen", ["--limit", "24", "--epochs", "2", "--save_every", "5", "--lora_dropout", "0.1"]),
    ("04_grpo", ["--limit", "20", "--steps", "5", "--save_every", "3", "--batch_size", "4", "--updates_per_batch", "2",
                 "--beta", "0.04", "--learning_rate", "1e-3"]),
])  # fmt: skip
def test_training_goes_on_bit_for_bit(tmp_path, stage, options):
    """From the last saved state, the same command ends with the same weights as a run never stopped."""
    from safetensors import safe_open

    run_stage(stage, "--run", tmp_path / "whole", *options)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    metrics = rows(tmp_path / "whole/metrics.jsonl")
    with safe_open(tmp_path / "cut/state.safetensors", "pt") as file:
        assert 0 < int(file.metadata()["step"]) < len(metrics)  # some steps run again
    shutil.rmtree(tmp_path / "cut/checkpoint")
    run_stage(stage, "--run", tmp_path / "cut", *options)
    again = rows(tmp_path / "cut/metrics.jsonl")
    strip = lambda ms: [{k: v for k, v in m.items() if "seconds" not in k} for m in ms]  # noqa: E731
    assert strip(again) == strip(metrics)
    weights = "checkpoint/model.safetensors"
    assert (tmp_path / "whole" / weights).read_bytes() == (tmp_path / "cut" / weights).read_bytes()


@pytest.mark.slow
def test_micro_batches_do_not_change_the_training(tmp_path):
    """One example at a time or all at once: the same losses, because each step has one normaliser."""
    found = []
    for tokens in ("1", "100000"):
        run_stage(
            "03_steer_selfgen", "--run", tmp_path / tokens, "--limit", 16, "--epochs", 1, "--micro_batch_tokens", tokens, "--lora_dropout", 0
        )  # fmt: skip
        found.append([(m["loss"], m["gradient_norm"]) for m in rows(tmp_path / tokens / "metrics.jsonl")])
    assert len(found[0]) == 4 and found[0] == [pytest.approx(pair, rel=1e-4) for pair in found[1]]


def test_micro_batches_do_not_change_verification_training(runs, tmp_path):
    """An example a pass or all at once: the same losses, of the step's label tokens, in steps of unequal examples."""
    folder, _ = runs
    found = []
    for tokens in ("1", "100000"):
        options = ["--responses", folder / "01", "--epochs", 1, "--batch_size", 7, "--micro_batch_tokens", tokens]
        run_stage("02_verify_sft", "--run", tmp_path / tokens, *options)
        found.append([(m["loss"], m["gradient_norm"]) for m in rows(tmp_path / tokens / "metrics.jsonl")])
    assert len(found[0]) > 3 and found[0] == [pytest.approx(pair, rel=1e-4) for pair in found[1]]


def test_a_batch_of_cut_responses_is_said_not_trained_on(tmp_path):
    options = ["--limit", 8, "--steps", 2, "--batch_size", 4, "--max_new_tokens", 4]
    error = one_line(run_stage("04_grpo", "--run", tmp_path / "run", *options, ok=False))
    assert "step 0: every response is cut" in error and not (tmp_path / "run/checkpoint").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_help_reads_on_its_own(stage):
    done = run_stage(stage, "--help")
    module = load(stage)
    assert done.stdout.count(" --") > 10 and "in: " in done.stdout and "out:" in done.stdout
    names = module.Options.__dataclass_fields__
    assert all(f"--{name}" in done.stdout for name in names)
    assert done.stdout.count("(default:") >= len(names)  # argparse shows a default only beside a help text


def one_line(done):
    assert done.returncode != 0 and "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and done.stderr.strip().splitlines()[-1] == errors[0]
    return errors[0]


BAD = {
    "no such model": (["--model", "nowhere/at-all"], "no model 'nowhere/at-all'"),
    "no such guard": (["--guard", "rules.py"], "rules.py"),
    "unknown preset": (["--preset", "huge"], "unknown preset 'huge'; there are: tiny"),
    "unknown option": (["--temprature", "1"], "--temprature"),
    "bad number": (["--n", "many"], "many"),
    "no such file": (["--prompts", "no.jsonl"], "no.jsonl"),
    "nothing to sample": (["--n", "0"], "--n 0: it must be at least 1"),
    "not a temperature": (["--temperature", "nan"], "--temperature nan"),
    "not a share": (["--top_p", "1.5"], "--top_p 1.5"),
    "no vllm here": (["--engine", "vllm"], "needs the package vllm"),
}


if importlib.util.find_spec("vllm"):
    del BAD["no vllm here"]


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_one_clear_line(case, tmp_path):
    options, words = BAD[case]
    error = refused(generate, "--run", tmp_path / "run", *options)
    assert words in error and not (tmp_path / "run").exists()


FILES = {
    "empty": ("", "holds no rows"),
    "not json": ('{"prompt": "a", "harmful": true}\n{"prompt": ', "line 2: not JSON"),
    "not an object": ("[1, 2]\n", "line 1: not a JSON object"),
    "no prompt": ('{"text": "a", "harmful": true}\n', "row 1: no prompt"),
    "no label": ('{"prompt": "a"}\n', "row 1: nothing says whether the prompt is harmful"),
    "wrong type": ('{"prompt": 7, "harmful": true}\n', "row 1, field prompt: int"),
    "label typo": (
        '{"prompt": "a", "label": "safe"}\n{"prompt": "b", "label": "unsfae"}\n',
        "row 2, field label: 'unsfae'",
    ),
    "no role": ('{"prompt": [{"content": "a"}], "harmful": true}\n', "row 1, field prompt: chat messages"),
    "same id": ('{"id": "x", "prompt": "a", "harmful": true}\n' * 2, "id 'x' occurs twice"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_prompt_files_are_named_by_line_and_field(case, tmp_path):
    text, words = FILES[case]
    file = tmp_path / "prompts.jsonl"
    file.write_text(text)
    error = refused(generate, "--run", tmp_path / "run", "--prompts", file)
    assert words in error and str(file) in error and not (tmp_path / "run").exists()


def test_a_run_folder_with_other_options_is_refused_by_name(runs):
    folder, _ = runs
    before = sorted(p.name for p in (folder / "01").iterdir())
    error = one_line(
        run_stage("01_generate", "--run", folder / "01", "--limit", 40, "--n", 4, "--top_p", 0.5, ok=False)
    )
    assert "top_p (0.95 there, 0.5 now)" in error and "--run" in error
    assert before == sorted(p.name for p in (folder / "01").iterdir())


def test_a_changed_prompt_file_is_refused_by_name(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "what is 1 + 2 + 3?", "harmful": false}\n')
    run_stage("01_generate", "--run", tmp_path / "run", "--prompts", file, "--n", 1)
    file.write_text('{"prompt": "what is 1 + 2 + 4?", "harmful": false}\n')
    error = refused(generate, "--run", tmp_path / "run", "--prompts", file, "--n", 1)
    assert f"content of {file}" in error


def test_presets_hold_no_dead_options():
    """Every key of every preset is read by some stage."""
    fields = {name[:2]: set(load(name).Options.__dataclass_fields__) for name in STAGES}
    for preset in PRESETS.values():
        for key, value in preset.items():
            if isinstance(value, dict):
                assert set(value) <= fields[key]
            else:
                assert any(key in names for names in fields.values())


def test_options_are_all_used():
    """A field that no line of its stage or of the rooms below it reads is a promise that is not kept."""
    rooms = [
        ROOT / "common.py",
        *(file for room in ("engines", "judges", "plumbing") for file in (ROOT / room).glob("*.py")),
    ]
    house = "".join(file.read_text() for file in rooms)
    for name in STAGES:
        text = (ROOT / f"{name}.py").read_text() + house
        for field in load(name).Options.__dataclass_fields__:
            assert re.search(rf"\boptions\.{field}\b", text) or field == "preset", f"{name}: {field}"


@pytest.mark.parametrize("stage", STAGES)
def test_every_option_is_explained_by_its_own_comment(stage):
    texts = plumbing.options.help_texts(load(stage).Options)
    assert all(len(text) > 8 and "#" not in text for text in texts.values()), texts
    assert texts["seed"] == "seed of sampling, shuffling and initialisation"  # beside the field
    assert texts["preset"].startswith("row of PRESETS") and texts["preset"].endswith("wins over it")  # above it
