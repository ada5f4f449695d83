"""What made a run: the command that goes on with it, the code, its times, and a run that grows."""

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import ROOT, load, refused, rows, run_here
from safetensors.torch import load_file

import plumbing
import plumbing.code

generate, verify, grpo, evaluate = (load(name) for name in ("01_generate", "02_verify_sft", "04_grpo", "05_eval"))
SMALL = ["--limit", 2, "--max_new_tokens", 40]


# The next command -----------------------------------------------------------------------------------------------------
def next_of(run) -> list[str]:
    line = (run / "summary.txt").read_text().splitlines()[-1]
    return shlex.split(line.removeprefix("next: "))


def parsed(stage, words):
    with mock.patch.object(sys, "argv", words):
        return plumbing.parse_options(stage.Options, stage.__doc__, bounds={"lora_rank": (0, 99)})


def test_what_is_the_presets_own_is_not_repeated(tmp_path):
    run_here(generate, "--run", tmp_path / "01", "--n", 4, "--limit", 8, "--temperature", 1)
    assert next_of(tmp_path / "01") == ["python", "02_verify_sft.py", "--responses", str(tmp_path / "01")]


def test_the_command_of_01_trains_the_model_that_answered(tmp_path, capsys):
    """As it is printed, with a folder for the run; the model has a blank in its name."""
    model = tmp_path / "another model"
    shutil.copytree("tiny/lrm", model)
    options = [
        "--model",
        model,
        "--preset",
        "smollm2",
        "--prompts",
        "tiny/prompts/train.jsonl",
        "--guard",
        "tiny/gold.py",
    ]
    run_here(generate, "--run", tmp_path / "01", *options, "--n", 8, "--limit", 12, "--temperature", 1)
    words = next_of(tmp_path / "01")
    assert words[:2] == ["python", "02_verify_sft.py"]
    options = parsed(verify, words[1:])
    assert (options.model, options.preset, options.responses) == (str(model), "smollm2", str(tmp_path / "01"))
    more = ["--run", tmp_path / "02", "--expert", "tiny/expert", "--spec", "tiny/spec.txt", "--epochs", 1]
    run_here(verify, *words[2:], *more, "--keep_disagreements")
    made = json.loads((tmp_path / "02/options.json").read_text())["options"]
    assert made["model"] == str(model) and f"content of {model}" in made
    words = next_of(tmp_path / "02")
    options = parsed(evaluate, words[1:])
    assert options.models == [f"base={model}", f"sinternal={tmp_path}/02/checkpoint"]
    assert options.preset == "smollm2" and options.bench  # the preset has none


def test_engine_and_server_of_a_run_go_on():
    given = {"preset": "qwen3-4b", "engine": "vllm", "tensor_parallel": 4, "enable_thinking": False}
    options = SimpleNamespace(**given)
    more = {"responses": "runs/a", "model": "Qwen/Qwen3-4B"}
    expected = "--preset qwen3-4b --engine vllm --tensor_parallel 4 --enable_thinking False --responses runs/a"
    assert plumbing.next_command(options, "02_verify_sft.py", more) == f"python 02_verify_sft.py {expected}"
    models = {"models": ["base=Qwen/Qwen3-4B"]}
    assert "--bench xstest fortress math500" in plumbing.next_command(options, "05_eval.py", models)
    assert set(plumbing.BENCHMARKS) > {"xstest", "fortress", "math500"}


