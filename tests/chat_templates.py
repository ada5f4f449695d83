"""Chat templates as their makers ship them, the special tokens that they are written in, and a tokenizer for each.

qwen3, r1, gemma and llama3 are read from the copies in the package trl (Apache-2.0), which compares them with the hub's
every week; nothing of them is copied here. Their own licences: Qwen3 Apache-2.0; DeepSeek-R1-Distill MIT; Gemma 1 and 2
Gemma Terms of Use; Meta Llama 3 Instruct Llama 3 Community License. smollm2: HuggingFaceTB/SmolLM2-135M-Instruct,
Apache-2.0, whole. mistral: Mistral-7B-Instruct, Apache-2.0, abridged to its turns. Special tokens: a choice of those that
the makers' documentation names.
"""

import importlib.util
from pathlib import Path
from typing import NamedTuple

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

TRL = Path(importlib.util.find_spec("trl").origin).parent / "chat_templates"
SMOLLM2 = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
    " {{ m.content }}</s>{% endif %}{% endfor %}"
)


class Family(NamedTuple):
    template: str
    bos: str | None
    eos: str  # the tokenizer's
    tokens: list[str]  # the other added ones


def shipped(name: str) -> str:
    return (TRL / f"{name}.jinja").read_text(encoding="utf-8")


FAMILIES = {
    "qwen3": Family(shipped("qwen3"), None, "<|im_end|>", [
        "<|endoftext|>", "<|im_start|>", "<|object_ref_start|>", "<|vision_start|>", "<|fim_prefix|>", "<think>",
        "</think>", "<tool_call>", "</tool_call>", "<tool_response>"]),
    "r1": Family(shipped("deepseek_r1_distill"), "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", [
        "<｜User｜>", "<｜Assistant｜>", "<|EOT|>", "<think>", "</think>", "<｜tool▁calls▁begin｜>"]),
    "smollm2": Family(SMOLLM2, "<|im_start|>", "<|im_end|>", ["<|endoftext|>", "<repo_name>", "<file_sep>"]),
    "gemma": Family(shipped("gemma"), "<bos>", "<eos>", [
        "<pad>", "<start_of_turn>", "<end_of_turn>", "\n\n", "<unused0>"]),
    "llama3": Family(shipped("llama3"), "<|begin_of_text|>", "<|end_of_text|>", [
        "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>",
        "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"]),
    "mistral": Family(MISTRAL, "<s>", "</s>", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]"]),
}  # fmt: skip
# Words, then signs with the line ends after them, then blanks: the pattern that Qwen, Llama 3 and R1 split by
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    """Byte-level, so that every text has ids and decodes to itself, with four merges around line ends. Every second
    added token is no "special" one, and a start token comes with every text that is encoded without care."""
    template, bos, eos, tokens = FAMILIES[family]
    merges = [("Ċ", "Ċ"), (".", "Ċ"), ("?", "Ċ"), (".", "ĊĊ")]
    forms = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    inner = Tokenizer(models.BPE(vocab={form: i for i, form in enumerate(forms)}, merges=merges))
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), by_bytes])
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=bos, eos_token=eos, name_or_path=family)
    tokenizer.add_special_tokens({"additional_special_tokens": tokens[::2]})
    tokenizer.add_tokens(tokens[1::2])
    if bos:
        start = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = start
    tokenizer.chat_template = template
    assert len(tokenizer.get_added_vocab()) == len({bos, eos, *tokens} - {None})
    return tokenizer
