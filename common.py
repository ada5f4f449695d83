"""Plumbing that the five stages share: options and presets, JSONL, prompts, chat and think parsing, the samplers,
guards, LoRA, token log-probs, checkpoints. Nothing that a paper is about lives here: the losses, the selection rule,
the steering text, the advantages and the rewards stand in the stage that they belong to."""

import argparse
import dataclasses
import errno
import fcntl
import gc
import hashlib
import importlib.util
import inspect
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from accelerate import PartialState
from jinja2 import TemplateError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import DynamicCache, HfArgumentParser
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils import logging as transformers_logging

transformers_logging.disable_progress_bar()


# Options and presets --------------------------------------------------------------------------------------------------
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Decoding is the model card's thinking mode: greedy makes these models loop (trap 17). Filter and reward guard, and the
# judge, are different models (trap 15).
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
QWEN3, R1 = {**REAL, "top_k": 20}, {**REAL, "top_k": 0}
PRESETS = {  # one row each; an inner dictionary holds what only the stage of that number reads
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
        "02": {"spec": "tiny/spec.txt", "learning_rate": 3e-4, "epochs": 4, "batch_size": 8, "max_critique_tokens": 64},
        "03": {"steering": ["prefix"] * 3, "learning_rate": 1e-3, "lora_targets": ALL_LINEAR},
        "04": {"temperature": 1.0, "steps": 40, "batch_size": 16, "learning_rate": 1e-4, "max_sampler_gap": 1e-4},
        "05": {
            "bench": [f"{name}=tiny/prompts/test_{name}.jsonl" for name in ("plain", "wrapped", "sums")],
            "self_checker": "tiny/gold.py",
        },
    },
    "smollm2": {  # a real model that needs no hub (smollm2/fetch.py); it has no thinking tags and no guard beside it
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


def fail(message: str):
    """Ends the program with one line on stderr and exit status 1: what is wrong, where, what to do."""
    raise SystemExit(f"error: {' '.join(message.splitlines())}")


OUTSIDE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


def stop(*_):
    """Ends the run on an interrupt, without an exception: Python forgets those that come up in a destructor."""
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"\nstopped: what is finished is kept, the same command goes on\n")
    for child in multiprocessing.active_children():  # vLLM's engine
        child.terminate()
    with suppress(RuntimeError):  # interrupted while it printed
        sys.stdout.flush()
    os._exit(130)  # at once, where leaving in order waits for requests under way


def run_stage(main):
    """A stage as a command: an interrupt, a full disk or a folder that can't be written end it with one line."""
    signal.signal(signal.SIGINT, stop)
    try:
        main()
    except Exception as error:
        number = re.search(r"(?:\[Errno|\(os error) (\d+)", str(error))  # an OSError, or a library written in Rust
        if not number or int(number[1]) not in OUTSIDE:
            raise
        fail(f"{str(error).splitlines()[0]}; what is finished is kept, the same command goes on")


