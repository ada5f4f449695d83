"""`base+adapter`: merged as PEFT merges it, in every stage what the merged folder is, or refused in one line."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, load, refused, rows, run_here
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import engines
import plumbing
from common import load_model, load_tokenizer
from engines.base import end_tokens_of, plain_folder
from plumbing.names import base_and_adapter, tokenizer_source

sys.path.insert(0, str(ROOT / "bench"))
import attack  # noqa: E402

generate, verify, steer, grpo, evaluate = (
    load(name) for name in ("01_generate", "02_verify_sft", "03_steer_selfgen", "04_grpo", "05_eval")
)
WEIGHTS = "adapter_model.safetensors"


def make_adapter(folder, base="tiny/lrm", size=0.05, seed=0, **settings):
    """A LoRA that PEFT writes, its B no longer zero, so that it changes the model."""
    wanted = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**wanted))
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter.data, std=size)
    model.save_pretrained(folder)
    return folder


def merged_by_peft(base, adapter, dtype):
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter
    ).merge_and_unload()


def write_merged(folder, base, adapter):
    """The plain folder: PEFT's merge, all else copied from the base."""
    shutil.copytree(base, folder)
    merged_by_peft(base, adapter, None).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(base+adapter, the plain folder) of a model and of a guard that the adapters have changed."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for name, size in (("lrm", 0.11), ("guard", 0.1)):
        adapter = make_adapter(folder / f"{name}_adapter", f"tiny/{name}", size)
        found[name] = (f"tiny/{name}+{adapter}", str(write_merged(folder / name, f"tiny/{name}", adapter)))
    return SimpleNamespace(**found)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    """A random Qwen2: biases in q, k and v, a head of its own."""
    folder = tmp_path_factory.mktemp("untied")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(Qwen2Config(**sizes, **heads)).save_pretrained(folder)
    return str(folder)


