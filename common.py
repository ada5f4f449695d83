"""What all five stages need and a reader of the lesson should know: options, chat and think
parsing, the model and LoRA, token log-probs, examples and micro-batches, the training loop.

Nothing that a paper is about lives here: losses, selection, steering, advantages and rewards stand
in their stages. Who writes tokens: engines/. Who judges answers: judges/. Files and folders:
plumbing/. "Trap 7" is number 7 of docs/traps.md."""

import math
import os
import random
import re
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import plumbing
from plumbing import CLOSE, MARKED, OPEN, THINKING, encode_plain, fail


# Options that stages share ------------------------------------------------------------------------
@dataclass
class StageOptions:
    preset: str = "tiny"  # row of PRESETS in plumbing/options.py; an option given wins over it
    run: str = ""  # folder of this run; the same command again goes on where it stopped
    seed: int = 0  # seed of sampling, shuffling and initialisation
    engine: Literal["hf", "vllm"] = "hf"  # what samples: our loop over transformers, or vLLM (GPU)
    tensor_parallel: int = 1  # vllm engine: GPUs that share a model that one can't hold
    batch_tokens: int = 32_768  # hf engine: prompt + new tokens in one batch, for the KV cache
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU, else float32
    enable_thinking: bool = True  # passed to the chat template; those without the switch ignore it
    accept_changes: bool = False  # go on although the stage's file has changed since the run began
    dry_run: bool = False  # check everything, say what would be done, and do nothing


@dataclass
class SamplingOptions(StageOptions):
    temperature: float = 0.6  # sampling temperature, 0 = greedy (model card)
    top_p: float = 0.95  # nucleus sampling, 1 = off (model card)
    top_k: int = 20  # top-k sampling, 0 = off (model card)
    max_new_tokens: int = 64  # longest response, tokens


@dataclass
class TrainingOptions(StageOptions):
    # padded tokens in one forward pass; changes memory, speed and dropout's noise, nothing else
    micro_batch_tokens: int = 4096
    # compute layers again in the backward pass: a third more time, a fraction of the memory
    recompute: bool = False
    save_every: int = 50  # optimizer steps between two saved training states


def dry_run(options, model: str, rows: list[dict], free: tuple[str, ...] = ()):
    """What --dry_run says when all input is checked: options, folder, rows, first prompt."""
    if os.environ.get("RANK", "0") == "0":
        plumbing.show_plan(options, rows, free)
        tokenizer = plumbing.dry_tokenizer(plumbing.local_name(model))
        show_prompt(tokenizer, chat_of(rows[0]), enable_thinking=options.enable_thinking)


# Chat: messages to ids, text to thinking and answer -----------------------------------------------
def messages_of(prompt) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def prompt_text(prompt) -> str:
    return messages_of(prompt)[-1]["content"]


def chat_of(row: dict) -> list[dict]:
    """What a model reads of a prompt row: its "start", if it has one, begins the response."""
    begun = [{"role": "assistant", "content": row["start"]}] if row.get("start") else []
    return messages_of(row["prompt"]) + begun


def render_chat(tokenizer, messages: list[dict], generate: bool = True, **template_options):
    """(ids, opened): the chat template's ids for `messages`, contents as plain text, and whether it
    opens `<think>`.

    The template is rendered around place marks and only its own text may become special tokens; no
    second tokenizer pass adds a BOS (trap 5). Blanks around a content, and earlier thinkings, are
    the template's to keep. `opened` is read off the rendered text (R1 templates end in
    `<think>\\n`), not off the name (trap 3). An assistant's last turn begins the response."""
    if generate and messages[-1]["role"] == "assistant":
        ids, opened = render_chat(tokenizer, messages[:-1], **template_options)
        return ids + plumbing.begun_ids(tokenizer, messages, opened), opened
    marked, texts = [], []
    for i, turn in enumerate(messages):
        text = turn["content"].strip()
        mark = f"{OPEN}{i}{CLOSE}"
        place = turn["content"].replace(text, mark, 1)
        before, closed, answer = text.rpartition("</think>")
        if closed and generate and turn["role"] == "assistant":
            around = answer.replace(answer.strip(), mark, 1)
            place = turn["content"].replace(text, f"<think>{THINKING}</think>{around}", 1)
            text = answer.strip()
        marked.append({**turn, "content": place})
        texts.append(text)
    rendered = plumbing.apply_template(tokenizer, marked, generate, **template_options)
    whole, plain = "", []  # the text, and where contents stand in it
    for piece in MARKED.split(rendered):
        if piece.endswith(CLOSE):
            i = int(piece[piece.index(OPEN) + 1 : -1])
            piece = texts[i] if piece.startswith(OPEN) else messages[i]["content"].strip()
            plain.append((len(whole), len(whole) + len(piece)))
        whole += piece
    ids = encode_plain(tokenizer, whole, plain)
    return ids, rendered.rfind("<think>") > rendered.rfind("</think>")


def split_response(text: str, opened: bool = False) -> tuple[str, str, str]:
    """(thinking, answer, state); `opened` says that the prompt's template already wrote `<think>`.

    The first `</think>` ends the thinking: whatever follows reaches the user, so it is judged. An
    unclosed thinking has no answer, whether it was cut or just ended (trap 2).

    >>> split_response("<think>\\nhm\\n</think>\\n\\nhello")
    ('hm', 'hello', 'closed')
    >>> split_response("hm</think>hello", opened=True)
    ('hm', 'hello', 'closed')
    >>> split_response("<think>hm, let me")
    ('hm, let me', '', 'truncated')
    >>> split_response("hello")
    ('', 'hello', 'no_thinking')
    >>> split_response("<think>a</think>b</think>c")
    ('a', 'b</think>c', 'closed')
    """
    body = text.lstrip()
    if body.startswith("<think>"):
        opened, text = True, body[len("<think>") :]
    if not opened and "</think>" not in text:
        return "", text.strip(), "no_thinking"
    thinking, closed, answer = text.partition("</think>")
    return thinking.strip(), answer.strip(), "closed" if closed else "truncated"


VERDICT_LINE = re.compile(r"^[^\w\n]*(?ai:verdict):[^\w\n]*((?ai:safe|unsafe))[^\w\n]*$", re.M)


def parse_verdict(answer: str) -> str:
    """The verdict of a verification: a line of its own, the last one wins.

    >>> parse_verdict("Verdict: unsafe"), parse_verdict("It is safe.")
    ('unsafe', 'unparsed')
    """
    verdicts = VERDICT_LINE.findall(answer)
    return verdicts[-1].lower() if verdicts else "unparsed"


def response_ids(tokenizer, thinking: str | None, answer: str, opened: bool) -> list[int]:
    """Ids of a whole response with its end token; tags and end are the only special tokens in it.

    Built from parts, because chat templates drop the thinking of assistant turns (trap 4). Without
    an answer it ends at `</think>`; if the model writes no thinking (None), the answer is all. Line
    ends around a text are read with it, as the model writes them: `.\\n` may be one token."""
    if thinking is None:
        return [*encode_plain(tokenizer, answer), plumbing.end_token(tokenizer)]
    begin = [] if opened else tokenizer.encode("<think>", add_special_tokens=False)
    close = tokenizer.encode("</think>", add_special_tokens=False)
    thinking_ids = encode_plain(tokenizer, f"{thinking}\n" if opened else f"\n{thinking}\n")
    answer_ids = encode_plain(tokenizer, f"\n\n{answer}") if answer else []
    return [*begin, *thinking_ids, *close, *answer_ids, plumbing.end_token(tokenizer)]


def show_prompt(tokenizer, prompt, **template_options):
    ids, _ = render_chat(tokenizer, messages_of(prompt), **template_options)
    print(f"first prompt as the model reads it:\n{tokenizer.decode(ids)}")


# The model and LoRA -------------------------------------------------------------------------------
def load_tokenizer(name: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(plumbing.tokenizer_source(name), trust_remote_code=False)


def load_model(name: str, dtype="auto"):
    """Safetensors only, no remote code; `dtype` is torch's, or as the option says."""
    return plumbing.load_whole(name, dtype).to(plumbing.processes().device).eval()


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B A dropout(x), W frozen (arXiv 2106.09685; starts as PEFT's)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = alpha / rank
        self.on = True
        exact = {"device": base.weight.device, "dtype": torch.float32}  # W may be bfloat16
        self.A = nn.Parameter(torch.empty(rank, base.in_features, **exact))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **exact))
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        y = self.base(x)
        if self.on:  # the scale goes where there is least to multiply
            low_rank = self.dropout(x) @ self.A.T.to(x.dtype) * self.scale
            y += low_rank @ self.B.T.to(x.dtype)
        return y


def add_lora(model, rank: int, alpha: float, dropout: float, targets: list[str], seed: int):
    """Freezes the model and puts a LoRALinear in place of every linear layer whose last name is in
    `targets`."""
    torch.manual_seed(seed)
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if isinstance(module, nn.Linear) and last in targets:
            setattr(model.get_submodule(parent), last, LoRALinear(module, rank, alpha, dropout))
    if not lora_layers(model):
        fail(f"no linear layer is named {' or '.join(targets)} (--lora_targets: its last part)")


def lora_layers(model) -> list[tuple[str, LoRALinear]]:
    return [(name, m) for name, m in model.named_modules() if isinstance(m, LoRALinear)]


@contextmanager
def lora_off(model):
    """Inside, the model is the one that training started from: the reference for KL terms."""
    layers = [m for _, m in lora_layers(model) if m.on]  # none inside another lora_off
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


@torch.no_grad()
def save_checkpoint(model, tokenizer, folder: Path, source: str):
    """A plain Hugging Face folder in the precision of `source`, where training started; the live
    model stays. LoRA is merged; lora.json: the share of its layers' entries that this changed."""
    state = plumbing.gather(model.state_dict(keep_vars=True))
    if plumbing.processes().process_index > 0:
        return
    dtype = plumbing.model_config(source).dtype or torch.float32
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    changed, entries = 0, 0
    for name, layer in lora_layers(model):
        base, A, B = (state.pop(f"{name}.{part}") for part in ("base.weight", "A", "B"))
        state[f"{name}.weight"] = merged = (base.float() + layer.scale * (B @ A)).to(dtype)
        changed += (merged != base.to(dtype)).sum().item()
        entries += merged.numel()
        if layer.base.bias is not None:
            state[f"{name}.bias"] = state.pop(f"{name}.base.bias")
    plumbing.save_weights(model, state, dtype, temporary)
    tokenizer.save_pretrained(temporary)
    if entries:
        plumbing.write_jsonl(temporary / "lora.json", [{"changed": changed / entries}])
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


# Examples and micro-batches -----------------------------------------------------------------------
class Example(NamedTuple):
    prompt: list[int]  # ids, no loss
    response: list[int]  # ids with the end token, every one of them a label


def make_example(tokenizer, prompt, thinking: str | None, answer: str, options) -> Example:
    """The prompt as the model reads it, and a response to it from its parts."""
    template = {"enable_thinking": options.enable_thinking}
    ids, opened = render_chat(tokenizer, messages_of(prompt), **template)
    return Example(ids, response_ids(tokenizer, thinking, answer, opened))


def show_example(tokenizer, example: Example):
    """Prints a training example with its label mask in plain sight (trap 9)."""
    print(f"first example, no loss:\n{tokenizer.decode(example.prompt)}")
    print(f"first example, trained on:\n{tokenizer.decode(example.response)}")


def pad_batch(rows: list[Example], device="cpu"):
    """input_ids (B, T) right-padded, response_mask (B, T) true on response tokens: by length, never
    by token id, so that an end token that doubles as padding keeps its loss (traps 9, 10). Under
    causal attention right padding needs no attention mask: nothing real looks at it.

    >>> ids, mask = pad_batch([Example([5, 6], [7, 0]), Example([5], [0])])
    >>> ids.tolist(), mask.int().tolist()
    ([[5, 6, 7, 0], [5, 0, 0, 0]], [[0, 0, 1, 1], [0, 1, 0, 0]])
    """
    width = max(len(r.prompt) + len(r.response) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        mask[i, len(prompt) : len(prompt) + len(response)] = True
    return ids.to(device), mask.to(device)


def micro_batches(rows: list[Example], max_tokens: int) -> list[list[int]]:
    """Indices of `rows` in batches of at most `max_tokens` padded tokens, alike in length."""
    lengths = [len(r.prompt) + len(r.response) for r in rows]
    batches: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lambda i: lengths[i]):  # the newest is the widest
        if batches and (len(batches[-1]) + 1) * lengths[i] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def own_share(batches: list[list[int]]) -> list[tuple[list[int], int]]:
    """(batch, weight 1) for each of this process's micro-batches of a step. Wrapped modules want as
    many passes from every process: one that has too few does another's again, with weight 0."""
    here = plumbing.processes()
    share = [(batch, 1) for batch in batches[here.process_index :: here.num_processes]]
    if len(share) < math.ceil(len(batches) / here.num_processes):
        share.append((batches[0], 0))
    return share


