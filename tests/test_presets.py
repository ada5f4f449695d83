"""--dry_run and bench/plan.py of every stage with every real preset: published configs, no weights. Oracles: published
numbers of weights, the papers' hyperparameters, steps and tokens by hand, bytes that autograd and the cache really
keep."""

import json
import re
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from unittest import mock

import huggingface_hub
import pytest
import started
import torch
from chat_templates import FAMILIES
from conftest import ROOT, load, refused, rows, run_here, run_with_hubs
from huggingface_hub.errors import RepositoryNotFoundError
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, Qwen2Tokenizer, Qwen3Config

import plumbing
from bench import plan
from bench.cost import CONFIGS
from bench.plan import Shape, peak_share
from common import Example, TokenScorer, add_lora, load_model, pad_batch
from plumbing import encode_plain
from plumbing.stand_ins import SHAPES, config_of, tokenizer_of

stages = {name[:2]: load(name) for name in ("01_generate", "02_verify_sft", "03_steer_selfgen", "04_grpo", "05_eval")}

WEIGHTS = {  # on the hub, tied ones once
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "r1-1.5b": 1_777_088_000,
    "r1-7b": 7_615_616_512,
    "r1-8b": 8_030_261_248,
    "r1-14b": 14_770_033_664,
}
CARD = {"temperature": "0.6", "top_p": "0.95"}  # model cards; top_k below
ALL = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
PAPERS = {
    "01": {"n": "8", **CARD},
    "02": {"lora_rank": "16", "lora_alpha": "32.0", "learning_rate": "0.0002", "epochs": "2", "lora_targets": ALL},
    "03": {
        **{"lora_rank": "32", "lora_alpha": "16.0", "lora_dropout": "0.05", "lora_targets": "q_proj v_proj"},
        **{"learning_rate": "1e-05", "warmup": "0.1", "batch_size": "8", "epochs": "3", "max_new_tokens": "16384"},
        **CARD,
    },
    "04": {
        **{"learning_rate": "1e-06", "batch_size": "64", "group_size": "8", "clip_low": "0.2", "clip_high": "0.28"},
        **{"temperature": "0.7", "max_new_tokens": "8192", "beta": "0.0", "lora_rank": "0", "loss": "grpo"},
    },
    "05": CARD,
}


def number(text: str) -> float:
    return float(text.replace(",", ""))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a config and a tokenizer for each preset, prompts, and a stage 01 run of ten of them."""
    folder, template = tmp_path_factory.mktemp("presets"), (ROOT / "tiny/lrm/chat_template.jinja").read_text()
    vocab = {piece: i for i, piece in enumerate(sorted(ByteLevel.alphabet()))}  # transformers rebuilds Qwen2's by class
    for name, config in CONFIGS.items():
        config.save_pretrained(folder / name)
        special = {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
        tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], **special)
        opened = "{%- if add_generation_prompt -%}{{- '<think>\\n' -}}{%- endif -%}"
        tokenizer.chat_template = template + (opened if name.startswith("r1") else "")
        tokenizer.save_pretrained(folder / name)
    made = [{"id": str(i), "prompt": "how do i brew a burn potion", "harmful": i < 6} for i in range(10)]
    plumbing.write_jsonl(folder / "prompts.jsonl", made)
    sides = [{"answer": "no .", "safety": "safe"}, {"answer": "mix a and b .", "safety": "unsafe"}]
    (folder / "answered").mkdir()
    plumbing.write_jsonl(folder / "answered/responses.jsonl", [{**row, "samples": sides} for row in made])
    plumbing.write_jsonl(folder / "answered/labels.jsonl", [{"id": row["id"], "verdicts": sides} for row in made])
    return folder


def options_for(world, preset: str, stage: str, *more) -> list[str]:
    """The command line of a stage with the preset's model."""
    model, guard, prompts = world / preset, world / "qwen3-0.6b", ["--prompts", world / "prompts.jsonl"]
    given = {
        "01": ["--model", model, "--guard", guard, *prompts],
        "02": ["--model", model, "--expert", guard, "--responses", world / "answered"],
        "03": ["--model", model, "--guard", guard, *prompts],
        "04": ["--model", model, "--guard", guard, *prompts],
        "05": ["--models", f"base={model}", f"more={guard}", "--judges", guard, "--bench", f"own={prompts[1]}"],
    }[stage]
    return [*map(str, ["--preset", preset, "--run", world / "run", *given, *more])]


