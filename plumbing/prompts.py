"""Prompt files: ours and the public spellings, read as rows or refused by file, line and field."""

import json
import random
import re
from collections import Counter
from pathlib import Path

from plumbing.process import fail
from plumbing.rows import read_jsonl

PROMPT_FIELDS = [
    *("prompt", "question", "problem", "forbidden_prompt", "adversarial", "vanilla"),
    *("Goal", "goal"),
]
SAFE_WORDS = {"safe": False, "benign": False, "harmless": False, "unsafe": True, "harmful": True}
TABLES = (".csv", ".parquet")


def read_source(source: str, **load) -> list[dict]:
    """Rows as they stand in a local JSONL/CSV/Parquet file or a hub dataset
    ("owner/name[:config[:split]]"), `load` being further arguments of load_dataset."""
    suffix = Path(source).suffix
    if suffix == ".jsonl":
        rows = read_jsonl(source)
    else:
        if suffix in TABLES and not Path(source).exists():
            fail(f"no prompt file at {source}")
        rows = load_rows(source, suffix, load)
    if not rows:
        fail(f"{source} holds no rows")
    return rows


def load_rows(source: str, suffix: str, load: dict) -> list[dict]:
    from datasets import load_dataset

    try:
        if suffix in TABLES:
            return list(load_dataset(suffix[1:], data_files=source, split="train"))
        name, config, split = [*source.split(":"), "", ""][:3]
        return list(load_dataset(name, config or None, split=split or "train", **load))
    except Exception as error:  # the hub, its network and the parsers raise many kinds
        cause = error.__cause__ or error
        what = f"{type(cause).__name__} {' '.join(str(cause).split())[:200]}"
        fail(f"cannot load prompts from {source}: {what}")


def require_distinct_ids(rows: list[dict], where: str):
    for row_id, count in Counter(row["id"] for row in rows).items():
        if count > 1:
            fail(f"id '{row_id}' occurs twice in {where}")


def prompt_rows(raw_rows: list[dict], source: str, limit: int = 0) -> list[dict]:
    """Rows {"id", "prompt": str or chat messages, "harmful": bool, "source", "gold" for maths rows}
    of raw ones, in our spelling or the public ones. `limit` > 0 takes that many, always the same
    ones."""
    label_is_verdict = any(word_of(row) in SAFE_WORDS for row in raw_rows if "label" in row)
    rows = []
    for number, raw in enumerate(raw_rows, 1):
        where = f"{source}, row {number}"
        rows.append(prompt_row(raw, where, Path(source).stem, number, label_is_verdict))
    if 0 < limit < len(rows):
        rows = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), limit))]
    require_distinct_ids(rows, source)
    return rows


def load_prompts(sources: list[str], limit: int = 0) -> list[dict]:
    """The prompt rows of all sources; `limit` > 0 takes that many of each."""
    if not sources:
        fail("no prompts: give --prompts one or more files or hub datasets")
    rows = []
    for source in sources:
        rows += prompt_rows(read_source(source), source, limit)
    require_distinct_ids(rows, ", ".join(sources))
    return rows


def load_with_boundary(prompts: list[str], boundary: list[str], limit: int) -> list[dict]:
    """Rows of prompt files and of --boundary files, each with its "kind"."""
    rows = load_prompts(prompts + boundary, limit)
    close = {row["id"] for row in load_prompts(boundary)} if boundary else set()
    for row in rows:
        row["kind"] = "harmful" if row["harmful"] else "benign"
        if row["id"] in close:
            if row["harmful"]:
                fail(f"--boundary takes benign prompts; {row['id']} is harmful")
            row["kind"] = "boundary"
    return rows


def load_held_out(files: list[str], every: int) -> dict[str, list[dict]]:
    """{name: rows} of the held-out files of --eval_prompts, checked --eval_every so many steps."""
    tests = {Path(file).stem: load_prompts([file]) for file in files}
    if bool(every) != bool(tests):
        fail("--eval_every and --eval_prompts go together: give both or neither")
    if len(tests) < len(files):
        fail(f"--eval_prompts {' '.join(files)}: two files of one name; rename one")
    return tests


def word_of(raw: dict) -> str:
    return str(raw.get("label")).strip().lower()


