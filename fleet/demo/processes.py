"""The demo's children: started in groups of their own, with a log each, and all of them gone afterwards.

Three nets, since a demo that leaves processes behind is worse than none. A child is told to end when this process dies
(PR_SET_PDEATHSIG). It leads a process group, so that its own children can be ended with it. And this
process is made the reaper of orphans (PR_SET_CHILD_SUBREAPER), so that a grandchild whose parent died is still
found below us, and ended, however it regrouped itself.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_GRACE_S: Final = 10.0
_libc: Final = ctypes.CDLL(None, use_errno=True)


class ChildDiedError(Exception):
    """A process that should run has ended; the message has its exit code and last lines."""


@dataclass(frozen=True, slots=True)
class Child:
    """A process that runs until it is stopped, and how it was started."""

    name: str
    command: tuple[str, ...]
    process: asyncio.subprocess.Process
    log: Path

    def check(self) -> None:
        """Raise `ChildDiedError` if it has ended."""
        if self.process.returncode is not None:
            raise ChildDiedError(
                f"{self.name} ended with exit code {self.process.returncode}; the end of {self.log}:\n{tail(self.log)}"
            )


class Processes:
    """Starts processes and answers for them.

    Args:
        logs: directory for one log file a process.
        environment: of every child.
    """

    def __init__(self, *, logs: Path, environment: Mapping[str, str]) -> None:
        self._logs = logs
        self._environment = dict(environment)
        self._children: list[Child] = []
        self._known = set(_children_of(os.getpid()))
        logs.mkdir(parents=True, exist_ok=True)
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)

    async def start(self, name: str, command: Sequence[str]) -> Child:
        """Start a process that is to run until `stop_all`; its output goes to `<name>.log`."""
        log = self._logs / f"{name}.log"
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environment,
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),
            )
        child = Child(name, tuple(command), process, log)
        self._children.append(child)
        return child

    async def run(
        self, command: Sequence[str], *, stdin: bytes | None = None, show: bool = False
    ) -> tuple[int, str, str]:
        """Run a process to its end: exit code, standard output, standard error.

        Args:
            command: what to run.
            stdin: what it reads.
            show: let it write to this process's own output instead (both texts are empty then).
        """
        pipe = None if show else asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=pipe,
            stderr=pipe,
            env=self._environment,
            start_new_session=True,
            preexec_fn=_die_with(os.getpid()),
        )
        try:
            out, err = await process.communicate(stdin)
        except asyncio.CancelledError:
            await _end(process)
            raise
        assert process.returncode is not None
        return process.returncode, (out or b"").decode(errors="replace"), (err or b"").decode(errors="replace")

    async def stop_all(self) -> None:
        """End every child, the last one started first, then whatever any of them left."""
        for child in reversed(self._children):
            await _end(child.process)
        self._children.clear()
        while strays := [pid for pid in _children_of(os.getpid()) if pid not in self._known]:
            for pid in strays:
                _kill_and_reap(pid)


async def _end(process: asyncio.subprocess.Process) -> None:
    """SIGTERM, time to end in order, SIGKILL for the whole group."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _GRACE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def _kill_and_reap(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)


def _children_of(pid: int) -> list[int]:
    """Direct children, of every thread."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(word) for word in (task / "children").read_text().split()]
    return found


def _die_with(parent: int) -> Callable[[], None]:
    """For the child, between fork and exec: end when `parent` ends, also when it already has."""

    def prepare() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return prepare


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, indented."""
    try:
        text = log.read_text(errors="replace").splitlines()[-lines:]
    except OSError as error:
        return f"  (cannot be read: {error.strerror})"
    return "\n".join(f"  {line}" for line in text) or "  (empty)"


def python_environment(**more: str) -> dict[str, str]:
    """This process's environment, in which a child imports the same packages as this process did."""
    own = str(Path(__file__).resolve().parents[2])
    rest = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in (own, rest) if part), **more}


def module(name: str, *arguments: str) -> list[str]:
    """The command line that runs one of this project's command modules with this Python."""
    return [sys.executable, "-P", "-m", name, *arguments]
