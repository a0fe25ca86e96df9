"""What the boards took: each stage beside its budget, and the figures of docs/boards.md, printed when all is done.

Boards are tested two at a time, each in a worker process of pytest's: what they note lies in files of one directory,
and the process that started them prints it.
"""

import contextlib
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

DIRECTORY = "WASMFLEET_BOARD_NOTES"  # in the environment, for the workers
BEGAN = "WASMFLEET_BOARDS_BEGAN"  # by the monotonic clock
ARCHITECTURES = ("arm64", "riscv64")
ALL_S = 1800.0  # beside the roots and kernels that are made before, once: ten minutes from nothing

# Parameters of the fixture `architecture`. The code on both is the same, and a test takes the same time again.
ON_BOTH = list(ARCHITECTURES)
RISCV64_NIGHTLY = ["arm64", pytest.param("riscv64", marks=pytest.mark.nightly)]
ARM64_NIGHTLY = [pytest.param("arm64", marks=pytest.mark.nightly), "riscv64"]


def rows(what: Sequence[object], *, each_change: Sequence[tuple[str, object]]) -> list[object]:
    """Make parameters of each architecture with each of `what`: nightly ones, but for those named."""
    pairs = [(architecture, each) for architecture in ARCHITECTURES for each in what]
    return [pytest.param(*pair, marks=() if pair in each_change else pytest.mark.nightly) for pair in pairs]


@contextlib.contextmanager
def budget(name: str, seconds: float) -> Iterator[None]:
    """Note how long a stage took, beside what it may take on two idle cores."""
    started = time.monotonic()
    outcome = "failed"
    try:
        yield
        outcome = ""
    finally:
        took = time.monotonic() - started
        sys.stderr.write(f"=== {name}: {took:.0f} s of {seconds:.0f} s {outcome}\n")
        sys.stderr.flush()
        _note("stages", name, f"{took:.0f}", f"{seconds:.0f}", outcome)


def figure(architecture: str, name: str, value: str) -> None:
    """Note a figure of the table in docs/boards.md."""
    _note("figures", architecture, name, value)


def _note(kind: str, *fields: str) -> None:
    directory = os.environ.get(DIRECTORY)
    if directory:
        # one short line in one write: lines of two workers do not mix
        with (Path(directory) / kind).open("ab", buffering=0) as file:
            file.write(("\t".join(fields) + "\n").encode())


def _notes(kind: str) -> list[list[str]]:
    path = Path(os.environ[DIRECTORY]) / kind
    return [line.split("\t") for line in path.read_text().splitlines()] if path.exists() else []


def stage_table() -> list[str]:
    """The stages in the order in which they ended, and all of it at last, as lines."""
    whole = time.monotonic() - float(os.environ[BEGAN])
    rows = _notes("stages")
    rows += [["all boards, two at a time", f"{whole:.0f}", f"{ALL_S:.0f}", ""]] if rows else []
    return [
        f"{name:<58} {took:>5} s of {most:>4} s  {outcome or ('late' if float(took) > float(most) else '')}".rstrip()
        for name, took, most, outcome in rows
    ]


def figure_table() -> list[str]:
    """The figures, as the table that docs/boards.md keeps."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for architecture, name, value in _notes("figures"):
        found[name][architecture] = value
    head = ["| figure | arm64 | riscv64 |", "|---|---|---|"]
    rows = [f"| {name} | {' | '.join(each.get(one, '-') for one in ARCHITECTURES)} |" for name, each in found.items()]
    return head + rows if rows else []
