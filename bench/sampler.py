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

QUESTIONS = """What is the capital of France? Answer in one word.
Explain in a few sentences why bread rises.
Name three colours.
Write a short story about a lighthouse keeper who finds a letter.
Is a tomato a fruit? Answer yes or no.
How do I boil an egg?
Translate "good morning" into Spanish.
List the steps to change a bicycle tyre.""".split("\n")


def main():
    wanted = settings()
    tokenizer = load_tokenizer(wanted["model"])
    if wanted["model"] == "tiny/lrm":
        files = [
            "tiny/prompts/train.jsonl",
            "tiny/prompts/train_sums.jsonl",
        ]  # what stage 04 answers by default
        rows = [row for file in files for row in read_jsonl(file)]
        texts = [row["prompt"] for row in rows[:: len(rows) // wanted["prompts"]]]
    else:
        texts = QUESTIONS
    chats = [[{"role": "user", "content": text}] for text in texts[: wanted["prompts"]]]
    requests = [(str(i), render_chat(tokenizer, chat)[0]) for i, chat in enumerate(chats)]
    if wanted["engine"] == "vllm":
        engine = VllmSampler(wanted["model"], tokenizer)
    elif wanted["engine"] == "ours":
        engine = HfSampler(load_model(wanted["model"]), tokenizer, 65_536)
    elif wanted["engine"] == "llama":
        engine = Llama(wanted["server"], wanted["weights"], tokenizer)
        greedy = HfSampler(load_model(wanted["model"]), tokenizer, 65_536).generate(
            requests, 1, Sampling(8, 0.0)
        )
        greedy = {requests[i][0]: one.ids for i, [one] in greedy}
        same = same_beginnings(greedy, engine, requests, 8)
        assert same >= 0.75 * len(requests), f"llama.cpp begins {same} of {len(requests)} as we do"
    else:
        model = load_model(wanted["model"])
        model.set_attn_implementation("sdpa")  # transformers' own
        if wanted["engine"] == "continuous":
            engine = Continuous(model, tokenizer)
        else:
            engine = Generate(model, tokenizer, wanted["engine"])

    answers = {}  # lengths of the answers to each request, of the samplers that are ours

    def sample(group: int, s: Sampling) -> list[int]:
        asked = requests[: wanted["rows"] // group]
        if wanted["engine"] not in ("ours", "vllm"):
            return engine.lengths(asked, group, s)
        sizes = {i: [len(one.ids) for one in row] for i, row in engine.generate(asked, group, s)}
        answers.update(sizes)
        return sum(sizes.values(), [])

    s = Sampling(wanted["max_new_tokens"], 1.0)
    sample(2, s._replace(max_new_tokens=4))  # caches, kernels, threads
    found = {}
    for group in wanted["groups"]:
        answers.clear()
        clock = Clock()
        lengths = sorted(sample(group, s))
        clock = clock.read()
        assert (
            len(lengths) == group * min(len(requests), wanted["rows"] // group)
            and lengths[-1] <= s.max_new_tokens
        )
        spread = {
            "shortest": lengths[0],
            "median": lengths[len(lengths) // 2],
            "longest": lengths[-1],
        }
        found[str(group)] = {"tokens": sum(lengths), "lengths": spread, **clock}
        if wanted["engine"] == "ours":
            prompts = [len(requests[i][1]) for i in answers]
            found[str(group)] |= least_work(shape_of(engine.model), prompts, [*answers.values()])
    if wanted["engine"] in ("vllm", "llama"):
        engine.close()
    if wanted["engine"] == "llama":
        found["same beginnings"] = same
    finish(found)


if __name__ == "__main__":
    main()
