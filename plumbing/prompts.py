"""Prompt files: ours and the public spellings, read as rows or refused by file, row and field."""

import ast
import json
import random
import re
from collections import Counter
from pathlib import Path

from plumbing.files import WORDS, read_source, split_source, stem_of
from plumbing.process import fail

PROMPT_FIELDS = [
    *("prompt", "question", "problem", "forbidden_prompt", "adversarial", "vanilla"),
    *("Goal", "goal", "instruction", "Problem", "Behavior"),
]
SAFE_WORDS = {"safe": False, "benign": False, "harmless": False, "unsafe": True, "harmful": True}
HARMFUL_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
NEGATIONS = {"not", "non", "no", "never"}  # not_harmful is neither of the two
GIVE = "end the name of a local file in :harmful or :benign"


def load_prompts(sources: list[str], limit: int = 0) -> list[dict]:
    """The prompt rows of all sources; `limit` > 0 takes that many of each."""
    if not sources:
        fail("no prompts: give --prompts one or more files or hub datasets")
    return join(rows_of_each(sources, limit), sources)


def rows_of_each(sources: list[str], limit: int) -> list[list[dict]]:
    rows = []
    for source in sources:
        name, told = split_source(source)
        rows.append(prompt_rows(read_source(name), name, limit, told, begun=False))
    return rows


def join(parts: list[list[dict]], sources: list[str]) -> list[dict]:
    """The rows of all sources in one list. Ids that two sources share get the names of their files
    in front, in the whole of both; all others stay as they are."""
    counts = Counter(row["id"] for rows in parts for row in rows)
    stems = set()
    for rows, source in zip(parts, sources):
        if all(counts[row["id"]] == 1 for row in rows):
            continue
        stem = stem_of(source)
        if stem in stems:
            fail(f"{', '.join(sources)}: two files named {stem} share ids; rename one")
        stems.add(stem)
        for row in rows:
            row["id"] = f"{stem}-{row['id']}"
    joined = [row for rows in parts for row in rows]
    require_distinct_ids(joined, ", ".join(sources))
    return joined


def require_distinct_ids(rows: list[dict], where: str):
    for row_id, count in Counter(row["id"] for row in rows).items():
        if count > 1:
            fail(f"id {shown(row_id)} occurs twice in {where}")


def prompt_rows(
    raw_rows: list[dict],
    source: str,
    limit: int = 0,
    told: bool | None = None,
    numbers: list[int] | None = None,
    keep: tuple[str, ...] = (),
    begun: bool = True,
) -> list[dict]:
    """Rows {"id", "prompt": str or chat messages, "harmful": bool, "source", "gold" for maths rows,
    "start" where the response has begun} of raw ones, in our spelling or the public ones. `limit` >
    0 takes that many, always the same ones. `told` is what the user says of all of them: harmful,
    benign, None for nothing. `numbers` are those of the rows in their file, for messages, where
    some were left out. Texts of further fields to `keep` go to "fields". Stages other than 05 take
    no rows that have `begun`."""
    meaning = meaning_of_labels(raw_rows)
    stem = stem_of(source)
    rows = []
    for number, raw in enumerate(raw_rows, 1):
        where = f"{source}, row {numbers[number - 1] if numbers else number}"
        rows.append(prompt_row(raw, where, stem, number, meaning, told))
        if "start" in rows[-1] and not begun:
            what = (
                "the assistant's turn, or a start, begins the response; stage 05 alone takes that"
            )
            fail(f"{where}, field prompt: {what}")
        for field in keep if rows[-1]["harmful"] else ():  # whose responses alone are begun
            if not isinstance(raw.get(field), str) or not raw[field].strip():
                fail(f"{where}, field {field}: no text to begin a response with (--prefill)")
            rows[-1].setdefault("fields", {})[field] = raw[field]
    if 0 < limit < len(rows):
        rows = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), limit))]
    require_distinct_ids(rows, source)
    return rows


def load_with_boundary(prompts: list[str], boundary: list[str], limit: int) -> list[dict]:
    """Rows of prompt files and of --boundary files, each with its "kind"."""
    sources = prompts + boundary
    if not sources:
        fail("no prompts: give --prompts one or more files or hub datasets")
    parts = rows_of_each(sources, limit)
    rows = join(parts, sources)
    for row in rows:
        row["kind"] = "harmful" if row["harmful"] else "benign"
    for part in parts[len(prompts) :]:
        for row in part:
            if row["harmful"]:
                fail(f"--boundary takes benign prompts; {row['id']} is harmful")
            row["kind"] = "boundary"
    return rows


def load_held_out(files: list[str], every: int) -> dict[str, list[dict]]:
    """{name: rows} of the held-out files of --eval_prompts, checked --eval_every so many steps."""
    tests = {stem_of(file): load_prompts([file]) for file in files}
    if bool(every) != bool(tests):
        fail("--eval_every and --eval_prompts go together: give both or neither")
    if len(tests) < len(files):
        fail(f"--eval_prompts {' '.join(files)}: two files of one name; rename one")
    return tests