# Token log-probs ----------------------------------------------------------------------------------
class Scores(NamedTuple):
    log_probs: torch.Tensor  # (N,) of the response tokens
    entropy: torch.Tensor | None  # (N,) of the next-token distribution, no gradient; if asked for
    divergence: torch.Tensor | None  # (N,) KL(reference || model) over the vocabulary, if asked for


class TokenScorer(nn.Module):
    """The trainer's forward pass, a module so that accelerate can wrap it."""

    kept_logits = 2**26  # 256 MB in float32

    def __init__(self, model, recompute: bool = False, reference=None):
        super().__init__()
        if recompute:
            model.gradient_checkpointing_enable()
        self.model, self.reference = model, reference
        self._no_split_modules = model._no_split_modules  # FSDP shards these layers one by one
        self.fast = True
        self.fast = plumbing.holds(model, self.response_log_probs, "the head by itself, in chunks,")

    def response_log_probs(self, rows: list[list[int]]) -> list[torch.Tensor]:
        """Of all tokens but the first, row by row."""
        batch = pad_batch([Example(row[:1], row[1:]) for row in rows], self.model.device)
        return self.forward(*batch).log_probs.split([len(row) - 1 for row in rows])

    def forward(self, ids, mask, temperature=1.0, full_kl=False, entropy=False, chunk=0) -> Scores:
        """Scores of the N response tokens, row after row: ids (B, T), mask (B, T).

        The head runs on response positions only, `chunk` at a time (0 = as many as fill 40 MB, on a
        GPU 1 GB, of logits). More than kept_logits never exist at once: the backward pass computes
        them again. `full_kl` runs the reference too: without one, the model, LoRA off."""

        def hidden_states(model):  # (N, H): position t predicts token t + 1; (N, V) if not fast
            decoder = model.get_decoder() if self.fast else model
            output = decoder(input_ids=ids, use_cache=False)
            states = output.last_hidden_state if self.fast else output.logits  # (B, T, H or V)
            return states[:, :-1][mask[:, 1:]]

        def distribution(model, h):
            head = model.get_output_embeddings() if self.fast else torch.clone
            logits = head(h).float()  # (chunk, V)
            return F.log_softmax(logits.div_(temperature) if temperature != 1 else logits, dim=-1)

        def head(h, label, h0):
            log_p = distribution(self.model, h)
            log_probs = log_p.gather(1, label.unsqueeze(1)).squeeze(1)
            entropies = divergence = None
            if full_kl:
                with torch.no_grad(), lora_off(self.model):  # the head may have LoRA too
                    log_r = distribution(self.reference or self.model, h0)
                divergence = (log_r.exp() * (log_r - log_p)).sum(-1)
            if entropy:
                with torch.no_grad():  # last: the backward pass, which needs none, ends before it
                    entropies = -log_p.exp().mul_(log_p).sum(-1)  # in place: one (chunk, V) less
            return log_probs, entropies, divergence

        vocabulary = self.model.config.get_text_config().vocab_size
        chunk = chunk or (2**28 if ids.is_cuda else 10_000_000) // vocabulary
        hidden, labels = hidden_states(self.model), ids[:, 1:][mask[:, 1:]]
        reference = [None] * (1 + len(labels) // chunk)
        if full_kl:
            with torch.no_grad(), lora_off(self.model):
                reference = hidden_states(self.reference or self.model).split(chunk)
        again = len(labels) * vocabulary > self.kept_logits
        parts = []
        for part in zip(hidden.split(chunk), labels.split(chunk), reference):
            parts.append(checkpoint(head, *part, use_reentrant=False) if again else head(*part))
        columns = zip(*parts)
        return Scores(*(None if one[0] is None else torch.cat(one) for one in columns))


# The training loop --------------------------------------------------------------------------------
class Trainer(NamedTuple):
    accelerator: object  # accelerate's: precision, processes, sharding
    model: nn.Module
    scorer: nn.Module  # TokenScorer of the model, wrapped by accelerate
    optimizer: object  # AdamW of what is trained, wrapped too

    def backward(self, loss):
        """Gradients of this process's part of the loss; accelerate averages over processes."""
        self.accelerator.backward(loss * self.accelerator.num_processes)

    def step(self) -> float:
        """One optimizer step; the norm of its gradients before they were clipped at 1."""
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm


def make_trainer(accelerator, options, lora_dropout: float = 0.0) -> Trainer:
    """The model, with LoRA if the options have a rank, and AdamW on what is trained, in float32."""
    model = load_model(options.model, options.dtype if options.lora_rank else torch.float32)
    accelerator.gradient_accumulation_steps = 1  # micro-batches are ours, whatever a launcher says
    if options.lora_rank:
        lora = (options.lora_rank, options.lora_alpha, lora_dropout, options.lora_targets)
        add_lora(model, *lora, options.seed)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=0.0)
    scorer, optimizer = accelerator.prepare(TokenScorer(model, options.recompute), optimizer)
    return Trainer(accelerator, model, scorer, optimizer)


