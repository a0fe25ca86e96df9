"""The cell around every process that runs or reads what strangers made: what it may still do once it is inside.

Layers are independent; each is put up where the kernel and the host's own rights allow, and reported. Whoever enters
has imported everything it needs: afterwards not even an `import` works.
"""

import contextlib
import ctypes
import os
import resource
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fleet.protocol.caps import MIB

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_SLACK_BYTES: Final = 48 * MIB
_VALUE_BYTES: Final = 100  # what one byte of a body costs while it crosses: a value of 32 bytes, and its copies

_libc = ctypes.CDLL(None, use_errno=True)


class CellError(Exception):
    """A layer that must hold cannot be put up."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a lane's cell leaves it.

    Attributes:
        uid: what to become, None to stay.
        memory_bytes: linear memory of the guest.
        body_bytes: the largest request and answer together.
        data_fd: its data directory, None for none.
        files: whether it may open files (in its data directory).
    """

    instance: str
    uid: int | None
    memory_bytes: int
    body_bytes: int
    data_fd: int | None
    files: bool


def die_with_parent(parent: int) -> None:
    """Be killed when the parent process ends, which must be `parent`; else end now."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def memory_figures() -> int | None:
    """A descriptor by which another process can read this one's memory figures; None without /proc."""
    try:
        return os.open("/proc/self/smaps_rollup", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _limits(plan: Plan) -> bool:
    used = 0
    try:
        with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123 - nothing to import any more
            for line in status:
                if line.startswith("VmData:"):
                    used = int(line.split()[1]) * 1024
    except OSError:
        return False
    most = used + plan.memory_bytes + plan.body_bytes * _VALUE_BYTES + _SLACK_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    return True


def enter(plan: Plan) -> dict[str, bool]:
    """Put up every layer that can be; layer -> whether it holds.

    Raises:
        CellError: a layer failed halfway.
    """
    layers = {"limits": _limits(plan)}
    layers["no-new-privs"] = _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    return layers


def close_all_but(keep: set[int]) -> None:
    """Close every descriptor that is not named."""
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir()]:
        if fd not in keep:
            with contextlib.suppress(OSError):
                os.close(fd)


def enter_router(directory: Path) -> str:
    """Put up the router's layers; the directory with the instances' sockets as it sees it."""
    _libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return str(directory)
