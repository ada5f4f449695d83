"""Fills README.md and docs/*.md with what results/ holds: `python bench/readme.py`.

Between a mark and `<!-- end -->` stands what the script writes, and nobody else:

    <!-- results/forks.md -->                            the file
    <!-- results/forks.md, table -->                     its first table
    <!-- results/bench/speed.md, table of Goals -->      the first table under that heading
    <!-- results/demo/01_generate.txt, code -->          the file as a block of code
    <!-- results/demo/results.png, picture of … -->      the picture, with these words for it
    <!-- results/demo/results.json, headline -->         a row for each model, the leading judge's
    <!-- results/demo/results.json, judges -->           what each judge says of the first model

A file that is missing ends the script with its name; those of OPTIONAL leave an empty block.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from plumbing import fail, figures, write_atomic  # noqa: E402

OPTIONAL = ["results/attack/attack"]  # with any ending
END = "<!-- end -->"
BLOCK = re.compile(rf"(<!-- (results/[^\s,]+)(?:, (.+?))? -->\n)(.*?){END}", re.S)
HEADLINE = {  # heading -> (benchmark, metric)
    "ASR plain ↓": ("plain", "asr"),
    "ASR wrapped ↓": ("wrapped", "asr"),
    "worst of n ↓": ("wrapped", "asr_any"),
    "thinking begun ↓": ("wrapped.think-open", "asr"),
    "compliance plain ↑": ("plain", "compliance"),
    "compliance wrapped ↑": ("wrapped", "compliance"),
    "sums ↑": ("sums", "accuracy"),
    "verify F1 ↑": ("verify", "verify_f1"),
    "checks ↑": ("wrapped", "self_check"),
}


def first_table(text: str, heading: str = "") -> str:
    """The first table of a page of Markdown, or of the part under a heading; "" if it has none.

    >>> first_table("a\\n\\n| b |\\n|---|\\n\\n## More\\n\\n| c |\\n|---|\\n| d |\\n\\ne", "More")
    '| c |\\n|---|\\n| d |'
    """
    if heading:
        text = text.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    tables = re.findall(r"(?:^\|.*(?:\n|$))+", text, re.M)
    return tables[0].strip() if tables else ""


def leading(result: dict) -> dict[tuple[str, str, str], dict]:
    """{(model, benchmark, metric): row} by the first judge, or by none where none is needed."""
    rows = figures.leading(result["rows"], list(result["recipe"]["judges"]))
    return {(row["model"], row["benchmark"], row["metric"]): row for row in rows}


def headline(result: dict) -> str:
    """Models by the figures of HEADLINE that the run has."""
    rows, models = leading(result), list(result["recipe"]["models"])
    shown = {h: key for h, key in HEADLINE.items() if (models[0], *key) in rows}
    body = []
    for model in models:
        cells = []
        for key in shown.values():
            cells.append(figures.interval_of([rows[(model, *key)]]))
        body.append([model, *cells])
    tries = result["recipe"]["responses per prompt"]
    notes = {
        "worst of n ↓": f"**Worst of n**: wrapped prompts with an unsafe answer in any of {tries} tries.",
        "thinking begun ↓": "**Thinking begun**: wrapped prompts answered after an attacker wrote the "
        "first sentences of the thinking.",
    }
    note = " ".join(text for heading, text in notes.items() if heading in shown)
    lines = figures.table(["model", *shown], body)
    return "\n".join([*lines, "", note]).strip()


def judges_differ(result: dict) -> str:
    """ASR and compliance of the first model on wrapped prompts, by every judge."""
    models, judges = list(result["recipe"]["models"]), list(result["recipe"]["judges"])
    body = []
    for metric in ("asr", "compliance"):
        rows = figures.find(result["rows"], model=models[0], benchmark="wrapped", metric=metric)
        cells = [figures.value_of(figures.find(rows, judge=judge)) for judge in judges]
        body.append([metric, *cells])
    return "\n".join(figures.table([f"{models[0]}, wrapped prompts", *judges], body))


def block(name: str, part: str, page: Path) -> str:
    """What stands in a block of a page; `part` is what follows the file's name in the mark."""
    file = ROOT / name
    if not file.exists():
        if name.rpartition(".")[0] in OPTIONAL:
            return ""
        fail(f"{page.name}: there is no {name}; run what makes it, or mend the mark")
    kind, _, words = part.partition(" of ")
    if kind == "picture":
        place = "../" * len(page.relative_to(ROOT).parent.parts)
        return f"![{words}]({place}{name})"
    text = file.read_text(encoding="utf-8")
    if kind == "headline":
        return headline(json.loads(text))
    if kind == "judges":
        return judges_differ(json.loads(text))
    if kind == "code":
        return f"```\n{text.strip()}\n```"
    if kind == "table":
        filled = first_table(text, words)
    elif kind == "":
        filled = text.strip()
    else:
        fail(f"{page.name}: the mark of {name} wants “{part}”; the head of bench/readme.py has all")
    if not filled:
        fail(f"{page.name}: nothing in {name} is “{part or 'a text'}”")
    return filled


def filled_page(page: Path) -> str:
    """The page as it should be."""
    text = page.read_text(encoding="utf-8")
    blocks = BLOCK.findall(text)
    if not len(blocks) == text.count(END) == text.count("<!-- results/"):
        fail(f"{page.name}: a mark without its {END}, or the other way round")

    def fill(match: re.Match) -> str:
        body = block(match[2], match[3] or "", page)
        if not body:
            return f"{match[1]}{END}"
        line = "\n" if body.splitlines()[-1].startswith("|") else ""  # it ends a table
        return f"{match[1]}{body}\n{line}{END}"

    return BLOCK.sub(fill, text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main():
    for page in pages():
        text = filled_page(page)
        if text != page.read_text(encoding="utf-8"):
            write_atomic(page, text)
            print(f"filled {page.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
