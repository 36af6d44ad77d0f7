"""Who is measured. All are compared with torch.nn, and given its weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import rnn_ext
from rnn_ext._bench import Case, Workload

# Builds the case around the weights of the given torch.nn module.
Build = Callable[[Case, nn.RNNBase], Workload]

BASELINE = "torch.nn"
OURS = "rnn_ext"


def build_ours(case: Case, reference: nn.RNNBase) -> Workload:
    module = case.build_module(rnn_ext)
    module.load_state_dict(reference.state_dict())
    return Workload(case, module)


PEERS: dict[str, Build] = {
    BASELINE: Workload,
    OURS: build_ours,
}


def build_all(case: Case, peers: dict[str, Build]) -> dict[str, Workload]:
    """Every peer's version of the case, on the same weights and inputs."""
    torch.manual_seed(0)
    reference = case.build_module(nn)
    return {name: build(case, reference) for name, build in peers.items()}
