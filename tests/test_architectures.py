"""Our sampler and scorer on tiny random models of many architectures. Oracle: the model's own forward pass on one whole
row at a time, without padding or cache, and transformers.generate. Each is right, by a slower way where it must be."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load, next_token_log_probs, refused
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import engines.hf
import plumbing
from common import Example, TokenScorer, add_lora, load_model, make_trainer, pad_batch
from engines import Sampling
from engines.hf import CachedRows, FastRows, HfSampler, PlainRows

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2, "tie_word_embeddings": False}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
          "layer_types": ["linear_attention", "linear_attention", "full_attention"]}  # fmt: skip
LATENT = {**EXPERTS, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8,
          "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}  # fmt: skip
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 16}
CAPPED = {"sliding_window": 8, "final_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
HYBRID = {**EXPERTS, **MAMBA, "shared_intermediate_size": 24, "layer_types": ["mamba", "attention", "mamba"]}
# name -> (what its config has beside SIZES, how its rows are sampled, whether the scorer computes the head in chunks)
ARCHITECTURES = {
    "llama": ({}, FastRows, True), "qwen2": ({}, FastRows, True), "qwen3": ({}, FastRows, True),
    "qwen3_moe": ({**EXPERTS, "decoder_sparse_step": 1}, FastRows, True),
    "qwen3_next": ({**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 24}, PlainRows, True),
    "qwen3_5_text": (LINEAR, PlainRows, True), "mistral": ({"sliding_window": 8}, FastRows, True),
    "mixtral": (EXPERTS, FastRows, True), "gemma": ({}, FastRows, True),
    "gemma2": ({**CAPPED, "attn_logit_softcapping": 5.0}, FastRows, False), "gemma3_text": (CAPPED, FastRows, False),
    "phi3": ({}, FastRows, True), "olmo2": ({}, FastRows, True), "olmo3": ({"sliding_window": 8}, FastRows, True),
    "granite": ({"logits_scaling": 4.0}, FastRows, False), "granitemoe": ({**EXPERTS, "logits_scaling": 4.0}, FastRows, False),
    "cohere": ({"logit_scale": 0.25}, FastRows, False), "cohere2": ({"logit_scale": 0.25, "sliding_window": 8}, FastRows, False),
    "gpt_oss": ({**EXPERTS, "sliding_window": 8}, CachedRows, True), "gpt2": (GPT2, FastRows, True),
    "gpt_neox": ({}, FastRows, True), "bloom": ({"n_layer": 3, "n_head": 4}, CachedRows, True),
    "deepseek_v2": (LATENT, CachedRows, True), "deepseek_v3": ({**LATENT, "head_dim": 4}, CachedRows, True),
    "llama4_text": ({**EXPERTS, "intermediate_size_mlp": 48, "attention_chunk_size": 8}, FastRows, False),
    "lfm2": ({"layer_types": ["conv", "full_attention", "conv"]}, PlainRows, True),
    "falcon_h1": ({**MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.3}, PlainRows, False),
    "mamba2": ({"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16}, PlainRows, True),
    "granitemoehybrid": ({**HYBRID, "logits_scaling": 4.0}, PlainRows, False),
    "smollm3": ({}, FastRows, True), "exaone4": ({"sliding_window": 8}, FastRows, True), "glm4": ({}, FastRows, True),
}  # fmt: skip
REQUESTS = [
    (str(n), torch.randint(3, 96, (n,), generator=torch.Generator().manual_seed(n)).tolist()) for n in (5, 9, 21, 8)
]


def network(name: str):
    config = AutoConfig.for_model(name, **{**SIZES, **ARCHITECTURES[name][0]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.3)  # initialised small, they would hide what is left out
    return model


@pytest.fixture(scope="module", autouse=True)
def end_token():
    """The tokenizer is not at work here: 2 ends a response."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines.hf, "end_tokens", lambda *_: {2})
        yield


def sampler_of(model):
    return HfSampler(model, SimpleNamespace(name_or_path="random"), 10_000)


