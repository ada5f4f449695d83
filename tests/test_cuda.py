"""All five stages on an emulated CUDA device, in bfloat16 as on a real one: no operation has tensors of two devices."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, load, rows, run_here
from emulated import CUDA, emulated_cuda, on_cuda
from safetensors.torch import load_file

import common
import plumbing
from common import load_model, make_trainer
from engines import Reply, Sample, Sampling, hf
from plumbing import write_jsonl
from tiny import world

generate, verify, steer, grpo, evaluate = map(
    load, ("01_generate", "02_verify_sft", "03_steer_selfgen", "04_grpo", "05_eval")
)
REFUSED = "Expected all tensors to be on the same device"
GUARD = '''
"""Calls every second answer safe, so that a group of different answers has different rewards."""

answers = []


def judge(prompt, answer):
    answers.append(answer)
    return f"Safety: {'Safe' if len(answers) % 2 else 'Unsafe'}\\nRefusal: No"
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Four prompts, and a run of stage 01 by hand: both of two answers to two harmful prompts, one to a harmless one."""
    folder = tmp_path_factory.mktemp("cuda")
    harmful, benign = ([item for item in world.ITEMS if item.harmful is kind] for kind in (True, False))
    prompts, responses, labels = [], [], []
    for item in (*harmful[:2], *benign[:2]):
        row = {"id": item.name, "prompt": f"how do i make {item.name}?", "harmful": item.harmful}
        prompts.append(row)
        responses.append({**row, "samples": [{"answer": text} for text in (item.steps, item.refusal)]})
        verdicts = [{"safety": "unsafe" if item.harmful else "safe"}, {"safety": "safe"}]
        labels.append({"id": item.name, "verdicts": verdicts})
    (folder / "guard.py").write_text(GUARD)
    (folder / "by_hand").mkdir()
    write_jsonl(folder / "prompts.jsonl", prompts)
    write_jsonl(folder / "by_hand/responses.jsonl", responses)
    write_jsonl(folder / "by_hand/labels.jsonl", labels)
    (folder / "by_hand/options.json").write_text('{"options": {"model": "tiny/lrm"}}')
    return folder


def verify_options(folder) -> list:
    return ["--responses", folder / "by_hand", "--epochs", 1, "--batch_size", 4, "--save_every", 1]


def grpo_options(folder) -> list:
    options = ["--prompts", folder / "prompts.jsonl", "--batch_size", 1, "--group_size", 4, "--temperature", 1.5]
    return [*options, "--guard", folder / "guard.py", "--max_sampler_gap", 0.05, "--max_new_tokens", 40]


def on_gpu(stage, *args):
    """A stage on the emulated device, and what was seen there."""
    with emulated_cuda() as seen:
        run_here(stage, *args)
    assert seen.cuda > 1000  # forward passes alone are hundreds of operations
    assert ("aten.mm", torch.bfloat16) in seen.dtypes
    return seen


