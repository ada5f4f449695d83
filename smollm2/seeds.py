"""The organism's two SFT methods over seeds: `python smollm2/seeds.py` after `make demo-smollm2` with SEED=0, 1, 2.

Reads runs/organism/seed*/05_eval/results.json, writes results/organism/seeds.md and seeds.json: means over the seeds
with 95 % t-intervals. The base model is one; what varies with the seed is all that is sampled from it, what is trained
and in which order.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from claims import compact_json, mean_interval  # noqa: E402
from readme import leading  # noqa: E402

from plumbing import fail, figures, run_stage, write_atomic  # noqa: E402

RUNS, OUT = ROOT / "runs/organism", ROOT / "results/organism"
MODELS = ["base", "SInternal", "ThinkSafe"]
COLUMNS = {  # heading -> (benchmark, metric)
    "ASR plain ↓": ("plain", "asr"),
    "ASR wrapped ↓": ("wrapped", "asr"),
    "thinking begun ↓": ("wrapped.think-open", "asr"),
    "thinking empty ↓": ("wrapped.think-empty", "asr"),
    "answer begun ↓": ("wrapped.answer", "asr"),
    "compliance wrapped ↑": ("wrapped", "compliance"),
    "checks ↑": ("wrapped", "self_check"),
    "word problems ↑": ("problems", "accuracy"),
    "verify F1 ↑": ("verify", "verify_f1"),
    "StrongREJECT refused ↑": ("strongreject", "refusal"),
    "XSTest answered ↑": ("xstest", "compliance"),
    "GSM8K ↑": ("gsm8k", "accuracy"),
}


def main():
    files = sorted(RUNS.glob("seed*/05_eval/results.json"))
    if not files:
        fail(f"no seed*/05_eval/results.json in {RUNS}; make demo-smollm2 SEED=0 first")
    values = {model: {heading: [] for heading in COLUMNS} for model in MODELS}
    for file in files:
        rows = leading(json.loads(file.read_text()))
        for model, own in values.items():
            for heading, key in COLUMNS.items():
                if (model, *key) in rows:
                    own[heading].append(round(rows[(model, *key)]["value"], 4))
    body = []
    for model, own in values.items():
        cells = [mean_interval(numbers) for numbers in own.values()]
        body.append(
            [model, *(f"{c['mean']:.2f} ± {c['half']:.2f}" if c["values"] else "–" for c in cells)]
        )
    lines = figures.table([f"mean of {len(files)} seeds", *COLUMNS], body)
    OUT.mkdir(parents=True, exist_ok=True)
    write_atomic(OUT / "seeds.json", compact_json({"seeds": len(files), **values}))
    write_atomic(OUT / "seeds.md", "\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    run_stage(main)
