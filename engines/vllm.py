"""The same over vLLM: continuous batching, prefix caching, a seed per request."""

import gc
import os
from functools import cache
from pathlib import Path

import torch

import plumbing
from engines.base import Sample, Sampler, Sampling, end_tokens_of, request_seed


@cache
def visible_gpus() -> list[str]:
    """The GPUs that this process saw before its first engine, which then sees one of them."""
    every_gpu = ",".join(map(str, range(torch.cuda.device_count())))
    return (os.environ.get("CUDA_VISIBLE_DEVICES") or every_gpu).split(",")


class WeightReceiver:
    """What vLLM's worker learns from us (worker_extension_cls)."""

    def receive_weights(self, folder: str):
        self.reload_weights(weights_path=folder)
        # vLLM 0.32 on a CPU: a head tied to the embedding keeps its old packed copy
        if not torch.cuda.is_available():
            head = self.model_runner.get_model().lm_head
            head.quant_method.process_weights_after_loading(head)


class VllmSampler(Sampler):
    def __init__(self, name: str, tokenizer, dtype="auto", tensor_parallel=1, beside_trainer=False):
        from vllm import LLM

        extra = {"tensor_parallel_size": tensor_parallel, "dtype": plumbing.choose_dtype(dtype)}
        if beside_trainer:
            extra["worker_extension_cls"] = "engines.vllm.WeightReceiver"
        if beside_trainer and torch.cuda.is_available():
            extra |= {"enable_sleep_mode": True, "gpu_memory_utilization": 0.5}
        here = plumbing.processes()
        if not torch.cuda.is_available():
            # vLLM 0.32 on a CPU: a prompt prefilled in chunks breaks seeded requests
            extra |= {"enforce_eager": True, "enable_chunked_prefill": False}
        elif here.num_processes > 1:  # one engine and one GPU for each process
            os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus()[here.local_process_index]
        config = plumbing.model_config(name).get_text_config()
        context = plumbing.context_of(config)
        if context < getattr(config, "max_position_embeddings", context):
            extra["max_model_len"] = context
        self.llm = LLM(
            model=name, enable_prefix_caching=True, logprobs_mode="processed_logprobs", **extra
        )
        self.tokenizer, self.eos = tokenizer, end_tokens_of(name, tokenizer)
        self.context = self.llm.model_config.max_model_len
        self.asleep = False

    def generate(self, requests: list[tuple[str, list[int]]], n: int, s: Sampling):
        """As HfSampler.generate. Greedy samples are one: vLLM refuses to draw several."""
        from vllm import SamplingParams

        count = n if s.temperature else 1
        fixed = {
            "n": count,
            "temperature": s.temperature,
            "top_p": s.top_p,
            "top_k": s.top_k or -1,
            "max_tokens": s.max_new_tokens,
            "stop_token_ids": sorted(self.eos),
            "logprobs": 0,
        }
        for start in range(0, len(requests), 256):  # in blocks, so that rows reach the disk early
            block = requests[start : start + 256]
            params = [SamplingParams(seed=request_seed(s.seed, key), **fixed) for key, _ in block]
            prompts = [{"prompt_token_ids": ids} for _, ids in block]
            outputs = self.llm.generate(prompts, params, use_tqdm=False)
            for index, output in enumerate(outputs, start):
                samples = []
                for o in output.outputs:
                    log_probs = [by_id[t].logprob for t, by_id in zip(o.token_ids, o.logprobs)]
                    samples.append(Sample(list(o.token_ids), log_probs, o.finish_reason))
                yield index, samples * (n // count)

    def load_weights(self, folder: Path):
        """A checkpoint's weights in place of its own; what it cached with the old ones is
        forgotten."""
        if self.asleep:
            gc.collect()
            torch.cuda.empty_cache()  # blocks that the trainer's allocator keeps are not free
            self.llm.wake_up()
            self.asleep = False
        self.llm.collective_rpc("receive_weights", args=(str(folder),))
        self.llm.reset_prefix_cache()

    def sleep(self):
        """Gives its GPU memory to the trainer until the next load_weights."""
        if torch.cuda.is_available():
            self.llm.sleep(level=1)
            self.asleep = True

    def close(self):
        """Ends the engine's processes: a deleted LLM object alone keeps them, and the GPU's memory,
        alive."""
        self.llm.llm_engine.engine_core.shutdown()
