"""Swap the recurrent modules of a model for the fused ones of this package, and back.

Both directions change classes, never tensors: `rnn_ext.LSTM` and `torch.nn.LSTM` keep the same
attributes, so a module of one class becomes a module of the other by assigning `__class__`. The
object stays the same object, and so does everything attached to it or pointing at it: parameters
(and the optimizer that holds them), hooks, parametrizations, pruning masks, `train()` or `eval()`,
references from other modules, from lists and from weak references.
"""

from __future__ import annotations

import copyreg
import functools
import types
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.utils import parametrize

from rnn_ext import features, modules

__all__ = ["convert", "to_torch"]

_ModuleT = TypeVar("_ModuleT", bound=nn.Module)
_ClassMap = Mapping[type[nn.Module], type[nn.Module]]

_TO_FUSED: _ClassMap = {
    nn.RNN: modules.RNN,
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNNCell: modules.RNNCell,
    nn.LSTMCell: modules.LSTMCell,
    nn.GRUCell: modules.GRUCell,
}
_TO_TORCH: _ClassMap = {fused: plain for plain, fused in _TO_FUSED.items()}


def convert(model: _ModuleT, inplace: bool = False) -> _ModuleT:
    """Swap every `nn.RNN`, `nn.LSTM`, `nn.GRU` and their cells in `model` for this package's.

    The modules found are `model` itself and everything registered below it, at any depth; a module
    reachable by two paths stays one module. Only the exact classes of `torch.nn` are swapped,
    parametrized ones (`torch.nn.utils.parametrize`) included. A class of your own that derives
    from `nn.LSTM` is left alone, because it may override what the swap would bypass; so is a class
    that another tool put in front (FSDP2's `fully_shard`): convert before you wrap.

    Args:
        model: the model to convert; any `nn.Module`, a single recurrent layer too.
        inplace: if `True`, the modules inside `model` are changed where they stand and `model`
            itself is returned. If `False`, `model` is left untouched and a new tree of modules is
            returned, which *shares* every parameter and buffer with `model`: an optimizer built
            for one trains both, and `.to()` on one moves the parameters of both. Use
            `copy.deepcopy(model)` first for a model that is independent.

    Returns:
        The converted model.

    Raises:
        TypeError: if `model` is not an `nn.Module`.
        ValueError: if a module in `model` has been compiled; convert first, then compile.

    With `inplace=False`, references to a module of the tree are redirected to its copy where they
    sit in attributes or hooks: directly, in a list, tuple, set, or dict (which become containers of
    their own, with the same elements), in a `functools.partial`, a weak reference, or as the
    object of a bound method. A reference hidden anywhere else (a closure, an object of another
    class) still leads to the original module, which gives the same numbers from the same
    parameters, unfused. `inplace=True` has no such limit. Neither reaches a recurrent module that
    is not registered as a submodule, nor a scripted one.
    """
    return _change_classes(model, _TO_FUSED, inplace)


def to_torch(model: _ModuleT, inplace: bool = False) -> _ModuleT:
    """Swap every module of this package in `model` for the one of `torch.nn`: undo `convert`.

    A model that has gone through it needs this package no longer, to be pickled for example. The
    rules, arguments and errors are those of `convert`, read backwards: a class of your own that
    derives from `rnn_ext.LSTM` is left alone. `checkpoint_steps`, which changes no result, is
    ignored by torch.nn and works again after `convert`.

    Args:
        model: the model to change back; any `nn.Module`.
        inplace: as in `convert`.

    Returns:
        The model with modules of `torch.nn`.

    Raises:
        TypeError: if `model` is not an `nn.Module`.
        ValueError: if a module in `model` has been compiled, or has an option that torch.nn lacks
            and that changes its results, `zoneout` for example.
    """
    if isinstance(model, nn.Module):
        for name, module in model.named_modules():
            if parametrize.type_before_parametrizations(module) in _TO_TORCH:
                _check_options(name, module)
    return _change_classes(model, _TO_TORCH, inplace)