# Spellings ----------------------------------------------------------------------------------------
def prompt_row(
    raw: dict, where: str, stem: str, number: int, meaning: str, told: bool | None
) -> dict:
    """One row in our spelling; `meaning` is that of the labels in its file, `told` what the user
    says of the whole file."""
    name = prompt_field(raw)
    if name is None:
        fail(f"{where}: no prompt; expected one of the fields {', '.join(PROMPT_FIELDS)}")
    prompt, start = read_prompt(raw, name, where)

    field, harmful = own_word(raw, where)
    if told is not None:
        if harmful not in (None, told):
            word = "harmful" if told else "benign"
            what = f"{shown(raw[field])} in a file that was given as :{word}"
            fail(f"{where}, field {field}: {what}")
        harmful = told
    gold_field = gold_field_of(raw, where, name, harmful, meaning)
    gold = None
    if gold_field:
        gold = read_gold(raw[gold_field], f"{where}, field {gold_field}", harmful)
        harmful = False
    if harmful is None:
        what = f'add the field "harmful": true or false, or {GIVE}'
        fail(f"{where}: nothing says whether the prompt is harmful; {what}")

    row_id = f"{stem}-{number}" if raw.get("id") is None else raw["id"]
    if type(row_id) not in (str, int) or row_id == "":
        kind = type(row_id).__name__
        fail(f"{where}, field id: {kind} where a text or a whole number belongs")
    if raw.get("verdict") not in (None, "safe", "unsafe"):
        fail(f"{where}, field verdict: {shown(raw['verdict'])} is neither safe nor unsafe")
    source = str(raw.get("source") or stem)
    row = {"id": str(row_id), "prompt": prompt, "harmful": harmful, "source": source}
    for field in ("split", "category", "verdict"):
        if raw.get(field) is not None:
            row[field] = str(raw[field])
    if gold is not None:
        row["gold"] = gold
    if start:
        row["start"] = start
    require_text(row, where, {"prompt": name, "gold": gold_field})
    return row


def is_blank(value) -> bool:
    return value is None or value == ""


def shown(value) -> str:
    """A value of a file in a message: short, and with nothing that a terminal obeys."""
    return repr(str(value)[:99])


def prompt_field(raw: dict) -> str | None:
    """The field that holds the prompt of a row, None if all of them are empty."""
    for field in PROMPT_FIELDS:
        if str(raw.get(field) or "").strip():
            return field
    return None


def read_prompt(raw: dict, field: str, where: str):
    """(prompt, start): a text, or chat messages without what no template reads; a chat of one turn
    is its text. The response that a last turn of the assistant's, or the field "start", begins.
    HarmBench's contextual behaviours have their context in front, as in its own code."""
    prompt, start = raw[field], raw.get("start") or ""
    if not isinstance(start, str):
        fail(f"{where}, field start: {type(start).__name__} where a text belongs")
    where = f"{where}, field {field}"
    if isinstance(prompt, str):
        context = raw.get("ContextString") if field == "Behavior" else None
        if isinstance(context, str) and context.strip():
            return f"{context}\n\n---\n\n{prompt}", start
        messages = messages_in(prompt)
        if messages is None:
            return prompt, start
        prompt = messages
    if not isinstance(prompt, list):
        fail(f"{where}: {type(prompt).__name__} where text or chat messages belong")
    roles = []
    for turn in prompt:
        good = isinstance(turn, dict) and isinstance(turn.get("content"), str)
        roles.append(turn.get("role") if good else None)
    if roles[-1] == "assistant" and "user" in roles and not start:
        start = prompt[-1]["content"]
        prompt, roles = prompt[:-1], roles[:-1]
    if any(role not in ("system", "user", "assistant") for role in roles) or roles[-1] != "user":
        what = "chat messages need a text and a role: system, assistant or (the last) user"
        fail(f"{where}: {what}; the assistant's may follow as the response that has begun")
    if len(prompt) == 1:
        return prompt[0]["content"], start
    messages = [{"role": turn["role"], "content": turn["content"]} for turn in prompt]
    return messages, start


