"""More of what mutations of the code had survived, as in test_oracles.py: each is held here by something outside it."""

import json
import math
import os
import random
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from chat_templates import tokenizer_of
from conftest import load, refused, rows, run_here

import engines
import judges
import plumbing
from common import Example, Trainer, add_lora, make_example, make_trainer, save_checkpoint, training_steps
from engines.hf import HfSampler

generate, verify, steer, grpo, evaluate = (
    load(name) for name in ("01_generate", "02_verify_sft", "03_steer_selfgen", "04_grpo", "05_eval")
)


class Enough(Exception):
    """A stage has come as far as the test wants it to."""


def caught(monkeypatch, owner, name: str) -> list:
    """What a function is called with, (args, keywords); the first call ends the stage."""
    calls = []

    def called(*args, **more):
        calls.append((args, more))
        raise Enough

    monkeypatch.setattr(owner, name, called)
    return calls


def sample(thinking: str, answer: str) -> dict:
    return {"thinking": thinking, "answer": answer, "state": "closed", "finish": "stop"}


# Options that must arrive ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("stage, files, options", [
    (generate, 1, []),
    (steer, 2, []),
    (grpo, 2, ["--steps", 1]),
    (evaluate, 1, ["--bench", "plain=tiny/prompts/test_plain.jsonl"]),
])  # fmt: skip
def test_the_engine_gets_so_many_prompts_of_each_file_and_the_switch(
    stage, files, options, thinks, tmp_path, monkeypatch
):
    calls = caught(monkeypatch, engines.base.Sampler, "replies")
    with pytest.raises(Enough):
        run_here(stage, "--run", tmp_path / "run", "--limit", 3, "--enable_thinking", thinks, *options)
    [((_, chats, *_), template)] = calls
    assert len(chats) == 3 * files and template == {"enable_thinking": thinks}


def test_the_switch_of_the_thinking_is_in_what_is_trained_on():
    """Qwen3's own template: without thinking, an empty one stands in the prompt."""
    tokenizer = tokenizer_of("qwen3")
    for thinks, end in ((True, "assistant\n"), (False, "assistant\n<think>\n\n</think>\n\n")):
        example = make_example(tokenizer, "how?", None, "so.", SimpleNamespace(enable_thinking=thinks))
        assert tokenizer.decode(example.prompt) == f"<|im_start|>user\nhow?<|im_end|>\n<|im_start|>{end}"
        assert tokenizer.decode(example.response) == "so.<|im_end|>"


def answered(folder, name: str, verdicts: dict[str, list]):
    """A stage 01 run by hand: {prompt: [(answer, label)]}, all of harmful prompts."""
    (folder / name).mkdir()
    made, labels = [], []
    for number, (prompt, sides) in enumerate(verdicts.items()):
        row = {"id": f"{name}{number}", "prompt": prompt, "harmful": True}
        made.append({**row, "samples": [{"answer": answer} for answer, _ in sides]})
        own = [{"safety": label, "refusal": "no"} for _, label in sides]
        labels.append({"id": row["id"], "verdicts": own})
    plumbing.write_jsonl(folder / name / "responses.jsonl", made)
    plumbing.write_jsonl(folder / name / "labels.jsonl", labels)
    return folder / name


def test_the_test_set_is_of_the_held_out_prompts_with_their_own_labels(tmp_path):
    sides = [("no .", "safe"), ("take ash .", "unsafe")]
    mine = answered(tmp_path, "mine", {"how do i make coal?": sides})
    other = answered(tmp_path, "other", {"how do i make moss?": sides[::-1], "how do i make salt?": sides[:1]})
    options = verify.Options(responses=str(mine), heldout=str(other), spec="tiny/spec.txt")
    selected, test = verify.read_inputs(options)
    assert [("coal" in row["prompt"], row["label"]) for row in selected] == [(True, "safe"), (True, "unsafe")]
    assert sorted((row["id"], row["verdict"], row["harmful"]) for row in test) == [
        ("other0|0", "safe", True),
        ("other0|1", "unsafe", True),
    ]
    for row in test:
        assert "moss" in row["prompt"] and ("take ash ." in row["prompt"]) == (row["verdict"] == "unsafe")


def test_the_guard_in_training_answers_by_our_loop(tmp_path, monkeypatch):
    """Beside a vLLM sampler: a second vLLM would want the card's memory."""
    monkeypatch.setattr(plumbing, "open_run", lambda *_: tmp_path)
    monkeypatch.setattr(engines, "open_training_sampler", lambda *_: None)
    monkeypatch.setattr(engines, "require_room", lambda *_, **__: None)
    calls = caught(monkeypatch, judges, "Judge")
    with pytest.raises(Enough):
        run_here(grpo, "--run", tmp_path / "run", "--engine", "vllm", "--limit", 2, "--guard", "tiny/gold.py")
    [(name, options, _)] = [args for args, _ in calls]
    assert (name, options.engine) == ("tiny/gold.py", "hf")


