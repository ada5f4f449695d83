"""What a run shows while it works: one bar over several files; of GRPO also trackers, the table of
steps, its files, its summary."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

from plumbing.loading import choose_dtype
from plumbing.names import model_config
from plumbing.process import fail, processes
from plumbing.prompts import KINDS, kind_of
from plumbing.rows import append_jsonl, read_jsonl, reopen_jsonl
from plumbing.runs import options_of

COLUMNS = {  # of the table on the screen -> name in metrics.jsonl
    "reward": "reward",
    **{kind: f"reward_{kind}" for kind in KINDS},
    "trunc": "truncated",
    "unparsed": "unparsed",
    "flat": "zero_spread_groups",
    "tokens": "response_tokens",
    "entropy": "entropy",
    "kl": "kl",
    "clipped": "clipped",
}


def require_trackers(names: list[str]):
    """Ends the program if a tracker is unknown or not installed."""
    if not names:
        return
    from accelerate.tracking import get_available_trackers

    available = [str(name) for name in get_available_trackers()]
    missing = sorted(set(names) - {"all", *available})
    if missing:
        what = f"unknown or not installed; there are {', '.join(available) or 'none'}"
        fail(f"--trackers {' '.join(missing)}: {what}")


def open_accelerator(options, run: Path):
    """accelerate with bfloat16 where --dtype means it (elsewhere as `accelerate launch` says) and
    the trackers of the options."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(
        mixed_precision="bf16" if choose_dtype(options.dtype) == "bfloat16" else None,
        log_with=options.trackers or None,
        project_dir=run,
    )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin and plugin.mixed_precision_policy:
        # accelerate would also cast outputs and sums of gradients: log-probs in bfloat16 have a
        # noise that is as large as what an update does to the ratio
        exact = {"output_dtype": None, "reduce_dtype": torch.float32}  # None: as computed
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, **exact)
    accelerator.init_trackers("04_grpo", {k: str(v) for k, v in vars(options).items()})
    return accelerator


# Bars ---------------------------------------------------------------------------------------------
class SharedBar:
    """One bar over the files of a model or judge; it comes with the first that has work left."""

    def __init__(self, name: str, sizes: list[int]):
        self.name, self.sizes = name, sizes  # rows of each file, those of this process alone
        self.bar, self.later = None, 0

    def expect(self, number: int):
        """Files from `number` on are to come, whatever was expected of those before."""
        self.later = sum(self.sizes[number:])

    def file(self, todo: int, rows: int, unit: str):
        """The bar, with `todo` units left of a file that was expected to have `rows`."""
        self.later = max(0, self.later - rows)
        if self.bar is None:
            self.bar = new_bar(todo + self.later, unit, self.name)
        self.bar.total = self.bar.n + todo + self.later
        return self.bar


SHARED: list[SharedBar] = []  # the innermost one_bar that is at work is the last


def new_bar(total: int, unit: str, name: str):
    from tqdm import tqdm

    hidden = processes().process_index > 0
    return tqdm(total=total, unit=unit, desc=name or None, disable=hidden, dynamic_ncols=True)


def one_bar(files: dict, name: str, each: int = 1, kinds: tuple = KINDS) -> Iterator[tuple]:
    """Yields (key, rows) of `files`, {key: rows}. What answer_prompts and judge_samples do in the
    body of that loop moves one bar, which says what is left of all files: `each` units for a row of
    these `kinds`, none for others."""
    share, sizes = processes().num_processes, []
    for rows in files.values():
        counted = sum(kind_of(row) in kinds for row in rows)
        sizes.append(math.ceil(counted * each / share))
    shared = SharedBar(name, sizes)
    SHARED.append(shared)
    try:
        for number, (key, rows) in enumerate(files.items()):
            shared.expect(number)
            yield key, rows
    finally:
        SHARED.remove(shared)
        if shared.bar is not None:
            shared.bar.close()


@contextmanager
def bar_over(todo: int, rows: int, unit: str, name: str = ""):
    """A bar over the `todo` units that are left of a file's `rows`: the one that the files of a
    one_bar share, else its own; with nothing left, one that is not shown."""
    from tqdm import tqdm

    if not todo:
        with tqdm(disable=True) as bar:
            yield bar
    elif SHARED:
        share = processes().num_processes
        yield SHARED[-1].file(todo, math.ceil(rows / share), unit)
    else:
        with new_bar(todo, unit, name) as bar:
            yield bar


