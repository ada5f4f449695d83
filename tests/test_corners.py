"""Models, files and options that few people have: what they get, by hand or by another way of computing it."""

import json
import unicodedata
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import assert_log_probs, load, refused, rows, run_here
from test_figures import drawn
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
)

import engines
import judges
import plumbing
from common import Example, TokenScorer, load_model, load_tokenizer, make_trainer, pad_batch, save_checkpoint
from engines import Sampling, starts
from engines.hf import HfSampler
from plumbing import Measure, figures

generate, verify, steer, grpo, evaluate = map(
    load, ("01_generate", "02_verify_sft", "03_steer_selfgen", "04_grpo", "05_eval")
)


def endless(net):
    """A sampler in front of it, whose responses end by no token."""
    sampler = HfSampler(net.eval(), load_tokenizer("tiny/lrm"), 10_000)
    sampler.eos = {10**6}
    return sampler


def numbers(seed: int, count: int) -> list[int]:
    return torch.randint(3, 90, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# Models ---------------------------------------------------------------------------------------------------------------
def test_a_response_ends_where_the_model_can_read_no_more():
    """GPT-2 has no position behind its last one; a shorter prompt beside it goes on."""
    torch.manual_seed(0)
    net = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    prompts = [("long", numbers(1, 25)), ("short", numbers(2, 10))]
    for n, new, expected in ((1, 60, [7, 22]), (3, 60, [7, 22]), (2, 15, [7, 15])):
        made = dict(endless(net).generate(prompts, n, Sampling(new, 1.0)))
        assert [[len(s.ids) for s in made[i]] for i in (0, 1)] == [[size] * n for size in expected]
        assert {s.finish for samples in made.values() for s in samples} == {"length"}
        for (_, prompt), samples in zip(prompts, made.values()):
            for sample in samples:
                assert_log_probs(net, prompt, sample, 1.0, 1e-4)


def test_longrope_is_read_up_to_where_its_positions_change():
    """Beyond 24 tokens this Phi-3 turns all positions by other factors, also those that a cache holds."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 2.0, 4.0, 8.0],
    }
    rope |= {"original_max_position_embeddings": 24}
    shape = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = Phi3Config(
        **shape, max_position_embeddings=96, original_max_position_embeddings=24, rope_parameters=rope, pad_token_id=0
    )
    torch.manual_seed(0)
    net = Phi3ForCausalLM(config).eval()
    sampler, prompts = endless(net), [("a", numbers(1, 8)), ("b", numbers(2, 20))]
    assert sampler.context == plumbing.context_of(config) == 24
    together = dict(sampler.generate(prompts, 1, Sampling(60, 1.0)))
    [alone] = dict(sampler.generate(prompts[:1], 1, Sampling(60, 1.0))).values()
    assert len(alone[0].ids) == 16 and len(together[1][0].ids) == 4 and alone[0].ids == together[0][0].ids
    assert_log_probs(net, prompts[0][1], alone[0], 1.0, 1e-4)


def test_a_config_of_text_and_images_is_trained():
    """Gemma 3's whole config has no vocabulary of its own."""
    text = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    text |= dict(
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, query_pre_attn_scalar=8, sliding_window=8
    )
    images = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )
    marks = dict(mm_tokens_per_image=4, image_token_index=90, boi_token_index=91, eoi_token_index=92)
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(Gemma3Config(text_config=text, vision_config=images, **marks)).eval()
    example = Example(numbers(1, 6), numbers(2, 5))
    scorer = TokenScorer(net)
    found = scorer(*pad_batch([example])).log_probs.tolist()
    assert scorer.fast and plumbing.context_of(net.config) == 64
    assert_log_probs(net, example.prompt, engines.Sample(example.response, found, "stop"), 1.0, 1e-4)


def test_a_temperature_without_do_sample_is_saved(tmp_path):
    """transformers loads such a generation config and refuses to save it."""
    net, tokenizer = load_model("tiny/lrm"), load_tokenizer("tiny/lrm")
    net.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9}')
    source = str(tmp_path / "model")
    save_checkpoint(load_model(source), tokenizer, tmp_path / "checkpoint", source)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint").generation_config
    assert (saved.temperature, saved.top_p, saved.do_sample) == (0.6, 0.9, True)