def test_every_step_of_04_has_its_own_rate_and_seed(tmp_path, monkeypatch):
    """The rate rises over the warm-up and stays; no two steps, and no two seeds, draw the same numbers."""
    seeds, respond = [], grpo.respond
    monkeypatch.setattr(grpo, "respond", lambda *args: seeds.append(args[4]) or respond(*args))
    options = ["--warmup_steps", 2, "--learning_rate", 1e-4, "--batch_size", 1, "--group_size", 2, "--limit", 1]
    options += ["--max_new_tokens", 4, "--keep_truncated", "--temperature", 1, "--guard", "tiny/gold.py"]
    run_here(grpo, "--run", tmp_path / "a", "--steps", 4, *options)
    assert [row["learning_rate"] for row in rows(tmp_path / "a/metrics.jsonl")] == [5e-5, 1e-4, 1e-4, 1e-4]
    run_here(grpo, "--run", tmp_path / "b", "--steps", 2, "--seed", 1, *options)
    assert len(seeds) == 6 and len(set(seeds)) == 6


# What the expert's reply teaches --------------------------------------------------------------------------------------
def test_the_critique_ends_where_the_last_verdict_begins():
    reply = "At first sight:\nVerdict: safe\nBut it names the parts.\nVerdict: unsafe\n"
    assert verify.parse_critique(reply) == ("At first sight:\nVerdict: safe\nBut it names the parts.", "unsafe")


@pytest.mark.parametrize("target, thinking, answer", [
    ("full", "it helps .", "Verdict: unsafe"),
    ("verdict", "", "Verdict: unsafe"),
    ("critique", "it helps .", ""),
    ("answer", "hm .", "it helps .\nVerdict: unsafe"),
])  # fmt: skip
def test_each_target_trains_on_its_part_of_the_reply(target, thinking, answer):
    reply = sample("hm .", "it helps .\nVerdict: unsafe")
    for label, keeps in (("unsafe", False), ("safe", False), ("safe", True)):
        made = verify.target_of(reply, label, verify.Options(target=target, keep_disagreements=keeps))
        differs = target != "answer" and label == "safe" and not keeps
        assert (made["trained_thinking"], made["trained_answer"]) == (thinking, answer)
        assert made["reason"] == ("verdict is not the guard's label" if differs else "")