def messages_in(text: str) -> list[dict] | None:
    """Chat messages that a table stores as text, in JSON's spelling or Python's; None for any other
    text.

    >>> messages_in("[{'role': 'user', 'content': 'how?'}]"), messages_in("[1]")
    ([{'role': 'user', 'content': 'how?'}], None)
    """
    if not re.match(r"\s*\[\s*\{", text):
        return None
    for parse in (json.loads, ast.literal_eval):
        try:
            turns = parse(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if all(isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in turns):
            return turns
    return None


def word_of(value) -> str:
    return str(value).strip().lower()


def verdict_of(value) -> bool | None:
    """Whether a label or data type says harmful, None if it says neither.

    >>> verdict_of("Unsafe"), verdict_of("vanilla_benign"), verdict_of("not_harmful")
    (True, False, None)
    """
    word = word_of(value)
    if word in SAFE_WORDS:
        return SAFE_WORDS[word]
    *before, last = word.split("_")
    if before and last in WORDS and not NEGATIONS & set(before):
        return WORDS[last]
    return None


def own_word(raw: dict, where: str) -> tuple[str, bool | None]:
    """(field, whether it says that the prompt is harmful) of a row, ("", None) if none does. The
    field "harmful" goes before the others, which must agree."""
    value = raw.get("harmful")
    if value is not None:
        verdict = HARMFUL_WORDS.get(word_of(value).removesuffix(".0"))  # 1.0: a column with gaps
        if verdict is None:
            fail(f"{where}, field harmful: {shown(value)} is neither true nor false")
        return "harmful", verdict
    verdicts = {}
    for field in ("label", "data_type"):
        verdict = verdict_of(raw.get(field))
        if verdict is not None:
            verdicts[field] = verdict
    if len(set(verdicts.values())) > 1:
        what = f"{shown(raw['label'])}, where data_type says {shown(raw['data_type'])}"
        fail(f"{where}, field label: {what}")
    if verdicts:
        return next(iter(verdicts.items()))
    return "", None


def meaning_of_labels(raw_rows: list[dict]) -> str:
    """What the labels of a file are: "verdicts", "classes" or, in a maths file, "answers". Labels
    that are numbers up to 10 all the way may be classes or scores, and are no answers."""
    labels = [raw["label"] for raw in raw_rows if not is_blank(raw.get("label"))]
    if any(verdict_of(label) is not None for label in labels):
        return "verdicts"
    if all(re.fullmatch(r"-?(\d|10)?(\.\d*)?", word_of(label)) for label in labels):
        return "classes"
    return "answers"


def looks_like_answer(label) -> bool:
    r"""Whether a label is a number or a formula: LaTeX, or digits, signs and letters that stand
    alone. A word, and a letter with a number, may be a class.

    >>> [looks_like_answer(label) for label in ("34", "\\text{Evelyn}", "p - q", "refusal", "S2")]
    [True, True, True, False, False]
    """
    if not isinstance(label, str):
        return False
    answer = label.rpartition("####")[2].strip()
    if "\\" in answer:
        return True
    if re.search(r"[^\W\d_]{2}", answer) or re.fullmatch(r"[^\W\d_][\s_-]*\d+", answer):
        return False
    return bool(re.search(r"\d|\w\s*[-+*^=]\s*\w", answer))


def gold_field_of(raw: dict, where: str, name: str, harmful, meaning: str) -> str:
    """The field of a row's right answer, "" if it is no maths row. An answer is gold where its
    field says so, beside a question or problem; a label beside a prompt is, where it looks like
    one. What else stands there is an error: it would make a harmful prompt a benign one."""
    if not is_blank(raw.get("gold")):
        return "gold"
    if harmful is not None:
        return ""
    label = raw.get("label")
    if not is_blank(label) or meaning == "verdicts":
        if name == "prompt" and meaning == "answers" and looks_like_answer(label):
            return "label"
        what = f"{shown(label)} is none of {', '.join(SAFE_WORDS)}"
        fail(f'{where}, field label: {what}; a right answer is called "gold"')
    for field in ("answer", "Answer"):
        if is_blank(raw.get(field)):
            continue
        if name.lower() in ("question", "problem"):
            return field
        if name == "prompt":
            what = 'a right answer is called "gold"; beside any other say harmful or benign'
            fail(f"{where}, field {field}: {what}")
    return ""


def read_gold(value, where: str, harmful) -> str:
    """The right answer of a maths prompt."""
    gold = str(value).rpartition("####")[2].strip()  # GSM8K's final answer comes after a solution
    types = (str, int, float)
    if harmful or type(value) not in types or gold in ("", "nan", "inf", "-inf"):
        fail(f"{where}: {shown(value)} is no right answer of a benign prompt")
    return gold


def require_text(row: dict, where: str, spelled: dict[str, str]):
    """Ends the program where a text is none; `spelled` has the fields' names in the file."""
    for field, value in row.items():
        if re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
            field = spelled.get(field) or field
            fail(f"{where}, field {field}: half of a surrogate pair, which is no text")


# Kinds of prompts ---------------------------------------------------------------------------------
KINDS = ("harmful", "benign", "maths", "verify")


def chat_text(prompt) -> str:
    """A prompt as one text: of a chat with several turns each behind its role.

    >>> chat_text("hi"), chat_text([{"role": "user", "content": "hi"}])
    ('hi', 'hi')
    >>> chat_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}])
    'system: Be brief.\\n\\nuser: hi'
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


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
