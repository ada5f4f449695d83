"""Rows on disk: JSONL files that are appended as rows are made, so that a killed run loses none."""

import glob
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from plumbing import process
from plumbing.process import fail


def write_atomic(path: Path, text: str):
    """The whole file or none of it; of several processes, the first one writes."""
    if process.processes().process_index > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_jsonl(path) -> list[dict]:
    """The rows of a file; anything in it that is no JSON object is an error with its line."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start})")
    return json_lines(text, path)


def json_lines(text: str, path: str) -> list[dict]:
    """A row a line; anything that is no JSON object is an error with its line."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            fail(f"{path}, line {number}: not JSON ({getattr(error, 'msg', error)})")
        if not isinstance(row, dict):
            fail(f"{path}, line {number}: not a JSON object")
        rows.append(row)
    return rows


def reopen_jsonl(path: Path) -> list[dict]:
    """Rows of an output file that may not exist yet; a last line cut short by a kill is removed and
    reported."""
    if not path.exists():
        return []
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        whole = data.rfind(b"\n") + 1
        print(f"{path}: removed a half-written last line ({len(data) - whole} bytes)")
        os.truncate(path, whole)
    return read_jsonl(path)


def lines_of(rows: list[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def append_jsonl(path: Path, rows: list[dict]):
    with path.open("a", encoding="utf-8") as file:
        file.write(lines_of(rows))


def write_jsonl(path: Path, rows: list[dict]):
    write_atomic(path, lines_of(rows))


def drop_steps(run: Path, start: int):
    """Takes step `start` and those after it out of the logs of a training run."""
    process.processes().wait_for_everyone()
    for path in (run / "metrics.jsonl", run / "samples.jsonl"):
        if path.exists():
            write_jsonl(path, [row for row in reopen_jsonl(path) if row["step"] < start])


def is_cut(sample: dict) -> bool:
    """Whether a response has no end of its own: the engine stopped it at the limit, with or without
    a closed thinking, or it ended inside its thinking (trap 18).

    >>> is_cut({"finish": "length", "state": "no_thinking"}), is_cut({"state": "truncated"})
    (True, True)
    """
    return sample.get("finish") == "length" or sample["state"] == "truncated"


def cut_line(samples: list[dict], limit: int, option: str = "--max_new_tokens") -> str:
    """A summary's line on cut responses, with a warning where they are more than a tenth."""
    share = sum(is_cut(sample) for sample in samples) / max(1, len(samples))
    if share <= 0.1:
        return f"{share:.1%} of the responses"
    return f"WARNING: {share:.1%} of the responses; raise {option} (now {limit})"


def once_per_row(
    path: Path, rows: list[dict], work: Callable[[list[dict]], Iterator[list[dict]]]
) -> dict[str, dict]:
    """{id: finished row} of all `rows`: those in `path` already, and those that `work(rows)` makes
    of the others and yields in lists, appended as they come.

    Every process works on its share, in a file of its own beside `path`, and one that died loses
    nothing: the files are read together, and joined at the end."""
    here = process.processes()
    own_file, shares = path, f"{glob.escape(path.stem)}.process*.jsonl"
    if here.process_index > 0:
        own_file = path.with_suffix(f".process{here.process_index}.jsonl")

    def read_all() -> dict[str, dict]:
        finished = {}
        for file in [path, *path.parent.glob(shares)]:
            finished |= {row["id"]: row for row in reopen_jsonl(file)}
        here.wait_for_everyone()  # nobody writes while another one reads
        return finished

    finished = read_all()
    todo = [row for row in rows if row["id"] not in finished]
    for new_rows in work(todo[here.process_index :: here.num_processes]):
        append_jsonl(own_file, new_rows)
        finished |= {row["id"]: row for row in new_rows}
    here.wait_for_everyone()
    if here.num_processes > 1:
        finished = read_all()
    files = list(path.parent.glob(shares))
    if files and here.process_index == 0:
        write_jsonl(path, list(finished.values()))
        for file in files:
            file.unlink()
    return finished
