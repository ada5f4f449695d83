"""One process of `bench/speed.py`: one engine samples from one model, group size after group size.

    python bench/sampler.py '{"engine": "ours", "model": "tiny/lrm", "prompts": 8, "rows": 64, "groups": [1, 8], ...}'

Engines: ours (HfSampler), dynamic and static (transformers.generate with that cache), vllm. All answer the same prompt
ids at the same temperature, without top-k and top-p, up to the same number of tokens; a token counts up to and with the
end token. Responses end by themselves, so lengths have a model's own spread. Ours and vLLM also return log-probs.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.clock import Clock, finish, settings  # noqa: E402
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


class Generate:
    """transformers.generate, all rows in one left-padded batch."""

    def __init__(self, model, tokenizer, cache: str):
        self.model, self.cache = model, cache
        self.eos = torch.tensor(sorted(HfSampler(model, tokenizer, 0).eos))

    def lengths(self, requests, group: int, s: Sampling) -> list[int]:
        width = max(len(ids) for _, ids in requests)
        rows = torch.tensor([[0] * (width - len(ids)) + ids for _, ids in requests])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in requests])
        torch.manual_seed(s.seed)
        out = self.model.generate(
            rows,
            attention_mask=mask,
            do_sample=True,
            temperature=s.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=s.max_new_tokens,
            num_return_sequences=group,
            eos_token_id=self.eos.tolist(),
            pad_token_id=0,
            cache_implementation=self.cache,
        )[:, width:]
        ended = torch.isin(out, self.eos).int()
        return (ended.cumsum(1) - ended == 0).sum(1).tolist()  # up to and with the first end token


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
    else:
        model = load_model(wanted["model"])
        model.set_attn_implementation("sdpa")  # transformers' own
        engine = Generate(model, tokenizer, wanted["engine"])

    def sample(group: int, s: Sampling) -> list[int]:
        asked = requests[: wanted["rows"] // group]
        if wanted["engine"] in ("dynamic", "static"):
            return engine.lengths(asked, group, s)
        return [len(one.ids) for _, samples in engine.generate(asked, group, s) for one in samples]

    s = Sampling(wanted["max_new_tokens"], 1.0)
    sample(2, s._replace(max_new_tokens=4))  # caches, kernels, threads
    found = {}
    for group in wanted["groups"]:
        clock = Clock()
        lengths = sorted(sample(group, s))
        assert (
            len(lengths) == group * min(len(requests), wanted["rows"] // group)
            and lengths[-1] <= s.max_new_tokens
        )
        spread = {
            "shortest": lengths[0],
            "median": lengths[len(lengths) // 2],
            "longest": lengths[-1],
        }
        found[str(group)] = {"tokens": sum(lengths), "lengths": spread, **clock.read()}
    if wanted["engine"] == "vllm":
        engine.close()
    finish(found)


if __name__ == "__main__":
    main()
