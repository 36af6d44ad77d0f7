"""The two nonlinearities of the gates, and the straight lines that replace them in tight tests.

A saturating activation hides errors: whatever goes wrong far out on the sigmoid changes nothing.
``LINEAR`` replaces both by a straight line (their own first-order Taylor expansions at 0), so that
every error survives to the last of a thousand steps.

Both derivatives are functions of the *output* y = f(x), which is all that backward keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Activation:
    sigmoid: Callable[[Array], Array]
    tanh: Callable[[Array], Array]
    d_sigmoid: Callable[[Array], Array]  # of y = sigmoid(x)
    d_tanh: Callable[[Array], Array]  # of y = tanh(x)


STANDARD = Activation(
    # 1 / (1 + exp(-x)) = exp(-log(1 + exp(-x))); logaddexp never overflows
    sigmoid=lambda x: np.exp(-np.logaddexp(0.0, -x)),
    tanh=np.tanh,
    d_sigmoid=lambda y: y * (1.0 - y),
    d_tanh=lambda y: 1.0 - y * y,
)

LINEAR = Activation(
    sigmoid=lambda x: 0.5 + 0.25 * x,
    tanh=lambda x: x,
    d_sigmoid=lambda y: np.full_like(y, 0.25),
    d_tanh=np.ones_like,
)
