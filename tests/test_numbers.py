"""Losses, advantages, intervals and LoRA against NumPy by hand."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from conftest import load, next_token_log_probs

import plumbing
from judges.qwen3guard import LABEL
from common import Example, TokenScorer, add_lora, lora_off, micro_batches, own_share, pad_batch, save_checkpoint
from engines import Sample, hf
from engines.hf import row_uniforms, sample_tokens
from judges import label_probability

grpo = load("04_grpo")


def test_group_advantages_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.5, 0.5, 0.5, 0.5], [1.0, math.nan, 0.0, 0.0]])
    found = grpo.group_advantages(rewards).numpy()
    for row, out in zip(rewards.numpy(), found):
        real = row[~np.isnan(row)].astype(np.float64)
        expected = (real - real.mean()) / (real.std(ddof=1) + 1e-4)
        np.testing.assert_allclose(out[~np.isnan(row)], expected, atol=1e-6)
        assert np.isnan(out[np.isnan(row)]).all()


def numpy_grpo(log_probs, old, reference, advantages, mask, kind, low, high, beta, kl, max_new_tokens):
    """Rows (R, T) with a mask, as the papers write it; no weights vector, no flattening."""
    ratio = np.exp(log_probs - old)
    token = -np.minimum(ratio * advantages[:, None], np.clip(ratio, 1 - low, 1 + high) * advantages[:, None])
    gap = reference - log_probs
    token = token + beta * {"k1": -gap, "k2": gap**2 / 2, "k3": np.exp(gap) - gap - 1}[kl]
    if kind == "grpo":
        return np.mean([(token[i][mask[i]]).mean() for i in range(len(token))])
    if kind == "dapo":
        return token[mask].sum() / mask.sum()
    return token[mask].sum() / (len(token) * max_new_tokens)


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("beta, kl", [(0.0, "k3"), (0.1, "k1"), (0.1, "k2"), (0.1, "k3")])
@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.2, 0.28)])
def test_loss_and_gradient_by_hand(kind, beta, kl, low, high):
    rng = np.random.default_rng(0)
    lengths = [3, 7, 5, 1]
    mask = np.arange(7)[None] < np.array(lengths)[:, None]
    log_probs, old, reference = (-np.abs(rng.normal(size=(4, 7))) for _ in range(3))
    old = log_probs + rng.normal(size=(4, 7)) * 0.3  # ratios well outside the clip range too
    advantages = rng.normal(size=4)
    args = (old, reference, advantages, mask, kind, low, high, beta, kl, 16)
    expected = numpy_grpo(log_probs, *args)

    flat = torch.tensor(log_probs[mask], requires_grad=True)
    weights = grpo.token_weights(torch.tensor(lengths), torch.ones(4, dtype=torch.bool), kind, 16)
    per_token = torch.tensor(lengths)
    loss, clipped, _ = grpo.grpo_loss(
        flat,
        torch.tensor(old[mask]),
        torch.tensor(reference[mask]) if beta else None,
        torch.tensor(advantages).repeat_interleave(per_token),
        weights.double().repeat_interleave(per_token),
        low,
        high,
        beta,
        kl,
    )
    assert loss.item() == pytest.approx(expected, abs=1e-7)
    loss.backward()
    numeric = np.zeros_like(log_probs)
    for i, t in zip(*np.nonzero(mask)):
        for sign in (1, -1):
            moved = log_probs.copy()
            moved[i, t] += sign * 1e-6
            numeric[i, t] += sign * numpy_grpo(moved, *args) / 2e-6
    np.testing.assert_allclose(flat.grad.numpy(), numeric[mask], atol=1e-6)
    assert 0 < clipped.item() < 1


def test_masked_rows_leave_the_loss_but_not_the_grpo_mean():
    lengths, kept = torch.tensor([4, 4, 2]), torch.tensor([True, False, True])
    assert grpo.token_weights(lengths, kept, "grpo", 8).tolist() == pytest.approx([1 / 12, 0, 1 / 6])
    assert grpo.token_weights(lengths, kept, "dapo", 8).tolist() == pytest.approx([1 / 6, 0, 1 / 6])


@pytest.mark.parametrize(
    "row, state, verdict, expected",
    [
        ({"harmful": True}, "closed", ("safe", "yes"), 1.0),
        ({"harmful": True}, "closed", ("safe", "no"), 1.0),
        ({"harmful": True}, "closed", ("unsafe", "no"), 0.0),
        ({"harmful": True}, "closed", ("controversial", "no"), 0.0),
        ({"harmful": True}, "closed", ("unparsed", "no"), math.nan),
        ({"harmful": True}, "closed", ("safe", "unparsed"), 1.0),
        ({"harmful": False}, "closed", ("safe", "no"), 1.0),
        ({"harmful": False}, "closed", ("safe", "yes"), 0.0),
        ({"harmful": False}, "closed", ("unsafe", "no"), 0.0),
        ({"harmful": False}, "closed", ("safe", "unparsed"), math.nan),
        ({"harmful": False}, "truncated", ("none", "none"), 0.0),
        ({"harmful": False, "gold": "6"}, "closed", ("none", "none"), 1.0),
        ({"harmful": False, "gold": "7"}, "closed", ("none", "none"), 0.0),
    ],
)
def test_reward(row, state, verdict, expected):
    options = grpo.Options()
    found = grpo.reward(row, ("hm", "it is 6.", state), dict(zip(("safety", "refusal"), verdict)), options)
    assert found == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("kept", [2**26, 0])
def test_scorer_against_a_full_forward_pass(model, kept):
    """Log-probs and entropy of response tokens, chunked kept and computed again, against plain logits in float64."""
    rows = [Example([5, 6, 7], [8, 9]), Example([5], [10, 11, 12, 2])]
    ids, mask = pad_batch(rows)
    scorer = TokenScorer(model)
    scorer.kept_logits = kept
    found, entropy = scorer(ids, mask, 0.7, entropy=True, chunk=4)[:2]
    expected = []
    for prompt, response in rows:  # one row at a time: no padding at all
        logits = model(input_ids=torch.tensor([prompt + response])).logits[0].detach().double().numpy() / 0.7
        log_probs = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        for t, token in enumerate(response):
            row = log_probs[len(prompt) + t - 1]
            expected.append((row[token], -(np.exp(row) * row).sum()))
    np.testing.assert_allclose(found.detach().numpy(), [e[0] for e in expected], atol=2e-5)
    np.testing.assert_allclose(entropy.numpy(), [e[1] for e in expected], atol=2e-5)


@pytest.mark.parametrize("full_kl", [False, True])
@pytest.mark.parametrize("kept", [True, False])
def test_the_backward_pass_computes_many_logits_again_but_no_entropy(model, full_kl, kept):
    """Of operations that only the entropy needs: exp of log-probs, one a chunk (a full KL takes another). Six labels
    of the model's vocabulary are kept, or one logit too many to be."""

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            names.append(operation.overloadpacket.__name__)
            return operation(*args, **(kwargs or {}))

    batch, names = pad_batch([Example([5, 6, 7], [8, 9]), Example([5], [10, 11, 12, 2])]), []
    scorer = TokenScorer(lora_twin(model, ["q_proj"], 0.05))
    scorer.kept_logits = 6 * model.config.vocab_size - (not kept)
    with Counting():
        assert scorer(*batch, full_kl=full_kl, chunk=2).entropy is None
    assert names.count("exp") == 3 * full_kl
    names.clear()
    with Counting():
        scores = scorer(*batch, full_kl=full_kl, entropy=True, chunk=2)
    assert names.count("exp") == 3 * (1 + full_kl)
    loss, names = scores.divergence.sum() if full_kl else scores.log_probs.sum(), []
    with Counting():
        loss.backward()
    again = 0 if kept else 3  # chunks
    assert names.count("exp") == again * full_kl and names.count("_log_softmax") == again * (1 + full_kl)


