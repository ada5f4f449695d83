"""A CUDA device for machines without one: tensors stay where they are and remember on which device they would be.

Inside `emulated_cuda()` torch says that it has a GPU. What is moved to it or made on it carries a mark on its storage,
results carry their inputs' mark, `tensor.device` reads it, and an operation that a GPU would refuse because its tensors
are on two devices raises the error that torch raises. Autocast for CUDA is the CPU's."""

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ATEN = torch.ops.aten
COPIES = {ATEN.copy_, ATEN._to_copy}  # between any two devices
INDEXED = {ATEN.index, ATEN.index_put, ATEN.index_put_, ATEN._index_put_impl_, ATEN._unsafe_index}


def tensors_of(nested) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, torch.Tensor)]


def on_cuda(tensor: torch.Tensor) -> bool:
    return getattr(tensor.untyped_storage(), "on_cuda", False)


def mark(nested, cuda: bool):
    for tensor in tensors_of(nested):
        tensor.untyped_storage().on_cuda = cuda
    return nested


class Operations(TorchDispatchMode):
    """Every operation below autograd, backward passes among them: are its tensors on one device?"""

    def __init__(self):
        super().__init__()
        self.seen = SimpleNamespace(cuda=0, dtypes=set())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = tensors_of((args, kwargs))
        storages = {tensor.untyped_storage()._cdata for tensor in inputs}
        cuda = any(map(on_cuda, inputs))
        if cuda and func.overloadpacket not in COPIES:
            indices = tensors_of(args[1]) if func.overloadpacket in INDEXED and on_cuda(args[0]) else []
            for tensor in inputs:  # a CPU's number may take part, and its indices
                here = tensor.dim() and not on_cuda(tensor) and not any(tensor is index for index in indices)
                if here:
                    raise RuntimeError(f"Expected all tensors to be on the same device, but one of {func} is on cpu")
        results = func(*args, **(kwargs or {}))
        for tensor in tensors_of(results):
            if tensor.untyped_storage()._cdata not in storages:
                mark(tensor, cuda)
        if cuda:
            self.seen.cuda += 1
            self.seen.dtypes |= {(str(func.overloadpacket), tensor.dtype) for tensor in inputs}
        return results


class Calls(TorchFunctionMode):
    """Every call of torch from Python: devices that are named or asked for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensor = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if func == torch.Tensor.device.__get__ and on_cuda(tensor):
            return CUDA
        if func == torch.Tensor.is_cuda.__get__:
            return on_cuda(tensor)
        if func == torch.Tensor.is_cpu.__get__:
            return not on_cuda(tensor)
        if func is torch.Tensor.numpy and on_cuda(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if func is torch.Tensor.cpu:
            return moved(tensor, CPU)
        if func is torch.Tensor.cuda:
            return moved(tensor, CUDA)
        if func is torch.Tensor.to:
            return self.to(*args, **kwargs)
        if func is torch.as_tensor and tensor is not None:
            return self.to(*args, **kwargs)
        device = kwargs.get("device")
        if device is None:
            results = func(*args, **kwargs)
            return mark(results, on_cuda(tensor)) if func is torch.Tensor.new_tensor else results
        if torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        return mark(func(*args, **{**kwargs, "device": CPU}), True)

    def to(self, tensor, *args, **kwargs):
        if isinstance(args[0] if args else None, torch.Tensor):
            other, *args = args
            args = [other.device, other.dtype, *args]
        copy = kwargs.pop("copy", False)
        device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        cast = {"dtype": dtype} if dtype else {}
        cast |= {"memory_format": memory_format} if memory_format else {}
        return moved(tensor.to(**cast, copy=copy) if cast or copy else tensor, device)


def moved(tensor, device):
    """A copy with the other mark; the tensor itself where it is there already."""
    if device is None or on_cuda(tensor) == (device.type == "cuda"):
        return tensor
    return mark(tensor.clone(), device.type == "cuda")


@contextmanager
def emulated_cuda():
    """Yields what was seen: `cuda`, the number of operations on the device, `dtypes` {(operation, type of an input)}."""
    states = (PartialState, AcceleratorState, GradientState)

    def on_the_cpu(function):
        return lambda kind, *args: function("cpu" if kind == "cuda" else kind, *args)

    begin = torch.autocast.__init__

    def autocast(self, device_type, *args, **kwargs):
        begin(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    answers = {"is_available": True, "device_count": 1, "current_device": 0, "get_device_name": "emulated"}
    answers |= {"is_bf16_supported": True, "set_device": None, "synchronize": None}
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            stack.enter_context(mock.patch.object(torch, name, on_the_cpu(getattr(torch, name))))
        stack.enter_context(mock.patch.object(torch.autocast, "__init__", autocast))
        for state in states:  # accelerate's, of a device that this process had before
            state._reset_state()
            stack.callback(state._reset_state)
        stack.enter_context(Calls())
        yield stack.enter_context(Operations()).seen
