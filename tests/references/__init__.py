"""Plain NumPy references in float64, step by step: what the cells compute, and their gradients.

``rnn``, ``lstm`` and ``gru`` define one layer in one direction; ``stack`` composes them into the
semantics of torch.nn, ``features`` into what the modules do beyond it, ``window`` truncates their
gradients, ``philox`` draws masks. Nothing here shares a line with the engine or with torch.
"""

from . import features, gru, lstm, philox, rnn, stack, window
from .activations import LINEAR, STANDARD, Activation, Array

__all__ = [
    "LINEAR",
    "STANDARD",
    "Activation",
    "Array",
    "features",
    "gru",
    "lstm",
    "philox",
    "rnn",
    "stack",
    "window",
]
