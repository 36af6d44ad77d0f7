"""torch.export and AOTInductor: saved in this process, loaded and run in a new one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import rnn_ext

CELLS = {
    "rnn": (nn.RNN, {}),
    "gru": (nn.GRU, {"num_layers": 2, "bidirectional": True}),
    "lstm": (nn.LSTM, {"batch_first": True}),
    "lstm-proj": (nn.LSTM, {"proj_size": 3, "num_layers": 2}),
}
LOAD = {
    "export": "torch.export.load(sys.argv[1]).module()",
    "aoti": "torch._inductor.aoti_load_package(sys.argv[1])",
}


class Net(nn.Module):
    def __init__(self, cls: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.recurrent = cls(4, 6, **options)
        width = self.recurrent.proj_size or 6
        self.head = nn.Linear(width * (2 if self.recurrent.bidirectional else 1), 3)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        output, state = self.recurrent(torch.tanh(input))
        return self.head(output), state[0] if isinstance(state, tuple) else state


def program(model: nn.Module, **options: object) -> torch.export.ExportedProgram:
    first, second = Dim("first", max=512), Dim("second", max=512)
    return torch.export.export(
        model, (torch.randn(5, 3, 4),), dynamic_shapes=({0: first, 1: second},), **options
    )


def run_elsewhere(how: str, path: Path, model: nn.Module) -> None:
    """Load and call the program in a new process, with other sizes than it was exported with."""
    inputs = [torch.randn(9, 2, 4), torch.randn(2, 17, 4)]
    data = path.with_suffix(".data.pt")
    with torch.no_grad():
        torch.save([(x, model(x)) for x in inputs], data)
    code = (
        "import sys, torch, rnn_ext\n"
        f"program = {LOAD[how]}\n"
        "for input, expected in torch.load(sys.argv[2]):\n"
        "    torch.testing.assert_close(tuple(program(input)), expected)\n"
        "print('same')\n"
    )
    command = [sys.executable, "-c", code, str(path), str(data)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same\n"


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("strict", [False, True])
def test_dynamic_batch_and_time(name: str, strict: bool) -> None:
    cls, options = CELLS[name]
    model = rnn_ext.convert(Net(cls, **options).eval())
    exported = program(model, strict=strict)
    called = [n.target for n in exported.graph.nodes if n.op == "call_function"]
    assert called.count(torch.ops.rnn_ext.recurrent.default) == 1
    for shape in ((5, 3, 4), (9, 2, 4), (2, 17, 4)):
        input = torch.randn(shape)
        torch.testing.assert_close(exported.module()(input), model(input))


def test_saved_and_loaded_in_a_new_process(tmp_path: Path) -> None:
    model = rnn_ext.convert(Net(nn.LSTM, num_layers=2, bidirectional=True).eval())
    torch.export.save(program(model), tmp_path / "model.pt2")
    run_elsewhere("export", tmp_path / "model.pt2", model)


def test_exported_for_training() -> None:
    model = rnn_ext.convert(Net(nn.GRU))
    exported = program(model).module()
    input = torch.randn(7, 2, 4)
    exported(input)[0].square().sum().backward()
    model(input)[0].square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}
    copies = {n: p.grad for n, p in exported.named_parameters()}
    torch.testing.assert_close(copies, gradients)


def test_aot_inductor_package_in_a_new_process(tmp_path: Path) -> None:
    model = rnn_ext.convert(Net(nn.LSTM).eval())
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            program(model), package_path=str(tmp_path / "model.pt2")
        )
    run_elsewhere("aoti", Path(package), model)
