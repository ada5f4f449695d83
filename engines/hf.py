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

import plumbing
from engines.base import Sample, Sampler, Sampling, end_tokens
from engines.packed import layers_to_pack, packed_weights

LOGITS_AT_ONCE = 4 * 2**20  # 16 MB: malloc maps what is over 32 MB anew each time, page by page


def sample_tokens(logits, uniforms, temperature: float, top_p: float = 1.0, top_k: int = 0):
    """One token per row by inverse CDF: logits (B, V), uniforms (B,) in [0, 1) -> tokens (B,),
    log-probs (B,).

    Log-probs are those of softmax(logits / T) before top-k and top-p cut it: what the trainer
    computes (trap 12). Temperature 0 is greedy, with log-probs at T = 1. Of large vocabularies a
    few rows are drawn at a time, for memory."""
    count = max(1, LOGITS_AT_ONCE // logits.size(1))
    parts = [
        draw_tokens(some, draws, temperature, top_p, top_k)
        for some, draws in zip(logits.split(count), uniforms.split(count))
    ]
    tokens, log_probs = zip(*parts)
    return torch.cat(tokens), torch.cat(log_probs)


def draw_tokens(logits, uniforms, temperature: float, top_p: float, top_k: int):
    """The same for rows that are drawn at once."""
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
    """All random numbers of one row, drawn ahead: its text depends on (seed, key, sample), on its
    neighbours only by rounding, which in bfloat16 is enough to change it."""
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
    if hasattr(key, "prompt"):
        mixed = shared_prompt_attention(query, key, value, attention_mask, scaling)
    else:
        mixed = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=scaling
        )
    return mixed.reshape(len(key), 1, -1, value.size(3)), None


def shared_prompt_attention(query, key, value, attention_mask, scaling=None):
    """The same where n rows have one prompt: its keys and values, key.prompt, (B, KV heads, P, D)
    each, are read once for all of them. `key`, `value`: of the tokens after it, row by row."""
    (keys, values), (R, heads, share, D) = key.prompt, query.shape
    B, n = len(keys), R // len(keys)

    def by_prompt(x):  # (R, heads, share, *) -> (B, heads, n * share, *)
        return x.view(B, n, heads, share, -1).transpose(1, 2).reshape(B, heads, n * share, -1)

    def by_row(x):
        return x.view(B, heads, n, share, -1).transpose(1, 2).reshape(R, heads, share, -1)

    query = query * (D**-0.5 if scaling is None else scaling)
    prompt_scores = by_prompt(query) @ keys.transpose(2, 3)  # (B, heads, n * share, P)
    if attention_mask is not None:  # (R, 1, 1, P + tokens after), the same for the rows of a prompt
        prompt_scores.masked_fill_(~attention_mask[::n, :, :, : keys.size(2)], -math.inf)
    own_scores = by_prompt(query @ key.transpose(2, 3))
    weights = torch.cat([prompt_scores, own_scores], dim=-1).float().softmax(-1).to(value.dtype)
    of_prompt, of_own = weights.split([keys.size(2), key.size(2)], dim=-1)
    return by_row(of_prompt @ values) + by_row(of_own) @ value


AttentionInterface.register("one_token", one_token_attention)
AttentionMaskInterface.register("one_token", sdpa_mask)


class RoomyLayer(DynamicLayer):
    """A layer's keys and values with room for 32 more tokens: transformers' own copies all of them
    for every token, which was 38 % of the time of sampling from tiny/lrm. Those of a prompt are
    kept once for its n rows, until rows leave; `keys` and `values` are then what came after it."""

    prompt = room = None  # (keys, values) of B prompts; (2, R, KV heads, tokens, D) with room left

    def get_seq_length(self):
        of_prompt = self.prompt[0].size(2) if self.prompt else 0
        return of_prompt + (self.keys.size(2) if self.is_initialized else 0)

    def update(self, key, value, *_, **__):
        if not self.is_initialized:
            self.lazy_initialization(key, value)
            self.keys, self.values = key, value
            return key, value
        start, end = self.keys.size(2), self.keys.size(2) + key.size(2)
        if self.room is None or end > self.room.size(3):
            self.room = key.new_empty(2, *key.shape[:2], end + 32, key.size(3))
            self.room[0, :, :, :start] = self.keys
            self.room[1, :, :, :start] = self.values
        self.room[0, :, :, start:end] = key
        self.room[1, :, :, start:end] = value
        self.keys, self.values = self.room[:, :, :, :end]
        if self.prompt:
            self.keys.prompt = self.prompt  # for the attention, which sees keys and no cache
        return self.keys, self.values

    def batch_repeat_interleave(self, n):
        if n > 1:
            self.prompt = self.keys, self.values
            self.keys, self.values = (x[:, :, :0].repeat_interleave(n, 0) for x in self.prompt)

    def batch_select_indices(self, rows):
        keys, values = self.keys[rows], self.values[rows]
        if self.prompt:
            owners = rows // (len(self.keys) // len(self.prompt[0]))
            keys = torch.cat([self.prompt[0][owners], keys], dim=2)
            values = torch.cat([self.prompt[1][owners], values], dim=2)
        self.keys, self.values, self.prompt, self.room = keys, values, None, None


