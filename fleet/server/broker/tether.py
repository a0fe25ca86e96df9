"""Run a program that ends with its parent: `python -m fleet.server.broker.tether PARENT PROGRAM ARGS...`.

The kernel sends SIGTERM when the parent dies (`prctl(PR_SET_PDEATHSIG)`, kept over exec), so that a server that was
killed leaves no broker behind.
"""

import ctypes
import os
import signal
import sys
from typing import Final

_PR_SET_PDEATHSIG: Final = 1


def die_with(parent: int) -> None:
    """Receive SIGTERM when the process `parent` dies; exit at once if it has died already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        sys.exit(1)


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606 - that is its purpose; arguments are a list