def test_a_checkpoint_has_the_precision_of_its_source(tmp_path):
    """Trained in float32 from bfloat16, twice: the same size, the same dtype in the config, a tied head stored once."""
    tokenizer = load_tokenizer("tiny/lrm")
    net = AutoModelForCausalLM.from_pretrained("tiny/lrm", dtype=torch.bfloat16)
    net.save_pretrained(tmp_path / "0")
    for step in (1, 2):
        source = str(tmp_path / str(step - 1))
        save_checkpoint(load_model(source, torch.float32), tokenizer, tmp_path / str(step), source)
        config = json.loads((tmp_path / str(step) / "config.json").read_text())
        assert config["dtype"] == "bfloat16"
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in "012"]
    assert max(sizes) - min(sizes) < 1000
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "2", dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), again.state_dict().values()))


def test_layers_for_lora_are_looked_for_before_any_work(tmp_path, capsys):
    run = ["--run", tmp_path / "run", "--dry_run"]
    line = refused(steer, *run, "--lora_targets", "qkv_proj")
    assert "no linear layer is named qkv_proj in tiny/lrm" in line and "q_proj" in line
    assert "the head of tiny/lrm is its embedding" in refused(steer, *run, "--lora_targets", "lm_head")
    run_here(steer, *run, "--lora_targets", "q_proj", "v_prj")
    assert "tiny/lrm has no v_prj; without LoRA: down_proj gate_proj" in capsys.readouterr().out


def test_a_launchers_gradient_accumulation_divides_nothing(monkeypatch):
    options = SimpleNamespace(model="tiny/lrm", dtype="auto", lora_rank=0, learning_rate=0.0, recompute=False)
    norms = []
    for steps in ("1", "4"):
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", steps)
        trainer = make_trainer(Accelerator(), options)
        batch = pad_batch([Example([5, 6, 7], [8, 9, 2])])
        trainer.backward(-trainer.scorer(*batch).log_probs.mean())
        norms.append(trainer.step())
    assert norms[0] == norms[1] > 0


# Samplers -------------------------------------------------------------------------------------------------------------
def test_a_start_that_the_tokenizer_normalises_is_not_the_models(monkeypatch):
    """Qwen's tokenizers compose accents: what the attacker wrote comes back in other code points."""
    written = "<think>\nthe cafe\u0301 is fine."
    texts = {0: written, 1: " i check."}
    sampler = engines.Sampler()
    sampler.generate = lambda *_: [(0, [engines.Sample([1], [0.0], "length")])]
    sampler.tokenizer = SimpleNamespace(decode=lambda ids: unicodedata.normalize("NFC", "".join(texts[i] for i in ids)))
    monkeypatch.setattr("engines.base.render_chat", lambda *_, **__: ([0], False))
    monkeypatch.setattr(plumbing, "begun_ids", lambda *_: [0])
    [(_, [reply])] = sampler.replies([("k", [{"role": "assistant", "content": written}])], 1, Sampling(4, 0.0))
    assert engines.sample_row(reply)["own_thinking"] == "i check."


def test_starts_without_a_whole_benign_response():
    row = {"id": "h", "prompt": "how?", "harmful": True}
    assert starts.start_of("think-empty", row, []) == "<think>\n\n</think>\n\n"
    with pytest.raises(SystemExit, match="--prefill think-open: no response to a benign prompt is whole"):
        starts.start_of("think-open", row, [])


def test_a_field_that_begins_responses_is_asked_of_harmful_prompts_alone():
    raw = [{"prompt": "how?", "harmful": True, "my": "sure"}, {"prompt": "why?", "harmful": False}]
    harmful, benign = plumbing.prompt_rows(raw, "x.jsonl", keep=("my",))
    assert harmful["fields"] == {"my": "sure"} and "fields" not in benign
    with pytest.raises(SystemExit, match="x.jsonl, row 1, field my: no text to begin a response with"):
        plumbing.prompt_rows([{"prompt": "how?", "harmful": True}], "x.jsonl", keep=("my",))


