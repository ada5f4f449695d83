"""The sampling loop against transformers.generate, and against itself in other company."""

import pytest
import torch
from conftest import assert_log_probs

from engines import Sampling
from engines.hf import HfSampler


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
