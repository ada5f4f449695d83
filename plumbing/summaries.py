"""The last words of stages 01 to 03: rows in, kept, dropped and why, where the results are."""

import json
import shlex
from collections import Counter
from pathlib import Path

from plumbing.names import local_name
from plumbing.options import preset_row
from plumbing.rows import cut_line, read_jsonl, reopen_jsonl
from plumbing.runs import KIND, counted, options_of, summary


ENGINE = ("engine", "tensor_parallel", "enable_thinking")
DEFAULTS = {"preset": "tiny", "engine": "hf", "tensor_parallel": 1, "enable_thinking": True}


def in_order(names) -> str:
    return counted(sorted(names), most_common=False)


def next_command(options, stage: str, more: dict) -> str:
    """The command line of another stage that goes on with this run: its preset and engine, and
    `more` options, each where it is not what the preset has anyway."""
    shown = {name: getattr(options, name) for name in ("preset", *ENGINE)} | more
    row = {**preset_row(options.preset, stage[:2]), **DEFAULTS}
    if stage == "05_eval.py" and "bench" not in row:
        shown["bench"] = ["xstest", "fortress", "math500"]  # of both kinds, and not gated
    words = ["python", stage]
    for name, value in shown.items():
        if value != row.get(name):
            values = value if isinstance(value, list) else [value]
            words += [f"--{name}", *map(str, values)]
    return shlex.join(words)


def losses_of(run: Path) -> str:
    losses = [row["loss"] for row in read_jsonl(run / "metrics.jsonl")]
    return f"{len(losses)} steps, loss {losses[0]:.3f} -> {losses[-1]:.3f}"


def summarise_01(run: Path, options, rows: list[dict], verdicts: dict[str, list[dict]]):
    """What stage 02 will find: a harmful prompt teaches only if its answers are mixed."""
    kinds = {True: [], False: []}
    for row in rows:
        labels = {verdict["safety"] for verdict in verdicts[row["id"]]} & {"safe", "unsafe"}
        kind = "other"
        if labels:
            kind = "mixed" if len(labels) == 2 else f"always {labels.pop()}"
        kinds[row["harmful"]].append(kind)
    samples = [sample for row in rows for sample in row["samples"]]
    labels = [verdict for row in rows for verdict in verdicts[row["id"]]]
    shares = []
    for state, count in Counter(sample["state"] for sample in samples).most_common():
        shares.append(f"{count / len(samples):.1%} {state}")
    tokens = sum(sample["tokens"] for sample in samples) / len(samples)
    lines = {
        "prompts": f"{len(rows)}, {options.n} responses each",
        "harmful": in_order(kinds[True]),
        "benign": in_order(kinds[False]),
        "thinking": ", ".join(shares),
        "cut": cut_line(samples, options.max_new_tokens),
        "labels": f"{counted(v['safety'] for v in labels)} (guard {options.guard})",
        "refusals": counted(v["refusal"] for v in labels),
        "tokens": f"{tokens:.0f} a response on average",
        "written": f"{run}/responses.jsonl, {run}/labels.jsonl",
    }
    more = {"responses": run, "model": local_name(options.model)}
    summary(run, "01_generate", lines, next_command(options, "02_verify_sft.py", more))


def summarise_02(run: Path, options, replies, kept, dropped, test):
    author = local_name((options_of(options.responses) or {}).get("model", "an unknown model"))
    tokens_read = sum(row["prompt_tokens"] for row in replies)
    tokens_written = sum(row["tokens"] for row in replies)
    lines = {
        "selected": f"{len(replies)} answers of {author}, from {options.responses}",
        "expert": f"{options.expert}, {tokens_read} prompt tokens read, {tokens_written} written",
        "kept": in_order(f"{KIND[row['harmful']]} {row['label']}" for row in kept),
        "dropped": counted((row["reason"] for row in dropped), most_common=False),
        "trained": losses_of(run),
        "test set": f"{len(test)} answers, {run}/verify_test.jsonl" if test else "none (--heldout)",
        "checkpoint": f"{run}/checkpoint",
    }
    models = [f"base={options.model}", f"sinternal={run}/checkpoint"]
    summary(run, "02_verify_sft", lines, next_command(options, "05_eval.py", {"models": models}))


def summarise_03(run: Path, options, rows, kept, dropped, lost):
    """Also whether losses fall on some categories more than on others."""
    figures = json.loads((run / "trained.json").read_text())
    last_reason = {row["id"]: row["reason"] for row in dropped}
    asked = Counter(row.get("category", "other") for row in rows)
    missed = Counter(row.get("category", "other") for row in lost)
    worst = sorted(missed, key=lambda name: missed[name] / asked[name], reverse=True)[:4]
    reasons = in_order(last_reason[row["id"]] for row in lost)
    divergence = f"{figures['data_kl']:.3f} per token of the data"
    responses = reopen_jsonl(run / "responses.jsonl")  # none if all refusals are fixed
    samples = [sample for row in responses for sample in row["samples"]]
    lines = {
        "prompts": in_order(row["kind"] for row in rows),
        "kept": in_order(f"{row['kind']} at try {row['try']}" for row in kept),
        "dropped": in_order(row["reason"] for row in dropped),
        "cut": cut_line(samples, options.max_new_tokens),
        "lost": f"{len(lost)} prompts after the last try: {reasons}",
        "lost most": ", ".join(f"{c} {missed[c]} of {asked[c]}" for c in worst) or "none",
        "trained": losses_of(run),
        "data": f"perplexity {figures['data_perplexity']:.3f} under the initial model",
        "shift": f"KL of the trained model to the initial one {divergence}",
        "checkpoint": f"{run}/checkpoint",
    }
    models = [f"base={options.model}", f"thinksafe={run}/checkpoint"]
    summary(run, "03_steer_selfgen", lines, next_command(options, "05_eval.py", {"models": models}))