@pytest.mark.parametrize("target, end", [("critique", "</think>"), ("verdict", "<|im_end|>"), ("full", "<|im_end|>")])
def test_a_critique_alone_ends_without_an_end(target, end, tmp_path, monkeypatch):
    """What follows `</think>` is left as it was: neither an answer nor an end is trained on."""
    reply = {**sample("", "it helps .\nVerdict: unsafe"), "tokens": 9}
    made = answered(tmp_path, "mine", {"how do i make moss?": [("no .", "safe"), ("mix ash with salt .", "unsafe")]})
    monkeypatch.setattr(engines, "open_sampler", lambda *_, **__: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(
        engines,
        "answer_prompts",
        lambda _, asked, *__, **___: [{**r, "samples": [reply], "prompt_tokens": 9} for r in asked],
    )
    calls = caught(monkeypatch, verify, "train")
    with pytest.raises(Enough):
        run_here(verify, "--run", tmp_path / "02", "--responses", made, "--target", target)
    [((_, _, [example], tokenizer), _)] = calls
    text = tokenizer.decode(example.response)
    assert text.endswith(end) and text.count("<|im_end|>") == (target != "critique")


def test_03_trains_on_the_prompt_as_it_was_asked_by_the_user(tmp_path, monkeypatch):
    """The steering is in what the model answered to and nowhere in what it is trained on."""
    guard = 'def judge(prompt, text):\n    return f\'Safety: Safe\\nRefusal: {"Yes" if "sorry" in text else "No"}\'\n'
    (tmp_path / "guard.py").write_text(guard)
    prompts = [{"id": i, "prompt": f"how do i make {i}?", "harmful": i == "moss"} for i in ("moss", "salt")]
    plumbing.write_jsonl(tmp_path / "prompts.jsonl", prompts)
    asked = []

    def answer_prompts(_, rows, *__, **___):
        asked.extend(row["prompt"] for row in rows)
        return [{**r, "samples": [sample("hm .", "sorry ." if r["harmful"] else "so .")]} for r in rows]

    monkeypatch.setattr(engines, "open_sampler", lambda *_, **__: SimpleNamespace(close=lambda: None))
    monkeypatch.setattr(engines, "answer_prompts", answer_prompts)
    calls = caught(monkeypatch, steer, "train")
    files = ["--prompts", tmp_path / "prompts.jsonl", "--guard", tmp_path / "guard.py"]
    with pytest.raises(Enough):
        run_here(steer, "--run", tmp_path / "run", "--benign_loss", "kl", *files)
    assert len(asked) == 2 and "harmful" in asked[0] and asked[1] == "how do i make salt?"
    [((_, _, items, tokenizer), _)] = calls
    assert [loss for _, loss in items] == ["ce", "kl"]
    shown = "<|im_start|>user\nhow do i make {}?<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(example.prompt) for example, _ in items] == [shown.format(i) for i in ("moss", "salt")]


# Metrics and summaries ------------------------------------------------------------------------------------------------
def test_safe_if_checked_by_hand():
    """Of seven thinkings five check: one has no readable verdict, one an unsafe answer, one none at all, which is safe."""
    labels = ["safe", "unsafe", "none", "controversial", "unparsed", "unsafe", "safe"]
    checks = {"a": [True, False, True, True, True, None, True]}
    row = {"id": "a", "prompt": "p", "harmful": True, "samples": [{}] * 7}
    verdicts = {"answer": {"a": [{"safety": label} for label in labels]}}
    assert evaluate.safe_if_checked([row], checks, verdicts)["safe_if_checked"] == {"a": [True, True, False, True]}


def test_a_model_is_compared_with_the_first_one_on_the_same_benchmark():
    """Unsafe answers of four: the first model 1 and 3 on two benchmarks, the other 2 and 3."""
    unsafe = {("base", "a"): 1, ("base", "b"): 3, ("other", "a"): 2, ("other", "b"): 3}
    responses, judged = {}, {}
    for (model, test), count in unsafe.items():
        key = (model, evaluate.Case(test, "preset", ""))
        made = [{"id": str(i), "prompt": "p", "harmful": True, "samples": [sample("", "x")]} for i in range(4)]
        verdicts = {str(i): [{"safety": "unsafe" if i < count else "safe", "refusal": "no"}] for i in range(4)}
        responses[key], judged[key] = made, {"judge": {"answer": verdicts, "response": verdicts}}
    options = evaluate.Options(judges=["judge"])
    results, _ = evaluate.compare_all(options, responses, judged, {key: {} for key in judged})
    asr = {(row["model"], row["benchmark"]): row for row in results if row["metric"] == "asr"}
    assert {key: row["value"] for key, row in asr.items()} == {key: count / 4 for key, count in unsafe.items()}
    assert [key for key, row in asr.items() if "change" in row] == [("other", "a"), ("other", "b")]
    assert [asr["other", test]["change"]["value"] for test in "ab"] == [1 / 4, 0]


def test_judges_read_the_answer_and_thinking_with_answer(tmp_path, monkeypatch):
    """Each of its own, in a file of its own; a response without a thinking is its answer."""
    read, made = {}, [{"id": "a", "prompt": "p", "harmful": True, "samples": [sample("hm", "no"), sample("", "so")]}]

    def judge_samples(judge, rows, path, text_of):
        read[path.name.split(".")[-2]] = [text_of(one) for row in rows for one in row["samples"]]

    monkeypatch.setattr(judges, "judge_samples", judge_samples)
    options = evaluate.Options(judges=["tiny/gold.py"])
    evaluate.judge_all(options, {("base", evaluate.Case("test", "preset", "")): made}, {"tiny/gold.py": "x"}, tmp_path)
    assert read == {"answer": ["no", "so"], "response": ["hm\n\nno", "so"]}


def test_the_metrics_of_a_step_by_hand(tmp_path):
    """Two groups of two; a response at the limit is cut though its thinking is closed; NaN is no reward."""
    nan, (safe, harm) = math.nan, ({"harmful": False}, {"harmful": True})
    told = [
        (harm, 1.0, 0.7, "stop", 4),
        (harm, 0.0, -0.7, "length", 8),
        (safe, 1.0, 0.0, "stop", 3),
        (safe, nan, nan, "stop", 5),
    ]
    rollouts = []
    for row, reward, advantage, finish, tokens in told:
        reply = engines.Reply("hm", False, 1, tokens, finish, None)
        parts = ([1], reply, ("t", "a", "closed"))
        one = grpo.Rollout({**row, "prompt": "p"}, *parts, {"safety": "safe"}, reward, advantage)
        rollouts.append(one)
    shown = {name: 0.0 for name in ("entropy", "kl", "clipped")}
    options = grpo.Options(run=str(tmp_path), group_size=2)
    metrics = grpo.report(rollouts, 3, shown, SimpleNamespace(log=lambda *_: None), options)
    assert metrics == pytest.approx({
        **{"reward": 0.666667, "reward_harmful": 0.5, "reward_benign": 1.0, "reward_maths": None, "reward_verify": None},
        **{"truncated": 0.25, "unparsed": 0.25, "zero_spread_groups": 0.5, "response_tokens": 5.0, **shown},
    })  # fmt: skip
    [group] = rows(tmp_path / "samples.jsonl")
    assert group["step"] == 3 and [one["reward"] for one in group["responses"]] == [1.0, 0.0]


def test_the_summary_of_03_names_the_categories_that_lose_the_largest_share(tmp_path):
    made = [{"id": f"a{i}", "category": "wide", "kind": "harmful"} for i in range(9)]
    made += [{"id": f"b{i}", "category": "narrow", "kind": "harmful"} for i in range(2)]
    lost = [made[0], made[1], made[9]]
    dropped = [{**row, "reason": "answer not safe"} for row in lost]
    plumbing.write_jsonl(tmp_path / "metrics.jsonl", [{"loss": 1.0}])
    plumbing.write_jsonl(tmp_path / "responses.jsonl", [{"samples": [sample("t", "a")]}])
    plumbing.write_atomic(tmp_path / "trained.json", '{"data_perplexity": 1, "data_kl": 0}')
    kept = [{**row, "try": 1} for row in made if row not in lost]
    plumbing.summarise_03(tmp_path, steer.Options(run=str(tmp_path)), made, kept, dropped, lost)
    assert "lost most   narrow 1 of 2, wide 2 of 9\n" in (tmp_path / "summary.txt").read_text()


# Training -------------------------------------------------------------------------------------------------------------
def test_gradients_are_clipped_at_a_norm_of_one():
    """Of all of them together, before the optimizer sees them; what is reported is the norm before."""
    trainer = make_trainer(Accelerator(), verify.Options())
    weights, seen = [p for p in trainer.model.parameters() if p.requires_grad], []
    for scale in (5.0, 0.5):
        for i, p in enumerate(weights):
            p.grad = torch.full_like(p, float(i == 3))
        weights[3].grad *= scale / weights[3].grad.norm()
        trainer.optimizer.step = lambda: seen.append(math.hypot(*(p.grad.norm().item() for p in weights)))
        assert trainer.step() == pytest.approx(scale, rel=1e-4)
    assert seen == pytest.approx([1.0, 0.5], rel=1e-3)


def test_sampling_is_by_the_model_without_its_dropout(model, tokenizer):
    sampler = HfSampler(model, tokenizer, 1000)
    sampler.push(model.train())
    assert not any(module.training for module in model.modules())


def test_the_dropout_of_every_step_is_another(tmp_path):
    """And that of a seed, and the same whenever the step is done again."""
    weight = torch.nn.Linear(1, 1)
    trainer = Trainer(Accelerator(), weight, None, torch.optim.AdamW(weight.parameters()))
    draws = []
    for number, seed in enumerate((0, 0, 1)):
        run = tmp_path / str(number)
        run.mkdir()
        options = SimpleNamespace(seed=seed, batch_size=1, save_every=100)
        for _, _, metrics in training_steps(run, options, [0], 4, lambda step: 0.1, trainer):
            draws.append(torch.rand(1).item())
            metrics |= {"loss": 0.0, "gradient_norm": 0.0}
    assert draws[:4] == draws[4:8] and len(set(draws)) == 8


# Engines --------------------------------------------------------------------------------------------------------------
def test_a_prompt_leaves_the_model_room_for_a_token(model, tokenizer):
    sampler, chat = HfSampler(model, tokenizer, 1000), [{"role": "user", "content": "how?"}]
    length = len(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=True)["input_ids"])
    for sampler.context, fits in ((length - 1, False), (length, False), (length + 1, True)):
        assert sampler.fits(chat) == fits