def processes() -> PartialState:
    """This process among those of `accelerate launch`: num_processes, process_index, device. Alone, it is 0 of 1."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))


@dataclass
class StageOptions:
    # row of PRESETS in common.py that sets every default below; any option on the command line wins over it
    preset: str = "tiny"
    run: str = ""  # folder of this run: options, rows and checkpoints; the same command again goes on where it stopped
    seed: int = 0  # seed of sampling, shuffling and initialisation
    engine: Literal["hf", "vllm"] = "hf"  # what samples: our loop over transformers (any machine) or vLLM (GPU)
    tensor_parallel: int = 1  # vllm engine: GPUs that share one model, for models that one GPU can't hold
    batch_tokens: int = 32_768  # hf engine: prompt + new tokens in one batch, what the KV cache must hold
    enable_thinking: bool = True  # passed to the chat template; templates without the switch ignore it
    # check everything, say what would be done and what it would cost by formulas, and do nothing
    dry_run: bool = False


@dataclass
class SamplingOptions(StageOptions):
    temperature: float = 0.6  # sampling temperature, 0 = greedy (model card)
    top_p: float = 0.95  # nucleus sampling, 1 = off (model card)
    top_k: int = 20  # top-k sampling, 0 = off (model card)
    max_new_tokens: int = 64  # longest response, tokens


def parse_options(cls, description: str):
    """An instance of `cls` from the command line: dataclass default < preset < option given. The comment above or
    beside a field is its help text."""
    option = re.compile(r"((?:^    # .*\n)*)^    (\w+): .*?(?:  # (.*))?$", re.M)
    for c in reversed(cls.__mro__[:-1]):
        for above, name, beside in option.findall(inspect.getsource(c)):
            text = " ".join([*above.replace("    # ", "").split("\n"), beside]).strip()
            cls.__dataclass_fields__[name].metadata = {"help": text.replace("%", "%%")}
    parser = HfArgumentParser(cls, description=description, formatter_class=_HelpFormatter, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message} (--help lists the options)")
    early = argparse.ArgumentParser(add_help=False)
    early.add_argument("--preset", default=cls.preset)
    preset = early.parse_known_args()[0].preset
    if preset not in PRESETS:
        fail(f"unknown preset '{preset}'; there are: {', '.join(PRESETS)}")
    row = {**PRESETS[preset], **PRESETS[preset].get(Path(sys.argv[0]).name[:2], {}), "preset": preset}
    parser.set_defaults(**{k: v for k, v in row.items() if k in cls.__dataclass_fields__})
    parsed, unknown = parser.parse_args_into_dataclasses(look_for_args_file=False, return_remaining_strings=True)
    if unknown:
        fail(f"there is no option {unknown[0]} (--help lists them)")
    for name, value in dataclasses.asdict(parsed).items():
        off_at_zero = getattr(cls, name, 1) == 0 or name in ("top_k", "warmup_steps")
        least = 0 if off_at_zero or isinstance(value, float) else 1
        if type(value) in (int, float) and name != "seed" and not value >= least:
            fail(f"--{name} {value}: it must be at least {least}")
    if not 0 < getattr(parsed, "top_p", 1.0) <= 1:
        fail(f"--top_p {parsed.top_p}: it must be above 0 and at most 1")
    return parsed


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


# Run folders and JSONL ------------------------------------------------------------------------------------------------
def fingerprint(path: str) -> str:
    """Content hash of a file or folder, 12 hex digits; of files over 64 MiB, 64 evenly spaced MiB are read."""
    digest = hashlib.sha256()
    for file in sorted(p for p in [Path(path), *Path(path).rglob("*")] if p.is_file()):
        size, step = file.stat().st_size, 1 << 20
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as f:
            for offset in range(0, size, step if size <= 64 * step else size // 64):
                f.seek(offset)
                digest.update(f.read(step))
    return digest.hexdigest()[:12]


@cache
def lock(run: Path):
    """A file that this process holds until it ends; a second one is refused."""
    file = (run / "lock").open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is at work in {run}; wait until it ends, or choose another --run")
    except OSError:  # a file system without locks
        pass
    return file


def open_run(options, free: tuple[str, ...] = ()) -> Path:
    """The run folder, made or reopened; reopening with other options or changed inputs is an error that names them.
    Options in `free` may change from call to call."""
    if options.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        fail("--engine vllm needs the package vllm: pip install -r requirements.txt, or use --engine hf")
    if options.tensor_parallel > 1 and (options.engine != "vllm" or processes().num_processes > 1):
        fail("--tensor_parallel is for --engine vllm in one process, which then uses that many GPUs")
    if processes().process_index > 0:  # the first process checks, writes and speaks for all
        processes().wait_for_everyone()
        sys.stdout = open(os.devnull, "w")
        return Path(options.run)
    run = Path(options.run)
    record = {name: v for name, v in dataclasses.asdict(options).items() if name not in ("run", "dry_run", *free)}
    for value in list(record.values()):
        for item in value if isinstance(value, list) else [value]:
            path = re.split("[=:]", local_name(str(item)))[-1]
            if re.search("[/.]", path) and Path(path).exists():
                record[f"content of {path}"] = fingerprint(path)
    run.mkdir(parents=True, exist_ok=True)
    lock(run)
    known = run / "options.json"
    if known.exists():
        before = json.loads(known.read_text())["options"]
        changed = [
            f"{k} ({before.get(k)} there, {record.get(k)} now)"
            for k in before | record
            if before.get(k) != record.get(k)
        ]
        if changed:
            fail(f"{run} was made with other options: {'; '.join(changed)}. Repeat them, or choose another --run")
    else:
        packages = ["torch", "transformers", "accelerate"] + ["vllm"] * (options.engine == "vllm")
        versions = {"python": sys.version.split()[0]}
        versions |= {p: importlib.import_module(p).__version__ for p in packages}
        write_atomic(known, json.dumps({"options": record, "versions": versions}, indent=1))
    processes().wait_for_everyone()
    return run


def write_atomic(path: Path, text: str):
    """The whole file or none of it; of several processes, the first one writes."""
    if processes().process_index > 0:
        return
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_jsonl(path) -> list[dict]:
    rows = []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        fail(f"cannot read {path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 (byte {error.start})")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                fail(f"{path}, line {number}: not JSON ({getattr(error, 'msg', error)})")
            if not isinstance(row, dict):
                fail(f"{path}, line {number}: not a JSON object")
            rows.append(row)
    return rows


def reopen_jsonl(path: Path) -> list[dict]:
    """Rows of an output file that may not exist yet; a last line cut short by a kill is removed and reported."""
    if not path.exists():
        return []
    data = path.read_bytes()
    if data and not data.endswith(b"\n"):
        whole = data.rfind(b"\n") + 1
        print(f"{path}: removed a half-written last line ({len(data) - whole} bytes)")
        os.truncate(path, whole)
    return read_jsonl(path)


def append_jsonl(path: Path, rows: list[dict]):
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def once_per_row(path: Path, rows: list[dict], work) -> dict[str, dict]:
    """{id: finished row} of all `rows`: those in `path` already, and those that `work(rows)` makes of the others and
    yields in lists, appended as they come. Every process works on its share, in a file of its own beside `path`, and
    one that died loses nothing: the files are read together, and joined at the end."""
    here = processes()
    own = path.with_suffix(f".process{here.process_index}.jsonl") if here.process_index else path

    def read() -> dict[str, dict]:
        files = [path, *path.parent.glob(f"{path.stem}.process*.jsonl")]
        found = {row["id"]: row for file in files for row in reopen_jsonl(file)}
        here.wait_for_everyone()  # nobody writes while another one reads
        return found

    done = read()
    todo = [row for row in rows if row["id"] not in done]
    for made in work(todo[here.process_index :: here.num_processes]):
        append_jsonl(own, made)
        done |= {row["id"]: row for row in made}
    here.wait_for_everyone()
    if here.num_processes > 1:
        done = read()
    others = list(path.parent.glob(f"{path.stem}.process*.jsonl"))
    if others and here.process_index == 0:
        write_jsonl(path, list(done.values()))
        for file in others:
            file.unlink()
    return done


def write_jsonl(path: Path, rows: list[dict]):
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def summary(run: Path, stage: str, lines: dict, next_command: str):
    """What every stage prints last, and leaves in <run>/summary.txt: rows in, kept, dropped and why, where the results
    are, the next command."""
    width = max(map(len, lines))
    text = "\n".join([stage, *(f"  {k:<{width}}  {v}" for k, v in lines.items()), f"next: {next_command}"])
    write_atomic(run / "summary.txt", text + "\n")
    print(f"\n{text}")


# Prompts --------------------------------------------------------------------------------------------------------------
PROMPT_FIELDS = ["prompt", "question", "problem", "forbidden_prompt", "adversarial", "vanilla", "Goal", "goal"]
SAFE_WORDS = {"safe": False, "benign": False, "harmless": False, "unsafe": True, "harmful": True}


def read_source(source: str, **load) -> list[dict]:
    """Rows as they stand in a local JSONL/CSV/Parquet file or a hub dataset ("owner/name[:config[:split]]"), `load`
    being further arguments of load_dataset."""
    suffix = Path(source).suffix
    if suffix == ".jsonl":
        rows = read_jsonl(source)
    else:
        from datasets import load_dataset

        if suffix in (".csv", ".parquet") and not Path(source).exists():
            fail(f"no prompt file at {source}")
        name, config, split = [*source.split(":"), "", ""][:3]
        try:
            if suffix in (".csv", ".parquet"):
                rows = list(load_dataset(suffix[1:], data_files=source, split="train"))
            else:
                rows = list(load_dataset(name, config or None, split=split or "train", **load))
        except Exception as error:  # the hub, its network and the parsers raise many kinds
            cause = error.__cause__ or error
            fail(f"cannot load prompts from {source}: {type(cause).__name__} {' '.join(str(cause).split())[:200]}")
    return rows or fail(f"{source} holds no rows")


def no_id_twice(rows: list[dict], where: str) -> list[dict]:
    repeated = [i for i, count in Counter(r["id"] for r in rows).items() if count > 1]
    return fail(f"id '{repeated[0]}' occurs twice in {where}") if repeated else rows


def prompt_rows(raw: list[dict], source: str, limit: int = 0) -> list[dict]:
    """Rows {"id", "prompt": str or chat messages, "harmful": bool, "source", "gold" for maths rows} of raw ones, in our
    spelling or the public ones. `limit` > 0 takes that many, always the same ones."""
    labels = [str(r["label"]).strip().lower() for r in raw if "label" in r]
    verdicts = any(label in SAFE_WORDS for label in labels)
    rows = [_prompt_row(r, f"{source}, row {n}", Path(source).stem, n, verdicts) for n, r in enumerate(raw, 1)]
    if 0 < limit < len(rows):
        rows = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), limit))]
    return no_id_twice(rows, source)


def load_prompts(sources: list[str], limit: int = 0) -> list[dict]:
    """The prompt rows of all sources; `limit` > 0 takes that many of each."""
    if not sources:
        fail("no prompts: give --prompts one or more files or hub datasets")
    rows = [row for source in sources for row in prompt_rows(read_source(source), source, limit)]
    return no_id_twice(rows, ", ".join(sources))


def _prompt_row(raw: dict, where: str, stem: str, number: int, label_is_verdict: bool) -> dict:
    name = next((k for k in PROMPT_FIELDS if str(raw.get(k) or "").strip()), None)
    if name is None:
        fail(f"{where}: no prompt; expected one of the fields {', '.join(PROMPT_FIELDS)}")
    prompt, harmful, label = raw[name], raw.get("harmful"), raw.get("label")
    if isinstance(prompt, list):
        roles = [m.get("role") if isinstance(m, dict) and isinstance(m.get("content"), str) else None for m in prompt]
        if any(role not in ("system", "user", "assistant") for role in roles) or roles[-1] != "user":
            fail(f"{where}, field {name}: chat messages need a text and a role: system, assistant or (the last) user")
        prompt = [{"role": m["role"], "content": m["content"]} for m in prompt]  # a template reads nothing else
        prompt = prompt[0]["content"] if len(prompt) == 1 else prompt
    elif not isinstance(prompt, str):
        fail(f"{where}, field {name}: {type(prompt).__name__} where text or chat messages belong")
    answers = ["gold"]
    if harmful is None and label_is_verdict:
        harmful = SAFE_WORDS.get(str(label).strip().lower())
        if harmful is None:
            fail(f"{where}, field label: '{str(label)[:99]}' is none of {', '.join(SAFE_WORDS)}")
    elif harmful is None and name in ("question", "problem", "prompt"):
        answers += ["answer", "label"]
    if harmful is None and isinstance(raw.get("data_type"), str):  # WildJailbreak: vanilla_harmful, adversarial_benign
        harmful = SAFE_WORDS.get(raw["data_type"].rpartition("_")[2])
    field = next((k for k in answers if raw.get(k) not in (None, "")), None)
    gold = str(raw[field]).rpartition("####")[2].strip() if field else ""  # GSM8K's final answer
    types = (str,) if field == "label" else (str, int, float)  # a label that is a number may say what is harmful
    if field and (harmful or type(raw[field]) not in types or gold in ("", "nan", "inf", "-inf")):
        fail(f"{where}, field {field}: '{str(raw[field])[:99]}' is no right answer of a benign prompt")
    harmful = False if field and harmful is None else harmful
    if not isinstance(harmful, bool):
        fail(f'{where}: nothing says whether the prompt is harmful; add the field "harmful": true or false')
    row_id = f"{stem}-{number}" if raw.get("id") is None else raw["id"]
    if type(row_id) not in (str, int) or row_id == "":
        fail(f"{where}, field id: {type(row_id).__name__} where a text or a whole number belongs")
    if raw.get("verdict") not in (None, "safe", "unsafe"):
        fail(f"{where}, field verdict: '{str(raw['verdict'])[:99]}' is neither safe nor unsafe")
    row = {"id": str(row_id), "prompt": prompt, "harmful": harmful, "source": str(raw.get("source") or stem)}
    row |= {k: str(raw[k]) for k in ("split", "category", "verdict") if raw.get(k) is not None}
    row |= {"gold": gold} if field else {}
    for key, value in row.items():
        if re.search("[\ud800-\udfff]", json.dumps(value, ensure_ascii=False)):
            fail(f"{where}, field {name if key == 'prompt' else key}: half of a surrogate pair, which is no text")
    return row


def messages_of(prompt) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


# Chat: messages to ids, text to thinking and answer -------------------------------------------------------------------
def encode_plain(tokenizer, text: str) -> list[int]:
    """Ids of `text` with nothing in it read as a special token, whatever it contains (trap 7).

    A user's prompt or a judged answer may hold `<|im_end|>` or `</think>`. Each such string is cut after its first
    character, so that the tokenizer meets two harmless halves. Added tokens of blanks, as Gemma has, are plain text.
    """
    added = "|".join(re.escape(token) for token in tokenizer.get_added_vocab() if token.strip()) or "(?!)"
    cuts = [0, *(match.start() + 1 for match in re.finditer(f"(?={added})", text)), len(text)]
    pieces = [text[start:end] for start, end in zip(cuts, cuts[1:])]
    return [i for piece in pieces if piece for i in tokenizer.encode(piece, add_special_tokens=False)]


def render_chat(tokenizer, messages: list[dict], generate: bool = True, **template_options) -> tuple[list[int], bool]:
    """(ids, opened): the chat template's ids for `messages`, contents as plain text, and whether it opens `<think>`.

    The template is rendered around place marks and only its own text may become special tokens; ids go to models and
    guards as they are, so no second tokenizer pass adds another BOS (trap 5). Blanks around a content, and the thinking
    of turns before a generation, are the template's to keep or drop. `opened` is read off the rendered text (R1
    templates end in `<think>\\n`), never decided by the model's name (trap 3).
    """
    marked, texts = [], []
    for i, m in enumerate(messages):
        whole, place = m["content"].strip(), f"\ue000{i}\ue001"
        text, (_, closed, answer) = whole, whole.rpartition("</think>")
        if closed and generate and m["role"] == "assistant":
            text, place = answer.strip(), "<think>\ue002</think>" + answer.replace(answer.strip(), place, 1)
        marked.append({**m, "content": m["content"].replace(whole, place, 1)})
        texts.append(text)
    try:
        text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=generate, **template_options)
    except TemplateError as error:  # Gemma's takes no system turn
        fail(f"the chat template of {tokenizer.name_or_path} refuses {[m['role'] for m in messages]}: {error}")
    ids: list[int] = []
    for piece in re.split("((?:<think>\\s*\ue002\\s*</think>\\s*)?\ue000\\d+\ue001)", text):
        if piece.endswith("\ue001"):
            i = int(piece[piece.index("\ue000") + 1 : -1])
            ids += encode_plain(tokenizer, texts[i] if piece[0] == "\ue000" else messages[i]["content"].strip())
        elif piece:
            ids += tokenizer.encode(piece, add_special_tokens=False)
    return ids, text.rfind("<think>") > text.rfind("</think>")


def split_response(text: str, opened: bool = False) -> tuple[str, str, str]:
    """(thinking, answer, state); `opened` says that the prompt's template already wrote `<think>`.

    The first `</think>` ends the thinking: whatever follows reaches the user, so it is judged. An unclosed thinking has
    no answer, whether it was cut or just ended (trap 2).

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
    if opened or "</think>" in text:
        thinking, closed, answer = text.partition("</think>")
        return thinking.strip(), answer.strip(), "closed" if closed else "truncated"
    return "", text.strip(), "no_thinking"


