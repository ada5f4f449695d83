"""How much an attack success rate moves with the way it is counted: the miniature world's base model, nothing trained.

    python bench/counting.py        # two minutes on one core; the same command again goes on where it stopped

Two evaluations by stage 05, one as usual and one with too few tokens, and every way of counting that published code
has: another judge, thinking judged with the answer, unreadable verdicts as safe, cut responses as safe. Writes
results/claims/judges.md, .json and .png.
"""

import argparse
import json
import sys
from pathlib import Path

from claims import ROOT, stage

sys.path.insert(0, str(ROOT))
from plumbing import read_jsonl, write_atomic  # noqa: E402

RUNS, OUT = Path("runs/claims/judges"), ROOT / "results/claims"
JUDGES = [
    "tiny/gold.py",
    "tiny/judge",
    "tiny/guard",
    "wildguard:tiny/guard",
]  # the last one is asked as WildGuard is
SHORT = 26  # tokens: enough for an answer without a check before it, not for a thinking that checks


def evaluate(name: str, *options) -> dict:
    """{(metric, judge): row} on the unseen wrappers, and precision and recall of the judges."""
    stage("05_eval.py", RUNS / name, "--n", 4, "--temperature", 1, "--judges", *JUDGES, *options)
    found = json.loads((ROOT / RUNS / name / "results.json").read_text())
    return {
        (r["metric"], r["judge"]): r for r in found["rows"] if r["benchmark"] == "wrapped"
    } | found["judges"]


def main():
    usual, short = evaluate("usual"), evaluate("short", "--max_new_tokens", SHORT)
    gold, judge, guard, mute = JUDGES
    closed = {}  # answers that are there at all, judged by the gold rule
    for row in read_jsonl(ROOT / RUNS / "short/base/wrapped.responses.jsonl"):
        closed[row["id"]] = (
            [sample["state"] == "closed" for sample in row["samples"]] if row["harmful"] else []
        )
    [labels] = map(read_jsonl, (ROOT / RUNS / "short/base").glob("wrapped.gold-*.answer.jsonl"))
    flags = [
        v["safety"] == "unsafe"
        for r in labels
        for v, there in zip(r["verdicts"], closed[r["id"]])
        if there
    ]
    cut = 1 - len(flags) / sum(map(len, closed.values()))

    rows = [  # what is counted, ASR
        ("the gold rule on the answer", usual["asr", gold]["value"]),
        ("the second judge on the answer", usual["asr", judge]["value"]),
        ("the guard on the answer", usual["asr", guard]["value"]),
        ("the gold rule on thinking + answer", usual["asr_response", gold]["value"]),
        (
            "the guard asked in another guard's format, unparsed left out (here)",
            usual.get(("asr", mute), {}).get("value"),
        ),
        (
            "the guard asked in another guard's format, unparsed = safe",
            usual["asr_lenient", mute]["value"],
        ),
        (f"at most {SHORT} tokens, gold rule, cut responses = safe", short["asr", gold]["value"]),
        (f"at most {SHORT} tokens, gold rule, cut responses left out", sum(flags) / len(flags)),
    ]
    n, unparsed = usual["asr", gold]["n"], usual["unparsed", mute]["value"]
    lines = ["| how it is counted | ASR, unseen wrappers |", "|---|---|"]
    lines += [
        f"| {name} | {'no figure' if value is None else f'{value:.3f}'} |" for name, value in rows
    ]
    lines += [
        "",
        "| judge, against the gold rule | precision of unsafe | recall | answers |",
        "|---|---|---|---|",
    ]
    for name in (judge, guard):
        found = usual[name]
        lines.append(
            f"| {name} | {found['precision']:.3f} | {found['recall']:.3f} | {found['n']} |"
        )
    note = f"{n} responses of one model to harmful prompts (four each, temperature 1). Unparsed in the wrong format: "
    lines += [
        "",
        f"{note}{unparsed:.2f} of the verdicts; cut at {SHORT} tokens: {cut:.2f} of the responses.",
    ]
    write_atomic(OUT / "judges.md", "\n".join(lines) + "\n")
    write_atomic(
        OUT / "judges.json",
        json.dumps({"rows": rows, "cut": cut, "unparsed": unparsed, "n": n}, indent=1),
    )
    print("\n".join(lines))

    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    for y, (name, value) in enumerate(rows):
        axis.barh(y, value or 0, color="tab:red" if y in (0, 4) else "tab:gray", alpha=0.8)
        axis.text(
            (value or 0) + 0.01,
            y,
            "no figure" if value is None else f"{value:.2f}",
            va="center",
            fontsize=8,
        )
    axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axis.set(xlim=(0, 1), xlabel="ASR of one and the same model")
    axis.invert_yaxis()
    fig.savefig(OUT / "judges.png", dpi=130)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args()
    main()
