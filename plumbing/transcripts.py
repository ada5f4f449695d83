"""transcripts.html: every prompt of an evaluation under all of its models, a page that opens from
disk and loads nothing. What it looks like stands in transcripts.html beside this file."""

import glob
import json
import re
from pathlib import Path

from plumbing.names import file_label
from plumbing.process import fail
from plumbing.prompts import kind_of
from plumbing.rows import read_jsonl, write_atomic

PLACE = "{{data}}"
SHOWN = ("thinking", "answer", "state", "finish", "tokens")  # of a sample


def write_transcripts(run: Path):
    """<run>/transcripts.html of a finished run of stage 05, from what lies in its folder."""
    data = json.dumps(transcripts(run))  # ASCII: what no file can hold is written as \\u…
    data = data.replace("<", "\\u003c")  # no text can end the script that it stands in
    page = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    write_atomic(run / "transcripts.html", page.replace(PLACE, data, 1))


def transcripts(run: Path) -> dict:
    """{"models", "judges", "benchmarks": names, "rows": a row for each prompt}. A row's "responses"
    are one list of samples for each model, None where it has none; a sample's "verdicts" are those
    of each judge, by text ("answer", "response")."""
    try:
        results = json.loads((run / "results.json").read_text(encoding="utf-8"))
        recipe, self_checker = results["recipe"], results["recipe"]["self_checker"]
        models, judges = list(recipe["models"]), dict(recipe["judges"])
        benchmarks = list(dict.fromkeys(row["benchmark"] for row in results["rows"]))
    except (OSError, ValueError, LookupError, TypeError):
        fail(f"{run} is no folder of a finished run of stage 05: its results.json can't be read")
    rows = {}
    for benchmark in benchmarks:
        for m, model in enumerate(models):
            begin = f"{run / model / benchmark}."
            if not Path(f"{begin}responses.jsonl").exists():
                continue
            verdicts = verdicts_of(begin, judges)
            checks = checks_of(begin, self_checker)
            for row in read_jsonl(f"{begin}responses.jsonl"):
                key = (benchmark, row["id"])
                if key not in rows:
                    rows[key] = prompt_of(row, benchmark, len(models))
                samples = []
                for k, sample in enumerate(row["samples"]):
                    one = {name: sample[name] for name in SHOWN}
                    one["verdicts"] = []
                    for own in verdicts:
                        texts = {name: by_id[row["id"]][k] for name, by_id in own.items()}
                        one["verdicts"].append(texts)
                    if row["id"] in checks:
                        one["check"] = checks[row["id"]][k]
                    samples.append(one)
                rows[key]["responses"][m] = samples
    names = {"models": models, "judges": list(judges), "benchmarks": benchmarks}
    return {**names, "rows": list(rows.values())}


def prompt_of(row: dict, benchmark: str, models: int) -> dict:
    """What the page says of a prompt, with room for the responses of so many models."""
    prompt = row["prompt"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if row.get("start") and turns[-1]["role"] != "assistant":  # it begins the response
        turns = [*turns, {"role": "assistant", "content": row["start"]}]
    shown = {"benchmark": benchmark, "id": row["id"], "turns": turns, "kind": kind_of(row)}
    for name in ("category", "gold", "verdict", "start"):
        shown[name] = str(row.get(name) or "")
    return {**shown, "responses": [None] * models}


def verdicts_of(begin: str, judges: dict[str, str]) -> list[dict[str, dict[str, list]]]:
    """For each judge {text: {id: verdict of each sample}}, [] where none of them was asked."""
    by_judge = []
    for name, content in judges.items():
        files = {t: f"{begin}{file_label(name, content)}.{t}.jsonl" for t in ("answer", "response")}
        by_judge.append({t: by_id(file) for t, file in files.items() if Path(file).exists()})
    return by_judge if any(by_judge) else []


def checks_of(begin: str, self_checker: str) -> dict[str, list]:
    """{id: verdict on each thinking} by a self-checker that is a model; a rule writes no file."""
    if not self_checker:
        return {}
    label = re.split("[/:]", self_checker)[-1]
    files = glob.glob(f"{glob.escape(f'{begin}{label}-')}??????.thinking.jsonl")
    return by_id(max(files, key=lambda file: Path(file).stat().st_mtime)) if files else {}


def by_id(file: str) -> dict[str, list]:
    return {row["id"]: row["verdicts"] for row in read_jsonl(file)}
