"""Who is measured. All are compared with torch.nn, and given its weights."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import rnn_ext
from rnn_ext._bench import Case, Workload

# Builds the case around the weights of the given torch.nn module.
Build = Callable[[Case, nn.RNNBase], Workload]

BASELINE = "torch.nn"
OURS = "rnn_ext"

# Ours in another setting, timed beside some cases to be compared with.
TRAINING_FORWARD = "rnn_ext, forward of training"
SINGLE_PRECISION = "rnn_ext, float32"
TWO_DIRECTIONS_IN_TURN = "rnn_ext, two directions in turn"


def build_ours(case: Case, reference: nn.RNNBase) -> Workload:
    module = case.build_module(rnn_ext)
    module.load_state_dict(reference.state_dict())
    return Workload(case, module)


def build_onnxruntime(case: Case, reference: nn.RNNBase) -> Workload:
    from onnx_peers import OnnxRuntime

    return OnnxRuntime(case, reference)


def build_openvino(case: Case, reference: nn.RNNBase) -> Workload:
    from onnx_peers import OpenVino

    return OpenVino(case, reference)


def build_compiled(case: Case, reference: nn.RNNBase) -> Workload:
    from compiled import Compiled

    return Compiled(case, reference)


def plain(case: Case) -> bool:
    """A stack of one direction in float32, every row of the same length."""
    return not (case.bidirectional or case.proj_size or case.packed) and (
        case.dtype == torch.float32 and case.nonlinearity == "tanh"
    )


# inductor unrolls the loop: at 100 steps its compiler needs minutes for one training case.
COMPILED_STEPS = 50


@dataclass(frozen=True)
class Rival:
    """Somebody else's engine beside torch.nn, measured where it is installed and has the case."""

    name: str
    build: Build
    has: Callable[[Case], bool]
    packages: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        return all(importlib.util.find_spec(package) for package in self.packages)

    @property
    def version(self) -> str | None:
        if not self.installed:
            return None
        return importlib.metadata.version(self.packages[-1]) if self.packages else torch.__version__


RIVALS = {
    "ort": Rival(
        "onnxruntime",
        build_onnxruntime,
        lambda case: plain(case) and not case.training,
        ("onnx", "onnxruntime"),
    ),
    "openvino": Rival(
        "openvino",
        build_openvino,
        lambda case: plain(case) and not case.training,
        ("onnx", "openvino"),
    ),
    "compile": Rival(
        "torch.compile",
        build_compiled,
        lambda case: plain(case) and case.num_layers == 1 and case.steps <= COMPILED_STEPS,
    ),
}

# What the bars mean by "every peer".
USUAL_RIVALS = ("ort", "openvino")

RIVAL_NAMES = {BASELINE, *(rival.name for rival in RIVALS.values())}

PEERS: dict[str, Build] = {
    BASELINE: Workload,
    OURS: build_ours,
}


class TrainingForward(Workload):
    """The forward of a training step: keeps what backward needs, and drops it."""

    def __call__(self) -> tuple[Tensor, ...]:
        return self._forward()


class InTurn(Workload):
    """The two directions of a layer as two layers that run one after the other.

    Both read the same sequence: turning it round for the second would be a copy that nobody who
    asks what one kernel for both directions saves wants to see counted.
    """

    def __init__(self, case: Case, reference: nn.RNNBase) -> None:
        single = replace(case, bidirectional=False)
        weights = reference.state_dict()
        self.directions = []
        for suffix in ("", "_reverse"):
            module = single.build_module(rnn_ext)
            module.load_state_dict({name: weights[name + suffix] for name in module.state_dict()})
            self.directions.append(Workload(single, module))

    def __call__(self) -> tuple[Tensor, ...]:
        return tuple(tensor for direction in self.directions for tensor in direction())


def build_training_forward(case: Case, reference: nn.RNNBase) -> Workload:
    return TrainingForward(case, build_ours(case, reference).module)


def build_single_precision(case: Case, reference: nn.RNNBase) -> Workload:
    return build_ours(replace(case, dtype=torch.float32), reference)


def yardsticks(case: Case) -> dict[str, Build]:
    """Ours in the other settings that the bars compare this case with."""
    builds: dict[str, Build] = {}
    if case.bidirectional:
        builds[TWO_DIRECTIONS_IN_TURN] = InTurn
    elif case.dtype == torch.bfloat16:
        builds[SINGLE_PRECISION] = build_single_precision
    elif case.training and case.batch >= 32:
        builds[TRAINING_FORWARD] = build_training_forward
    return builds


def build_all(case: Case, peers: Mapping[str, Build]) -> dict[str, Workload]:
    """Every peer's version of the case, on the same weights and inputs."""
    torch.manual_seed(0)
    reference = case.build_module(nn)
    return {name: build(case, reference) for name, build in peers.items()}