# GRPO's steps -------------------------------------------------------------------------------------
def is_missing(value) -> bool:
    return value is None or math.isnan(value)


class StepTable:
    """The table on the screen. A column comes with its first value, and the head is then written
    again; "-" where a step has none."""

    def __init__(self, run: Path):
        """A run that goes on has the columns that it had."""
        path = run / "metrics.jsonl"
        earlier = read_jsonl(path) if path.exists() else []
        self.columns = {name for row in earlier for name, v in row.items() if not is_missing(v)}
        options = options_of(run) or {}
        self.unmeasured = set() if options.get("beta", 1) else {"kl"}  # it is 0 for want of a model
        self.head = ""

    def lines(self, step: int, numbers: dict) -> list[str]:
        self.columns |= {name for name, value in numbers.items() if not is_missing(value)}
        names = {}
        for title, name in COLUMNS.items():
            if name in self.columns - self.unmeasured:
                names[title] = name
        head = " step" + "".join(f"{title:>9}" for title in names)
        cells = ""
        for name in names.values():
            cells += f"{'-':>9}" if is_missing(numbers[name]) else f"{numbers[name]:9.3f}"
        lines = [f"{step:5d}{cells}"] if head == self.head else [head, f"{step:5d}{cells}"]
        self.head = head
        return lines


@cache
def table_of(run: Path) -> StepTable:
    return StepTable(run)


def log_grpo_step(run: Path, accelerator, numbers: dict, group: dict) -> dict:
    """A line of the table, the trackers, `group` in samples.jsonl; the numbers as metrics.jsonl
    keeps them: rounded, null where no prompt of a kind was among the step's."""
    from tqdm import tqdm

    accelerator.log(numbers, group["step"])
    if processes().process_index == 0:
        tqdm.write("\n".join(table_of(run).lines(group["step"], numbers)))
        append_jsonl(run / "samples.jsonl", [group])
    kept = {}
    for name, value in numbers.items():
        missing = "reward" in name and math.isnan(value)
        kept[name] = None if missing else round(value, 6)
    return kept


def log_check(path: Path, step: int, shares: dict):
    """A line in eval.jsonl, once the checkpoint that belongs to it is whole."""
    from tqdm import tqdm

    processes().wait_for_everyone()
    if processes().process_index == 0:
        append_jsonl(path, [{"step": step, **shares}])
    tqdm.write(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in shares.items()))


def grpo_history(run: Path, options) -> dict[str, str]:
    """Lines of a run's summary: steps, rewards of its first and last tenth, the best check."""
    history = reopen_jsonl(run / "metrics.jsonl")
    size = f"{options.batch_size} prompts x {options.group_size} responses"
    lines = {"steps": f"{len(history)} of {size}"}
    tenth = max(1, len(history) // 10)
    for name in ("reward", *(f"reward_{kind}" for kind in KINDS)):
        first = [row[name] for row in history[:tenth] if row[name] is not None]
        last = [row[name] for row in history[-tenth:] if row[name] is not None]
        if first and last:
            change = f"{sum(first) / len(first):.3f} -> {sum(last) / len(last):.3f}"
            lines[name.replace("_", ", ")] = change
    if options.eval_prompts:
        best = max(reopen_jsonl(run / "eval.jsonl"), key=lambda row: row["score"])
        lines["best"] = f"{run}/best, step {best['step']}, score {best['score']:.3f}"
    unparsed = sum(row["unparsed"] for row in history) / len(history)
    truncated = sum(row["truncated"] for row in history) / len(history)
    if truncated > 0.1:
        what = f"WARNING: {truncated:.1%} of the responses; raise --max_new_tokens"
        lines["cut"] = f"{what} (now {options.max_new_tokens})"
    lora = run / "checkpoint/lora.json"
    if lora.exists():
        [merged] = read_jsonl(lora)
        precision = str(model_config(options.model).dtype or "float32").removeprefix("torch.")
        lines["merged"] = f"LoRA changed {merged['changed']:.1%} of its entries in {precision}"
    lines["unparsed"] = f"{unparsed:.2%} of the responses had no reward"
    lines["checkpoint"] = f"{run}/checkpoint"
    return lines
