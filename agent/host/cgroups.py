"""A share of memory and processes for each instance, where systemd gives this host control groups of its own.

Only cgroup v2, and only a part of the tree that was delegated to this host alone (`Delegate=` in its unit): the
supervisor moves into a leaf of its own first, since groups with members cannot have limited children. On top of the
limits that each lane has: it bounds what an instance's lanes take together, kernel memory and page cache included.
"""

import contextlib
import os
from pathlib import Path
from typing import Final

_MOUNT: Final = Path("/sys/fs/cgroup")
_WANTED: Final = ("memory", "pids")
_OWN: Final = "supervisor"
_THREADS_A_LANE: Final = 32


class Cgroups:
    """The host's part of the tree; `available` False where there is none, and then nothing is done."""

    def __init__(self, root: Path | None = None, *, pid: int | None = None) -> None:
        """Take the host's own group (or `root`) over; `pid` is the supervisor's."""
        self.available = False
        self._root = root if root is not None else _own_group()
        if self._root is None:
            return
        try:
            self.available = self._take(self._root, os.getpid() if pid is None else pid)
        except OSError:
            self.available = False

    @staticmethod
    def _take(root: Path, pid: int) -> bool:
        there = (root / "cgroup.controllers").read_text(encoding="ascii").split()
        if any(name not in there for name in _WANTED):
            return False
        leaf = root / _OWN
        leaf.mkdir(exist_ok=True)
        _write(leaf / "cgroup.procs", str(pid))
        try:
            _write(root / "cgroup.subtree_control", " ".join(f"+{name}" for name in _WANTED))
        except OSError:  # others live in this group: it was not delegated to this host alone
            _write(root / "cgroup.procs", str(pid))
            with contextlib.suppress(OSError):
                leaf.rmdir()
            return False
        return True

    def admit(self, instance: str, pid: int, *, lanes: int, lane_bytes: int) -> bool:
        """Put a lane into its instance's group, which may have `lanes` of `lane_bytes` each; whether that worked."""
        if not self.available or self._root is None:
            return False
        group = self._root / f"i-{instance}"
        try:
            group.mkdir(exist_ok=True)
            _write(group / "memory.max", str(lanes * lane_bytes))
            with contextlib.suppress(OSError):  # a kernel without swap accounting
                _write(group / "memory.swap.max", "0")
            _write(group / "pids.max", str(lanes * _THREADS_A_LANE))
            _write(group / "cgroup.procs", str(pid))
        except OSError:
            return False
        return True

    def dismiss(self, instance: str) -> None:
        """Remove an instance's group, if it is empty."""
        if self.available and self._root is not None:
            with contextlib.suppress(OSError):
                (self._root / f"i-{instance}").rmdir()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="ascii")


def _own_group() -> Path | None:
    """This process's own cgroup v2, if it is not the root of the tree."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines():
            if line.startswith("0::/") and line != "0::/":
                group = _MOUNT / line.removeprefix("0::/")
                if os.access(group / "cgroup.subtree_control", os.W_OK):
                    return group
    return None
