"""torch.nn's weights in the order of the ONNX operators."""

from __future__ import annotations

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

# For each gate of the ONNX operator, its place in torch.nn: i o f c of i f g o, z r h of r z n.
GATE_ORDER = {"RNN": (0,), "LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}


def reorder_gates(cell: str, weight: Tensor) -> Tensor:
    order = GATE_ORDER[cell]
    gates = weight.detach().chunk(len(order))
    return torch.cat([gates[place] for place in order])


def onnx_weights(cell: str, module: nn.RNNBase, layer: int) -> dict[str, NDArray]:
    """W, R and B of one layer and direction, in the order in which the operators take them."""

    def weight(name: str) -> Tensor:
        return reorder_gates(cell, getattr(module, f"{name}_l{layer}"))

    def with_direction(weight: Tensor) -> NDArray:
        return weight.unsqueeze(0).numpy()

    return {
        "W": with_direction(weight("weight_ih")),
        "R": with_direction(weight("weight_hh")),
        "B": with_direction(torch.cat([weight("bias_ih"), weight("bias_hh")])),
    }