def test_a_batch_has_room_for_its_longest_responses(model, tokenizer, monkeypatch):
    """No batch of more than one prompt can outgrow --batch_tokens; every prompt comes once."""
    sampler, sizes = HfSampler(model, tokenizer, 200), []
    monkeypatch.setattr(sampler, "sample_batch", lambda part, n, s: sizes.append(part) or ["sample"] * len(part) * n)
    requests = [(str(i), [5] * (3 + i)) for i in range(12)]
    done = dict(sampler.generate(requests, 2, engines.Sampling(20, 1.0)))
    assert sorted(done) == list(range(12)) and all(len(samples) == 2 for samples in done.values())
    for part in sizes:
        width = max(len(ids) for _, ids in part) + 20
        assert len(part) == 1 or 2 * len(part) * width <= 200
    assert max(map(len, sizes)) > 1


# Rows and files ----------------------------------------------------------------------------------------------------------------
def test_a_large_file_is_known_by_more_than_its_beginning(tmp_path):
    """128 MiB, of which every second MiB is read, to the last of them."""
    file = tmp_path / "weights"
    prints = []
    for place in (None, 0, 2 * 40 << 20, 2 * 63 << 20):
        file.unlink(missing_ok=True)
        with file.open("wb") as f:
            f.truncate(128 << 20)
            if place is not None:
                f.seek(place)
                f.write(b"x")
        prints.append(plumbing.fingerprint(str(file)))
    assert len(set(prints)) == 4


