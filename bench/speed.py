"""Speed and memory beside TRL, transformers.generate, vLLM and llama.cpp: equal work, one run.

    make bench                             # with the demo, a step and scaling: two hours on two idle cores
    python bench/speed.py --parts head     # one part anew, the others as they were measured
    python bench/speed.py --quick          # about ten minutes: one repeat of less, to see that all of it works

Every measurement is a process of its own (bench/sampler.py, bench/training.py), sides in turns, A B A B, five times, on
two threads: medians, ranges in brackets, wall and CPU seconds, peak resident memory by getrusage. Before training is
compared, losses, gradient norms and label tokens of all sides must agree. Writes results/bench/speed.json (every
repeat) as it goes, speed.md and two figures; the last line of stdout is the comparison as JSON, ours divided by theirs.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT, MODEL, GGUF = ROOT / "results/bench", "runs/bench/model", "runs/bench/smollm2.gguf"
VOCABULARIES, TOKENS = (1_000, 32_000, 151_000), (1024, 2048, 4096, 8192)
# sampled from: name -> (model, prompts, rows)
SAMPLED = {"tiny": ("tiny/lrm", 48, 1536), "smollm2": ("smollm2/model", 8, 64)}
GOALS = """sampler.tiny_vs_generate >= 4, sampler.tiny_vs_vllm >= 1, sampler.smollm2_vs_generate >= 1.5,
sampler.smollm2_vs_vllm >= 1, sft.speed_vs_trl >= 2.5, sft.memory_vs_trl <= 0.5, sft.speed_vs_trl_best >= 3,
sft.memory_vs_trl_best <= 0.5, sft.share_of_peak >= 0.5,
sft.share_of_peak_best >= 0.5, grpo_update.speed_vs_trl >= 3, grpo_step.speed_vs_trl >= 4,
grpo_step.speed_vs_trl_best >= 3.5, head.memory_151k_vs_1k <= 1.15"""

# Our stages have one setting for speed, tried as TRL's are: the fastest is the side "ours best".
OURS_TRIED = [{"micro_batch_tokens": tokens} for tokens in (512, 1024, 2048, 4096)]
# What can be set in TRL for a CPU, by work: `training_bench` tries each once, and the fastest is the side "trl best".
# Left out: Liger's kernels (GPU only), its own length grouping (over all rows: steps would hold other rows than ours),
# packing (cuts or joins rows to one length; padding_free is the same without that), vLLM (TRL starts it on GPUs only).
# The loss in chunks is its default.
TRL_TRIED = {
    "sft": [
        {"rows": 1},
        {"rows": 2, "sorted": True},
        {"rows": 4, "sorted": True},
        {"rows": 8, "sorted": True},
        {"rows": 2, "sorted": True, "padding_free": True},
        {"rows": 8, "sorted": True, "padding_free": True},
    ],
    "update": [{"rows": 8}, {"rows": 8, "sampled_at_once": 8}, {"rows": 4, "sampled_at_once": 8}],
}
TRL_TRIED["step"] = TRL_TRIED["update"]

NOTES = [
    """`dynamic` and `static` are transformers.generate with that cache; the slower was run once. Lengths: shortest /
