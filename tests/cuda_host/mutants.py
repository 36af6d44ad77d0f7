"""Deletes or weakens, one at a time, everything that orders memory in the persistent kernels, and
runs the drawn layers on the host executor: each mutant has to be noticed.

    python tests/cuda_host/mutants.py BUILD [--draws N] [--only N,...]

BUILD is a configured and built engine-only build folder (cmake -DRNN_EXT_ENGINE_ONLY=ON). Exit
status 1 if a mutant passes. Prints a table in Markdown: what was changed, what noticed it first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FILES = tuple(
    f"csrc/cuda/{name}.h" for name in ("persistent", "persistent_block", "products", "portable")
)
# What is recompiled and run, one type after the other; the objects of other types are taken as
# built.
TYPES = {
    "float": ("persistent_f32", "cluster_f32"),
    "BFloat16": ("persistent_bf16", "cluster_bf16"),
}

DELETED = re.compile(
    r"\b(?:block_barrier|warp_barrier|cluster_arrive|cluster_wait|copy_async_commit|copy_async_wait<\d+>"
    r"|[\w.]+\.arrive|[\w.]+\.wait)\([^;{}]*\);"
)
WEAKENED = {
    # What is between the parentheses of a relaxed access, which kernels have no name for.
    r"add_release\((counter[^;]*)\);": r"host::atomic_add(\1, false);",
    r"load_acquire\(counter\)": "host::atomic_load(counter, false)",
    r"cluster_arrive\(\);": "host::cluster_arrive(false);",
    # Looks once instead of waiting.
    r"while \((?=\(\(load_acquire)": "if (",
}


class Mutant:
    def __init__(self, file: str, line: int, change: str, text: str):
        self.file, self.line, self.change, self.text = file, line, change, text


def mutants() -> list[Mutant]:
    found = []
    for file in FILES:
        text = (ROOT / file).read_text()
        code = re.sub(r"//[^\n]*", lambda m: " " * len(m[0]), text)  # the same offsets
        changes = [(m, "{}", f"`{m[0]}` deleted") for m in DELETED.finditer(code)]
        for pattern, instead in WEAKENED.items():
            changes += [
                (m, m.expand(instead), f"`{m[0].strip()}` is `{m.expand(instead).strip()}`")
                for m in re.finditer(pattern, code)
            ]
        for m, instead, change in sorted(changes, key=lambda c: c[0].start()):
            line = text.count("\n", 0, m.start()) + 1
            found.append(Mutant(file, line, change, text[: m.start()] + instead + text[m.end() :]))
    return found


def commands(build: Path) -> tuple[dict[str, list[str]], list[str]]:
    """How the build compiles the engine for each type, and links the test."""
    compile_of = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        name = re.search(r"RNN_EXT_CUDA_TYPE=(\w+)", entry["command"])
        if name and name[1] in TYPES:
            compile_of[name[1]] = shlex.split(entry["command"])
    ninja = subprocess.run(
        ["ninja", "-C", str(build), "-t", "commands", "-s", "test_drawn_layers"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    link = next(line for line in ninja.splitlines() if " -o test_drawn_layers" in line)
    return compile_of, shlex.split(link.replace(": && ", "").replace(" && :", ""))


def replaced(command: list[str], old: str, new: str) -> list[str]:
    return [part.replace(old, new) for part in command]


def noticed(mutant: Mutant | None, build: Path, draws: int) -> str:
    """What noticed the mutant, empty if nothing did."""
    compile_of, link = commands(build)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "csrc", copy / "csrc")
        if mutant:
            (copy / mutant.file).write_text(mutant.text)
        for name, command in compile_of.items():
            command = replaced(command, f"{ROOT}/csrc", f"{copy}/csrc")
            command = replaced(
                command, f"-ffile-prefix-map={ROOT}/=", f"-ffile-prefix-map={copy}/="
            )
            command = [part for part in command if part != "-Werror"]
            output = copy / f"{name}.o"
            command[command.index("-o") + 1] = str(output)
            subprocess.run(command, check=True, cwd=build)
            # The mutated object comes before the library that holds the others.
            program = copy / "test_drawn_layers"
            at = link.index("-o")
            linked = [*link[: at + 1], str(program), str(output), *link[at + 2 :]]
            subprocess.run(linked, check=True, cwd=build)
            for test in TYPES[name]:
                run = subprocess.run(
                    [str(program), test], capture_output=True, text=True, timeout=300,
                    env={**os.environ, "RNN_EXT_DRAWS": str(draws)}, errors="replace",
                )  # fmt: skip
                if run.returncode:
                    reports = re.findall(r'report\.text == "": (.*) != \n', run.stderr)
                    lines = reports or run.stderr.strip().splitlines() or [str(run.returncode)]
                    return f"{test}: {re.split(' at csrc| at /', lines[0])[0]}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("build", type=Path)
    parser.add_argument("--draws", type=int, default=3, help="layers for each cell and type")
    parser.add_argument("--only", default="", help="numbers of mutants")
    parser.add_argument("--list", action="store_true", help="only list them")
    arguments = parser.parse_args()
    all_of_them = mutants()
    if arguments.list:
        for number, mutant in enumerate(all_of_them):
            print(f"{number}: {mutant.file}:{mutant.line} {mutant.change}")
        return 0
    build = arguments.build.resolve()
    if not arguments.only:
        found = noticed(None, build, arguments.draws)
        if found:
            print(f"The kernels as they are do not pass: {found}", file=sys.stderr)
            return 1
    survivors = 0
    print("| mutant | noticed by |\n| --- | --- |")
    for number, mutant in enumerate(all_of_them):
        if arguments.only and str(number) not in arguments.only.split(","):
            continue
        found = noticed(mutant, build, arguments.draws)
        survivors += not found
        where = f"{Path(mutant.file).name}:{mutant.line}"
        print(f"| {where} {mutant.change} | {found or '**nothing**'} |", flush=True)
    print(f"\n{survivors} of {len(all_of_them)} mutants went unnoticed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