# Stages ---------------------------------------------------------------------------------------------------------------
def test_groups_of_equal_rewards_teach_nothing():
    """Whatever the reward: the mean of eight equal float32 numbers is often one unit off."""
    values = torch.arange(1, 20_000) / 10_000
    for group in (2, 3, 7, 8, 16):
        assert not grpo.group_advantages(values.unsqueeze(1).repeat(1, group)).any()
    holed = values.unsqueeze(1).repeat(1, 8)
    holed[:, 3] = torch.nan
    assert not grpo.group_advantages(holed).nan_to_num().any()


@pytest.mark.parametrize("option, value, words", [
    ("--temperature", "0", "--temperature 0.0: it must be at least 0.01"),
    ("--group_size", "1", "--group_size 1: it must be at least 2"),
    ("--seed", "20251130083000", "--seed 20251130083000: it must be at most"),
])  # fmt: skip
def test_numbers_that_train_nothing(option, value, words, tmp_path):
    assert words in refused(grpo, "--run", tmp_path / "run", option, value)


def test_fixed_refusals_of_harmful_prompts_alone(tmp_path, capsys):
    """Nothing is sampled, so there is no file of responses."""
    plumbing.write_jsonl(tmp_path / "p.jsonl", [{"id": str(i), "prompt": "how?", "harmful": True} for i in range(4)])
    options = ["--run", tmp_path / "run", "--prompts", tmp_path / "p.jsonl", "--fixed_refusal", "sorry, no."]
    run_here(steer, *options, "--epochs", 1)
    assert "\n03_steer_selfgen\n" in capsys.readouterr().out and (tmp_path / "run/checkpoint").is_dir()


def test_the_verifier_reads_all_turns_of_a_chat():
    chat = [{"role": "system", "content": "You brew."}, {"role": "user", "content": "How much?"}]
    row = {"id": "a", "prompt": chat, "harmful": False, "samples": [{"answer": "two"}]}
    [selected] = verify.select([row], {"a": [{"safety": "safe"}]})
    prompt = verify.verification_prompt("of {prompt}: {answer}", selected["request"], "two")
    assert prompt == "of system: You brew.\n\nuser: How much?: two" and selected["request"] == chat


def test_models_are_compared_with_the_first_one_or_with_none():
    """Of the first model no verdict can be read: the second is not taken in its place."""
    responses, judged = {}, {}
    for name, safety in (("base", "unparsed"), ("b", "unsafe"), ("c", "safe")):
        key = (name, evaluate.Case("plain", "preset", ""))
        sample = {"thinking": "", "answer": "so", "state": "closed", "finish": "stop"}
        responses[key] = [{"id": str(i), "prompt": "p", "harmful": True, "samples": [sample]} for i in range(9)]
        verdicts = {str(i): [{"safety": safety, "refusal": "no"}] for i in range(9)}
        judged[key] = {"j": {"answer": verdicts, "response": verdicts}}
    results, _ = evaluate.compare_all(evaluate.Options(judges=["j"]), responses, judged, dict.fromkeys(responses, {}))
    found = {(row["model"], row["metric"]): row for row in results}
    assert ("base", "asr") not in found and found["b", "asr"]["value"] == 1 and found["c", "asr"]["value"] == 0
    assert not any("change" in found[model, "asr"] for model in "bc")
    assert found["c", "truncated"]["change"]["value"] == 0


def test_labels_of_a_verification_test_that_changed_are_other_prompts(tmp_path):
    recipes = []
    for verdict in ("safe", "unsafe"):
        row = {"id": "1", "prompt": "p", "harmful": True, "verdict": verdict}
        plumbing.write_jsonl(tmp_path / "v.jsonl", [row])
        recipes.append(plumbing.load_benchmark("verify", str(tmp_path / "v.jsonl"), 0)[1]["prompts"])
    assert recipes[0] != recipes[1]


def test_a_self_checker_says_true_or_false(tmp_path):
    file = tmp_path / "rule.py"
    file.write_text("def self_check(thinking):\n    return 'safe' in thinking or None\n")
    rule = judges.self_check_rule(str(file))
    assert rule("is it safe?") is True
    with pytest.raises(SystemExit, match=r"self_check\(\) gave None, not True or False"):
        rule("hm")


