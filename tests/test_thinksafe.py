"""Stage 03 on rows written by hand: what is tried again, kept, dropped and trained on, and the figures it reports."""

import json
import math
import shutil

import pytest
import torch
from conftest import load, next_token_log_probs, refused, rows, run_here

from common import Example, load_model, load_tokenizer, messages_of, render_chat, response_ids
from plumbing import runs
from tiny import world

stage = load("03_steer_selfgen")

GUARD = '''
"""Reads its verdict off the text: coal is unsafe, moss has no verdict, sorry refuses. Notes every text it is shown."""

import json
from pathlib import Path


def judge(prompt, text):
    with Path(__file__).with_suffix(".log").open("a") as file:
        file.write(json.dumps([prompt, text]) + "\\n")
    safety = "Safety: " + ("Unsafe" if "coal" in text else "Safe")
    return "moss." if "moss" in text else f"{safety}\\nRefusal: {'Yes' if 'sorry' in text else 'No'}"
'''
REFUSAL, HELP = ("this is harmful.", "sorry, i can not help with it."), ("this is safe.", "mix salt with ash.")
LEAK, CUT = ("the steps are known.", "mix coal with ash."), ("the steps are known. the steps", None)


@pytest.fixture(autouse=True)
def rows_by_hand(monkeypatch):
    """A user's run folder that holds responses and no options is refused."""
    monkeypatch.setattr(runs, "BEGINNING", (*runs.BEGINNING, "responses.jsonl"))


def prompt_of(name: str) -> str:
    return f"how do i make {name}?"


def write_case(folder, responses: dict[str, list], harmful: set[str]) -> list:
    """Prompts, a guard and finished samples; the options that name them. `responses` are {id: a (thinking, answer), or
    a list of them, for each try}; the stage samples only what is missing."""
    (folder / "run").mkdir()
    (folder / "guard.py").write_text(GUARD)
    prompts = [{"id": name, "prompt": prompt_of(name), "harmful": name in harmful} for name in responses]
    made = []
    for row in prompts:
        for number, samples in enumerate(responses[row["id"]], 1):
            samples = [
                {"thinking": t, "answer": a or "", "state": "truncated" if a is None else "closed", "tokens": 9}
                for t, a in (samples if isinstance(samples, list) else [samples])
            ]
            made.append({**row, "id": f"{row['id']}|{number}", "prompt_tokens": 9, "samples": samples})
    for file, lines in (("prompts.jsonl", prompts), ("run/responses.jsonl", made)):
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--run", folder / "run", "--prompts", folder / "prompts.jsonl", "--guard", folder / "guard.py"]
    return [*options, "--epochs", 1]


def shown_to_the_guard(folder) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in rows(folder / "guard.log")]


def test_what_is_rejected_is_tried_again_and_stands_once(tmp_path, capsys):
    quote = stage.STEERING["firm"].split("\n")[0]
    responses = {
        "at once": [REFUSAL],
        "second": [LEAK, REFUSAL],
        "third": [("mix coal.", "sorry."), HELP, REFUSAL],
        "never": [CUT, ("this is harmful.", "sorry, moss."), (f"{quote} so no.", "sorry.")],
        "benign": [HELP],
        "benign second": [REFUSAL, HELP],
        "benign never": [LEAK, CUT, ("moss.", "mix salt with ash.")],
    }
    options = write_case(tmp_path, responses, {"at once", "second", "third", "never"})
    run_here(stage, *options)
    run, kept = tmp_path / "run", rows(tmp_path / "run/train.jsonl")
    tries = {"at once": 1, "second": 2, "third": 3, "benign": 1, "benign second": 2}
    assert sorted((r["id"], r["try"]) for r in kept) == sorted(tries.items())
    for row in kept:
        assert row["prompt"] == prompt_of(row["id"]) and "reason" not in row
        assert (row["thinking"], row["answer"]) == responses[row["id"]][tries[row["id"]] - 1]
    dropped = rows(run / "dropped.jsonl")
    assert sorted((r["id"], r["try"], r["reason"]) for r in dropped) == [
        ("benign never", 1, "answer not safe"),
        ("benign never", 2, "truncated"),
        ("benign never", 3, "verdict unparsed"),
        ("benign second", 1, "benign prompt refused"),
        ("never", 1, "truncated"),
        ("never", 2, "verdict unparsed"),
        ("never", 3, "thinking quotes the steering"),
        ("second", 1, "answer not safe"),
        ("third", 1, "thinking not safe"),
        ("third", 2, "harmful prompt not refused"),
    ]
    assert all(row["prompt"] == prompt_of(row["id"]) for row in dropped)
    assert len(rows(run / "responses.jsonl")) == sum(map(len, responses.values()))  # nothing more was asked for
    texts = {text for tries in responses.values() for pair in tries for text in pair if text}
    assert set(shown_to_the_guard(tmp_path)) <= {(prompt_of(name), text) for name in responses for text in texts}
    summary = capsys.readouterr().out
    assert "2 prompts after the last try: 1 thinking quotes the steering, 1 verdict unparsed" in summary
    kinds = "1 benign at try 1, 1 benign at try 2, 1 harmful at try 1, 1 harmful at try 2, 1 harmful at try 3"
    assert f"{kinds}\n" in summary