def test_the_summary_names_the_best_check_not_the_last(tmp_path):
    step = {"reward": 0.5, **{f"reward_{kind}": None for kind in plumbing.KINDS}, "unparsed": 0.0, "truncated": 0.0}
    plumbing.write_jsonl(tmp_path / "metrics.jsonl", [step, step])
    checks = [{"step": 0, "score": 0.5}, {"step": 5, "score": 0.75}, {"step": 10, "score": 0.625}]
    plumbing.write_jsonl(tmp_path / "eval.jsonl", checks)
    options = grpo.Options(run=str(tmp_path), eval_prompts=["a.jsonl"], eval_every=5)
    assert plumbing.grpo_history(tmp_path, options)["best"] == f"{tmp_path}/best, step 5, score 0.750"


# Another round of mutations ---------------------------------------------------------------------------------------------
def test_biases_beside_lora(tokenizer, tmp_path):
    from transformers import AutoModelForCausalLM, Qwen2Config

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**sizes, **heads)).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.q_proj.bias)
    model.save_pretrained(tmp_path / "source")
    add_lora(model, 4, 8.0, 0.0, ["q_proj"], seed=1)
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(p, std=0.1)
    ids = torch.tensor([[4, 5, 6, 7]])
    trained = model(input_ids=ids).logits
    save_checkpoint(model, tokenizer, tmp_path / "checkpoint", str(tmp_path / "source"))
    merged = plumbing.load_whole(str(tmp_path / "checkpoint"), torch.float32)
    assert (merged(input_ids=ids).logits - trained).abs().max() < 1e-4


def test_benign_share_arrives(tmp_path):
    folder = answered(tmp_path, "mine", {"how do i make coal?": [("no .", "safe"), ("take ash .", "unsafe")]})
    tea = [
        {"id": f"b{i}", "prompt": f"tea {i}?", "harmful": False, "samples": [{"answer": "sure ."}]} for i in range(4)
    ]
    plumbing.append_jsonl(folder / "responses.jsonl", tea)
    labels = [{"id": row["id"], "verdicts": [{"safety": "safe", "refusal": "no"}]} for row in tea]
    plumbing.append_jsonl(folder / "labels.jsonl", labels)
    for share, benign in ((1.0, 4), (0.5, 2), (0.0, 0)):
        options = verify.Options(responses=str(folder), spec="tiny/spec.txt", benign_share=share)
        assert [row["harmful"] for row in verify.read_inputs(options)[0]] == [True] * 2 + [False] * benign


def test_figures_are_of_examples_from_everywhere(monkeypatch, tmp_path):
    seen = []

    def scorer(model, reference=None):
        def score(ids, mask, full_kl=False):
            seen.extend(ids[:, 0].tolist() if not full_kl else [])
            return SimpleNamespace(log_probs=torch.zeros(int(mask.sum())), divergence=torch.zeros(int(mask.sum())))

        score.model = model
        return score

    monkeypatch.setattr(steer, "load_model", lambda *_: SimpleNamespace(device="cpu"))
    monkeypatch.setattr(steer, "TokenScorer", scorer)
    for count in (512, 1500):
        seen.clear()
        items = [(Example([i], [7]), "ce") for i in range(count)]
        steer.perplexity_and_kl(items, steer.Options(), tmp_path)
        assert 200 < len(set(seen)) == len(seen) <= 512 and max(seen) > 0.99 * count


def test_shares_drawn_by_seed(monkeypatch, tmp_path):
    file, drawn = tmp_path / "p.jsonl", []
    lines = [{"id": str(i), "prompt": f"p{i}", "harmful": i < 30} for i in range(40)]
    plumbing.write_jsonl(file, lines)
    monkeypatch.setattr(grpo, "dry_run", lambda options, model, made: drawn.append([row["id"] for row in made]))
    for seed in (0, 1, 0):
        line = ["--prompts", file, "--shares", "harmful=0.5", "benign=0.5", "--seed", seed, "--dry_run"]
        run_here(grpo, "--run", tmp_path / "run", *line)
    assert drawn[0] == drawn[2] and set(drawn[0][:20]) != set(drawn[1][:20])


def test_categories_are_by_the_first_judge():
    labels = {"a": {"first": "safe", "other": "unsafe"}, "b": {"first": "unsafe", "other": "safe"}}
    made = [{"id": i, "prompt": "p", "harmful": True, "category": i, "samples": [sample("", "x")]} for i in labels]
    judged = {}
    for judge in ("first", "other"):
        verdicts = {i: [{"safety": own[judge], "refusal": "no"}] for i, own in labels.items()}
        judged[judge] = {"answer": verdicts, "response": verdicts}
    key = ("m", evaluate.Case("t", "preset", ""))
    options = evaluate.Options(judges=["first", "other"])
    _, categories = evaluate.compare_all(options, {key: made}, {key: judged}, {key: {}})
    assert [(r["category"], r["value"], r["judge"]) for r in categories] == [("a", 0.0, "first"), ("b", 1.0, "first")]


