"""Prompt files as they lie on the disk, or datasets on the hub: their rows, not yet understood."""

import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

from plumbing.process import fail
from plumbing.rows import json_lines

WORDS = {"harmful": True, "benign": False}  # what may stand behind a local file


# Names of sources ---------------------------------------------------------------------------------
def ending_of(path: str) -> str:
    """The ending that says how a file is stored, "" if it is none of ENDINGS.

    >>> ending_of("data/A.CSV"), ending_of("a.jsonl.gz"), ending_of("owner/name-v1.5")
    ('.csv', '.jsonl', '')
    """
    suffix = Path(path.lower().removesuffix(".gz")).suffix
    if suffix in ENDINGS:
        return suffix
    return ""


def stem_of(source: str) -> str:
    """The name of a file without folder and ending, that of a dataset without its owner.

    >>> stem_of("data/a.jsonl.gz"), stem_of("a.csv:harmful"), stem_of("owner/name:config")
    ('a', 'a', 'name:config')
    """
    name, _ = split_source(source)
    if name.lower().endswith(".gz"):
        name = name[:-3]
    return Path(name).stem


def is_local(source: str) -> bool:
    """Whether a source is a file here, even one that is missing: a dataset on the hub has no
    ending of ours and one slash at most. A folder is left to `datasets`."""
    if ending_of(source) or os.path.isfile(source):
        return True
    folder = source.partition(":")[0]
    if os.path.isdir(folder):
        return False
    return folder.startswith(("/", ".", "~")) or folder.count("/") > 1


def split_source(source: str) -> tuple[str, bool | None]:
    """(file or dataset, whether all of its prompts are harmful; None where the rows say it).

    >>> split_source("a.csv:harmful"), split_source("owner/name:config:harmful")
    (('a.csv', True), ('owner/name:config:harmful', None))
    """
    name, _, word = source.rpartition(":")
    if os.path.isfile(source) or not is_local(name):
        return source, None
    if word not in WORDS:
        fail(f"{source}: behind a file stands {' or '.join(WORDS)}, not '{word}'")
    return name, WORDS[word]


# Rows ---------------------------------------------------------------------------------------------
def read_source(source: str, **load) -> list[dict]:
    """Rows as they stand in a local file or a hub dataset ("owner/name[:config[:split]]"), `load`
    being further arguments of load_dataset. Cells that are empty in a table are None."""
    if not is_local(source):
        name, config, split = [*source.split(":"), "", ""][:3]
        rows = load_rows(source, path=name, name=config or None, split=split or "train", **load)
    elif not os.path.isfile(source):
        fail(f"no prompt file at {source}")
    elif not ending_of(source):
        fail(f"cannot read {source}: its name ends in none of {', '.join(ENDINGS)}")
    elif ending_of(source) == ".parquet":
        rows = load_rows(source, path="parquet", data_files=source, split="train")
    else:
        rows = ENDINGS[ending_of(source)](read_text(source), source)
    if not rows:
        fail(f"{source} holds no rows")
    return rows


def load_rows(source: str, **load) -> list[dict]:
    from datasets import load_dataset

    try:
        return list(load_dataset(**load))
    except Exception as error:  # the hub, its network and the parsers raise many kinds
        cause = error.__cause__ or error
        what = f"{type(cause).__name__} {' '.join(str(cause).split())[:200]}"
        fail(f"cannot load prompts from {source}: {what}")


def read_text(path: str) -> str:
    """The text of a file, unpacked if it ends in .gz; one that is not UTF-8 is an error."""
    try:
        data = Path(path).read_bytes()
        if path.lower().endswith(".gz"):
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        fail(f"cannot unpack {path}: {error}")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start})")


def json_rows(text: str, path: str) -> list[dict]:
    """A list of rows, an object that holds one such list, or JSON lines under another name."""
    try:
        content = json.loads(text.strip() or "[]")
    except (ValueError, RecursionError) as error:
        if is_object(text.strip().partition("\n")[0]):
            return json_lines(text, path)
        place = f"{path}, line {getattr(error, 'lineno', 1)}"
        fail(f"{place}: not JSON ({getattr(error, 'msg', error)})")
    if isinstance(content, dict):
        names = [name for name, value in content.items() if is_list_of_rows(value)]
        if len(names) > 1:
            fail(f"{path} holds several lists of rows ({', '.join(names)[:200]}); keep one of them")
        content = content[names[0]] if names else [content]
    if not isinstance(content, list):
        fail(f"{path}: {type(content).__name__} where a list of rows belongs")
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            fail(f"{path}, row {number}: not a JSON object")
    return content


def is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def is_list_of_rows(value) -> bool:
    """Whether a value is rows; turns of a chat are none."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(row, dict) and "role" not in row for row in value)


def table_rows(text: str, path: str, delimiter: str = ",") -> list[dict]:
    """Rows of a table with a head, every cell as the text that is written there (a library that
    guesses types makes 25 of "025" and nothing of "NA"); an empty cell is None."""
    csv.field_size_limit(sys.maxsize)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = []
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        for number, cells in enumerate(reader, 1):
            if None in cells:
                fail(f"{path}, row {number}: more cells than the head has; quote texts with commas")
            rows.append({name: cell or None for name, cell in cells.items()})
    except csv.Error as error:
        fail(f"{path}, row {len(rows) + 1}: no row of a table ({error})")
    return rows


def tab_rows(text: str, path: str) -> list[dict]:
    return table_rows(text, path, delimiter="\t")


def text_rows(text: str, path: str) -> list[dict]:
    """A prompt a line."""
    return [{"prompt": line.strip()} for line in text.split("\n") if line.strip()]


# How each kind of file is read, packed by gzip or not; Parquet goes through `datasets`
ENDINGS: dict[str, Callable | None] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_rows,
    ".csv": table_rows,
    ".tsv": tab_rows,
    ".txt": text_rows,
    ".parquet": None,
}
