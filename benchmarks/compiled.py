"""A time loop over a cell, written in torch operations and compiled by inductor.

What torch.compile makes of the loop that people write by hand. One product computes the input's
part of the gates for all steps, then Python's loop over the steps is unrolled by the compiler into
one graph: the product with W_hh stays a call to the matrix library, all between is fused. Compiling
takes from seconds to minutes for each case and is never part of a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from rnn_ext._bench import Case, Workload

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Tensor, Tensor], State]


def step_rnn(x: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor) -> State:
    (h,) = state
    return (torch.tanh(x + functional.linear(h, weight_hh, bias_hh)),)


def step_lstm(x: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor) -> State:
    h, c = state
    i, f, g, o = (x + functional.linear(h, weight_hh, bias_hh)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def step_gru(x: Tensor, state: State, weight_hh: Tensor, bias_hh: Tensor) -> State:
    (h,) = state
    x_r, x_z, x_n = x.chunk(3, 1)
    h_r, h_z, h_n = functional.linear(h, weight_hh, bias_hh).chunk(3, 1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    return (n + z * (h - n),)


STEPS: dict[str, Step] = {"RNN": step_rnn, "LSTM": step_lstm, "GRU": step_gru}


class Compiled(Workload):
    def __init__(self, case: Case, reference: nn.RNNBase) -> None:
        # Its own leaves: gradients of one side must not land in the other's parameters.
        module = case.build_module(nn)
        module.load_state_dict(reference.state_dict())
        super().__init__(case, module)
        shape = (1, case.batch, case.hidden_size)
        zeros = tuple(torch.zeros(shape) for _ in range(2 if case.cell == "LSTM" else 1))
        self.first_state = self.initial_state or zeros
        self.step = STEPS[case.cell]
        # Each case is a new graph: in one process they would run into dynamo's recompile limit.
        torch.compiler.reset()
        self.loop = torch.compile(time_loop, fullgraph=True, dynamic=False)

    def _forward(self) -> tuple[Tensor, ...]:
        return self.loop(self.step, self.input, self.first_state, *self.parameters)


def time_loop(
    step: Step,
    sequence: Tensor,
    state: State,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
) -> tuple[Tensor, ...]:
    """Output and final states; states are (1, B, H) as torch.nn's."""
    state = tuple(part.squeeze(0) for part in state)
    outputs = []
    for x in functional.linear(sequence, weight_ih, bias_ih).unbind(0):
        state = step(x, state, weight_hh, bias_hh)
        outputs.append(state[0])
    return (torch.stack(outputs), *(part.unsqueeze(0) for part in state))
