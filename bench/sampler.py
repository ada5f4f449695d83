"""One process of `bench/speed.py`: one engine samples from one model, group size after group size.

    python bench/sampler.py '{"engine": "ours", "model": "tiny/lrm", "prompts": 8, "rows": 64, "groups": [1, 8], ...}'

Engines: ours (HfSampler), vllm, and those of bench/peers.py: dynamic and static (transformers.generate with that cache),
continuous (transformers.generate_batch), llama (llama.cpp's server). All answer the same prompts at the same
temperature, without top-k and top-p, up to the same number of tokens; a token counts up to and with the end token.
Responses end by themselves, so lengths have a model's own spread. Ours and vLLM also return log-probs. Before
llama.cpp is measured, its greedy answers must begin as ours do: other weights would be another model.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.clock import Clock, finish, settings  # noqa: E402
from bench.limits import least_work, shape_of  # noqa: E402
from bench.peers import Continuous, Generate, Llama, same_beginnings  # noqa: E402
from common import load_model, load_tokenizer, render_chat  # noqa: E402
from engines import Sampling  # noqa: E402
from engines.hf import HfSampler  # noqa: E402
from engines.vllm import VllmSampler  # noqa: E402
from plumbing import read_jsonl  # noqa: E402

BATCH_TOKENS = 65_536
TINY = "tiny/prompts/train.jsonl", "tiny/prompts/train_sums.jsonl"  # what stage 04 answers there
QUESTIONS = """What is the capital of France? Answer in one word.
Explain in a few sentences why bread rises.
Name three colours.
Write a short story about a lighthouse keeper who finds a letter.
Is a tomato a fruit? Answer yes or no.
How do I boil an egg?
Translate "good morning" into Spanish.
List the steps to change a bicycle tyre.""".split("\n")


class Ours:
    """Our samplers, asked as the peers are. `answers`: {request: lengths of its answers}, the last time."""

    def __init__(self, sampler):
        self.sampler, self.answers = sampler, {}

    def lengths(self, requests, group: int, s: Sampling) -> list[int]:
        rows = self.sampler.generate(requests, group, s)
        self.answers = {i: [len(one.ids) for one in row] for i, row in rows}
        return sum(self.answers.values(), [])

    def close(self):
        self.sampler.close()


def requests_for(model: str, tokenizer, count: int) -> list[tuple[str, list[int]]]:
    texts = QUESTIONS
    if model == "tiny/lrm":
        rows = [row for file in TINY for row in read_jsonl(file)]
        texts = [row["prompt"] for row in rows[:: len(rows) // count]]
    chats = [[{"role": "user", "content": text}] for text in texts[:count]]
    return [(str(i), render_chat(tokenizer, chat)[0]) for i, chat in enumerate(chats)]


def open_engine(wanted: dict, tokenizer):
    name, model = wanted["engine"], wanted["model"]
    if name == "ours":
        return Ours(HfSampler(load_model(model), tokenizer, BATCH_TOKENS))
    if name == "vllm":
        return Ours(VllmSampler(model, tokenizer))
    if name == "llama":
        return Llama(wanted["server"], wanted["weights"], tokenizer)
    theirs = load_model(model)
    theirs.set_attn_implementation("sdpa")  # transformers' own
    if name == "continuous":
        return Continuous(theirs, tokenizer)
    return Generate(theirs, tokenizer, name)


def require_same_beginnings(llama: Llama, model: str, requests) -> int:
    """How many of llama.cpp's greedy answers begin as ours do: three in four at least."""
    ours = HfSampler(load_model(model), llama.tokenizer, BATCH_TOKENS)
    greedy = ours.generate(requests, 1, Sampling(8, 0.0))
    same = same_beginnings({requests[i][0]: one.ids for i, [one] in greedy}, llama, requests, 8)
    assert same >= 0.75 * len(requests), f"llama.cpp begins {same} of {len(requests)} as we do"
    return same


def measured(engine, requests, group: int, s: Sampling) -> dict:
    clock = Clock()
    lengths = sorted(engine.lengths(requests, group, s))
    clock = clock.read()
    assert len(lengths) == group * len(requests) and lengths[-1] <= s.max_new_tokens
    spread = {
        "shortest": lengths[0],
        "median": lengths[len(lengths) // 2],
        "longest": lengths[-1],
    }
    return {"tokens": sum(lengths), "lengths": spread, **clock}


def main():
    wanted = settings()
    tokenizer = load_tokenizer(wanted["model"])
    requests = requests_for(wanted["model"], tokenizer, wanted["prompts"])
    engine, results = open_engine(wanted, tokenizer), {}
    if wanted["engine"] == "llama":
        results["same beginnings"] = require_same_beginnings(engine, wanted["model"], requests)
    s = Sampling(wanted["max_new_tokens"], 1.0)
    engine.lengths(requests, 2, s._replace(max_new_tokens=4))  # caches, kernels, threads
    for group in wanted["groups"]:
        asked = requests[: wanted["rows"] // group]
        row = measured(engine, asked, group, s)
        if wanted["engine"] == "ours":
            prompts = [len(asked[i][1]) for i in engine.answers]
            row |= least_work(shape_of(engine.sampler.model), prompts, [*engine.answers.values()])
        results[str(group)] = row
    if wanted["engine"] in ("vllm", "llama"):
        engine.close()
    finish(results)


if __name__ == "__main__":
    main()
