"""The public benchmarks: where they are, how they are spelled, and a row of each in our
spelling."""

import hashlib
import json
import random
from dataclasses import dataclass, field

from plumbing.files import read_source, split_source
from plumbing.process import fail
from plumbing.prompts import is_blank, looks_like_answer, own_word, prompt_field, prompt_rows
from plumbing.prompts import read_prompt, shown, verdict_of, word_of


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    source: str  # on the hub, owner/name[:config[:split]]; "" if only a file can be given
    count: int  # rows there, after `where`; 0 if no card says it
    harmful: bool  # all rows are, or none is
    licence: str
    prompt: str = "prompt"  # field of the prompt
    gold: str = ""  # field of the answer to maths prompts
    category: str = "category"  # field of the category, if there is one
    where: str = ""  # rows wanted, field=value
    some_unlabelled: bool = False  # rows whose `where` field is empty are left out, no error
    instruction: str = ""  # what follows each prompt
    gated: bool = False  # its page must be accepted first
    load: dict = field(default_factory=dict)  # further arguments of load_dataset


WILD = {
    "source": "allenai/wildjailbreak:eval",
    "licence": "ODC-BY",
    "prompt": "adversarial",
    "gated": True,
    "load": {"delimiter": "\t", "keep_default_na": False},
}
FORTRESS = {
    "source": "ScaleAI/fortress_public",
    "count": 500,
    "licence": "CC-BY-4.0, no training",
    "category": "risk_domain",
}
JBB = {"count": 100, "licence": "MIT", "prompt": "Goal", "category": "Category"}
XSTEST = {"source": "Paul/XSTest", "licence": "CC-BY-4.0", "category": "type"}
WILDGUARD = {
    "source": "allenai/wildguardmix:wildguardtest:test",
    "count": 0,  # 1,725 with those whose prompt nobody labelled
    "licence": "ODC-BY",
    "category": "subcategory",
    "gated": True,
    "some_unlabelled": True,
}
# What the official evaluations ask on competition maths, to the letter
BOXED = "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
MATHS = {"harmful": False, "prompt": "problem", "gold": "answer", "instruction": BOXED}

# As dataset cards and public code that loads them say it; another count of rows is said at run time
BENCHMARKS = {
    "strongreject": Benchmark(
        source="walledai/StrongREJECT", count=313, harmful=True, licence="MIT", gated=True
    ),
    "harmbench": Benchmark(
        source="walledai/HarmBench:standard", count=200, harmful=True, licence="MIT", gated=True
    ),
    "harmbench-602": Benchmark(source="", count=602, harmful=True, licence="not stated"),
    "wildjailbreak": Benchmark(
        **WILD, count=2000, harmful=True, where="data_type=adversarial_harmful"
    ),
    "wildjailbreak-benign": Benchmark(
        **WILD, count=210, harmful=False, where="data_type=adversarial_benign"
    ),
    "wildjailbreak-250": Benchmark(source="", count=250, harmful=True, licence="ODC-BY"),
    "wildguardtest": Benchmark(**WILDGUARD, harmful=True, where="prompt_harm_label=harmful"),
    "wildguardtest-benign": Benchmark(
        **WILDGUARD, harmful=False, where="prompt_harm_label=unharmful"
    ),
    "jailbreak-r1": Benchmark(source="", count=313, harmful=True, licence="not stated"),
    "fortress": Benchmark(**FORTRESS, harmful=True, prompt="adversarial_prompt"),
    "fortress-benign": Benchmark(**FORTRESS, harmful=False, prompt="benign_prompt"),
    "jailbreakbench": Benchmark(
        source="JailbreakBench/JBB-Behaviors:behaviors:harmful", harmful=True, **JBB
    ),
    "jailbreakbench-benign": Benchmark(
        source="JailbreakBench/JBB-Behaviors:behaviors:benign", harmful=False, **JBB
    ),
    "h-cot": Benchmark(
        source="DukeCEICenter/Malicious_Educator_hcot_DeepSeek-R1",
        count=50,
        harmful=True,
        licence="CC-BY-NC-SA-4.0",
        prompt="Full_Input (H-CoT + Request)",
        category="Category",
    ),
    "xstest": Benchmark(**XSTEST, count=250, harmful=False, where="label=safe"),
    "xstest-unsafe": Benchmark(**XSTEST, count=200, harmful=True, where="label=unsafe"),
    "or-bench-hard": Benchmark(
        source="bench-llm/or-bench:or-bench-hard-1k", count=1319, harmful=False, licence="CC-BY-4.0"
    ),
    "falsereject": Benchmark(
        source="AmazonScience/FalseReject::test",
        count=1187,
        harmful=False,
        licence="CC-BY-NC-4.0",
    ),
    "gsm8k": Benchmark(
        source="openai/gsm8k:main:test",
        count=1319,
        harmful=False,
        licence="MIT",
        prompt="question",
        gold="answer",
    ),
    "math500": Benchmark(
        **MATHS,
        source="HuggingFaceH4/MATH-500::test",
        count=500,
        licence="MIT",
        category="subject",
    ),
    "aime2024": Benchmark(
        **MATHS, source="HuggingFaceH4/aime_2024", count=30, licence="not stated"
    ),
    "aime2025": Benchmark(**MATHS, source="math-ai/aime25::test", count=30, licence="Apache-2.0"),
    "gpqa-diamond": Benchmark(
        source="Idavidrein/gpqa:gpqa_diamond",
        count=198,
        harmful=False,
        licence="CC-BY-4.0",
        prompt="Question",
        gold="Correct Answer",
        gated=True,
    ),
}


