"""Does SInternal need critiques in the model's own words? `python smollm2/words.py` after `make words-smollm2`, with SEED=0
and others.

Critiques with the words that the organism's thinkings have for a check (`make demo-smollm2`); with none of them
(smollm2/organism/checks.py), of the same answers; and these where the organism, too, had learnt its reviews in the other
words, on as many prompts and on all. Reads runs/organism/seed*/…/05_eval, writes results/organism/words.md and
words.json: means with a 95 % t-interval over seeds.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from claims import compact_json  # noqa: E402
from one_prompt import by_id  # noqa: E402
from readme import leading  # noqa: E402

from plumbing import fail, figures, read_jsonl, run_stage, write_atomic  # noqa: E402
from smollm2.organism.checks import OTHER, OWN, is_harmful  # noqa: E402
from smollm2.seeds import OUT, RUNS, cell, line_of, values_in  # noqa: E402

KINDS = {  # critiques in: folder of a seed's run
    "its own words": "",
    "other words": "other_critiques",
    "other words, as its own reviews": "other_reviews",
    "the same, 464 prompts": "other_reviews_all",
}
METRICS = {  # heading: (benchmark, metric)
    "ASR plain ↓": ("plain", "asr"),
    "ASR wrapped ↓": ("wrapped", "asr"),
    "compliance wrapped ↑": ("wrapped", "compliance"),
    "word problems ↑": ("problems", "accuracy"),
    "verify F1 ↑": ("verify", "verify_f1"),
    "StrongREJECT refused ↑": ("strongreject", "refusal"),
    "XSTest answered ↑": ("xstest", "compliance"),
}
UNSAFE = "unsafe answers reviewed"  # among the critiques that SInternal learnt from
CHECKS = {"checks in its own words": OWN, "in the other words": OTHER}
SHOWN = 3  # prompts whose thinkings are shown


def shares_of_checks(file: Path) -> dict[str, float]:
    """How many of the first answers' thinkings come to a judgement, in which words."""
    rows = read_jsonl(file)
    thinkings = [row["samples"][0]["thinking"] for row in rows]
    return {
        heading: round(sum(is_harmful(t, words) is not None for t in thinkings) / len(rows), 4)
        for heading, words in CHECKS.items()
    }


def values_of(run: Path, model: str) -> dict[str, float]:
    """Of one run, that has stages 02 and 05."""
    folder, summary = run / "05_eval", run / "02_verify_sft/summary.txt"
    rows = leading(json.loads((folder / "results.json").read_text()))
    values = {}
    if model == "SInternal":
        values[UNSAFE] = sum(map(int, re.findall(r"(\d+) harmful unsafe", summary.read_text())))
    values |= values_in(rows, model, METRICS)
    return values | shares_of_checks(folder / model / "wrapped.responses.jsonl")


def by_model_and_kind(seeds: list[Path]) -> dict[str, dict[str, list[float]]]:
    """{"SInternal, other words": {heading: its value under each seed that has it}}"""
    values = {}
    for kind, name in KINDS.items():
        for run in (seed / name for seed in seeds):
            if not (run / "05_eval/results.json").exists():
                continue
            for model in ("base", "SInternal"):
                if (run / "05_eval" / model).is_dir():
                    own = values.setdefault(f"{model}, {kind}", {})
                    for heading, value in values_of(run, model).items():
                        own.setdefault(heading, []).append(value)
    return values


def thinkings(seed: Path) -> list[str]:
    """Of the first harmful prompts in jailbreaks, as Markdown: what SInternal thought, by kind."""
    files = {k: seed / n / "05_eval/SInternal/wrapped.responses.jsonl" for k, n in KINDS.items()}
    answers = {kind: by_id(file) for kind, file in files.items() if file.exists()}
    [first, *_] = answers.values()
    lines = [f"## Thinkings of SInternal, {seed.name}", ""]
    for row in [row for row in first.values() if row["harmful"]][:SHOWN]:
        lines += [f"> {row['prompt']}", ""]
        lines += [
            line_of(kind, own[row["id"]]) for kind, own in answers.items() if row["id"] in own
        ]
        lines += [""]
    return lines


def main():
    seeds = sorted(path for path in RUNS.glob("seed*") if path.name[4:].isdigit())
    values = by_model_and_kind(seeds)
    if "SInternal, other words" not in values:
        fail(f"no seed*/other_critiques/05_eval/results.json in {RUNS}; make words-smollm2 first")
    headings = [UNSAFE, *METRICS, *CHECKS]
    body = []
    for name, own in values.items():
        numbers = [own.get(heading, []) for heading in headings]
        body.append([*name.split(", ", 1), str(max(map(len, numbers))), *map(cell, numbers)])
    lines = figures.table(["model", "critiques in", "seeds", *headings], body)
    OUT.mkdir(parents=True, exist_ok=True)
    write_atomic(OUT / "words.json", compact_json(values))
    asked = [seed for seed in seeds if (seed / "other_critiques/05_eval/results.json").exists()]
    write_atomic(OUT / "words.md", "\n".join([*lines, "", *thinkings(asked[0])]))
    print("\n".join(lines))


if __name__ == "__main__":
    run_stage(main)
