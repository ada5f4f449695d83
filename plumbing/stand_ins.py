"""The presets' models without the hub, for dry runs only: documented shapes and chat templates, and
a tokenizer that shows a prompt and counts about as many tokens as theirs."""

import re
from pathlib import Path

from transformers import LlamaConfig, PreTrainedTokenizer, Qwen2Config, Qwen3Config

from plumbing.process import fail

# From each model's config.json on the hub; heads are 128 wide. The guards are Qwen3 models trained
# further, of the same shapes
FIELDS = ["hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"]
FIELDS += ["num_key_value_heads", "vocab_size", "tie_word_embeddings"]
QWEN3 = {
    "0.6B": (Qwen3Config, 1024, 28, 3072, 16, 8, 151_936, True),
    "1.7B": (Qwen3Config, 2048, 28, 6144, 16, 8, 151_936, True),
    "4B": (Qwen3Config, 2560, 36, 9728, 32, 8, 151_936, True),
    "8B": (Qwen3Config, 4096, 36, 12_288, 32, 8, 151_936, False),
    "32B": (Qwen3Config, 5120, 64, 25_600, 64, 8, 151_936, False),
}
R1 = {
    "Qwen-1.5B": (Qwen2Config, 1536, 28, 8960, 12, 2, 151_936, False),
    "Qwen-7B": (Qwen2Config, 3584, 28, 18_944, 28, 4, 152_064, False),
    "Llama-8B": (LlamaConfig, 4096, 32, 14_336, 32, 8, 128_256, False),
    "Qwen-14B": (Qwen2Config, 5120, 48, 13_824, 40, 8, 152_064, False),
}
SHAPES = {f"Qwen/Qwen3-{size}": shape for size, shape in QWEN3.items()}
SHAPES |= {f"Qwen/Qwen3Guard-Gen-{size}": QWEN3[size] for size in ("0.6B", "4B", "8B")}
SHAPES |= {f"deepseek-ai/DeepSeek-R1-Distill-{size}": shape for size, shape in R1.items()}

# By the beginning of a model's name: its chat template, and the special tokens in it
TEMPLATES = {
    "Qwen/Qwen3-": ("qwen3.jinja", None, "<|im_end|>", ["<|im_start|>", "<think>", "</think>"]),
    "deepseek-ai/DeepSeek-R1-Distill-": (
        "r1.jinja",
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"],
    ),
}
# A word of Latin letters with the sign or blank before it, another letter, a digit, signs, blanks
PIECES = re.compile(
    r"[^\r\n\w]?[A-Za-z]+|[^\W\d_]|\d| ?(?:[^\s\w]|_)+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FIRST = 1000  # id of the first piece; special tokens have those below


class StandIn(PreTrainedTokenizer):
    """Each piece of a text is a token, with the next free id when it first comes, so that every
    text decodes to itself. Counts are near those of the real vocabularies, no more."""

    def __init__(self, **settings):
        self.pieces: dict[str, int] = {}
        super().__init__(**settings)

    @property
    def vocab_size(self) -> int:
        return 0  # pieces are not counted, special tokens have the ids from 0 on

    def get_vocab(self) -> dict[str, int]:
        return dict(self.added_tokens_encoder)

    def _tokenize(self, text: str) -> list[str]:
        return PIECES.findall(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.pieces.setdefault(token, FIRST + len(self.pieces))

    def _convert_id_to_token(self, index: int) -> str:
        return list(self.pieces)[index - FIRST]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def config_of(name: str):
    """The config of a model in SHAPES, as far as its weights and cache depend on it."""
    kind, *values = SHAPES[name]
    return kind(**dict(zip(FIELDS, values)))


def tokenizer_of(name: str) -> StandIn:
    for beginning, (file, bos, eos, tokens) in TEMPLATES.items():
        if name.startswith(beginning):
            tokenizer = StandIn(name_or_path=name, bos_token=bos, eos_token=eos)
            tokenizer.add_tokens(tokens, special_tokens=True)
            template = Path(__file__).parent / "presets" / file
            tokenizer.chat_template = template.read_text(encoding="utf-8")
            return tokenizer
    fail(f"the hub is out of reach, and no copy of the chat template of {name} is here")
