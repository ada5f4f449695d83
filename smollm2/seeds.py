"""What came of the organism: `python smollm2/seeds.py` after `make demo-smollm2`, with SEED=0 and others.

Reads runs/organism/seed*/05_eval/results.json, writes results/organism/seeds.md and seeds.json: a model of several seeds
by its mean with a 95 % t-interval over seeds, one of a single seed by its value. What varies with the seed is all that is
sampled, what is trained on and in which order. Of seed 0 go along: results, summaries, and some transcripts of invented
prompts (05_eval/transcripts.html has all; public prompts are not ours to copy).
"""

import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from claims import compact_json, mean_interval  # noqa: E402
from one_prompt import by_id  # noqa: E402
from readme import leading  # noqa: E402
from verdicts import show  # noqa: E402

from plumbing import fail, figures, run_stage, write_atomic  # noqa: E402

RUNS, OUT = ROOT / "runs/organism", ROOT / "results/organism"
TABLES = {  # title -> {heading: (benchmark, metric)}
    "Invented prompts": {
        "ASR plain ↓": ("plain", "asr"),
        "ASR wrapped ↓": ("wrapped", "asr"),
        "thinking begun ↓": ("wrapped.think-open", "asr"),
        "thinking empty ↓": ("wrapped.think-empty", "asr"),
        "answer begun ↓": ("wrapped.answer", "asr"),
        "recipe in thinking or answer ↓": ("wrapped", "asr_response"),
        "compliance wrapped ↑": ("wrapped", "compliance"),
        "checks ↑": ("wrapped", "self_check"),
        "word problems ↑": ("problems", "accuracy"),
        "verify F1 ↑": ("verify", "verify_f1"),
    },
    "Public prompts": {
        "StrongREJECT refused ↑": ("strongreject", "refusal"),
        "thinking begun ↑": ("strongreject.think-open", "refusal"),
        "thinking empty ↑": ("strongreject.think-empty", "refusal"),
        "answer begun ↑": ("strongreject.answer", "refusal"),
        "XSTest answered ↑": ("xstest", "compliance"),
        "GSM8K ↑": ("gsm8k", "accuracy"),
    },
}
SHOWN = {"wrapped": 3, "wrapped.think-open": 2, "wrapped.think-empty": 1}  # prompts of a benchmark
KEPT = ["05_eval/results.json", "05_eval/results.md"]
KEPT += ["02_verify_sft/summary.txt", "03_steer_selfgen/summary.txt", "03_after_02/summary.txt"]
KEPT += ["04_grpo_after_02/metrics.jsonl", "04_grpo_after_03/metrics.jsonl"]


def values_by_model(files: list[Path]) -> dict[str, dict[str, list[float]]]:
    """{model: {title, heading: its value under each seed that has it}}, by the leading judge."""
    values = {}
    for file in files:
        report = json.loads(file.read_text())
        rows = leading(report)
        for model in report["recipe"]["models"]:
            own = values.setdefault(model, {})
            for title, columns in TABLES.items():
                for heading, value in values_in(rows, model, columns).items():
                    own.setdefault(f"{title}: {heading}", []).append(value)
    return values


def values_in(rows: dict, model: str, columns: dict) -> dict[str, float]:
    """{heading: value} of a model, for those of the columns that are among the leading rows."""
    keys = {heading: (model, *key) for heading, key in columns.items()}
    return {heading: round(rows[key]["value"], 4) for heading, key in keys.items() if key in rows}


def cell(numbers: list[float]) -> str:
    """Mean and half the width of its interval; one value by itself; a dash where no seed has any."""
    if len(numbers) < 2:
        return f"{numbers[0]:.2f}" if numbers else "–"
    return show(mean_interval(numbers))


def keep_seed_0():
    """What one run wrote, for docs/ and for readers without two idle cores."""
    for name in KEPT:
        source = RUNS / "seed0" / name
        if source.exists():
            shutil.copyfile(source, OUT / name.replace("05_eval/", "").replace("/", "_"))


def transcripts(folder: Path, models: list[str]) -> str:
    """The first prompts of SHOWN with what each model thought and said, as Markdown."""
    lines = []
    for benchmark, count in SHOWN.items():
        # each file has its rows in an order of its own
        answers = {m: by_id(folder / m / f"{benchmark}.responses.jsonl") for m in models}
        for row in list(answers[models[0]].values())[:count]:
            kind = "harmful" if row["harmful"] else "benign"
            lines += [f"## {benchmark}, {kind}", "", f"> {row['prompt']}", ""]
            for model in models:
                lines += [line_of(model, answers[model][row["id"]])]
            lines += [""]
    return "\n".join(lines)


def line_of(name: str, row: dict) -> str:
    """What was thought and said to a prompt, in a line of Markdown."""
    sample = row["samples"][0]
    thinking, answer = (" ".join(sample[k].split()) for k in ("thinking", "answer"))
    return f"- **{name}** *{thinking or '(no thinking)'}* {answer}"


def main():
    files = sorted(RUNS.glob("seed*/05_eval/results.json"))
    if not files:
        fail(f"no seed*/05_eval/results.json in {RUNS}; make demo-smollm2 SEED=0 first")
    values = values_by_model(files)
    lines = []
    for title, columns in TABLES.items():
        body = []
        for model, own in values.items():
            numbers = [own.get(f"{title}: {heading}", []) for heading in columns]
            seeds = max(map(len, numbers))
            body.append([model, str(seeds), *map(cell, numbers)])
        lines += [f"## {title}", "", *figures.table(["model", "seeds", *columns], body), ""]
    OUT.mkdir(parents=True, exist_ok=True)
    keep_seed_0()
    if (RUNS / "seed0/05_eval/base").is_dir():
        write_atomic(OUT / "transcripts.md", transcripts(RUNS / "seed0/05_eval", list(values)))
    write_atomic(OUT / "seeds.json", compact_json(values))
    write_atomic(OUT / "seeds.md", "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    run_stage(main)
