"""The counter-based random masks: torch.ops.rnn_ext.random_mask."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import rnn_ext  # noqa: F401  (registers the operator)
from helpers import threads
from references import philox

random_mask = torch.ops.rnn_ext.random_mask.default

# Random123's kat_vectors: counter, key, words.
KNOWN_ANSWERS = [
    ([0, 0, 0, 0], (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (
        [0xFFFFFFFF] * 4,
        (0xFFFFFFFF, 0xFFFFFFFF),
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
    ),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
SEEDS = (0, 1, -1, 2**63 - 1, -(2**63), 0x0123456789ABCDEF)


def seed_of(value: int) -> Tensor:
    return torch.tensor(value, dtype=torch.int64)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_reference_gives_the_published_words(counter: list, key: tuple, words: list) -> None:
    assert philox.philox(np.array([counter], dtype=np.uint64), key).tolist() == [words]


def test_words_of_seed_0_are_the_published_ones() -> None:
    """All 32 bits of the first four words, found by bisection over p."""
    for place, word in enumerate(KNOWN_ANSWERS[0][2]):
        assert random_mask(seed_of(0), [4], (word + 1) / 2**32, torch.float64)[place] == 1
        assert random_mask(seed_of(0), [4], word / 2**32, torch.float64)[place] == 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [(1,), (3,), (4,), (5,), (2, 3, 7), (0, 3), (41, 1013)])
def test_equals_the_reference(seed: int, size: tuple[int, ...]) -> None:
    mask = random_mask(seed_of(seed), size, 0.3, torch.float64)
    assert mask.shape == size
    assert (mask.numpy() == philox.mask(seed, size, 0.3)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dtypes_and_the_ends_of_p(dtype: torch.dtype) -> None:
    assert (random_mask(seed_of(5), [1000], 0.0, dtype) == 0).all()
    assert (random_mask(seed_of(5), [1000], 1.0, dtype) == 1).all()
    half = random_mask(seed_of(5), [1000], 0.5, dtype)
    assert half.dtype == dtype
    assert half.double().equal(random_mask(seed_of(5), [1000], 0.5, torch.float64))


def test_same_on_any_number_of_threads() -> None:
    size = [100_003]
    one = random_mask(seed_of(9), size, 0.4, torch.float32)
    with threads(2):
        two = random_mask(seed_of(9), size, 0.4, torch.float32)
    assert torch.equal(one, two)


def test_share_of_ones_and_seeds_that_differ() -> None:
    count, p = 1 << 20, 0.3
    one, other = (random_mask(seed_of(s), [count], p, torch.float64) for s in (3, 4))
    # The standard deviation of a mean of so many is 4.5e-4; fixed seeds, so it cannot fail by luck.
    assert abs(one.mean().item() - p) < 2e-3
    assert abs((one * other).mean().item() - p * p) < 2e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[], [0], [17], [3, 5], [2, 3, 4]])
def test_opcheck(sizes: list[int], dtype: torch.dtype) -> None:
    found = torch.library.opcheck(random_mask, (seed_of(1), sizes, 0.5, dtype))
    assert set(found.values()) == {"SUCCESS"}


def test_fake() -> None:
    with FakeTensorMode() as mode:
        fake = random_mask(mode.from_tensor(seed_of(1)), [3, 5], 0.5, torch.bfloat16)
    assert fake.shape == (3, 5)
    assert fake.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.tensor(1.0), [3], 0.5, torch.float32), RuntimeError, "seed must be an int64"),
        ((torch.tensor([1]), [3], 0.5, torch.float32), RuntimeError, "seed must be an int64"),
        ((torch.tensor(1), [3], 1.5, torch.float32), ValueError, "p must be between 0 and 1"),
        ((torch.tensor(1), [3], 0.5, torch.int64), NotImplementedError, "random_mask"),
    ],
)
def test_errors(arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        random_mask(*arguments)
