"""Weights packed for sampling on a CPU: the same log-probs, those of the weights as they are now, or not used at all."""

import pytest
import torch
from conftest import assert_log_probs
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from common import add_lora
from engines import Sampling, packed
from engines.hf import HfSampler

packs = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")


@pytest.fixture
def wide(tokenizer):
    """Four of each layer's seven linear layers, and the head, have LARGE weights or more; queries have a bias."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 640, "num_attention_heads": 8, "num_key_value_heads": 2}
    config = Qwen2Config(vocab_size=len(tokenizer), num_hidden_layers=2, **sizes)
    model = Qwen2ForCausalLM(config).eval()
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.q_proj.bias)
    return model


def answers(sampler, requests, temperature=1.0):
    found = dict(sampler.generate(requests[:4], 3, Sampling(12, temperature)))
    return [sample for i in range(4) for sample in found[i]]


@packs
def test_log_probs_are_those_of_a_plain_forward_pass(wide, tokenizer, requests):
    sampler = HfSampler(wide, tokenizer, 1000)
    assert len(sampler.packed) == 2 * 5 + 1
    assert all(layer.weight.numel() >= packed.LARGE for layer in sampler.packed)
    for k, sample in enumerate(answers(sampler, requests)):
        assert_log_probs(wide, requests[k // 3][1], sample, 1.0, 1e-4)


@packs
def test_packed_weights_are_those_of_now(wide, tokenizer, requests):
    """After an update by the optimizer, by load_state_dict, and of LoRA's frozen weights by hand."""
    sampler = HfSampler(wide, tokenizer, 1000)
    before = answers(sampler, requests)
    optimizer = torch.optim.SGD(wide.parameters(), lr=1.0)
    wide(input_ids=torch.tensor([requests[0][1]])).logits.logsumexp(-1).sum().backward()
    assert all(layer.weight.grad is not None for layer in sampler.packed)  # gradients go through the layers again
    optimizer.step()
    after = answers(sampler, requests)
    assert [s.ids for s in after] != [s.ids for s in before]
    for k, sample in enumerate(after):
        assert_log_probs(wide, requests[k // 3][1], sample, 1.0, 1e-4)
    add_lora(wide, 4, 8.0, 0.0, ["q_proj", "down_proj"], seed=0)
    for name, weight in wide.named_parameters():
        if name.endswith(".B") or name.endswith("base.weight"):
            nn.init.normal_(weight, std=0.03)
    with_lora = HfSampler(wide, tokenizer, 1000)
    assert len(with_lora.packed) == 2 * 5 + 1
    for k, sample in enumerate(answers(with_lora, requests)):
        assert_log_probs(wide, requests[k // 3][1], sample, 1.0, 1e-4)


@packs
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_shape_as_the_plain_layer(dtype):
    """Expected: the products in float64."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 768).to(dtype)
    with torch.no_grad():
        forward = packed.pack(layer)
        for shape in [(1,), (5, 1), (64, 1), (3, 111), (2000,), (0,)]:
            x = torch.randn(*shape, 512).to(dtype)
            expected = x.double() @ layer.weight.double().T + layer.bias.double()
            atol = 1e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(forward(x).double(), expected, atol=atol, rtol=0)
        other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
        with pytest.raises(RuntimeError, match="dtype"):  # as the plain layer, where precisions do not match
            forward(torch.randn(2, 512).to(other))


@packs
def test_layers_leave_packing_as_they_were(wide, tokenizer, requests, monkeypatch):
    sampler, packings, pack = HfSampler(wide, tokenizer, 1000), [], packed.pack

    def watched(layer):
        packings.append(layer)
        return pack(layer)

    monkeypatch.setattr(packed, "pack", watched)
    answers(sampler, requests)
    assert packings and len(packings) % len(sampler.packed) == 0  # every batch packs anew
    with pytest.raises(ZeroDivisionError), packed.packed_weights(sampler.packed):
        assert all("forward" in vars(layer) for layer in sampler.packed)
        1 / 0
    assert not any("forward" in vars(module) for module in wide.modules())


@packs
def test_autocast_computes_as_without_packing(wide, tokenizer, requests, monkeypatch):
    """GRPO opens its sampler before autocast, and samples in it, as its trainer scores in it."""
    sampler, inside = HfSampler(wide, tokenizer, 1000), []
    with torch.autocast("cpu", torch.bfloat16):
        monkeypatch.setattr(packed, "pack", inside.append)
        found = answers(sampler, requests)
        assert inside == [] and len(sampler.packed) == 2 * 5 + 1
        for k, sample in enumerate(found):  # in float32 they would be off by more
            assert_log_probs(wide, requests[k // 3][1], sample, 1.0, 2e-2)
    with pytest.raises(AssertionError):
        for k, sample in enumerate(found):
            assert_log_probs(wide, requests[k // 3][1], sample, 1.0, 1e-4)


def wrong_by_one_per_cent(layer):
    plain = nn.Linear.forward
    return lambda x: plain(layer, x) * 1.01


def unknown_operation(layer):
    return torch.ops.mkldnn._no_such_operation(layer.weight)


def refuses(layer):
    raise RuntimeError("not for this precision")


@pytest.mark.parametrize("pack", [wrong_by_one_per_cent, unknown_operation, refuses])
def test_what_is_not_right_or_does_not_run_is_not_used(pack, wide, tokenizer, requests, monkeypatch):
    monkeypatch.setattr(packed, "pack", pack)
    sampler = HfSampler(wide, tokenizer, 1000)
    assert sampler.packed == []
    for k, sample in enumerate(answers(sampler, requests)):
        assert_log_probs(wide, requests[k // 3][1], sample, 1.0, 1e-4)


def test_small_layers_and_other_devices_are_left_alone(model, wide):
    assert packed.layers_to_pack(model) == []  # tiny/lrm
    with torch.autocast("cpu", torch.bfloat16):
        assert packed.layers_to_pack(wide) == []
    assert packed.layers_to_pack(wide.to("meta")) == []
