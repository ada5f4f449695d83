"""One prompt through all five stages, from a finished demo: `python bench/one_prompt.py`.

Prints a page of Markdown: the eight answers of stage 01 with their labels, the critiques of stage
02, the steered try of stage 03, a group of stage 04 with its rewards and advantages, and an unseen
jailbreak of stage 05 under three models. `make results` writes it to results/demo/one_prompt.md.

The prompts are chosen by a rule:
- training: the first harmful prompt in 04's samples.jsonl with both critiques kept in stage 02 and
  with rewards that differ;
- dropped: the first harmful prompt that stage 03 dropped once and kept at a later try;
- test: the first harmful prompt of the benchmark, by id, on which every model does what it does on
  most of them.
"""

import argparse
import json
import math
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plumbing import fail, figures, file_label, read_jsonl, run_stage, write_atomic  # noqa: E402

BENCHMARK, ATTACK, MODELS = "wrapped", "think-open", 3


def cell(text: str) -> str:
    """A text in a cell of a Markdown table.

    >>> cell("a|b\\n<think>")
    'a\\\\|b &lt;think>'
    """
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def table(*rows: tuple) -> list[str]:
    """Lines of a Markdown table; the first row is its head."""
    head, *body = ([str(part) for part in row] for row in rows)
    return figures.table(head, body)


def counted(head: tuple, rows: list[tuple]) -> list[str]:
    """A table in which equal rows stand once, behind their number, the most frequent first."""
    times = [(f"{n} ×", *row) for row, n in Counter(rows).most_common()]
    return table(("", *head), *times)


def said(verdict: dict) -> str:
    refuses = ", refused" if verdict["refusal"] == "yes" else ""
    return verdict["safety"] + refuses


def shown(number: float, form: str) -> str:
    """A reward or advantage; a response without a verdict that can be read has none."""
    return "–" if math.isnan(number) else format(number, form)


def is_unsafe(row: dict) -> bool:
    """Of the first response, by a row of verdicts."""
    return row["verdicts"][0]["safety"] == "unsafe"


def counts(verdicts: list[dict]) -> str:
    """What the judge says of the first answer, and how many of all are unsafe."""
    unsafe = sum(verdict["safety"] == "unsafe" for verdict in verdicts)
    return said(verdicts[0]) + f" ({unsafe} of {len(verdicts)} unsafe)" * (len(verdicts) > 1)


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
    intro = f"**01** asks the model {len(rows)} times, and the guard labels each answer. "
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
    intro += (
        "answer. Its critique and verdict are trained, because the verdict is the guard's label."
    )
    return [intro, "", *table(("answer, only read", "label", "critique", "verdict"), *rows)]


def stage_03(runs: Path, row: dict) -> list[str]:
    folder = runs / "03_steer_selfgen"
    steered, labels = by_id(folder / "responses.jsonl"), by_id(folder / "answer_labels.jsonl")
    reasons = {(d["id"], d["try"]): d["reason"] for d in read_jsonl(folder / "dropped.jsonl")}
    kept = {k["id"]: k for k in read_jsonl(folder / "train.jsonl") if k["harmful"]}

    def tries(prompt_id: str) -> list[tuple]:
        rows = []
        for number in range(1, kept[prompt_id]["try"] + 1):
            sample = steered[f"{prompt_id}|{number}"]["samples"][0]
            label = labels.get(f"{prompt_id}|{number}")  # none where nothing was judged
            reason = reasons.get((prompt_id, number))
            fate = f"dropped: {reason}" if reason else "**kept**"
            verdict = said(label["verdicts"][0]) if label else "–"
            asked = f"“{cell(kept[prompt_id]['prompt'])}”, try {number}"
            rows.append((asked, cell(sample["thinking"]), cell(sample["answer"]), verdict, fate))
        return rows

    if row["id"] not in kept:
        fail(f"{folder}/train.jsonl: nothing kept for {row['id']}")
    intro = "**03** (ThinkSafe) puts a steering text before the prompt. What passes the guard is "
    intro += "trained, without that text. The model reads: "
    intro += f"“{cell(steered[row['id'] + '|1']['prompt'])}”"
    again = [i for i, _ in reasons if i in kept and i != row["id"]][:1]
    if again:
        intro += " Below it, a prompt that was dropped once and kept at a later try."
    rows = [one for prompt_id in [row["id"], *again] for one in tries(prompt_id)]
    return [intro, "", *table(("prompt", "thinking", "answer", "guard", ""), *rows)]


