"""Is there a model of this name? Said in one line before anything is loaded, computed or
written."""

import importlib.util
import json
import os
from pathlib import Path

from plumbing.adapters import planned_merge, read_config
from plumbing.names import base_and_adapter, base_of, is_endpoint, local_name, model_config
from plumbing.names import tokenizer_source
from plumbing.process import fail

# How files end that are taken for a model by mistake, or hold weights of another kind
FOREIGN_WEIGHTS = (".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
FILES = (*FOREIGN_WEIGHTS, ".safetensors", ".json", ".jsonl", ".txt", ".zip", ".gz", ".tar")
HUB_SECONDS = 3  # the longest wait for the hub's first word, of two tries
# {hub id: the error}: models of the presets that the hub says nothing of. A dry run takes what
# plumbing/stand_ins.py has of them, open_run ends the program
OUT_OF_REACH: dict[str, str] = {}


def require_model(name: str, endpoint: bool = False, served: bool = False, template: bool = True):
    """Ends the program if there is no model of this name, or not one that a stage can work with.
    Guards, judges and experts may be endpoints; a model that answers may be `served`, but its
    tokenizer is read here. One that is not asked through its chat template needs no `template`."""
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
        fail(f"{name} is a rule: only guards, judges and self-checkers may be one; name a model")
    if not name:
        fail("the name of a model is empty; name a folder or a Hugging Face id")
    if "+" in name and not os.path.exists(name):
        require_adapted(name, template)
        return
    if os.path.isdir(name):
        require_model_folder(name, template)
        return
    if os.path.exists(name):
        fail(f"no model '{name}': that is a file; name the folder with its config.json")
    if is_path(name):
        hint = ": python smollm2/fetch.py makes it" if name.startswith("smollm2/model") else ""
        fail(f"no model '{name}': no folder at {name}{hint}")
    require_hub_model(name)


def require_trained(options):
    """The same for the model that a stage trains, and for the linear layers that are to get LoRA,
    by the architecture alone, so that no work is done in vain."""
    require_model(options.model)
    if not options.lora_rank:
        return
    from torch import nn

    model = unloaded(options.model)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    names = {name.rpartition(".")[2] for name in linear}
    missing = [target for target in options.lora_targets if target not in names]
    if len(missing) == len(options.lora_targets):
        what = f"no linear layer is named {' or '.join(missing)} in {options.model}"
        fail(f"{what} (--lora_targets: its last part, of {' '.join(sorted(names))})")
    if missing and os.environ.get("RANK", "0") == "0":
        others = " ".join(sorted(names - set(options.lora_targets)))
        print(f"--lora_targets: {options.model} has no {' '.join(missing)}; without LoRA: {others}")
    output = model.get_output_embeddings()
    head = next((name for name, module in linear.items() if module is output), "")
    tied = model.config.get_text_config().tie_word_embeddings
    if tied and head.rpartition(".")[2] in options.lora_targets:
        what = f"the head of {options.model} is its embedding"
        fail(f"--lora_targets {head}: {what}, which has one tensor for both")


def is_path(name: str) -> bool:
    """Whether a name can only be meant as a place on this machine.

    >>> [is_path(name) for name in ("./nope", "/nope", "runs/nope", "a/b/c", "model.bin")]
    [True, True, True, True, True]
    >>> is_path("Qwen/Qwen3-0.6B"), is_path("gpt2")
    (False, False)
    """
    if name.startswith((".", "/", "~", "runs/", "tiny/", "smollm2/")):
        return True
    if name.count("/") > 1 or name.endswith(FILES):
        return True
    first, slash, _ = name.partition("/")
    return bool(slash) and os.path.isdir(first)


def require_model_folder(name: str, template: bool):
    """A folder needs a config, a tokenizer and, where the model is asked through it, a chat
    template. Its weights are looked at when the run folder is opened: a dry run needs none."""
    is_adapter = (Path(name) / "adapter_config.json").is_file()
    if not (Path(name) / "config.json").is_file():
        hint = f", but an adapter's; name its base before it: base+{name}" if is_adapter else ""
        fail(f"no model '{name}': the folder has no config.json{hint}")
    if is_adapter:  # where PEFT is installed, transformers would merge it unasked
        fail(f"{name} holds a model and an adapter; give each a folder and name both: base+adapter")
    try:
        model_config(name)
    except Exception as error:  # transformers raises many kinds
        fail(f"cannot read {name}/config.json: {one_line(error)}")
    require_tokenizer(name, template)


def require_tokenizer(name: str, template: bool):
    """A folder's tokenizer; ends the program if it doesn't load, or lacks a needed template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        fail(f"cannot load the tokenizer of {name}: {one_line(error)}")
    if len(tokenizer) <= len(tokenizer.get_added_vocab()):  # transformers made an empty one
        fail(f"cannot load the tokenizer of {name}: its files, such as tokenizer.json, are missing")
    if template and not tokenizer.chat_template:
        fail(f"{name} has no chat template; take an instruct model, or add a chat_template.jinja")
    return tokenizer


def require_adapted(name: str, template: bool):
    """Ends the program unless `base+adapter` is a model and an adapter that fits it, by their
    shapes. Says what the adapter itself says of it."""
    base, adapter = base_and_adapter(name)
    if not adapter:
        hint = "no such folder, and no adapter_config.json in a folder behind the +"
        fail(f"no model '{name}': {hint}")
    if base_and_adapter(base)[1]:
        fail(f"{name} names two adapters; merge the first one into a folder, it takes one")
    has_own = tokenizer_source(name) == adapter
    require_model(base, template=template and not has_own)
    model = unloaded(base)
    planned_merge(model, adapter)
    notes, rows = [], model.get_input_embeddings().weight.shape[0]
    if has_own:
        notes.append("tokenizer and chat template are the adapter's own")
        tokenizer = require_tokenizer(adapter, template)
        if len(tokenizer) > rows:
            fail(f"the tokenizer of {adapter} has {len(tokenizer)} tokens, {base} reads {rows}")
    trained_on = read_config(adapter).get("base_model_name_or_path") or base
    if Path(trained_on).name != Path(base).name:
        notes.append(f"the adapter says that it was trained on {trained_on}")
    if notes and os.environ.get("RANK", "0") == "0":
        print(f"{name}: {'; '.join(notes)}")


def require_hub_model(name: str):
    """One question to the hub, so that a hub out of reach is said within seconds: transformers
    would ask again and again. What lies in the cache needs no hub, a preset's model none for a dry
    run."""
    import huggingface_hub
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    if not huggingface_hub.constants.HF_HUB_OFFLINE:
        try:
            HfApi().model_info(name, timeout=HUB_SECONDS)
        except RepositoryNotFoundError:
            what = "no folder here, and the hub has none of this name that you may read"
            fail(f"no model '{name}': {what}")
        except Exception as error:
            refused = isinstance(error, HfHubHTTPError) and error.response.status_code < 500
            if not (refused or isinstance(error, ValueError)):  # those are said better below
                huggingface_hub.constants.HF_HUB_OFFLINE = True
                if not isinstance(try_to_load_from_cache(name, "config.json"), str):
                    note_out_of_reach(name, f"the hub is out of reach: {one_line(error)}")
                    return
    try:
        model_config(name)
    except (OSError, ValueError) as error:
        note_out_of_reach(name, f"the hub says: {one_line(error)}")
    else:
        OUT_OF_REACH.pop(name, None)


def note_out_of_reach(name: str, what: str):
    """Ends the program unless the model is a preset's, of which a dry run has a stand-in."""
    from plumbing.stand_ins import SHAPES

    message = f"no model '{name}': no folder here, and {what}"
    if name not in SHAPES:
        fail(message)
    OUT_OF_REACH.setdefault(name, message)


def require_reach(name: str):
    """Ends the program if there is only a stand-in for that model."""
    if name in OUT_OF_REACH:
        fail(OUT_OF_REACH[name])


def dry_config(name: str):
    """The config of a model, or the stand-in of one out of reach: for predictions only."""
    from plumbing import stand_ins

    name = base_of(name)
    return stand_ins.config_of(name) if name in OUT_OF_REACH else model_config(name)


def unloaded(name: str):
    """The model of that name on the meta device, where no weight has a number."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(dry_config(name))


def dry_tokenizer(name: str):
    """The tokenizer of a model, or the stand-in of one out of reach: for a dry run only, which says
    so in one line."""
    from transformers import AutoTokenizer

    from plumbing import stand_ins

    name = tokenizer_source(name)
    line = f"\nthe hub is out of reach, nothing was looked up of {', '.join(OUT_OF_REACH)}"
    if name not in OUT_OF_REACH:
        if OUT_OF_REACH:  # a guard, judge or expert
            print(line)
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    line += ": the prompt is shown by a copy of the model's chat template, and tokens are "
    print(line + "counted by a stand-in, which is near its tokenizer and no more")
    return stand_ins.tokenizer_of(name)


def one_line(error: BaseException) -> str:
    """The first line with words of an error that may have many, after its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or ['no reason given'])[0][:200]}"


def require_weights(name: str):
    """Ends the program if a model folder has no weights, or a file of them is not whole."""
    folder, index = Path(name), Path(name) / "model.safetensors.index.json"
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        others = sorted(p.name for p in folder.iterdir() if p.name.endswith(FOREIGN_WEIGHTS))
        if others:
            fail(f"{name} has {others[0]}, but weights are read from *.safetensors only: convert")
        fail(f"{name} has no weights: no *.safetensors beside its config.json")
    whole = (folder / "model.safetensors").exists()
    if not whole and not index.exists():
        fail(f"{name} has {files[0].name}, but neither model.safetensors nor {index.name}")
    if not whole:
        try:
            parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, LookupError, TypeError, AttributeError):
            fail(f"{index} is damaged: it lists no weight_map")
        for part in sorted(parts):
            if not (folder / part).is_file():
                fail(f"{name} lacks {part}, which {index.name} lists")
    from safetensors import safe_open

    for file in files:
        try:
            with safe_open(file, "pt"):  # reads the list of tensors and compares the size
                pass
        except Exception as error:
            fail(f"{file} is no whole safetensors file: {one_line(error)}; copy it again")
