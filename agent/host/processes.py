"""Processes of a device's agent and host, with memory, threads, open files and start of each (`fleet-host processes`).

Figures come from /proc alone, so that they can be had while the host is busy or hangs. Forked processes have the
command line of their parent; the name that each gives itself after the fork says which it is (`kernel.set_name`).
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from agent.host.ipc import host_api
from fleet.protocol.bounds import MIB
from fleet.protocol.printable import printable

_PROC: Final = Path("/proc")
_SUPERVISOR: Final = "supervisor"
_AGENT: Final = "agent"
_PROGRAMS: Final = {
    "agent.host.cli": _SUPERVISOR,
    "fleet-host": _SUPERVISOR,
    "agent.cli": _AGENT,
    "fleet-agent": _AGENT,
}
_ZYGOTE: Final = "zygote"
_WORKER: Final = "worker"
_NAMED: Final = frozenset({_ZYGOTE, _WORKER, "shared worker", "router", "egress", "TLS terminator", "key-value store"})
_MODULES: Final = {
    "agent.host.worker.zygote": _ZYGOTE,
    "agent.host.compiler.service": "compiler service",
    "agent.host.compiler": "compiler",
}
_COMPILER_UNIT: Final = ["agent.host.compiler.service", "--serve"]
_START_FIELD: Final = 19
"""Of `/proc/pid/stat`, behind the command's name: ticks from the machine's start to the process's (proc(5))."""

_PPID_FIELD: Final = 1
_NOT_READABLE: Final = "-"


class ProcessFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Figures of a process; None for what this user may not read.

    Attributes:
        process: what it is: agent, supervisor, router, egress, TLS terminator, key-value store, zygote, worker,
            compiler.
        instance: of a worker of one instance: its name, shortened.
        private_bytes: memory that no other process shares.
        shared_bytes: memory that other processes have too.
        proportional_bytes: private memory, and its share of what is shared (PSS).
        resident_bytes: memory of both kinds.
        threads: threads.
        files: open files, sockets and other descriptors.
        started: start, UTC.
    """

    pid: int
    process: str
    instance: str = ""
    private_bytes: int | None = None
    shared_bytes: int | None = None
    proportional_bytes: int | None = None
    resident_bytes: int
    threads: int
    files: int | None = None
    started: datetime


class _Process:
    """Process as /proc shows it. Raises `OSError` where it has ended."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.pid = int(directory.name)
        self.argv = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
        self.name = (directory / "comm").read_text(encoding="utf-8", errors="replace").rstrip("\n")
        self._stat = (directory / "stat").read_text(encoding="utf-8", errors="replace").rpartition(") ")[2].split()

    @property
    def parent(self) -> int:
        return int(self._stat[_PPID_FIELD])

    @property
    def started(self) -> datetime:
        booted_s = next(
            int(line.split()[1]) for line in (_PROC / "stat").read_text("ascii").splitlines() if line[:5] == "btime"
        )
        since_s = int(self._stat[_START_FIELD]) / os.sysconf("SC_CLK_TCK")
        return datetime.fromtimestamp(booted_s + since_s, UTC)

    def program(self) -> tuple[str, Path]:
        """Return what this process was started as, empty for nothing of ours, and its runtime directory."""
        for place, word in enumerate(self.argv[:-1]):
            program = _PROGRAMS.get(Path(word).name, "")
            if program and self.argv[place + 1] == "run":
                return program, self._path(_option("--runtime", self.argv[place:]) or host_api.RUNTIME)
        return "", Path()

    def _path(self, text: str) -> Path:
        place = Path()
        with contextlib.suppress(OSError):
            place = (self.directory / "cwd").readlink()
        return (place / text).resolve()

    def figures(self, process: str, instance: str = "") -> ProcessFigures:
        status = _sizes((self.directory / "status").read_text(encoding="utf-8", errors="replace"))
        rollup: dict[str, int] = {}
        files = None
        with contextlib.suppress(OSError):
            rollup = _sizes((self.directory / "smaps_rollup").read_text(encoding="ascii", errors="replace"))
        with contextlib.suppress(OSError):
            files = sum(1 for _ in (self.directory / "fd").iterdir())
        return ProcessFigures(
            pid=self.pid,
            process=process,
            instance=instance,
            private_bytes=rollup["Private_Clean"] + rollup["Private_Dirty"] if rollup else None,
            shared_bytes=rollup["Shared_Clean"] + rollup["Shared_Dirty"] if rollup else None,
            proportional_bytes=rollup["Pss"] if rollup else None,
            resident_bytes=rollup.get("Rss", status.get("VmRSS", 0)),
            threads=sum(1 for _ in (self.directory / "task").iterdir()),
            files=files,
            started=self.started,
        )