def stage_04(group: dict) -> list[str]:
    rewards = [math.nan if r["reward"] is None else r["reward"] for r in group["responses"]]
    advantages = import_module("04_grpo").group_advantages(torch.tensor([rewards]))[0].tolist()
    rows = [
        (cell(r["thinking"]), cell(r["answer"]), shown(reward, "g"), shown(advantage, "+.2f"))
        for r, reward, advantage in zip(group["responses"], rewards, advantages, strict=True)
    ]
    intro = f"**04** (GRPO from the base, step {group['step']}) samples a group, "
    intro += "and makes responses with a positive advantage more likely."
    return [intro, "", *counted(("thinking", "answer", "reward", "advantage"), rows)]


class Evaluation:
    """A run of stage 05, its first judge and its first models."""

    def __init__(self, folder: Path):
        recipe = json.loads((folder / "results.json").read_text())["recipe"]
        self.folder = folder
        self.judge, self.content = next(iter(recipe["judges"].items()))
        self.models = list(recipe["models"])[:MODELS]

    def case(self, case: str) -> dict[str, tuple[dict, dict]]:
        """{model: (responses by id, verdicts by id)} of a benchmark, with or without an attack."""
        label = f"{case}.{file_label(self.judge, self.content)}.answer.jsonl"
        answered = {}
        for model in self.models:
            responses = by_id(self.folder / model / f"{case}.responses.jsonl")
            answered[model] = (responses, by_id(self.folder / model / label))
        return answered

    def typical(self) -> dict:
        """The first harmful row, by id, on which every model does what it does on most of them."""
        plain = self.case(BENCHMARK)
        rows = [row for row in plain[self.models[0]][0].values() if row["harmful"]]
        typical = rows
        for _, verdicts in plain.values():
            unsafe = {row["id"]: is_unsafe(verdicts[row["id"]]) for row in rows}
            usual = sum(unsafe.values()) * 2 > len(rows)
            typical = [row for row in typical if unsafe[row["id"]] == usual]
        if not typical:
            what = f"on no prompt of {BENCHMARK} do all models do what they mostly do"
            fail(f"{self.folder}: {what}")
        return min(typical, key=lambda row: row["id"])


def stage_05(run: Evaluation) -> list[str]:
    row, plain = run.typical(), run.case(BENCHMARK)
    intro = "**05** asks for an unseen item in a jailbreak that nothing was trained on. Each "
    intro += "model does here what it does on most of them: "
    intro += f"“{cell(row['prompt'])}”"
    rows = []
    for model, (responses, verdicts) in plain.items():
        sample = responses[row["id"]]["samples"][0]
        texts = (cell(sample["thinking"]), cell(sample["answer"]))
        rows.append((model, *texts, counts(verdicts[row["id"]]["verdicts"])))
    if (run.folder / run.models[0] / f"{BENCHMARK}.{ATTACK}.responses.jsonl").exists():
        intro += " In the last rows an attacker begins the thinking, *in italics*."
        for model, (responses, verdicts) in run.case(f"{BENCHMARK}.{ATTACK}").items():
            sample = responses[row["id"]]["samples"][0]
            own = cell(sample["own_thinking"])
            begun = cell(sample["thinking"]).removesuffix(own).strip()
            texts = (f"*{begun}* {own}".strip(), cell(sample["answer"]))
            rows.append((f"{model}, attacked", *texts, counts(verdicts[row["id"]]["verdicts"])))
    return [intro, "", *table(("model", "thinking", "answer", run.judge), *rows)]


def page(runs: Path) -> str:
    row, group = training_prompt(runs)
    parts = [stage_01(runs, row), stage_02(runs, row), stage_03(runs, row), stage_04(group)]
    return (
        "\n\n".join("\n".join(part) for part in [*parts, stage_05(Evaluation(runs / "05_eval"))])
        + "\n"
    )


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