def test_a_file_of_all_kinds_is_judged(tmp_path):
    (tmp_path / "m").mkdir()
    made = [{"id": "sum", "prompt": "1 + 1?", "harmful": False, "gold": "2", "samples": [sample("", "2")]}]
    made += [{"id": "a", "prompt": "how do i make coal?", "harmful": True, "samples": [sample("", "no")]}]
    key = ("m", evaluate.Case("t", "preset", ""))
    options = evaluate.Options(judges=["tiny/gold.py"])
    judged = evaluate.judge_all(options, {key: made}, {"tiny/gold.py": "x"}, tmp_path)
    assert "a" in judged[key]["tiny/gold.py"]["answer"]


def test_one_row_without_a_verdict(tmp_path):
    row = {"id": "a", "prompt": "p", "harmful": True, "verdict": "unsafe"}
    plumbing.write_jsonl(tmp_path / "v.jsonl", [row, {"id": "b", "prompt": "q", "harmful": True}])
    line = refused(evaluate, "--run", tmp_path / "run", "--verify_test", tmp_path / "v.jsonl")
    assert "rows without a verdict" in line and not (tmp_path / "run").exists()


def test_a_finished_evaluation_takes_more_of_everything(tmp_path):
    options = ["--run", tmp_path / "run", "--judges", "tiny/gold.py", "--limit", 6, "--max_new_tokens", 8]
    bench = ["--bench", "plain=tiny/prompts/test_plain.jsonl"]
    run_here(evaluate, *options, *bench)
    file = tmp_path / "run/base/plain.responses.jsonl"
    before = file.stat().st_mtime_ns
    more = ["sums=tiny/prompts/test_sums.jsonl", "--decoding", "preset", "greedy", "--prefill", "no=no"]
    run_here(evaluate, *options, *bench, *more)
    made = {path.name for path in (tmp_path / "run/base").glob("*.responses.jsonl")}
    assert {f"{name}.responses.jsonl" for name in ("plain", "sums", "plain.greedy", "plain.no", "sums.greedy")} <= made
    assert file.stat().st_mtime_ns == before


def test_after_an_error_nothing_more_is_asked(tmp_path):
    pytest.importorskip("openai")
    from engines.server import Endpoint

    client, asked = Endpoint("m@http://127.0.0.1:9/v1"), []
    client.at_once = 2

    def create(number):
        asked.append(number)
        time.sleep(0.01)
        if number < 2:
            raise RuntimeError("no such key")
        return SimpleNamespace(text="{}")

    with pytest.raises(SystemExit, match="no such key"):
        list(client.answers(create, [{"number": i} for i in range(200)], lambda _: "x", "x"))
    assert len(asked) < 20


def test_a_tenth_is_no_warning():
    cut, whole = {"finish": "length", "state": "closed"}, {"finish": "stop", "state": "closed"}
    assert plumbing.cut_line([cut] + [whole] * 9, 64) == "10.0% of the responses"
    warning = "WARNING: 18.2% of the responses; raise --max_new_tokens (now 64)"
    assert plumbing.cut_line([cut] * 2 + [whole] * 9, 64) == warning


def test_many_rows_are_all_judged(tmp_path):
    (tmp_path / "rule.py").write_text("def judge(prompt, answer):\n    return f'Safety: {answer}\\nRefusal: No'\n")
    words = {i: random.Random(i).choice(["Safe", "Unsafe"]) for i in range(600)}
    made = [{"id": str(i), "prompt": "p", "samples": [sample("", word)]} for i, word in words.items()]
    judge = judges.Judge(str(tmp_path / "rule.py"), generate.Options())
    found = judges.judge_samples(judge, made, tmp_path / "labels.jsonl", lambda s: s["answer"])
    labels = {int(i): [verdict["safety"] for verdict in own] for i, own in found.items()}
    assert labels == {i: [word.lower()] for i, word in words.items()}
    assert len(rows(tmp_path / "labels.jsonl")) == 600


def test_first_and_last_tenth(tmp_path):
    step = {f"reward_{kind}": None for kind in plumbing.KINDS} | {"unparsed": 0.0, "truncated": 0.0}
    rewards = [0.0, 0.5, *[9.0] * 16, 0.5, 1.0]
    plumbing.write_jsonl(tmp_path / "metrics.jsonl", [{**step, "reward": reward} for reward in rewards])
    assert plumbing.grpo_history(tmp_path, grpo.Options(run=str(tmp_path)))["reward"] == "0.250 -> 0.750"


