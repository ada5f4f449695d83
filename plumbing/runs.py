"""Run folders: one process at a time, the same options each time, states that a kill can't
halve."""

import dataclasses
import importlib
import json
import os
import re
import sys
from collections import Counter
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import torch

from plumbing import process
from plumbing.code import ROOMS, code_of, stage_number
from plumbing.models import require_reach, require_weights
from plumbing.names import base_and_adapter, base_of, fingerprint, is_endpoint, local_name
from plumbing.process import fail
from plumbing.rows import read_jsonl, write_atomic

KIND = {True: "harmful", False: "benign"}
BEGINNING = ("lock", "options.json.tmp")  # what a kill at the very beginning leaves in a run folder
NOT_RECORDED = ("run", "dry_run", "accept_changes")
# Options that may be larger than in the run so far, because no step depends on them, and one that
# many would like to
GROWS = ("steps",)
WHY_NOT = {
    "steps": "; it may only grow",
    "epochs": "; it can't grow, the learning rate of every step depends on it",
}


@cache
def lock(run: Path):
    """A file that this process holds until it ends; a second one is refused."""
    from filelock import FileLock, Timeout

    file = FileLock(run / "lock")
    try:
        file.acquire(timeout=0)
    except Timeout:
        fail(f"another process is at work in {run}; wait until it ends, or choose another --run")
    except NotImplementedError:  # a file system without locks
        pass
    return file


def place_of(item: str) -> str:
    """The file or folder in a value of an option: `name=folder`, `style:folder`, `file:harmful`,
    `folder@URL`."""
    name = local_name(item).rpartition("=")[2]
    for path in (name, name.rpartition(":")[0]):
        if os.path.exists(path):
            return path
    return name.rpartition(":")[2]


def values_of(options) -> list[str]:
    values = []
    for value in vars(options).values():
        values += value if isinstance(value, list) else [value]
    return [str(value) for value in values]


def record_of(options, free: tuple[str, ...]) -> dict:
    """What must not change in a run folder: the options, and the content of the files they name."""
    record = dataclasses.asdict(options)
    for name in (*NOT_RECORDED, *free):
        del record[name]
    for value in list(record.values()):
        for item in value if isinstance(value, list) else [value]:
            base, adapter = base_and_adapter(place_of(str(item)))
            for path in (base, adapter):
                if (adapter or re.search("[/.]", path)) and os.path.exists(path):
                    record[f"content of {path}"] = fingerprint(path)
    return record


def read_run(run) -> dict:
    """What options.json of a run folder holds."""
    file = Path(run) / "options.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content["options"], dict):
            return content
        what = "its options are no object"
    except KeyError:
        what = "it holds no options"
    except (ValueError, TypeError, RecursionError) as error:
        what = f"not JSON ({getattr(error, 'msg', error)})"
    fail(f"{file} is damaged: {what}; remove that run folder, or choose another --run")


def options_of(run) -> dict | None:
    """The options that what a folder holds was made with, None if it is no run folder."""
    outgrown = Path(run) / "outgrown"  # those of a checkpoint that a larger run will replace
    file = outgrown if outgrown.exists() else Path(run) / "options.json"
    with suppress(OSError, ValueError, LookupError, TypeError):
        return json.loads(file.read_text(encoding="utf-8"))["options"]


def require_folder(options, record: dict, code: dict) -> dict | None:
    """What options.json of the run folder holds, None if the folder is new. Ends the program where
    --run is no place for this stage, these options and this code."""
    run = Path(options.run)
    if not options.run.strip():
        fail("--run is empty; name a folder")
    for place in (run, *run.parents):
        if os.path.lexists(place) and not place.is_dir():
            fail(f"--run {run}: {place} is a file; name a folder")
    if not run.exists():
        return None
    if not (run / "options.json").exists():
        foreign = sorted(p.name for p in run.iterdir() if p.name not in BEGINNING)
        if foreign:
            what = f"it holds {foreign[0]} and no options.json"
            fail(f"--run {run} is no run folder: {what}; name a new or empty one")
        return None
    before = read_run(run)
    require_same_stage(run, before, stage_number(options))
    require_same_options(run, before["options"], record)
    stage = before.get("code", code)["stage"]
    if stage != code["stage"] and not options.accept_changes:
        what = "--accept_changes goes on with the code as it is now, or choose another --run"
        fail(f"{code['file']} has changed since {run} was made: {what}")
    return before


def require_same_stage(run: Path, before: dict, now: str | None):
    """Ends the program if another stage made the folder; older folders tell by their options."""
    options = before["options"]
    signs = {"expert": "02", "steering": "03", "group_size": "04", "guard": "01", "n": "05"}
    by_options = next((stage for sign, stage in signs.items() if sign in options), None)
    stage = before.get("stage") or by_options
    if stage and now and stage != now:
        fail(f"{run} was made by stage {stage}, and this is stage {now}: choose another --run")


def require_same_options(run: Path, before: dict, record: dict):
    """Ends the program if the folder was made with other options or inputs, and names them."""
    changes = []
    for name in before | record:
        old, new = before.get(name), record.get(name)
        grows = name in GROWS and old and new and new > old
        if old != new and not grows:
            changes.append(f"{name} ({old} there, {new} now{WHY_NOT.get(name, '')})")
    if changes:
        what = f"{run} was made with other options: {'; '.join(changes)}"
        fail(f"{what}. Repeat them, or choose another --run")


def require_engine(options):
    """Ends the program if the engine of the options can't work here."""
    if options.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        fail(
            "--engine vllm needs the package vllm: pip install -r requirements.txt, "
            "or use --engine hf"
        )
    if options.tensor_parallel > 1:
        if options.engine != "vllm" or process.processes().num_processes > 1:
            what = "is for --engine vllm in one process, which then uses that many GPUs"
            fail(f"--tensor_parallel {what}")


def open_run(options, free: tuple[str, ...] = ()) -> Path:
    """The run folder, made or reopened; reopening it with other options, changed inputs or another
    stage's code is an error that names them. Options in `free` may change from call to call."""
    require_engine(options)
    here, run = process.processes(), Path(options.run)
    if here.process_index > 0:  # the first process checks, writes and speaks for all
        here.wait_for_everyone()
        sys.stdout = open(os.devnull, "w")
        return run
    record, code = record_of(options, free), code_of(options)
    require_folder(options, record, code)
    for item in values_of(options):
        place = base_of(place_of(item))
        require_reach(place)
        if place and not is_endpoint(item) and os.path.isfile(f"{place}/config.json"):
            require_weights(place)
    run.mkdir(parents=True, exist_ok=True)
    lock(run)
    before = require_folder(options, record, code)
    if before:
        go_on(run, before, record, code)
    else:
        versions = {"python": sys.version.split()[0]}
        packages = ["torch", "transformers", "accelerate"]
        packages += ["vllm"] if options.engine == "vllm" else []
        for package in packages:
            versions[package] = importlib.import_module(package).__version__
        new = {"stage": stage_number(options), "options": record}
        new |= {"versions": versions, "code": code}
        write_atomic(run / "options.json", json.dumps(new, indent=1))
    here.wait_for_everyone()
    return run


def go_on(run: Path, before: dict, record: dict, code: dict):
    """Says what code has changed since the folder was made, and keeps what was accepted and what
    has grown. Of a changed room nothing is written: the folder may be the input of another run,
    which knows it by its content."""
    after = dict(before)
    earlier = before.get("code", code)
    changed = [room for room in ("stage", *ROOMS) if earlier.get(room) != code[room]]
    if changed:
        names = [code["file"] if name == "stage" else name for name in changed]
        print(f"changed since {run} was made, and now at work: {', '.join(names)}")
    if "stage" in changed:  # with --accept_changes
        after |= {"code": code, "earlier code": [*before.get("earlier code", []), earlier]}
    if record != before["options"]:
        if is_finished(run):  # the larger run replaces the checkpoint at its end
            write_atomic(run / "outgrown", json.dumps({"options": before["options"]}))
        after["options"] = record
    if after != before:
        write_atomic(run / "options.json", json.dumps(after, indent=1))


def is_finished(run: Path) -> bool:
    """Whether checkpoint/ is that of the whole run, not of the smaller one that it was."""
    return (run / "checkpoint").exists() and not (run / "outgrown").exists()