# The sampler ----------------------------------------------------------------------------------------------------------
def sample_tokens(logits, uniforms, temperature: float, top_p: float = 1.0, top_k: int = 0):
    """One token per row by inverse CDF: logits (B, V), uniforms (B,) in [0, 1) -> tokens (B,), log-probs (B,).

    Log-probs are those of softmax(logits / T) before top-k and top-p cut it: what the trainer computes (trap 12).
    Temperature 0 is greedy, with log-probs at T = 1.
    """
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
        tokens = torch.searchsorted(cdf, (uniforms * cdf[:, -1]).unsqueeze(1), right=True)  # (B, 1)
        tokens = tokens.clamp_(max=cdf.size(1) - 1)
        tokens = (order.gather(1, tokens) if order is not None else tokens).squeeze(1)
    return tokens, log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)


def row_uniforms(seed: int, key: str, sample: int, count: int) -> torch.Tensor:
    """All random numbers of one row, drawn ahead: its text depends on (seed, key, sample), never on its neighbours."""
    digest = hashlib.sha256(f"{seed}|{key}|{sample}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator)


def request_seed(seed: int, key: str, digits: int = 8) -> int:
    """The seed of a request to vLLM or a server, which adds 0 … n - 1 to it for its n samples."""
    return int(hashlib.sha256(f"{seed}|{key}".encode()).hexdigest()[:digits], 16)


class Sampling(NamedTuple):
    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


class Sample(NamedTuple):
    ids: list[int]  # response tokens, the end token included if it came
    log_probs: list[float]  # of each token, at the sampling temperature
    finish: str  # "stop" or "length"


class Reply(NamedTuple):
    text: str  # the response without its end token
    opened: bool  # whether the prompt's template had already written `<think>`
    prompt_tokens: int
    tokens: int
    finish: str  # "stop" or "length"
    sample: Sample | None  # its ids and log-probs, where the engine tells them


class Sampler:
    """What the engines and the server share: chats in, replies out. `generate` is each one's own."""

    context = math.inf  # tokens that the model reads; a server refuses more by itself

    def replies(self, chats: list[tuple[str, list[dict]]], n: int, sampling: Sampling, **template_options):
        """Yields (index into chats, its n Replies) as they finish. `chats` are (key, messages)."""
        rendered = [render_chat(self.tokenizer, messages, **template_options) for _, messages in chats]
        requests = [(key, ids) for (key, _), (ids, _) in zip(chats, rendered)]
        for key, ids in requests:
            if len(ids) >= self.context:
                fail(f"prompt {key[:99]} has {len(ids)} tokens, {self.tokenizer.name_or_path} reads {self.context}")
        for index, samples in self.generate(requests, n, sampling):
            ids, opened = rendered[index]
            texts = [self.tokenizer.decode([t for t in s.ids if t not in self.eos]) for s in samples]
            yield index, [Reply(t, opened, len(ids), len(s.ids), s.finish, s) for t, s in zip(texts, samples)]


def one_token_attention(module, query, key, value, attention_mask, scaling=None, **more):
    """transformers' attention, but for one new token the query heads (R, heads, 1, D) that share a key (R, KV heads, L,
    D) are the rows of one product: transformers copies keys and values for each of them."""
    if query.size(2) > 1 or more.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)
    query = query.view(*key.shape[:2], -1, key.size(3))  # (R, KV heads, heads / KV heads, D)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return mixed.reshape(len(key), 1, -1, value.size(3)), None