def test_results_name_the_guard_that_a_checkpoint_was_trained_with(tmp_path):
    for name, options in (("04", {"guard": "some/guard"}), ("02", {"expert": "e"})):
        shutil.copytree("tiny/lrm", tmp_path / name / "checkpoint")
        (tmp_path / name / "options.json").write_text(json.dumps({"options": options}))
    models = ["base=tiny/lrm", *(f"m{name}={tmp_path}/{name}/checkpoint" for name in ("02", "04"))]
    line = ["--bench", "plain=tiny/prompts/test_plain.jsonl", "--limit", 2, "--max_new_tokens", 4]
    run_here(evaluate, "--run", tmp_path / "05", *line, "--judges", "tiny/gold.py", "--models", *models)
    recipe = json.loads((tmp_path / "05/results.json").read_text())["recipe"]
    assert recipe["guards in training"] == ["some/guard"]
    made_by = [recipe["models"][model]["made by"] for model in ("base", "m02", "m04")]
    assert made_by == [None, {"expert": "e"}, {"guard": "some/guard"}]
    assert "Judges: tiny/gold.py; guard in training: some/guard." in (tmp_path / "05/results.md").read_text()


def test_the_summary_of_01_counts_mixed_prompts(tmp_path):
    labels = {"h0": "su", "h1": "ss", "h2": "uu?", "h3": "s?", "h4": "?", "b0": "ss", "b1": "su"}
    names = {"s": "safe", "u": "unsafe", "?": "unparsed"}
    made, verdicts = [], {}
    for name, signs in labels.items():
        one = {**sample("t", "a"), "tokens": 3}
        made.append({"id": name, "prompt": "p", "harmful": name[0] == "h", "samples": [one] * len(signs)})
        verdicts[name] = [{"safety": names[sign], "refusal": "no"} for sign in signs]
    plumbing.summarise_01(tmp_path, generate.Options(run=str(tmp_path)), made, verdicts)
    text = (tmp_path / "summary.txt").read_text()
    assert "2 always safe, 1 always unsafe, 1 mixed, 1 other" in text and "1 always safe, 1 mixed\n" in text


def test_another_gold_answer_is_refused(tmp_path):
    file = tmp_path / "sums.jsonl"
    line = ["--run", tmp_path / "run", "--bench", f"sums={file}", "--judges", "tiny/gold.py", "--max_new_tokens", 4]
    file.write_text('{"id": "a", "prompt": "what is 1 + 2?", "gold": "3"}\n')
    run_here(evaluate, *line)
    file.write_text('{"id": "a", "prompt": "what is 1 + 2?", "gold": "4"}\n')
    assert "benchmark sums" in refused(evaluate, *line)


def test_targets_are_pefts():
    peft_utils = pytest.importorskip("peft.tuners.tuners_utils")
    from peft import LoraConfig
    from plumbing.adapters import is_target

    names = ("self_attn.v_proj", "self_attn.qkv_proj", "mlp.up_proj", "mlp.gate_up_proj", "cross_self_attn.v_proj")
    for targets in (["v_proj"], ["self_attn.v_proj"], ["up_proj", "o_proj"], r".*\.v_proj", "v_proj"):
        for name in names:
            path = f"model.layers.0.{name}"
            theirs = bool(peft_utils.check_target_module_exists(LoraConfig(target_modules=targets), path))
            assert is_target({"target_modules": targets}, path) == theirs, (targets, path)


@pytest.mark.parametrize("stage, option", [(steer, "warmup"), (verify, "warmup"), (verify, "benign_share")])
def test_a_share_is_at_most_one(stage, option, tmp_path):
    line = refused(stage, "--run", tmp_path / "run", f"--{option}", 5)
    assert f"--{option} 5.0: it must be at most 1" in line


def test_a_finished_grpo_run_asked_again_keeps_its_log(tmp_path):
    line = ["--run", tmp_path / "run", "--limit", 4, "--steps", 2, "--batch_size", 2, "--group_size", 2]
    line += ["--guard", "tiny/gold.py", "--max_new_tokens", 40]
    run_here(grpo, *line)
    files = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    run_here(grpo, *line)
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == files


def test_the_page_shows_the_newest_self_check(tmp_path):
    from plumbing.transcripts import checks_of

    for age, (tag, says) in enumerate((("bbbbbb", "yes"), ("aaaaaa", "no"), ("cccccc", "no"))):
        file = tmp_path / f"plain.judge-{tag}.thinking.jsonl"
        plumbing.write_jsonl(file, [{"id": "a", "verdicts": [{"self_check": says}]}])
        os.utime(file, (1e9 - age, 1e9 - age))
    assert checks_of(f"{tmp_path}/plain.", "self_check:tiny/judge") == {"a": [{"self_check": "yes"}]}


def test_the_switch_of_the_thinking_is_the_experts_too(tmp_path, monkeypatch):
    folder = answered(tmp_path, "mine", {"how do i make coal?": [("no .", "safe"), ("take ash .", "unsafe")]})
    monkeypatch.setattr(engines, "open_sampler", lambda *_, **__: None)
    calls = caught(monkeypatch, engines, "answer_prompts")
    for target in ("full", "answer"):
        for thinks in (True, False):
            line = ["--responses", folder, "--target", target, "--enable_thinking", thinks]
            with pytest.raises(Enough):
                run_here(verify, "--run", tmp_path / f"{target}{thinks}", *line)
            assert calls.pop()[1] == {"enable_thinking": target == "answer" and thinks}


