"""How the figures of an evaluation came about, so that a result can be matched to what made it."""

import json
import platform
import time
from pathlib import Path

from plumbing.code import commit
from plumbing.names import base_of, content_of, local_name
from plumbing.process import fail
from plumbing.rows import write_atomic
from plumbing.runs import options_of


def require_same_inputs(folder: Path, inputs: dict[str, str]):
    """Refuses a model or benchmark that is not what it was when its responses in `folder` were
    made."""
    if folder.is_file():
        fail(f"{folder} is a file of the run: give the model another name")
    folder.mkdir(exist_ok=True)
    advice = "take another name, or another --run"
    require_same(folder / "inputs.json", inputs, f"{folder} holds responses of", advice)


def require_same(file: Path, values: dict, what: str, advice: str):
    """Records the values in a file, beside those that are there; ends the program where one is not
    what it was: `what`, its name, then and now, and `advice`."""
    before = json.loads(file.read_text()) if file.exists() else {}
    for name, value in values.items():
        if before.get(name, value) != value:
            fail(f"{what} {name} {before[name]}, now {value}: {advice}")
    write_atomic(file, json.dumps(before | values, indent=1))


def timed(run: Path, name: str, items):
    """Yields the items; the seconds that each of them takes are added up in <run>/seconds.json,
    over all calls of the same command."""
    for item in items:
        began = time.time()
        try:
            yield item
        finally:
            seconds = seconds_of(run)
            seconds[name] = round(seconds.get(name, 0) + time.time() - began, 1)
            write_atomic(run / "seconds.json", json.dumps(seconds))


def seconds_of(run: Path) -> dict[str, float]:
    file = run / "seconds.json"
    return json.loads(file.read_text()) if file.exists() else {}


def guards_of(made_by: dict | None) -> set[str]:
    """Guards of the run that trained a model, and of those that its data and its start are from."""
    if not made_by:
        return set()
    guards = {made_by["guard"]} if made_by.get("guard") else set()
    folders = [made_by.get("responses"), Path(base_of(made_by.get("model") or "")).parent]
    return guards.union(*(guards_of(options_of(folder)) for folder in folders if folder))


def evaluation_recipe(options, models: dict, benchmarks: dict, responses: dict, run: Path) -> dict:
    """What results.json says of models, benchmarks, decoding, code and machine."""
    import torch

    recipe = {"models": {}, "benchmarks": benchmarks, "judges": {}, "guards in training": set()}
    for name, path in models.items():
        folder = Path(base_of(local_name(path))).parent
        made_by = options_of(folder)  # of the stage that trained it, if it lies in a run folder
        content = content_of(local_name(path))
        recipe["models"][name] = {"path": path, "content": content, "made by": made_by}
        recipe["guards in training"] |= guards_of(made_by)
    recipe["guards in training"] = sorted(recipe["guards in training"])
    rows = [row for answered in responses.values() for row in answered]
    hardware = platform.machine()
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    decoding = ("max_new_tokens", "temperature", "top_p", "top_k", "seed")
    recipe |= {
        "self_checker": options.self_checker,
        "decoding": {name: getattr(options, name) for name in decoding},
        "responses per prompt": options.n,
        "enable_thinking": options.enable_thinking,
        "versions": json.loads((run / "options.json").read_text())["versions"],
        "code": commit(),
        "hardware": f"{hardware}, {torch.get_num_threads()} threads",
        "prompt tokens": sum(row["prompt_tokens"] for row in rows),
        "response tokens": sum(s["tokens"] for row in rows for s in row["samples"]),
        "seconds": seconds_of(run),
    }
    return recipe