def _option(name: str, argv: Sequence[str]) -> str:
    for place, word in enumerate(argv):
        if word == name and place + 1 < len(argv):
            return argv[place + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return ""


def _sizes(text: str) -> dict[str, int]:
    """Return the lines `Name:  123 kB` of a file, in bytes."""
    lines = (line.split() for line in text.splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in lines if len(words) == 3 and words[2] == "kB"}  # noqa: PLR2004


def _all() -> Iterator[_Process]:
    for directory in _PROC.iterdir():
        if directory.name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):  # the process has just ended
                yield _Process(directory)


def _role(process: _Process, parent: str) -> tuple[str, str]:
    """Return what a process is, given what its parent is, and its instance."""
    name, _, instance = process.name.partition(":")
    if parent == _ZYGOTE:
        return (name, instance) if name in _NAMED else (_WORKER, "")  # not named by itself yet
    for module, role in _MODULES.items():
        if module in process.argv:
            return role, ""
    return name if name in _NAMED else process.program()[0] or process.name, ""


def read(runtime: Path) -> list[ProcessFigures]:
    """Return the processes of the agent and the host with this runtime directory, parents before children."""
    processes = {process.pid: process for process in _all()}
    children: dict[int, list[_Process]] = {}
    for process in processes.values():
        children.setdefault(process.parent, []).append(process)
    ours = {(_AGENT, runtime.resolve()), (_SUPERVISOR, runtime.resolve())}
    roots = {
        process.pid
        for process in processes.values()
        if process.program() in ours or process.argv[-2:] == _COMPILER_UNIT
    }
    found: list[ProcessFigures] = []

    def add(process: _Process, parent: str) -> None:
        role, instance = _role(process, parent)
        with contextlib.suppress(OSError):  # the process has just ended
            found.append(process.figures(role, instance))
        for child in sorted(children.get(process.pid, []), key=lambda each: each.pid):
            add(child, role)

    for pid in sorted(roots):
        if processes[pid].parent not in roots:
            add(processes[pid], "")
    return found


_HEADS: Final = ("PID", "PROCESS", "INSTANCE", "PRIVATE", "SHARED", "PSS", "RESIDENT", "THREADS", "FILES", "STARTED")
_LEFT: Final = frozenset({"PROCESS", "INSTANCE", "STARTED"})


def table(found: Sequence[ProcessFigures]) -> list[str]:
    """Format processes for people, in MB, with a line of sums."""
    rows: list[tuple[str, ...]] = [_HEADS]
    for each in found:
        memory = (each.private_bytes, each.shared_bytes, each.proportional_bytes, each.resident_bytes)
        rows.append(
            (
                str(each.pid),
                printable(each.process),
                printable(each.instance),
                *map(_megabytes, memory),
                str(each.threads),
                _NOT_READABLE if each.files is None else str(each.files),
                each.started.strftime("%Y-%m-%d %H:%M:%S"),
            )
        )
    private, pss = (_sum(each.private_bytes for each in found), _sum(each.proportional_bytes for each in found))
    threads, files = sum(each.threads for each in found), _sum(each.files for each in found)
    unknown = _NOT_READABLE if files is None else str(files)
    rows.append(("", "all", "", _megabytes(private), "", _megabytes(pss), "", str(threads), unknown, ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [
            cell.ljust(width) if head in _LEFT else cell.rjust(width)
            for head, cell, width in zip(_HEADS, row, widths, strict=True)
        ]
        for row in rows
    ]
    return ["  ".join(row).rstrip() for row in aligned]


def _megabytes(size: int | None) -> str:
    return _NOT_READABLE if size is None else f"{size / MIB:.1f}"


def _sum(figures: Iterable[int | None]) -> int | None:
    """Return the sum; None where one is not known, since the rest would look like everything."""
    total = 0
    for figure in figures:
        if figure is None:
            return None
        total += figure
    return total
