"""What mutations of the code had survived: each is held here by something outside it, counted by hand."""

import json
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import load, rows, run_here

import engines
import judges
from common import Trainer, make_trainer, training_steps

generate, verify, evaluate = (load(name) for name in ("01_generate", "02_verify_sft", "05_eval"))


def test_f1_in_the_results_is_that_of_precision_and_recall():
    """Of ten answers seven are unsafe; the model says so of five and of two safe ones: P 5/7, R 5/7. Then R alone moves."""
    for said_of_unsafe, said_of_safe in ((5, 2), (3, 0), (7, 3)):
        texts = ["unsafe"] * said_of_unsafe + ["safe"] * (7 - said_of_unsafe)
        texts += ["unsafe"] * said_of_safe + ["safe"] * (3 - said_of_safe)
        asked = []
        for i, text in enumerate(texts):
            sample = {"thinking": "", "answer": f"Verdict: {text}", "state": "closed"}
            asked.append({"id": str(i), "harmful": True, "verdict": "unsafe" if i < 7 else "safe", "samples": [sample]})
        key = ("m", evaluate.Case("verify", "preset", ""))
        results, _ = evaluate.compare_all(evaluate.Options(judges=[]), {key: asked}, {key: {}}, {key: {}})
        by_metric = {row["metric"]: row for row in results}
        precision, recall = said_of_unsafe / (said_of_unsafe + said_of_safe), said_of_unsafe / 7
        f1 = by_metric["verify_f1"]
        assert f1["value"] == pytest.approx(2 * precision * recall / (precision + recall))
        assert f1["low"] < f1["value"] < f1["high"] or f1["value"] == 1
        assert by_metric["verify_precision"]["value"] == pytest.approx(precision)
        assert by_metric["verify_recall"]["value"] == pytest.approx(recall)


def test_precision_and_recall_of_a_judge_are_not_each_other():
    """Three answers are unsafe, the other judge sees one of them and calls a safe one unsafe."""
    verdicts = {}
    for judge, labels in (("first", "uuus"), ("other", "ussu")):
        safety = [{"safety": {"u": "unsafe", "s": "safe"}[label]} for label in labels]
        verdicts[judge] = {"answer": {str(i): [verdict] for i, verdict in enumerate(safety)}}
    assert judges.agreement([verdicts], "first", "other") == {
        "precision": 1 / 2,
        "recall": pytest.approx(1 / 3),
        "n": 4,
    }


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    """A stage 01 run whose guard writes down what it is shown."""
    folder = tmp_path_factory.mktemp("answered")
    log = folder / "log.jsonl"
    (folder / "guard.py").write_text(
        "import json\nfrom tiny import gold\n\ndef judge(prompt, answer):\n"
        f"    open({str(log)!r}, 'a').write(json.dumps(answer) + '\\n')\n    return gold.judge(prompt, answer)\n"
    )
    options = ["--limit", 12, "--n", 4, "--temperature", 1, "--guard", folder / "guard.py"]
    run_here(generate, "--run", folder / "01", *options)
    return folder


def test_the_guard_of_stage_01_reads_answers_and_no_thinking(answered):
    samples = [sample for row in rows(answered / "01/responses.jsonl") for sample in row["samples"]]
    shown = {json.loads(line) for line in (answered / "log.jsonl").open()}
    assert shown == {sample["answer"] for sample in samples if sample["answer"]}
    assert all(sample["thinking"] for sample in samples) and not shown & {sample["thinking"] for sample in samples}


def test_the_expert_is_greedy_and_nothing_decays(answered, tmp_path, monkeypatch):
    """Every reply is transformers' own greedy one; AdamW's weight decay is 0, so a weight without a gradient stays."""
    asked, answer = [], engines.answer_prompts
    monkeypatch.setattr(engines, "answer_prompts", lambda *args, **more: asked.append(args[4]) or answer(*args, **more))
    run_here(verify, "--run", tmp_path / "02", "--responses", answered / "01", "--epochs", 1)
    assert [(s.temperature, s.max_new_tokens) for s in asked] == [(0.0, 64)]
    options = verify.Options(learning_rate=0.1)
    trainer = make_trainer(Accelerator(), options)
    layer = trainer.model.model.layers[0].self_attn.q_proj
    before = layer.A.detach().clone()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    trainer.step()
    assert torch.equal(layer.A, before) and before.abs().max() > 0


def test_an_expert_that_answers_thinks_and_has_room_to(answered, tmp_path, monkeypatch):
    """Ordinary SFT on an expert without its thinking would train a reasoning model's thinking away."""
    asked, answer = [], engines.answer_prompts
    monkeypatch.setattr(engines, "answer_prompts", lambda *a, **more: asked.append((a[4], more)) or answer(*a, **more))
    options = ["--responses", answered / "01", "--epochs", 1, "--target", "answer", "--answer_temperature", 0.6]
    run_here(verify, "--run", tmp_path / "02", *options, "--max_answer_tokens", 80, "--seed", 3)
    [(sampling, template)] = asked
    assert sampling == engines.Sampling(80, 0.6, top_p=0.95, top_k=0, seed=3) and template == {"enable_thinking": True}
    kept = rows(tmp_path / "02/train.jsonl")
    assert kept and all(row["prompt"] == row["request"] for row in kept)


def test_sampler_and_trainer_agree_in_bfloat16(model, tokenizer, requests):
    """As on a GPU: weights in float32, both under autocast; the gap stays below what stops a run."""
    from common import Example, TokenScorer, pad_batch
    from engines.hf import HfSampler

    with torch.autocast("cpu", torch.bfloat16):
        sampled = dict(HfSampler(model, tokenizer, 10_000).generate(requests, 2, engines.Sampling(30, 0.7, seed=1)))
        examples = [Example(requests[i][1], s.ids) for i in sampled for s in sampled[i]]
        trained = TokenScorer(model)(*pad_batch(examples), 0.7).log_probs
    ours = torch.tensor([p for i in sampled for s in sampled[i] for p in s.log_probs])
    exact = TokenScorer(model)(*pad_batch(examples), 0.7).log_probs
    assert (ours - trained).abs().mean() < 0.05 and (ours - exact).abs().max() > 1e-4  # it was bfloat16


def test_every_epoch_has_an_order_of_its_own(tmp_path):
    """Each epoch holds every item once; no two of five have the same order; another seed has others."""
    parameter = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(parameter.parameters())
    trainer = Trainer(Accelerator(), parameter, None, optimizer)
    orders = {}
    for seed in (0, 1):
        options = SimpleNamespace(seed=seed, batch_size=4, save_every=1000)
        run = tmp_path / str(seed)
        run.mkdir()
        batches = []
        for _, batch, metrics in training_steps(run, options, list(range(10)), 15, lambda step: 0.1, trainer):
            batches.append(batch)
            metrics |= {"loss": 0.0, "gradient_norm": 0.0}
        assert [len(batch) for batch in batches] == [4, 4, 2] * 5
        orders[seed] = [sum(batches[e * 3 : e * 3 + 3], []) for e in range(5)]
        assert all(sorted(order) == list(range(10)) for order in orders[seed])
        assert len({tuple(order) for order in orders[seed]}) == 5
    assert orders[0] != orders[1]