# The code -------------------------------------------------------------------------------------------------------------
def copied(name: str, folder: Path, old: str = "", new: str = ""):
    """A stage copied out of the project, loaded, with one text replaced."""
    text = (ROOT / "04_grpo.py").read_text()
    assert old in text
    file = folder / name
    file.write_text(text.replace(old, new, 1))
    spec = importlib.util.spec_from_file_location(f"copy_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


GRPO = [*SMALL, "--batch_size", 2, "--group_size", 2, "--max_sampler_gap", 1]


def test_a_copy_under_another_name_keeps_the_presets_row(tmp_path):
    copy = copied("my_grpo.py", tmp_path)
    options, original = parsed(copy, ["my_grpo.py"]), parsed(grpo, ["04_grpo.py"])
    assert vars(options) == vars(original) and (options.steps, options.temperature) == (40, 1.0)
    run_here(grpo, "--run", tmp_path / "run", "--steps", 1, *GRPO)
    run_here(copy, "--run", tmp_path / "run", "--steps", 1, *GRPO)  # the same text: the same stage


def test_an_edited_reward_is_refused_and_can_be_accepted(tmp_path, capsys):
    options = ["--run", tmp_path / "run", "--steps", 1, *GRPO]
    run_here(grpo, *options)
    made = json.loads((tmp_path / "run/options.json").read_text())
    assert made["stage"] == "04" and made["code"]["file"] == "04_grpo.py"
    assert set(made["code"]) == {"file", "stage", "common.py", "engines", "judges", "plumbing", "commit", "clean"}
    assert "accept_changes" not in made["options"]
    edited = copied("04_grpo.py", tmp_path, "return 0.0", "return 0.5")
    line = refused(edited, *options)
    assert f"04_grpo.py has changed since {tmp_path / 'run'} was made" in line and "--accept_changes" in line
    assert "has changed since" in refused(edited, *options, "--dry_run")
    assert made == json.loads((tmp_path / "run/options.json").read_text())
    capsys.readouterr()
    run_here(edited, *options, "--accept_changes")
    assert "now at work: 04_grpo.py" in capsys.readouterr().out
    after = json.loads((tmp_path / "run/options.json").read_text())
    assert after["earlier code"] == [made["code"]] and after["code"]["stage"] != made["code"]["stage"]
    run_here(edited, *options)  # accepted once
    assert "now at work" not in capsys.readouterr().out
    assert "has changed since" in refused(grpo, *options)


def test_a_changed_room_is_said_in_one_line(tmp_path, capsys):
    options = ["--run", tmp_path / "run", "--limit", 1, "--n", 1, "--max_new_tokens", 4]
    run_here(generate, *options)
    file = tmp_path / "run/options.json"
    made = json.loads(file.read_text())
    made["code"] |= {"judges": "another", "common.py": "another"}
    file.write_text(json.dumps(made))
    before = plumbing.fingerprint(str(tmp_path / "run"))
    for _ in range(2):
        capsys.readouterr()
        run_here(generate, *options)
        lines = [line for line in capsys.readouterr().out.splitlines() if "now at work" in line]
        assert lines == [f"changed since {tmp_path / 'run'} was made, and now at work: common.py, judges"]
    assert before == plumbing.fingerprint(str(tmp_path / "run"))  # by which a run of stage 02 knows it
    del made["code"], made["stage"]
    file.write_text(json.dumps(made))  # an older folder
    run_here(generate, *options)
    assert "now at work" not in capsys.readouterr().out


def test_commit_and_cleanness_are_gits(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    monkeypatch.setattr(plumbing.code, "ROOT", tmp_path)
    assert plumbing.code.commit() == {"commit": "unknown", "clean": None}
    (tmp_path / "a.py").write_text("1")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "one")
    (tmp_path / "new.py").write_text("1")
    assert plumbing.code.commit()["clean"] is True and len(plumbing.code.commit()["commit"]) >= 7
    (tmp_path / "a.py").write_text("2")
    assert plumbing.code.commit()["clean"] is False


# A run that grows -----------------------------------------------------------------------------------------------------
def without_times(path):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in rows(path)]


def same_runs(one, two):
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert without_times(one / name) == without_times(two / name)
    a, b = (load_file(folder / "checkpoint/model.safetensors") for folder in (one, two))
    assert all((a[name] == b[name]).all() for name in a)
    files = [sorted(str(p.relative_to(run)) for p in run.rglob("*")) for run in (one, two)]
    assert files[0] == files[1]
    options = [json.loads((run / "options.json").read_text())["options"] for run in (one, two)]
    assert options[0] == options[1]


GROWING = ["--limit", 8, "--batch_size", 4, "--group_size", 4, "--learning_rate", "1e-3", "--warmup_steps", 1]
GROWING += ["--temperature", 1.2, "--max_sampler_gap", 1, "--save_every", 2]


