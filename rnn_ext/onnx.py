"""Export to ONNX: a recurrent module becomes the standard RNN, LSTM or GRU operators, one a layer.

Needs the packages onnx and onnxscript, which torch's exporter itself needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from rnn_ext import functional as F
from rnn_ext.convert import convert

__all__ = ["export", "translations"]

# Where ONNX's gates stand among torch's: i, o, f, c of i, f, g, o; z, r, h of r, z, n.
_GATE_ORDER = {F.RNN_TANH: (0,), F.RNN_RELU: (0,), F.LSTM: (0, 3, 1, 2), F.GRU: (1, 0, 2)}


def export(model: nn.Module, args: tuple[Any, ...], f: Any = None, **options: Any) -> Any:
    """`torch.onnx.export(model, args, f, dynamo=True, ...)` for a model with recurrent modules.

    Recurrent modules of torch.nn are converted on the way, so that time stays a dynamic axis.

    Args:
        model: the model, in `eval()`; left untouched.
        args: example inputs.
        f: file to write, if any.
        **options: passed on to `torch.onnx.export` (`dynamic_shapes`, `input_names`, ...).

    Returns:
        The `torch.onnx.ONNXProgram`.

    Raises:
        torch.onnx.errors.OnnxExporterError: what ONNX has no operator for: packed sequences,
            `proj_size`, dropout in training mode.
    """
    table = translations() | options.pop("custom_translation_table", {})
    return torch.onnx.export(
        convert(model), args, f, dynamo=True, custom_translation_table=table, **options
    )


def translations() -> dict[Callable, Callable]:
    """For `custom_translation_table` of `torch.onnx.export(..., dynamo=True)`."""
    from onnxscript import opset18 as op

    def recurrent(
        input,
        batch_sizes,
        h_0,
        c_0,
        params: Sequence,
        cell: int,
        has_biases: bool,
        num_layers: int,
        bidirectional: bool,
        batch_first: bool,
        dropout: float,
        training: bool,
        save_reserve: bool = False,
    ):
        directions = 2 if bidirectional else 1
        per_direction = len(params) // (num_layers * directions)
        if batch_sizes is not None:
            raise NotImplementedError("ONNX has no packed sequences; export padded ones")
        if per_direction % 2 == 1:
            raise NotImplementedError("ONNX's LSTM has no projection (proj_size)")
        if training and dropout > 0 and num_layers > 1:
            raise NotImplementedError("dropout between layers: call model.eval() before the export")
        hidden = int(params[0].shape[0]) // len(_GATE_ORDER[cell])
        rows = [i * hidden + unit for i in _GATE_ORDER[cell] for unit in range(hidden)]

        def reordered(weight):  # by one operator, which the exporter can carry out right away
            return op.Gather(weight, op.Constant(value_ints=rows), axis=0)

        def stacked(tensors):
            return op.Concat(*(op.Unsqueeze(t, [0]) for t in tensors), axis=0)

        def of_layers(state):  # (L*D, B, H) -> L of (D, B, H)
            if state is None or num_layers == 1:
                return [state] * num_layers
            return op.Split(state, axis=0, num_outputs=num_layers)

        attributes = {
            "hidden_size": hidden,
            "direction": "bidirectional" if bidirectional else "forward",
        }
        name = {F.LSTM: "LSTM", F.GRU: "GRU"}.get(cell, "RNN")
        if name == "RNN":
            attributes["activations"] = ["Relu" if cell == F.RNN_RELU else "Tanh"] * directions
        elif name == "GRU":
            attributes["linear_before_reset"] = 1

        x = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input
        h_n, c_n = [], []
        states = zip(of_layers(h_0), of_layers(c_0), strict=True)
        for layer, (h, c) in enumerate(states):
            w_ih, w_hh, biases = [], [], []
            for d in range(directions):
                own = params[(layer * directions + d) * per_direction :][:per_direction]
                own = [reordered(p) for p in own]
                w_ih.append(own[0])
                w_hh.append(own[1])
                if has_biases:
                    biases.append(op.Concat(own[2], own[3], axis=0))
            bias = stacked(biases) if has_biases else None
            arguments = [x, stacked(w_ih), stacked(w_hh), bias, None, h]
            if name == "LSTM":
                y, h, c = op.LSTM(*arguments, c, **attributes)
                c_n.append(c)
            else:
                y, h = getattr(op, name)(*arguments, **attributes)
            h_n.append(h)
            # (T, D, B, H) -> (T, B, D*H)
            x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, directions * hidden])
        output = op.Transpose(x, perm=[1, 0, 2]) if batch_first else x
        none = op.ConstantOfShape(op.Constant(value_ints=[0]))
        return (
            output,
            op.Concat(*h_n, axis=0),
            op.Concat(*c_n, axis=0) if c_n else none,
            none,  # the reserve is for backward
        )

    return {torch.ops.rnn_ext.recurrent.default: recurrent}
