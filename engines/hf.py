"""Our sampling loop over a transformers model: any machine, and the very weights that are
trained."""

import gc
import hashlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from engines.base import Sample, Sampler, Sampling, end_tokens


def sample_tokens(logits, uniforms, temperature: float, top_p: float = 1.0, top_k: int = 0):
    """One token per row by inverse CDF: logits (B, V), uniforms (B,) in [0, 1) -> tokens (B,),
    log-probs (B,).

    Log-probs are those of softmax(logits / T) before top-k and top-p cut it: what the trainer
    computes (trap 12). Temperature 0 is greedy, with log-probs at T = 1."""
    log_probs = F.log_softmax(logits.float() / (temperature or 1.0), dim=-1)  # (B, V)
    if temperature == 0:
        tokens = log_probs.argmax(-1)
    else:
        probs, order = log_probs.exp(), None
        if 0 < top_k < probs.size(-1):
            probs, order = probs.topk(top_k, dim=-1)  # (B, K), sorted
        elif top_p < 1:
            probs, order = probs.sort(dim=-1, descending=True)
        if top_p < 1:  # keep the smallest set of tokens that holds top_p of what top-k left
            share = probs / probs.sum(-1, keepdim=True)
            probs = probs.masked_fill(share.cumsum(-1) - share >= top_p, 0)
        cdf = probs.cumsum(-1)
        draws = (uniforms * cdf[:, -1]).unsqueeze(1)  # (B, 1)
        tokens = torch.searchsorted(cdf, draws, right=True).clamp_(max=cdf.size(1) - 1)
        if order is not None:
            tokens = order.gather(1, tokens)
        tokens = tokens.squeeze(1)
    return tokens, log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def row_uniforms(seed: int, key: str, sample: int, count: int) -> torch.Tensor:
    """All random numbers of one row, drawn ahead: its text depends on (seed, key, sample), never on
    its neighbours."""
    digest = hashlib.sha256(f"{seed}|{key}|{sample}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator)


def one_token_attention(module, query, key, value, attention_mask, scaling=None, **more):
    """transformers' attention, but for one new token the query heads (R, heads, 1, D) that share a
    key (R, KV heads, L, D) are the rows of one product: transformers copies keys and values for
    each."""
    if query.size(2) > 1 or more.get("position_bias") is not None:
        more["scaling"] = scaling
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    query = query.view(*key.shape[:2], -1, key.size(3))  # (R, KV heads, heads / KV heads, D)
    mixed = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling
    )
    return mixed.reshape(len(key), 1, -1, value.size(3)), None


AttentionInterface.register("one_token", one_token_attention)
AttentionMaskInterface.register("one_token", sdpa_mask)


class RoomyLayer(DynamicLayer):
    """A layer's keys and values with room for 64 more tokens: transformers' own copies all of them
    for every token, which was 38 % of the time of sampling from tiny/lrm."""

    def update(self, key, value, *_, **__):
        start, end = self.get_seq_length(), self.get_seq_length() + key.size(2)
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        rows_have_left = start > 0 and len(key) != self.room.size(1)
        if start == 0 or end > self.room.size(3) or rows_have_left:
            self.room = key.new_empty(2, *key.shape[:2], end + 64, key.size(3))
            if start:
                self.room[0, :, :, :start] = self.keys
                self.room[1, :, :, :start] = self.values
        self.room[0, :, :, start:end] = key
        self.room[1, :, :, start:end] = value
        self.keys, self.values = self.room[:, :, :, :end]
        return self.keys, self.values