def chosen(model, examples):
    """(N,) log-probs of the responses by plain forward passes."""
    with torch.no_grad():
        log_probs = next_token_log_probs(model, examples)
    labels = torch.tensor([token for _, response in examples for token in response])
    return log_probs.gather(1, labels.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_and_greedy_text(name, capsys):
    """Ragged and even batches, groups of two, greedy and at temperature 1, beyond the sliding windows."""
    _, rows_class, fast_head = ARCHITECTURES[name]
    model, untouched = network(name), network(name)
    sampler, scorer = sampler_of(model), TokenScorer(network(name))
    for requests in (REQUESTS, REQUESTS[:1] * 2):
        for temperature in (0.0, 1.0):
            for index, samples in sampler.generate(requests, 2, Sampling(14, temperature, seed=1)):
                for sample in samples:
                    expected = chosen(untouched, [(requests[index][1], sample.ids)])
                    ours = torch.tensor(sample.log_probs).double()
                    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
                if temperature == 0:
                    prompt = torch.tensor([requests[index][1]])
                    settings = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
                    theirs = untouched.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
                    assert samples[0].ids == theirs[0, prompt.shape[1] :].tolist()
    examples = [Example(ids[:4], ids[4:]) for _, ids in REQUESTS]
    ours = scorer(*pad_batch(examples)).log_probs.detach().double()
    torch.testing.assert_close(ours, chosen(untouched, examples), atol=1e-4, rtol=0)
    said = capsys.readouterr().out
    assert sampler.rows is rows_class
    assert ("sampling with a cache is not right" in said) is (sampler.rows is PlainRows)
    assert scorer.fast is fast_head and ("the head by itself" in said) is not fast_head


@pytest.mark.parametrize("name", ["granite", "gemma2", "qwen3_next"])
def test_gradients_of_the_slower_way(name):
    """Of a LoRA on the query projections, with the KL to the model without it: autograd of plain forward passes."""
    model, ours = network(name), network(name)
    targets = [n for n, _ in ours.named_modules() if n.endswith("q_proj")]
    add_lora(ours, 2, 4.0, 0.0, ["q_proj"], 0)
    torch.manual_seed(3)
    for target in targets:
        ours.get_submodule(target).B.data.normal_(std=0.2)
    examples = [Example(ids[:4], ids[4:]) for _, ids in REQUESTS]
    scores = TokenScorer(ours)(*pad_batch(examples), full_kl=True)
    (scores.log_probs.sum() + scores.divergence.sum()).backward()
    merged = {
        f"{t}.weight": model.get_submodule(t).weight + 2 * (layer := ours.get_submodule(t)).B @ layer.A for t in targets
    }
    merged = {key: value.detach().requires_grad_() for key, value in merged.items()}
    changed = lambda **ids: torch.func.functional_call(model, merged, args=(), kwargs=ids)  # noqa: E731
    log_p = next_token_log_probs(changed, examples)
    log_r = next_token_log_probs(model, examples).detach()
    labels = torch.tensor([token for _, response in examples for token in response])
    divergence = (log_r.exp() * (log_r - log_p)).sum()
    (log_p.gather(1, labels.unsqueeze(1)).sum() + divergence).backward()
    assert divergence.item() > 0.01
    for target in targets:
        layer = ours.get_submodule(target)
        expected = 2 * merged[f"{target}.weight"].grad @ layer.A.T
        torch.testing.assert_close(layer.B.grad, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_path_that_is_wrong_by_a_little_gives_way(dtype, monkeypatch):
    """Attention whose values are one per cent too large: the sampler sees it and takes the model's own, also where rounding
    alone moves log-probs by more."""
    attention = engines.hf.one_token_attention

    def wrong(module, query, key, value, *args, **more):
        return attention(module, query, key, value * 1.01, *args, **more)

    monkeypatch.setitem(engines.hf.AttentionInterface._global_mapping, "one_token", wrong)
    model = network("llama").to(dtype)
    assert sampler_of(model).rows is CachedRows and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rounding_to_bfloat16_slows_no_model(name):
    """Its proof is in float32: the same ways are right, and its weights are the very ones that they were."""
    _, rows_class, fast_head = ARCHITECTURES[name]
    model = network(name).to(torch.bfloat16)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    scorer, sampler = TokenScorer(model), sampler_of(model)
    fast_head &= name != "mamba2"  # its last layer gives float32, which its head takes from no one else
    assert (sampler.rows, scorer.fast) == (rows_class, fast_head)
    after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert all(after[key] is tensor for key, tensor in tensors.items())
    examples = [Example(ids[:4], ids[4:]) for _, ids in REQUESTS]
    ours = scorer(*pad_batch(examples)).log_probs.detach().double()
    assert (ours - chosen(network(name), examples)).abs().max() > 1e-4  # in bfloat16, now as before


def test_a_path_that_does_not_run_in_the_models_own_precision_gives_way(monkeypatch):
    attention = engines.hf.one_token_attention

    def refuses(module, query, *args, **more):
        if query.dtype == torch.bfloat16:
            raise RuntimeError("no kernel for bfloat16")
        return attention(module, query, *args, **more)

    monkeypatch.setitem(engines.hf.AttentionInterface._global_mapping, "one_token", refuses)
    assert sampler_of(network("llama")).rows is FastRows
    assert sampler_of(network("llama").to(torch.bfloat16)).rows is CachedRows


def test_a_model_that_looks_ahead_is_refused(monkeypatch):
    """Padding on the right changes what it says, so nothing here is right for it: one line."""
    model = network("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    monkeypatch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", lambda **_: None)
    for use in (sampler_of, TokenScorer):
        with pytest.raises(SystemExit, match="^error: .*padding on the right changes its log-probs by .*$"):
            use(model)


def test_rounding_alone_refuses_no_model():
    """Log-probs of some thousands are rounded by more than the tolerance: rows of other shapes differ, and nothing is
    wrong."""
    model = network("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e5)
    proof = plumbing.Proof(model)
    assert min(plain.min() for plain in proof.plain) < -1000 and proof.allowed > 4 * 1e-4
    assert sampler_of(model).rows is FastRows


SPOILT = {
    "a tensor is missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lacks the tensor model.layers.1.mlp.up_proj.weight"),
    "a tensor too many": (lambda t: t.update({"model.layers.9.x": torch.zeros(2)}), "has a tensor that this model has no place for: model.layers.9.x"),
    "another shape": (lambda t: t.update({"model.norm.weight": torch.ones(7)}), "model.norm.weight"),
}  # fmt: skip


@pytest.mark.parametrize("what", SPOILT)
def test_a_checkpoint_that_is_not_whole_ends_the_load(what, tmp_path):
    spoil, words = SPOILT[what]
    shutil.copytree(ROOT / "tiny/lrm", tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    spoil(tensors)
    save_file(tensors, tmp_path / "model/model.safetensors", metadata={"format": "pt"})
    options = ["--run", tmp_path / "run", "--model", tmp_path / "model", "--limit", 1, "--n", 1]
    line = refused(load("01_generate"), *options)
    assert (
        words in line
        and str(tmp_path / "model") in line
        and not json.loads((tmp_path / "run/options.json").read_text()) == {}
    )
    assert not (tmp_path / "run/responses.jsonl").exists()


def test_trainer_and_sampler_of_one_model_share_its_attention(tokenizer):
    """What 04 does: the trainer is proven before the sampler sets its attention, and is right after it too."""
    from accelerate import Accelerator

    options = SimpleNamespace(model="tiny/lrm", lora_rank=0, learning_rate=1e-3, recompute=False, dtype="auto")
    trainer = make_trainer(Accelerator(cpu=True), options)
    HfSampler(trainer.model, tokenizer, 1000)
    assert trainer.model.config._attn_implementation == "one_token"
    examples = [Example([5, 6, 7], [8, 9]), Example([5], [10, 11, 12, 2])]
    ours = trainer.scorer(*pad_batch(examples)).log_probs.detach().double()
    torch.testing.assert_close(ours, chosen(load_model("tiny/lrm"), examples), atol=1e-4, rtol=0)