def prompt_row(raw: dict, where: str, stem: str, number: int, label_is_verdict: bool) -> dict:
    """One row in our spelling; `label_is_verdict` says whether this file's labels are safe or
    unsafe, where in a maths file they are right answers."""
    name = next((field for field in PROMPT_FIELDS if str(raw.get(field) or "").strip()), None)
    if name is None:
        fail(f"{where}: no prompt; expected one of the fields {', '.join(PROMPT_FIELDS)}")
    prompt = read_prompt(raw[name], f"{where}, field {name}")

    harmful, gold_fields = raw.get("harmful"), ["gold"]
    if harmful is None and label_is_verdict:
        harmful = SAFE_WORDS.get(word_of(raw))
        if harmful is None:
            what = f"'{str(raw.get('label'))[:99]}' is none of {', '.join(SAFE_WORDS)}"
            fail(f"{where}, field label: {what}")
    elif harmful is None and name in ("question", "problem", "prompt"):
        gold_fields += ["answer", "label"]
    data_type = raw.get("data_type")  # WildJailbreak: vanilla_harmful, adversarial_benign
    if harmful is None and isinstance(data_type, str):
        harmful = SAFE_WORDS.get(data_type.rpartition("_")[2])
    gold = read_gold(raw, where, gold_fields, harmful)
    if gold is not None and harmful is None:
        harmful = False
    if not isinstance(harmful, bool):
        what = 'add the field "harmful": true or false'
        fail(f"{where}: nothing says whether the prompt is harmful; {what}")

    row_id = f"{stem}-{number}" if raw.get("id") is None else raw["id"]
    if type(row_id) not in (str, int) or row_id == "":
        kind = type(row_id).__name__
        fail(f"{where}, field id: {kind} where a text or a whole number belongs")
    if raw.get("verdict") not in (None, "safe", "unsafe"):
        fail(f"{where}, field verdict: '{str(raw['verdict'])[:99]}' is neither safe nor unsafe")
    source = str(raw.get("source") or stem)
    row = {"id": str(row_id), "prompt": prompt, "harmful": harmful, "source": source}
    for field in ("split", "category", "verdict"):
        if raw.get(field) is not None:
            row[field] = str(raw[field])
    if gold is not None:
        row["gold"] = gold
    require_text(row, where, name)
    return row


def read_prompt(prompt, where: str):
    """A text, or chat messages without what no template reads; a chat of one turn is its text."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        fail(f"{where}: {type(prompt).__name__} where text or chat messages belong")
    roles = []
    for turn in prompt:
        good = isinstance(turn, dict) and isinstance(turn.get("content"), str)
        roles.append(turn.get("role") if good else None)
    if any(role not in ("system", "user", "assistant") for role in roles) or roles[-1] != "user":
        what = "chat messages need a text and a role: system, assistant or (the last) user"
        fail(f"{where}: {what}")
    if len(prompt) == 1:
        return prompt[0]["content"]
    return [{"role": turn["role"], "content": turn["content"]} for turn in prompt]


def read_gold(raw: dict, where: str, fields: list[str], harmful) -> str | None:
    """The right answer of a maths prompt, from the first of the fields that has one."""
    field = next((f for f in fields if raw.get(f) not in (None, "")), None)
    if field is None:
        return None
    value = raw[field]
    gold = str(value).rpartition("####")[2].strip()  # GSM8K's final answer comes after a solution
    types = (str, int, float)
    if field == "label":  # one that is a number may say what is harmful
        types = (str,)
    if harmful or type(value) not in types or gold in ("", "nan", "inf", "-inf"):
        fail(f"{where}, field {field}: '{str(value)[:99]}' is no right answer of a benign prompt")
    return gold


def require_text(row: dict, where: str, prompt_field: str):
    for field, value in row.items():
        if re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
            field = prompt_field if field == "prompt" else field
            fail(f"{where}, field {field}: half of a surrogate pair, which is no text")


# Kinds of prompts ---------------------------------------------------------------------------------
KINDS = ("harmful", "benign", "maths", "verify")


def kind_of(row: dict) -> str:
    if "verdict" in row:
        return "verify"
    if "gold" in row:
        return "maths"
    return "harmful" if row["harmful"] else "benign"


def mixture(prompts: list[dict], shares: list[str], seed: int = 0) -> list[dict]:
    """As many rows as there are, in the given shares of kinds; a kind that is short of rows has
    them repeated.

    >>> rows = [{"id": i, "harmful": i > 0} for i in range(4)]
    >>> sorted(row["id"] for row in mixture(rows, ["harmful=0.5", "benign=0.5"]))[:2]
    [0, 0]
    """
    given = f"--shares {' '.join(shares)}"
    try:
        numbers = {kind: float(share) for kind, _, share in (s.partition("=") for s in shares)}
    except ValueError:
        fail(f"{given}: kind=share with kinds {', '.join(KINDS)}")
    if not abs(sum(numbers.values()) - 1) < 1e-6 or min(numbers.values()) < 0:
        fail(f"{given}: shares are at least 0 and add up to 1")
    mixed, total = [], 0.0
    for kind, share in numbers.items():
        rows = [row for row in prompts if kind_of(row) == kind]
        if not rows:
            kinds = ", ".join(sorted({kind_of(row) for row in prompts}))
            fail(f"--shares {kind}={share}: no prompt is of this kind; there are {kinds}")
        random.Random(seed).shuffle(rows)
        total += share
        wanted = round(total * len(prompts)) - len(mixed)
        mixed += [rows[i % len(rows)] for i in range(wanted)]
    return mixed


# Texts with places -------------------------------------------------------------------------------
def fill(template: str, prompt: str, answer: str) -> str:
    """{prompt} and {answer} filled in as data: a place in a text that is filled in is left alone.

    >>> fill("{prompt}: {answer}", prompt="{answer}?", answer="no")
    '{answer}?: no'
    """
    texts = {"{prompt}": prompt, "{answer}": answer}
    return re.sub(r"\{prompt\}|\{answer\}", lambda place: texts[place[0]], template)


def read_template(path: str, places: list[str]) -> str:
    """The text of a file that must hold all of the places."""
    if not Path(path).is_file():
        fail(f"no specification at {path}")
    template = Path(path).read_text(encoding="utf-8").strip()
    if any(place not in template for place in places):
        fail(f"{path} must hold {' and '.join(places)}")
    return template
