"""The least that sampling has to move and to compute, beside what the machine can do.

With W numbers in the matrices (H of them the head's), L layers, A query heads and K key heads of width D, a prompt of
P tokens, and n samples of it, s tokens long (the first comes from the prompt's own pass, the last is never read):

    a step      reads the W matrix weights once, for all rows together
                and keys and values of each prompt, once for its rows: 2 L K D numbers for each of P tokens
    a row       at its t-th step reads keys and values of its own t tokens
                computes 2 W operations, and 4 L A D (P + t) for its scores and their mix
    a prompt    computes 2 (W - H) P + 2 H operations, and 4 L A D P (P + 1) / 2 for its attention

Numbers of 4 bytes. Activations, logits and draws are left out, and rows that have ended: it is a lower bound.
"""

import time
from typing import NamedTuple

import torch


class Shape(NamedTuple):
    matrices: int  # W, the embedding only where it is the head too
    head: int  # H
    layers: int
    query_heads: int
    key_heads: int
    width: int  # D, of a head


def shape_of(model) -> Shape:
    config = model.config
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    head = model.get_output_embeddings().weight
    embedding = model.get_input_embeddings().weight
    if embedding is not head:
        matrices -= embedding.numel()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    layers, key_heads = config.num_hidden_layers, config.num_key_value_heads
    return Shape(matrices, head.numel(), layers, heads, key_heads, width)


def least_work(shape: Shape, prompts: list[int], samples: list[list[int]]) -> dict[str, int]:
    """Bytes and operations of answering all prompts at once; `samples` are the lengths of each prompt's answers."""
    w = shape
    passes = max(size for sizes in samples for size in sizes)  # that of the prompts is one
    numbers, operations = passes * w.matrices, 0
    attended = 4 * w.layers * w.query_heads * w.width
    for p, sizes in zip(prompts, samples, strict=True):
        operations += 2 * (w.matrices - w.head) * p + 2 * w.head + attended * p * (p + 1) // 2
        own = sum(size * (size - 1) // 2 for size in sizes)  # t = 1 ... s - 1
        numbers += 2 * w.layers * w.key_heads * w.width * ((max(sizes) - 1) * p + own)
        steps = sum(size - 1 for size in sizes)
        operations += 2 * w.matrices * steps + attended * (steps * p + own)
    return {"bytes": 4 * numbers, "operations": operations}


def copy_bandwidth(numbers: int = 2**26) -> float:
    """GB/s of copying 256 MB: what is read and what is written."""
    source, target, best = torch.ones(numbers), torch.empty(numbers), 1e9
    for _ in range(10):
        began = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - began)
    return 2 * 4 * numbers / best / 1e9