def without_a_trace(world, work):
    before = {path: path.stat().st_mtime_ns for path in world.rglob("*")}
    work()
    assert {path: path.stat().st_mtime_ns for path in world.rglob("*")} == before


def dry(world, capsys, preset: str, stage: str, *more):
    """(options, whole text) of a stage's dry run, which writes nothing and loads no weights."""
    line = options_for(world, preset, stage, *more)
    without_a_trace(world, lambda: run_here(stages[stage], *line, "--dry_run"))
    text = capsys.readouterr().out
    return dict(re.findall(r"^--(\w+) (.*)$", text, re.M)), text


def run_plan(*args):
    with mock.patch.object(sys, "argv", ["bench/plan.py", *map(str, args)]):
        plan.main()


def predict(world, capsys, preset: str, stage: str, *more):
    """(lines of the prediction, whole text) of bench/plan.py for the same command line, just as traceless."""
    line = options_for(world, preset, stage, *more)
    without_a_trace(world, lambda: run_plan(stages[stage].__file__, *line))
    text = capsys.readouterr().out
    return re.findall(r"^  (.*)$", text, re.M), text


@pytest.mark.parametrize("preset", WEIGHTS)
def test_a_dry_run_of_every_stage_with_every_preset(preset, world, capsys, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    texts = {}
    for stage, paper in PAPERS.items():
        options, texts[stage] = dry(world, capsys, preset, stage)
        assert {name: options[name] for name in paper} == paper
        assert stage in ("02", "04") or options["top_k"] == ("20" if "qwen" in preset else "0")
        assert ("<|im_start|>assistant\n<think>\n" in texts[stage]) == preset.startswith("r1")
    assert "rows: 4 benign, 6 harmful" in texts["01"] and "rows: 4 benign, 12 harmful" in texts["02"]
    assert "The following prompt is harmful." in texts["03"]


@pytest.mark.parametrize("preset", WEIGHTS)
def test_the_plan_of_every_stage_with_every_preset(preset, world, capsys, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    config, weights, plans = CONFIGS[preset], f"{WEIGHTS[preset]:,}", {}
    for stage in PAPERS:
        lines, text = plans[stage] = predict(world, capsys, preset, stage)
        assert "Predicted by formulas, not measured" in text and lines[-1].startswith("in all ")
        assert f"{preset} ({weights} weights)" in lines[0] or stage == "02"
        assert "more than the card has" not in text or (stage == "04" and WEIGHTS[preset] > 1.6e9)
    read = len("user\nhow do i brew a burn potion\nassistant\n") + 3 + 8 * preset.startswith("r1")  # bytes, three marks
    assert f"prompts of {read} tokens" in plans["01"][1] and f"prompts of {read} tokens" in plans["04"][1]
    assert "answers 10 x 8: 80,000 tokens, at most 655,360" in plans["01"][0][0]
    assert "judges 80 x 1" in plans["01"][0][1] and "judges 20 x 1" in plans["03"][0][1]
    q, kv = config.num_attention_heads * 128, config.num_key_value_heads * 128
    h, m, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    lora = layers * 16 * (2 * (h + q) + 2 * (h + kv) + 3 * (h + m))
    what = f"trains {lora:,} of {weights} weights in 2 steps: 8,000 tokens, at most 32,768"  # 16 rows, 2 epochs of 1
    assert what in plans["02"][0][1]
    lora = layers * 32 * ((h + q) + (h + kv))
    what = f"trains {lora:,} of {weights} weights in 6 steps: 30,000 tokens, at most 491,520"  # 10 rows, 3 epochs of 2
    assert what in plans["03"][0][2]
    what = f"trains {weights} of {weights} weights in 100 steps: 51,200,000 tokens, at most 419,430,400"
    assert what in plans["04"][0][2] and "samples 6,400 x 8" in plans["04"][0][0]
    assert "judges 40 x 1" in plans["05"][0][2] and "answers 10 x 1" in plans["05"][0][1]


def figures(line: str) -> list[float]:
    """Hours, hours at most and GB of a line of a prediction."""
    return [number(text) for text in re.search(r"; ([\d.]+) h, at most ([\d.]+); ([\d.]+) GB$", line).groups()]


def test_hours_and_memory_of_one_and_of_several(world, capsys, monkeypatch):
    """6 or 8 operations a weight and token; processes share prompts out, and micro-batches whole; FSDP shards."""

    def line(i, *args):
        return figures(predict(world, capsys, *args)[0][i])

    hours, most, gb = line(2, "qwen3-8b", "04")
    whole = 8 * WEIGHTS["qwen3-8b"] * 51.2e6 / (0.35 * 989e12) / 3600  # with recompute
    assert hours == pytest.approx(whole, rel=0.1) and most > 8 * hours
    assert 18 * 8.19 + 10 < gb < 18 * 8.19 + 25
    works = ((0, "01"), (2, "03", "--epochs", 3000), (2, "04"))
    one = [line(i, "qwen3-8b", *work) for i, *work in works]
    monkeypatch.setenv("WORLD_SIZE", "5")
    five = [line(i, "qwen3-8b", *work) for i, *work in works]
    assert five[0][0] == pytest.approx(one[0][0] / 5, abs=0.02)
    assert (five[1][0], five[1][2]) == (one[1][0], one[1][2]) and one[1][0] > 1  # 5 rows are one micro-batch
    assert five[1][1] == pytest.approx(one[1][1] / 5, abs=0.01)  # five at their limit: one each
    assert five[2][0] == pytest.approx(one[2][0] * 7 / 33, abs=0.01)  # 512 of 1045 tokens in 33 micro-batches
    assert five[2][2] == pytest.approx(one[2][2] + 4 * 8.19, abs=0.2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert line(2, "qwen3-8b", "04")[2] == pytest.approx(one[2][2] - 0.8 * 18 * 8.19, abs=0.2)
    monkeypatch.setenv("RANK", "1")
    assert dry(world, capsys, "qwen3-8b", "04")[1] == "" and predict(world, capsys, "qwen3-8b", "04")[1] == ""


def test_the_used_share_of_the_peak_grows_with_the_model(world, capsys):
    """By hand: at 1.72 B weights ln(1.7206 / 0.6) / ln(4 / 0.6) = 0.555 of the way from 19 to 30 %."""
    for weights, share in ((1e6, 0.19), (0.6e9, 0.19), (1.7206e9, 0.2511), (4e9, 0.30), (8e9, 0.35), (7e10, 0.35)):
        assert peak_share(weights) == pytest.approx(share, abs=1e-4)
    assert peak_share((4e9 * 8e9) ** 0.5) == pytest.approx(0.325)  # halfway: the root of 4 B x 8 B
    for preset, share in (("qwen3-1.7b", 0.2511), ("qwen3-0.6b", 0.19)):
        hours, _, _ = figures(predict(world, capsys, preset, "04")[0][2])
        config, length = CONFIGS[preset], 1045  # tokens of a prompt and its response
        attention = 8 * config.num_hidden_layers * config.num_attention_heads * 128 * length**2
        head = config.vocab_size * config.hidden_size
        each = 8 * (WEIGHTS[preset] - head) * length + 10 * head * 1000 + attention  # the head also runs again
        assert hours == pytest.approx(51_200 * each / (share * 989e12) / 3600, abs=0.006)


def kept_bytes(config, mixed: bool, recompute: bool, tokens: int) -> int:
    """What autograd keeps in a forward pass, each storage once, but weights and their bfloat16 copies."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32 if mixed else torch.bfloat16)
    if not mixed:
        add_lora(model, 1, 1.0, 0.0, plumbing.ALL_LINEAR, 0)
    weights, seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tokens in tensor.shape:
            seen[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that no address comes twice
        return tensor

    scorer, batch = TokenScorer(model.train(), recompute), pad_batch([Example([1], [2] * (tokens - 1))])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            scores = scorer(*batch)
    assert scores.log_probs.requires_grad
    return sum(tensor.untyped_storage().nbytes() for pointer, tensor in seen.items() if pointer not in weights)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", [Qwen3Config, LlamaConfig])
def test_what_autograd_keeps_of_a_layer(kind, mixed, recompute, tmp_path):
    """Llama's layers keep a little less than Qwen3's, which norm queries and keys."""
    kept, said, tokens = [], [], 509
    for layers in (2, 5):
        sizes = dict(hidden_size=256, intermediate_size=768, num_attention_heads=16, num_key_value_heads=4, head_dim=32)
        config = kind(**sizes, vocab_size=64, num_hidden_layers=layers, tie_word_embeddings=True)
        config.save_pretrained(tmp_path / str(layers))
        kept.append(kept_bytes(config, mixed, recompute, tokens))
        said.append(Shape(str(tmp_path / str(layers))).activations(tokens, mixed, recompute))
    ratio = (kept[1] - kept[0]) / (said[1] - said[0])
    print(kind.__name__, mixed, recompute, ratio)
    assert (0.97 if kind is Qwen3Config or recompute else 0.8) < ratio < 1.02


def test_recomputed_layers_give_the_same_gradients(tokenizer):
    ids, mask = pad_batch([Example([5, 6, 7], [8, 9, 10, 11]), Example([5, 6], [9, 9])])
    gradients = []
    for recompute in (False, True):
        model = load_model("tiny/lrm")
        add_lora(model, 4, 8.0, 0.1, plumbing.ALL_LINEAR, 0)
        scorer = TokenScorer(model.train(), recompute)
        torch.manual_seed(1)
        scores = scorer(ids, mask, full_kl=True)
        (scores.log_probs.sum() + scores.divergence.sum()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients)) and any(a.abs().max() > 0 for a in gradients[0])


def test_the_cache_is_as_large_as_said(model):
    cache = DynamicCache(config=model.config)
    model(input_ids=torch.ones(3, 17, dtype=torch.long), past_key_values=cache, use_cache=True)
    size = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values))
    shape = Shape("tiny/lrm")
    assert size == 3 * 17 * shape.layers * shape.kv * 2 * 4  # float32 here, 2 bytes on a GPU
    assert shape.weights == sum(p.numel() for p in model.parameters())


def test_a_model_that_is_served_or_split(world, capsys):
    """What a server computes is not counted here; cards that share a model share its hours."""
    served = ["--model", f"{world / 'qwen3-8b'}@http://localhost:9/v1"]
    lines, _ = predict(world, capsys, "qwen3-8b", "01", *served)
    assert "answers: not counted" in lines[0] and "(596,049,920 weights) judges" in lines[1]
    assert "assistant" in dry(world, capsys, "qwen3-8b", "01", *served)[1]
    long = ["--engine", "vllm", "--max_new_tokens", 200_000]
    whole, split = (predict(world, capsys, "qwen3-8b", "01", *long, "--tensor_parallel", n) for n in (1, 4))
    most = [figures(lines[0])[1] for lines, _ in (whole, split)]
    assert most[0] > 10 and most[1] == pytest.approx(most[0] / 4, abs=0.01)
    assert "for 1 x H100" in whole[1] and "for 4 x H100" in split[1]


def test_what_a_dry_run_refuses(world):
    prompts = ["--prompts", world / "prompts.jsonl", "--dry_run", "--run", world / "run"]
    assert "no model './nowhere'" in refused(stages["01"], *prompts, "--model", "./nowhere")
    assert "no Python file at rule.py" in refused(stages["03"], *prompts, "--guard", "rule.py")
    assert "no prompt file at none.jsonl" in refused(stages["04"], "--prompts", "none.jsonl", "--dry_run")
    assert "id '0' occurs twice" in refused(stages["05"], "--bench", f"a={two_of_one_id(world)}", "--dry_run")
    assert not (world / "run").exists()


def test_what_a_plan_refuses(world):
    prompts = ["--prompts", world / "prompts.jsonl", "--run", world / "run"]
    for words, args in {
        "no linear layer is named query": ["03_steer_selfgen.py", *prompts, "--lora_targets", "query"],
        "no model './nowhere'": ["01_generate.py", *prompts, "--model", "./nowhere"],
        "no stage at 06_more.py": ["06_more.py"],
        "common.py is no stage": ["common.py"],
    }.items():
        with pytest.raises(SystemExit) as stopped:
            run_plan(*args)
        line = str(stopped.value)
        assert line.startswith("error: ") and words in line and "\n" not in line
    assert not (world / "run").exists()


def plan_command(*args) -> subprocess.CompletedProcess:
    return started.run(["bench/plan.py", *args])


def test_the_plan_as_a_command(world):
    line = options_for(world, "qwen3-4b", "04", "--engine", "vllm", "--lora_rank", 16)
    command = plan_command("04_grpo.py", *line)
    assert command.returncode == 0 and command.stderr == ""
    first, *lines = command.stdout.splitlines()
    assert first.startswith("Predicted by formulas, not measured, for 1 x H100") and len(lines) == 4
    assert "of 4,022,468,096 weights in 100 steps" in lines[2] and lines[3].startswith("  in all ")
    assert not (world / "run").exists()
    wrong = plan_command("04_grpo.py", *line, "--clip_low", "a", "b")
    assert wrong.returncode == 1 and wrong.stdout == ""
    assert wrong.stderr.startswith("error: ") and wrong.stderr.count("\n") == 1 and "clip_low" in wrong.stderr


def test_the_plan_says_how_to_use_it(capsys):
    for args, words in {
        ("--help",): "python bench/plan.py 04_grpo.py --preset",
        ("04_grpo.py", "--help"): "the model to start from",
    }.items():
        with pytest.raises(SystemExit) as stopped:
            run_plan(*args)
        assert stopped.value.code == 0 and words in capsys.readouterr().out


def two_of_one_id(world):
    path = world / "twice.jsonl"
    path.write_text(json.dumps({"id": "0", "prompt": "x", "harmful": True}) + "\n")
    path.write_text(path.read_text() * 2)
    return path


def test_a_run_goes_on_after_a_dry_one(tmp_path, capsys):
    """--dry_run is no option of a run: a folder made without it is the same with it, and stays as it is."""
    options = ["--run", tmp_path / "run", "--limit", 1, "--n", 1, "--max_new_tokens", 4]
    run_here(stages["01"], *options)
    first = rows(tmp_path / "run/responses.jsonl")
    run_here(stages["01"], *options, "--dry_run")
    run_here(stages["01"], *options)
    assert rows(tmp_path / "run/responses.jsonl") == first
    assert "dry_run" not in (tmp_path / "run/options.json").read_text()


# Without the hub ------------------------------------------------------------------------------------------------------
SHOWN = {  # a prompt as each family's model card has it
    "qwen3": "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
    "r1": "<｜begin▁of▁sentence｜><｜User｜>{}<｜Assistant｜><think>\n",
}
OTHERS = {  # published numbers of weights
    "Qwen/Qwen3Guard-Gen-0.6B": 596_049_920,
    "Qwen/Qwen3Guard-Gen-4B": 4_022_468_096,
    "Qwen/Qwen3Guard-Gen-8B": 8_190_735_360,
    "Qwen/Qwen3-32B": 32_762_123_264,
}


@pytest.fixture
def no_hub(monkeypatch):
    """The hub's errors, "no route" to begin with; nothing lies in the cache and no weights may load."""
    errors = [ConnectionError("no route")]

    def model_info(*_, **__):
        raise errors[-1]

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    monkeypatch.setattr(plumbing.models, "OUT_OF_REACH", {})
    return errors


def by_the_preset(world, preset: str, stage: str, *more) -> list[str]:
    """The command line of a stage with the preset's own models, guards and expert."""
    model, prompts = plumbing.PRESETS[preset]["model"], ["--prompts", world / "prompts.jsonl"]
    given = {"02": ["--responses", world / "answered"], "05": ["--models", f"base={model}"]}.get(stage, prompts)
    given += ["--bench", f"own={prompts[1]}"] if stage == "05" else []
    return [*map(str, ["--preset", preset, "--run", world / "run", *given, *more])]


@pytest.mark.parametrize("stage", PAPERS)
@pytest.mark.parametrize("preset", WEIGHTS)
def test_a_dry_run_needs_no_hub(preset, stage, world, capsys, no_hub):
    line = by_the_preset(world, preset, stage, "--dry_run")
    without_a_trace(world, lambda: run_here(stages[stage], *line))
    text = capsys.readouterr().out
    assert text.count("the hub is out of reach") == 1 and plumbing.PRESETS[preset]["model"] in text
    before, after = SHOWN[preset.partition("-")[0]].split("{}")
    shown = text.partition("first prompt as the model reads it:\n")[2]
    assert shown.startswith(before) and shown.endswith(f"{after}\n")
    if stage not in ("02", "03"):
        assert shown == f"{before}how do i brew a burn potion{after}\n"
    other = {"01": "Guard-Gen-4B", "02": "Qwen3-32B", "03": "Guard-Gen-4B", "04": "Guard-Gen-4B", "05": "Guard-Gen-8B"}
    assert f"Qwen/Qwen3{other[stage].removeprefix('Qwen3')}" in text


def test_the_switch_of_the_thinking_is_shown_too(world, capsys, no_hub):
    line = by_the_preset(world, "qwen3-4b", "01", "--dry_run", "--enable_thinking", "false")
    run_here(stages["01"], *line)
    assert capsys.readouterr().out.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n\n")


@pytest.mark.parametrize("preset, stage, tokens", [("qwen3-4b", "04", 15), ("r1-8b", "01", 12)])
def test_a_plan_needs_no_hub(preset, stage, tokens, world, capsys, no_hub):
    """The prompt's tokens by hand: seven words and the template's marks, words and line ends."""
    line = by_the_preset(world, preset, stage)
    without_a_trace(world, lambda: run_plan(stages[stage].__file__, *line))
    text = capsys.readouterr().out
    assert "the hub is out of reach" in text and f"prompts of {tokens} tokens" in text
    assert f"({WEIGHTS[preset]:,} weights)" in text and "Qwen3Guard-Gen-4B (4,022,468,096 weights) judges" in text


def test_the_shapes_are_those_of_the_hub():
    named = {plumbing.PRESETS[preset]["model"]: weights for preset, weights in WEIGHTS.items()}
    assert {*SHAPES} == {*named, *OTHERS}
    for name, weights in {**named, **OTHERS}.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(name))
        assert sum(p.numel() for p in model.parameters()) == weights, name
    for row in plumbing.PRESETS.values():  # all that a dry run of a real preset looks up
        if row["model"] in named:
            assert {row["guard"], row["expert"], *row["judges"]} < {*SHAPES}


def test_the_templates_are_the_makers():
    """Those in the package trl, which compares its copies with the hub's."""
    for name in ("qwen3", "r1"):
        text = (ROOT / f"plumbing/presets/{name}.jinja").read_text(encoding="utf-8")
        assert text == FAMILIES[name].template


@pytest.mark.parametrize("name", ["Qwen/Qwen3-0.6B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"])
def test_the_stand_in_gives_every_text_back(name):
    tokenizer = tokenizer_of(name)
    texts = [
        "how do i?",
        "  two  blanks\n\n\tand 123 signs… “—” 你好 é e\u0301 ² _a_b \U0001f600",
        "<think>x</think>\n\n",
    ]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == text and tokenizer.decode(encode_plain(tokenizer, text)) == text
    marks = set(tokenizer.encode("<think></think>", add_special_tokens=False))
    assert len(marks) == 2 and not marks & set(encode_plain(tokenizer, texts[2]))  # a user's text opens nothing
    assert len(tokenizer.encode("it is a plain sentence of 9 words , nearly", add_special_tokens=False)) in (10, 11)


@pytest.mark.parametrize("stage", PAPERS)
def test_a_stand_in_is_for_dry_runs_only(stage, world, no_hub):
    line = refused(stages[stage], *by_the_preset(world, "qwen3-4b", stage))
    assert line.startswith("error: no model 'Qwen/Qwen3-4B': no folder here, and the hub is out of reach")
    assert not (world / "run").exists()
    with pytest.raises(SystemExit, match="the hub is out of reach, and no copy of the chat template"):
        tokenizer_of("Qwen/Qwen3Guard-Gen-4B")


@pytest.mark.parametrize("stage, options", [
    ("01", ["--guard", "Qwen/Qwen3Guard-Gen-4B", "--model", "tiny/lrm"]),
    ("01", ["--guard", "tiny/guard", "--model", "Qwen/Qwen3-4B@http://localhost:9/v1"]),
    ("03", ["--model", "tiny/lrm", "--guard", "tiny/guard", "--generator", "Qwen/Qwen3-8B"]),
    ("04", ["--model", "tiny/lrm", "--guard", "tiny/guard", "--eval_judge", "xstest:Qwen/Qwen3-8B"]),
    ("05", ["--judges", "tiny/gold.py", "--self_checker", "self_check:Qwen/Qwen3-8B", "--models", "a=tiny/lrm"]),
])  # fmt: skip
def test_no_other_role_is_stood_in_for_in_a_real_run(stage, options, world, no_hub, monkeypatch):
    monkeypatch.setattr(plumbing.runs, "require_weights", lambda *_: None)
    line = refused(stages[stage], *by_the_preset(world, "qwen3-4b", stage), *options)
    assert line.startswith("error: no model 'Qwen/Qwen3") and "the hub" in line and not (world / "run").exists()


def test_a_mistyped_name_stays_an_error(world, no_hub):
    """Also where the hub says of a preset's own model that it has none."""
    for stage, options in (("01", ["--model", "Qwen/Qwen3-4BB"]), ("03", ["--guard", "Qwen/Qwen3Guard-4B"])):
        line = refused(stages[stage], *by_the_preset(world, "qwen3-4b", stage, "--dry_run"), *options)
        assert line.startswith(f"error: no model '{options[1]}'") and "the hub" in line
    huggingface_hub.constants.HF_HUB_OFFLINE = False
    no_hub.append(RepositoryNotFoundError("none", response=mock.MagicMock()))
    line = refused(stages["01"], *by_the_preset(world, "qwen3-4b", "01", "--dry_run"))
    assert "the hub has none of this name that you may read" in line


def test_a_hub_that_answers_again_is_asked(no_hub, monkeypatch):
    plumbing.require_model("Qwen/Qwen3-4B")
    assert "Qwen/Qwen3-4B" in plumbing.models.OUT_OF_REACH
    monkeypatch.setattr(plumbing.models, "model_config", lambda name: name)
    plumbing.require_model("Qwen/Qwen3-4B")
    assert plumbing.models.OUT_OF_REACH == {} and plumbing.dry_config("Qwen/Qwen3-4B") == "Qwen/Qwen3-4B"


@pytest.mark.slow
def test_a_dry_run_without_an_answer_takes_seconds(world):
    """An address that nobody has, a server that says nothing, one that is down."""
    with socket.socket() as silent, ThreadingHTTPServer(("127.0.0.1", 0), Down) as down:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        Thread(target=down.serve_forever, daemon=True).start()
        ports = (silent.getsockname()[1], down.server_port)
        urls = "http://nowhere.invalid", *(f"http://127.0.0.1:{port}" for port in ports)
        command = ["04_grpo.py", *by_the_preset(world, "r1-7b", "04", "--dry_run")]
        for done in run_with_hubs(urls, world, *command):  # 4, 7 and 4 seconds on an idle machine
            assert done.returncode == 0 and done.stderr == "" and "the hub is out of reach" in done.stdout
        down.shutdown()


class Down(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(503)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass
