"""What every engine takes and gives: chats in, replies out."""

import hashlib
import math
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import plumbing
from common import render_chat, save_checkpoint
from plumbing import fail


class Sampling(NamedTuple):
    max_new_tokens: int
    temperature: float  # 0 = greedy
    top_p: float = 1.0  # 1 = off
    top_k: int = 0  # 0 = off
    seed: int = 0


class Sample(NamedTuple):
    ids: list[int]  # response tokens, the end token included if it came
    log_probs: list[float]  # of each token, at the sampling temperature
    finish: str  # "stop" or "length"


class Reply(NamedTuple):
    text: str  # the response without its end token, with what had begun it
    opened: bool  # whether the prompt's template had already written `<think>`
    prompt_tokens: int
    tokens: int
    finish: str  # "stop" or "length"
    sample: Sample | None  # its ids and log-probs, where the engine tells them
    begun: str = ""  # what had begun it, as the tokenizer reads it


# Decodings of stage 05 by name, beside that of the options: a careful one flatters a model
DECODINGS = {
    "preset": {},
    "uncut": {"temperature": 1.0, "top_p": 1.0, "top_k": 0},
    "greedy": {"temperature": 0.0},
}


def sampling_of(options, decoding: str = "preset") -> Sampling:
    """How a stage with SamplingOptions samples, or one of DECODINGS in their place."""
    sampling = Sampling(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
    )
    return sampling._replace(**DECODINGS[decoding])


def request_seed(seed: int, key: str, digits: int = 8) -> int:
    """The seed of a request to vLLM or a server, which adds 0 … n - 1 to it for its n samples."""
    return int(hashlib.sha256(f"{seed}|{key}".encode()).hexdigest()[:digits], 16)


class Sampler:
    """An engine that is given token ids. `generate`, `load_weights` and `close` are each one's
    own."""

    tokenizer = None
    eos: set[int] = frozenset()  # ids that end a response
    context = math.inf  # tokens that the model reads; a server refuses more by itself
    pushed: tuple[Path, str] | None = None  # set where its weights are not the trainer's own

    def fits(self, messages: list[dict], **template) -> bool:
        """Whether a chat leaves the model room for a token."""
        return len(render_chat(self.tokenizer, messages, **template)[0]) < self.context

    def replies(self, chats: list[tuple[str, list[dict]]], n: int, sampling: Sampling, **template):
        """Yields (index into chats, its n Replies) as they finish. `chats` are (key, messages),
        `template` the chat template's options. Where the last turn is the assistant's, the model
        goes on with it, and the text of a reply is the whole response, that turn included."""
        requests, opened, begun = [], [], []
        for key, messages in chats:
            ids, thinking_opened = render_chat(self.tokenizer, messages, **template)
            if len(ids) >= self.context:
                reads = f"{self.tokenizer.name_or_path} reads {self.context}"
                fail(f"prompt {key[:99]} has {len(ids)} tokens, {reads}")
            requests.append((key, ids))
            opened.append(thinking_opened)
            goes_on = template.get("generate", True)  # judges read whole conversations
            start = plumbing.begun_ids(self.tokenizer, messages, thinking_opened)
            begun.append(start if goes_on else [])
        for index, samples in self.generate(requests, n, sampling):
            replies, start = [], self.tokenizer.decode(begun[index])
            for sample in samples:
                written = [t for t in sample.ids if t not in self.eos]
                text = self.tokenizer.decode(begun[index] + written)
                sizes = (len(requests[index][1]), len(sample.ids))
                replies.append(Reply(text, opened[index], *sizes, sample.finish, sample, start))
            yield index, replies

    def push(self, model):
        """The weights that are trained, for the next `generate`. An engine that samples from the
        trainer's own model has them; another one gets a checkpoint, and 04 compares log-probs."""
        model.eval()
        if self.pushed:
            folder, source = self.pushed
            save_checkpoint(model, self.tokenizer, folder, source)
            plumbing.processes().wait_for_everyone()
            self.load_weights(folder)

    def sleep(self):
        """Gives its memory to the trainer until the next push, where it has memory of its own."""


def end_tokens(generation_config, tokenizer) -> set[int]:
    """Ids that end a response: the template's, the tokenizer's and the generation config's: one,
    several or none."""
    more = getattr(generation_config, "eos_token_id", None)
    more = [more] if isinstance(more, int) else more or []
    return {plumbing.end_token(tokenizer), tokenizer.eos_token_id, *more} - {None}


def end_tokens_of(name: str, tokenizer) -> set[int]:
    """The same for a model that is not loaded here."""
    from transformers import GenerationConfig

    try:
        return end_tokens(GenerationConfig.from_pretrained(plumbing.base_of(name)), tokenizer)
    except OSError:  # a folder without a generation_config.json
        return end_tokens(None, tokenizer)


@contextmanager
def plain_folder(name: str, tokenizer, run: str):
    """What an engine that reads models by itself is to open: the name, or of `base+adapter` a
    merged folder in `run` (without one, among the temporary ones), gone once the engine has it."""
    if not plumbing.base_and_adapter(name)[1]:
        yield name
        return
    here, folder = plumbing.processes(), Path(run or tempfile.mkdtemp()) / "merged"
    if here.process_index == 0:
        model = plumbing.load_whole(name, plumbing.model_config(name).dtype)
        save_checkpoint(model, tokenizer, folder, name)
        del model
    here.wait_for_everyone()
    try:
        yield str(folder)
        here.wait_for_everyone()
    finally:  # also when the engine can't open it
        if here.process_index == 0:
            shutil.rmtree(folder if run else folder.parent)