def load_benchmark(
    name: str, path: str, limit: int, keep: tuple[str, ...] = ()
) -> tuple[list[dict], dict]:
    """(prompt rows, what the recipe says of them) of a benchmark in the table, from the hub or a
    local copy in its public spelling, or of any other prompt file. `keep`: as prompt_rows."""
    benchmark = BENCHMARKS.get(name)
    if not path and not benchmark.source:
        fail(f"{name} is not on the hub; give its file: --bench {name}=path")
    source, told = split_source(path or benchmark.source)
    load = {} if path else benchmark.load
    raw_rows = read_source(source, **load)
    numbers = list(range(1, len(raw_rows) + 1))
    if benchmark:
        if told not in (None, benchmark.harmful):
            fail(
                f"{path}: the prompts of {name} are {'harmful' if benchmark.harmful else 'benign'}"
            )
        published = raw_rows
        raw_rows, numbers = public_rows(published, benchmark, source)
        for row, number in zip(raw_rows, numbers):
            for field_name in keep:
                row.setdefault(field_name, published[number - 1].get(field_name))
    rows = prompt_rows(raw_rows, source, limit, told, numbers, keep)
    if benchmark and benchmark.instruction:
        for row in rows:
            row["prompt"] = with_instruction(row["prompt"], benchmark.instruction)
    fields = ["prompt", "gold", "harmful"]
    fields += ["verdict"] if any("verdict" in row for row in rows) else []
    begun = ("start", "fields") if any("start" in row or "fields" in row for row in rows) else ()
    text = json.dumps([[row.get(name) for name in (*fields, *begun)] for row in rows])
    recipe = {
        "source": path or benchmark.source,
        "rows": len(raw_rows),
        "used": len(rows),
        "prompts": hashlib.sha256(text.encode()).hexdigest()[:16],
    }
    if benchmark:
        recipe |= {"rows published": benchmark.count or "unknown", "licence": benchmark.licence}
        if benchmark.count and len(raw_rows) != benchmark.count:
            print(f"{name}: {len(raw_rows)} rows in {source}, {benchmark.count} are published")
    return rows, recipe


def load_benchmarks(benchmarks: dict[str, str], limit: int, keep: tuple[str, ...] = ()):
    """({name: rows}, {name: recipe}, {name: why it is left out}) of {name: path, or "" for the
    hub}. A benchmark on the hub that is out of reach is left out and said; the others go on."""
    rows, recipes, left_out = {}, {}, {}
    for name, path in benchmarks.items():
        try:
            rows[name], recipes[name] = load_benchmark(name, path, limit, keep)
        except SystemExit as error:
            if path or not BENCHMARKS[name].source:
                raise
            left_out[name] = f"{name} is left out: {str(error).removeprefix('error: ')}"
            if BENCHMARKS[name].gated:
                page = BENCHMARKS[name].source.partition(":")[0]
                url = f"https://huggingface.co/datasets/{page}"
                left_out[name] += f"; it is gated: accept its terms at {url}"
            print(left_out[name])
    return rows, recipes, left_out