def show_plan(options, rows: list[dict], free: tuple[str, ...] = ()):
    """What --dry_run says of options, run folder and rows; a folder that would be refused is
    refused here too."""
    require_engine(options)
    folder = "to be made"
    if require_folder(options, record_of(options, free), code_of(options)):
        folder = "there, made with these options: the run would go on"
    print("dry run: nothing is loaded, computed or written")
    for name, value in vars(options).items():
        print(f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    kinds = Counter(row.get("kind") or KIND[row["harmful"]] for row in rows)
    print(f"\nrun folder: {options.run}, {folder}")
    print(f"rows: {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}")
    print("hours and memory, by formulas: python bench/plan.py, then the same command line")


def read_stage_01(folder: str) -> tuple[list[dict], dict[str, list[dict]]]:
    """(rows with their samples, {id: verdicts}) of a finished run of stage 01."""
    rows = read_jsonl(Path(folder) / "responses.jsonl")
    labels = read_jsonl(Path(folder) / "labels.jsonl")
    verdicts = {row["id"]: row["verdicts"] for row in labels}
    missing = [row["id"] for row in rows if row["id"] not in verdicts]
    if missing or not rows:
        what = f"{len(missing)} of {len(rows)} prompts have no label"
        fail(f"{folder} is not finished: {what}; run its stage 01 again")
    return rows, verdicts


def counted(names, most_common: bool = True) -> str:
    """How often each name occurs, the most frequent first or as they come.

    >>> counted(["b", "a", "a"]), counted(["b", "a", "a"], most_common=False), counted([])
    ('2 a, 1 b', '1 b, 2 a', 'none')
    """
    counts = Counter(names)
    pairs = counts.most_common() if most_common else counts.items()
    return ", ".join(f"{count} {name}" for name, count in pairs) or "none"


def summary(run: Path, stage: str, lines: dict, next_command: str):
    """What every stage prints last, and leaves in <run>/summary.txt: rows in, kept, dropped and
    why, where the results are, the next command."""
    width = max(map(len, lines))
    body = [f"  {name:<{width}}  {value}" for name, value in lines.items()]
    text = "\n".join([stage, *body, f"next: {next_command}"])
    write_atomic(run / "summary.txt", text + "\n")
    (run / "outgrown").unlink(missing_ok=True)  # a checkpoint that was, is replaced
    print(f"\n{text}")


# Training states ----------------------------------------------------------------------------------
def gather(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU of the first process, one after the other, nothing on the others;
    all of them take part, because FSDP leaves each with a shard. Tied weights stay one tensor."""
    first = process.processes().process_index == 0
    whole, by_identity = {}, {}
    for name, tensor in tensors.items():
        if id(tensor) not in by_identity:
            is_shard = hasattr(tensor, "full_tensor")  # a DTensor, as FSDP leaves them
            full = tensor.full_tensor() if is_shard else tensor
            by_identity[id(tensor)] = full.detach().cpu().contiguous() if first else None
        whole[name] = by_identity[id(tensor)]
    return whole


def save_state(path: Path, step: int, model, optimizer):
    """Everything that step `step` needs, in one safetensors file written aside and renamed: a kill
    at any moment leaves the last whole one. Data order and dropout are functions of (seed, step),
    so no random state needs saving."""
    from safetensors.torch import save_file

    tensors = {f"model.{n}": p.data for n, p in model.named_parameters() if p.requires_grad}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
    tensors = gather(tensors)
    if process.processes().process_index > 0:
        return
    for leftover in path.parent.glob(".tmp*"):  # of safetensors, killed as it wrote
        leftover.unlink()
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"step": str(step)})
    os.replace(temporary, path)


def load_state(path: Path, model, optimizer) -> int:
    """Puts a saved state back; the step to go on with, 0 if there is none."""
    from safetensors import safe_open

    if not path.exists():
        return 0
    by_name = dict(model.named_parameters())
    by_index = [p for group in optimizer.param_groups for p in group["params"]]
    moments: dict[int, dict] = {}
    with safe_open(path, "pt") as file, torch.no_grad():
        for key in sorted(file.keys()):  # FSDP's processes take part in the same order
            tensor = file.get_tensor(key)
            kind, _, name = key.partition(".")
            if kind == "model":
                by_name[name].copy_(share_of(tensor, by_name[name]))
            else:
                index, _, name = name.partition(".")
                share = share_of(tensor, by_index[int(index)])
                moments.setdefault(int(index), {})[name] = share
        step = int(file.metadata()["step"])
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": moments, "param_groups": groups})
    return step


def share_of(tensor, parameter):
    """The part of a whole tensor that belongs beside this process's part of a parameter."""
    if not hasattr(parameter, "full_tensor") or not tensor.dim():  # Adam's step count has no parts
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements)


@contextmanager
def state_saved_if_it_ends(run: Path, step: int, trainer):
    """A guard, a server or a check that ends the program inside leaves the state before `step`
    saved: it is never a reward of 0."""
    try:
        yield
    except SystemExit:
        save_state(run / "state.safetensors", step, trainer.model, trainer.optimizer)
        process.processes().wait_for_everyone()
        raise
