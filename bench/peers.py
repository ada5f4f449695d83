"""Who samples beside us in bench/sampler.py: `lengths(requests, group, sampling)` of each says how long its answers are.

Requests are (key, prompt ids), as for our samplers. A length counts up to and with the end token.
"""

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from openai import APIConnectionError, InternalServerError, OpenAI
from transformers import ContinuousBatchingConfig, GenerationConfig

from engines import Sampling
from engines.base import end_tokens
from plumbing.several import free_port


def sampled(model, tokenizer, group: int, s: Sampling) -> dict:
    """Generation settings of transformers for plain sampling."""
    ends = sorted(end_tokens(model.generation_config, tokenizer))
    return {
        "do_sample": True,
        "temperature": s.temperature,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": s.max_new_tokens,
        "num_return_sequences": group,
        "eos_token_id": ends,
        "pad_token_id": 0,
    }


class Generate:
    """transformers.generate, all rows in one left-padded batch, with a cache of a kind ("dynamic", "static")."""

    def __init__(self, model, tokenizer, cache: str):
        self.model, self.tokenizer, self.cache = model, tokenizer, cache

    def lengths(self, requests, group: int, s: Sampling) -> list[int]:
        width = max(len(ids) for _, ids in requests)
        rows = torch.tensor([[0] * (width - len(ids)) + ids for _, ids in requests])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for _, ids in requests])
        torch.manual_seed(s.seed)
        settings = sampled(self.model, self.tokenizer, group, s)
        out = self.model.generate(
            rows, attention_mask=mask, cache_implementation=self.cache, **settings
        )[:, width:]
        ended = torch.isin(out, torch.tensor(settings["eos_token_id"])).int()
        return (ended.cumsum(1) - ended == 0).sum(1).tolist()  # up to and with the first end token


class Continuous:
    """transformers' continuous batching: prompts are computed once for their group, rows come and go.

    Its cache is sized here: by itself it takes 90 % of the machine's memory, and a CPU's pages are real ones. On a CPU
    every row's query reads the keys of all rows behind a mask, so few rows at once are faster than many: on tiny 32
    took a sixth less CPU than 128."""

    def __init__(self, model, tokenizer, page: int = 32, rows_at_once: int = 32):
        self.model, self.tokenizer = model, tokenizer
        self.page, self.rows_at_once = page, rows_at_once

    def lengths(self, requests, group: int, s: Sampling) -> list[int]:
        longest = max(len(ids) for _, ids in requests) + s.max_new_tokens
        config = ContinuousBatchingConfig(
            page_size=self.page,
            num_blocks=len(requests) * group * (longest // self.page + 1),
            max_batch_tokens=512,
            max_requests_per_batch=self.rows_at_once,
            use_cuda_graph=False,
            seed=s.seed,
        )
        outputs = self.model.generate_batch(
            inputs=[ids for _, ids in requests],
            generation_config=GenerationConfig(**sampled(self.model, self.tokenizer, group, s)),
            continuous_batching_config=config,
            progress_bar=False,
        )
        return [len(output.generated_tokens) for output in outputs.values()]


class Llama:
    """llama.cpp's `server` over HTTP, which computes up to `slots` requests together. Prompts go as text, and are read as
    the same number of tokens."""

    def __init__(self, server: str, weights: str, tokenizer, slots: int = 64, context: int = 256):
        self.tokenizer, self.slots, threads = tokenizer, slots, str(torch.get_num_threads())
        port = str(free_port())
        command = [server, "--model", weights, "--ctx-size", str(slots * context)]
        command += ["--parallel", str(slots), "--port", port]
        command += ["--threads", threads, "--threads-batch", threads]
        self.client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self.wait()

    def wait(self, seconds: float = 120):
        end = time.monotonic() + seconds
        while True:
            try:
                return self.complete([self.tokenizer.eos_token_id], Sampling(1, 0.0))
            except (APIConnectionError, InternalServerError):  # still loading
                if self.process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"error: {self.process.args[0]} does not serve the model")
                time.sleep(0.2)

    def complete(self, ids: list[int], s: Sampling) -> tuple[str, int]:
        """Text and number of tokens of one answer."""
        answer = self.client.completions.create(
            model="served",
            prompt=self.tokenizer.decode(ids),
            max_tokens=s.max_new_tokens,
            temperature=s.temperature,
            top_p=1.0,
            seed=s.seed,
            extra_body={"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
        )
        assert answer.usage.prompt_tokens == len(ids), (answer.usage, len(ids))
        return answer.choices[0].text, answer.usage.completion_tokens

    def lengths(self, requests, group: int, s: Sampling) -> list[int]:
        jobs = [(ids, s._replace(seed=s.seed + k)) for _, ids in requests for k in range(group)]
        with ThreadPoolExecutor(self.slots) as pool:
            return [size for _, size in pool.map(lambda job: self.complete(*job), jobs)]

    def close(self):
        self.process.terminate()
        self.process.wait()


def same_beginnings(ours: dict[str, list[int]], theirs: Llama, requests, new: int) -> int:
    """How many of the greedy answers of `new` tokens, of ours by key, llama.cpp writes in the same words."""
    same = 0
    for key, ids in requests:
        text, _ = theirs.complete(ids, Sampling(new, 0.0))
        same += text == theirs.tokenizer.decode(ours[key], skip_special_tokens=True)
    return same