median / longest. Ours and vLLM return log-probs as well. 48 prompts on tiny; on smollm2 8, and of groups of 32 the two
that make as many rows. `continuous` is transformers.generate_batch, its cache sized for the rows (by itself it takes
90 % of the machine's memory), 32 rows at once. `llama` is llama.cpp's server with the same weights in float32, which
begins greedy answers as we do, 64 requests together.""",
    """Tokens: of SFT all, of GRPO the generated ones. In SFT and GRPO updates both sides had the same losses, gradient
norms and label tokens. TRL also computes entropy, and in SFT accuracy, at each step; it pads GRPO's completions to the
longest; and its fused head, which has no kernel for CPUs, scores every position. `ours best`, `trl best`: the fastest
of the settings below, by the faster of two tries each; `sorted` orders the rows of a step by length.""",
    """What ours has to move and to compute at the least (bench/limits.py), against copies of 256 MB and torch.mm.""",
    """Share of the peak: what SFT has to compute at the least, against torch.mm of 2048 x 2048 float32 matrices.""",
]


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().split("\n") if Path("/proc/cpuinfo").exists() else []
    return next(
        (x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.processor()
    )


class Bench:
    """Runs the processes and keeps what they say: rows[measurement][side] = one dictionary a repeat."""

    def __init__(self, threads: int, repeats: int):
        self.repeats, self.rows, self.began = repeats, {}, time.time()
        self.environment = os.environ | {
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        self.environment |= {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "TOKENIZERS_PARALLELISM": "false",
        }
        packages = ("torch", "transformers", "trl", "peft", "accelerate")
        self.about = {"processor": processor(), "threads": threads}
        self.about |= {"python": platform.python_version(), "parts": {}, "tried": {}}
        self.about |= {name: importlib.metadata.version(name) for name in packages}

    def load(self):
        """What is saved, by a run of other parts or by one that was stopped."""
        saved = json.loads((OUT / "speed.json").read_text())
        self.about, self.rows = saved["about"], saved["rows"]

    def begin(self, part: str):
        load = round(os.getloadavg()[0], 2)
        self.about["parts"][part] = {"load before": load}

    def process(self, script: str, settings: dict, python: str = sys.executable) -> dict:
        command = [python, f"bench/{script}.py", json.dumps(settings)]
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"error: {' '.join(command)}\n{done.stderr[-3000:]}")
        return json.loads(done.stdout.strip().splitlines()[-1])

    def alternate(
        self, name: str, script: str, sides: dict[str, dict], pythons: dict[str, str] | None = None
    ):
        """`sides` in turns. A cache setting of transformers that is slower the first time is not tried again."""
        rows = self.rows[name] = {side: [] for side in sides}
        for _ in range(self.repeats):
            caches = [side for side in ("dynamic", "static") if rows.get(side)]
            slower = (
                max(caches, key=lambda side: rows[side][0]["8"]["wall"])
                if len(caches) == 2
                else None
            )
            for side, settings in sides.items():
                if side != slower:
                    rows[side].append(
                        self.process(script, settings, (pythons or {}).get(side, sys.executable))
                    )
                    seconds = time.time() - self.began
                    print(
                        f"{seconds:6.0f} s  {name}, {side}: {json.dumps(rows[side][-1])}",
                        flush=True,
                    )
                    self.save()

    def save(self):
        OUT.mkdir(parents=True, exist_ok=True)
        (OUT / "speed.json").write_text(
            json.dumps({"about": self.about, "rows": self.rows}, indent=1) + "\n"
        )


def middle(values: list[float], digits: int = 2) -> str:
    """Median and range.

    >>> middle([1.0, 3.0, 2.5])
    '2.50 [1.00, 3.00]'
    """
    return f"{statistics.median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def ratio(ours: list[float], theirs: list[float]) -> float:
    return round(statistics.median(ours) / statistics.median(theirs), 3)


def equal_work(name: str, sides: dict[str, list[dict]]):
    """All sides report the same losses, gradient norms and label tokens, or nothing is compared."""
    pairs = [pair for side in sides if side != "ours" for pair in zip(sides["ours"], sides[side])]
    for a, b in pairs:
        assert a["label_tokens"] == b["label_tokens"], (
            f"{name}: {a['label_tokens']} and {b['label_tokens']} labels"
        )
        for what in ("losses", "norms"):
            for x, y in zip(a[what], b[what]):
                assert math.isclose(x, y, rel_tol=2e-3, abs_tol=1e-5), (
                    f"{name}: {what} {a[what]} and {b[what]}"
                )


def sampler_bench(bench: Bench, options, name: str):
    vllm, llama = Path(options.vllm).absolute(), Path(options.llama).absolute()
    model, prompts, rows = SAMPLED[name]
    if not (ROOT / model).exists():
        print(f"{model} is not there: skipped (smollm2/fetch.py)")
        return
    fixed = {
        "model": model,
        "prompts": prompts,
        "rows": rows,
        "max_new_tokens": 64,
        "groups": [1, 8, 32],
    }
    if options.quick:
        fixed |= {"groups": [8], "max_new_tokens": 64 if name == "tiny" else 12}
    engines = ["ours", "dynamic", "static"] + ["vllm"] * vllm.exists()
    sides = {engine: {"engine": engine, **fixed} for engine in engines}
    one_group = {**fixed, "groups": [8]}  # for slow ones
    if name == "smollm2":
        sides |= {engine: {"engine": engine, **one_group} for engine in engines[1:]}
    sides["continuous"] = {"engine": "continuous", **one_group}
    if name == "smollm2" and llama.exists():
        if not (ROOT / GGUF).exists():
            subprocess.run([sys.executable, "bench/to_gguf.py", GGUF], cwd=ROOT, check=True)
        served = {"server": str(llama), "weights": GGUF}
        sides["llama"] = {"engine": "llama", **served, **one_group}
    bench.alternate(f"sampler {name}", "sampler", sides, {"vllm": str(vllm)})
    for peer, path in (("vllm", vllm), ("llama", llama)):
        if not path.exists():
            print(f"nothing at {path}: {peer} is skipped (the Makefile says how to build it)")


def fastest(tried: list[tuple[dict, float]]) -> dict:
    """Of (settings, wall seconds) the settings with the fewest.

    >>> fastest([({"rows": 1}, 3.0), ({"rows": 2}, 2.0)])
    {'rows': 2}
    """
    return min(tried, key=lambda pair: pair[1])[0]


def tried_twice(bench: Bench, side: dict, settings: list[dict]) -> list[tuple[dict, float]]:
    """(settings, wall seconds of the faster of two tries, in turns)."""
    turns = [
        [bench.process("training", {**side, **more})["wall"] for more in settings]
        for _ in range(min(2, bench.repeats))
    ]
    return [(more, min(tries)) for more, *tries in zip(settings, *turns)]


def training_bench(bench: Bench, options):
    """The goals ask for the fastest settings of SFT on spread lengths and of whole GRPO steps."""
    bench.process("training", {"work": "make", "folder": MODEL})
    fixed = {"folder": MODEL, "steps": 2, "rows": 8, "micro_batch_tokens": 4096}
    kinds = {"sft spread": {"work": "sft", "lengths": "spread"}}
    kinds |= {"sft equal": {"work": "sft", "lengths": "equal"}}
    kinds |= {"grpo update": {"work": "update"}, "grpo step": {"work": "step"}}
    for name in [*kinds][:: 3 if options.quick else 1]:
        sides = {side: {"side": side, **kinds[name], **fixed} for side in ("ours", "trl")}
        if name in ("sft spread", "grpo step"):
            tried = {"ours": OURS_TRIED, "trl": TRL_TRIED[kinds[name]["work"]]}
            for side, settings in tried.items():
                walls = tried_twice(bench, sides[side], settings)
                sides[f"{side} best"] = {**sides[side], **fastest(walls)}
                bench.about["tried"] |= {f"{name} | {side}": walls}
                print(f"{name}, {side}, tried: {walls}", flush=True)
        if name == "sft spread":  # in turns with it, for its share: a machine's speed changes
            sides["peak"] = {"work": "peak", "folder": ""}
        bench.alternate(name, "training", sides)
        if name == "sft spread":
            bench.rows["matrix peak"] = {"peak": bench.rows[name].pop("peak")}
        if name != "grpo step":
            equal_work(name, bench.rows[name])


def head_bench(bench: Bench, options):
    """One thing changes at a time: the vocabulary at 4096 tokens, then the tokens at 32 k."""
    if options.quick:
        return
    sizes = dict.fromkeys([(v, 4096) for v in VOCABULARIES] + [(32_000, t) for t in TOKENS])
    sides = {
        f"{v},{t}": {"work": "head", "vocabulary": v, "tokens": t, "folder": ""} for v, t in sizes
    }
    bench.alternate("head", "training", sides)


def compare(rows: dict) -> dict:
    """The nested comparison: ours divided by theirs, None where a side is missing."""
    found = {
        "sampler": {},
        "sft": {},
        "grpo_update": {},
        "grpo_step": {},
        "head": {"memory_151k_vs_1k": None},
    }

    def rate(name, side, key=None):
        repeats = rows.get(name, {}).get(side, [])
        return [row["tokens"] / row["wall"] for row in ((r[key] if key else r) for r in repeats)]

    for name in ("tiny", "smollm2"):
        ours = rate(f"sampler {name}", "ours", "8")
        caches = [rate(f"sampler {name}", side, "8") for side in ("dynamic", "static")]
        best = max(caches, key=lambda r: statistics.median(r) if r else 0)
        found["sampler"][f"{name}_vs_generate"] = ratio(ours, best) if ours else None
        for side in ("vllm", "continuous", "llama"):
            theirs = rate(f"sampler {name}", side, "8")
            both = ours and theirs
            found["sampler"][f"{name}_vs_{side}"] = ratio(ours, theirs) if both else None
    for key, name in (
        ("sft", "sft spread"),
        ("grpo_update", "grpo update"),
        ("grpo_step", "grpo step"),
    ):
        for figure, own, side in (("trl", "ours", "trl"), ("trl_best", "ours best", "trl best")):
            ours, theirs = rate(name, own), rate(name, side)
            peaks = [[r["peak"] for r in rows.get(name, {}).get(s, [])] for s in (own, side)]
            found[key][f"speed_vs_{figure}"] = ratio(ours, theirs) if ours and theirs else None
            found[key][f"memory_vs_{figure}"] = ratio(*peaks) if all(peaks) else None
    if "sft spread" in rows:
        turns = [r["gflops"] * 1e9 for r in rows["matrix peak"]["peak"]]
        for figure, side in (("share_of_peak", "ours"), ("share_of_peak_best", "ours best")):
            trained = zip(rows["sft spread"].get(side, []), turns)
            shares = [r["flops"] / r["wall"] / peak for r, peak in trained]
            found["sft"][figure] = round(statistics.median(shares), 3) if shares else None
    if "head" in rows:
        rest = {
            key: [r["peak"] - r["embedding"] for r in repeats]
            for key, repeats in rows["head"].items()
        }
        found["head"]["memory_151k_vs_1k"] = ratio(rest["151000,4096"], rest["1000,4096"])
    return found


def header(*cells: str) -> list[str]:
    return [f"| {' | '.join(cells)} |", "|" + "---|" * len(cells)]


def limits(rows: dict) -> list[str]:
    """The table of what our sampler has to move and to compute, as shares of what the machine can do in that time."""
    if "matrix peak" not in rows:
        return ["not measured: it takes the part `training` too"]
    columns = ("model", "group", "GB moved", "of the bandwidth", "GFLOP", "of the matrix peak")
    lines = header(*columns)
    best = {k: max(r[k] for r in rows["matrix peak"]["peak"]) for k in ("bandwidth", "gflops")}
    for name in [n for n in rows if n.startswith("sampler")]:
        for group in filter(str.isdigit, rows[name]["ours"][0]):
            repeats = [one[group] for one in rows[name]["ours"]]
            moved, computed = repeats[0]["bytes"] / 1e9, repeats[0]["operations"] / 1e9
            wall = statistics.median(r["wall"] for r in repeats)
            shares = (moved / wall / best["bandwidth"], computed / wall / best["gflops"])
            cells = f"{moved:.2f} | {shares[0]:.2f} | {computed:.1f} | {shares[1]:.2f}"
            lines.append(f"| {name[8:]} | {group} | {cells} |")
    return lines


def loads(parts: dict) -> str:
    """
    >>> loads({"training": {"load before": 0.1}, "head": {"load before": 0.25}})
    'training 0.1, head 0.25'
    """
    return ", ".join(f"{name} {part['load before']}" for name, part in parts.items())


def sampler_table(rows: dict) -> list[str]:
    columns = ("model", "engine", "group", "repeats", "tokens/s", "CPU s", "tokens", "lengths")
    lines = header(*columns)
    for name in [n for n in rows if n.startswith("sampler")]:
        for side, repeats in rows[name].items():
            for group in filter(str.isdigit, repeats[0] if repeats else {}):
                r = [one[group] for one in repeats]
                own_process = side not in ("vllm", "llama")
                cells = [name[8:], side, group, len(r)]
                cells.append(middle([x["tokens"] / x["wall"] for x in r], 0))
                cells.append(middle([x["cpu"] for x in r]) if own_process else "–")
                cells += [r[0]["tokens"], " / ".join(map(str, r[0]["lengths"].values()))]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def training_table(rows: dict) -> list[str]:
    columns = ("work", "side", "repeats", "tokens/s", "wall s", "CPU s", "of it sampling s")
    lines = header(*columns, "peak MB")
    for name in [n for n in rows if n.startswith(("sft", "grpo"))]:
        for side, r in rows[name].items():
            if not r:  # the run was stopped before
                continue
            cells = [name, side, len(r), middle([x["tokens"] / x["wall"] for x in r])]
            cells += [middle([x[key] for x in r]) for key in ("wall", "cpu", "sampling")]
            cells.append(middle([x["peak"] for x in r], 0))
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def settings_table(tried: dict) -> list[str]:
    lines = header("work", "side", "settings", "wall s")
    for sides, candidates in tried.items():
        for more, wall in candidates:
            settings = ", ".join(f"{key} {value}" for key, value in more.items())
            lines.append(f"| {sides} | {settings} | {wall:.1f} |")
    return lines


def head_table(rows: dict) -> list[str]:
    lines = header("vocabulary", "tokens a pass", "s", "peak MB", "without embeddings")
    for key, r in rows.items():
        cells = [key.replace(",", " | "), middle([x["wall"] for x in r])]
        cells.append(middle([x["peak"] for x in r], 0))
        cells.append(middle([x["peak"] - x["embedding"] for x in r], 0))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def goals_table(found: dict) -> list[str]:
    lines = ["| figure | goal | found | |", "|" + "---|" * 4]
    for goal in GOALS.replace("\n", " ").split(", "):
        name, sign, bound = goal.split()
        value = found[name.split(".")[0]].get(name.split(".")[1])
        said = "not measured"
        if value is not None:
            said = "met" if (value >= float(bound)) == (sign == ">=") else "**missed**"
        lines.append(f"| {name} | {sign} {bound} | {value} | {said} |")
    return lines


def tables(bench: Bench, found: dict) -> str:
    """The page."""
    rows, about = bench.rows, {k: v for k, v in bench.about.items() if k not in ("parts", "tried")}
    before = f"Load average before {loads(bench.about['parts'])}."
    lines = ["# Speed and memory beside the peers", "", f"{about}", ""]
    lines += [f"Medians [ranges]; every repeat in speed.json. {before}", ""]
    lines += ["## Sampler, tokens/s", "", *sampler_table(rows), "", NOTES[0], ""]
    lines += ["## Limits", "", *limits(rows), "", NOTES[2], ""]
    lines += ["## Training", "", *training_table(rows), "", NOTES[1], ""]
    lines += ["## Settings that were tried", "", *settings_table(bench.about["tried"]), ""]
    if "head" in rows:
        lines += ["## Head", "", *head_table(rows["head"]), ""]
    lines += ["## Goals", "", *goals_table(found), "", NOTES[3], ""]
    return "\n".join(lines)


def figures(rows: dict):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def panel(axis, keys, what, label, x):
        for repeats in zip(*(rows["head"][key] for key in keys)):
            values = [r[what] - (r["embedding"] if what == "peak" else 0) for r in repeats]
            axis.plot(x, values, "o", color="C0", alpha=0.5)
        axis.set(ylabel=label, ylim=(0, None))

    keys = [f"32000,{t}" for t in TOKENS]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    panel(axes[0], keys, "peak", "peak memory without embeddings, MB", TOKENS)
    panel(axes[1], keys, "wall", "seconds, forward and back", TOKENS)
    for axis in axes:
        axis.set(xlabel="tokens per micro-batch", xlim=(0, None))
    figure.savefig(OUT / "tokens.png", dpi=120)
    figure, axis = plt.subplots(figsize=(4.5, 3.5), layout="constrained")
    panel(
        axis,
        [f"{v},4096" for v in VOCABULARIES],
        "peak",
        "peak memory without embeddings, MB",
        VOCABULARIES,
    )
    axis.set(xlabel="vocabulary", xscale="log")
    figure.savefig(OUT / "vocabulary.png", dpi=120)


PARTS = {"training": training_bench, "head": head_bench}
PARTS |= {f"sampler {name}": partial(sampler_bench, name=name) for name in SAMPLED}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--vllm", default=".venv-vllm/bin/python", help="python of an environment with vLLM"
    )
    parser.add_argument(
        "--llama", default=".venv-llama/build/bin/llama-server", help="llama.cpp's server"
    )
    parser.add_argument("--quick", action="store_true", help="one repeat of less work")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--parts",
        nargs="*",
        default=list(PARTS),
        choices=list(PARTS),
        help="none: only the pages again",
    )
    options = parser.parse_args()
    bench = Bench(options.threads, 1 if options.quick else options.repeats)
    if set(options.parts) != set(PARTS) and (OUT / "speed.json").exists():
        bench.load()
    for part in options.parts:
        bench.begin(part)
        PARTS[part](bench, options)
    if "head" in bench.rows:
        figures(bench.rows)
    found = compare(bench.rows)
    text = tables(bench, found)
    (OUT / "speed.md").write_text(text)
    print(f"\n{text}\n{json.dumps(found)}")


if __name__ == "__main__":
    main()
