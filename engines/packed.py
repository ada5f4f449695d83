"""Large linear layers on a CPU with their weights laid out as oneDNN reads them fastest, for a
sampler, which multiplies few rows with all weights for every token.

PyTorch's own linear layer lays a bfloat16 weight out anew in every call, and gives float32 to MKL:
with 8 to 64 rows that takes up to three times as long (AMD EPYC, two threads). torch.compile packs
weights with the same two operations."""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

ROWS = 64  # that the layout is chosen for; it is right for any number
LARGE = 2**18  # weights of a layer; in a smaller one the call itself takes what is gained


def pack(layer: nn.Linear):
    """y = x W^T + b, (*, in) -> (*, out), with W as it is now; in another precision the plain
    layer computes."""
    weight, operations = layer.weight.detach(), torch.ops.mkldnn
    packed = operations._reorder_linear_weight(weight, ROWS)

    def forward(x):
        if x.dtype != weight.dtype:
            return F.linear(x, layer.weight, layer.bias)
        return operations._linear_pointwise(x, packed, layer.bias, "none", [], "")

    return forward


@torch.no_grad()
def layers_to_pack(model) -> list[nn.Linear]:
    """The large linear layers of a model on a CPU, if each computes the same packed, but for the
    order in which products are summed; else none."""
    if model.device.type != "cpu":
        return []
    linear = [layer for layer in model.modules() if type(layer) is nn.Linear]
    layers = [layer for layer in linear if layer.weight.numel() >= LARGE]
    generator = torch.Generator().manual_seed(0)
    try:
        for layer in layers:
            x = torch.randn(3, layer.in_features, generator=generator).to(layer.weight.dtype)
            plain, packed = layer(x).float(), pack(layer)(x).float()
            rounding = math.sqrt(layer.in_features) * torch.finfo(torch.float32).eps
            rounding += torch.finfo(x.dtype).eps * (x.dtype != torch.float32)
            if not (packed - plain).abs().max() <= rounding * plain.abs().max():
                return []
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN, or a precision it has not
        return []
    return layers


@contextmanager
def packed_weights(layers: list[nn.Linear]):
    """Inside, the layers compute with packed copies of the weights that they have now, which takes
    the memory of the weights once more; under autocast, which casts weights itself, as they are."""
    if torch.is_autocast_enabled("cpu"):
        layers = []
    for layer in layers:
        layer.forward = pack(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
