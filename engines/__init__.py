"""Who writes tokens: our loop (hf.py), vLLM (vllm.py), a server (server.py), all with the methods
of base.py's Sampler. An engine's packages are imported when it is opened."""

import time
from pathlib import Path

import plumbing
from common import chat_of, load_model, load_tokenizer, render_chat, show_prompt, split_response
from engines.base import DECODINGS, Reply, Sample, Sampler, Sampling, plain_folder, sampling_of


def open_sampler(name: str, options, endpoint: bool = False):
    """The engine of `options` with the model loaded, or the server that has it: one that gives
    token ids for a model that answers, any `endpoint` for guards, judges and experts. close() it
    before the next one."""
    if plumbing.is_endpoint(name):
        from engines.server import Endpoint, ServerSampler

        return Endpoint(name) if endpoint else ServerSampler(name)
    tokenizer = load_tokenizer(name)
    if options.engine == "vllm":
        from engines.vllm import VllmSampler

        with plain_folder(name, tokenizer, getattr(options, "run", "")) as folder:
            return VllmSampler(folder, tokenizer, options.dtype, options.tensor_parallel)
    from engines.hf import HfSampler

    return HfSampler(load_model(name, options.dtype), tokenizer, options.batch_tokens)


def open_training_sampler(trainer, tokenizer, options):
    """The engine that samples from a model that is being trained; push(model) before each generate.

    Our loop takes the trainer's own model, unless FSDP holds it in shards: then it has a whole copy
    of its own. vLLM has one always."""
    from accelerate.utils import DistributedType

    sharded = trainer.accelerator.distributed_type == DistributedType.FSDP
    if options.engine == "vllm":
        from engines.vllm import VllmSampler

        how = options.dtype, options.tensor_parallel
        with plain_folder(options.model, tokenizer, options.run) as folder:
            sampler = VllmSampler(folder, tokenizer, *how, beside_trainer=True)
    else:
        from engines.hf import HfSampler

        model = load_model(options.model, options.dtype) if sharded else trainer.model
        sampler = HfSampler(model, tokenizer, options.batch_tokens)
    if sharded or options.engine == "vllm":
        sampler.pushed = (Path(options.run) / "pushed", options.model)
    return sampler


def require_room(sampler, rows: list[dict], **template):
    """Ends the program before any work if a prompt is longer than the model reads."""
    for row in rows:
        if not sampler.fits(chat_of(row), **template):
            reads = f"{sampler.tokenizer.name_or_path} reads {sampler.context} tokens"
            plumbing.fail(f"prompt {row['id'][:99]} is longer: {reads}")


def answer_prompts(
    sampler, rows: list[dict], path: Path, n: int, sampling: Sampling, **template
) -> list[dict]:
    """Samples n responses to each row's prompt; appends one line per prompt to `path` as it is
    done, skipping what is already there.

    Returns all rows, in the order of `rows`, each with "prompt_tokens" and "samples": [{thinking,
    answer, state, finish, tokens}]. `template` are the chat template's options."""

    def work(todo):
        chats = [(row["id"], chat_of(row)) for row in todo]
        if chats and isinstance(sampler, Sampler):
            show_once(sampler.tokenizer, chats[0][1], **template)
        tokens, began = 0, time.time()
        with plumbing.bar_over(len(todo) * n, len(rows) * n, "response") as bar:
            for index, replies in sampler.replies(chats, n, sampling, **template):
                samples = [sample_row(reply) for reply in replies]
                tokens += sum(reply.tokens for reply in replies)
                prompt_tokens = replies[0].prompt_tokens
                yield [{**todo[index], "prompt_tokens": prompt_tokens, "samples": samples}]
                bar.update(n)
                rate = f"{tokens / (time.time() - began):.0f} tokens/s"
                bar.set_postfix_str(rate, refresh=False)

    finished = plumbing.once_per_row(path, rows, work)
    return [finished[row["id"]] for row in rows]


SHOWN: set[str] = set()  # prompts that this program has shown


def show_once(tokenizer, messages: list[dict], **template):
    """The prompt as the model reads it, clear of any bar, unless just that was shown before."""
    from tqdm import tqdm

    ids, _ = render_chat(tokenizer, messages, **template)
    text = tokenizer.decode(ids)
    if text not in SHOWN:
        SHOWN.add(text)
        with tqdm.external_write_mode():
            show_prompt(tokenizer, messages, **template)


def sample_row(reply: Reply) -> dict:
    """What a row keeps of a response. One that somebody had begun is kept, and judged, as the user
    would see it; "own_thinking" is what the model itself added to the thinking."""
    thinking, answer, state = split_response(reply.text, reply.opened)
    sample = {
        "thinking": thinking,
        "answer": answer,
        "state": state,
        "finish": reply.finish,
        "tokens": reply.tokens,
    }
    if reply.begun:
        begun_thinking, _, _ = split_response(reply.begun, reply.opened)
        sample["own_thinking"] = thinking.removeprefix(begun_thinking).strip()
    return sample