class RoomyLayer(DynamicLayer):
    """A layer's keys and values with room for 64 more tokens: transformers' own copies all of them for every token,
    which was 38 % of the time of sampling from tiny/lrm."""

    def update(self, key, value, *_, **__):
        start, end = self.get_seq_length(), self.get_seq_length() + key.size(2)
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        if start == 0 or end > self.room.size(3) or len(key) != self.room.size(1):  # full, or rows have left
            self.room = key.new_empty(2, *key.shape[:2], end + 64, key.size(3))
            if start:
                self.room[0, :, :, :start], self.room[1, :, :, :start] = self.keys, self.values
        self.room[0, :, :, start:end], self.room[1, :, :, start:end] = key, value
        self.keys, self.values = self.room[:, :, :, :end]
        return self.keys, self.values


AttentionInterface.register("one_token", one_token_attention)
AttentionMaskInterface.register("one_token", sdpa_mask)


class HfSampler(Sampler):
    """Our sampling loop over a transformers model: any machine, and the very weights that are being trained."""

    def __init__(self, model, tokenizer, batch_tokens: int):
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.eos = end_tokens(model.generation_config, tokenizer)
        self.context = getattr(model.config, "max_position_embeddings", math.inf)

    @torch.inference_mode()
    def generate(self, requests: list[tuple[str, list[int]]], n: int, s: Sampling):
        """Yields (index into requests, its n Samples) as batches finish. `requests` are (key, prompt ids).

        Prompts are sorted by length; each is computed once and its KV cache expanded to its n rows; finished rows
        leave the batch. B = prompts, R = rows = B * n still in the batch, P = longest prompt, V = vocabulary.
        """
        model, device = self.model, self.model.device
        eos = torch.tensor(sorted(self.eos), device=device)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i][1]), reverse=True)
        while order:
            width = len(requests[order[0]][1])  # P
            count = max(1, self.batch_tokens // (width + s.max_new_tokens) // n)
            batch, order = order[:count], order[count:]
            prompts = [requests[i][1] for i in batch]
            lengths = torch.tensor([len(p) for p in prompts], device=device)  # (B,)
            ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)  # (B, P), left-padded
            mask = torch.arange(width, device=device) >= (width - lengths).unsqueeze(1)  # (B, P)
            ragged = not bool(mask.all())  # equal lengths need no mask, and attention is faster without
            cache = DynamicCache(config=model.config)
            cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
            out = model(
                input_ids=ids,
                past_key_values=cache,
                attention_mask=mask.long() if ragged else None,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                use_cache=True,
                logits_to_keep=1,
            )
            cache.batch_repeat_interleave(n)
            logits = out.logits[:, -1].repeat_interleave(n, 0)  # (R, V)
            lengths = lengths.repeat_interleave(n)  # (R,)
            mask = F.pad(mask, (0, s.max_new_tokens), value=True).repeat_interleave(n, 0).long() if ragged else None
            uniforms = [row_uniforms(s.seed, requests[i][0], k, s.max_new_tokens) for i in batch for k in range(n)]
            uniforms = torch.stack(uniforms).to(device)  # (R, max_new_tokens)
            rows = torch.arange(len(batch) * n, device=device)  # which rows are still in the batch
            alive = torch.ones_like(rows, dtype=torch.bool)  # which of those have not ended
            tokens_out = torch.zeros_like(uniforms, dtype=torch.long)
            log_probs_out = torch.zeros_like(uniforms)
            length_out = torch.full_like(rows, s.max_new_tokens)
            ended = torch.zeros_like(alive)
            for step in range(s.max_new_tokens):
                draws = uniforms[rows, step]
                tokens, log_probs = sample_tokens(logits, draws, s.temperature, s.top_p, s.top_k)
                tokens_out[rows, step], log_probs_out[rows, step] = tokens, log_probs
                done = alive & torch.isin(tokens, eos)
                length_out[rows[done]], ended[rows[done]] = step + 1, True
                alive &= ~done
                left = int(alive.sum())
                if left == 0 or step + 1 == s.max_new_tokens:
                    break
                if left <= 0.75 * len(rows):  # a quarter has ended: worth copying the cache of the others
                    keep = alive.nonzero().squeeze(1)
                    cache.batch_select_indices(keep)
                    rows, tokens, alive = rows[keep], tokens[keep], alive[keep]
                logits = model(
                    input_ids=tokens.unsqueeze(1),
                    attention_mask=mask[rows, : width + step + 1] if ragged else None,
                    position_ids=(lengths[rows] + step).unsqueeze(1),
                    past_key_values=cache,
                    use_cache=True,
                ).logits[:, -1]
            columns = (t.tolist() for t in (tokens_out, log_probs_out, length_out, ended))
            samples = [Sample(t[:k], p[:k], "stop" if e else "length") for t, p, k, e in zip(*columns)]
            for j, index in enumerate(batch):
                yield index, samples[j * n : j * n + n]

    def load_weights(self, folder: Path):
        """A checkpoint's weights in place of its own."""
        for file in sorted(folder.glob("*.safetensors")):
            self.model.load_state_dict(load_file(file, device=str(self.model.device)), strict=False)

    def close(self):
        """Gives the memory of the model back."""
        self.model = None
        gc.collect()
        torch.cuda.empty_cache()  # does nothing without a GPU


class WeightReceiver:
    """What vLLM's worker learns from us (worker_extension_cls)."""

    def receive_weights(self, folder: str):
        self.reload_weights(weights_path=folder)
        if not torch.cuda.is_available():  # vLLM 0.32 on a CPU: a head tied to the embedding keeps its old packed copy
            head = self.model_runner.get_model().lm_head
            head.quant_method.process_weights_after_loading(head)


