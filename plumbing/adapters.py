"""A LoRA adapter as PEFT writes it, merged into the model named before it: `base+adapter`."""

import json
import math
import re
from pathlib import Path

import torch
from torch import nn

from plumbing.process import fail

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # before the path of a module of the base, in the names of tensors
# Settings that are read, or that say nothing of how weights are merged; another one that is set,
# such as use_dora, is refused
READ = ("peft_type", "bias", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")
READ += ("target_modules", "exclude_modules", "layers_to_transform", "init_lora_weights")
SILENT = ("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")
SILENT += ("inference_mode", "lora_dropout", "modules_to_save", "layers_pattern", "megatron_core")
SILENT += ("qalora_group_size", "ensure_weight_tying", "loftq_config", "eva_config")
STARTS = (True, False, "gaussian", "orthogonal", "eva")  # others change the base's weights too


def read_config(folder: str) -> dict:
    """The settings of an adapter, refused in one line where W + scale B A is not what they mean."""
    file = Path(folder) / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"cannot read {file}: {error}")
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        fail(f"{file} is of no LoRA adapter: its peft_type must be LORA")
    odd = [name for name, value in config.items() if value and name not in (*READ, *SILENT)]
    if config.get("bias", "none") != "none":
        odd.append("bias")
    if config.get("init_lora_weights", True) not in STARTS:
        odd.append("init_lora_weights")
    if odd:
        what = f"{odd[0]} is {json.dumps(config[odd[0]])[:80]}"
        fail(f"cannot merge {folder}: {what}; plain LoRA of linear layers is all that is read here")
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    alphas = [config.get("lora_alpha"), *(config.get("alpha_pattern") or {}).values()]
    if not all(isinstance(rank, int) and rank > 0 for rank in ranks):
        fail(f"{file} has no rank r, or one that is no whole number above 0")
    if not all(isinstance(alpha, int | float) for alpha in alphas):
        fail(f"{file} has no lora_alpha, or one that is no number")
    if not isinstance(config.get("target_modules"), str | list):
        fail(f"{file} has no target_modules")
    return config


def read_shapes(folder: str) -> dict[str, tuple[int, ...]]:
    """{name of a tensor without its prefix: its shape}."""
    from safetensors import safe_open

    file = Path(folder) / WEIGHTS
    if not file.is_file():
        pickled = ", adapter_model.bin is not: convert it"
        more = pickled if (Path(folder) / "adapter_model.bin").exists() else ""
        fail(f"{folder} has no {WEIGHTS}: weights are read from that file{more}")
    shapes = {}
    try:
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():
                shapes[key] = tuple(tensors.get_slice(key).get_shape())
    except Exception as error:  # safetensors raises several kinds
        fail(f"{file} is no whole safetensors file: {' '.join(str(error).split())[:200]}")
    foreign = [key for key in shapes if not key.startswith(PREFIX)]
    if foreign or not shapes:
        fail(f"{file} holds {foreign[0] if foreign else 'nothing'}, not {PREFIX}…, as PEFT writes")
    return {key.removeprefix(PREFIX): shape for key, shape in shapes.items()}


def pattern_value(patterns: dict | None, path: str, default):
    """What rank_pattern or alpha_pattern says of a module: the first regular expression that
    matches the end of its path, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def is_target(config: dict, path: str) -> bool:
    """Whether the settings name a module; where they name exceptions too, the tensors say it."""
    targets = config["target_modules"]
    if config.get("exclude_modules") or config.get("layers_to_transform") is not None:
        return False
    if isinstance(targets, str):
        return targets != "all-linear" and re.fullmatch(targets, path) is not None
    return any(path == target or path.endswith(f".{target}") for target in targets)


def planned_merge(model, folder: str) -> tuple[dict[str, float], dict[str, str]]:
    """({path of a linear layer: scale of its B A}, {parameter: tensor that it is replaced by}).
    Ends the program unless every tensor of the adapter has its place in the model, which may be on
    the meta device, and every layer that the settings name has its tensors."""
    config, shapes, base = read_config(folder), read_shapes(folder), model.name_or_path
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    scales, whole = {}, {}
    for key, shape in shapes.items():
        path, lora, part = key.rpartition(".lora_")
        # PEFT keeps a head whole beside its LoRA, as `base_layer`
        name = f"{path}.weight" if lora else key.replace(".base_layer.", ".")
        if lora and part not in ("A.weight", "B.weight"):
            fail(f"{folder} has {key}: only lora_A and lora_B of linear layers are read")
        if name not in parameters or (lora and not isinstance(modules[path], nn.Linear)):
            kind = "no linear layer" if lora else "no parameter"
            fail(f"{folder} has {key}, which is {kind} of {base}: an adapter of another model?")
        tied = [other for other, p in parameters.items() if p is parameters[name]]
        if len(tied) > 1:
            fail(f"{folder} changes {name}, but {' and '.join(tied)} are one tensor in {base}")
        expected = tuple(parameters[name].shape)
        if lora:
            rank = pattern_value(config.get("rank_pattern"), path, config["r"])
            alpha = pattern_value(config.get("alpha_pattern"), path, config["lora_alpha"])
            expected = (rank, expected[1]) if part == "A.weight" else (expected[0], rank)
            scales[path] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        else:
            whole[name] = key
        if shape != expected:
            wanted = f"{key} of shape {shape}, and {base} wants {expected}"
            fail(f"{folder} has {wanted}: an adapter of another model?")
    needed = {f"{path}.lora_{half}.weight" for path in scales for half in "AB"}
    for path, module in modules.items():
        is_named = isinstance(module, nn.Linear) and is_target(config, path)
        if is_named and f"{path}.weight" not in whole:
            needed.add(f"{path}.lora_A.weight")
    lacking = sorted(needed - shapes.keys())
    if lacking:
        fail(f"{folder} lacks {lacking[0]}, which {base} has a place for: of another model?")
    return scales, whole


@torch.no_grad()
def merge_adapter(model, folder: str, dtype):
    """W + scale B A in place of W, summed in float32 and rounded once to `dtype`, the precision of
    the base's files: a model loaded in another one is still that of its merged folder."""
    from safetensors.torch import load_file

    scales, whole = planned_merge(model, folder)
    tensors = load_file(Path(folder) / WEIGHTS)
    for name, key in whole.items():
        model.get_parameter(name).copy_(tensors[PREFIX + key].to(dtype))
    for path, scale in scales.items():
        weight = model.get_submodule(path).weight
        A, B = (tensors[f"{PREFIX}{path}.lora_{half}.weight"].float() for half in "AB")
        change = scale * (B @ A)  # (out, rank) @ (rank, in)
        weight.copy_((weight.float() + change.to(weight.device)).to(dtype))
