"""Stage 01 · own answers: the model answers every prompt N times, and a guard labels each answer.

    for each prompt x:   y_1 … y_N ~ pi(. | x),   label_i = guard(x, answer of y_i)

SInternal (arXiv 2605.08930) verifies the model's *own* answers, so this is where its data begins: N
= 8, and only prompts whose eight answers are both safe and unsafe ("mixed") teach a harmful row of
stage 02. The summary counts them.

What the paper does not say, and our choice:
1. Who labels the eight answers: a guard, on the answer alone; the thinking is never shown to it.
2. Decoding: the model card's, from the preset.
3. A response cut before `</think>` has no answer; it keeps its row and gets the label "none".

    python 01_generate.py                                       # the miniature world
    python 01_generate.py --preset qwen3-0.6b --engine vllm --prompts my_prompts.jsonl
    accelerate launch --num_processes 8 01_generate.py …        # each answers and labels its share
    python 01_generate.py --model Qwen/Qwen3-4B@http://host:8000/v1 …    # a running `vllm serve`

in:  --prompts   files or hub datasets of prompts that say which are harmful (docs/data.md)
out: <run>/responses.jsonl   a line per prompt: id, prompt, harmful, samples [{thinking, answer, …}]
     <run>/labels.jsonl      a line per prompt: id, verdicts [{safety, refusal, probability}]
"""

from dataclasses import dataclass, field

import engines
import judges
import plumbing
from common import SamplingOptions, dry_run


@dataclass
class Options(SamplingOptions):
    run: str = "runs/01_generate"  # folder of this run; the same command again goes on
    # the model that answers: Hugging Face id or folder, or model@URL if a `vllm serve` runs that
    # model
    model: str = "tiny/lrm"
    # labels each answer: a model (or model@URL) that writes Qwen3Guard's format, or a .py file with
    # judge(prompt, answer) -> str
    guard: str = "tiny/guard"
    prompts: list[str] = field(default_factory=list)  # prompt files or hub datasets; all are joined
    n: int = 8  # responses per prompt (SInternal: 8)
    # take this many rows of each prompt file, drawn once with a fixed seed; 0 = all
    limit: int = 0


def main():
    options = plumbing.parse_options(Options, __doc__)
    rows = plumbing.load_prompts(options.prompts, options.limit)
    plumbing.require_model(options.model, served=True)
    judges.require_judge(options.guard)
    if options.dry_run:
        return dry_run(options, options.model, rows)
    run = plumbing.open_run(options)

    # 1. Answer. Every finished prompt is one line; a killed run goes on with the prompts without
    # one.
    sampler, sampling = engines.open_sampler(options.model, options), engines.sampling_of(options)
    template = {"enable_thinking": options.enable_thinking}
    path = run / "responses.jsonl"
    rows = engines.answer_prompts(sampler, rows, path, options.n, sampling, **template)
    sampler.close()  # its memory goes to the guard

    # 2. Label. The guard reads the prompt and the answer, not the thinking (trap 1).
    guard = judges.Judge(options.guard, options)
    path = run / "labels.jsonl"
    verdicts = judges.judge_samples(guard, rows, path, lambda sample: sample["answer"])
    plumbing.summarise_01(run, options, rows, verdicts)


if __name__ == "__main__":
    plumbing.run_stage(main)