def without_gradients(device):
    """inference_mode is faster, but in it autocast casts every weight again for every token."""
    autocast = torch.is_autocast_enabled(device.type)
    return torch.no_grad() if autocast else torch.inference_mode()


class CachedRows:
    """R = B * n rows of a batch in front of a model with a KV cache: each prompt is computed once
    for its n rows. `room` tokens may be appended. V = vocabulary."""

    layer = DynamicLayer

    def __init__(self, model, prompts: list[list[int]], n: int, room: int):
        self.model, device, width = model, model.device, max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (B, P)
        lengths = torch.tensor([len(p) for p in prompts], device=device)  # (B,)
        mask = torch.arange(width, device=device) >= (width - lengths).unsqueeze(1)  # (B, P)
        self.ragged = not bool(mask.all())  # equal lengths need no mask, which is faster
        self.cache = DynamicCache(config=model.config)
        if self.layer is not DynamicLayer:
            layers = self.cache.layers
            self.cache.layers = [self.layer() if type(x) is DynamicLayer else x for x in layers]
        output = model(
            input_ids=ids,
            past_key_values=self.cache,
            attention_mask=mask.long() if self.ragged else None,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache.batch_repeat_interleave(n)
        self.logits = output.logits[:, -1].repeat_interleave(n, 0)  # (R, V) after the prompts
        self.positions = lengths.repeat_interleave(n)  # (R,) of the next token
        self.width = width
        if self.ragged:
            self.mask = F.pad(mask, (0, room), value=True).repeat_interleave(n, 0).long()

    def keep(self, rows):
        """Goes on with these of the rows, (R',) indices."""
        self.cache.batch_select_indices(rows)
        self.positions = self.positions[rows]
        if self.ragged:
            self.mask = self.mask[rows]

    def append(self, tokens):
        """One more token for every row, (R,) -> logits (R, V) of the next."""
        self.width += 1
        output = self.model(
            input_ids=tokens.unsqueeze(1),
            attention_mask=self.mask[:, : self.width] if self.ragged else None,
            position_ids=self.positions.unsqueeze(1),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.positions = self.positions + 1
        return output.logits[:, -1]


class FastRows(CachedRows):
    """With the cache and the attention above, for models of ordinary attention layers."""

    layer = RoomyLayer


class PlainRows:
    """The same without a cache: every token is a plain forward pass over the whole rows, padded on
    the right, which any causal model computes right."""

    def __init__(self, model, prompts: list[list[int]], n: int, room: int):
        self.model, device, width = model, model.device, max(map(len, prompts)) + room
        self.ids = torch.tensor([p + [0] * (width - len(p)) for p in prompts], device=device)
        self.lengths = torch.tensor([len(p) for p in prompts], device=device)
        self.logits = self.last_logits().repeat_interleave(n, 0)  # (R, V)
        self.ids = self.ids.repeat_interleave(n, 0)
        self.lengths = self.lengths.repeat_interleave(n)

    def last_logits(self):
        ids = self.ids[:, : int(self.lengths.max())]
        logits = self.model(input_ids=ids, use_cache=False).logits  # (R, T, V)
        return logits[torch.arange(len(ids), device=ids.device), self.lengths - 1]

    def keep(self, rows):
        self.ids, self.lengths = self.ids[rows], self.lengths[rows]

    def append(self, tokens):
        self.ids[torch.arange(len(tokens), device=tokens.device), self.lengths] = tokens
        self.lengths = self.lengths + 1
        return self.last_logits()


class HfSampler(Sampler):
    def __init__(self, model, tokenizer, batch_tokens: int):
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.eos = end_tokens(model.generation_config, tokenizer)
        self.context = plumbing.context_of(model.config)
        self.rows = self.proven_rows()
        self.packed = layers_to_pack(model)

    def proven_rows(self):
        """The fastest of the three classes above whose log-probs are those of a plain forward
        pass."""
        model, attention = self.model, self.model.config._attn_implementation
        if attention == "one_token":  # by an earlier sampler of the same model
            return FastRows
        proof = plumbing.Proof(model)
        if attention == "sdpa":
            model.set_attn_implementation("one_token")
            gap = proof.gap_of(model, lambda rows: self.try_rows(FastRows, rows))
            if gap <= proof.allowed:
                return FastRows
            model.set_attn_implementation(attention)
        gap = proof.gap_of(model, lambda rows: self.try_rows(CachedRows, rows))
        if gap <= proof.allowed:
            return CachedRows
        plumbing.say_slower(model, "sampling with a cache", gap)
        return PlainRows

    def try_rows(self, rows_class, rows: list[list[int]], new: int = 5) -> list[torch.Tensor]:
        """Log-probs of the last `new` tokens of two rows, each twice in the batch; one of the four
        leaves on the way."""
        prompts = [row[:-new] for row in rows]
        batch = rows_class(self.model, prompts, 2, new)
        owners, logits = [0, 0, 1, 1], batch.logits
        log_probs = [[], []]
        for t in range(new):
            tokens = [rows[owner][len(prompts[owner]) + t] for owner in owners]
            tokens = torch.tensor(tokens, device=logits.device)
            scores = logits.float().log_softmax(-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
            log_probs[0].append(scores[0])
            log_probs[1].append(scores[-1])
            if t == 1:
                keep = torch.tensor([0, 2, 3], device=logits.device)
                batch.keep(keep)
                owners, tokens = [0, 1, 1], tokens[keep]
            logits = batch.append(tokens)
        return [torch.stack(own) for own in log_probs]

    def generate(self, requests: list[tuple[str, list[int]]], n: int, sampling: Sampling):
        """Yields (index into requests, its n Samples) as batches finish. `requests` are (key,
        prompt ids). Prompts are sorted by length, so that little of a batch is padding."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][1]), reverse=True)
        while order:
            width = len(requests[order[0]][1])  # of the longest prompt
            rows_at_once = self.batch_tokens // (width + sampling.max_new_tokens)
            count = max(1, rows_at_once // n)
            batch, order = order[:count], order[count:]
            with without_gradients(self.model.device), packed_weights(self.packed):
                samples = self.sample_batch([requests[i] for i in batch], n, sampling)
            for j, index in enumerate(batch):
                yield index, samples[j * n : j * n + n]

    def sample_batch(self, requests, n: int, s: Sampling) -> list[Sample]:
        """n Samples for each request, request after request; finished rows leave the batch. One
        that fills the model's context is cut there."""
        batch = self.rows(self.model, [prompt for _, prompt in requests], n, s.max_new_tokens)
        logits, device = batch.logits, self.model.device
        eos = torch.tensor(sorted(self.eos), device=device)
        uniforms = []
        for key, _ in requests:
            uniforms += [row_uniforms(s.seed, key, k, s.max_new_tokens) for k in range(n)]
        uniforms = torch.stack(uniforms).to(device)  # (R, max_new_tokens)
        rows = torch.arange(len(uniforms), device=device)  # which rows are still in the batch
        alive = torch.ones_like(rows, dtype=torch.bool)  # which of those go on
        all_tokens = torch.zeros_like(uniforms, dtype=torch.long)
        all_log_probs = torch.zeros_like(uniforms)
        room = [min(s.max_new_tokens, self.context - len(prompt)) for _, prompt in requests]
        sizes = torch.tensor(room, device=device).repeat_interleave(n)  # unless it ends before
        longest = max(len(prompt) for _, prompt in requests)
        ended = torch.zeros_like(alive)
        for step in range(s.max_new_tokens):
            draws = uniforms[rows, step]
            tokens, log_probs = sample_tokens(logits, draws, s.temperature, s.top_p, s.top_k)
            all_tokens[rows, step], all_log_probs[rows, step] = tokens, log_probs
            done = alive & torch.isin(tokens, eos)
            sizes[rows[done]], ended[rows[done]] = step + 1, True
            alive = step + 1 < sizes[rows]
            left = int(alive.sum())
            if left == 0:
                break
            full = longest + step + 1 >= self.context  # nothing may stand behind it
            # a quarter has ended: worth copying the others' cache
            if left <= 0.75 * len(rows) or full and left < len(rows):
                keep = alive.nonzero().squeeze(1)
                batch.keep(keep)
                rows, tokens, alive = rows[keep], tokens[keep], alive[keep]
            logits = batch.append(tokens)
        samples = []
        columns = (t.tolist() for t in (all_tokens, all_log_probs, sizes, ended))
        for row_ids, row_log_probs, size, stopped in zip(*columns):
            finish = "stop" if stopped else "length"
            samples.append(Sample(row_ids[:size], row_log_probs[:size], finish))
        return samples

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
