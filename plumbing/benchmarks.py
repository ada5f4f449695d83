"""The public benchmarks: where they are, how they are spelled, and a row of each in our
spelling."""

import hashlib
import json
import random
from dataclasses import dataclass, field

from plumbing.process import fail
from plumbing.prompts import SAFE_WORDS, prompt_rows, read_source


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    source: str  # on the hub, owner/name[:config[:split]]
    count: int  # rows there, after `where`
    harmful: bool  # all rows are, or none is
    licence: str
    prompt: str = "prompt"  # field of the prompt
    gold: str = ""  # field of the answer to maths prompts
    category: str = "category"  # field of the category, if there is one
    where: str = ""  # rows wanted, field=value
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

# As dataset cards and public code that loads them say it; another count of rows is said at run time
BENCHMARKS = {
    "strongreject": Benchmark(
        source="walledai/StrongREJECT", count=313, harmful=True, licence="MIT", gated=True
    ),
    "harmbench": Benchmark(
        source="walledai/HarmBench:standard", count=200, harmful=True, licence="MIT", gated=True
    ),
    "wildjailbreak": Benchmark(
        **WILD, count=2000, harmful=True, where="data_type=adversarial_harmful"
    ),
    "wildjailbreak-benign": Benchmark(
        **WILD, count=210, harmful=False, where="data_type=adversarial_benign"
    ),
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
        source="HuggingFaceH4/MATH-500::test",
        count=500,
        harmful=False,
        licence="MIT",
        prompt="problem",
        gold="answer",
        category="subject",
    ),
    "aime2024": Benchmark(
        source="HuggingFaceH4/aime_2024",
        count=30,
        harmful=False,
        licence="not stated",
        prompt="problem",
        gold="answer",
    ),
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


def load_benchmark(name: str, path: str, limit: int) -> tuple[list[dict], dict]:
    """(prompt rows, what the recipe says of them) of a benchmark in the table, from the hub or a
    local copy in its public spelling, or of any other prompt file."""
    public = BENCHMARKS.get(name)
    if path:
        source, raw_rows = path, read_source(path)
    else:
        source, raw_rows = public.source, read_source(public.source, **public.load)
    if public:
        field_name, _, value = public.where.partition("=")
        raw_rows = [row for row in raw_rows if row.get(field_name, value) == value]
        raw_rows = [public_row(row, public, source) for row in raw_rows]
    rows = prompt_rows(raw_rows, source, limit)
    text = json.dumps([[row["prompt"], row.get("gold")] for row in rows])
    recipe = {
        "source": source,
        "rows": len(raw_rows),
        "used": len(rows),
        "prompts": hashlib.sha256(text.encode()).hexdigest()[:16],
    }
    if public:
        recipe |= {"rows published": public.count, "licence": public.licence}
        if len(raw_rows) != public.count:
            print(f"{name}: {len(raw_rows)} rows in {source}, {public.count} are published")
    return rows, recipe


def load_benchmarks(benchmarks: dict[str, str], limit: int):
    """({name: rows}, {name: recipe}, {name: why it is left out}) of {name: path, or "" for the
    hub}. A benchmark on the hub that is out of reach is left out and said; the others go on."""
    rows, recipes, left_out = {}, {}, {}
    for name, path in benchmarks.items():
        try:
            rows[name], recipes[name] = load_benchmark(name, path, limit)
        except SystemExit as error:
            if path:
                raise
            left_out[name] = f"{name} is left out: {str(error).removeprefix('error: ')}"
            if BENCHMARKS[name].gated:
                page = BENCHMARKS[name].source.partition(":")[0]
                url = f"https://huggingface.co/datasets/{page}"
                left_out[name] += f"; it is gated: accept its terms at {url}"
            print(left_out[name])
    return rows, recipes, left_out


def public_row(row: dict, benchmark: Benchmark, source: str) -> dict:
    """A row of a public benchmark in our spelling; GPQA's become questions with four options, in an
    order drawn from the question, and the right letter as gold answer."""
    prompt = row.get(benchmark.prompt) or row.get("prompt")
    gold = row.get(benchmark.gold) or row.get("label")
    label_says = SAFE_WORDS.get(str(row.get("label")), benchmark.harmful)
    if label_says != benchmark.harmful or (benchmark.gold and gold is None):
        what = f"a row has the label {row.get('label')} and the answer {gold}"
        fail(f"{source} is no copy of that benchmark: {what}")
    if "Incorrect Answer 1" in row:
        prompt, gold = lettered_options(prompt, row)
    public = {"id": row.get("id"), "prompt": prompt, "harmful": benchmark.harmful}
    public["category"] = row.get(benchmark.category)
    if benchmark.gold:
        public["gold"] = str(gold).rpartition("####")[2].strip()  # GSM8K's comes after a solution
    return {key: value for key, value in public.items() if value is not None}


def lettered_options(question: str, row: dict) -> tuple[str, str]:
    """(question with its four options, letter of the right one)."""
    options = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    random.Random(question).shuffle(options)
    lines = [f"{letter}) {option.strip()}" for letter, option in zip("ABCD", options)]
    task = "Which option is right? Put its letter into \\boxed{}."
    letter = "ABCD"[options.index(row["Correct Answer"])]
    return "\n\n".join([question, "\n".join(lines), task]), letter