@pytest.mark.parametrize("finished", [True, False])
def test_more_steps_go_on_bit_for_bit(finished, tmp_path, monkeypatch):
    """From 3 steps to 5, with a state saved at 2; a run that was stopped between its last step and its checkpoint is
    none that has finished, and an old checkpoint stays until the new one is whole."""
    run_here(grpo, "--run", tmp_path / "whole", "--steps", 5, *GROWING)
    run = tmp_path / "run"
    run_here(grpo, "--run", run, "--steps", 3, *GROWING)
    first = (run / "checkpoint/model.safetensors").read_bytes()
    if not finished:
        shutil.rmtree(run / "checkpoint")
    saved = []

    def stopped(*_):
        saved.append((run / "checkpoint").exists())
        raise SystemExit("stopped before the checkpoint")

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(grpo, "save_checkpoint", stopped)
        run_here(grpo, "--run", run, "--steps", 5, *GROWING)
    assert saved == [finished] and (not finished or (run / "checkpoint/model.safetensors").read_bytes() == first)
    assert plumbing.options_of(run)["steps"] == (3 if finished else 5)  # of the checkpoint that lies there
    run_here(grpo, "--run", run, "--steps", 5, *GROWING)
    same_runs(tmp_path / "whole", run)
    assert (run / "checkpoint/model.safetensors").read_bytes() != first and plumbing.options_of(run)["steps"] == 5
    line = refused(grpo, "--run", run, "--steps", 4, *GROWING)
    assert "steps (5 there, 4 now; it may only grow)" in line


def test_epochs_may_not_grow(tmp_path):
    run_here(generate, "--run", tmp_path / "01", "--n", 4, "--limit", 8, "--temperature", 1)
    options = ["--run", tmp_path / "02", "--responses", tmp_path / "01"]
    run_here(verify, *options, "--epochs", 1)
    assert "epochs (1 there, 2 now; it can't grow" in refused(verify, *options, "--epochs", 2)


def test_help_says_what_may_grow_and_what_the_paper_has(capsys):
    for stage, words in (
        (
            grpo,
            [
                "a run goes on with more (default: 40)",
                "(sister code: 0.7) (default: 1.0)",
                "0 = the paper's 1e-6, with LoRA 1e-5 (ThinkSafe's code) (default: 0.0001)",
            ],
        ),
        (
            verify,
            [
                "AdamW (paper: 2e-4) (default: 0.0003)",
                "(paper: 2) (default: 4)",
                "LoRA rank (paper: 16) (default: 64)",
                "top-p 0.95 (Qwen3's card: 0.6); greedy",
            ],
        ),
    ):
        with pytest.raises(SystemExit):
            run_here(stage, "--preset", "tiny", "--help")
        text = " ".join(capsys.readouterr().out.split())
        assert all(word in text for word in words), text
    with pytest.raises(SystemExit):
        run_here(verify, "--preset", "qwen3-4b", "--help")
    assert "AdamW (paper) (default: 0.0002)" in " ".join(capsys.readouterr().out.split())


# An evaluation --------------------------------------------------------------------------------------------------------
def test_the_recipe_has_the_commit_and_seconds_that_add_up(tmp_path):
    options = ["--run", tmp_path / "run", "--bench", "plain=tiny/prompts/test_plain.jsonl", "--limit", 4]
    found = []
    for judges in (["tiny/gold.py"], ["tiny/gold.py", "tiny/guard"], ["tiny/gold.py", "tiny/guard"]):
        run_here(evaluate, *options, "--judges", *judges)
        found.append(json.loads((tmp_path / "run/results.json").read_text()))
    assert found[0]["recipe"]["code"] == plumbing.code.commit()
    seconds = [one["recipe"]["seconds"] for one in found]
    assert all(set(one) == {"generation", "judging"} for one in seconds)
    assert seconds[0]["generation"] > 0 and seconds[1]["judging"] > seconds[0]["judging"]
    for a, b in zip(seconds, seconds[1:]):
        assert all(b[name] >= a[name] for name in a)
    assert json.loads((tmp_path / "run/seconds.json").read_text()) == seconds[-1]
    assert found[1]["rows"] == found[2]["rows"]
