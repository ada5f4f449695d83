"""Where GRPO gets from each start, in the miniature world over seeds: `python bench/curves.py`, about 12 minutes a seed
on one core, after both tables of bench/claims.py, whose checkpoints are the starts.

Equal steps and samples. Every ten steps the gold rule judges the unseen prompts. The base start goes on beyond the
other starts' 40 steps, until it is as safe as ThinkSafe: how much more does it cost? Two seeds at a time; the same
command goes on where it stopped. Writes results/claims/grpo.json, .md and .png: mean over seeds and its 95 %
t-interval.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

from claims import ROOT, mean_interval, over_seeds, read_jsonl, stage

from common import load_tokenizer, messages_of, render_chat
from plumbing import load_prompts, run_stage

STEPS, BASE_STEPS = 40, 100
RUNS = {  # name -> (folder of bench/claims.py whose checkpoint it starts from, options of stage 04)
    "base": (None, ["--steps", BASE_STEPS]),
    "answer-SFT": ("sinternal{}/answer-SFT", []),
    "SInternal": ("sinternal{}/verification", []),
    "ThinkSafe": ("thinksafe{}/ThinkSafe", []),
    "ThinkSafe-reward": (None, ["--reward", "thinksafe"]),
    "beta-0.04": (None, ["--beta", 0.04]),
    "verification-rows": (
        None,
        ["--shares", "harmful=0.3", "benign=0.3", "maths=0.2", "verify=0.2"],
    ),
}
METRICS = {  # in eval.jsonl -> heading
    "asr test_plain": "ASR plain ↓",
    "asr test_wrapped": "ASR wrapped ↓",
    "compliance test_plain": "compliance plain ↑",
    "compliance test_wrapped": "compliance wrapped ↑",
    "accuracy test_sums": "sums ↑",
}
PROMPTS = ["tiny/prompts/train.jsonl", "tiny/prompts/train_sums.jsonl"]
CHECKS = ["--eval_every", 10, "--eval_judge", "tiny/gold.py"]
CHECKS += [
    "--eval_prompts",
    *(f"tiny/prompts/test_{name}.jsonl" for name in ("plain", "wrapped", "sums")),
]


def run_seed(runs: Path, names: list[str], seed: int) -> dict[str, Path]:
    """{name: run folder} of every GRPO run with one seed."""
    folders = {}
    for name in names:
        start, extra = RUNS[name]
        model = runs / start.format(seed) / "checkpoint" if start else "tiny/lrm"
        if (
            name == "verification-rows"
        ):  # the answers that stage 02 verified, with its guard's labels
            extra = [
                *extra,
                "--prompts",
                *PROMPTS,
                runs / f"sinternal{seed}/verification/train.jsonl",
            ]
        folders[name] = runs / f"grpo{seed}" / name
        stage("04_grpo.py", folders[name], "--seed", seed, "--model", model, *CHECKS, *extra)
    return folders


def tokens(runs: Path) -> dict[str, tuple[int, int]]:
    """Tokens that pass the model (forward, forward and back) in the whole of stage 03 and in a GRPO step from the base,
    both with seed 0, prompts included: what is read and written, and what is trained on. GRPO skips flat groups."""
    tokenizer = load_tokenizer("tiny/lrm")
    chats = {
        row["id"]: render_chat(tokenizer, messages_of(row["prompt"]))[0]
        for row in load_prompts(PROMPTS)
    }
    run = ROOT / runs / "thinksafe0/ThinkSafe"
    steered, kept = read_jsonl(run / "responses.jsonl"), read_jsonl(run / "train.jsonl")
    made = {row["id"]: (row["prompt_tokens"], row["samples"][0]["tokens"]) for row in steered}
    trained = sum(len(chats[row["id"]]) + made[f"{row['id']}|{row['try']}"][1] for row in kept)
    trained *= json.loads((run / "options.json").read_text())["options"]["epochs"]

    run = ROOT / runs / "grpo0/base"
    options = json.loads((run / "options.json").read_text())["options"]
    prompts, responses = options["batch_size"], options["batch_size"] * options["group_size"]
    prompt = statistics.mean(map(len, chats.values()))
    steps = [
        (row["response_tokens"], 1 - row["zero_spread_groups"])
        for row in read_jsonl(run / "metrics.jsonl")
    ]
    written = prompts * prompt + responses * statistics.mean(response for response, _ in steps)
    updated = responses * statistics.mean(
        (prompt + response) * active for response, active in steps
    )
    return {
        "stage 03": (sum(map(sum, made.values())), trained),
        "a GRPO step": (round(written), round(updated)),
    }


def steps_until_as_safe(runs: Path, seed: int) -> int | None:
    """Steps of GRPO from the base until its ASR on unseen wrappers is the ThinkSafe start's, checked every ten."""
    goal = read_jsonl(ROOT / runs / f"grpo{seed}/ThinkSafe/eval.jsonl")[0]["asr test_wrapped"]
    rows = read_jsonl(ROOT / runs / f"grpo{seed}/base/eval.jsonl")
    return next((row["step"] for row in rows if row["asr test_wrapped"] <= goal), None)