def public_rows(
    raw_rows: list[dict], benchmark: Benchmark, source: str
) -> tuple[list[dict], list[int]]:
    """(the rows of a benchmark in our spelling, their numbers in the file)."""
    rows, numbers = [], []
    for number, raw in enumerate(raw_rows, 1):
        if is_wanted(raw, benchmark, f"{source}, row {number}"):
            rows.append(public_row(raw, benchmark, source, number))
            numbers.append(number)
    if not rows:
        fail(f"{source} holds no rows with {benchmark.where}")
    return rows, numbers


def is_wanted(raw: dict, benchmark: Benchmark, where: str) -> bool:
    """Whether a row is of the part of its file that the benchmark is. A row that does not say it is
    an error: kept, it would count on the wrong side."""
    if not benchmark.where:
        return True
    field_name, _, value = benchmark.where.partition("=")
    said = raw.get(field_name)
    if is_blank(said) and field_name == "label" and not is_blank(raw.get("type")):
        said = "safe"  # XSTest's own csv says it by the type
        if word_of(raw["type"]).startswith("contrast_"):
            said = "unsafe"
    if is_blank(said) and not (benchmark.some_unlabelled and field_name in raw):
        what = "empty or missing, and it says whether the row belongs here"
        fail(f"{where}, field {field_name}: {what}")
    if field_name == "label":
        if verdict_of(said) is None:
            fail(f"{where}, field label: {shown(said)} is neither safe nor unsafe")
        return verdict_of(said) == verdict_of(value)
    return word_of(said) == value


def public_row(raw: dict, benchmark: Benchmark, source: str, number: int = 1) -> dict:
    """A row of a public benchmark in our spelling; GPQA's become questions with four options, in an
    order drawn from the question, and the right letter as gold answer."""
    where = f"{source}, row {number}"
    name = benchmark.prompt if benchmark.prompt in raw else prompt_field(raw)
    if name is None or not str(raw[name] or "").strip():
        fail(f"{source} is no copy of that benchmark: row {number} has no field {benchmark.prompt}")
    prompt, start = read_prompt(raw, name, where)
    word_field, word = own_word(raw, where)
    if word not in (None, benchmark.harmful):
        what = f"row {number} has the {word_field} {shown(raw[word_field])}"
        fail(f"{source} is no copy of that benchmark: {what}")
    public = {
        "id": raw.get("id"),
        "harmful": benchmark.harmful,
        "category": raw.get(benchmark.category),
        "start": start,
    }
    if benchmark.gold:
        gold_field = public_gold_field(raw, benchmark)
        if not gold_field:
            what = f"row {number} has no answer (field {benchmark.gold})"
            fail(f"{source} is no copy of that benchmark: {what}")
        public["gold"] = raw[gold_field]
    if "Incorrect Answer 1" in raw:
        prompt, public["gold"] = lettered_options(prompt, raw, where)
    public["prompt"] = prompt
    return {key: value for key, value in public.items() if not is_blank(value)}


def public_gold_field(raw: dict, benchmark: Benchmark) -> str:
    """The field of the right answer, "" if there is none: the table's, or one of any maths file."""
    for name in (benchmark.gold, "gold", "answer", "Answer"):
        if not is_blank(raw.get(name)):
            return name
    if looks_like_answer(raw.get("label")):
        return "label"
    return ""


def lettered_options(question: str, raw: dict, where: str) -> tuple[str, str]:
    """(question with its four options, letter of the right one)."""
    if not isinstance(question, str):
        fail(f"{where}: a question with options is a text, no chat")
    names = ["Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3))]
    for name in names:
        if is_blank(raw.get(name)):
            fail(f"{where}: no field {name}")
    options = [str(raw[name]) for name in names]
    right = options[0]
    random.Random(question).shuffle(options)
    lines = [f"{letter}) {option.strip()}" for letter, option in zip("ABCD", options)]
    task = "Which option is right? Put its letter into \\boxed{}."
    letter = "ABCD"[options.index(right)]
    return "\n\n".join([question, "\n".join(lines), task]), letter


def with_instruction(prompt, instruction: str):
    """A prompt, text or chat messages, whose last turn ends in an instruction."""
    if isinstance(prompt, str):
        return prompt + instruction
    last = {"role": "user", "content": prompt[-1]["content"] + instruction}
    return [*prompt[:-1], last]