def test_every_try_is_steered_by_its_own_text(tmp_path):
    """Sampled, not written: the harmful prompt carries the text of its try, the benign one none; each try is new."""
    bad, good = (next(item.name for item in world.ITEMS if item.harmful is harmful) for harmful in (True, False))
    options = write_case(tmp_path, {bad: [], good: [], "other": [HELP]}, {bad})
    (tmp_path / "guard.py").write_text(
        'def judge(prompt, text):\n    return "Safety: Safe\\nRefusal: No" if "other" in prompt else "moss."\n'
    )
    run_here(stage, *options, "--steering", "suffix", "risk", "suffix", "--temperature", 2, "--top_k", 0)
    found = {row["id"]: row for row in rows(tmp_path / "run/responses.jsonl")}
    assert set(found) == {"other|1"} | {f"{name}|{number}" for name in (bad, good) for number in (1, 2, 3)}
    suffix = f"Prompt:\n\n{prompt_of(bad)}\n\nThe prompt above is harmful. You should refuse to answer the prompt."
    risk = f"Evaluate the risks of the following prompt before you answer it.\n\nPrompt:\n\n{prompt_of(bad)}"
    assert [found[f"{bad}|{k}"]["prompt"] for k in (1, 2, 3)] == [suffix, risk, suffix]
    assert {found[f"{good}|{k}"]["prompt"] for k in (1, 2, 3)} == {prompt_of(good)}
    assert found[f"{bad}|1"]["samples"] != found[f"{bad}|3"]["samples"]


def test_a_response_cut_at_the_limit_is_no_training_data(tmp_path, capsys):
    """Closed or without a thinking, its end is not the model's: dropped, tried again, and said with the option to raise."""
    options = write_case(tmp_path, {"a": [REFUSAL, REFUSAL], "b": [("", "moss."), ("", "moss.")], "c": [HELP]}, {"a"})
    made = rows(tmp_path / "run/responses.jsonl")
    for row in made:
        if row["id"] in ("a|1", "b|1"):
            row["samples"][0]["finish"] = "length"
        if row["id"].startswith("b"):
            row["samples"][0] |= {"state": "no_thinking", "answer": "mix salt with ash."}
    (tmp_path / "run/responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    run_here(stage, *options, "--require_thinking", "false")
    assert sorted((r["id"], r["try"]) for r in rows(tmp_path / "run/train.jsonl")) == [("a", 2), ("b", 2), ("c", 1)]
    dropped = rows(tmp_path / "run/dropped.jsonl")
    assert sorted((r["id"], r["reason"]) for r in dropped) == [("a", "truncated"), ("b", "truncated")]
    assert "WARNING: 40.0% of the responses; raise --max_new_tokens (now 64)\n" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["full", "verdict", "critique", "answer"])
def test_a_cut_reply_of_an_expert_is_no_training_data(target):
    """In stage 02, even where its verdict stands in what came before the cut."""
    verify = load("02_verify_sft")
    reply = {"thinking": "hm.", "answer": "it names the parts.\nVerdict: unsafe", "state": "closed"}
    for finish, reason in (("stop", ""), ("length", "cut")):
        made = verify.target_of({**reply, "finish": finish}, "unsafe", verify.Options(target=target))
        assert made["reason"] == reason
    unclosed = {**reply, "state": "truncated", "finish": "stop"}
    assert verify.target_of(unclosed, "unsafe", verify.Options(target=target))["reason"] == "cut"


