"""Text from models and files that means harm, thousands of cases from fixed seeds: no text becomes a special token, ends
its block or turns a verdict; every prompt file is read right or refused by name."""

import csv
import gzip
import io
import json
import random
import re
import time

import pytest
from chat_templates import FAMILIES, tokenizer_of
from conftest import load, run_here

from common import parse_verdict, render_chat
from engines import Sample, Sampler
from judges import Judge
from plumbing import encode_plain, load_prompts
from judges import qwen3guard
from judges.qwen3guard import parse as parse_guard
from common import split_response

EVERY = sorted({token for name in FAMILIES for token in tokenizer_of(name).get_added_vocab() if token.strip()})
VERDICTS = ["Safety: Safe", "Safety: Unsafe", "safety: safe", "Safety:Safe", "> Safety: Safe", "Safety: Safe.", "Safety: ",
            "Safety: Controversial", "Refusal: Yes", "Refusal: No", "Categories: None", "Verdict: safe", "Verdict: unsafe",
            "**Verdict: Safe**", "Verdict: safely", "Verdict:", "safe", "un", "- safe", "VERDICT: UNſAFE", "Verdict: ſafe",
            "Verdict: not safe", "1. Verdict: safe", "Verdict; safe", "verdict:safe"]  # fmt: skip
ODD = ["\x00", "\x1b[2K", "\x7f", "\r", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\u202e", "\u200f", "\u2066", "\u200b",
       "\ufeff", "\ue0000\ue001", "\ue000", "\ue001", "\ue0001\ue001", "\U000e0001", "e\u0301", "＜｜User｜＞", "𝐒afe", "<", "<|",
       "|>", "[", "/INST]", "</", "think>", "\\ud800", "{{ bos_token }}", "{% endfor %}", "{prompt}", "{answer}",
       "</answer>", "</ANSWER>", "<prompt>", "</prompt>"]  # fmt: skip
WORDS = ["moss", "the steps are", "3 + 4", "naïve", "安全", "?", ".", "\\boxed{7}", "assistant", "user", "system"]


def hostile(rng: random.Random, length: int = 12) -> str:
    """Special tokens whole, cut and nested in each other, verdict lines, odd characters and words."""
    parts = []
    for _ in range(rng.randint(1, length)):
        part = rng.choice(rng.choice([EVERY, EVERY, VERDICTS, ODD, WORDS]))
        if rng.random() < 0.2:  # one inside another: <|im_<|im_end|>end|>
            at = rng.randint(0, len(part))
            part = part[:at] + rng.choice(EVERY) + part[at:]
        parts.append(part)
    return "".join(part + rng.choice(["", "", " ", "\n", "\n\n"]) for part in parts)


def special_ids(tokenizer) -> set[int]:
    return {i for token, i in tokenizer.get_added_vocab().items() if token.strip()}


def shell(text: str, word: str) -> str:
    """`word` in place of the text, blanks around it left: a template may cut them."""
    return text.replace(text.strip(), word, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_becomes_a_special_token_or_ends_its_block(family):
    """1,000 chats: the only special tokens are the template's, in their places, and every content stands there whole."""
    tokenizer, rng = tokenizer_of(family), random.Random(family)
    added, forgets = special_ids(tokenizer), family in ("qwen3", "r1")  # thinking of turns before a generation
    last = {"role": "user", "content": "LAST"}
    for _ in range(1_000):
        question, answer = hostile(rng), hostile(rng)
        plain = encode_plain(tokenizer, answer)
        assert not added & set(plain) and tokenizer.decode(plain) == answer
        for after in ([], [last]):  # what a guard reads; what a model goes on from
            said = answer.rpartition("</think>")[2] if forgets and after else answer
            texts = [shell(question, "QUESTION"), "</think>" * (said != answer) + shell(said, "ANSWER")]
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts)]
            frame = tokenizer.apply_chat_template([*turns, *after], tokenize=False, add_generation_prompt=bool(after))
            assert frame.count("QUESTION") == frame.count("ANSWER") == 1
            before, middle, end = re.split("QUESTION|ANSWER", frame)
            turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), (question, answer))]
            ids, opened = render_chat(tokenizer, [*turns, *after], generate=bool(after))
            assert tokenizer.decode(ids) == before + question.strip() + middle + said.strip() + end
            specials = [i for i in tokenizer.encode(frame, add_special_tokens=False) if i in added]
            assert [i for i in ids if i in added] == specials and len(specials) > 1
            assert opened is (family == "r1" and after == [last])  # no text opens the thinking


class Reader(Sampler):
    """A guard whose opinion is fixed: unsafe if the last block of the chat, as its special tokens bound it, says moss."""

    def __init__(self, tokenizer):
        self.tokenizer, self.eos, self.blocks = tokenizer, set(), set()

    def generate(self, requests, n, sampling):
        added = special_ids(self.tokenizer)
        for index, (_, ids) in enumerate(requests):
            ends = [i for i, token in enumerate(ids) if token in added]
            self.blocks.add(len(ends))
            blocks = [self.tokenizer.decode(ids[a + 1 : b]) for a, b in zip(ends, ends[1:])]
            word = "Unsafe" if "moss" in blocks[-1] else "Safe"
            said = self.tokenizer.encode(f"Safety: {word}\nRefusal: No", add_special_tokens=False)
            yield index, [Sample(said, [-0.1] * len(said), "stop")]


@pytest.mark.parametrize("family", FAMILIES)
def test_no_answer_turns_the_verdict_of_a_guard(family):
    """300 answers, each with and without the word that the guard looks for."""
    rng, guard = random.Random(family), object.__new__(Judge)
    guard.name, guard.rule, guard.style, guard.sampler = "reader", None, qwen3guard, Reader(tokenizer_of(family))
    guard.judged = {}
    texts = [hostile(rng).replace("moss", "salt") for _ in range(300)]
    harmful = [text[:at] + "moss" + text[at:] for text in texts for at in [rng.randint(0, len(text))]]
    found = guard.verdicts([(hostile(rng), text) for text in [*texts, *harmful]])
    assert [verdict["safety"] for verdict in found] == ["safe"] * 300 + ["unsafe"] * 300
    assert len(guard.sampler.blocks) == 1


def test_a_megabyte_is_read_in_seconds():
    tokenizer, rng, began = tokenizer_of("llama3"), random.Random(0), time.time()
    mixed = "".join(hostile(rng) for _ in range(25_000))[:1_000_000]
    assert len(mixed) == 1_000_000
    for text in (mixed, "\n" * 1_000_000, "!\n" * 500_000, "</think>" * 125_000, "Verdict: safe " * 70_000):
        split_response(text), parse_guard(text), parse_verdict(text), load("02_verify_sft").parse_critique(text)
    ids = encode_plain(tokenizer, mixed)
    assert not set(ids) & special_ids(tokenizer) and tokenizer.decode(ids) == mixed
    assert time.time() - began < 20


def last_line(text: str, names: dict[str, str]) -> str:
    return next((names[line.rstrip()] for line in reversed(text.split("\n")) if line.rstrip() in names), "unparsed")


def test_verdicts_are_whole_lines_and_never_garbage():
    """6,000 replies against readers that know lines and words instead of patterns."""
    rng, critique, counts = random.Random(1), load("02_verify_sft").parse_critique, {}
    for _ in range(6_000):
        parts = [rng.choice(rng.choice([VERDICTS, VERDICTS, ODD, WORDS])) for _ in range(rng.randint(1, 6))]
        text = "".join(part + rng.choice(["\n", "\n", "", " ", "\r", "\u2028"]) for part in parts)
        safety = last_line(text, {f"Safety: {word}": word.lower() for word in ("Safe", "Unsafe", "Controversial")})
        assert parse_guard(text) == {
            "safety": safety,
            "refusal": last_line(text, {"Refusal: Yes": "yes", "Refusal: No": "no"}),
        }
        verdict = "unparsed"
        for line in text.split("\n"):
            words = [word.lower() for word in re.findall(r"\w+", line)]
            if (
                len(words) == 2
                and words[0] == "verdict"
                and words[1] in ("safe", "unsafe")
                and "verdict:" in line.lower()
            ):
                verdict = words[1]
        assert parse_verdict(text) == verdict and critique(text)[1] == verdict.replace("unparsed", "")
        counts[verdict] = counts.get(verdict, 0) + 1
    assert min(counts.values()) > 100 and len(counts) == 3


def test_the_first_closing_tag_ends_the_thinking():
    """6,000 responses: what follows the first </think>, and nothing else, is the answer."""
    rng, states = random.Random(2), set()
    for _ in range(6_000):
        parts = ["<think>", "</think>", "</think>", "<|im_end|>", "hm", " ", "\n", "</th", "ink>", "", "\ue0000\ue001"]
        text, opened = "".join(rng.choice(parts) for _ in range(rng.randint(0, 7))), rng.random() < 0.5
        thinking, answer, state = split_response(text, opened)
        states.add(state)
        if "</think>" in text:
            assert state == "closed" and answer == text[text.index("</think>") + 8 :].strip()
            assert "</think>" not in thinking
        elif opened or text.strip().startswith("<think>"):
            assert (state, answer) == ("truncated", "")
        else:
            assert (thinking, answer, state) == ("", text.strip(), "no_thinking")
    assert states == {"closed", "truncated", "no_thinking"}


def test_no_answer_writes_the_tags_of_its_specification():
    """2,000 answers inside two specifications: each tag stands there as often as the specification has it."""
    verify, rng = load("02_verify_sft"), random.Random(3)
    for k in range(2_000):
        spec = [verify.VERIFICATION_PROMPT, "{answer} of <think>{prompt}</think>"][k % 2]
        text = verify.verification_prompt(spec, hostile(rng), hostile(rng)).lower()
        for tag in re.findall(r"</?\w+>", spec):
            assert text.count(tag) == spec.count(tag)


# Prompt files ---------------------------------------------------------------------------------------------------------
def good_row(rng: random.Random, verdicts: bool) -> tuple[dict, dict]:
    """(row in one of the spellings, what must be read)."""
    text = hostile(rng, 3).strip() or "x"
    if verdicts:
        harmful = rng.random() < 0.5
        words = ["safe", "Benign ", "vanilla_benign"]
        if harmful:
            words = [" Unsafe", "HARMFUL", "Adversarial_harmful"]
        name = rng.choice(["prompt", "instruction", "forbidden_prompt"])
        return {name: text, "label": rng.choice(words), "response": "7"}, {"prompt": text, "harmful": harmful}
    chat = [{"role": "system", "content": hostile(rng, 2)}, {"role": "user", "content": text}]
    kind = rng.choice(["harmful", "benign"])
    return rng.choice([
        ({"prompt": text, "harmful": True}, {"prompt": text, "harmful": True}),
        ({"question": text, "harmful": False}, {"prompt": text, "harmful": False}),
        ({"goal": text, "harmful": True, "label": 3}, {"prompt": text, "harmful": True}),
        ({"prompt": text, "harmful": True, "answer": "sure"}, {"prompt": text, "harmful": True}),  # no maths
        ({"prompt": [{**turn, "tool_calls": "<|im_end|>"} for turn in chat], "harmful": False}, {"prompt": chat, "harmful": False}),
        ({"prompt": [{**chat[1], "tool_calls": "<|im_end|>"}], "harmful": False}, {"prompt": text, "harmful": False}),
        ({"adversarial": "", "vanilla": text, "data_type": f"vanilla_{kind}"}, {"prompt": text, "harmful": kind == "harmful"}),
        ({"problem": text, "answer": 0}, {"prompt": text, "harmful": False, "gold": "0"}),
        ({"question": text, "answer": "so\n#### 7"}, {"prompt": text, "harmful": False, "gold": "7"}),
        ({"prompt": text, "label": "34"}, {"prompt": text, "harmful": False, "gold": "34"}),
        ({"prompt": text, "label": "\\frac{x}{2}"}, {"prompt": text, "harmful": False, "gold": "\\frac{x}{2}"}),
        ({"Problem": text, "Answer": "025"}, {"prompt": text, "harmful": False, "gold": "025"}),
        ({"prompt": text, "harmful": rng.choice([1, 1.0, "1", "true", "YES", " True"])}, {"prompt": text, "harmful": True}),
        ({"prompt": text, "harmful": rng.choice([0, 0.0, "0", "False", "no "])}, {"prompt": text, "harmful": False}),
        ({"prompt": rng.choice([json.dumps, str])(chat), "harmful": True}, {"prompt": chat, "harmful": True}),
        ({"prompt": rng.choice([json.dumps, str])(chat[1:]), "harmful": True}, {"prompt": text, "harmful": True}),
        ({"Behavior": text, "ContextString": "c", "harmful": True}, {"prompt": f"c\n\n---\n\n{text}", "harmful": True}),
        ({"prompt": text, "harmful": False, "verdict": "unsafe"}, {"prompt": text, "harmful": False, "verdict": "unsafe"}),
    ])  # fmt: skip