class HfSampler(Sampler):
    def __init__(self, model, tokenizer, batch_tokens: int):
        model.set_attn_implementation("one_token")
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.eos = end_tokens(model.generation_config, tokenizer)
        self.context = getattr(model.config, "max_position_embeddings", math.inf)

    def generate(self, requests: list[tuple[str, list[int]]], n: int, sampling: Sampling):
        """Yields (index into requests, its n Samples) as batches finish. `requests` are (key,
        prompt ids). Prompts are sorted by length, so that little of a batch is padding."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][1]), reverse=True)
        while order:
            width = len(requests[order[0]][1])  # of the longest prompt
            rows_at_once = self.batch_tokens // (width + sampling.max_new_tokens)
            count = max(1, rows_at_once // n)
            batch, order = order[:count], order[count:]
            samples = self.sample_batch([requests[i] for i in batch], n, sampling)
            for j, index in enumerate(batch):
                yield index, samples[j * n : j * n + n]

    @torch.inference_mode()
    def sample_batch(self, requests, n: int, s: Sampling) -> list[Sample]:
        """n Samples for each request, request after request. Each prompt is computed once and its
        KV cache expanded to its n rows; finished rows leave the batch.

        B = prompts, R = rows = B * n still in the batch, P = longest prompt, V = vocabulary."""
        model, device = self.model, self.model.device
        eos = torch.tensor(sorted(self.eos), device=device)
        ids, mask, lengths = self.pad_left([prompt for _, prompt in requests])  # (B, P) twice, (B,)
        ragged = not bool(mask.all())  # equal lengths need no mask, and attention is faster without
        cache = DynamicCache(config=model.config)
        layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        cache.layers = layers
        output = model(
            input_ids=ids,
            past_key_values=cache,
            attention_mask=mask.long() if ragged else None,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        cache.batch_repeat_interleave(n)
        logits = output.logits[:, -1].repeat_interleave(n, 0)  # (R, V)
        lengths = lengths.repeat_interleave(n)  # (R,)
        if ragged:
            mask = F.pad(mask, (0, s.max_new_tokens), value=True).repeat_interleave(n, 0).long()
        uniforms = []
        for key, _ in requests:
            uniforms += [row_uniforms(s.seed, key, k, s.max_new_tokens) for k in range(n)]
        uniforms = torch.stack(uniforms).to(device)  # (R, max_new_tokens)

        rows = torch.arange(len(requests) * n, device=device)  # which rows are still in the batch
        alive = torch.ones_like(rows, dtype=torch.bool)  # which of those have not ended
        all_tokens = torch.zeros_like(uniforms, dtype=torch.long)
        all_log_probs = torch.zeros_like(uniforms)
        sizes = torch.full_like(rows, s.max_new_tokens)
        ended = torch.zeros_like(alive)
        for step in range(s.max_new_tokens):
            draws = uniforms[rows, step]
            tokens, log_probs = sample_tokens(logits, draws, s.temperature, s.top_p, s.top_k)
            all_tokens[rows, step], all_log_probs[rows, step] = tokens, log_probs
            done = alive & torch.isin(tokens, eos)
            sizes[rows[done]], ended[rows[done]] = step + 1, True
            alive &= ~done
            left = int(alive.sum())
            if left == 0 or step + 1 == s.max_new_tokens:
                break
            if left <= 0.75 * len(rows):  # a quarter has ended: worth copying the others' cache
                keep = alive.nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                rows, tokens, alive = rows[keep], tokens[keep], alive[keep]
            output = model(
                input_ids=tokens.unsqueeze(1),
                attention_mask=mask[rows, : ids.size(1) + step + 1] if ragged else None,
                position_ids=(lengths[rows] + step).unsqueeze(1),
                past_key_values=cache,
                use_cache=True,
            )
            logits = output.logits[:, -1]
        columns = (t.tolist() for t in (all_tokens, all_log_probs, sizes, ended))
        samples = []
        for row_ids, row_log_probs, size, stopped in zip(*columns):
            finish = "stop" if stopped else "length"
            samples.append(Sample(row_ids[:size], row_log_probs[:size], finish))
        return samples

    def pad_left(self, prompts: list[list[int]]):
        """ids (B, P), mask (B, P) true on tokens, lengths (B,)."""
        device, width = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
        lengths = torch.tensor([len(p) for p in prompts], device=device)
        mask = torch.arange(width, device=device) >= (width - lengths).unsqueeze(1)
        return ids, mask, lengths

    def load_weights(self, folder: Path):
        """A checkpoint's weights in place of its own."""
        for file in sorted(folder.glob("*.safetensors")):
            tensors = load_file(file, device=str(self.model.device))
            self.model.load_state_dict(tensors, strict=False)

    def close(self):
        """Gives the memory of the model back."""
        self.model = None
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU
