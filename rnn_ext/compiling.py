"""torch.compile for models with this package's modules in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rnn_ext.convert import convert

__all__ = ["compile"]


def compile(model: nn.Module, **options: Any) -> nn.Module:
    """Swap the recurrent modules of `model` for this package's and `torch.compile` it.

    A recurrent module is then one operator in the graph: no graph break, and batch and time may
    change. `torch.compile` by itself breaks the graph around every module derived from `nn.RNN`,
    `nn.LSTM` or `nn.GRU`, ours included, unless `torch._dynamo.config.allow_rnn` is set; here it is
    set during the calls of the compiled model only.

    Args:
        model: the model to compile. As `convert` without `inplace`, this leaves it untouched and
            shares its parameters with the compiled one.
        **options: passed on to `torch.compile` (`fullgraph`, `dynamic`, `backend`, `mode`, ...).

    Returns:
        The compiled model; train it, save its `state_dict`, call it as any other.

    Raises:
        TypeError: if `model` is not an `nn.Module`.
        ValueError: if a module in `model` has been compiled before.
    """
    compiled = torch.compile(convert(model), **options)
    # How torch.compile itself scopes `dynamic=True` to the calls of one compiled model.
    allow_rnn = torch._dynamo.config._make_closure_patcher(allow_rnn=True)
    compiled.dynamo_ctx.enter_exit_hooks.append(allow_rnn)
    return compiled
