"""bench/limits.py: the least bytes and operations of sampling, against counts by hand and against torch's counter."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.limits import Shape, least_work, shape_of
from engines.hf import CachedRows


def test_least_work_by_hand():
    """Two prompts of 3 and 1 tokens, answers of 2 and 3 tokens to the first, of 1 to the second; 1 layer, 2 query
    heads, 1 key head of width 2; 10 numbers in matrices, 4 of them the head's."""
    work = least_work(Shape(10, 4, 1, 2, 1, 2), [3, 1], [[2, 3], [1]])
    weights = 3 * 10  # the prompts' pass and two steps
    read = 2 * 3 + 1 + (1 + 2)  # tokens: the prompt in two steps for both answers, then each one's own
    assert work["bytes"] == 4 * (weights + 2 * 2 * read)
    prompts = (2 * 6 * 3 + 2 * 4) + (2 * 6 * 1 + 2 * 4)
    scores = (1 + 2 + 3) + 1  # keys that the prompts' tokens see
    steps = 3 * 2 * 10  # three tokens are read
    seen = 4 + (4 + 5)  # keys that each row's tokens see: the prompt's and its own
    assert work["operations"] == prompts + steps + 4 * 2 * 2 * (scores + seen)


def test_shape_and_operations_are_those_that_torch_counts(model):
    """Of one step of two rows: matrix products and attention, as torch counts them when it runs."""
    shape, prompt = shape_of(model), [5, 6, 7, 8, 9]
    assert (shape.layers, shape.query_heads, shape.key_heads, shape.width) == (4, 4, 2, 32)
    with torch.no_grad():
        batch = CachedRows(model, [prompt], 2, 4)
        with FlopCounterMode(display=False) as counter:
            batch.append(torch.tensor([3, 4]))
    one, two = (least_work(shape, [5], [[size] * 2])["operations"] for size in (1, 2))
    counted = counter.get_total_flops() + attention_on_cpu(counter, shape, rows=2, keys=6)
    assert two - one == pytest.approx(counted, rel=1e-6)


def attention_on_cpu(counter, shape: Shape, rows: int, keys: int) -> int:
    """torch's counter has no formula for attention on a CPU: two products of each head."""
    names = [str(name) for name in counter.get_flop_counts()["Global"]]
    assert not any("attention" in name for name in names), names
    return shape.layers * rows * 2 * 2 * shape.query_heads * shape.width * keys
