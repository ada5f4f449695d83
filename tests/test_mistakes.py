"""A user's mistakes: each is one line that says what, where and what to do, before any model works and before the run
folder is made."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, load, refused, run_with_hubs

import engines
import judges
import plumbing

generate, verify, steer, grpo, evaluate = (
    load(name) for name in ("01_generate", "02_verify_sft", "03_steer_selfgen", "04_grpo", "05_eval")
)
BENCH = ["--bench", "plain=tiny/prompts/test_plain.jsonl"]


@pytest.fixture(autouse=True)
def nothing_works(monkeypatch):
    """pytest keeps its interrupts; a model that is loaded in a refused run is an error of the test."""
    before = signal.getsignal(signal.SIGINT)
    for module in (engines, judges.judge.engines):
        monkeypatch.setattr(module, "open_sampler", lambda *_, **__: pytest.fail("a model works"))
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Model folders, rules and stage 01 runs, each with one thing wrong."""
    folder = tmp_path_factory.mktemp("world")

    def model(name: str, *without: str):
        shutil.copytree("tiny/guard", folder / name, ignore=shutil.ignore_patterns(*without))
        return folder / name

    model("weightless", "*.safetensors")
    (model("pytorch", "*.safetensors") / "pytorch_model.bin").write_bytes(b"x")
    (model("gguf", "*.safetensors") / "model.q8.gguf").write_bytes(b"x")
    weights = model("cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    (model("nonsense") / "model.safetensors").write_bytes(b"no weights at all")
    part = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (model("lacking", "*.safetensors") / "model.safetensors.index.json").write_text(json.dumps(part))
    (folder / "lacking/other.safetensors").write_bytes((ROOT / "tiny/guard/model.safetensors").read_bytes())
    weights = model("misnamed") / "model.safetensors"
    weights.rename(weights.with_name("weights.safetensors"))
    model("templateless", "*.jinja")
    model("tokenless", "tokenizer*")
    model("configless", "config.json")
    (model("broken") / "config.json").write_text("{")
    (folder / "file").write_text("x")
    for name, body in {
        "syntax": "def judge(",
        "raises": "1 / 0",
        "exits": "exit(3)",
        "imports": "import no_such_module_anywhere",
        "empty": "",
        "constant": "judge = self_check = 'safe'",
        "fine": "def judge(prompt, answer):\n    return 'Safety: Safe\\nRefusal: No'",
    }.items():
        (folder / f"{name}.py").write_text(body)

    def answered(name: str, ids, harmful: bool):
        made = [{"id": str(i), "prompt": f"how do i make item {i}?", "harmful": harmful} for i in ids]
        sides = [{"answer": "no .", "safety": "safe"}, {"answer": "mix a and b .", "safety": "unsafe"}]
        (folder / name).mkdir()
        plumbing.write_jsonl(folder / name / "responses.jsonl", [{**row, "samples": sides} for row in made])
        plumbing.write_jsonl(folder / name / "labels.jsonl", [{"id": row["id"], "verdicts": sides} for row in made])

    answered("benign", range(4), False)
    answered("harmful", range(4), True)
    answered("overlapping", range(3, 8), True)
    return folder


def roles(folder: str, words: str) -> list:
    """A model folder as model, guard, judge and expert."""
    return [
        (generate, ["--model", folder], words),
        (generate, ["--guard", folder], words),
        (verify, ["--responses", "{w}/harmful", "--expert", folder], words),
        (steer, ["--generator", folder], words),
        (grpo, ["--eval_judge", folder], words),
        (evaluate, [*BENCH, "--models", f"a={folder}"], words),
        (evaluate, [*BENCH, "--judges", f"xstest:{folder}"], words),
        (evaluate, [*BENCH, "--self_checker", f"self_check:{folder}"], words),
    ]


TABLE = [
    *roles("{w}/weightless", "{w}/weightless has no weights: no *.safetensors"),
    *roles("{w}/templateless", "{w}/templateless has no chat template"),
    (generate, ["--guard", "{w}/pytorch"], "pytorch_model.bin, but weights are read from *.safetensors only"),
    (grpo, ["--model", "{w}/gguf"], "model.q8.gguf, but weights are read from *.safetensors only"),
    (generate, ["--model", "{w}/cut"], "{w}/cut/model.safetensors is no whole safetensors file"),
    (evaluate, [*BENCH, "--models", "a={w}/nonsense"], "{w}/nonsense/model.safetensors is no whole safetensors file"),
    (generate, ["--model", "{w}/lacking"], "{w}/lacking lacks model-00001-of-00001.safetensors"),
    (generate, ["--model", "{w}/misnamed"], "weights.safetensors, but neither model.safetensors nor"),
    (generate, ["--model", "{w}/tokenless"], "cannot load the tokenizer of {w}/tokenless"),
    (generate, ["--model", "{w}/configless"], "no model '{w}/configless': the folder has no config.json"),
    (generate, ["--model", "{w}/broken"], "cannot read {w}/broken/config.json"),
    (steer, ["--model", "{w}/file"], "no model '{w}/file': that is a file"),
    (evaluate, [*BENCH, "--judges", "wildguard:{w}/file"], "no model '{w}/file': that is a file"),
    (generate, ["--model", ""], "the name of a model is empty"),
    # rules
    (generate, ["--model", "tiny/gold.py"], "tiny/gold.py is a rule"),
    (steer, ["--generator", "tiny/gold.py"], "tiny/gold.py is a rule"),
    (verify, ["--responses", "{w}/harmful", "--expert", "tiny/gold.py"], "tiny/gold.py is a rule"),
    (evaluate, [*BENCH, "--models", "a=tiny/gold.py"], "tiny/gold.py is a rule"),
    (generate, ["--guard", "{w}/syntax.py"], "{w}/syntax.py can't be imported: SyntaxError"),
    (generate, ["--guard", "{w}/raises.py"], "{w}/raises.py can't be imported: ZeroDivisionError"),
    (steer, ["--guard", "{w}/exits.py"], "{w}/exits.py can't be imported: SystemExit: 3"),
    (grpo, ["--guard", "{w}/imports.py"], "{w}/imports.py can't be imported: ModuleNotFoundError"),
    (grpo, ["--eval_judge", "{w}/empty.py"], "{w}/empty.py defines no function judge"),
    (evaluate, [*BENCH, "--judges", "{w}/constant.py"], "{w}/constant.py defines no function judge"),
    (evaluate, [*BENCH, "--self_checker", "{w}/fine.py"], "{w}/fine.py defines no function self_check"),
    (evaluate, [*BENCH, "--self_checker", "{w}/exits.py"], "{w}/exits.py can't be imported"),
    (evaluate, [*BENCH, "--judges", "{w}/none.py"], "no Python file at {w}/none.py"),
    (generate, ["--guard", "self_check:tiny/guard"], "judges/self_check.py is for --self_checker"),
    (steer, ["--guard", "self_check:tiny/gold.py"], "judges/self_check.py is for --self_checker"),
    (evaluate, [*BENCH, "--judges", "self_check:tiny/judge"], "judges/self_check.py is for --self_checker"),
    (evaluate, [*BENCH, "--judges", "tiny/guard", "tiny/gold.py", "tiny/guard"], "the same judge twice"),
    (evaluate, [*BENCH, "--judges", "tiny/guard", "qwen3guard:./tiny/guard/"], "the same judge twice"),
    (evaluate, [*BENCH, "--models", "results.json=tiny/lrm"], "results.json is a file of the run: give the model"),
    (evaluate, [*BENCH, "--models", "seconds.json=tiny/lrm"], "seconds.json is a file of the run: give the model"),
    # numbers
    (steer, ["--lora_dropout", "2"], "--lora_dropout 2.0: it must be at most 1"),
    (generate, ["--temperature", "inf"], "--temperature inf: that is no number to work with"),
    (grpo, ["--learning_rate", "nan"], "--learning_rate nan: that is no number to work with"),
    (verify, ["--epochs", "0"], "--epochs 0: it must be at least 1"),
    (generate, ["--temperature", "-0.1"], "--temperature -0.1: it must be at least 0"),
    # places
    (generate, ["--model", "runs/nope"], "no folder at runs/nope"),
    (generate, ["--model", "./" + "n" * 300], "no folder at ./nnn"),
    (generate, ["--model", "./nope"], "no folder at ./nope"),
    (generate, ["--model", "/nope"], "no folder at /nope"),
    (generate, ["--guard", "tests/nope"], "no folder at tests/nope"),
    (generate, ["--guard", "a/b/c"], "no folder at a/b/c"),
    (generate, ["--guard", "somewhere/model.safetensors"], "no folder at somewhere/model.safetensors"),
    (generate, ["--model", "smollm2/model-that-is-not-there"], "python smollm2/fetch.py"),
    # rows
    (verify, ["--responses", "{w}/benign"], "benign rows alone teach to say 'safe' always"),
    (
        verify,
        ["--responses", "{w}/harmful", "--heldout", "{w}/overlapping"],
        "1 of its prompts are also in --responses",
    ),
]


@pytest.mark.parametrize("stage, options, words", TABLE, ids=[f"{i} {row[2][:40]}" for i, row in enumerate(TABLE)])
def test_a_mistake_is_one_line(stage, options, words, world, tmp_path):
    options = [option.format(w=world) for option in options]
    assert words.format(w=world) in refused(stage, "--run", tmp_path / "run", *options)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("style, works", [("wildguard", True), ("harmbench", True), ("qwen3guard", False)])
def test_a_judge_with_its_own_text_needs_no_chat_template(style, works, world):
    if works:
        judges.require_judge(f"{style}:{world}/templateless")
    else:
        with pytest.raises(SystemExit, match="no chat template"):
            judges.require_judge(f"{style}:{world}/templateless")


@pytest.mark.parametrize("text, words", [
    ("Refuse.", "text 'prefix' must hold {prompt}"),
    ("Refuse {prompt", "a brace that is not {prompt}"),
    ('Say {"a": 1}: {prompt}', "a brace that is not {prompt}"),
    ("{} {prompt}", "a brace that is not {prompt}"),
    ("{{prompt}}", "text 'prefix' must hold {prompt}"),
    ("{prompt.x}", "a brace that is not {prompt}"),
])  # fmt: skip
def test_a_steering_text_that_can_not_be_filled_in(text, words, tmp_path, monkeypatch):
    monkeypatch.setitem(steer.STEERING, "prefix", text)
    assert words in refused(steer, "--run", tmp_path / "run", "--steering", "firm", "prefix")
    assert not (tmp_path / "run").exists()
    plumbing.require_texts({"a": "Say {{x}} to {prompt}", "none": "{prompt}"}, ["a"])


def test_a_self_checker_that_raises(tmp_path):
    rule = tmp_path / "rule.py"
    rule.write_text("def self_check(thinking):\n    return 1 / 0")
    with pytest.raises(SystemExit, match=f"error: {rule}: self_check\\(\\) raised ZeroDivisionError: division by zero"):
        judges.self_check_rule(str(rule))("a thinking")


# Run folders ----------------------------------------------------------------------------------------------------------
def folder_with(path, name: str = "", text: str = ""):
    path.mkdir(parents=True)
    if name:
        (path / name).write_text(text)
    return path


def test_a_place_that_is_no_run_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    folder_with(tmp_path / "damaged", "options.json", '{"options": ')
    folder_with(tmp_path / "bare", "options.json", '{"versions": {}}')
    folder_with(tmp_path / "list", "options.json", "[]")
    folder_with(tmp_path / "foreign", "notes.txt", "mine")
    before = sorted((p, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*"))
    for place, words in {
        tmp_path / "file": "file is a file; name a folder",
        tmp_path / "file/deep/run": "file is a file; name a folder",
        "": "--run is empty",
        tmp_path / "damaged": "damaged/options.json is damaged: not JSON",
        tmp_path / "bare": "bare/options.json is damaged: it holds no options",
        tmp_path / "list": "list/options.json is damaged",
        tmp_path / "foreign": "it holds notes.txt and no options.json",
    }.items():
        for more in ([], ["--dry_run"]):
            assert words in refused(generate, "--run", place, *more), place
    assert before == sorted((p, p.is_file() and p.read_bytes()) for p in tmp_path.rglob("*"))


def opened(stage, *args):
    """The run folder, made as the stage makes it, without its work."""
    plumbing.runs.lock.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [stage.__file__, *map(str, args)])
        bounds = {"lora_rank": (0, 1e9)}
        options = plumbing.parse_options(stage.Options, stage.__doc__, bounds)
    return plumbing.open_run(options)


def test_an_empty_folder_and_one_of_a_killed_beginning_are_fine(tmp_path):
    folder_with(tmp_path / "empty")
    folder_with(tmp_path / "killed", "lock")
    (tmp_path / "killed/options.json.tmp").write_text('{"opt')
    for name in ("empty", "killed"):
        assert (opened(generate, "--run", tmp_path / name) / "options.json").exists()


def test_another_stages_folder_is_named(tmp_path):
    made = {"01": generate, "03": steer, "04": grpo}
    for number, stage in made.items():
        opened(stage, "--run", tmp_path / number)
    for number in made:
        file = tmp_path / number / "options.json"
        assert json.loads(file.read_text())["stage"] == number
        for other, stage in made.items():
            if other != number:
                words = f"was made by stage {number}, and this is stage {other}: choose another --run"
                assert words in refused(stage, "--run", tmp_path / number)
        old = json.loads(file.read_text())
        del old["stage"], old["code"]  # as older folders are
        file.write_text(json.dumps(old))
        other = "03" if number == "01" else "01"
        assert f"was made by stage {number}" in refused(made[other], "--run", tmp_path / number)
        opened(made[number], "--run", tmp_path / number)


# The hub and interrupts -----------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_hub_out_of_reach_is_one_line_in_seconds(tmp_path):
    """Nobody answers: once the address is unknown, once a server says nothing."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        urls = "http://nowhere.invalid", f"http://127.0.0.1:{silent.getsockname()[1]}"
        options = ["--model", "Qwen/Qwen3-0.6B", "--run", tmp_path / "run"]
        for done in run_with_hubs(urls, tmp_path, "01_generate.py", *options):  # 2 and 8 seconds on an idle machine
            assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
            assert done.stderr.startswith("error: no model 'Qwen/Qwen3-0.6B'") and "out of reach" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_model_in_the_cache_needs_no_hub(monkeypatch):
    import huggingface_hub

    def out_of_reach(*_, **__):
        raise ConnectionError("no route")

    asked = []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", out_of_reach)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: "/cache/config.json")
    monkeypatch.setattr(plumbing.models, "model_config", asked.append)
    plumbing.require_model("owner/cached")
    assert asked == ["owner/cached"] and huggingface_hub.constants.HF_HUB_OFFLINE


@pytest.mark.parametrize("stage", ["01_generate", "02_verify_sft", "03_steer_selfgen", "04_grpo", "05_eval"])
def test_an_interrupt_during_the_imports_is_one_line(stage, tmp_path):
    for seconds in (0, 0.3):
        command = [sys.executable, f"{stage}.py", "--run", str(tmp_path / "run")]
        child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        while "libtorch" not in Path(f"/proc/{child.pid}/maps").read_text():  # which comes after our handler
            assert child.poll() is None and not time.sleep(0.01)
        time.sleep(seconds)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 130 and errors.strip().startswith("stopped: ") and "Traceback" not in errors
        assert errors.strip().count("\n") == 0 and not (tmp_path / "run").exists()