@pytest.mark.parametrize("guard", ["llama_guard:tiny/guard", "harmbench:tiny/guard"])
def test_a_guard_that_says_nothing_of_refusals_is_refused_at_the_start(guard, tmp_path):
    """03 would drop every sample, 04 would give benign prompts no reward; the official rules need no refusals."""
    for name in ("03_steer_selfgen", "04_grpo"):
        line = refused(load(name), "--run", tmp_path / "run", "--guard", guard)
        assert "says nothing of refusals; give --refusal_judge" in line and not (tmp_path / "run").exists()
    run_here(stage, "--guard", guard, "--faithful", "--dry_run", "--run", tmp_path / "run")
    run_here(load("04_grpo"), "--guard", guard, "--reward", "thinksafe", "--dry_run", "--run", tmp_path / "run")


def test_another_judge_says_what_refuses(tmp_path):
    """The guard's safety, the other one's refusals: benign answers that it calls refusals are dropped."""
    options = write_case(tmp_path, {"a": [REFUSAL], "b": [HELP, HELP, HELP], "c": [HELP]}, {"a"})
    says = "'Yes' if 'b' in prompt.split()[-1] or 'sorry' in text else 'No'"
    (tmp_path / "refusals.py").write_text(
        f"def judge(prompt, text):\n    return 'Safety: Unsafe\\nRefusal: ' + ({says})\n"
    )
    (tmp_path / "guard.py").write_text("def judge(prompt, text):\n    return 'Safety: Safe'\n")
    run_here(stage, *options, "--refusal_judge", tmp_path / "refusals.py")
    assert [r["id"] for r in rows(tmp_path / "run/train.jsonl")] == ["a", "c"]
    assert {r["reason"] for r in rows(tmp_path / "run/dropped.jsonl")} == {"benign prompt refused"}


def test_the_official_rules(tmp_path):
    """One try; thinking and answer are one text; unreadable is safe; nobody asks whether the answer refuses."""
    responses = {
        "unread": [("this is harmful.", "sorry, moss.")],
        "answered": [HELP],
        "refused": [REFUSAL],
        "leak": [LEAK],
        "thinking": [("mix coal with ash.", "sorry.")],
        "cut": [CUT],
    }
    run_here(stage, *write_case(tmp_path, responses, {"unread", "answered", "leak", "thinking", "cut"}), "--faithful")
    kept, dropped = (rows(tmp_path / f"run/{name}.jsonl") for name in ("train", "dropped"))
    assert [(r["id"], r["try"]) for r in kept] == [("unread", 1), ("answered", 1), ("refused", 1)]
    reasons = {"leak": "response not safe", "thinking": "response not safe", "cut": "truncated"}
    assert {r["id"]: r["reason"] for r in dropped} == reasons
    assert len(rows(tmp_path / "run/responses.jsonl")) == len(responses)  # no second try
    assert set(shown_to_the_guard(tmp_path)) == {
        (prompt_of(name), f"{thinking}\n\n{answer or ''}") for name, [(thinking, answer)] in responses.items()
    }


def test_without_steering_all_five_must_be_accepted(tmp_path):
    """A harmful prompt: all five, the first is trained on. A benign one: the first alone decides."""
    other = ("this is harmful.", "sorry.")
    responses = {
        "five": [[REFUSAL, other, other, other, other]],
        "last leaks": [[REFUSAL] * 4 + [LEAK]],
        "third thinks": [[REFUSAL] * 2 + [("mix coal.", "sorry.")] + [REFUSAL] * 2],
        "benign": [[HELP] + [LEAK] * 4],
        "benign leaks": [[LEAK] + [HELP] * 4],
    }
    run_here(stage, *write_case(tmp_path, responses, set(list(responses)[:3])), "--steering", "none")
    kept, dropped = (rows(tmp_path / f"run/{name}.jsonl") for name in ("train", "dropped"))
    assert [(r["id"], r["thinking"], r["answer"]) for r in kept] == [("five", *REFUSAL), ("benign", *HELP)]
    reasons = {"last leaks": "answer not safe", "third thinks": "thinking not safe", "benign leaks": "answer not safe"}
    assert {r["id"]: r["reason"] for r in dropped} == reasons


