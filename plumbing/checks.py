"""Mistakes in what a stage is given, said in one line before any model works."""

from plumbing.process import fail
from plumbing.runs import read_stage_01
from plumbing.tokens import OPEN

# Files of an evaluation's run folder, beside which each model has a folder of its name
EVALUATION_FILES = (
    *("results.json", "results.md", "results.png", "tradeoff.png", "categories.png"),
    "transcripts.html",
    *("options.json", "summary.txt", "seconds.json", "lock"),
)


def require_free_names(models: dict[str, str]):
    """No model of an evaluation is named as one of its files."""
    for name in models:
        if name.removesuffix(".tmp") in EVALUATION_FILES:
            fail(f"--models {name}=…: {name} is a file of the run: give the model another name")


def require_texts(texts: dict[str, str], names: list[str]):
    """The steering texts of these names, and the one of benign prompts, can be filled in: each
    holds {prompt}, and any other brace is doubled."""
    for name in [*names, "none"]:
        if name not in texts:
            fail(f"--steering {name}: the texts are named {', '.join(texts)}")
        try:
            filled = texts[name].format(prompt=OPEN)
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            what = f"a brace that is not {{prompt}} ({type(error).__name__}: {error})"
            fail(f"STEERING, text '{name}': {what}; write {{{{ or }}}} for a brace")
        if OPEN not in filled:
            fail(f"STEERING, text '{name}' must hold {{prompt}}: without it no prompt is asked")


def require_both_labels(selected: list[dict], responses: str):
    """What is to be verified has unsafe answers too: the guard's labels of harmful prompts."""
    if not selected:
        what = "has no prompt with safe and unsafe answers and no benign one"
        fail(f"{responses} {what}: nothing to verify")
    if not any(row["harmful"] for row in selected):
        what = "no harmful prompt has both safe and unsafe answers, and benign rows alone"
        fail(f"{responses}: {what} teach to say 'safe' always; more prompts or a larger --n in 01")


def require_unseen(heldout: str, responses: str):
    """The prompts of a verification test set are none of those that are trained on."""
    if not heldout:
        return
    trained = {text_of(row) for row in read_stage_01(responses)[0]}
    both = [row["id"] for row in read_stage_01(heldout)[0] if text_of(row) in trained]
    if both:
        what = f"{len(both)} of its prompts are also in --responses {responses}, such as {both[0]}"
        fail(f"--heldout {heldout}: {what}; answer other prompts with 01")


def text_of(row: dict) -> str:
    prompt = row["prompt"]
    return (prompt if isinstance(prompt, str) else prompt[-1]["content"]).strip()
