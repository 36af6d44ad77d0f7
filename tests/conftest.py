"""Settings of the whole suite: the same examples in every run, one thread unless a test asks, and
the device (devices.py)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

import devices
import pretend_device

hypothesis.settings.register_profile("rnn_ext", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("rnn_ext")

# Whole files and folders that have nothing to run on another device; single tests are marked
# `cpu_only` where they stand.
ABOUT_THE_CPU = {
    "benchmarks": "the benchmark's own machinery",
    "cuda": "the compiler's report",
    "examples": "the examples choose their device",
    "module_info": "torch's samples, a run of their own",
    "third_party": "published models, a run of their own",
    "test_build.py": "the build",
    "test_citizen.py": "torch.jit, sharing between processes and the CPU's autocast",
    "test_cli.py": "the command line",
    "test_compile.py": "Inductor's C++",
    "test_cuda_build.py": "the build",
    "test_cuda_emulated.py": "the host executor",
    "test_distributed.py": "gloo",
    "test_export.py": "programs exported for the CPU",
    "test_feature_options.py": "operators of the CPU engine",
    "test_features.py": "operators of the CPU engine",
    "test_isa.py": "instruction sets",
    "test_layer.py": "operators of the CPU engine",
    "test_layer_by_rows.py": "operators of the CPU engine",
    "test_lengths_and_resets.py": "operators of the CPU engine",
    "test_memory_pool.py": "the CPU's memory",
    "test_onnx.py": "onnxruntime on the CPU",
    "test_operators.py": "schemas and fake kernels; cuda-link-check asks CUDA's for shapes",
    "test_precision.py": "bfloat16 products of the CPU",
    "test_pytorch_suite.py": "runs in processes of its own",
    "test_random_mask.py": "operators of the CPU engine",
    "test_readme.py": "the README",
    "test_references.py": "NumPy",
    "test_regularizers.py": "operators of the CPU engine",
    "test_threads.py": "the CPU's threads",
    "test_truncation.py": "operators of the CPU engine",
    "test_window.py": "operators of the CPU engine",
}
HERE = Path(__file__).parent
pretended: pretend_device.PretendDevice | None = None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=devices.CHOICES,
        default=os.environ.get("RNN_EXT_TEST_DEVICE", "cpu"),
        help="where the tests run that are not about the CPU (default: RNN_EXT_TEST_DEVICE, cpu)",
    )


def pytest_configure(config: pytest.Config) -> None:
    global pretended
    config.addinivalue_line("markers", "cpu_only(reason): left out on any other device")
    name = config.getoption("device")
    if name == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device=cuda: torch sees no GPU")
    devices.choose(name)
    if name == "pretend":
        pretended = pretend_device.install()
    if name == "cuda":  # a reference for float32 multiplies in float32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("device") == "cpu":
        return
    for item in items:
        marker = item.get_closest_marker("cpu_only")
        top = item.path.relative_to(HERE).parts[0] if item.path.is_relative_to(HERE) else ""
        reason = marker.args[0] if marker else ABOUT_THE_CPU.get(top)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=f"about the CPU: {reason}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What another device left out, and why: nothing is skipped silently."""
    name = terminalreporter.config.getoption("device")
    if name == "cpu" or hasattr(terminalreporter.config, "workerinput"):
        return
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        *_, reason = report.longrepr
        reasons[reason.removeprefix("Skipped: ")] += 1
    ran = sum(len(terminalreporter.stats.get(kind, [])) for kind in ("passed", "failed"))
    terminalreporter.section(f"device {name}: {ran} tests ran, {reasons.total()} did not")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count:6} {reason}")


@pytest.fixture(autouse=True)
def _reproducible() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _on_the_device(request: pytest.FixtureRequest) -> Iterator[None]:
    name = request.config.getoption("device")
    if name == "cpu":
        yield
    elif pretended is not None:
        pretended.default = pretend_device.THERE
        yield
        pretended.default = pretend_device.HERE
    else:
        with torch.device(name):
            yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
