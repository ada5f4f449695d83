"""What the screen shows: one bar over several files, the same prompt once, a table of steps that nothing tears."""

import io
import json
import math
import types

import pytest
import tqdm
from conftest import ROOT, rows

import engines
import judges
from engines import Reply, Sampling
from plumbing import log_grpo_step, one_bar, progress

PROMPTS = rows(ROOT / "tiny/prompts/test_plain.jsonl")[:6]
SUMS = rows(ROOT / "tiny/prompts/test_sums.jsonl")[:4]


class FakeSampler:
    """A server that answers everything alike."""

    def replies(self, chats, n, sampling, **template):
        for index in range(len(chats)):
            yield index, [Reply("<think>hm</think>no", False, 3, 5, "stop", None)] * n


@pytest.fixture
def bars(monkeypatch):
    """Every bar that is shown, with what was left at its start and after each update."""
    shown = []

    class Recorded(tqdm.tqdm):
        def __init__(self, *args, **more):
            super().__init__(*args, **{**more, "file": io.StringIO()})
            if not self.disable:
                self.lefts = [self.total]
                shown.append(self)

        def update(self, n=1):
            super().update(n)
            if not self.disable:
                self.lefts.append(self.total - self.n)

    monkeypatch.setattr(tqdm, "tqdm", Recorded)
    return shown


def answer(file, prompts, n=2):
    return engines.answer_prompts(FakeSampler(), prompts, file, n, Sampling(8, 0.0))


def test_a_model_has_one_bar_over_its_files_that_says_what_is_left(bars, tmp_path):
    files = {"plain": PROMPTS, "half": PROMPTS[:4], "done": PROMPTS[:3], "sums": SUMS}
    answer(tmp_path / "half.jsonl", PROMPTS[:2])
    answer(tmp_path / "done.jsonl", PROMPTS[:3])
    assert [bar.lefts[0] for bar in bars] == [4, 6]  # outside such a loop a bar each
    bars.clear()
    for name, prompts in one_bar(files, "base answers", 2):
        assert len(answer(tmp_path / f"{name}.jsonl", prompts)) == len(prompts)
    [bar] = bars
    assert bar.desc == "base answers" and bar.unit == "response"
    # 34 units where all of it is new; 4 of the second file and all of the third prove to be done
    assert bar.lefts == [34, *range(32, 20, -2), 16, 14, 6, 4, 2, 0]
    assert bar.n == bar.total == 2 * (6 + 2 + 0 + 4) and progress.SHARED == []


def test_nothing_left_shows_no_bar(bars, tmp_path):
    for _ in range(2):
        for name, prompts in one_bar({"a": PROMPTS, "b": PROMPTS}, "again", 2):
            answer(tmp_path / f"{name}.jsonl", prompts)
    assert len(bars) == 1


def test_a_judge_has_one_bar_and_counts_what_it_reads(bars, tmp_path):
    answered = {name: answer(tmp_path / f"{name}.jsonl", p) for name, p in (("plain", PROMPTS), ("sums", SUMS))}
    bars.clear()
    judge = judges.Judge("tiny/gold.py", None)
    for name, read in one_bar(answered, "judge gold", 2, ("harmful", "benign")):
        for text in ("answer", "thinking") if name == "plain" else ():  # sums need no judge
            verdicts = judges.judge_samples(judge, read, tmp_path / f"{name}.{text}.jsonl", lambda s: s["answer"])
            assert verdicts.keys() == {row["id"] for row in PROMPTS}
    [bar] = bars
    assert bar.lefts == [12, 6, 0] and bar.desc == "judge gold"


def test_an_error_leaves_no_bar_behind(bars, tmp_path):
    with pytest.raises(ValueError):
        for name, prompts in one_bar({"a": PROMPTS, "b": PROMPTS}, "broken", 2):
            answer(tmp_path / "a.jsonl", prompts)
            raise ValueError
    answer(tmp_path / "b.jsonl", PROMPTS)
    assert progress.SHARED == [] and len(bars) == 2 and bars[1].lefts[0] == 12


