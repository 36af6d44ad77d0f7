"""Run PyTorch's own test files (test_nn.py, test_modules.py) with our classes in place of torch's.

    python tests/pytorch_suite/run.py /path/to/pytorch/test/test_nn.py [MORE_FILES]

The files are not shipped with torch: take those of the installed version. Of every file the tests
run whose name or text speaks of RNN, LSTM, GRU or their cells, once on torch's classes and once on
ours, each in a process of its own. Prints how each test ended on both; the exit status is 1 if a
test that passes on torch's classes does not pass on ours, or if none passes.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import unittest
from collections import Counter
from pathlib import Path

CLASSES = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
LIBRARIES = ("torch.nn", "rnn_ext")
NAME = re.compile(r"rnn|lstm|gru(?!mb)", re.IGNORECASE)
BODY = re.compile(r"\bnn\.(RNN|LSTM|GRU)(Cell)?\b")


def concerned(text: str) -> list[str]:
    """Names of the test functions in a file's text whose name or body is about these classes."""
    functions = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    lines = text.splitlines()
    return [
        f.name
        for f in functions
        if NAME.search(f.name) or BODY.search("\n".join(lines[f.lineno - 1 : f.end_lineno]))
    ]


class Recorder(unittest.TestResult):
    """How every test ended, and why if it did not pass."""

    def __init__(self) -> None:
        super().__init__()
        self.ended: dict[str, tuple[str, str]] = {}

    def _note(self, test: unittest.TestCase, outcome: str, reason: str = "") -> None:
        self.ended.setdefault(test.id().partition(".")[2], (outcome, reason))

    def addSuccess(self, test: unittest.TestCase) -> None:
        self._note(test, "passes")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._note(test, "skipped", reason)

    def addFailure(self, test: unittest.TestCase, err: tuple) -> None:
        self._note(test, "fails", f"{err[0].__name__}: {err[1]}")

    addError = addFailure

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, err: tuple) -> None:
        if err is not None:
            self.addFailure(test, err)

    def addExpectedFailure(self, test: unittest.TestCase, err: tuple) -> None:
        self._note(test, "passes")

    def addUnexpectedSuccess(self, test: unittest.TestCase) -> None:
        self._note(test, "fails", "passes where the file expects a failure")


def put_ours_in_place() -> None:
    import torch.nn.modules.rnn

    import rnn_ext

    for name in CLASSES:
        for namespace in (torch.nn, torch.nn.modules):
            setattr(namespace, name, getattr(rnn_ext, name))


def run_file(path: Path, library: str) -> dict[str, tuple[str, str]]:
    if library == "rnn_ext":
        put_ours_in_place()
    sys.path.insert(0, str(path.parent))
    sys.argv = [str(path)]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)

    functions = concerned(path.read_text())

    def wanted(name: str) -> bool:
        # What is made of a function for devices, dtypes and modules has its name in front.
        made = any(name == f or name.startswith(f + "_") for f in functions)
        return made or NAME.search(name) is not None

    suite = unittest.TestSuite()
    for cls in vars(module).values():
        if isinstance(cls, type) and issubclass(cls, unittest.TestCase):
            names = unittest.defaultTestLoader.getTestCaseNames(cls)
            suite.addTests(cls(name) for name in names if wanted(name))
    recorder = Recorder()
    suite.run(recorder)
    return recorder.ended


def run_in_a_process(path: Path, library: str) -> dict[str, tuple[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        command = [sys.executable, __file__, str(path), "--library", library, "--json", results]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return {name: tuple(end) for name, end in json.loads(results.read_text()).items()}


def compare(path: Path) -> bool:
    """Print both sides' results; true if ours is as good."""
    theirs, ours = (run_in_a_process(path, library) for library in LIBRARIES)
    absent = ("absent", "")
    names = sorted(theirs.keys() | ours.keys())
    ends = {name: (theirs.get(name, absent), ours.get(name, absent)) for name in names}
    print(f"\n{path}\n")
    print(f"| test | {' | '.join(LIBRARIES)} | |\n| --- | --- | --- | --- |")
    for name, (their, our) in ends.items():
        reason = " ".join((our[1] or their[1]).split())[:200].replace("|", "\\|")
        print(f"| {name} | {their[0]} | {our[0]} | {reason} |")
    worse = [n for n, (their, our) in ends.items() if their[0] == "passes" and our[0] != "passes"]
    passed = Counter(our[0] for _, our in ends.values())["passes"]
    print(f"\n{len(names)} tests, {passed} pass on rnn_ext, {len(worse)} on torch.nn only")
    return not worse and passed > 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--library", choices=LIBRARIES, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    files = [file.resolve() for file in arguments.files]
    if arguments.library:
        arguments.json.write_text(json.dumps(run_file(files[0], arguments.library)))
        return 0
    return 0 if all([compare(file) for file in files]) else 1


if __name__ == "__main__":
    sys.exit(main())
