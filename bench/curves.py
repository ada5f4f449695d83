"""Where GRPO gets from each start, in the miniature world over seeds: `python bench/curves.py`, about 12 minutes a seed
on one core, after both tables of bench/claims.py, whose checkpoints are the starts.

Equal steps and samples. Every ten steps the gold rule judges the unseen prompts. The base start goes on beyond the
other starts' 40 steps, until it is as safe as ThinkSafe: how much more does it cost? Two seeds at a time; the same
command goes on where it stopped. Writes results/claims/grpo.json, .md and .png: mean over seeds and its 95 %
t-interval. `python bench/curves.py --draw` draws the figure again from the committed grpo.json; nothing is trained.
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


def tokens(stage_03: Path, grpo: Path, home: Path = ROOT) -> dict[str, tuple[int, int]]:
    """Tokens that pass the model (forward, forward and back) in the whole of a run of stage 03 and
    in a step of a GRPO run, prompts included: what is read and written, and what is trained on. GRPO
    skips flat groups. `home`: the folder of the world, tiny/ is in it."""
    tokenizer = load_tokenizer(str(home / "tiny/lrm"))
    chats = {
        row["id"]: render_chat(tokenizer, messages_of(row["prompt"]))[0]
        for row in load_prompts([str(home / file) for file in PROMPTS])
    }
    steered, kept = read_jsonl(stage_03 / "responses.jsonl"), read_jsonl(stage_03 / "train.jsonl")
    written = {row["id"]: (row["prompt_tokens"], row["samples"][0]["tokens"]) for row in steered}
    trained = sum(len(chats[row["id"]]) + written[f"{row['id']}|{row['try']}"][1] for row in kept)
    trained *= json.loads((stage_03 / "options.json").read_text())["options"]["epochs"]

    options = json.loads((grpo / "options.json").read_text())["options"]
    prompts, responses = options["batch_size"], options["batch_size"] * options["group_size"]
    prompt = statistics.mean(map(len, chats.values()))
    steps = [
        (row["response_tokens"], 1 - row["zero_spread_groups"])
        for row in read_jsonl(grpo / "metrics.jsonl")
    ]
    sampled = prompts * prompt + responses * statistics.mean(response for response, _ in steps)
    updated = responses * statistics.mean(
        (prompt + response) * active for response, active in steps
    )
    return {
        "stage 03": (sum(map(sum, written.values())), trained),
        "a GRPO step": (round(sampled), round(updated)),
    }


def step_as_safe(grpo: Path, goal: float) -> int | None:
    """The first check of a GRPO run at which its ASR on unseen wrappers is no more than `goal`."""
    rows = read_jsonl(grpo / "eval.jsonl")
    return next((row["step"] for row in rows if row["asr test_wrapped"] <= goal), None)


def steps_until_as_safe(runs: Path, seed: int) -> int | None:
    """Steps of GRPO from the base until its ASR on unseen wrappers is the ThinkSafe start's, checked every ten."""
    goal = read_jsonl(ROOT / runs / f"grpo{seed}/ThinkSafe/eval.jsonl")[0]["asr test_wrapped"]
    return step_as_safe(ROOT / runs / f"grpo{seed}/base", goal)


def operations(tokens: dict[str, tuple[int, int]]) -> float:
    """A GRPO step's operations over those of the whole of stage 03: 2 a weight and token forward, 6
    forward and back. LoRA, which stage 03 has, would save 2 of the 6, and costs about as much itself
    in a model of 128 columns.

    >>> operations({"stage 03": (100, 300), "a GRPO step": (20, 10)})
    0.05
    """
    (forward, back), (step_forward, step_back) = tokens.values()
    return (2 * step_forward + 6 * step_back) / (2 * forward + 6 * back)


def cost(steps: list[int | None], tokens: dict[str, tuple[int, int]]) -> dict:
    """GRPO's operations over those of stage 03, per seed.

    >>> cost([10, 20], {"stage 03": (100, 300), "a GRPO step": (20, 10)})["values"]
    [0.5, 1.0]
    """
    ratio = operations(tokens)
    times = mean_interval([round(ratio * (s or BASE_STEPS), 2) for s in steps])
    return {**times, "steps": steps, "one step over stage 03": round(ratio, 4), "tokens": tokens}


def cost_in_words(found: dict) -> str:
    each = ", ".join(str(s or f"more than {BASE_STEPS}") for s in found["steps"])
    (forward, back), (step_forward, step_back) = found["tokens"].values()
    return (
        f"Until it is as safe on unseen wrappers as ThinkSafe, GRPO from the base takes {each} steps: "
        f"{found['mean']:.1f} ± {found['half']:.1f} times the operations of the whole of stage 03. Stage 03 reads and "
        f"writes {forward} tokens and trains on {back}, a step {step_forward} and {step_back} (seed 0, guard left out)."
    )


STARTS = (
    "base",
    "answer-SFT",
    "SInternal",
    "ThinkSafe",
)  # the other RUNS are variants of the first
HIGHEST = {"ThinkSafe-reward": 2}  # rewards of the others are at most 1


def lines_of(found: dict[str, dict]) -> tuple[list[int], list[float], list[float]]:
    """Steps, means and half intervals of one metric, in the order of the steps; grpo.json has them as text."""
    points = sorted((int(step), point["mean"], point["half"]) for step, point in found.items())
    return [list(column) for column in zip(*points)]


