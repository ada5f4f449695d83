"""Stage 01 · own answers: the model answers every prompt N times, and a guard labels each answer.

    for each prompt x:   y_1 … y_N ~ pi(. | x),   label_i = guard(x, answer of y_i)

SInternal (arXiv 2605.08930) verifies the model's *own* answers, so this is where its data begins: N = 8, and only
prompts whose eight answers are both safe and unsafe ("mixed") teach a harmful row of stage 02. The summary counts them.

What the paper does not say, and our choice:
1. Who labels the eight answers: a guard, on the answer alone; the thinking is never shown to it.
2. Decoding: the model card's, from the preset.
3. A response cut before `</think>` has no answer; it keeps its row and gets the label "none".

    python 01_generate.py                                       # the miniature world
    python 01_generate.py --preset qwen3-0.6b --engine vllm --prompts my_prompts.jsonl
    accelerate launch --num_processes 8 01_generate.py …        # each process answers and labels its share
    python 01_generate.py --model Qwen/Qwen3-4B@http://host:8000/v1 …    # answers come from a running `vllm serve`

in:  --prompts   JSONL, CSV, Parquet or hub dataset with prompt and harmful (README, "Prompt files")
out: <run>/responses.jsonl   one line per prompt: id, prompt, harmful, samples [{thinking, answer, state, tokens}]
     <run>/labels.jsonl      one line per prompt: id, verdicts [{safety, refusal, probability of that safety label}]
"""

from collections import Counter
from dataclasses import dataclass, field

from bench.plan import Plan, dry_run
from common import Judge, Sampling, SamplingOptions, answer_prompts, judge_samples, load_prompts
from common import open_run, open_sampler, parse_options, require_model, run_stage, summary


@dataclass
class Options(SamplingOptions):
    # folder of this run: options and rows; the same command again goes on where it stopped
    run: str = "runs/01_generate"
    # the model that answers: Hugging Face id or folder, or model@URL if a `vllm serve` runs that very model
    model: str = "tiny/lrm"
    # labels each answer: a model (or model@URL) that writes Qwen3Guard's format, or a .py file with judge(prompt,
    # answer) -> str
    guard: str = "tiny/guard"
    prompts: list[str] = field(default_factory=list)  # prompt files or hub datasets; all are joined
    n: int = 8  # responses per prompt (SInternal: 8)
    limit: int = 0  # take this many rows of each prompt file, drawn once with a fixed seed; 0 = all


def costs(plan: Plan, options: Options, rows: list[dict]):
    plan.samples("answers", options.model, len(rows), options.n, options.max_new_tokens)
    plan.judges(options.guard, len(rows) * options.n)


def main():
    options = parse_options(Options, __doc__)
    rows = load_prompts(options.prompts, options.limit)
    require_model(options.model, served=True)
    require_model(options.guard, endpoint=True)
    if options.dry_run:
        return dry_run(options, options.model, rows, costs)
    run = open_run(options)

    # 1. Answer. Every finished prompt is one line; a killed run goes on with the prompts that have none.
    sampling = Sampling(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed)
    sampler = open_sampler(options.model, options)
    template = {"enable_thinking": options.enable_thinking}
    rows = answer_prompts(sampler, rows, run / "responses.jsonl", options.n, sampling, template)
    sampler.close()  # its memory goes to the guard

    # 2. Label. The guard reads the prompt and the answer, not the thinking (trap 1).
    guard = Judge(options.guard, options)
    verdicts = judge_samples(guard, rows, run / "labels.jsonl", lambda sample: sample["answer"])

    # 3. What stage 02 will find: a harmful prompt teaches only if its answers are mixed.
    kinds, states, labels, refusals = Counter(), Counter(), Counter(), Counter()
    for row in rows:
        safety = {v["safety"] for v in verdicts[row["id"]]} & {"safe", "unsafe"}
        kind = "mixed" if len(safety) == 2 else f"always {safety.pop()}" if safety else "other"
        kinds["harmful" if row["harmful"] else "benign", kind] += 1
        states.update(sample["state"] for sample in row["samples"])
        labels.update(v["safety"] for v in verdicts[row["id"]])
        refusals.update(v["refusal"] for v in verdicts[row["id"]])
    count = sum(states.values())
    summary(
        run,
        "01_generate",
        {
            "prompts": f"{len(rows)}, {options.n} responses each",
            "harmful": ", ".join(f"{v} {k[1]}" for k, v in sorted(kinds.items()) if k[0] == "harmful") or "none",
            "benign": ", ".join(f"{v} {k[1]}" for k, v in sorted(kinds.items()) if k[0] == "benign") or "none",
            "thinking": ", ".join(f"{v / count:.1%} {k}" for k, v in states.most_common()),
            "labels": ", ".join(f"{v} {k}" for k, v in labels.most_common()) + f" (guard {options.guard})",
            "refusals": ", ".join(f"{v} {k}" for k, v in refusals.most_common()),
            "tokens": f"{sum(s['tokens'] for r in rows for s in r['samples']) / count:.0f} a response on average",
            "written": f"{run}/responses.jsonl, {run}/labels.jsonl",
        },
        f"python 02_verify_sft.py --responses {run}",
    )


if __name__ == "__main__":
    run_stage(main)