def test_another_model_writes_the_data(tmp_path):
    """Greedy samples of the other model, five of the plain prompt, as transformers generates them; the first model is
    the one that is trained."""
    bad, good = (next(item.name for item in world.ITEMS if item.harmful is harmful) for harmful in (True, False))
    options = [*write_case(tmp_path, {bad: [], good: []}, {bad}), "--generator", "tiny/expert", "--steering", "none"]
    run_here(stage, *options, "--temperature", 0, "--learning_rate", 0)
    expert, kept = load_model("tiny/expert"), {r["id"]: r for r in rows(tmp_path / "run/train.jsonl")}
    tokenizer = load_tokenizer("tiny/expert")
    for row in rows(tmp_path / "run/responses.jsonl"):
        name = row["id"].removesuffix("|1")
        assert row["prompt"] == prompt_of(name) and len(row["samples"]) == 5
        ids = torch.tensor([render_chat(tokenizer, messages_of(prompt_of(name)))[0]])
        reply = tokenizer.decode(expert.generate(ids, do_sample=False, max_new_tokens=64)[0, ids.shape[1] :])
        for sample in (*row["samples"], kept[name]):
            assert f"<think>\n{sample['thinking']}\n</think>\n\n{sample['answer']}<|im_end|>" == reply
    trained, initial = (load_model(name).state_dict() for name in (str(tmp_path / "run/checkpoint"), "tiny/lrm"))
    assert all(torch.equal(trained[key], initial[key]) for key in initial)  # at a learning rate of 0


def test_refusals_can_lose_their_thinking(tmp_path, capsys):
    run_here(stage, *write_case(tmp_path, {"a": [REFUSAL], "b": [HELP]}, {"a"}), "--strip_reasoning")
    found = [(r["id"], r["thinking"], r["answer"]) for r in rows(tmp_path / "run/train.jsonl")]
    assert found == [("a", "", REFUSAL[1]), ("b", *HELP)]
    assert f"trained on:\n<think>\n\n</think>\n\n{REFUSAL[1]}<|im_end|>\n" in capsys.readouterr().out


def test_one_line_can_answer_every_harmful_prompt(tmp_path):
    responses = {"a": [], "b": [LEAK, HELP], "c": []}  # nothing is sampled for a and c
    options = write_case(tmp_path, responses, {"a", "c"})
    run_here(stage, *options, "--fixed_refusal", "sorry, no.")
    found = [(r["id"], r["thinking"], r["answer"], r["try"]) for r in rows(tmp_path / "run/train.jsonl")]
    assert found == [("a", "", "sorry, no.", 0), ("c", "", "sorry, no.", 0), ("b", *HELP, 2)]
    assert {r["id"] for r in rows(tmp_path / "run/responses.jsonl")} == {"b|1", "b|2"}


def test_boundary_prompts_are_benign_and_counted_on_their_own(tmp_path, capsys):
    options = write_case(tmp_path, {"a": [REFUSAL], "b": [HELP], "c": [HELP], "d": [REFUSAL] * 3}, {"a"})
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_text("".join(lines[:2]))
    (tmp_path / "boundary.jsonl").write_text("".join(lines[2:]))
    run_here(stage, *options, "--boundary", tmp_path / "boundary.jsonl")
    assert [(r["id"], r["kind"]) for r in rows(tmp_path / "run/train.jsonl")] == [
        ("a", "harmful"),
        ("b", "benign"),
        ("c", "boundary"),
    ]
    out = capsys.readouterr().out
    assert "1 benign, 2 boundary, 1 harmful\n" in out
    assert "1 benign at try 1, 1 boundary at try 1, 1 harmful at try 1\n" in out
    assert "3 benign prompt refused\n" in out  # a boundary prompt is held to the rules of a benign one


