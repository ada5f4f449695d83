"""A model folder or hub id, loaded whole or refused in one line."""

import copy

import torch

from plumbing.adapters import merge_adapter
from plumbing.names import base_and_adapter, model_config
from plumbing.process import fail


def choose_dtype(dtype):
    """What the option --dtype means: "auto" is bfloat16 on a GPU and float32 elsewhere."""
    if dtype == "auto":
        return "bfloat16" if torch.cuda.is_available() else "float32"
    return dtype


def load_whole(name: str, dtype):
    """The causal language model of that name, an adapter merged: safetensors only, no remote code.
    A tensor that is missing, left over or of another shape ends the program with its name;
    transformers would start it at random, or drop it, and go on."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the line below says it
    settings = {"use_safetensors": True, "output_loading_info": True}
    settings["ignore_mismatched_sizes"] = True  # they are reported
    base, adapter = base_and_adapter(name)
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            base, dtype=choose_dtype(dtype), trust_remote_code=False, **settings
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        fail(f"cannot load the weights of {base}: {what}")
    finally:
        logging.set_verbosity(level)
    require_every_tensor(base, loaded)
    try:
        model.generation_config.validate(strict=True)
    except ValueError:  # a temperature without do_sample: transformers would refuse to save it
        model.generation_config.do_sample = True
    if adapter:
        merge_adapter(model, adapter, model_config(base).dtype or torch.float32)
    return model


def save_weights(model, state: dict, dtype, folder):
    """A plain Hugging Face folder with the tensors of `state` in that precision: one for tied
    weights, buffers as they are, as a model may keep some in float32."""
    buffers = {name for name, _ in model.named_buffers()}
    by_id = {id(tensor): tensor.to(dtype) for name, tensor in state.items() if name not in buffers}
    cast = {name: by_id.get(id(tensor), tensor) for name, tensor in state.items()}
    model.save_pretrained(folder, state_dict=cast)
    config = copy.deepcopy(model.config)  # which says the precision that the model is trained in
    config.dtype = dtype
    config.save_pretrained(folder)


def require_every_tensor(name: str, loaded: dict):
    for kind, what in (
        ("missing_keys", "lacks the tensor"),
        ("mismatched_keys", "has another shape for the tensor"),
        ("unexpected_keys", "has a tensor that this model has no place for:"),
    ):
        tensors = sorted(key if isinstance(key, str) else key[0] for key in loaded[kind])
        if tensors:
            more = f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
            fail(f"{name} {what} {tensors[0]}{more}")