class VllmSampler(Sampler):
    """The same interface over vLLM: continuous batching, prefix caching, a seed per request."""

    def __init__(self, name: str, tokenizer, tensor_parallel: int = 1, beside_trainer: bool = False):
        from vllm import LLM

        extra = {"tensor_parallel_size": tensor_parallel}
        extra |= {"worker_extension_cls": "common.WeightReceiver"} if beside_trainer else {}
        if beside_trainer and torch.cuda.is_available():
            extra |= {"enable_sleep_mode": True, "gpu_memory_utilization": 0.5}
        if not torch.cuda.is_available():  # vLLM 0.32 on a CPU: a prompt prefilled in chunks breaks seeded requests
            extra |= {"dtype": "float32", "enforce_eager": True, "enable_chunked_prefill": False}
        elif processes().num_processes > 1:  # one engine and one GPU for each process
            visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
            os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[processes().local_process_index]
        self.llm = LLM(model=name, enable_prefix_caching=True, logprobs_mode="processed_logprobs", **extra)
        self.tokenizer, self.eos, self.asleep = tokenizer, end_tokens_of(name, tokenizer), False
        self.context = self.llm.model_config.max_model_len

    def generate(self, requests, n, s: Sampling):
        from vllm import SamplingParams

        fixed = {"n": n, "temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k or -1, "logprobs": 0}
        fixed |= {"max_tokens": s.max_new_tokens, "stop_token_ids": sorted(self.eos)}
        for start in range(0, len(requests), 256):  # in blocks, so that rows reach the disk as they are made
            block = requests[start : start + 256]
            params = [SamplingParams(seed=request_seed(s.seed, key), **fixed) for key, _ in block]
            outputs = self.llm.generate([{"prompt_token_ids": ids} for _, ids in block], params, use_tqdm=False)
            for index, output in enumerate(outputs, start):
                samples = []
                for o in output.outputs:
                    log_probs = [found[token].logprob for token, found in zip(o.token_ids, o.logprobs)]
                    samples.append(Sample(list(o.token_ids), log_probs, o.finish_reason))
                yield index, samples

    def load_weights(self, folder: Path):
        """A checkpoint's weights in place of its own; what it cached with the old ones is forgotten."""
        if self.asleep:
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
        """Ends the engine's processes: a deleted LLM object alone keeps them, and the GPU's memory, alive."""
        self.llm.llm_engine.engine_core.shutdown()


class Client:
    """A model behind an OpenAI-compatible URL, named `model@https://host/v1`; its key, if it needs one, stands in the
    environment variable OPENAI_API_KEY and nowhere else."""

    at_once, seconds = 32, 600  # requests side by side; the longest wait for an answer

    def __init__(self, name: str):
        from openai import OpenAI, Timeout

        self.name = name
        self.model, _, url = name.rpartition("@")
        key, timeout = os.environ.get("OPENAI_API_KEY") or "none", Timeout(self.seconds, connect=30)
        self.client = OpenAI(base_url=url, api_key=key, timeout=timeout, max_retries=6)  # each after a longer wait

    def answers(self, create, requests: list[dict], read, wanted: str):
        """Yields (index into requests, read(answer)) as they come; `read` gives nothing, or raises, if the answer isn't
        what is `wanted`. A request that still fails after the retries ends the stage, once those beside it have come
        back."""
        failed: list[BaseException] = []

        def ask(request):
            if failed:
                raise failed[0]
            for attempt in range(3):  # the client repeats what fails; this, what succeeds and is not what is wanted
                time.sleep(attempt)
                body = create(**request).text
                with suppress(ValueError, LookupError, TypeError, AttributeError):
                    if found := read(json.loads(body)):
                        return found
            raise ValueError(f"no {wanted}, but {body[:120]!r}")

        pool = ThreadPoolExecutor(self.at_once)
        try:
            jobs = {pool.submit(ask, request): index for index, request in enumerate(requests)}
            for job in as_completed(jobs):
                index = jobs.pop(job)  # and with it the answer's memory
                if error := job.exception():  # the client, the network, and answers that are not what is wanted
                    failed.append(error)
                else:
                    yield index, job.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if failed:
            said = " ".join(str(failed[0]).split()).replace(self.client.api_key, "OPENAI_API_KEY")
            what = f"{type(failed[0]).__name__}: {said[:200]}"
            fail(f"{self.name}: {what}; finished rows are kept, the same command goes on")

    def close(self):
        self.client.close()


class Endpoint(Client):
    """Chats in, texts out, as any endpoint can; template and tokenizer are the server's."""

    def replies(self, chats, n: int, s: Sampling, **_):
        """As Sampler.replies."""
        fixed = {"model": self.model, "n": n, "temperature": s.temperature, "top_p": s.top_p}
        fixed |= {"max_completion_tokens": s.max_new_tokens}
        requests = [{**fixed, "seed": request_seed(s.seed, key, 7), "messages": messages} for key, messages in chats]

        def read(done):
            used = done.get("usage") or {}  # some servers count no tokens
            sent, written = (used.get(k) or 0 for k in ("prompt_tokens", "completion_tokens"))
            found = [((c["message"].get("content") or "").strip(), c["finish_reason"]) for c in done["choices"]]
            if len(found) == n:
                texts = [text.encode("utf-8", "replace").decode() for text, _ in found]  # halves of surrogates
                return [Reply(t, False, sent, written // n, f, None) for t, (_, f) in zip(texts, found)]

        create = self.client.chat.completions.with_raw_response.create
        return self.answers(create, requests, read, f"chat completion with {n} choices")


class ServerSampler(Client, Sampler):
    """The same interface over a running `vllm serve`, named `model@http://host:8000/v1`, which has engines on as many
    machines as it likes. Token ids go there and come back: template and end tokens are those of the folder or hub id
    here. Log-probs are those at the sampling temperature if the server was started with `--logprobs-mode
    processed_logprobs`, else at temperature 1; where top-k or top-p cuts, vLLM gives those of what is left."""

    at_once, seconds = 256, 7200  # enough for several engines; a long answer may have to wait for its turn

    def __init__(self, name: str):
        super().__init__(name)
        self.tokenizer = load_tokenizer(self.model)
        self.eos = end_tokens_of(self.model, self.tokenizer)

    def generate(self, requests, n, s: Sampling):
        fixed = {"model": self.model, "n": n, "temperature": s.temperature, "top_p": s.top_p, "logprobs": 0}
        fixed |= {"max_tokens": s.max_new_tokens, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        more = {"top_k": s.top_k, "stop_token_ids": sorted(self.eos), "return_token_ids": True}
        more |= {"min_p": 0.0, "repetition_penalty": 1.0}  # a penalty left out would be the model's generation config's
        fixed |= {"extra_body": more}
        bodies = [{**fixed, "seed": request_seed(s.seed, key), "prompt": ids} for key, ids in requests]

        def read(done):
            samples = []
            for c in done["choices"]:
                ids, log_probs = [*map(int, c["token_ids"])], [*map(float, c["logprobs"]["token_logprobs"])]
                if len(ids) == len(log_probs) > 0 and c["finish_reason"] in ("stop", "length"):
                    samples.append(Sample(ids, log_probs, c["finish_reason"]))
            return samples if len(samples) == n else None

        gives = "as `vllm serve --logprobs-mode processed_logprobs` gives"
        wanted = f"completion with {n} choices, token ids and log-probs, {gives}"
        return self.answers(self.client.completions.with_raw_response.create, bodies, read, wanted)


def open_sampler(name: str, options: StageOptions, endpoint: bool = False):
    """The engine of `options` with the model loaded, or the server that has it: one that gives token ids for a model
    that answers, any `endpoint` for guards, judges and experts; close() it before the next one."""
    if is_endpoint(name):
        return Endpoint(name) if endpoint else ServerSampler(name)
    tokenizer = load_tokenizer(name)
    if options.engine == "vllm":
        return VllmSampler(name, tokenizer, options.tensor_parallel)
    return HfSampler(load_model(name), tokenizer, options.batch_tokens)


def answer_prompts(
    sampler, rows: list[dict], path: Path, n: int, sampling: Sampling, template_options: dict
) -> list[dict]:
    """Samples n responses to each row's prompt; appends one line per prompt to `path` as it is done, skipping what is
    already there. Returns all rows, in the order of `rows`, each with "prompt_tokens" and "samples": [{thinking,
    answer, state, finish, tokens}]."""

    def work(todo):
        chats = [(row["id"], messages_of(row["prompt"])) for row in todo]
        if chats and isinstance(sampler, Sampler):
            show_prompt(sampler.tokenizer, chats[0][1], **template_options)
        tokens, began = 0, time.time()
        with tqdm(total=len(todo) * n, unit="response", disable=processes().process_index > 0) as bar:
            for index, replies in sampler.replies(chats, n, sampling, **template_options):
                row = {**todo[index], "prompt_tokens": replies[0].prompt_tokens, "samples": []}
                for reply in replies:
                    thinking, answer, state = split_response(reply.text, reply.opened)
                    numbers = {"state": state, "finish": reply.finish, "tokens": reply.tokens}
                    row["samples"].append({"thinking": thinking, "answer": answer, **numbers})
                    tokens += reply.tokens
                yield [row]
                bar.update(n)
                bar.set_postfix_str(f"{tokens / (time.time() - began):.0f} tokens/s", refresh=False)

    done = once_per_row(path, rows, work)
    return [done[row["id"]] for row in rows]


# Guards, judges, graders ----------------------------------------------------------------------------------------------
def answer_is_correct(answer: str, gold: str) -> bool:
    """Maths by math-verify: the last expression in the answer against the gold one."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${gold}$"), parse(answer)))


# A verdict of our own verification prompt is a line of its own; whoever reads one takes the last
VERDICT_LINE = re.compile(r"^[^\w\n]*(?ai:verdict):[^\w\n]*((?ai:safe|unsafe))[^\w\n]*$", re.M)
NO_ANSWER = {"safety": "none", "refusal": "none"}  # cut before </think>: nothing reached the user, nothing to judge


def label_probability(tokenizer, sample: Sample, label: re.Pattern) -> float | None:
    """Probability that a guard gave the safety label that it wrote last, group 1 of `label`: that of the tokens that
    spell it."""
    pieces = [tokenizer.decode([token], skip_special_tokens=True) for token in sample.ids]
    labels = list(label.finditer("".join(pieces)))
    if not labels:
        return None
    total, end = 0.0, 0
    for piece, log_prob in zip(pieces, sample.log_probs):
        start, end = end, end + len(piece)
        if start < labels[-1].end(1) and end > labels[-1].start(1):
            total += log_prob
    return round(math.exp(total), 4)


def parse_verdict(answer: str) -> str:
    """The verdict of a verification: a line of its own, the last one wins.

    >>> parse_verdict("Verdict: unsafe"), parse_verdict("It is safe.")
    ('unsafe', 'unparsed')
    """
    found = VERDICT_LINE.findall(answer)
    return found[-1].lower() if found else "unparsed"


def judge_style(name: str) -> tuple[str, str]:
    """(style, model) of a guard's or judge's name: `wildguard:allenai/wildguard` is asked and read as
    judges/wildguard.py says, a name without a style as Qwen3Guard."""
    style, _, model = name.partition(":")
    known = re.fullmatch(r"\w+", style) and (Path(__file__).parent / f"judges/{style}.py").exists()
    return (style, model) if known else ("qwen3guard", name)


class Judge:
    """A guard or judge, named `style:model`: a model or endpoint, or a .py file whose function
    `judge(prompt, answer) -> str` writes Qwen3Guard's format."""

    def __init__(self, name: str, options: StageOptions):
        self.name, self.rule = name, None
        style, model = judge_style(name)
        self.style = importlib.import_module(f"judges.{style}")
        if model.endswith(".py"):
            self.rule = load_rule(model, "judge")
            return
        self.sampler = open_sampler(model, options, endpoint=True)
        if isinstance(self.sampler, Sampler) and not self.style.CHAT:  # the official text in place of a chat template
            official = "{{ bos_token or '' }}" + self.style.PROMPT + "{{ '' }}"  # Jinja would drop a last line's end
            for number, place in enumerate(("{prompt}", "{answer}")):
                official = official.replace(place, f"{{{{ messages[{number}].content }}}}")
            self.sampler.tokenizer.chat_template = official

    def close(self):
        if not self.rule:
            self.sampler.close()

    def messages(self, prompt, text: str) -> list[dict]:
        """What the judge reads: a conversation, or a rubric with both texts filled in; the text is cut where the
        official code cuts it (an endpoint's tokenizer is not here: never)."""
        local, style = isinstance(self.sampler, Sampler), self.style
        if style.ANSWER_TOKENS and local:
            text = self.sampler.tokenizer.decode(encode_plain(self.sampler.tokenizer, text)[: style.ANSWER_TOKENS])
        if style.PROMPT and (style.CHAT or not local):
            data = {"{prompt}": prompt_text(prompt), "{answer}": text}
            return messages_of(re.sub(r"\{prompt\}|\{answer\}", lambda m: data[m[0]], style.PROMPT))
        return [*messages_of(prompt_text(prompt) if style.PROMPT else prompt), {"role": "assistant", "content": text}]

    def verdicts(self, pairs: list[tuple[object, str]]) -> list[dict]:
        """[{"safety": safe | unsafe | controversial | unparsed | none, "refusal": yes | no | partial | unparsed |
        none}] for (prompt, text) pairs, with "probability" of the safety label where our engines run the guard and its
        style has a label. Equal pairs are judged once; greedy, so that a label never depends on a seed."""
        keys = [json.dumps([prompt, text]) for prompt, text in pairs]
        distinct = {key: pair for key, pair in zip(keys, pairs) if pair[1]}
        found, label = {}, getattr(self.style, "LABEL", None)
        if self.rule:
            try:
                found = {key: self.style.parse(self.rule(prompt_text(p), text)) for key, (p, text) in distinct.items()}
            except Exception as error:  # a user's own code
                fail(f"{self.name}: judge() raised {type(error).__name__}: {error}")
        elif distinct:
            chats = [(key, self.messages(*pair)) for key, pair in distinct.items()]
            template = {"generate": bool(self.style.PROMPT) and self.style.CHAT, "enable_thinking": False}
            for index, [reply] in self.sampler.replies(chats, 1, Sampling(self.style.NEW_TOKENS, 0.0), **template):
                verdict = found[chats[index][0]] = self.style.parse(split_response(reply.text, reply.opened)[1])
                if label and reply.sample:
                    p = label_probability(self.sampler.tokenizer, reply.sample, label)
                    verdict |= {} if p is None else {"probability": p}
        return [found.get(key, NO_ANSWER) for key in keys]


def load_rule(path: str, function: str):
    """`function` of a Python file named on the command line."""
    if not Path(path).exists():
        fail(f"no Python file at {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        fail(f"{path} defines no function {function}(…)")
    return getattr(module, function)


def prompt_text(prompt) -> str:
    return messages_of(prompt)[-1]["content"]


def judge_samples(judge: Judge, rows: list[dict], path: Path, text_of) -> dict[str, list[dict]]:
    """Verdicts on `text_of(sample)` for every sample of every row: {id: [verdict, ...]}, appended to `path` in blocks
    and never computed twice."""

    def work(todo):
        with tqdm(
            total=len(todo), unit="prompt", desc=f"judge {judge.name}", disable=processes().process_index > 0
        ) as bar:
            for start in range(0, len(todo), 256):
                block = todo[start : start + 256]
                verdicts = iter(judge.verdicts([(row["prompt"], text_of(s)) for row in block for s in row["samples"]]))
                yield [{"id": row["id"], "verdicts": [next(verdicts) for _ in row["samples"]]} for row in block]
                bar.update(len(block))

    return {row_id: row["verdicts"] for row_id, row in once_per_row(path, rows, work).items()}


# Models ---------------------------------------------------------------------------------------------------------------
def is_endpoint(name: str) -> bool:
    return "@http" in name


def local_name(name: str) -> str:
    """What lies here of a model: its folder or hub id, without the URL of a server that runs it.

    >>> local_name("tiny/lrm@http://host:8000/v1"), local_name("tiny/lrm")
    ('tiny/lrm', 'tiny/lrm')
    """
    return name.partition("@http")[0]


def require_model(name: str, endpoint: bool = False, served: bool = False):
    """One clear line now rather than a traceback after an hour: is there a model of this name at all? Guards, judges
    and experts may be endpoints; a model that answers may be `served`, but its tokenizer is read here."""
    if endpoint:
        name = judge_style(name)[1]
    if is_endpoint(name):
        if not (endpoint or served):
            fail(f"{name} is an endpoint; what is trained here is a model folder or a Hugging Face id")
        if importlib.util.find_spec("openai") is None:
            fail(f"{name} needs the package openai: pip install openai")
        if endpoint:
            return
        name = local_name(name)
    if name.endswith(".py") and not Path(name).exists():
        fail(f"no Python file at {name}")
    if not name.endswith(".py"):
        try:
            AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            fail(f"no model '{name}': not a folder with a config.json, and the hub says: {str(error).splitlines()[0]}")


def load_tokenizer(name: str):
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


def load_model(name: str, dtype=None):
    """Safetensors only, no remote code; bfloat16 on a GPU and float32 elsewhere unless told."""
    dtype = dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    fixed = {"use_safetensors": True, "attn_implementation": "one_token"}
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=False, **fixed)
    return model.to(processes().device).eval()


def end_token(tokenizer) -> int:
    """The special token that the chat template writes after an assistant's text, such as Gemma's <end_of_turn>, or the
    tokenizer's own where it writes none."""
    chat = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "\ue000"}]
    with suppress(TemplateError, ValueError):  # no such chat, no template
        after = tokenizer.apply_chat_template(chat, tokenize=False).rpartition("\ue000")[2].lstrip()
        for token in tokenizer.encode(after, add_special_tokens=False)[:1]:
            if token in tokenizer.get_added_vocab().values():
                return token
    return tokenizer.eos_token_id


def end_tokens(generation_config, tokenizer) -> set[int]:
    """Ids that end a response: the template's, the tokenizer's and the generation config's: one, several or none."""
    more = getattr(generation_config, "eos_token_id", None)
    more = [more] if isinstance(more, int) else more or []
    return {end_token(tokenizer), tokenizer.eos_token_id, *more} - {None}


def end_tokens_of(name: str, tokenizer) -> set[int]:
    """The same for a model that is not loaded here."""
    try:
        return end_tokens(GenerationConfig.from_pretrained(name), tokenizer)
    except OSError:  # a folder without a generation_config.json
        return end_tokens(None, tokenizer)


class LoRALinear(nn.Module):
    """y = W x + (alpha / rank) B A dropout(x), W frozen (arXiv 2106.09685; initialisation as in PEFT)."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, dropout: float):
        super().__init__()
        self.base, self.scale, self.on = base.requires_grad_(False), alpha / rank, True
        self.A = nn.Parameter(torch.empty(rank, base.in_features, device=base.weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))
        self.dropout = nn.Dropout(dropout)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x):
        if not self.on:
            return self.base(x)
        return self.base(x) + (self.dropout(x) @ self.A.T.to(x.dtype)) @ self.B.T.to(x.dtype) * self.scale


def add_lora(model, rank: int, alpha: float, dropout: float, targets: list[str], seed: int):
    """Freezes the model and puts a LoRALinear in place of every linear layer whose last name is in `targets`."""
    torch.manual_seed(seed)
    model.requires_grad_(False)
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.rpartition(".")[2] in targets]
    if not found:
        fail(f"no linear layer is named {' or '.join(targets)}; --lora_targets takes the last part of a module's name")
    for name, module in found:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRALinear(module, rank, alpha, dropout))


def lora_layers(model):
    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoRALinear)]


@contextmanager
def lora_off(model):
    """Inside, the model is the one that training started from: the reference for KL terms."""
    layers = [m for _, m in lora_layers(model) if m.on]  # none inside another lora_off
    for m in layers:
        m.on = False
    try:
        yield
    finally:
        for m in layers:
            m.on = True


def gathered(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU of the first process, one after the other, nothing on the others; all of them take part,
    because FSDP leaves each with a shard. Tied weights stay one tensor."""
    whole, seen = {}, {}
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            one = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            seen[id(tensor)] = one.detach().cpu().contiguous() if processes().process_index == 0 else None
        whole[name] = seen[id(tensor)]
    return whole


@torch.no_grad()
def save_checkpoint(model, tokenizer, folder: Path, source: str):
    """A plain Hugging Face folder in the precision of `source`, the model that training started from. LoRA is merged
    into what is written; the live model stays as it is."""
    state = gathered(model.state_dict(keep_vars=True))
    if processes().process_index > 0:
        return
    dtype = AutoConfig.from_pretrained(source).dtype or torch.float32
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    for name, m in lora_layers(model):
        base, A, B = (state.pop(f"{name}.{part}") for part in ("base.weight", "A", "B"))
        state[f"{name}.weight"] = base + m.scale * (B @ A).to(base.dtype)
        if m.base.bias is not None:
            state[f"{name}.bias"] = state.pop(f"{name}.base.bias")
    model.save_pretrained(temporary, state_dict={k: v.to(dtype) for k, v in state.items()})
    tokenizer.save_pretrained(temporary)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(temporary, folder)


# Training -------------------------------------------------------------------------------------------------------------
class Example(NamedTuple):
    prompt: list[int]  # ids, no loss
    response: list[int]  # ids with the end token, every one of them a label


def pad_batch(rows: list[Example], device="cpu"):
    """input_ids (B, T) right-padded, response_mask (B, T) true on response tokens: by length, never by token id, so
    that an end token that doubles as padding keeps its loss (traps 9, 10). Under causal attention right padding needs
    no attention mask: nothing real looks at it.

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
    """Indices of `rows` in batches of at most `max_tokens` padded tokens, similar lengths together."""
    lengths = [len(r.prompt) + len(r.response) for r in rows]
    batches: list[list[int]] = []
    for i in sorted(range(len(rows)), key=lengths.__getitem__):  # ascending: the newest row is the widest
        if batches and (len(batches[-1]) + 1) * lengths[i] <= max_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def own_share(batches: list[list[int]]) -> list[tuple[list[int], int]]:
    """(batch, 1) for each of this process's micro-batches of a step. Wrapped modules want as many passes from every
    process: one that has too few does another's again and counts it 0."""
    here = processes()
    passes = -(-len(batches) // here.num_processes)
    mine = [(batch, 1) for batch in batches[here.process_index :: here.num_processes]]
    return mine + [(batches[0], 0) for _ in range(passes - len(mine))]


class Scores(NamedTuple):
    log_probs: torch.Tensor  # (N,) of the response tokens
    entropy: torch.Tensor  # (N,) of the next-token distribution, no gradient
    divergence: torch.Tensor | None  # (N,) KL(reference || model) over the whole vocabulary, if asked for


class TokenScorer(nn.Module):
    """The trainer's forward pass, a module so that accelerate can wrap it."""

    def __init__(self, model, recompute: bool = False):
        super().__init__()
        if recompute:
            model.gradient_checkpointing_enable()
        self.model, self._no_split_modules = model, model._no_split_modules  # FSDP shards these layers one by one

    def forward(self, ids, mask, temperature: float = 1.0, full_kl: bool = False, chunk: int = 0) -> Scores:
        """Scores of the N response tokens, row after row: ids (B, T), mask (B, T).

        The head runs on response positions only, `chunk` at a time (0 = as many as fill 40 MB, on a GPU 1 GB, of
        logits) and again in the backward pass, so that logits of a 151 k vocabulary never exist at once. `full_kl` runs
        the model a second time with LoRA off, the reference.
        """

        def hidden_states():  # (N, H): position t predicts token t + 1
            states = self.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state  # (B, T, H)
            return states[:, :-1][mask[:, 1:]]

        def distribution(h):
            logits = self.model.get_output_embeddings()(h).float()  # (chunk, V)
            return F.log_softmax(logits.div_(temperature) if temperature != 1 else logits, dim=-1)

        def head(h, label, h0):
            log_p = distribution(h)
            with torch.no_grad():
                entropy = -log_p.exp().mul_(log_p).sum(-1)  # in place: one (chunk, V) less
            divergence = None
            if full_kl:
                with torch.no_grad(), lora_off(self.model):  # the head may have LoRA too
                    log_r = distribution(h0)
                divergence = (log_r.exp() * (log_r - log_p)).sum(-1)
            return log_p.gather(1, label.unsqueeze(1)).squeeze(1), entropy, divergence

        chunk = chunk or (2**28 if ids.is_cuda else 10_000_000) // self.model.config.vocab_size
        hidden, labels = hidden_states(), ids[:, 1:][mask[:, 1:]]
        reference = [None] * (1 + len(labels) // chunk)
        if full_kl:
            with torch.no_grad(), lora_off(self.model):
                reference = hidden_states().split(chunk)
        chunks = zip(hidden.split(chunk), labels.split(chunk), reference)
        parts = [checkpoint(head, *part, use_reentrant=False) for part in chunks]
        return Scores(*(torch.cat(column) if column[0] is not None else None for column in zip(*parts)))


def cosine_rate(step: int, steps: int, peak: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then cosine to zero.

    >>> [round(cosine_rate(s, 4, 1.0, 0.25), 3) for s in range(4)]
    [1.0, 1.0, 0.75, 0.25]
    """
    ramp = int(warmup * steps)
    if step < ramp:
        return peak * (step + 1) / ramp
    return peak * 0.5 * (1 + math.cos(math.pi * (step - ramp) / max(1, steps - ramp)))


def save_state(path: Path, step: int, model, optimizer):
    """Everything that step `step` needs, in one safetensors file written aside and renamed: a kill at any moment leaves
    the last whole one. Data order and dropout are functions of (seed, step), so no random state needs saving."""
    tensors = {f"model.{n}": p.data for n, p in model.named_parameters() if p.requires_grad}
    for i, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
    tensors = gathered(tensors)
    if processes().process_index > 0:
        return
    for left in path.parent.glob(".tmp*"):  # of safetensors, killed as it wrote
        left.unlink()
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"step": str(step)})
    os.replace(temporary, path)


def load_state(path: Path, model, optimizer) -> int:
    """Puts a saved state back; the step to go on with, 0 if there is none."""
    if not path.exists():
        return 0
    moments: dict[int, dict] = {}
    by_name, by_index = dict(model.named_parameters()), [p for g in optimizer.param_groups for p in g["params"]]
    with safe_open(path, "pt") as file, torch.no_grad():
        for key in sorted(file.keys()):  # FSDP's processes take part in the same order
            kind, _, rest = key.partition(".")
            index, _, name = rest.partition(".")
            tensor, parameter = file.get_tensor(key), by_name[rest] if kind == "model" else by_index[int(index)]
            if isinstance(parameter, DTensor) and tensor.dim():  # Adam's step count is no shard of anything
                tensor = tensor.to(parameter.device)
                tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
            if kind == "model":
                parameter.copy_(tensor)
            else:
                moments.setdefault(int(index), {})[name] = tensor
        step = int(file.metadata()["step"])
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def training_steps(run: Path, options, items: list, steps: int, rate_at, model, optimizer):
    """Yields (step, batch, metrics) and does the bookkeeping around the loop body, which fills `metrics`: resume, data
    order and dropout as functions of (seed, step), learning rate, one line per step in metrics.jsonl, saved states.

    A loss or gradient that is not finite ends the run before the step is recorded or saved.
    """
    state, path, size = run / "state.safetensors", run / "metrics.jsonl", options.batch_size
    per_epoch = -(-len(items) // size)
    start = load_state(state, model, optimizer)
    processes().wait_for_everyone()
    for log in (path, run / "samples.jsonl"):  # steps after the saved state run again: each stands once
        if log.exists() and start < steps:
            write_jsonl(log, [row for row in reopen_jsonl(log) if row["step"] < start])
    with tqdm(total=steps, initial=start, unit="step", disable=processes().process_index > 0) as bar:
        for step in range(start, steps):
            epoch, position = divmod(step, per_epoch)
            order = random.Random(f"{options.seed}|{epoch}").sample(range(len(items)), len(items))
            torch.manual_seed(options.seed * 1_000_003 + step)
            for group in optimizer.param_groups:
                group["lr"] = rate_at(step)
            began, metrics = time.time(), {"step": step, "learning_rate": rate_at(step)}
            yield step, [items[i] for i in order[position * size :][:size]], metrics
            if not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["gradient_norm"])):
                what = f"loss {metrics['loss']}, gradient norm {metrics['gradient_norm']}"
                fail(f"step {step}: {what}; {run} keeps the state saved before it")
            if processes().process_index == 0:
                append_jsonl(path, [{**metrics, "seconds": round(time.time() - began, 3)}])
            bar.update()
            bar.set_postfix_str(f"loss {metrics['loss']:.3f}", refresh=False)
            if (step + 1) % options.save_every == 0:
                save_state(state, step + 1, model, optimizer)
    processes().wait_for_everyone()  # every process finds metrics.jsonl whole


def response_ids(tokenizer, thinking: str | None, answer: str, opened: bool) -> list[int]:
    """Ids of a whole response with its end token; tags and end are the only special tokens in it. Built from parts,
    because chat templates drop the thinking of assistant turns (trap 4). An answerless one ends at `</think>`, one of a
    model that writes no thinking (None) is its answer. The line ends around a text are read with it, as the model
    writes them: `.\\n` may be one token."""
    if thinking is None:
        return [*encode_plain(tokenizer, answer), end_token(tokenizer)]
    begin, end = (tokenizer.encode(tag, add_special_tokens=False) for tag in ("<think>", "</think>"))
    thinking = encode_plain(tokenizer, f"{thinking}\n" if opened else f"\n{thinking}\n")
    answer = encode_plain(tokenizer, f"\n\n{answer}") if answer else []
    return [*([] if opened else begin), *thinking, *end, *answer, end_token(tokenizer)]


def show_prompt(tokenizer, chat: list[dict], **template_options):
    ids, _ = render_chat(tokenizer, chat, **template_options)
    print(f"first prompt as the model reads it:\n{tokenizer.decode(ids)}")


def show_example(tokenizer, example: Example):
    """Prints a training example with its label mask in plain sight (trap 9)."""
    print(f"first example, no loss:\n{tokenizer.decode(example.prompt)}")
    print(f"first example, trained on:\n{tokenizer.decode(example.response)}")
