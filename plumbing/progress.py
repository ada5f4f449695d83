"""What a GRPO run says of itself: trackers, the table on the screen, its files, its summary."""

import math
from dataclasses import replace
from functools import cache
from pathlib import Path

from plumbing.process import fail, processes
from plumbing.prompts import KINDS
from plumbing.rows import append_jsonl, reopen_jsonl

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
    """accelerate with bfloat16 on a GPU (elsewhere as `accelerate launch` says) and the trackers of
    the options."""
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(
        mixed_precision="bf16" if torch.cuda.is_available() else None,
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


@cache
def print_head():
    print(" step" + "".join(f"{name:>9}" for name in COLUMNS))


def log_grpo_step(run: Path, accelerator, numbers: dict, group: dict) -> dict:
    """A line of the table, the trackers, `group` in samples.jsonl; the numbers as metrics.jsonl
    keeps them: rounded, null where no prompt of a kind was among the step's."""
    from tqdm import tqdm

    print_head()
    cells = [f"{numbers[name]:9.3f}" for name in COLUMNS.values()]
    tqdm.write(f"{group['step']:5d}" + "".join(cells))
    accelerator.log(numbers, group["step"])
    if processes().process_index == 0:
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
    lines["unparsed"] = f"{unparsed:.2%} of the responses had no reward"
    lines["checkpoint"] = f"{run}/checkpoint"
    return lines
