"""Philox4x32-10 and the masks made of it, in NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .activations import Array

_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counters: NDArray[np.uint64], key: tuple[int, int]) -> NDArray[np.uint64]:
    """Counters (N, 4) of 32-bit words to random words (N, 4)."""
    c0, c1, c2, c3 = counters.astype(np.uint64).T
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (b >> _HALF) ^ c1 ^ np.uint64(k0),
            b & _LOW,
            (a >> _HALF) ^ c3 ^ np.uint64(k1),
            a & _LOW,
        )
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return np.stack([c0, c1, c2, c3], axis=1)


def mask(seed: int, size: Sequence[int], p: float) -> Array:
    """Element i is 1 where word i % 4 of counter i // 4 is below p * 2^32, else 0."""
    count = math.prod(size)
    seed %= 2**64
    position = np.arange((count + 3) // 4, dtype=np.uint64)
    nothing = np.zeros_like(position)
    counters = np.stack([position & _LOW, position >> _HALF, nothing, nothing], axis=1)
    words = philox(counters, (seed % 2**32, seed >> 32)).reshape(-1)[:count]
    return (words < np.uint64(round(p * 2**32))).astype(np.float64).reshape(size)