# The merge ------------------------------------------------------------------------------------------------------------
KINDS = {
    "plain": {},
    "all linear": {"target_modules": "all-linear", "r": 3},
    "by a regular expression": {"target_modules": r".*\.[01]\.mlp\.(up|down)_proj"},
    "root of the rank": {"use_rslora": True, "lora_alpha": 3},
    "ranks and alphas of some": {
        "rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\.down_proj": 7},
        "alpha_pattern": {r"1\.self_attn\.v_proj": 5, "q_proj": 16},
    },
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "but not these": {"exclude_modules": r".*\.0\..*"},
    "the head": {"target_modules": ["lm_head", "o_proj"]},
    "whole modules": {"modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "whole, and a target": {"target_modules": ["o_proj", "lm_head"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_merge_is_pefts(kind, dtype, untied, tmp_path):
    """Bit for bit, with the base's files in either precision: bfloat16 is cast after the sum."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(untied, dtype=dtype).save_pretrained(base)
    make_adapter(tmp_path / "adapter", base, 0.3, **KINDS[kind])
    ours = plumbing.load_whole(f"{base}+{tmp_path}/adapter", dtype).state_dict()
    theirs = merged_by_peft(base, tmp_path / "adapter", dtype).state_dict()
    before = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert any(not torch.equal(before[name], theirs[name]) for name in theirs)


def test_an_adapter_in_bfloat16_is_summed_in_float32(tmp_path):
    """By double precision, within one rounding."""
    make_adapter(tmp_path / "a")
    tensors = {name: t.bfloat16() for name, t in load_file(tmp_path / "a" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    ours = load_model(f"tiny/lrm+{tmp_path}/a").state_dict()
    base = load_file("tiny/lrm/model.safetensors")
    key = "model.layers.2.mlp.down_proj"
    A, B = (tensors[f"base_model.model.{key}.lora_{half}.weight"].double() for half in "AB")
    expected = base[f"{key}.weight"].double() + 8 / 4 * (B @ A)
    torch.testing.assert_close(ours[f"{key}.weight"].double(), expected, atol=1e-6, rtol=0)


def test_in_another_precision_it_is_still_the_merged_folder(tmp_path):
    """GRPO of all weights loads a bfloat16 model in float32; vLLM reads the same model from a folder."""
    AutoModelForCausalLM.from_pretrained("tiny/lrm", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    make_adapter(tmp_path / "a", tmp_path / "base")
    merged_by_peft(tmp_path / "base", tmp_path / "a", torch.bfloat16).save_pretrained(tmp_path / "plain")
    ours = plumbing.load_whole(f"{tmp_path}/base+{tmp_path}/a", torch.float32).state_dict()
    plain = plumbing.load_whole(str(tmp_path / "plain"), torch.float32).state_dict()
    assert all(torch.equal(ours[name], plain[name]) for name in plain)


def test_an_engine_that_reads_folders_gets_the_merged_one(two, tmp_path):
    """A plain folder in the run folder, which is gone once the engine has it."""
    name, plain = two.lrm
    with plain_folder(name, load_tokenizer(name), str(tmp_path)) as folder:
        written, expected = load_file(f"{folder}/model.safetensors"), load_file(f"{plain}/model.safetensors")
        assert written.keys() == expected.keys() and all(torch.equal(written[n], expected[n]) for n in written)
        for file in ("config.json", "generation_config.json"):
            assert (Path(folder) / file).read_text() == (Path(plain) / file).read_text(), file
        tokens = AutoTokenizer.from_pretrained(folder)
        assert tokens.chat_template == AutoTokenizer.from_pretrained(plain).chat_template
        assert end_tokens_of(folder, tokens) == end_tokens_of(plain, tokens) == end_tokens_of(name, tokens)
        plumbing.require_model(folder)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError), plain_folder(name, load_tokenizer(name), str(tmp_path)):
        raise OSError  # the engine can't open it
    assert not (tmp_path / "merged").exists()
    with plain_folder("tiny/lrm", None, str(tmp_path)) as folder:
        assert folder == "tiny/lrm" and list(tmp_path.iterdir()) == []


def test_vllm_answers_as_our_loop(two, requests, tmp_path):
    pytest.importorskip("vllm")
    name, options = two.lrm[0], {"run": str(tmp_path), "tensor_parallel": 1, "batch_tokens": 32_768, "dtype": "auto"}
    texts = []
    for engine in ("hf", "vllm"):
        sampler = engines.open_sampler(name, SimpleNamespace(engine=engine, **options))
        replies = dict(sampler.generate(requests, 1, engines.Sampling(40, 0.0)))
        texts.append([replies[i][0].ids for i in sorted(replies)])
        sampler.close()
    assert texts[0] == texts[1] and list(tmp_path.iterdir()) == []


# Names ----------------------------------------------------------------------------------------------------------------
def test_a_plus_in_a_folders_name(tmp_path):
    """A model's, an adapter's or both; `a+b` where all three exist is the folder of that name."""
    base, adapter = tmp_path / "a+b", tmp_path / "c+d" / "e+f"
    shutil.copytree("tiny/lrm", base)
    make_adapter(adapter)
    assert base_and_adapter(str(base)) == (str(base), "")
    assert base_and_adapter(f"{base}+{adapter}") == (str(base), str(adapter))
    assert base_and_adapter(f"org/model+{adapter}") == ("org/model", str(adapter))
    plumbing.require_model(str(base))
    plumbing.require_model(f"{base}+{adapter}")
    tiny = load_model("tiny/lrm").state_dict()
    plain, merged = load_model(str(base)).state_dict(), load_model(f"{base}+{adapter}").state_dict()
    key = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(plain[key], tiny[key]) and not torch.equal(merged[key], tiny[key])


def test_a_served_name_is_only_a_name(two):
    name = f"{two.lrm[0]}@http://127.0.0.1:9/v1"
    assert base_and_adapter(name) == (name, "") and plumbing.content_of(name) == "an endpoint"
    plumbing.require_model("a+b@http://127.0.0.1:9/v1", endpoint=True)
    plumbing.require_model(name, served=True)  # its tokenizer is read here
    sampler = engines.open_sampler(name, None)
    assert sampler.model == two.lrm[0] and sampler.tokenizer.chat_template == load_tokenizer("tiny/lrm").chat_template
    assert sampler.eos == end_tokens_of("tiny/lrm", sampler.tokenizer)


def test_the_adapters_own_tokenizer(tmp_path, capsys):
    """With its chat template; a base that has none is no obstacle."""
    base, adapter = tmp_path / "base", make_adapter(tmp_path / "a")
    shutil.copytree("tiny/lrm", base)
    (base / "chat_template.jinja").unlink()
    assert tokenizer_source(f"{base}+{adapter}") == str(base)
    assert "has no chat template" in one_line(f"{base}+{adapter}")
    tokenizer = load_tokenizer("tiny/lrm")
    tokenizer.chat_template = "of the adapter: " + tokenizer.chat_template
    tokenizer.save_pretrained(adapter)
    capsys.readouterr()
    plumbing.require_model(f"{base}+{adapter}")
    assert "tokenizer and chat template are the adapter's own" in capsys.readouterr().out
    assert load_tokenizer(f"{base}+{adapter}").chat_template == tokenizer.chat_template
    tokenizer.add_tokens([f"new{i}" for i in range(9)])
    tokenizer.save_pretrained(adapter)
    assert f"has {len(tokenizer)} tokens" in one_line(f"{base}+{adapter}")


# Stages ---------------------------------------------------------------------------------------------------------------
def samples_of(path):
    """{id: all of a row but what names the model}."""
    return {row["id"]: row for row in rows(path)}


def same_weights(one, other):
    a, b = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def answered(two, tmp_path_factory):
    """Stage 01 by the adapters, by the plain folders and by the base."""
    folder = tmp_path_factory.mktemp("01")
    options = ["--limit", 24, "--n", 4, "--temperature", 1]
    for run, model, guard in (("a", two.lrm[0], two.guard[0]), ("b", *(pair[1] for pair in (two.lrm, two.guard)))):
        run_here(generate, "--run", folder / run, "--model", model, "--guard", guard, *options)
    run_here(generate, "--run", folder / "base", *options)
    return folder


def test_01_answers_and_labels_as_the_merged_folders(answered):
    for file in ("responses.jsonl", "labels.jsonl"):
        adapted, plain, base = (samples_of(answered / run / file) for run in ("a", "b", "base"))
        assert adapted == plain and len(adapted) == 24
        assert adapted != base  # the adapters do something


def test_01_records_base_and_adapter_and_names_the_one_that_changed(two, tmp_path):
    model = make_adapter(tmp_path / "adapter")
    options = ["--run", tmp_path / "01", "--guard", "tiny/gold.py", "--limit", 2, "--n", 1]
    options += ["--model", f"tiny/lrm+{model}"]
    run_here(generate, *options)
    recorded = json.loads((tmp_path / "01/options.json").read_text())["options"]
    assert recorded["model"] == f"tiny/lrm+{model}"
    assert recorded["content of tiny/lrm"] == plumbing.fingerprint("tiny/lrm")
    assert recorded[f"content of {model}"] == plumbing.fingerprint(str(model))
    run_here(generate, *options)
    before = plumbing.content_of(f"tiny/lrm+{model}")
    tensors = load_file(model / WEIGHTS)
    next(iter(tensors.values()))[0, 0] += 1e-3
    save_file(tensors, model / WEIGHTS)
    line = refused(generate, *options)
    assert f"content of {model} (" in line and "content of tiny/lrm" not in line
    after = plumbing.content_of(f"tiny/lrm+{model}")
    assert before != after and before.split("+")[0] == after.split("+")[0] == plumbing.content_of("tiny/lrm")


def test_a_folder_without_a_slash_is_recorded_too(tmp_path, monkeypatch):
    make_adapter(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    options = SimpleNamespace(model=f"{ROOT}/tiny/lrm+adapter", run="", dry_run=False, accept_changes=False)
    monkeypatch.setattr(plumbing.runs.dataclasses, "asdict", lambda o: dict(vars(o)))
    assert "content of adapter" in plumbing.runs.record_of(options, ())


def test_02_trains_what_the_merged_folder_would_be(two, answered, tmp_path):
    for run, model in (("a", two.lrm[0]), ("b", two.lrm[1])):
        options = ["--model", model, "--expert", "tiny/expert", "--responses", answered / "b"]
        run_here(verify, "--run", tmp_path / run, *options, "--epochs", 1, "--keep_disagreements")
    assert rows(tmp_path / "a/train.jsonl") == rows(tmp_path / "b/train.jsonl") != []
    assert same_weights(tmp_path / "a/checkpoint", tmp_path / "b/checkpoint")
    assert not same_weights(tmp_path / "a/checkpoint", ROOT / two.lrm[1])
    for file in ("config.json", "generation_config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "a/checkpoint" / file).read_text() == (tmp_path / "b/checkpoint" / file).read_text(), file
    assert not (tmp_path / "a/checkpoint/adapter_config.json").exists()
    plumbing.require_model(str(tmp_path / "a/checkpoint"))
    summary = (tmp_path / "a/summary.txt").read_text()
    assert f"base={two.lrm[0]}" in summary


def test_02_asks_an_adapted_expert(answered, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", "tiny/expert")
    plain = write_merged(tmp_path / "expert", "tiny/expert", adapter)
    for run, expert in (("a", f"tiny/expert+{adapter}"), ("b", plain)):
        options = ["--responses", answered / "b", "--expert", expert, "--epochs", 1, "--keep_disagreements"]
        run_here(verify, "--run", tmp_path / run, *options)
    adapted, by_folder = (samples_of(tmp_path / run / "critiques.jsonl") for run in "ab")
    assert adapted == by_folder and adapted


def test_03_generates_and_trains_as_the_merged_folder(two, tmp_path):
    for run, i in (("a", 0), ("b", 1)):
        options = ["--model", two.lrm[i], "--generator", two.lrm[i], "--guard", "tiny/gold.py"]
        run_here(steer, "--run", tmp_path / run, *options, "--limit", 12, "--epochs", 1)
    assert rows(tmp_path / "a/train.jsonl") == rows(tmp_path / "b/train.jsonl") != []
    assert same_weights(tmp_path / "a/checkpoint", tmp_path / "b/checkpoint")
    assert (tmp_path / "a/trained.json").read_text() == (tmp_path / "b/trained.json").read_text()


@pytest.mark.parametrize("rank", [0, 4])
def test_04_trains_as_the_merged_folder(two, tmp_path, rank):
    """All weights with a frozen reference, and with LoRA on top of the merged one."""
    for run, i in (("a", 0), ("b", 1)):
        options = ["--model", two.lrm[i], "--guard", two.guard[i], "--steps", 2, "--batch_size", 2, "--group_size", 4]
        options += ["--limit", 12, "--beta", 0.04, "--lora_rank", rank]
        run_here(grpo, "--run", tmp_path / run, *options)
    for file in ("metrics.jsonl", "samples.jsonl"):
        a, b = (
            [{k: v for k, v in row.items() if "second" not in k} for row in rows(tmp_path / run / file)] for run in "ab"
        )
        assert a == b != []
    assert same_weights(tmp_path / "a/checkpoint", tmp_path / "b/checkpoint")


def test_05_evaluates_and_judges_as_the_merged_folders(two, tmp_path):
    options = ["--bench", "plain=tiny/prompts/test_plain.jsonl", "--limit", 8, "--self_checker", "tiny/gold.py"]
    for run, i in (("a", 0), ("b", 1)):
        models = ["--models", "base=tiny/lrm", f"adapted={two.lrm[i]}"]
        run_here(evaluate, "--run", tmp_path / run, *models, "--judges", f"qwen3guard:{two.guard[i]}", *options)
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in "ab"]
    figures = [[{k: v for k, v in row.items() if k != "judge"} for row in one["rows"]] for one in results]
    assert figures[0] == figures[1] != []
    a, b = (samples_of(tmp_path / run / "adapted/plain.responses.jsonl") for run in "ab")
    assert a == b != samples_of(tmp_path / "a/base/plain.responses.jsonl")
    recipe = results[0]["recipe"]["models"]["adapted"]
    assert (recipe["path"], recipe["content"]) == (two.lrm[0], plumbing.content_of(two.lrm[0]))


def test_05_sees_another_adapter_of_the_same_name(tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    options = ["--run", tmp_path / "05", "--models", f"adapted=tiny/lrm+{adapter}", "--limit", 2]
    options += ["--bench", "plain=tiny/prompts/test_plain.jsonl", "--judges", "tiny/gold.py"]
    run_here(evaluate, *options)
    make_adapter(tmp_path / "adapter", seed=1)
    assert "holds responses of model" in refused(evaluate, *options)


def test_the_attack_is_that_on_the_merged_folder(two, tmp_path):
    options = ["--attacks", "none", "best-of-n", "--k", 2, "--limit", 2, "--judge", "tiny/gold.py"]
    for run, i in (("a", 0), ("b", 1)):
        run_here(attack, "--out", tmp_path / run, "--models", f"adapted={two.lrm[i]}", *options)
    a, b = (json.loads((tmp_path / run / "attack.json").read_text()) for run in "ab")
    assert a["rows"] == b["rows"] != []
    assert plumbing.content_of(two.lrm[0]) in a["options"]["model adapted"]


@pytest.mark.parametrize("stage", ["01_generate", "04_grpo"])
def test_a_dry_run_reads_the_adapter(stage, two, tmp_path, capsys):
    run_here(load(stage), "--model", two.lrm[0], "--run", tmp_path / "run", "--dry_run")
    assert "first prompt as the model reads it" in capsys.readouterr().out and not (tmp_path / "run").exists()


# Refusals -------------------------------------------------------------------------------------------------------------
def one_line(name: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        plumbing.require_model(name)
    line = str(stopped.value)
    assert line.startswith("error: ") and "\n" not in line
    return line


def changed(folder, **settings):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


SETTINGS = {
    "use_dora": True,
    "bias": "all",
    "lora_bias": True,
    "fan_in_fan_out": True,
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "trainable_token_indices": [1],
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [3],
    "init_lora_weights": "pissa",
    "a_setting_of_tomorrow": 1,
    "peft_type": "IA3",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_another_kind_of_adapter_is_refused_by_its_name(setting, tmp_path):
    changed(make_adapter(tmp_path / "a"), **{setting: SETTINGS[setting]})
    line = one_line(f"tiny/lrm+{tmp_path}/a")
    assert setting in line and f"{tmp_path}/a" in line


def rewritten(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


KEY = "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"
DAMAGE = {
    "of another shape": (lambda t: t.update({KEY: t[KEY][:, :-1].contiguous()}), "lora_A.weight of shape (4, 383)"),
    "of another rank": (lambda t: t.update({KEY: t[KEY][:-1].contiguous()}), "lora_A.weight of shape (3, 384)"),
    "not all used": (lambda t: t.update({"base_model.model.other.weight": torch.zeros(1)}), "has other.weight"),
    "of a layer that is not here": (lambda t: t.update({KEY.replace(".1.", ".7.", 1): t[KEY].clone()}), "layers.7.mlp"),
    "one half lacks": (lambda t: t.pop(KEY), "lacks model.layers.1.mlp.down_proj.lora_A.weight"),
    "a layer lacks": (
        lambda t: [t.pop(k) for k in list(t) if "layers.3.mlp" in k],
        "lacks model.layers.3.mlp.down_proj",
    ),
    "another naming": (lambda t: t.update({"lora_unet.weight": torch.zeros(1)}), "holds lora_unet.weight"),
    "of an embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 696)}),
        "embed_tokens.lora_embedding_A",
    ),
    "of a tied head": (
        lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 128)}),
        "changes lm_head.weight, but model.embed_tokens.weight and lm_head.weight are one tensor",
    ),
    "of a norm": (
        lambda t: t.update({"base_model.model.model.norm.lora_A.weight": torch.zeros(4, 128)}),
        "norm.lora_A.weight, which is no linear layer",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_tensors_that_do_not_fit_are_named(what, tmp_path):
    change, words = DAMAGE[what]
    rewritten(make_adapter(tmp_path / "a"), change)
    assert words in one_line(f"tiny/lrm+{tmp_path}/a")
    with pytest.raises(SystemExit, match="error: "):  # nor is it loaded unasked
        load_model(f"tiny/lrm+{tmp_path}/a")


def test_files_that_lack_or_are_none(tmp_path):
    assert "no adapter_config.json in a folder behind the +" in one_line(f"tiny/lrm+{tmp_path}/nowhere")
    adapter = make_adapter(tmp_path / "a")
    name = f"tiny/lrm+{adapter}"
    assert "no folder at runs/nowhere" in one_line(f"runs/nowhere+{adapter}")
    assert "two adapters" in one_line(f"{name}+{adapter}")
    assert f"name its base before it: base+{adapter}" in one_line(str(adapter))
    whole = (adapter / WEIGHTS).read_bytes()
    (adapter / WEIGHTS).write_bytes(whole[:-5])
    assert "is no whole safetensors file" in one_line(name)
    (adapter / WEIGHTS).unlink()
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    assert "adapter_model.bin is not: convert it" in one_line(name)
    (adapter / "adapter_config.json").write_text("{")
    assert f"cannot read {adapter}/adapter_config.json" in one_line(name)
    both = tmp_path / "both"
    shutil.copytree("tiny/lrm", both)
    make_adapter(both)
    assert "holds a model and an adapter" in one_line(str(both))


def test_an_adapter_of_another_model_is_refused(untied, tmp_path):
    """By a shape, or by its layers; where it fits, what it says of its base is shown."""
    make_adapter(tmp_path / "a", untied)
    assert "an adapter of another model?" in one_line(f"tiny/lrm+{tmp_path}/a")


def test_what_the_adapter_says_of_its_base_is_shown(tmp_path, capsys):
    changed(make_adapter(tmp_path / "a"), base_model_name_or_path="owner/another")
    plumbing.require_model(f"tiny/lrm+{tmp_path}/a")
    assert "the adapter says that it was trained on owner/another" in capsys.readouterr().out


def test_a_refusal_comes_before_any_work(tmp_path):
    rewritten(make_adapter(tmp_path / "a"), DAMAGE["one half lacks"][0])
    guard = ["--guard", f"tiny/guard+{tmp_path}/a"]
    assert "lacks model.layers.1" in refused(generate, "--run", tmp_path / "01", *guard)
    assert not (tmp_path / "01").exists()
