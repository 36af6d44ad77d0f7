"""Export to ONNX: the standard operators, run by onnxruntime with sizes of its own."""

from __future__ import annotations

import io
import itertools
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.utils.rnn import PackedSequence

import rnn_ext
import rnn_ext.onnx

CELLS = {
    "rnn_tanh": (nn.RNN, {}),
    "rnn_relu": (nn.RNN, {"nonlinearity": "relu"}),
    "lstm": (nn.LSTM, {}),
    "gru": (nn.GRU, {}),
}
OPERATORS = {"rnn_tanh": "RNN", "rnn_relu": "RNN", "lstm": "LSTM", "gru": "GRU"}


class Net(nn.Module):
    """A recurrent module that is handed its state, or is not."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.recurrent = recurrent

    def forward(self, input: Tensor, *hx: Tensor) -> tuple[Tensor, ...]:
        state = None
        if hx:
            state = hx if len(hx) == 2 else hx[0]
        output, state = self.recurrent(input, state)
        return (output, *state) if isinstance(state, tuple) else (output, state)


def arguments(module: nn.RNNBase, steps: int, batch: int, given_state: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(steps)
    shape = (batch, steps, 4) if module.batch_first else (steps, batch, 4)
    input = torch.randn(shape, generator=generator)
    if not given_state:
        return (input,)
    slots = module.num_layers * (2 if module.bidirectional else 1)
    count = 2 if module.mode == "LSTM" else 1
    return (input, *torch.randn(count, slots, batch, 6, generator=generator))


def exported(module: nn.RNNBase, given_state: bool) -> bytes:
    steps, batch = Dim("steps"), Dim("batch")
    axes = {0: batch, 1: steps} if module.batch_first else {0: steps, 1: batch}
    example = arguments(module, 5, 3, given_state)
    states = tuple({1: batch} for _ in example[1:])
    shapes = (axes, states) if states else (axes,)
    program = rnn_ext.onnx.export(Net(module).eval(), example, dynamic_shapes=shapes, verbose=False)
    file = io.BytesIO()
    program.save(file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("cell", "bidirectional", "num_layers"), [*itertools.product(CELLS, (False, True), (1, 2, 3))]
)
def test_agrees_with_onnxruntime(cell: str, bidirectional: bool, num_layers: int) -> None:
    cls, options = CELLS[cell]
    # The rest varies along: every value of it with every cell.
    batch_first, given_state = num_layers == 2, (num_layers == 3) != bidirectional
    module = cls(
        4, 6, num_layers, bidirectional=bidirectional, batch_first=batch_first,
        bias=num_layers != 3 or bidirectional, **options,
    )  # fmt: skip
    model = exported(module, given_state)
    operators = [node.op_type for node in onnx.load_from_string(model).graph.node]
    assert operators.count(OPERATORS[cell]) == num_layers
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for steps, batch in ((5, 3), (9, 2), (1, 1)):
        inputs = arguments(module, steps, batch, given_state)
        names = [i.name for i in session.get_inputs()]
        feed = dict(zip(names, (i.numpy() for i in inputs), strict=True))
        with torch.no_grad():
            expected = Net(module)(*inputs)
        for found, truth in zip(session.run(None, feed), expected, strict=True):
            # float32 of two engines; a gate in the wrong place is off by hundredths.
            np.testing.assert_allclose(found, truth.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cells(name: str) -> None:
    cell = getattr(nn, name)(4, 6).eval()
    input = torch.randn(3, 4)
    program = rnn_ext.onnx.export(cell, (input,), verbose=False)
    file = io.BytesIO()
    program.save(file)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    expected = cell(input)
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = session.run(None, {session.get_inputs()[0].name: input.numpy()})
    for mine, truth in zip(found, expected, strict=True):
        # As above.
        np.testing.assert_allclose(mine, truth.detach().numpy(), rtol=0, atol=1e-5)


def test_a_file_and_other_translations(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    called = []

    def sine(x: object) -> object:
        from onnxscript import opset18 as op

        called.append(x)
        return op.Sin(x)

    class Sines(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(torch.sin(x))[0]

    table = {torch.ops.aten.sin.default: sine}
    rnn_ext.onnx.export(
        Sines().eval(), (torch.ones(2, 3, 4),), path, custom_translation_table=table, verbose=False
    )
    onnx.checker.check_model(onnx.load(path))
    assert len(called) == 1


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(4, 6)

    def forward(self, data: Tensor, sizes: Tensor) -> Tensor:
        return self.gru(PackedSequence(data, sizes), torch.zeros(1, 2, 6))[0].data


@pytest.mark.parametrize("what", ["packed", "projection", "dropout"])
def test_what_onnx_has_no_operator_for(what: str) -> None:
    model, inputs, message = {
        "packed": (Packed().eval(), (torch.ones(3, 4), torch.tensor([2, 1])), "packed sequences"),
        "projection": (nn.LSTM(4, 6, proj_size=2).eval(), (torch.ones(2, 3, 4),), "proj_size"),
        "dropout": (nn.GRU(4, 6, 2, dropout=0.5), (torch.ones(2, 3, 4),), r"model\.eval\(\)"),
    }[what]
    with pytest.raises(torch.onnx.errors.OnnxExporterError) as caught:
        rnn_ext.onnx.export(model, inputs, verbose=False)
    messages, error = [], caught.value
    while error is not None:
        messages.append(str(error))
        error = error.__cause__
    assert re.search(message, "\n".join(messages))
