"""Names on the command line: models, folders, servers, judges' files; what stands behind them."""

import hashlib
import importlib.util
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


def model_config(name: str):
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(name, trust_remote_code=False)


def require_model(name: str, endpoint: bool = False, served: bool = False):
    """One clear line now rather than a traceback after an hour: is there a model of this name?
    Guards, judges and experts may be endpoints; a model that answers may be `served`, but its
    tokenizer is read here."""
    if is_endpoint(name):
        if not (endpoint or served):
            trained = "what is trained here is a model folder or a Hugging Face id"
            fail(f"{name} is an endpoint; {trained}")
        if importlib.util.find_spec("openai") is None:
            fail(f"{name} needs the package openai: pip install openai")
        if endpoint:
            return
        name = local_name(name)
    if name.endswith(".py"):
        if not Path(name).exists():
            fail(f"no Python file at {name}")
        return
    try:
        model_config(name)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        fail(f"no model '{name}': not a folder with a config.json, and the hub says: {reason}")


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
    hub."""
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