def cost(steps: list[int | None], tokens: dict[str, tuple[int, int]]) -> dict:
    """GRPO's operations over those of stage 03, per seed: 2 a weight and token forward, 6 forward and back. LoRA, which
    stage 03 has, would save 2 of the 6, and costs about as much itself in a model of 128 columns.

    >>> cost([10, 20], {"stage 03": (100, 300), "a GRPO step": (20, 10)})["values"]
    [0.5, 1.0]
    """
    (forward, back), (step_forward, step_back) = tokens.values()
    ratio = (2 * step_forward + 6 * step_back) / (2 * forward + 6 * back)
    found = mean_interval([round(ratio * (s or BASE_STEPS), 2) for s in steps])
    return {**found, "steps": steps, "one step over stage 03": round(ratio, 4), "tokens": tokens}


def cost_in_words(found: dict) -> str:
    each = ", ".join(str(s or f"more than {BASE_STEPS}") for s in found["steps"])
    (forward, back), (step_forward, step_back) = found["tokens"].values()
    return (
        f"Until it is as safe on unseen wrappers as ThinkSafe, GRPO from the base takes {each} steps: "
        f"{found['mean']:.1f} ± {found['half']:.1f} times the operations of the whole of stage 03. Stage 03 reads and "
        f"writes {forward} tokens and trains on {back}, a step {step_forward} and {step_back} (seed 0, guard left out)."
    )


def figure(curves: dict, path: Path):
    """A panel per metric, a line and band per start; the variants of the base start are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, len(METRICS) + 1, figsize=(18, 3.6), layout="constrained")
    for axis, (metric, title) in zip(axes, [*METRICS.items(), ("reward", "guard's reward ↑")]):
        for number, (name, found) in enumerate(curves.items()):
            points = [(step, p) for step, p in found[metric].items() if step <= STEPS]
            x, mean, half = zip(*((step, p["mean"], p["half"]) for step, p in points))
            axis.plot(x, mean, "-" if number < 4 else "--", color=f"C{number}", label=name)
            low, high = [m - h for m, h in zip(mean, half)], [m + h for m, h in zip(mean, half)]
            axis.fill_between(x, low, high, color=f"C{number}", alpha=0.12)
        axis.set(title=title, xlabel="step", ylim=(-0.03, 1.03 if metric != "reward" else None))
        axis.grid(alpha=0.3)
    fig.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=len(curves),
        fontsize=9,
    )
    fig.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seeds", type=int, default=5, choices=range(1, 6), help="how many seeds, from 0"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, choices=range(1, 6), help="seeds at a time, each on one core"
    )
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/claims"), help="where bench/claims.py put its runs"
    )
    parser.add_argument(
        "--only", nargs="+", choices=RUNS, default=list(RUNS), help="some of the runs"
    )
    options = parser.parse_args()
    folders = over_seeds(partial(run_seed, options.runs, options.only), options.seeds, options.jobs)
    curves: dict[str, dict[str, dict[int, dict]]] = {}
    for name in options.only:
        checks = [
            {row["step"]: row for row in read_jsonl(ROOT / f[name] / "eval.jsonl")} for f in folders
        ]
        rewards = [
            [m["reward"] for m in read_jsonl(ROOT / f[name] / "metrics.jsonl")] for f in folders
        ]
        found = {
            m: {s: mean_interval([c[s][m] for c in checks]) for s in checks[0]} for m in METRICS
        }
        tens = range(10, STEPS + 1, 10)  # the guard's reward: the mean over the ten steps before
        found["reward"] = {
            s: mean_interval([statistics.mean(r[s - 10 : s]) for r in rewards]) for s in tens
        }
        curves[name] = found
    heads = [*METRICS.values(), "guard's reward"]
    lines = ["| start or variant | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, found in curves.items():
        ends = [(found[m][0], found[m][STEPS]) for m in METRICS] + [
            (found["reward"][10], found["reward"][STEPS])
        ]
        cells = [
            f"{before['mean']:.2f} → {after['mean']:.2f} ± {after['half']:.2f}"
            for before, after in ends
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    note = f"Before → after {STEPS} steps of 16 prompts × 8 responses, mean ± half a 95 % t-interval over "
    note += f"{options.seeds} seeds; judge: the gold rule. Guard's reward: first → last ten steps; ThinkSafe's ends at 2."
    lines += ["", note]
    result = {"seeds": options.seeds, "steps": STEPS, "curves": curves}
    if {"base", "ThinkSafe"} <= set(options.only):
        steps = [steps_until_as_safe(options.runs, seed) for seed in range(options.seeds)]
        result["GRPO's cost over ThinkSafe's"] = cost(steps, tokens(options.runs))
        lines += ["", cost_in_words(result["GRPO's cost over ThinkSafe's"])]
    out = ROOT / "results/claims"
    out.mkdir(parents=True, exist_ok=True)
    (out / "grpo.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "grpo.md").write_text("\n".join(lines) + "\n")
    figure(curves, out / "grpo.png")
    print("\n".join(lines))


if __name__ == "__main__":
    run_stage(main)