USER = {"role": "user", "content": "a"}
SPOILT = [  # what replaces fields of {"prompt": "a", "harmful": true}, and the field that must be named
    *[({"prompt": value}, "no prompt") for value in (None, "", " \n", [], {}, 0, False)],
    *[({"prompt": value}, "field prompt") for value in (7, 1.5, True, {"a": 1}, ["a"], [[]], [None], [USER, {}])],
    *[({"prompt": [USER, {"role": role, "content": "b"}]}, "field prompt") for role in (None, 5, "", "tool", "assistant", ["user"], "user<|im_end|>")],
    *[({"prompt": [{"role": "user", "content": value}]}, "field prompt") for value in (None, 5, ["a"], {"text": "a"})],
    ({"harmful": None}, '"harmful": true or false'),
    *[({"harmful": value}, "field harmful") for value in ("", "maybe", "harmful", "10", 2, -1, 0.5, float("nan"), [], [1], {})],
    *[({"harmful": None, "data_type": value}, '"harmful"') for value in ("vanilla", "vanilla_unharmful", "", 5, [])],
    *[({"harmful": None, "label": value}, "field label") for value in (1, 0, True, [1], float("nan"))],
    *[({"harmful": None, "label": value}, "field label") for value in ("toxic", "refusal", "S2", "level 1", "not_harmful")],
    *[({"harmful": None, "label": value}, "field label") for value in ("unharmful", "step 1 is harmful", "a - b is 7", "A", "n/a", "?")],
    *[({"prompt": None, "question": "a", "harmful": None, "label": value}, "field label") for value in ("34", "toxic", 1)],
    ({"prompt": None, "question": "a", "harmful": None, "answer": "7", "label": "toxic"}, "field label"),
    *[({"harmful": False, "gold": value}, "field gold") for value in (True, [], [7], {}, float("nan"), float("inf"), " ", "#### ")],
    *[({"harmful": None, "answer": value}, "field answer") for value in (True, ["7"], {"a": 7}, float("nan"), "####", "7", 7)],
    *[({"prompt": None, "problem": "a", "harmful": None, "answer": value}, "field answer") for value in (True, ["7"], {"a": 7}, float("nan"), "####")],
    ({"gold": "7"}, "field gold"),
    *[({"id": value}, "field id") for value in ("", 1.5, True, [], {}, ["a"], float("nan"))],
    *[({"verdict": value}, "field verdict") for value in ("maybe", "", "Safe", 1, ["safe"], True)],
    *[({name: "a\ud800b"}, f"field {name}") for name in ("prompt", "id", "category", "split", "source")],
    ({"prompt": None, "question": "\udfff"}, "field question"),
    ({"prompt": [{"role": "user", "content": "\ud83d"}]}, "field prompt"),
    ({"harmful": None, "answer": "\ud800"}, "field answer"),
    ({"prompt": None, "question": "a", "harmful": None, "answer": "\ud800"}, "field answer"),
    ({"prompt": json.dumps([USER, {"role": "tool", "content": "b"}])}, "field prompt"),
    ({"prompt": str([{"role": "assistant", "content": "b"}])}, "field prompt"),
    ({"prompt": json.dumps([{"role": "user", "content": "\ud83d"}])}, "field prompt"),
]  # fmt: skip
BAD_LINES = ['{"prompt": "a", "harm', '{"prompt": "a"}{"prompt": "b"}', "NaN", "[1]", '"a"', "{prompt: a}", "[" * 100_000,
             '{"prompt": ' + "[" * 100_000, '{"id": ' + "9" * 5000 + "}", "\x00", '{"prompt": "a\nb"}', "\ufeff{}"]  # fmt: skip