@pytest.mark.parametrize("answer, right", [
    (r"\boxed{B}", True), (r"\boxed{B)}", True), (r"\boxed{(B)}", True), (r"\boxed{\text{B}}", True),
    (r"\boxed{B) 12 m}", True), (r"\boxed{A}, no: \boxed{B}", True), (r"\boxed{C)}", False), (r"\boxed{A, B}", False), (r"\boxed{BC}", False),
])  # fmt: skip
def test_the_letter_of_an_option(answer, right):
    assert judges.answer_is_correct(answer, "B") is right


def test_a_guard_without_system_turns_reads_the_text_before_the_first_one():
    judge = judges.Judge.__new__(judges.Judge)
    judge.sampler, judge.style = None, judges.judge.importlib.import_module("judges.llama_guard")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How?"}]
    asked, answer = {"role": "user", "content": "Be brief.\n\nHow?"}, {"role": "assistant", "content": "So."}
    assert judge.messages(chat, "So.") == [asked, answer]
    judge.style = judges.judge.importlib.import_module("judges.qwen3guard")
    assert judge.messages(chat, "So.") == [*chat, answer]


def test_two_processes_and_a_name_with_brackets(tmp_path, monkeypatch):
    """What the second process wrote is found again, and its file is joined."""
    path, work = tmp_path / "plain.j[1].jsonl", lambda todo: iter([[{**row, "done": 1} for row in todo]])
    plumbing.append_jsonl(tmp_path / "plain.j[1].process1.jsonl", [{"id": "b", "done": 2}])
    finished = plumbing.once_per_row(path, [{"id": "a"}, {"id": "b"}], work)
    assert {i: row["done"] for i, row in finished.items()} == {"a": 1, "b": 2}
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and len(rows(path)) == 2


def test_guards_of_all_runs_behind_a_model(tmp_path):
    """Stage 02 trains on the labels of a stage 01; stage 04 may go on from there."""
    made = {"01": {"guard": "g1"}, "02": {"responses": f"{tmp_path}/01", "model": "tiny/lrm", "expert": "e"}}
    made |= {"04": {"guard": "g4", "model": f"{tmp_path}/02/checkpoint"}}
    for name, options in made.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "options.json").write_text(json.dumps({"options": options}))
    assert plumbing.recipe.guards_of(made["02"]) == {"g1"} and plumbing.recipe.guards_of(made["04"]) == {"g1", "g4"}
    assert plumbing.recipe.guards_of(None) == plumbing.recipe.guards_of({"model": "tiny/lrm"}) == set()


# Figures --------------------------------------------------------------------------------------------------------------
def test_few_prompts_are_not_certain():
    one = Measure({"a": [True] * 4 + [False] * 4})
    assert one.row()["low"] < 0.1 and one.row()["high"] > 0.9
    for count, inside in ((1, True), (5, True), (6, False)):
        before, after = (Measure({str(i): [flag] for i in range(count)}) for flag in (True, False))
        change = after.against(before)["change"]
        assert change["value"] == -1 and change["inside the noise"] is inside


def test_a_category_without_a_verdict_is_no_zero(tmp_path):
    categories = []
    for model, kind, value, n in (("a", "x", 1.0, 9), ("a", "y $ & $", 0.5, 8), ("b", "x", 0.25, 3)):
        row = {"model": model, "category": kind, "benchmark": "plain", "metric": "asr", "value": value, "n": n}
        categories.append(row)
    [axis] = drawn(figures.draw_categories, categories, ["a", "b"], "j", tmp_path / "c.png").axes
    assert [text.get_text() for text in axis.texts] == ["1.00", "0.25", "0.50", "–"]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["x (plain), n = 9", r"y \$ & \$ (plain), n = 8"]


def test_no_panel_is_no_figure(tmp_path):
    figures.draw_results([], ["a"], ["j"], tmp_path / "results.png")
    assert not (tmp_path / "results.png").exists()