def test_each_of_several_processes_counts_its_share(bars, monkeypatch):
    here = types.SimpleNamespace(num_processes=2, process_index=0)
    monkeypatch.setattr(progress, "processes", lambda: here)
    for _, prompts in one_bar({"a": PROMPTS, "b": PROMPTS[:4]}, "shared", 1):
        with progress.bar_over(len(prompts) // 2, len(prompts), "response") as bar:
            bar.update(len(prompts) // 2)
    assert [bar.lefts for bar in bars] == [[5, 2, 0]]
    here.process_index = 1
    for _, prompts in one_bar({"a": PROMPTS}, "hidden", 1):
        with progress.bar_over(3, 6, "response"):
            assert len(bars) == 1


def test_the_same_prompt_is_shown_once(tokenizer, capsys):
    engines.SHOWN.clear()
    for prompt in ("is it 4?", "is it 5?", "is it 4?"):
        engines.show_once(tokenizer, [{"role": "user", "content": prompt}])
    shown = capsys.readouterr().out
    assert shown.count("first prompt as the model reads it") == 2
    assert shown.count("is it 4?") == 1 and shown.count("is it 5?") == 1


# The table of steps ---------------------------------------------------------------------------------------------------
def numbers(**more):
    every = dict.fromkeys(progress.COLUMNS.values(), 0.25)
    return {**every, "reward_maths": math.nan, "reward_verify": math.nan, **more}


def screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    lines, y, x = [""], 0, 0
    for c in text:
        if c == "\r":
            x = 0
        elif c == "\n":
            y += 1
            lines += [""] * (y == len(lines))
        else:
            lines[y] = lines[y][:x].ljust(x) + c + lines[y][x + 1 :]
            x += 1
    return [line.rstrip() for line in lines]


def test_table_has_no_nan_and_a_column_from_its_first_value_on(tmp_path):
    table = progress.StepTable(tmp_path)
    head, first = table.lines(0, numbers())
    assert "maths" not in head and "verify" not in head and "kl" in head.split() and "nan" not in first
    assert len(head) == len(first) and len(head.split()) == len(first.split()) == 11
    [second] = table.lines(1, numbers(reward_benign=math.nan))
    assert dict(zip(head.split(), second.split()))["benign"] == "-"
    head, third = table.lines(2, numbers(reward_maths=0.125))
    assert dict(zip(head.split(), third.split()))["maths"] == "0.125" and len(head) == len(third)
    [fourth] = table.lines(3, numbers())
    assert dict(zip(head.split(), fourth.split()))["maths"] == "-"


def test_table_of_a_run_that_goes_on_and_has_no_reference(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, **numbers(reward_maths=1.0, reward_verify=None)}))
    (tmp_path / "options.json").write_text(json.dumps({"options": {"beta": 0.0}}))
    head, line = progress.StepTable(tmp_path).lines(1, numbers())
    assert "maths" in head and "verify" not in head and "kl" not in head.split() and len(head) == len(line)
    (tmp_path / "options.json").write_text(json.dumps({"options": {"beta": 0.04}}))
    assert "kl" in progress.StepTable(tmp_path).lines(1, numbers())[0].split()


def test_the_bar_does_not_tear_the_table(tmp_path, monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setattr("sys.stderr", terminal)
    accelerator, kept = types.SimpleNamespace(log=lambda *_: None), []
    with tqdm.tqdm(total=3, file=terminal, ncols=60, mininterval=0) as bar:
        for step in range(3):
            maths = 0.5 if step == 2 else math.nan
            kept.append(log_grpo_step(tmp_path, accelerator, numbers(reward_maths=maths), {"step": step}))
            bar.update()
    lines = [line for line in screen(terminal.getvalue()) if line]
    kinds = ["head" if line.startswith(" step") else line.split()[0] for line in lines]
    assert kinds[:-1] == ["head", "0", "1", "head", "2"] and lines[-1].startswith("100%|")
    assert all("%" not in line for line in lines[:-1])
    assert [row["reward_maths"] for row in kept] == [None, None, 0.5]
    assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [0, 1, 2]