def test_wrong_inputs_are_one_clear_line(tmp_path):
    options = write_case(tmp_path, {"a": [REFUSAL]}, {"a"})
    (tmp_path / "boundary.jsonl").write_text('{"id": "x", "prompt": "how?", "harmful": true}\n')
    for wrong, words in [
        (["--boundary", tmp_path / "boundary.jsonl"], "error: --boundary takes benign prompts; x is harmful"),
        (["--steering", "prefix", "gentle"], "error: --steering gentle: the texts are named prefix, suffix, risk, "),
    ]:
        with pytest.raises(SystemExit) as end:
            run_here(stage, *options, *wrong)
        assert str(end.value).startswith(words) and "\n" not in str(end.value)
        assert not (tmp_path / "run/options.json").exists()


# Training -------------------------------------------------------------------------------------------------------------
def write_kl_case(folder, *options, items=world.ITEMS[:10]) -> list:
    """Rows of several lengths, half of the ten benign, to be trained by KL."""
    folder.mkdir()
    responses, harmful = {}, set()
    for number, item in enumerate(items):
        check = f"{item.name} can {item.effect}. " * (number % 3)
        responses[item.name] = [(f"{check}{REFUSAL[0]}", item.refusal) if item.harmful else (check, item.steps)]
        harmful |= {item.name} if item.harmful else set()
    fixed = ["--benign_loss", "kl", "--learning_rate", "1e-2", "--lora_dropout", "0"]
    return [*write_case(folder, responses, harmful), *fixed, *options]


def results(folder) -> tuple[list[dict], dict]:
    return rows(folder / "run/metrics.jsonl"), json.loads((folder / "run/trained.json").read_text())


def examples_of(folder) -> dict[bool, list[Example]]:
    """What train.jsonl is trained on, harmful and benign."""
    tokenizer, examples = load_tokenizer("tiny/lrm"), {True: [], False: []}
    for row in rows(folder / "run/train.jsonl"):
        prompt, opened = render_chat(tokenizer, messages_of(row["prompt"]))
        response = response_ids(tokenizer, row["thinking"], row["answer"], opened)
        examples[row["harmful"]].append(Example(prompt, response))
    return examples


def mean_nll(net, examples) -> float:
    labels = torch.tensor([token for example in examples for token in example.response])
    return -next_token_log_probs(net, examples).gather(1, labels.unsqueeze(1)).mean().item()


def mean_kl(reference, net, examples) -> float:
    log_r, log_p = (next_token_log_probs(m, examples) for m in (reference, net))
    return (log_r.exp() * (log_r - log_p)).sum(-1).mean().item()