def reference_scorer(trainer: Trainer, options):
    """A function of (ids, mask, temperature): log-probs (N,) by the model that training started
    from. With LoRA it is the same one with LoRA off, else a frozen copy."""
    scorer = trainer.scorer
    if not options.lora_rank:
        scorer = TokenScorer(load_model(options.model, options.dtype))

    @torch.no_grad()
    def log_probs(ids, mask, temperature: float):
        with lora_off(trainer.model):
            return scorer(ids, mask, temperature).log_probs

    return log_probs


def cosine_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then cosine to zero.

    >>> [round(cosine_rate(s, 4, 1.0, 0.25), 3) for s in range(4)]
    [1.0, 1.0, 0.75, 0.25]
    """
    ramp = int(warmup * steps)
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def epochs_of(run: Path, options, items: list, trainer: Trainer):
    """training_steps for so many epochs, at a cosine rate."""
    steps = options.epochs * math.ceil(len(items) / options.batch_size)
    rate_at = partial(cosine_rate, steps=steps, peak=options.learning_rate, warmup=options.warmup)
    return training_steps(run, options, items, steps, rate_at, trainer)


def training_steps(run: Path, options, items: list, steps: int, rate_at, trainer: Trainer):
    """Yields (step, batch, metrics) and does the bookkeeping around the loop body, which fills
    `metrics`: resume, data order and dropout as functions of (seed, step), learning rate, one line
    per step in metrics.jsonl, saved states.

    A loss or gradient that is not finite ends the run before the step is recorded or saved."""
    from tqdm import tqdm

    model, optimizer = trainer.model, trainer.optimizer
    state, path, size = run / "state.safetensors", run / "metrics.jsonl", options.batch_size
    first_process = plumbing.processes().process_index == 0
    start = plumbing.load_state(state, model, optimizer)
    if start < steps:  # steps after the saved state run again: each stands once
        plumbing.drop_steps(run, start)
    with tqdm(total=steps, initial=start, unit="step", disable=not first_process) as bar:
        for step in range(start, steps):
            epoch, position = divmod(step, math.ceil(len(items) / size))
            order = random.Random(f"{options.seed}|{epoch}").sample(range(len(items)), len(items))
            batch = [items[i] for i in order[position * size :][:size]]
            torch.manual_seed(options.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step)
            began, metrics = time.time(), {"step": step, "learning_rate": rate_at(step)}
            yield step, batch, metrics
            if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])):
                what = f"loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}"
                fail(f"step {step}: {what}; {run} keeps the state saved before it")
            if first_process:
                metrics["seconds"] = round(time.time() - began, 3)
                plumbing.append_jsonl(path, [metrics])
            bar.update()
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
            if (step + 1) % options.save_every == 0:
                plumbing.save_state(state, step + 1, model, optimizer)
    plumbing.processes().wait_for_everyone()  # every process finds metrics.jsonl whole