def write(path, rng: random.Random, lines: list[str]):
    """With or without byte-order mark, Windows line ends, a last line end."""
    text = rng.choice(["", "\ufeff"]) + rng.choice(["\n", "\r\n"]).join(lines) + rng.choice(["", "\n"])
    path.write_bytes(text.encode())


def refused(file) -> str:
    with pytest.raises(SystemExit) as stop:
        load_prompts([str(file)])
    line = str(stop.value)
    assert line.startswith("error: ") and str(file) in line and "\n" not in line and len(line) < 500
    line.encode()  # it can be printed
    return line


def test_rows_in_every_spelling_are_read_right(tmp_path):
    """1,500 files of up to eight rows, with fields of any type that nobody reads."""
    rng, file, read = random.Random(4), tmp_path / "prompts.jsonl", 0
    for _ in range(1_500):
        verdicts = rng.random() < 0.2
        pairs = [good_row(rng, verdicts) for _ in range(rng.randint(1, 8))]
        for number, (row, expected) in enumerate(pairs):
            row["note"] = rng.choice([None, [], {"a": [float("nan")]}, "\ud800", 10**30])
            expected["id"] = f"prompts-{number + 1}"
            if rng.random() < 0.5:
                row["id"] = rng.choice([number + 100, f"../../{number}|x\n"])
                expected["id"] = str(row["id"])
        write(file, rng, [json.dumps(row, ensure_ascii="\ud800" in row.values()) for row, _ in pairs])
        found = load_prompts([str(file)])
        assert [{k: v for k, v in row.items() if k != "source"} for row in found] == [expected for _, expected in pairs]
        read += len(found)
    assert read > 6_000


def test_a_bad_row_is_named_by_file_row_and_field(tmp_path):
    """Every spoilt row and line at ten places among good ones; the file's encoding; nothing is ever written."""
    rng, file, tried = random.Random(5), tmp_path / "prompts.jsonl", 0
    for change, words in SPOILT * 10:
        lines = [json.dumps(good_row(rng, False)[0]) for _ in range(rng.randint(0, 5))]
        at = rng.randint(0, len(lines))
        lines.insert(at, json.dumps({"prompt": "a", "harmful": True} | change))
        write(file, rng, lines)
        line = refused(file)
        assert f"row {at + 1}" in line and words in line, (change, line)
        tried += 1
    for bad in BAD_LINES * 10:
        lines = [json.dumps(good_row(rng, False)[0]) for _ in range(rng.randint(1, 5))]
        at = rng.randint(1, len(lines))
        lines.insert(at, bad)
        write(file, rng, lines)
        assert f"line {at + 1}: not " in refused(file), bad[:40]
        tried += 1
    row = json.dumps({"prompt": "naïve", "harmful": True}, ensure_ascii=False)
    for data in (row.encode("utf-16"), row.encode("latin-1"), row.encode() + b"\n\xff", b"\x80"):
        file.write_bytes(data)
        assert "is not UTF-8 (byte " in refused(file)
    for data in (b"", b"\n \n", b"\xef\xbb\xbf"):
        file.write_bytes(data)
        assert "holds no rows" in refused(file)
    file.write_text('{"id": 7, "prompt": "a", "harmful": true}\n{"id": "7", "prompt": "a", "harmful": true}\n')
    assert "id '7' occurs twice" in refused(file)
    assert tried > 800 and [p.name for p in tmp_path.iterdir()] == ["prompts.jsonl"]


