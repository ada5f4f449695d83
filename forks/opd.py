"""On-policy distillation (arXiv 2306.13649, 2306.08543): another model teaches, on own rollouts.

The baseline of ThinkSafe's newest version (there Qwen3-8B teaches Qwen3). As forks/opsa.py, but
the teacher is tiny/expert and reads the prompt as it is. It has learnt to refuse and to verify, and
never a sum, so it may only teach where it knows something: `opd` has the harmful and benign prompts
alone, and nothing holds the sums. `opd-with-sums` lets it teach those too.

    python forks/opd.py         # about four minutes on two cores
"""

import table  # first: it opens the project's folder for imports

import opsa

import plumbing
from common import load_model, load_tokenizer

EXPERT = "tiny/expert"


def expert(trainer, options) -> opsa.Teacher:
    if load_tokenizer(EXPERT).get_vocab() != load_tokenizer(options.model).get_vocab():
        plumbing.fail(f"{EXPERT} reads other tokens than {options.model}: no KL between them")
    return opsa.Teacher(load_model(EXPERT, options.dtype), lambda rollout: rollout.prompt)


if __name__ == "__main__":
    grpo = table.stage("04_grpo")
    grpo.reference_scorer = expert
    grpo.update = opsa.update
    same = ["--beta", 1, "--steps", 60, "--group_size", 4]
    table.run("opd", grpo, *same, "--prompts", "tiny/prompts/train.jsonl")
    table.run("opd-with-sums", grpo, *same)
