"""Teacher flip rate (arXiv 2605.15239): how often a steering text turns an unsafe answer safe.

python forks/flip_rates.py --model tiny/lrm     # options of stage 04; seconds for tiny/lrm
"""

import math

import table  # first: it opens the project's folder for imports

import engines
import judges
import plumbing
from common import messages_of, split_response

grpo = table.stage("04_grpo")
steering = table.stage("03_steer_selfgen")


def flip_rates(sampler, options) -> dict[str, float]:
    """{steering text: of the harmful training prompts that are answered unsafely, once each, the
    share that the same model answers safely behind that text}; the guard says what is safe."""
    guard = judges.Judge(options.guard, options)
    sampling = engines.Sampling(options.max_new_tokens, options.temperature, seed=options.seed)
    template = {"enable_thinking": options.enable_thinking}

    def labels(rows: list[dict], name: str) -> list[str]:
        chats = [(r["id"], messages_of(r["prompt"])) for r in steering.steered(rows, name)]
        pairs = [()] * len(rows)
        for i, [reply] in sampler.replies(chats, 1, sampling, **template):
            _, answer, _ = split_response(reply.text, reply.opened)
            pairs[i] = (rows[i]["prompt"], answer)  # the guard never sees the steering
        return [verdict["safety"] for verdict in guard.verdicts(pairs)]

    rows = plumbing.load_prompts(options.prompts, options.limit)
    rows = [row for row in rows if plumbing.kind_of(row) == "harmful"]
    unsafe = [row for row, label in zip(rows, labels(rows, "none")) if label in judges.UNSAFE]
    if not unsafe:
        plumbing.fail("no plain answer is unsafe, so that no text can turn one; other --prompts?")
    names = [name for name in steering.STEERING if name != "none"]
    return {name: labels(unsafe, name).count("safe") / len(unsafe) for name in names}


if __name__ == "__main__":
    bounds = {"lora_rank": (0, math.inf)}  # as in the stage: 0 trains all weights
    options = plumbing.parse_options(grpo.Options, grpo.__doc__, bounds=bounds)
    for name, rate in flip_rates(engines.open_sampler(options.model, options), options).items():
        print(f"{name:8} {rate:.2f}")