def first_as_low(found: dict[str, dict], level: float) -> int | None:
    """The first step whose mean is no more than `level`.

    >>> first_as_low({"0": {"mean": 0.8, "half": 0}, "10": {"mean": 0.1, "half": 0}}, 0.1)
    10
    """
    steps, means, _ = lines_of(found)
    return next((step for step, mean in zip(steps, means) if mean <= level), None)


def draw_curve(axis, name: str, found: dict[str, dict], highest: float = 1):
    """A start's mean with its band, or a variant of the base start, dashed and without one."""
    steps, mean, half = lines_of(found)
    mean, half = [m / highest for m in mean], [h / highest for h in half]
    color = f"C{list(RUNS).index(name)}"
    style = {"lw": 1.8} if name in STARTS else {"lw": 1.3, "ls": "--"}
    axis.plot(steps, mean, color=color, label=name, **style)
    if name in STARTS:
        low, high = [max(0, m - h) for m, h in zip(mean, half)], [m + h for m, h in zip(mean, half)]
        axis.fill_between(steps, low, high, color=color, alpha=0.13, lw=0)


def draw_meeting(axis, base: dict[str, dict], level: float):
    """ThinkSafe's ASR before any GRPO as a line, and where the base start comes down to it."""
    axis.axhline(level, color="C3", ls=":", lw=1.5, zorder=1)
    step = first_as_low(base, level)
    last = max(map(int, base))
    goal = f"as low as ThinkSafe\nbefore GRPO ({level:.3f}, dotted)"
    text = f"base: not {goal}\nby step {last}"
    if step is not None:
        text = f"base: {goal}\nat step {step}"
    steps, means, _ = lines_of(base)
    place = (step or last, means[steps.index(step or last)])
    axis.plot(*place, "*" if step is not None else "x", color="C0", mec="black", ms=11, zorder=4)
    style = {"textcoords": "axes fraction", "ha": "center", "fontsize": 9}
    arrow = {"arrowstyle": "->", "shrinkB": 6}
    axis.annotate(text, place, (0.73, 0.74), arrowprops=arrow, **style)


def figure(curves: dict, path: Path):
    """ASR as far as each start was trained, with the place where the base start is as safe as ThinkSafe is without
    GRPO; what it costs; the guard's reward, divided by the highest. Mean over seeds, 95 % bands for the starts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {**METRICS, "reward": "guard's reward ↑"}
    lowest = {
        metric: 0.7 if metric == "reward" else 0.8
        for metric in titles
        if not metric.startswith("asr")
    }
    rows = [["A"] * 6 + ["B"] * 6, [place for place in "CDEF" for _ in range(3)]]
    fig, axes = plt.subplot_mosaic(
        rows, figsize=(9, 6.4), layout="constrained", height_ratios=[1.25, 1]
    )
    for axis, (metric, title) in zip(axes.values(), titles.items()):
        for name, found in curves.items():
            draw_curve(axis, name, found[metric], HIGHEST.get(name, 1) if metric == "reward" else 1)
        axis.set_xlabel("GRPO step", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        axis.set_xlim(-2, BASE_STEPS + 2)
        if metric in lowest:
            low = lowest[metric]
            axis.set_ylim(low - 0.005, 1.005)
            axis.set_title(f"{title}\nzoomed: {low:g} to 1", fontsize=9)
            continue
        axis.set_title(title, fontsize=10)
        axis.set_yscale("symlog", linthresh=0.01, linscale=0.3)
        axis.set_yticks([0, 0.01, 0.03, 0.1, 0.3, 1], ["0", "0.01", "0.03", "0.1", "0.3", "1"])
        axis.set_yticks([], minor=True)
        axis.set_ylim(-0.001, 1.2)
        if {"base", "ThinkSafe"} <= curves.keys():
            _, [level, *_], _ = lines_of(curves["ThinkSafe"][metric])
            draw_meeting(axis, curves["base"][metric], level)
    handles, names = axes["A"].get_legend_handles_labels()
    style = {"loc": "outside lower center", "ncols": 4, "fontsize": 9, "title_fontsize": 9}
    title = "starts of GRPO, with 95 % bands; dashed: variants of the base start\n"
    title += "(the rewards of ThinkSafe-reward, at most 2, are halved)"
    fig.legend(handles, names, title=title, **style)
    fig.savefig(path, dpi=130)
    plt.close(fig)


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
    parser.add_argument(
        "--draw",
        action="store_true",
        help="draw grpo.png again from grpo.json, and do nothing else",
    )
    options = parser.parse_args()
    out = ROOT / "results/claims"
    if options.draw:
        return figure(json.loads((out / "grpo.json").read_text())["curves"], out / "grpo.png")
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
        runs = ROOT / options.runs
        counted = tokens(runs / "thinksafe0/ThinkSafe", runs / "grpo0/base")
        result["GRPO's cost over ThinkSafe's"] = cost(steps, counted)
        lines += ["", cost_in_words(result["GRPO's cost over ThinkSafe's"])]
    out.mkdir(parents=True, exist_ok=True)
    (out / "grpo.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "grpo.md").write_text("\n".join(lines) + "\n")
    figure(curves, out / "grpo.png")
    print(
        "\n".join([*lines, "", "the figure alone, from grpo.json: python bench/curves.py --draw"])
    )


if __name__ == "__main__":
    run_stage(main)
