"""The sampling loop against transformers.generate, and against itself in other company."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import assert_log_probs

import engines
from common import StageOptions, load_model
from engines import Sampling
from engines.hf import FastRows, HfSampler


def run(model, tokenizer, requests, n=1, batch_tokens=32_768, **sampling):
    s = Sampling(**{"max_new_tokens": 40, "temperature": 0.0, **sampling})
    return dict(HfSampler(model, tokenizer, batch_tokens).generate(requests, n, s))


def test_greedy_equals_transformers_generate(model, tokenizer, requests):
    ours = run(model, tokenizer, requests)
    for i, (_, ids) in enumerate(requests):
        prompt = torch.tensor([ids])
        theirs = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False)
        assert ours[i][0].ids == theirs[0, len(ids) :].tolist()


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
@pytest.mark.parametrize("n", [1, 3])
def test_batch_and_group_size_do_not_change_greedy_text(model, tokenizer, requests, batch_tokens, n):
    alone = run(model, tokenizer, requests, batch_tokens=1)
    found = run(model, tokenizer, requests, n=n, batch_tokens=batch_tokens)
    assert sorted(found) == list(range(len(requests)))
    for i, samples in found.items():
        assert [s.ids for s in samples] == [alone[i][0].ids] * n
        for s in samples:  # text alone would forgive a wrong mask: this model is sure of itself
            assert s.log_probs == pytest.approx(alone[i][0].log_probs, abs=1e-4)


def test_a_sample_depends_on_its_key_alone(model, tokenizer, requests):
    together = run(model, tokenizer, requests, n=4, temperature=1.0, seed=3)
    for i in (0, len(requests) - 1):
        [alone] = run(model, tokenizer, [requests[i]], n=4, temperature=1.0, seed=3).values()
        assert [s.ids for s in alone] == [s.ids for s in together[i]]
    other = run(model, tokenizer, requests, n=4, temperature=1.0, seed=4)
    assert any(a.ids != b.ids for i in other for a, b in zip(other[i], together[i]))


@pytest.mark.parametrize("temperature, new", [(0.7, 12), (2.0, 150)])
def test_log_probs_and_finish(model, tokenizer, requests, temperature, new):
    """Log-probs are those of the tempered softmax of a full forward pass; the end token belongs to the sample. Of 150
    tokens at a high temperature rows leave at many lengths, and the cache runs out of room more than once."""
    found = run(model, tokenizer, requests, n=2, temperature=temperature, max_new_tokens=new, seed=1)
    for i, samples in found.items():
        for sample in samples:
            assert_log_probs(model, requests[i][1], sample, temperature, 1e-4)
            ended = sample.ids[-1] == tokenizer.eos_token_id
            assert sample.finish == ("stop" if ended else "length") and (ended or len(sample.ids) == new)
            assert tokenizer.eos_token_id not in sample.ids[:-1]


@pytest.mark.parametrize("prompts", [[[5, 6, 7, 8, 9], [10, 11]], [[5, 6, 7], [10, 11, 12]]])
def test_a_prompt_is_kept_once_for_its_rows_until_rows_leave(model, tokenizer, prompts):
    """Four rows of each prompt; next-token log-probs are those of a plain pass over the whole rows, by another model
    object that has transformers' attention."""
    HfSampler(model, tokenizer, 1000)  # sets the attention that knows of it
    plain, width = load_model("tiny/lrm"), max(map(len, prompts))
    rows = [list(prompt) for prompt in prompts for _ in range(4)]

    def append_and_compare(tokens):
        for row, token in zip(rows, tokens, strict=True):
            row.append(token)
        ours = batch.append(torch.tensor(tokens)).log_softmax(-1)
        for row, log_probs in zip(rows, ours, strict=True):
            expected = plain(input_ids=torch.tensor([row])).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(log_probs, expected, atol=1e-4, rtol=0)

    with torch.no_grad():
        batch = FastRows(model, prompts, 4, 40)
        layer = batch.cache.layers[-1]
        for step in range(35):  # its room ends once
            append_and_compare(range(20 + step, 28 + step))
            assert len(layer.prompt[0]) == 2 and layer.prompt[0].size(2) == width
            assert layer.keys.shape[::2] == (8, step + 1) and layer.get_seq_length() == width + step + 1
        batch.keep(torch.tensor([0, 5, 6]))
        rows = [rows[0], rows[5], rows[6]]
        for tokens in ([3, 4, 5], [6, 7, 8]):
            append_and_compare(tokens)
        assert layer.prompt is None and layer.keys.shape[::2] == (3, width + 37)


@pytest.mark.parametrize("gpu, asked, expected", [
    (False, "auto", "float32"), (True, "auto", "bfloat16"), (True, "float32", "float32"), (False, "bfloat16", "bfloat16"),
])  # fmt: skip
def test_vllm_is_opened_in_the_precision_of_the_option(gpu, asked, expected, monkeypatch):
    """As our loop, and as the trainer whose log-probs its own are compared with."""

    class Opened(Exception):
        pass

    def LLM(**settings):
        raise Opened(settings["dtype"])

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM))
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("plumbing.processes", lambda: SimpleNamespace(num_processes=1))
    with pytest.raises(Opened, match=expected):
        engines.open_sampler("tiny/lrm", StageOptions(engine="vllm", dtype=asked))