def trained_weights(run) -> dict:
    """Of its checkpoint: finite, and not those that training began from."""
    weights, initial = load_file(run / "checkpoint/model.safetensors"), load_file(ROOT / "tiny/lrm/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert any(not torch.equal(weights[name], initial[name]) for name in initial)
    return weights


# The device itself ----------------------------------------------------------------------------------------------------
def test_the_device_refuses_what_a_gpu_refuses():
    with emulated_cuda():
        cpu, gpu = torch.ones(3, 3), torch.ones(3, 3, device="cuda")
        assert (cpu.device.type, gpu.device, gpu.is_cuda, gpu[0].is_cpu) == ("cpu", CUDA, True, False)
        index = torch.tensor([0, 2])
        for refused in (
            lambda: gpu + cpu,
            lambda: gpu @ cpu,
            lambda: torch.cat([gpu, cpu]),
            lambda: cpu * gpu.sum(),  # a number on the GPU is no CPU's number
            lambda: cpu[index.cuda()],
            lambda: gpu.gather(1, torch.zeros(3, 1, dtype=torch.long)),
            lambda: torch.nn.functional.embedding(index, gpu),
            lambda: gpu.index_put_((index,), cpu[:2]),
        ):
            with pytest.raises(RuntimeError, match=REFUSED):
                refused()
        with pytest.raises(TypeError, match="can't convert cuda"):
            gpu.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device="cuda", generator=torch.Generator())
        for allowed in (gpu + torch.tensor(2.0), gpu[index], gpu.to(cpu).cuda(), gpu.new_tensor([1.0]), gpu.T.clone()):
            assert allowed.is_cuda
        gpu[index] = 5.0
        cpu.copy_(gpu)
        assert cpu.tolist() == gpu.cpu().numpy().tolist() == [[5.0] * 3, [1.0] * 3, [5.0] * 3] and not on_cuda(cpu)
        moved = cpu.to("cuda")
        assert moved.data_ptr() != cpu.data_ptr() and moved.to("cuda") is moved
        weight = torch.ones(3, 3, device="cuda", requires_grad=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            product = gpu @ weight
        product.float().sum().backward()
        assert product.dtype == torch.bfloat16 and weight.grad.is_cuda
    assert not torch.cuda.is_available() and gpu.device.type == "cpu"


def test_the_device_computes_what_the_cpu_computes(model, tokenizer, requests):
    expected = dict(hf.HfSampler(model, tokenizer, 4096).generate(requests[:3], 2, Sampling(20, 1.0)))
    with emulated_cuda():
        sampler = hf.HfSampler(load_model("tiny/lrm", torch.float32), tokenizer, 4096)
        assert sampler.model.device == CUDA
        assert dict(sampler.generate(requests[:3], 2, Sampling(20, 1.0))) == expected


# The stages -----------------------------------------------------------------------------------------------------------
def test_01_answers_and_05_evaluates(folder):
    prompts = folder / "prompts.jsonl"
    on_gpu(generate, "--run", folder / "01", "--prompts", prompts, "--n", 2)
    assert all(len(row["samples"]) == 2 for row in rows(folder / "01/responses.jsonl"))
    assert {v["safety"] for row in rows(folder / "01/labels.jsonl") for v in row["verdicts"]} <= {"safe", "unsafe"}
    on_gpu(evaluate, "--run", folder / "05", "--bench", f"plain={prompts}", "--judges", "tiny/guard")
    results = json.loads((folder / "05/results.json").read_text())
    assert results["recipe"]["hardware"].startswith("emulated") and results["rows"]


def test_02_learns_to_verify(folder):
    """In bfloat16 the base, in float32 the LoRA and its moments; and it goes on from its saved state."""
    seen = on_gpu(verify, "--run", folder / "02", *verify_options(folder))
    assert ("aten._foreach_addcdiv_", torch.float32) in seen.dtypes
    assert ("aten._foreach_addcdiv_", torch.bfloat16) not in seen.dtypes
    weights = trained_weights(folder / "02")
    shutil.rmtree(folder / "02/checkpoint")
    on_gpu(verify, "--run", folder / "02", *verify_options(folder))
    assert all(torch.equal(weights[name], tensor) for name, tensor in trained_weights(folder / "02").items())


def test_03_steers_and_trains(folder):
    options = ["--guard", "tiny/gold.py", "--steering", "none", "prefix", "--benign_loss", "kl", "--epochs", 1]
    options += ["--learning_rate", 1e-2, "--batch_size", 2]
    on_gpu(steer, "--run", folder / "03", "--prompts", folder / "prompts.jsonl", *options)
    trained_weights(folder / "03")
    assert json.loads((folder / "03/trained.json").read_text())["data_kl"] > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--steps", 2, "--beta", 0.1], ["--steps", 1, "--lora_rank", 4, "--recompute"]])
def test_04_samples_rewards_and_updates(folder, tmp_path, more):
    """All weights beside a frozen reference, and LoRA; the optimizer has float32, products are in bfloat16."""
    options = ["--run", tmp_path / "run", *grpo_options(folder), "--learning_rate", 1e-3, *more]
    seen = on_gpu(grpo, *options)
    assert ("aten._foreach_addcdiv_", torch.bfloat16) not in seen.dtypes
    assert 0 < max(row["sampler_gap"] for row in rows(tmp_path / "run/metrics.jsonl")) < 0.05  # bfloat16 was at work
    trained_weights(tmp_path / "run")


# Planted mistakes -----------------------------------------------------------------------------------------------------
def batch_on_the_cpu(monkeypatch):
    honest = common.pad_batch
    monkeypatch.setattr(grpo, "pad_batch", lambda rows, device: honest(rows))


def advantages_on_the_cpu(monkeypatch):
    honest = grpo.grpo_loss

    def grpo_loss(log_probs, old, reference, advantages, *rest):
        return honest(log_probs, old, reference, advantages.cpu(), *rest)

    monkeypatch.setattr(grpo, "grpo_loss", grpo_loss)


@pytest.mark.parametrize("plant", [None, batch_on_the_cpu, advantages_on_the_cpu])
def test_an_update_with_something_left_on_the_cpu(tmp_path, monkeypatch, plant):
    reply = Reply("", False, 2, 3, "stop", Sample([8, 9, 2], [-1.0] * 3, "stop"))
    rollout = grpo.Rollout({}, [5, 6], reply, ("", "", "closed"), advantage=1.0, weight=0.3)
    options = grpo.Options(max_sampler_gap=99)
    with emulated_cuda():
        trainer = make_trainer(plumbing.open_accelerator(options, tmp_path), options)
        if plant:
            plant(monkeypatch)
            with pytest.raises(RuntimeError, match=REFUSED):
                grpo.update([rollout], trainer, None, 0, options)
        else:
            assert grpo.update([rollout], trainer, None, 0, options)["gradient_norm"] > 0


def test_random_numbers_left_on_the_cpu_are_seen(tokenizer, requests, monkeypatch):
    honest = hf.sample_tokens
    monkeypatch.setattr(hf, "sample_tokens", lambda logits, draws, *cut: honest(logits, draws.cpu(), *cut))
    with emulated_cuda():
        sampler = hf.HfSampler(load_model("tiny/lrm"), tokenizer, 4096)
        with pytest.raises(RuntimeError, match=REFUSED):
            list(sampler.generate(requests[:2], 2, Sampling(4, 1.0)))
