"""Where two runs of stage 05 differ: `python bench/compare.py a/results.json b/results.json`."""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from plumbing import fail  # noqa: E402


def compare(paths: list[str]):
    """Prints where two result files differ: first the recipes, then every figure, marked where the intervals part."""
    if len(paths) != 2 or not all(Path(path).is_file() for path in paths):
        fail(f"this takes two results.json files, not '{' '.join(paths)}'")
    try:
        files = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
        key = ("model", "benchmark", "metric", "judge")
        tables = [
            {" · ".join(filter(None, (r[k] for k in key))): r for r in file["rows"]}
            for file in files
        ]
        print("\n".join(differences(*(file["recipe"] for file in files))))
    except (ValueError, KeyError, TypeError, AttributeError):
        fail(f"{' '.join(paths)}: not both are results.json files of stage 05")
    for name in dict.fromkeys([*tables[0], *tables[1]]):
        a, b = (table.get(name) for table in tables)
        if not (a and b):
            print(f"{name}: only in the {'first' if a else 'second'}")
        elif a["value"] != b["value"]:
            apart = "  intervals apart" if a["high"] < b["low"] or b["high"] < a["low"] else ""
            print(f"{name}: {a['value']:.3f} -> {b['value']:.3f}{apart}")


def differences(a: dict, b: dict, prefix: str = ""):
    """A text for each place where two nested dictionaries differ."""
    for key in dict.fromkeys([*a, *b]):
        if not (key in a and key in b):
            yield f"{prefix}{key}: only in the {'first' if key in a else 'second'}"
        elif isinstance(a[key], dict) and isinstance(b[key], dict):
            yield from differences(a[key], b[key], f"{prefix}{key}.")
        elif a[key] != b[key]:
            yield f"{prefix}{key}\n    {a[key]}\n    {b[key]}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", nargs="*", help="two results.json files")
    compare(parser.parse_args().results)
