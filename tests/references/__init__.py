"""Plain NumPy references in float64, step by step: what the cells compute, and their gradients.

``rnn``, ``lstm`` and ``gru`` define one layer in one direction; ``stack`` composes them into the
semantics of torch.nn, ``window`` truncates their gradients. Nothing here shares a line with the
engine or with torch.
"""

from . import gru, lstm, rnn, stack, window
from .activations import LINEAR, STANDARD, Activation, Array

__all__ = ["LINEAR", "STANDARD", "Activation", "Array", "gru", "lstm", "rnn", "stack", "window"]