def _check_options(name: str, module: nn.Module) -> None:
    options = features.changing_options(module) if isinstance(module, nn.RNNBase) else []
    if options:
        raise ValueError(
            f"to_torch: {module._get_name()} '{name}' has {', '.join(options)}, which torch.nn "
            "lacks: its results would change"
        )


def _change_classes(model: _ModuleT, classes: _ClassMap, inplace: bool) -> _ModuleT:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model should be a torch.nn.Module, got: {type(model).__name__}")
    for name, module in model.named_modules():
        # Compiled code has captured the modules as they were: torch.compile(m) keeps them in a
        # closure of the wrapper, m.compile() in a bound method.
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise ValueError(
                f"{type(module).__name__} '{name}' is compiled; expected a model that is not: "
                "convert it first, then compile it"
            )
    if not inplace:
        model = _copy_tree(model)
    for module in model.modules():
        target = classes.get(parametrize.type_before_parametrizations(module))
        if target is not None:
            _set_class(module, target)
    return model


def _set_class(module: nn.Module, cls: type[nn.Module]) -> None:
    """Make `module` an instance of `cls`, keeping its parametrizations.

    A parametrized module has a class of its own, derived from the class it had before, with one
    property for each parametrized tensor. It gets a new one here, derived from `cls`.
    """
    parametrized = list(module.parametrizations) if parametrize.is_parametrized(module) else []
    module.__class__ = cls
    if parametrized:
        parametrize._inject_new_class(module)
        for tensor_name in parametrized:
            parametrize._inject_property(module, tensor_name)


def _copy_tree(model: _ModuleT) -> _ModuleT:
    """Copy the modules of a model, sharing all tensors; `convert` documents what follows along.

    `copy.deepcopy` would not do: it refuses tensors that are part of a graph (the weights that
    `weight_norm` computes), and clones whatever else hangs on a module (loggers, trainers, data).
    """
    originals = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    # id of an object of the original tree -> its copy. The originals outlive the dictionary.
    copies: dict[int, Any] = {id(m): object.__new__(type(m)) for m in originals}
    for original in originals:
        module = copies[id(original)]
        module.__dict__.update((k, _redirect(v, copies)) for k, v in original.__dict__.items())
        for slot in copyreg._slotnames(type(original)):
            if hasattr(original, slot):
                object.__setattr__(module, slot, _redirect(getattr(original, slot), copies))
    for original in originals:
        if parametrize.is_parametrized(original):
            # torch keeps the properties of a parametrized module in its class, and edits them
            # there: the copy must not share that class with the original.
            plain = parametrize.type_before_parametrizations(original)
            _set_class(copies[id(original)], plain)
    return copies.get(id(model), model)


def _redirect(value: Any, copies: dict[int, Any]) -> Any:
    """Return `value` with every module that has a copy replaced by the copy."""
    if id(value) in copies:
        return copies[id(value)]
    kind = type(value)
    if kind in (list, dict, OrderedDict, set):
        # Registered before it is filled: it may contain itself.
        container = copies[id(value)] = kind()
        if kind is list:
            container.extend(_redirect(v, copies) for v in value)
        elif kind is set:
            container.update(_redirect(v, copies) for v in value)
        else:
            container.update((_redirect(k, copies), _redirect(v, copies)) for k, v in value.items())
        return container
    if kind is tuple:
        return tuple(_redirect(v, copies) for v in value)
    if kind is types.MethodType:
        return types.MethodType(value.__func__, _redirect(value.__self__, copies))
    if kind is functools.partial:
        arguments = (_redirect(v, copies) for v in value.args)
        keywords = {k: _redirect(v, copies) for k, v in value.keywords.items()}
        return functools.partial(_redirect(value.func, copies), *arguments, **keywords)
    if kind is weakref.ref:
        return weakref.ref(copies[id(value())]) if id(value()) in copies else value
    if kind is _WrappedHook:
        hook = _redirect(value.hook, copies)
        return _WrappedHook(hook, _redirect(value.module(), copies) if value.with_module else None)
    return value
