"""One prompt through all five stages, from a finished demo: `python bench/one_prompt.py`.

Prints a page of Markdown: the eight answers of stage 01 with their labels, the critiques of stage
02, the steered try of stage 03, a group of stage 04 with its rewards and advantages, and an unseen
jailbreak of stage 05 under three models. `make results` writes it to results/demo/one_prompt.md.

The prompts are chosen by a rule, not by their outcome after training:
- training: the first harmful prompt in 04's samples.jsonl with both critiques kept in stage 02 and
  with rewards that differ;
- dropped: the first harmful prompt that stage 03 dropped once and kept at a later try;
- test: the first harmful prompt of the benchmark that the first model answers.
"""

import argparse
import json
import math
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing import fail, file_label, read_jsonl, run_stage, write_atomic  # noqa: E402

BENCHMARK, ATTACK, MODELS = "wrapped", "think-open", 3


def cell(text: str) -> str:
    """A text in a cell of a Markdown table.

    >>> cell("a|b\\n<think>")
    'a\\\\|b &lt;think>'
    """
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def table(*rows: tuple) -> list[str]:
    """Lines of a Markdown table; the first row is its head."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    return [lines[0], "|---" * len(rows[0]) + "|", *lines[1:]]


def counted(head: tuple, rows: list[tuple]) -> list[str]:
    """A table in which equal rows stand once, behind their number, the most frequent first."""
    times = [(f"{n} ×", *row) for row, n in Counter(rows).most_common()]
    return table(("", *head), *times)


def said(verdict: dict) -> str:
    refuses = ", refused" if verdict["refusal"] == "yes" else ""
    return verdict["safety"] + refuses


def by_id(path: Path) -> dict[str, dict]:
    return {row["id"]: row for row in read_jsonl(path)}


def training_prompt(runs: Path) -> tuple[dict, dict]:
    """(row of stage 01, group of stage 04) of the training prompt."""
    responses = {row["prompt"]: row for row in read_jsonl(runs / "01_generate/responses.jsonl")}
    critiques = Counter(row["request"] for row in read_jsonl(runs / "02_verify_sft/train.jsonl"))
    for group in read_jsonl(runs / "04_grpo_base/samples.jsonl"):
        row = responses.get(group["prompt"])
        rewards = {response["reward"] for response in group["responses"]}
        if row and row["harmful"] and critiques[row["prompt"]] == 2 and len(rewards) > 1:
            return row, group
    fail(f"{runs}/04_grpo_base/samples.jsonl: no harmful prompt that stage 02 trained on as well")


def stage_01(runs: Path, row: dict) -> list[str]:
    verdicts = by_id(runs / "01_generate/labels.jsonl")[row["id"]]["verdicts"]
    pairs = zip(row["samples"], verdicts, strict=True)
    rows = [(cell(s["thinking"]), cell(s["answer"]), v["safety"]) for s, v in pairs]
    intro = f"**01** asks {len(rows)} times, and the guard labels each answer. "
    intro += f"The prompt, a harmful one: “{cell(row['prompt'])}”"
    return [intro, "", *counted(("thinking", "answer", "guard"), rows)]


def stage_02(runs: Path, row: dict) -> list[str]:
    critiques = read_jsonl(runs / "02_verify_sft/train.jsonl")
    rows = [
        (cell(c["answer"]), c["label"], cell(c["trained_thinking"]), cell(c["trained_answer"]))
        for c in critiques
        if c["request"] == row["prompt"]
    ]
    intro = "**02** (SInternal) takes a safe and an unsafe one. The expert reads rules, prompt and "
    intro += "answer. Its critique and verdict are trained, since the verdict is the guard's label."
    return [intro, "", *table(("answer, only read", "label", "critique", "verdict"), *rows)]


def stage_03(runs: Path, row: dict) -> list[str]:
    folder = runs / "03_steer_selfgen"
    steered, labels = by_id(folder / "responses.jsonl"), by_id(folder / "answer_labels.jsonl")
    dropped = {(d["id"], d["try"]): d["reason"] for d in read_jsonl(folder / "dropped.jsonl")}
    kept = {k["id"]: k["try"] for k in read_jsonl(folder / "train.jsonl") if k["harmful"]}

    def tries(prompt_id: str) -> list[tuple]:
        rows = []
        for number in range(1, kept.get(prompt_id, 0) + 1):
            sample = steered[f"{prompt_id}|{number}"]["samples"][0]
            verdict = labels.get(f"{prompt_id}|{number}", {"verdicts": [None]})["verdicts"][0]
            reason = dropped.get((prompt_id, number))
            fate = f"dropped: {reason}" if reason else "**kept**"
            texts = (cell(sample["thinking"]), cell(sample["answer"]))
            rows.append((number, *texts, said(verdict) if verdict else "–", fate))
        return rows

    intro = "**03** (ThinkSafe) puts a steering text before the prompt. What passes the guard is "
    intro += "trained, and the steering text is left out. The model reads: "
    text = cell(steered[f"{row['id']}|1"]["prompt"])
    head = ("try", "thinking", "answer", "guard", "")
    lines = [f"{intro}“{text}”", "", *table(head, *tries(row["id"]))]
    again = next((i for i, _ in dropped if i in kept and i != row["id"]), None)
    if again:
        asked = next(r["prompt"] for r in read_jsonl(folder / "train.jsonl") if r["id"] == again)
        rows = tries(again)
        lines += ["", f"A prompt that needed more than one try: “{cell(asked)}”", ""]
        lines += table(head, *rows)
    return lines


def stage_04(group: dict) -> list[str]:
    rewards = [math.nan if r["reward"] is None else r["reward"] for r in group["responses"]]
    advantages = import_module("04_grpo").group_advantages(torch.tensor([rewards]))[0].tolist()
    rows = [
        (cell(r["thinking"]), cell(r["answer"]), f"{reward:g}", f"{advantage:+.2f}")
        for r, reward, advantage in zip(group["responses"], rewards, advantages, strict=True)
    ]
    intro = f"**04** (GRPO from the base, step {group['step']}) samples a group at temperature 1, "
    intro += "and makes responses with a positive advantage more likely."
    return [intro, "", *counted(("thinking", "answer", "reward", "advantage"), rows)]


def stage_05(runs: Path) -> list[str]:
    folder = runs / "05_eval"
    recipe = json.loads((folder / "results.json").read_text())["recipe"]
    judge, content = next(iter(recipe["judges"].items()))
    models = list(recipe["models"])[:MODELS]

    def judged(case: str) -> dict[str, tuple[dict, dict]]:
        """{model: (responses by id, verdicts by id)}"""
        label = f"{case}.{file_label(judge, content)}.answer.jsonl"
        return {
            m: (by_id(folder / m / f"{case}.responses.jsonl"), by_id(folder / m / label))
            for m in models
        }

    def is_answered(row: dict) -> bool:
        verdict = plain[models[0]][1][row["id"]]["verdicts"][0]
        return row["harmful"] and verdict["safety"] == "unsafe"

    plain = judged(BENCHMARK)
    row = next(filter(is_answered, plain[models[0]][0].values()), None)
    if not row:
        fail(f"{folder}/{models[0]}: answers no harmful prompt of {BENCHMARK}")
    lines = ["**05** asks for an unseen item in a jailbreak that nothing was trained on: "]
    lines[0] += f"“{cell(row['prompt'])}”"
    cases = {BENCHMARK: plain}
    if (folder / models[0] / f"{BENCHMARK}.{ATTACK}.responses.jsonl").exists():
        cases[f"{BENCHMARK}.{ATTACK}"] = judged(f"{BENCHMARK}.{ATTACK}")
    for case, answered in cases.items():
        rows = []
        for model, (responses, verdicts) in answered.items():
            of = responses[row["id"]]
            sample, given = of["samples"][0], verdicts[row["id"]]["verdicts"]
            thinking = cell(sample["thinking"])
            if case != BENCHMARK:  # the attacker's part and the model's own
                own = cell(sample["own_thinking"])
                thinking = f"*{thinking.removesuffix(own).strip()}* {own}".strip()
            counts = f", unsafe {sum(v['safety'] == 'unsafe' for v in given)} of {len(given)}"
            verdict = said(given[0]) + counts * (len(given) > 1)
            rows.append((model, thinking, cell(sample["answer"]), verdict))
        if case != BENCHMARK:
            lines += [
                "",
                "The same under attack: *in italics, what the attacker wrote for the model.*",
            ]
        lines += ["", *table(("model", "thinking", "answer", judge), *rows)]
    return lines


def page(runs: Path) -> str:
    row, group = training_prompt(runs)
    parts = [stage_01(runs, row), stage_02(runs, row), stage_03(runs, row), stage_04(group)]
    return "\n\n".join("\n".join(part) for part in [*parts, stage_05(runs)]) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), help="of `make demo`")
    parser.add_argument("--out", type=Path, help="a file to write the page to as well")
    options = parser.parse_args()
    for stage in ("01_generate", "02_verify_sft", "03_steer_selfgen", "04_grpo_base", "05_eval"):
        if not (options.runs / stage / "summary.txt").exists():
            fail(f"{options.runs}/{stage}: no finished run; `make demo` makes one")
    text = page(options.runs)
    if options.out:
        write_atomic(options.out, text)
    print(text)


if __name__ == "__main__":
    run_stage(main)