def asked_of_an_endpoint(monkeypatch, chats, n: int, *samplings) -> list[dict]:
    """The requests that it would be sent."""
    pytest.importorskip("openai")
    from engines.server import Endpoint

    client, asked = Endpoint("m@http://127.0.0.1:9/v1"), []
    monkeypatch.setattr(client, "answers", lambda create, requests, *_: asked.extend(requests) or iter(()))
    for s in samplings:
        list(client.replies(chats, n, s))
    return asked


def test_what_an_endpoint_is_asked(monkeypatch):
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    [request] = asked_of_an_endpoint(monkeypatch, [("a", chat)], 3, engines.Sampling(9, 0.6, 0.9, 0, 5))
    assert isinstance(request.pop("seed"), int)
    sampling = {"n": 3, "temperature": 0.6, "top_p": 0.9, "max_completion_tokens": 9}
    assert request == {"model": "m", **sampling, "messages": chat}


def test_the_seed_of_an_endpoint_is_a_small_number_of_seed_and_row(monkeypatch):
    chats = [(str(i), [{"role": "user", "content": "p"}]) for i in range(300)]
    both = [engines.Sampling(9, 0.6, 0.9, 0, seed) for seed in (0, 1)]
    seeds = [request["seed"] for request in asked_of_an_endpoint(monkeypatch, chats, 1, *both)]
    assert len(set(seeds)) == 600 and 0 <= min(seeds) and max(seeds) < 2**31


def test_lora_starts_by_the_seed():
    starts = []
    for seed in (0, 1, 0):
        trainer = make_trainer(Accelerator(), verify.Options(seed=seed))
        starts.append(trainer.model.model.layers[0].self_attn.q_proj.A.detach())
    assert torch.equal(starts[0], starts[2]) and not torch.equal(starts[0], starts[1])


@pytest.mark.parametrize("stage", [verify, steer])
def test_the_dropout_of_lora_arrives(stage, tmp_path, monkeypatch):
    made, honest = [], stage.make_trainer
    monkeypatch.setattr(stage, "make_trainer", lambda *args, **more: made.append(honest(*args, **more)) or made[0])
    monkeypatch.setattr(stage, "epochs_of", lambda *_: [])
    monkeypatch.setattr(stage, "save_checkpoint", lambda *_: None)
    stage.train(stage.Options(lora_dropout=0.25), tmp_path, [], None)
    layer = made[0].model.model.layers[0].self_attn.q_proj
    assert layer.dropout.p == 0.25 and layer.dropout.training


def test_many_cut_responses_are_said_by_04(tmp_path):
    step = {"reward": 0.5, **{f"reward_{kind}": None for kind in plumbing.KINDS}, "unparsed": 0.0}
    options = grpo.Options(run=str(tmp_path), max_new_tokens=40)
    warning = "WARNING: 25.0% of the responses; raise --max_new_tokens (now 40)"
    for shares, said in (((0.0, 0.2), None), ((0.0, 0.5), warning)):
        plumbing.write_jsonl(tmp_path / "metrics.jsonl", [{**step, "truncated": share} for share in shares])
        assert plumbing.grpo_history(tmp_path, options).get("cut") == said


def test_what_was_answered_before_stays_known(tmp_path):
    line = ["--run", tmp_path / "run", "--judges", "tiny/gold.py", "--max_new_tokens", 4]
    files = {}
    for name in "ab":
        files[name] = tmp_path / f"{name}.jsonl"
        files[name].write_text(f'{{"id": "{name}", "prompt": "what is 1 + 2?", "gold": "3"}}\n')
        run_here(evaluate, *line, "--bench", f"{name}={files[name]}")
    files["a"].write_text('{"id": "a", "prompt": "what is 2 + 2?", "gold": "4"}\n')
    assert "benchmark a" in refused(evaluate, *line, "--bench", f"a={files['a']}")


def test_a_limit_draws_from_the_whole_file(tmp_path):
    file, rows_in_it = tmp_path / "p.jsonl", range(1000)
    plumbing.write_jsonl(file, [{"id": str(i), "prompt": f"p{i}", "harmful": i < 500} for i in rows_in_it])
    drawn = plumbing.load_prompts([str(file)], 100)
    assert len(drawn) == 100 and drawn == plumbing.load_prompts([str(file)], 100)
    assert 25 < sum(row["harmful"] for row in drawn) < 75
    assert plumbing.load_prompts([str(file)], 1000) == plumbing.load_prompts([str(file)])


def test_options_may_be_spelled_with_dashes(monkeypatch):
    for name in ("--max_new_tokens", "--max-new-tokens"):
        monkeypatch.setattr(sys, "argv", ["01_generate.py", name, "7"])
        assert plumbing.parse_options(generate.Options, generate.__doc__).max_new_tokens == 7
