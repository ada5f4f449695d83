"""Names on the command line: models, folders, servers, judges' files; what stands behind them."""

import hashlib
import importlib.util
import math
import os
import re
from pathlib import Path

from plumbing.process import fail


def is_endpoint(name: str) -> bool:
    return "@http" in name


def local_name(name: str) -> str:
    """What lies here of a model: its folder or hub id, without the URL of a server that runs it.

    >>> local_name("tiny/lrm@http://host:8000/v1"), local_name("tiny/lrm")
    ('tiny/lrm', 'tiny/lrm')
    """
    return name.partition("@http")[0]


def base_and_adapter(name: str) -> tuple[str, str]:
    """(model, folder of the LoRA adapter that is merged into it) of `base+adapter`; the name itself
    and "" where no adapter is named. A file or folder with a + in its name is what it is.

    >>> base_and_adapter("tiny/lrm"), base_and_adapter("a+b@http://host/v1")
    (('tiny/lrm', ''), ('a+b@http://host/v1', ''))
    """
    if "+" in name and not is_endpoint(name) and not os.path.exists(name):
        for plus in re.finditer(r"\+", name):
            base, adapter = name[: plus.start()], name[plus.end() :]
            if os.path.isfile(os.path.join(adapter, "adapter_config.json")):
                return base, adapter
    return name, ""


def base_of(name: str) -> str:
    return base_and_adapter(name)[0]


def tokenizer_source(name: str) -> str:
    """Where the tokenizer and chat template of a model are: those of `base+adapter` are the
    adapter's, if they lie in its folder, else the base's."""
    base, adapter = base_and_adapter(name)
    has_own = adapter and os.path.isfile(os.path.join(adapter, "tokenizer_config.json"))
    return adapter if has_own else base


def model_config(name: str):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(base_of(name), trust_remote_code=False)


def context_of(config) -> float:
    """Tokens that a model reads. LongRoPE (Phi-3) turns all positions differently once a text is
    longer than what was first trained on: a cache would mix the two, so it ends there."""
    config = config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or math.inf
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        context = min(context, rope["original_max_position_embeddings"])
    return context


def load_rule(path: str, function: str):
    """`function` of a Python file named on the command line. The file is a user's own code: what
    it does wrong when it is imported is said in one line."""
    if not Path(path).is_file():
        fail(f"no Python file at {path}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        fail(f"{path} can't be imported: {type(error).__name__}: {error}")
    if not callable(getattr(module, function, None)):
        fail(f"{path} defines no function {function}(…)")
    return getattr(module, function)


def fingerprint(path: str) -> str:
    """Content hash of a file or folder, 12 hex digits; of files over 64 MiB, 64 evenly spaced MiB
    are read."""
    digest = hashlib.sha256()
    mebibyte = 1 << 20
    for file in sorted(p for p in [Path(path), *Path(path).rglob("*")] if p.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        step = mebibyte if size <= 64 * mebibyte else size // 64
        with file.open("rb") as f:
            for offset in range(0, size, step):
                f.seek(offset)
                digest.update(f.read(mebibyte))
    return digest.hexdigest()[:12]


def content_of(name: str) -> str:
    """What stands behind the name of a model or rule: the hash of its files, or its commit on the
    hub; of `base+adapter` both."""
    base, adapter = base_and_adapter(name)
    if adapter:
        return f"{content_of(base)}+{fingerprint(adapter)}"
    if Path(name).exists():
        return fingerprint(name)
    if is_endpoint(name):
        return "an endpoint"
    return f"commit {getattr(model_config(name), '_commit_hash', None)}"


def name_pairs(items: list[str], option: str, short=()) -> dict[str, str]:
    """{name: path} of `--option name=path …`; the `short` names may stand alone, with the path
    ""."""
    pairs = {item: "" for item in items if item in short}
    pairs |= dict(item.partition("=")[::2] for item in items if item not in short)
    wrong = [name for name, path in pairs.items() if not (path or name in short)]
    wrong += [name for name in pairs if not re.fullmatch(r"[\w+-][\w.+-]*", name)]
    if not wrong and len(pairs) == len(items):
        return pairs
    alone = f" (or a name: {', '.join(short)})" if short else ""
    wanted = f"name=path with distinct names of letters, digits and ._+-{alone}"
    fail(f"--{option} {' '.join(items)}: {wanted}")


def file_label(name: str, content: str) -> str:
    """A judge's part of a file name: readable, and another one when the content behind its name is
    another."""
    tag = hashlib.sha256(f"{name} {content}".encode()).hexdigest()[:6]
    return f"{re.split('[/:]', name.removesuffix('.py'))[-1]}-{tag}"
