"""A fast path proves itself against the model's own plain forward pass, on the model at hand, or
gives way to it.

Plain: whole rows, padded on the right, without mask or cache. It has what an architecture adds to
the ordinary (scaled or capped logits, attention sinks, layers that are no attention), whatever that
is. What is faster leaves things out, so it is compared on a few tokens before any work, in float32
whatever the model's precision: rounding to bfloat16 moves log-probs by as much as a wrong path."""

import math
from contextlib import contextmanager

import torch

from plumbing.process import fail

TOLERANCE = 1e-4  # of a log-prob; or four times what rounding alone changes, if that is more:
RELATIVE = 2**-18  # as padding does, or this share of the largest log-prob, 32 units of float32
ERRORS = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError)


def probe_rows(config) -> list[list[int]]:
    """Two rows of token ids of different lengths, longer than a short sliding window."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    window = max(window, getattr(config, "attention_chunk_size", None) or 0)
    length = 12 + (window if window <= 64 else 0)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(config.vocab_size, (2, length), generator=generator).tolist()
    return [rows[0], rows[1][: length - 5]]


@contextmanager
def in_float32(model):
    """Inside, the model computes in float32: its weights are widened, a layer's while it runs."""
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or [])]
    in_layers = {part for layer in layers for part in layer.modules()}
    kept, hooks = {}, []  # part -> [(its weights by name, a name, the weight as it was)]

    def widen(parts):
        for part in parts:
            for held in (part._parameters, part._buffers):
                for name, tensor in held.items():
                    if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16):
                        kept.setdefault(part, []).append((held, name, tensor))
                        held[name] = tensor.float()

    def restore(parts):
        for part in parts:
            for held, name, tensor in kept.pop(part, []):
                held[name] = tensor

    for layer in layers:
        before, after = lambda m, *_: widen(m.modules()), lambda m, *_: restore(m.modules())
        hooks.append(layer.register_forward_pre_hook(before))
        hooks.append(layer.register_forward_hook(after, always_call=True))
    others = [part for part in model.modules() if part not in in_layers]
    widen(others)
    try:
        with torch.autocast(model.device.type, enabled=False):
            yield
    finally:
        restore(others)
        for hook in hooks:
            hook.remove()


def token_log_probs(model, rows: list[list[int]], padding: int = 0) -> list[torch.Tensor]:
    """(T - 1,) log-probs of the tokens after the first, row by row, from one plain forward pass."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [padding] * (width - len(row)) for row in rows], device=model.device)
    log_probs = model(input_ids=ids, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    log_probs = log_probs.gather(2, ids[:, 1:, None]).squeeze(2)  # (B, T - 1)
    return [log_probs[i, : len(row) - 1] for i, row in enumerate(rows)]


def gap(log_probs, expected) -> float:
    """Largest difference; infinite where one is no number."""
    difference = (torch.as_tensor(log_probs).cpu() - torch.as_tensor(expected).cpu()).abs().max()
    return difference.item() if difference.isfinite() else math.inf


class Proof:
    """What the model's plain forward pass says of the probe rows, and how far one may be from it:
    both in float32."""

    @torch.no_grad()
    def __init__(self, model):
        self.rows = probe_rows(model.config)
        training = model.training
        model.eval()
        try:
            with in_float32(model):
                self.plain = [token_log_probs(model, [row])[0] for row in self.rows]
                padded = torch.cat(token_log_probs(model, self.rows))
                otherwise = torch.cat(token_log_probs(model, self.rows, padding=1))
        except ERRORS as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
            fail(f"{model.name_or_path}: its forward pass on plain token ids fails: {what}")
        model.train(training)
        # other shapes are summed in another order: large log-probs of a real model feel it
        plain = torch.cat(self.plain)
        rounding = max(gap(padded, plain), RELATIVE * plain.abs().max().item())
        self.allowed = max(TOLERANCE, 4 * rounding)
        looks_ahead = gap(otherwise, padded)  # of equal shapes: no rounding in it
        if not looks_ahead <= TOLERANCE:
            what = f"padding on the right changes its log-probs by {looks_ahead:.2g}"
            fail(f"{model.name_or_path}: {what}, so rows can't be computed together here")

    @torch.no_grad()
    def gap_of(self, model, log_probs) -> float:
        """How far log_probs(rows) -> [(T - 1,) of each row, or of its last tokens] is from plain;
        infinite where they can't be computed, in float32 or in the model's own precision."""
        training = model.training
        model.eval()
        try:
            for ours in log_probs(self.rows):
                if not ours.isfinite().all():
                    return math.inf
            gaps = []
            with in_float32(model):
                for ours, plain in zip(log_probs(self.rows), self.plain):
                    gaps.append(gap(ours, plain[-len(ours) :]))
            return max(gaps)
        except ERRORS:  # a model that the path was not made for
            return math.inf
        finally:
            model.train(training)


def say_slower(model, what: str, distance: float):
    name = model.name_or_path or type(model).__name__
    far = f"log-probs off by {distance:.2g}" if math.isfinite(distance) else "it does not run"
    print(f"{name}: {what} is not right for this model ({far}); a slower way is used")


def holds(model, log_probs, what: str) -> bool:
    """Whether log_probs(rows) agrees with the model's plain forward pass; where not, a line says
    so."""
    proof = Proof(model)
    distance = proof.gap_of(model, log_probs)
    if distance > proof.allowed:
        say_slower(model, what, distance)
    return distance <= proof.allowed