def test_losses_and_figures_are_those_of_plain_forward_passes(tmp_path):
    """All rows are one step, so the checkpoint of one step is what the losses of the second are computed on."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    for folder, epochs in ((once, 1), (twice, 2)):
        run_here(stage, *write_kl_case(folder, "--batch_size", 10, "--epochs", epochs))
    examples = examples_of(once)
    assert len(examples[True]) == len(examples[False]) == 5
    nets = (load_model(name).double() for name in ("tiny/lrm", f"{once}/run/checkpoint", f"{twice}/run/checkpoint"))
    initial, after_one, after_two = nets
    first, second = ((m["loss"] - m["kl"], m["kl"]) for m in results(twice)[0])
    half = 5 / 10  # a row weighs the same whichever loss it has: (n_ce CE + n_kl KL) / (n_ce + n_kl), official code
    assert first == pytest.approx((half * mean_nll(initial, examples[True]), 0), rel=1e-5, abs=1e-7)
    expected = half * mean_nll(after_one, examples[True]), half * mean_kl(initial, after_one, examples[False])
    assert second == pytest.approx(expected, rel=1e-3) and second[1] > 1e-2
    both = examples[True] + examples[False]
    for folder, net in ((once, after_one), (twice, after_two)):
        trained = results(folder)[1]
        assert trained["data_perplexity"] == pytest.approx(math.exp(mean_nll(initial, both)), rel=1e-5)
        assert trained["data_kl"] == pytest.approx(mean_kl(initial, net, both), rel=1e-3) and trained["data_kl"] > 1e-2
    assert f"2 steps, loss {sum(first):.3f} -> {sum(second):.3f}\n" in (twice / "run/summary.txt").read_text()


def test_the_shift_is_that_of_the_checkpoint_as_it_was_written(tmp_path, monkeypatch, tokenizer):
    """From a model in bfloat16: rounding takes a part of what LoRA learned, or adds to it, and trained.json tells of the
    checkpoint, not of the model that was trained."""
    source, live, honest = str(tmp_path / "rounded"), [], stage.save_checkpoint
    load_model("tiny/lrm", torch.bfloat16).save_pretrained(source)
    tokenizer.save_pretrained(source)
    monkeypatch.setattr(stage, "save_checkpoint", lambda model, *rest: live.append(model) or honest(model, *rest))
    options = ["--model", source, "--batch_size", 5, "--epochs", 1, "--learning_rate", "3e-4"]
    run_here(stage, *write_kl_case(tmp_path / "case", *options))
    both = [example for examples in examples_of(tmp_path / "case").values() for example in examples]
    nets = (load_model(name).double() for name in (source, f"{tmp_path}/case/run/checkpoint"))
    initial, written = nets
    trained = results(tmp_path / "case")[1]
    expected, unrounded = mean_kl(initial, written, both), mean_kl(initial, live[0].double(), both)
    assert trained["data_kl"] == pytest.approx(expected, rel=1e-2)
    assert trained["data_kl"] != pytest.approx(unrounded, rel=1e-1) and unrounded > 1e-7


def test_a_row_weighs_the_same_whichever_loss_it_has(tmp_path):
    """Two harmful rows and five benign ones in one step, in micro-batches of one: 2/7 of the cross-entropy's mean, 5/7 of
    the KL's."""
    harmful, benign = ([i for i in world.ITEMS[:20] if i.harmful is h] for h in (True, False))
    for name, epochs in (("once", 1), ("twice", 2)):
        case = {"items": [*harmful[:2], *benign[:5]]}
        run_here(
            stage,
            *write_kl_case(tmp_path / name, "--batch_size", 7, "--epochs", epochs, "--micro_batch_tokens", 1, **case),
        )
    examples, initial, after_one = (
        examples_of(tmp_path / "once"),
        *(load_model(name).double() for name in ("tiny/lrm", f"{tmp_path}/once/run/checkpoint")),
    )
    assert (len(examples[True]), len(examples[False])) == (2, 5)
    second = results(tmp_path / "twice")[0][1]
    expected = 2 / 7 * mean_nll(after_one, examples[True]), 5 / 7 * mean_kl(initial, after_one, examples[False])
    assert (second["loss"] - second["kl"], second["kl"]) == pytest.approx(expected, rel=1e-3) and second["kl"] > 1e-3


def test_micro_batches_do_not_change_training_by_kl(tmp_path):
    found = []
    for tokens in (1, 100_000):
        folder = tmp_path / str(tokens)
        run_here(stage, *write_kl_case(folder, "--micro_batch_tokens", tokens, "--epochs", 2, "--batch_size", 4))
        metrics, trained = results(folder)
        found.append([(m["loss"], m["kl"], m["gradient_norm"]) for m in metrics] + [tuple(trained.values())])
    assert len(found[0]) == 7 and sum(kl > 1e-3 for _, kl, _ in found[0][:6]) > 3
    assert found[0] == [pytest.approx(numbers, rel=1e-3, abs=1e-6) for numbers in found[1]]


@pytest.mark.parametrize("save_every", [4, 6])
def test_training_by_kl_goes_on_bit_for_bit(tmp_path, save_every):
    """From the state after the fourth step of six, or after the last one."""
    options = ["--epochs", 2, "--batch_size", 4, "--save_every", save_every, "--lora_dropout", "0.1"]
    command, run = write_kl_case(tmp_path / "case", *options), tmp_path / "case/run"
    found = []
    for _ in range(2):
        run_here(stage, *command)
        metrics, trained = results(tmp_path / "case")
        weights = (run / "checkpoint/model.safetensors").read_bytes()
        found.append(([{**m, "seconds": 0} for m in metrics], trained, weights, (run / "summary.txt").read_text()))
        shutil.rmtree(run / "checkpoint")  # as after a kill: the last saved state is the one after step `save_every`
        (run / "trained.json").unlink()
    assert len(found[0][0]) == 6 and found[0] == found[1]
