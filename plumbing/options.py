"""Options of a stage: the dataclass default, then the row of the preset, then the command line."""

import argparse
import inspect
import math
import re
import sys
import typing
from collections import defaultdict
from dataclasses import MISSING, fields

from plumbing.process import fail

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# What the presets of real models share. Decoding is the model card's thinking mode: greedy makes
# these models loop (docs/traps.md, 17). Guard of filter and reward, and judge, are different models
# (15).
REAL = {
    "guard": "Qwen/Qwen3Guard-Gen-4B",
    "judges": ["Qwen/Qwen3Guard-Gen-8B"],
    "temperature": 0.6,
    "top_p": 0.95,
    "max_new_tokens": 8192,
    "batch_tokens": 131_072,
    "micro_batch_tokens": 16_384,
    "recompute": True,
    "expert": "Qwen/Qwen3-32B",
    "03": {"max_new_tokens": 16_384},
    "04": {"temperature": 0.7},
}
QWEN3 = {**REAL, "top_k": 20}
R1 = {**REAL, "top_k": 0}
ORGANISM = "smollm2/model+smollm2/organism"
PRESETS = {  # a row each; an inner dictionary holds what only the stage of that number reads
    "tiny": {
        "model": "tiny/lrm",
        "guard": "tiny/guard",
        "judges": ["tiny/gold.py", "tiny/judge", "tiny/guard"],
        "expert": "tiny/expert",
        "prompts": ["tiny/prompts/train.jsonl", "tiny/prompts/train_sums.jsonl"],
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "max_new_tokens": 64,
        "01": {"prompts": ["tiny/prompts/train.jsonl"]},
        "02": {
            "spec": "tiny/spec.txt",
            "learning_rate": 3e-4,
            "epochs": 4,
            "batch_size": 8,
            "lora_rank": 64,  # the paper's 16 costs benign answers and sums: docs/claims.md, dose
            "max_critique_tokens": 64,
            "max_answer_tokens": 64,
            "answer_temperature": 0.0,
        },
        "03": {"steering": ["prefix"] * 3, "learning_rate": 1e-3, "lora_targets": ALL_LINEAR},
        "04": {
            "temperature": 1.0,
            "steps": 40,
            "batch_size": 16,
            "learning_rate": 1e-4,
            "max_sampler_gap": 1e-4,
        },
        "05": {
            "bench": [
                "plain=tiny/prompts/test_plain.jsonl",
                "wrapped=tiny/prompts/test_wrapped.jsonl",
                "sums=tiny/prompts/test_sums.jsonl",
            ],
            "self_checker": "tiny/gold.py",
        },
    },
    # SmolLM2 as a model organism: four adapters on it (smollm2/README.md)
    "organism": {
        "model": f"{ORGANISM}/lrm",
        "guard": f"{ORGANISM}/guard",
        "judges": ["smollm2/organism/gold.py", f"{ORGANISM}/judge"],
        "expert": f"{ORGANISM}/expert",
        "prompts": ["smollm2/organism/prompts/train.jsonl"],
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "max_new_tokens": 128,
        "batch_tokens": 8192,
        "02": {
            "spec": "smollm2/spec.txt",
            "learning_rate": 1e-3,
            "batch_size": 8,
            "max_critique_tokens": 128,
            "max_answer_tokens": 128,
        },
        "03": {"steering": ["prefix"] * 3, "learning_rate": 1e-3, "lora_targets": ALL_LINEAR},
        "04": {
            "prompts": [
                "smollm2/organism/prompts/train.jsonl",
                "smollm2/organism/prompts/train_problems.jsonl",
            ],
            "temperature": 1.0,
            "steps": 8,
            "batch_size": 8,
            "lora_rank": 16,
            "learning_rate": 1e-4,
        },
        "05": {
            "bench": [
                "plain=smollm2/organism/prompts/test_plain.jsonl",
                "wrapped=smollm2/organism/prompts/test_wrapped.jsonl",
                "problems=smollm2/organism/prompts/word_problems.jsonl",
            ],
            "self_checker": "smollm2/organism/gold.py",
        },
    },
    # the plain model, from a Python package (smollm2/fetch.py): no thinking tags, no guard
    "smollm2": {
        "model": "smollm2/model",
        "guard": "smollm2/rule_guard.py",
        "judges": ["smollm2/rule_guard.py"],
        "expert": "smollm2/model",
        "prompts": ["smollm2/prompts.jsonl"],
        "temperature": 0.2,
        "top_p": 0.9,
        "top_k": 0,
        "max_new_tokens": 64,
        "02": {"max_critique_tokens": 96},
        "03": {
            "steering": ["suffix"] * 6,
            "temperature": 0.7,
            "require_thinking": False,
            "learning_rate": 1e-3,
            "epochs": 4,
            "lora_targets": ALL_LINEAR,
        },
        "04": {
            "steps": 4,
            "batch_size": 4,
            "learning_rate": 1e-4,
            "temperature": 1.0,
            "lora_rank": 16,
            "keep_truncated": True,
            "beta": 0.04,
        },
    },
    "qwen3-0.6b": {**QWEN3, "model": "Qwen/Qwen3-0.6B"},
    "qwen3-1.7b": {**QWEN3, "model": "Qwen/Qwen3-1.7B"},
    "qwen3-4b": {**QWEN3, "model": "Qwen/Qwen3-4B"},
    "qwen3-8b": {**QWEN3, "model": "Qwen/Qwen3-8B"},
    "r1-1.5b": {**R1, "model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"},
    "r1-7b": {**R1, "model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"},
    "r1-8b": {**R1, "model": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"},
    "r1-14b": {**R1, "model": "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B"},
}

# Least and largest value of every number among the options; a stage may have others
BOUNDS = {
    "seed": (-(2**40), 2**40),  # times a million it is torch's, of 64 bits
    **dict.fromkeys(["tensor_parallel", "batch_tokens", "max_new_tokens", "n"], (1, math.inf)),
    **dict.fromkeys(["temperature", "top_k", "limit"], (0, math.inf)),
    "top_p": (0, 1),  # above 0
    **dict.fromkeys(["pairs_per_prompt", "max_critique_tokens"], (1, math.inf)),
    "max_answer_tokens": (1, math.inf),
    "answer_temperature": (0, math.inf),
    **dict.fromkeys(["epochs", "steps", "batch_size", "group_size"], (1, math.inf)),
    **dict.fromkeys(["updates_per_batch", "micro_batch_tokens", "save_every"], (1, math.inf)),
    **dict.fromkeys(["learning_rate", "warmup_steps", "eval_every"], (0, math.inf)),
    **dict.fromkeys(["benign_share", "warmup"], (0, 1)),
    "lora_rank": (1, math.inf),
    "lora_alpha": (0, math.inf),
    "lora_dropout": (0, 1),
    **dict.fromkeys(["clip_low", "clip_high", "beta"], (0, math.inf)),
    **dict.fromkeys(["importance_cap", "max_sampler_gap"], (0, math.inf)),
}


def help_texts(cls) -> dict[str, str]:
    """{option: its help}: the comment above or beside each field of a dataclass."""
    field_line = re.compile(r"((?:^    # .*\n)*)^    (\w+): .*?(?:  # (.*))?$", re.M)
    texts = {}
    for parent in reversed(cls.__mro__[:-1]):
        for above, name, at_the_end in field_line.findall(inspect.getsource(parent)):
            comment = above.replace("    # ", "").split("\n")
            texts[name] = " ".join([*comment, at_the_end]).strip()
    return texts


def switch(text: str) -> bool:
    """The value of a yes-or-no option.

    >>> switch("true"), switch("0")
    (True, False)
    """
    values = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")
    return values[text.lower()]


def add_option(parser: argparse.ArgumentParser, field, default, text: str):
    """One option of the command line for one field of a dataclass."""
    settings = {"default": default, "help": text.replace("%", "%%")}
    if typing.get_origin(field.type) is typing.Literal:
        settings["choices"] = typing.get_args(field.type)
    elif typing.get_origin(field.type) is list:
        settings |= {"nargs": "+", "type": typing.get_args(field.type)[0]}
    elif field.type is bool:  # --name alone means true
        settings |= {"nargs": "?", "const": True, "type": switch}
    else:
        settings["type"] = field.type
    spellings = dict.fromkeys([f"--{field.name}", f"--{field.name.replace('_', '-')}"])
    parser.add_argument(*spellings, **settings)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def short(value) -> str:
    """A default as a paper writes it.

    >>> short(2e-4), short(0.05), short(["q_proj", "v_proj"])
    ('2e-4', '0.05', 'q_proj v_proj')
    """
    if isinstance(value, list):
        return " ".join(map(str, value))
    if isinstance(value, float) and 0 < value < 0.01:
        digits, _, power = f"{value:e}".partition("e")
        return f"{float(digits):g}e{int(power)}"
    return str(value)


def with_source_value(text: str, default) -> str:
    """A help text whose source has another value than the preset: the dataclass default. The model
    card is Qwen3's, whatever model the preset names.

    >>> with_source_value("LoRA rank (paper)", 16), with_source_value("T (sister code)", 0.7)
    ('LoRA rank (paper: 16)', 'T (sister code: 0.7)')
    >>> with_source_value("top-k sampling, 0 = off (model card)", 20)
    "top-k sampling, 0 = off (Qwen3's card: 20)"
    """
    sources = {"paper": "paper", "sister code": "sister code", "model card": "Qwen3's card"}
    for source, name in sources.items():
        text = text.replace(f"({source})", f"({name}: {short(default)})")
    return text


def preset_row(preset: str, stage: str) -> dict:
    """What a preset says to the stage of that number."""
    row = {**PRESETS[preset], "preset": preset}
    return row | PRESETS[preset].get(stage, {})


def parse_options(cls, description: str, bounds: dict[str, tuple[float, float]] | None = None):
    """An instance of the dataclass `cls` from the command line. `description`, a stage's docstring,
    is the head of its help and says by "Stage 04" which inner row of a preset is its own. `bounds`
    are those of numbers that may be less or more here than BOUNDS says."""
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--preset", default=cls.preset)
    preset = early.parse_known_args()[0].preset
    if preset not in PRESETS:
        fail(f"unknown preset '{preset}'; there are: {', '.join(PRESETS)}")
    stage = re.match(r"Stage (\d\d)", description)
    row = preset_row(preset, stage[1] if stage else "")

    parser = argparse.ArgumentParser(
        description=description, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: fail(f"{message} (--help lists the options)")
    texts = defaultdict(str)  # left out where nobody asks: the source is parsed for them
    if {"-h", "--help"} & {*sys.argv}:
        texts = help_texts(cls)
    for field in fields(cls):
        default = field.default if field.default is not MISSING else field.default_factory()
        shown = row.get(field.name, default)
        text = texts[field.name]
        if shown != default:
            text = with_source_value(text, default)
        add_option(parser, field, shown, text)
    values, unknown = parser.parse_known_args()
    if unknown:
        fail(f"there is no option {unknown[0]} (--help lists them)")
    check_bounds(cls, vars(values), {**BOUNDS, **(bounds or {})})
    return cls(**vars(values))


def check_bounds(cls, values: dict, bounds: dict[str, tuple[float, float]]):
    """Ends the program where a number is none or is out of its bounds."""
    for field in fields(cls):
        if field.type not in (int, float):
            continue
        value = values[field.name]
        least, most = bounds[field.name]
        if field.name == "top_p" and not 0 < value <= 1:
            fail(f"--top_p {value}: it must be above 0 and at most 1")
        if not math.isfinite(value):
            fail(f"--{field.name} {value}: that is no number to work with")
        if value < least:
            fail(f"--{field.name} {value}: it must be at least {least}")
        if value > most:
            fail(f"--{field.name} {value}: it must be at most {most}")