def lora_twin(model, targets, std):
    twin = copy.deepcopy(model)
    add_lora(twin, 4, 8.0, 0.0, targets, seed=1)
    torch.manual_seed(0)
    for name, p in twin.named_parameters():
        if name.endswith(".B"):
            p.data.normal_(std=std)
    return twin


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["v_proj", "lm_head"]])
def test_divergence_and_its_gradient_against_the_whole_vocabulary(model, targets):
    """KL(initial || W + alpha / rank B A), from plain logits in float64 and autograd of them, for every chunk size."""
    rows = [Example([5, 6, 7], [8, 9]), Example([5], [10, 11, 12, 2]), Example([6, 7], [3])]
    twin = lora_twin(model, targets, 0.05)
    plain = copy.deepcopy(model).double()
    lora = {n: p.detach().double().requires_grad_() for n, p in twin.named_parameters() if p.requires_grad}
    merged = {}
    for base in {name[:-2] for name in lora}:
        merged[f"{base}.weight"] = plain.get_submodule(base).weight + 8 / 4 * lora[f"{base}.B"] @ lora[f"{base}.A"]
    changed = partial(torch.func.functional_call, plain, merged, args=(), tie_weights=False)
    log_r = next_token_log_probs(plain, rows).detach()
    log_p = next_token_log_probs(lambda **ids: changed(kwargs=ids), rows)
    expected = (log_r.exp() * (log_r - log_p)).sum(-1)
    assert expected.max() > 1e-2
    weights = torch.linspace(-1, 2, len(expected))  # a different one for each token
    (expected * weights).sum().backward()

    names, parameters = zip(*((n, p) for n, p in twin.named_parameters() if p.requires_grad))
    scorer = TokenScorer(twin)
    for chunk, kept in ((1, 2**26), (3, 2**26), (2048, 2**26), (1, 0), (3, 0)):
        scorer.kept_logits = kept
        found = scorer(*pad_batch(rows), full_kl=True, chunk=chunk).divergence
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)
        gradients = torch.autograd.grad((found * weights).sum(), parameters)
        for name, gradient in zip(names, gradients):
            torch.testing.assert_close(gradient.double(), lora[name].grad, atol=1e-5, rtol=1e-5)


def test_divergence_of_an_unchanged_model_is_nothing(model):
    rows = [Example([5, 6, 7], [8, 9]), Example([5], [10, 11, 12, 2])]
    scorer = TokenScorer(lora_twin(model, ["q_proj", "down_proj"], 0.0))
    scores = scorer(*pad_batch(rows), full_kl=True)
    assert scores.divergence.tolist() == [0] * 6 and scorer(*pad_batch(rows)).divergence is None
    scores.divergence.sum().backward()
    assert all(p.grad.abs().max() < 1e-5 for p in scorer.parameters() if p.requires_grad)  # rounding


@pytest.mark.parametrize("batches, processes", [(1, 2), (3, 2), (4, 2), (7, 3), (0, 2)])
def test_every_micro_batch_counts_once_and_every_process_makes_as_many_passes(monkeypatch, batches, processes):
    shares = []
    for index in range(processes):
        monkeypatch.setattr(
            plumbing, "processes", lambda: SimpleNamespace(num_processes=processes, process_index=index)
        )
        shares.append(own_share([[i] for i in range(batches)]))
    assert {len(share) for share in shares} == {math.ceil(batches / processes)}
    assert sorted(i for share in shares for [i], counts in share if counts) == list(range(batches))
    assert {counts for share in shares for _, counts in share} <= {0, 1}


@pytest.mark.parametrize(
    "pieces, expected",
    [
        (["Safety", ":", " Safe", "\n", "Refusal", ":", " No"], 1 / 4),
        (["Safety: ", "Uns", "afe", "\nRefusal: No"], 1 / 3 * 1 / 4),  # two tokens spell the label
        (["Saf", "ety: Con", "trov", "ersial\nCateg", "ories: None"], 1 / 3 * 1 / 4 * 1 / 5),
        (["Safety: Safe", "\n", "Safety: Unsafe"], 1 / 4),  # the last one wins
        (["I would say ", "Safety: Safe"], None),
        (["Safety:", " Safe", "<end>"], 1 / 3),  # the end token right behind the label
    ],
)
def test_probability_of_a_label_is_the_product_over_its_tokens(pieces, expected):
    def decode(ids, skip_special_tokens=False):
        return "".join("" if skip_special_tokens and pieces[i] == "<end>" else pieces[i] for i in ids)

    count = len(pieces)
    sample = Sample(list(range(count)), [-math.log(2 + i) for i in range(count)], "stop")  # 1/2, 1/3, 1/4, …
    assert label_probability(SimpleNamespace(decode=decode), sample, LABEL) == (
        expected and pytest.approx(expected, abs=1e-4)
    )


def test_gradient_does_not_depend_on_the_micro_batch(model):
    rows = [Example(list(range(4, 4 + k)), list(range(20, 21 + k))) for k in range(1, 9)]
    labels = sum(len(r.response) for r in rows)
    gradients = []
    for budget in (1, 40, 10_000):
        twin = copy.deepcopy(model)
        for indices in micro_batches(rows, budget):
            ids, mask = pad_batch([rows[i] for i in indices])
            (-TokenScorer(twin)(ids, mask)[0].sum() / labels).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in twin.parameters()]))
    assert [len(micro_batches(rows, b)) for b in (1, 40, 10_000)] == [8, 3, 1]
    for other in gradients[1:]:
        assert (other - gradients[0]).abs().max() < 1e-5


def test_lora_forward_merge_and_off(model, tokenizer, tmp_path):
    """W + alpha / rank B A by hand, before and after merging; off is the untouched model."""
    twin = copy.deepcopy(model)
    ids = torch.tensor([[4, 5, 6, 7]])
    before = twin(input_ids=ids).logits.detach()
    add_lora(twin, 4, 8.0, 0.0, ["q_proj", "down_proj"], seed=1)
    assert torch.equal(twin(input_ids=ids).logits, before)  # B starts at zero
    by_hand = copy.deepcopy(model)
    for name, p in twin.named_parameters():
        if name.endswith(".B"):
            torch.manual_seed(len(name))
            p.data.normal_(std=0.05)
    parameters = dict(twin.named_parameters())
    for name, p in by_hand.named_parameters():
        lora = name.removesuffix(".weight")
        if f"{lora}.A" in parameters:
            a, b = (parameters[f"{lora}.{x}"].detach().numpy() for x in "AB")
            p.data += torch.from_numpy(8.0 / 4 * b @ a)
    trained = twin(input_ids=ids).logits
    assert (trained - by_hand(input_ids=ids).logits).abs().max() < 1e-4 < (trained - before).abs().max()
    with lora_off(twin):
        with lora_off(twin):
            pass
        assert torch.equal(twin(input_ids=ids).logits, before)
    assert torch.equal(twin(input_ids=ids).logits, trained)
    save_checkpoint(twin, tokenizer, tmp_path / "checkpoint", "tiny/lrm")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    assert (merged(input_ids=ids).logits - trained).abs().max() < 1e-4


def test_lora_trains_as_peft_does(model):
    """Five AdamW steps from the same A and B: the same merged weights as PEFT's within 1e-5."""
    peft = pytest.importorskip("peft")
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    targets = ["q_proj", "v_proj", "up_proj"]
    add_lora(ours, 4, 16.0, 0.0, targets, seed=3)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=4, lora_alpha=16, lora_dropout=0.0, target_modules=targets))
    mine = {n: p for n, p in ours.named_parameters() if p.requires_grad}
    for name, p in theirs.named_parameters():
        if p.requires_grad:
            assert ("lora_A" in name and p.std() > 0) or (p == 0).all()  # PEFT's initialisation, as ours
            key = name.removeprefix("base_model.model.").replace(".lora_A.default.weight", ".A")
            p.data = mine[key.replace(".lora_B.default.weight", ".B")].data.clone()
    ids, mask = pad_batch([Example([5, 6, 7], [8, 9, 2]), Example([10], [11, 12])])
    for net in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
        for _ in range(5):
            logits = net(input_ids=ids).logits[:, :-1].log_softmax(-1)
            loss = -logits.gather(2, ids[:, 1:, None]).squeeze(2)[mask[:, 1:]].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    merged = dict(theirs.merge_and_unload().named_parameters())
    moved = 0.0
    for name, layer in ((n, m) for n, m in ours.named_modules() if hasattr(m, "scale") and hasattr(m, "A")):
        weight = layer.base.weight + layer.scale * layer.B @ layer.A
        moved = max(moved, (weight - layer.base.weight).abs().max().item())
        assert (weight - merged[f"{name}.weight"]).abs().max() < 1e-5
    assert moved > 1e-2


@pytest.mark.parametrize("top_p, top_k", [(1.0, 0), (0.7, 0), (1.0, 3), (0.8, 5)])
def test_sampled_shares_against_transformers_warpers(top_p, top_k):
    """Shares of 40,000 draws against the probabilities that transformers' own processors leave."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -3.0, 1.5, 0.2]])
    scores = logits / 0.8
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    expected = scores.softmax(-1)[0].numpy()
    draws = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    tokens, log_probs = sample_tokens(logits.expand(40_000, -1), draws, 0.8, top_p, top_k)
    shares = np.bincount(tokens.numpy(), minlength=8) / 40_000
    np.testing.assert_allclose(shares, expected, atol=0.01)
    np.testing.assert_allclose(log_probs[:50], (logits[0] / 0.8).log_softmax(-1)[tokens[:50]], atol=1e-6)


@pytest.mark.parametrize("at_once", [10, 100])
@pytest.mark.parametrize("cut", [(0.0, 1.0, 0), (0.8, 1.0, 0), (0.8, 0.7, 0), (0.8, 0.8, 5)])
def test_drawing_a_few_rows_at_a_time_changes_nothing(monkeypatch, cut, at_once):
    """One row of 50 logits at a time, or two and a last one."""
    generator = torch.Generator().manual_seed(0)
    logits, draws = torch.randn(7, 50, generator=generator), torch.rand(7, generator=generator)
    whole = sample_tokens(logits, draws, *cut)
    seen, honest = [], hf.draw_tokens
    monkeypatch.setattr(hf, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(hf, "draw_tokens", lambda some, *rest: seen.append(len(some)) or honest(some, *rest))
    tokens, log_probs = sample_tokens(logits, draws, *cut)
    assert seen == ([1] * 7 if at_once == 10 else [2, 2, 2, 1])
    assert torch.equal(tokens, whole[0]) and torch.equal(log_probs, whole[1])


def test_uniforms_belong_to_the_row():
    assert torch.equal(row_uniforms(0, "a", 1, 8), row_uniforms(0, "a", 1, 8))
    assert torch.equal(row_uniforms(0, "a", 1, 4), row_uniforms(0, "a", 1, 8)[:4])
    others = [(1, "a", 1), (0, "b", 1), (0, "a", 2)]
    assert all(not torch.equal(row_uniforms(0, "a", 1, 8), row_uniforms(*o, 8)) for o in others)
