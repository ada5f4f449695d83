"""Models behind an OpenAI-compatible URL, named `model@https://host/v1`. A key, if the server needs
one, stands in the environment variable OPENAI_API_KEY and nowhere else."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress

from common import load_tokenizer
from engines.base import Reply, Sample, Sampler, Sampling, end_tokens_of, request_seed
from plumbing import fail


class Client:
    at_once = 32  # requests side by side
    seconds = 600  # the longest wait for an answer

    def __init__(self, name: str):
        from openai import OpenAI, Timeout

        self.name = name
        self.model, _, url = name.rpartition("@")
        self.client = OpenAI(
            base_url=url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=Timeout(self.seconds, connect=30),
            max_retries=6,  # each after a longer wait
        )

    def answers(self, create, requests: list[dict], read, wanted: str):
        """Yields (index into requests, read(answer)) as they come; `read` gives nothing, or raises,
        if the answer isn't what is `wanted`. A request that still fails after the retries ends the
        stage, once those beside it have come back."""
        errors: list[BaseException] = []

        def ask(request):
            if errors:
                raise errors[0]
            for attempt in range(3):  # the client repeats what fails; this, what is not wanted
                time.sleep(attempt)
                body = create(**request).text
                with suppress(ValueError, LookupError, TypeError, AttributeError):
                    answer = read(json.loads(body))
                    if answer:
                        return answer
            raise ValueError(f"no {wanted}, but {body[:120]!r}")

        pool = ThreadPoolExecutor(self.at_once)
        try:
            jobs = {pool.submit(ask, request): index for index, request in enumerate(requests)}
            for job in as_completed(jobs):
                index = jobs.pop(job)  # and with it the answer's memory
                error = job.exception()  # the client's, the network's, or ours above
                if error:
                    errors.append(error)
                else:
                    yield index, job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if errors:
            text = " ".join(str(errors[0]).split()).replace(self.client.api_key, "OPENAI_API_KEY")
            what = f"{type(errors[0]).__name__}: {text[:200]}"
            fail(f"{self.name}: {what}; finished rows are kept, the same command goes on")

    def close(self):
        self.client.close()


class Endpoint(Client):
    """Chats in, texts out, as any endpoint can; template and tokenizer are the server's."""

    def replies(self, chats: list[tuple[str, list[dict]]], n: int, s: Sampling, **_):
        """As Sampler.replies."""
        fixed = {
            "model": self.model,
            "n": n,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "max_completion_tokens": s.max_new_tokens,
        }
        requests = []
        for key, messages in chats:
            requests.append({**fixed, "seed": request_seed(s.seed, key, 7), "messages": messages})

        def read(answer):
            usage = answer.get("usage") or {}  # some servers count no tokens
            prompt_tokens = usage.get("prompt_tokens") or 0
            tokens = (usage.get("completion_tokens") or 0) // n
            replies = []
            for choice in answer["choices"]:
                text = (choice["message"].get("content") or "").strip()
                text = text.encode("utf-8", "replace").decode()  # halves of surrogates
                finish = choice["finish_reason"]
                replies.append(Reply(text, False, prompt_tokens, tokens, finish, None))
            return replies if len(replies) == n else None

        create = self.client.chat.completions.with_raw_response.create
        return self.answers(create, requests, read, f"chat completion with {n} choices")


class ServerSampler(Client, Sampler):
    """A running `vllm serve`, which has engines on as many machines as it likes. Token ids go there
    and come back: template and end tokens are those of the folder or hub id here. Log-probs are
    those at the sampling temperature if the server was started with `--logprobs-mode
    processed_logprobs`, else at temperature 1; where top-k or top-p cuts, vLLM gives those of what
    is left."""

    at_once = 256  # enough for several engines
    seconds = 7200  # a long answer may have to wait for its turn

    def __init__(self, name: str):
        super().__init__(name)
        self.tokenizer = load_tokenizer(self.model)
        self.eos = end_tokens_of(self.model, self.tokenizer)

    def generate(self, requests: list[tuple[str, list[int]]], n: int, s: Sampling):
        """As HfSampler.generate. All that sampling hangs on is said: a penalty left out would be
        the one of the model's generation config. Greedy samples are one: vLLM refuses to draw
        several."""
        count = n if s.temperature else 1
        fixed = {
            "model": self.model,
            "n": count,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "logprobs": 0,
            "max_tokens": s.max_new_tokens,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "extra_body": {
                "top_k": s.top_k,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "stop_token_ids": sorted(self.eos),
                "return_token_ids": True,
            },
        }
        bodies = []
        for key, ids in requests:
            bodies.append({**fixed, "seed": request_seed(s.seed, key), "prompt": ids})

        def read(answer):
            samples = []
            for choice in answer["choices"]:
                ids = [int(token) for token in choice["token_ids"]]
                log_probs = [float(p) for p in choice["logprobs"]["token_logprobs"]]
                finish = choice["finish_reason"]
                if len(ids) == len(log_probs) > 0 and finish in ("stop", "length"):
                    samples.append(Sample(ids, log_probs, finish))
            return samples * (n // count) if len(samples) == count else None

        gives = "as `vllm serve --logprobs-mode processed_logprobs` gives"
        wanted = f"completion with {count} choices, token ids and log-probs, {gives}"
        create = self.client.completions.with_raw_response.create
        return self.answers(create, bodies, read, wanted)