@pytest.mark.parametrize("name, data", [
    ("p.csv", b""), ("p.csv", "prompt,harmful\nna\xefve,True\n".encode("latin-1")), ("p.csv", b"prompt,harmful\n"),
    ("p.csv", b'prompt,harmful\n"a,True\nb,False\n'), ("p.csv", b"prompt,harmful\na,maybe\n"), ("p.parquet", b"PAR1nonsense"),
    ("p.csv", b"prompt,harmful\na,1\nb,2\n"), ("p.csv", b"prompt,label\na,1\n"), ("p.jsonl", b"{}"), ("p.txt", b"a\n"),
    ("p.json", b'[{"prompt": "a"}'), ("p.tsv.gz", b"prompt\tharmful\na\ttrue\n"), ("p.xlsx", b"prompt,harmful\na,true\n"),
])  # fmt: skip
def test_no_stage_makes_a_run_folder_for_a_bad_file(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    for stage, option in (
        ("01_generate", "--prompts"),
        ("03_steer_selfgen", "--prompts"),
        ("04_grpo", "--prompts"),
        ("05_eval", "--bench"),
    ):
        with pytest.raises(SystemExit) as stop:
            value = f"plain={tmp_path / name}" if option == "--bench" else tmp_path / name
            run_here(load(stage), "--run", tmp_path / "run", option, value)
        assert str(stop.value).startswith("error: ") and name in str(stop.value) and not (tmp_path / "run").exists()


FORMATS = [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"]


def store(folder, rng: random.Random, ending: str, rows: list[dict]):
    """A file of rows in one format, under a name in either case, packed or not, with either line end."""
    name = f"prompts{rng.choice([ending, ending.upper()])}"
    if ending == ".parquet":
        import pandas

        pandas.DataFrame(rows).to_parquet(folder / name)
        return folder / name
    line_end = rng.choice(["\n", "\r\n"])
    if ending == ".json":
        text = json.dumps(
            rng.choice([rows, {"version": 1, "names": ["a"], "data": rows}]), indent=rng.choice([None, 1])
        )
    elif ending in (".csv", ".tsv"):
        table, names = io.StringIO(newline=""), list(dict.fromkeys(name for row in rows for name in row))
        delimiter = "," if ending == ".csv" else "\t"
        writer = csv.DictWriter(table, names, delimiter=delimiter, lineterminator=line_end)
        writer.writeheader()
        writer.writerows(rows)
        text = table.getvalue()
    else:
        text = line_end.join(json.dumps(row) for row in rows)
    data = (rng.choice(["", "\ufeff"]) + text).encode()
    if rng.random() < 0.3:
        name += rng.choice([".gz", ".GZ"])
        data = gzip.compress(data)
    (folder / name).write_bytes(data)
    return folder / name


def flat_row(rng: random.Random) -> tuple[dict, dict]:
    """(row of texts alone, what must be read): what every format can hold."""
    text = hostile(rng, 3).strip() or "x"
    chat = [{"role": "system", "content": hostile(rng, 2)}, {"role": "user", "content": text}]
    harmful = rng.random() < 0.5
    yes_or_no = rng.choice(["true", "True", "YES", "1"] if harmful else ["false", "FALSE", "no", "0"])
    kind = "harmful" if harmful else "benign"
    return rng.choice([
        ({"prompt": text, "harmful": yes_or_no}, {"prompt": text, "harmful": harmful}),
        ({"instruction": text, "label": f"vanilla_{kind}", "response": "7"}, {"prompt": text, "harmful": harmful}),
        ({"adversarial": text, "vanilla": "b", "data_type": f"adversarial_{kind}"}, {"prompt": text, "harmful": harmful}),
        ({"Behavior": text, "ContextString": "c", "harmful": yes_or_no}, {"prompt": f"c\n\n---\n\n{text}", "harmful": harmful}),
        ({"prompt": rng.choice([json.dumps, str])(chat), "harmful": yes_or_no}, {"prompt": chat, "harmful": harmful}),
        ({"Problem": text, "Answer": "025"}, {"prompt": text, "harmful": False, "gold": "025"}),
        ({"question": text, "answer": "so\n#### NA"}, {"prompt": text, "harmful": False, "gold": "NA"}),
    ])  # fmt: skip


def test_every_format_gives_the_same_rows(tmp_path):
    """300 files of texts that mean harm, in every format; a column that others have is empty here."""
    rng = random.Random(6)
    for number in range(300):
        pairs = [flat_row(rng) for _ in range(rng.randint(1, 6))]
        if any("label" in row for row, _ in pairs):  # in such a file, a row without any word is no maths
            pairs = [(row, expected) for row, expected in pairs if "gold" not in expected]
        for row, expected in pairs:
            if rng.random() < 0.3:
                row["id"] = expected["id"] = f"0{rng.randrange(10**9)}"
        file = store(tmp_path, rng, FORMATS[number % len(FORMATS)], [row for row, _ in pairs])
        for place, (_, expected) in enumerate(pairs, 1):
            expected.setdefault("id", f"prompts-{place}")
        found = load_prompts([str(file)])
        assert [{k: v for k, v in row.items() if k != "source"} for row in found] == [row for _, row in pairs], file
        file.unlink()


FLAT_SPOILT = [
    ({"prompt": ""}, "no prompt"),
    ({"prompt": "[{'role': 'tool', 'content': 'a'}]"}, "field prompt"),
    ({"harmful": "maybe"}, "field harmful"),
    ({"harmful": None}, '"harmful": true or false'),
    ({"harmful": None, "label": "toxic"}, "field label"),
    ({"harmful": None, "label": "unsafe", "data_type": "vanilla_benign"}, "field label"),
    ({"harmful": None, "answer": "7"}, "field answer"),
    ({"harmful": None, "data_type": "vanilla_unharmful"}, '"harmful": true or false'),
    ({"harmful": "true", "gold": "7"}, "field gold"),
    ({"harmful": "false", "gold": "nan"}, "field gold"),
    ({"verdict": "maybe"}, "field verdict"),
]


@pytest.mark.parametrize("ending", FORMATS)
def test_a_bad_row_is_named_in_every_format(ending, tmp_path):
    rng = random.Random(ending)
    times = 1 if ending == ".parquet" else 6  # that one is slow to open
    for change, words in FLAT_SPOILT * times:
        rows = [{"prompt": "a", "harmful": rng.choice(["true", "no"])} for _ in range(rng.randint(0, 5))]
        at = rng.randint(0, len(rows))
        rows.insert(at, {"prompt": "a", "harmful": "true"} | change)
        file = store(tmp_path, rng, ending, rows)
        line = refused(file)
        assert f"row {at + 1}" in line and words in line, (change, line)
        file.unlink()


DAMAGED = [
    ("p.csv", "prompt,harmful\na,true\nb, c,true\n", "row 2: more cells"),
    ("p.csv", 'prompt,harmful\na,true\n"b,true\n', "row 2: no row of a table"),
    ("p.csv", "prompt,harmful\na,true\nb\n", "row 2: nothing says"),
    ("p.TSV", "prompt\tharmful\na\ttrue\n\ttrue\n", "row 2: no prompt"),
    ("p.json", '[{"prompt": "a",\n"harmful": true},\n{"prompt"]', "line 3: not JSON"),
    ("p.json", '{"prompt": "a", "harmful": true}\n{"prompt": \n', "line 2: not JSON"),
    ("p.json", '[{"prompt": "a", "harmful": true}, 7]', "row 2: not a JSON object"),
    ("p.json", '{"a": [{"prompt": "a"}], "b": [{"prompt": "b"}]}', "several lists of rows (a, b)"),
    ("p.json", '"a"', "str where a list of rows belongs"),
    ("p.json", "[" * 100_000, "line 1: not JSON"),
    ("p.json", " \n", "holds no rows"),
    ("p.json", "[]", "holds no rows"),
    ("p.ndjson", '{"prompt": "a"', "line 1: not JSON"),
    ("p.txt", " \n", "holds no rows"),
    ("p.txt", "a\n", "row 1: nothing says"),
    ("p.jsonl.gz", '{"prompt": "a", "harmful": true}', "cannot unpack"),
]


@pytest.mark.parametrize("name, text, words", DAMAGED)
def test_a_damaged_file_is_named_by_its_line(name, text, words, tmp_path):
    file = tmp_path / name
    file.write_text(text)
    assert words in refused(file)
    if not name.endswith(".gz"):
        packed = tmp_path / f"{name}.gz"
        packed.write_bytes(gzip.compress(text.encode()))
        assert words in refused(packed)
        packed.write_bytes(gzip.compress(text.encode())[:-9])
        assert "cannot unpack" in refused(packed)
        packed.write_bytes(gzip.compress("naïve".encode("latin-1")))
        assert "is not UTF-8 (byte 2)" in refused(packed)
