"""Both methods as a drawing with a real row of a finished demo: `python bench/methods.py`.

Reads the run folders of `make demo`; writes results/methods.png. The prompt is that of
bench/one_prompt.py.
"""

import argparse
import textwrap
from pathlib import Path

from one_prompt import BENCHMARK, ROOT, Evaluation, fail, read_jsonl, run_stage, training_prompt

GREY, BLUE, GREEN = "0.93", "#dbe9f6", "#d9f0d3"
WIDTH = 31  # letters in a line of a box


def boxes(runs: Path) -> dict[str, list[tuple[str, str, str]]]:
    """{method: [(title, text, color) of each box, from left to right]}"""
    row, _ = training_prompt(runs)
    critiques = read_jsonl(runs / "02_verify_sft/train.jsonl")
    unsafe = next(c for c in critiques if c["request"] == row["prompt"] and c["label"] == "unsafe")
    rules = unsafe["prompt"].split("\n\n")[0]
    steered = read_jsonl(runs / "03_steer_selfgen/responses.jsonl")
    asked = next(s for s in steered if s["id"] == f"{row['id']}|1")
    refused = next(
        (k for k in read_jsonl(runs / "03_steer_selfgen/train.jsonl") if k["id"] == row["id"]), None
    )
    if not refused:
        fail(f"{runs}/03_steer_selfgen/train.jsonl: nothing kept for {row['id']}")
    evaluation = Evaluation(runs / "05_eval")
    unseen = evaluation.typical()
    sample = evaluation.case(BENCHMARK)["SInternal"][0][unseen["id"]]["samples"][0]
    checks = f"<think> {sample['thinking']} </think> {sample['answer']}"
    response = f"<think> {refused['thinking']} </think> {refused['answer']}"
    return {
        "SInternal trains verification": [
            ("01: the model's own answer y", f"x: {row['prompt']}\n\ny: {unsafe['answer']}", BLUE),
            ("02: an expert reads", f"S: {rules}\n\nx, y: the prompt and the answer", GREY),
            (
                "trained: critique z, verdict v",
                f"<think> {unsafe['trained_thinking']} </think> {unsafe['trained_answer']}",
                GREEN,
            ),
            ("asked an unseen x, it checks", f"x: {unseen['prompt']}\n\n{checks}", BLUE),
        ],
        "ThinkSafe trains the model's own refusals": [
            ("03: steering + x", asked["prompt"], GREY),
            ("the model's own response", response, BLUE),
            (
                "the guard accepts or drops it",
                "safe? refused, if x is harmful? answered, if it is benign?\n\nelse another try, "
                "with the next steering text",
                GREY,
            ),
            ("trained, without the steering", f"x: {refused['prompt']}\n\n{response}", GREEN),
        ],
    }


def wrapped(text: str) -> str:
    parts = text.split("\n\n")
    return "\n\n".join(textwrap.fill(" ".join(part.split()), WIDTH) for part in parts)


def draw(methods: dict, path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(len(methods), 1, figsize=(13, 5.6), layout="constrained")
    for axis, (method, parts) in zip(axes, methods.items(), strict=True):
        axis.set_xlim(0, len(parts))
        axis.set_ylim(0, 1)
        axis.axis("off")
        axis.set_title(method, loc="left", fontsize=13, fontweight="bold")
        for x, (title, text, color) in enumerate(parts):
            box = plt.Rectangle((x + 0.02, 0.02), 0.88, 0.94, facecolor=color, edgecolor="0.6")
            axis.add_patch(box)
            axis.text(x + 0.04, 0.92, title, va="top", fontsize=10, fontweight="bold")
            axis.text(x + 0.04, 0.8, wrapped(text), va="top", fontsize=9, family="monospace")
            if x:
                ends = {"xy": (x + 0.02, 0.5), "xytext": (x - 0.1, 0.5)}
                axis.annotate("", **ends, arrowprops={"arrowstyle": "->", "lw": 1.5})
    fig.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo"), help="of `make demo`")
    options = parser.parse_args()
    draw(boxes(options.runs), ROOT / "results/methods.png")


if __name__ == "__main__":
    run_stage(main)
