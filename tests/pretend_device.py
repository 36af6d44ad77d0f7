"""A device that is none: memory of the CPU, with the rules of a GPU about who may touch whom.

With `pytest --device=pretend` torch's default device is "cuda" and each tensor made on it carries a
label. The CPU's kernels compute, but what a GPU would refuse fails: tensors of two devices in one
operation, a generator of the other device, NumPy's view of a GPU's memory, lengths that are not on
the CPU. So the tests are known to be written for a device before one is there. It says nothing
about the CUDA kernels.

What C++ makes without Python's knowledge (the gradient that a hook is given, what TorchScript
returns) has no label and goes with either device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, resolve_name
from torch.utils._device import DeviceContext, _device_constructors

HERE, THERE = "cpu", "cuda"
# Functions that take a table or an index of the CPU beside data of the device.
TAKE_TABLES = {
    *("_pack_padded_sequence", "_pad_packed_sequence", "lstm", "gru", "rnn_tanh", "rnn_relu"),
    *("recurrent", "recurrent.default", "recurrent_backward.default", "module_forward"),
    *("__getitem__", "__setitem__"),
}
MOVE = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.copy_, Tensor.data.__set__}


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


def label_of(tensor: Tensor) -> str | None:
    """Where the tensor pretends to be; None where nothing is known."""
    if tensor.device.type != HERE:
        return tensor.device.type
    return getattr(holder_of(tensor), "pretended", None)


def holder_of(tensor: Tensor) -> object:
    """What carries the label: the memory, which views and autograd's copies share."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):  # sparse tensors have none
        return tensor


def put(value: object, label: str) -> None:
    """Label what has no label."""
    for tensor in tensors_in(value):
        if tensor.device.type == HERE and label_of(tensor) is None:
            holder_of(tensor).pretended = label


def common_label(name: str, tensors: list[Tensor]) -> str | None:
    """The device of an operation; an error if its tensors are on two."""
    found = {}
    for tensor in tensors:
        label = label_of(tensor)
        if label is None or (label == HERE and tensor.dim() == 0):
            continue
        if label == HERE and name in TAKE_TABLES and not tensor.is_floating_point():
            continue
        found[label] = tensor
    if len(found) > 1 and "meta" not in found:
        detail = {k: (tuple(v.shape), v.dtype) for k, v in found.items()}
        raise RuntimeError(f"{name}: Expected all tensors to be on the same device, {detail}")
    return next(iter(found), None)


class PretendDevice(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.default = HERE

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if func == Tensor.device.__get__:
            known = label_of(args[0])
            there = known == THERE or (known is None and self.default == THERE)
            return torch.device(THERE, 0) if there else func(*args)
        if func in MOVE:
            return self.move(func, args, kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and label_of(args[0]) == THERE:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        if func == torch._has_compatible_shallow_copy_type:
            return label_of(args[0]) == label_of(args[1]) and func(*args)
        tensors = list(tensors_in((args, kwargs)))
        label = common_label(name, tensors)
        if name == "_pack_padded_sequence" and label_of(args[1]) == THERE:
            raise RuntimeError("'lengths' argument should be a 1D CPU int64 tensor")
        if func in _device_constructors():
            label = self.place(kwargs) or label or self.context() or self.default
        elif "device" in kwargs:
            label = self.place(kwargs) or label
        generator = kwargs.get("generator")
        if generator is not None and label == THERE:
            raise RuntimeError(f"{resolve_name(func)}: Expected a 'cuda' device type for generator")
        result = func(*args, **kwargs)
        if name == "_pack_padded_sequence":
            put(result[1], HERE)
        if label is None and not any(label_of(t) is None for t in tensors):
            label = HERE  # made of nothing, or of numbers of the CPU
        if label in (HERE, THERE):
            put(result, label)
        return result

    def context(self) -> str | None:
        """Of `with torch.device(...)`."""
        modes = _get_current_function_mode_stack()
        return next((m.device.type for m in reversed(modes) if isinstance(m, DeviceContext)), None)

    def place(self, kwargs: dict[str, object]) -> str | None:
        """The device that is asked for, which the CPU stands in for from here on."""
        asked = kwargs.get("device")
        if asked is None:
            return None
        kind = torch.device(asked).type
        if kind == THERE:
            kwargs["device"] = HERE
        return kind

    def move(self, func: Callable, args: tuple, kwargs: dict[str, object]) -> object:
        if func in (Tensor.data.__set__, Tensor.copy_):
            return func(*args, **kwargs)
        tensor, *rest = args
        before = label_of(tensor)
        target = {Tensor.cpu: HERE, Tensor.cuda: THERE}.get(func)
        if func == Tensor.to:
            target = self.place(kwargs)
            for i, argument in enumerate(rest):
                if isinstance(argument, Tensor):
                    target, rest[i] = label_of(argument), argument.dtype
                elif isinstance(argument, (str, torch.device)):
                    target = torch.device(argument).type
                    rest[i] = "meta" if target == "meta" else HERE
            result = func(tensor, *rest, **kwargs)
        else:
            result = tensor.view_as(tensor) if before != target else tensor
        target = target or before
        if target in (HERE, THERE):
            if before not in (target, None) and result.data_ptr() == tensor.data_ptr():
                result = result.clone()
            put(result, target)
        return result


def install() -> PretendDevice:
    """From now on; modules of the suite are imported under it."""
    mode = PretendDevice()
    mode.__enter__()
    from rnn_ext import _C

    for name in ("module_forward", "recurrent"):
        setattr(_C, name, labelled(name, getattr(_C, name)))
    return mode


def labelled(name: str, function: Callable) -> Callable:
    """A function of the extension that takes and gives tensors without asking Python."""

    def call(*args: object, **kwargs: object) -> object:
        tensors = list(tensors_in((args, kwargs)))
        label = common_label(name, tensors)
        result = function(*args, **kwargs)
        if label in (HERE, THERE) and result is not NotImplemented:
            put(result, label)
        return result

    return call
