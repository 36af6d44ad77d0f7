"""The shapes of outputs and states: layers, directions, and how to take them apart.

The numbers 1 to 12 as a batch of 4 sequences of 3 steps, through RNNs of 2 layers and 2 units.

    python examples/shapes.py    a second (--quick is the same)

Claims: every shape is torch.nn.RNN's, and so are the values (to 1e-6); the last state of each
direction of the last layer is where it should be in the output.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

import common
import rnn_ext

LAYERS, HIDDEN = 2, 2


@dataclass
class Result:
    output: Tensor  # (B, T, D * H)
    h_n: Tensor  # (L * D, B, H)
    torch_output: Tensor
    torch_h_n: Tensor


def run(input: Tensor, bidirectional: bool) -> Result:
    arguments = {"num_layers": LAYERS, "batch_first": True, "bidirectional": bidirectional}
    ours = rnn_ext.RNN(input.shape[-1], HIDDEN, **arguments)
    theirs = nn.RNN(input.shape[-1], HIDDEN, **arguments)
    theirs.load_state_dict(ours.state_dict())
    with torch.inference_mode():
        return Result(*ours(input), *theirs(input))


def split_directions(output: Tensor, h_n: Tensor, directions: int) -> tuple[Tensor, Tensor]:
    """output (B, T, D * H) as (B, T, D, H) and h_n (L * D, B, H) as (L, D, B, H)."""
    return output.unflatten(-1, (directions, -1)), h_n.unflatten(0, (-1, directions))


def claims(results: dict[int, Result]) -> dict[str, bool]:
    held = {}
    for directions, result in results.items():
        shapes = f"output {tuple(result.output.shape)}, h_n {tuple(result.h_n.shape)}"
        held[f"{directions} direction(s): {shapes}, torch.nn's shapes and values"] = (
            result.output.shape == result.torch_output.shape
            and result.h_n.shape == result.torch_h_n.shape
            and torch.allclose(result.output, result.torch_output, atol=1e-6)
            and torch.allclose(result.h_n, result.torch_h_n, atol=1e-6)
        )
        output, h_n = split_directions(result.output, result.h_n, directions)
        forward = torch.equal(output[:, -1, 0], h_n[-1, 0])
        held[f"{directions} direction(s): forward ends at the last step"] = forward
        if directions == 2:
            backward = torch.equal(output[:, 0, 1], h_n[-1, 1])
            held["2 direction(s): backward ends at the first step"] = backward
    return held


def main(argv: list[str] | None = None) -> int:
    arguments = common.parse(common.parser(__file__, __doc__), argv)
    input = torch.arange(1.0, 13.0).view(4, 3, 1)
    print(f"input {tuple(input.shape)}: 4 sequences (B), 3 steps (T), 1 feature (I)")
    results = {}
    for directions in tqdm((1, 2), desc="directions"):
        results[directions] = result = run(input, bidirectional=directions == 2)
        output, h_n = split_directions(result.output, result.h_n, directions)
        print(f"\n{LAYERS} layers, {directions} direction(s), hidden {HIDDEN}")
        print(f"  output {tuple(result.output.shape)} = (B, T, D * H) -> {tuple(output.shape)}")
        print(f"  h_n    {tuple(result.h_n.shape)} = (L * D, B, H) -> {tuple(h_n.shape)}")
    output, h_n = split_directions(results[2].output, results[2].h_n, 2)
    names = ("forward: h_n[-1, 0] is the last step", "backward: h_n[-1, 1] is the first step")
    with common.picture(arguments.plot, columns=2) as panels:
        for direction, (panel, name) in enumerate(zip(panels, names, strict=True)):
            # One sequence: steps across, units down; the framed column is the last state.
            panel.imshow(output[0, :, direction].T.numpy(), vmin=-1, vmax=1, cmap="coolwarm")
            for step in range(3):
                for unit in range(HIDDEN):
                    value = f"{output[0, step, direction, unit]:.3f}"
                    panel.text(step, unit, value, ha="center", va="center")
            ends_at = -0.5 + (2 if direction == 0 else 0)
            frame = {"fill": False, "linewidth": 3}
            panel.add_patch(type(panel.patch)((ends_at, -0.5), 1, HIDDEN, **frame))
            panel.set(title=name, xlabel="step", ylabel="unit")
            panel.set(xticks=range(3), yticks=range(HIDDEN))
    return common.report(claims(results))


if __name__ == "__main__":
    sys.exit(main())
