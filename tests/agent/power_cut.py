"""Power cuts in processes of the agent: a server that forks them, and what a cut leaves on the disk.

A process is killed by SIGKILL at a point of one named write (`agent.disk`). A kill alone leaves the kernel's cache as
it was, so what a medium loses is made here: a new file half written, or with its length and zeros, or whole and without
its name; a log of which the last blocks are zeros; a database whose last transaction is half in its log.

The server has imported everything, so that a process costs no more than a fork. Run as
`python -m tests.agent.power_cut`; one request a line, as JSON.
"""

import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

from agent import disk
from agent.disk import Point

LEFT_OVER = ".new-00000000-"  # of another boot than this one
AT = {("before", Point.BEFORE), ("middle", Point.MIDDLE), ("after", Point.AFTER)}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Cut:
    """Cuts the power at one write, the first time it is reached: `how` says where, and what is left."""

    def __init__(self, what, how):
        self.what, self.how = what, how
        self.open = self.log = None

    def __call__(self, what, point, path, data):
        if self.open is not None:
            tear(self.open, self.how)
            die()
        if what.name != self.what:
            return
        if (self.how, point) in AT:
            die()
        if what.name.startswith("STORE_") and self.how == "torn":
            self._database(point, path)
        elif self.how == "half" and point is Point.BEFORE:
            half_a_tree(path)
            die()
        elif self.how in {"torn", "zeros", "unnamed"}:
            self._file(what, point, path, data)

    def _database(self, point, path):
        if point is Point.MIDDLE:
            self.log = read(wal(path))
        elif point is Point.AFTER:
            tear_log(wal(path), self.log)
            die()

    def _file(self, what, point, path, data):
        if what.name == "INSTANCE_LOG":
            if point is Point.AFTER:
                tear(path, self.how, len(data))
                die()
        elif what.name == "READINGS":
            if point is Point.MIDDLE:
                tear(path, self.how, len(data))
                die()
        elif data and point is Point.BEFORE:
            half = data[: len(data) // 2]
            left = {"torn": half, "zeros": half + bytes(len(data) - len(half)), "unnamed": data}
            path.with_name(f"{LEFT_OVER}{self.how}").write_bytes(left[self.how])
            die()
        elif not data and point is not Point.BEFORE:
            self.open = path  # written next, and torn when anything else is


def half_a_tree(path):
    """Remove every second file of a tree, as a removal that was cut short."""
    for each in sorted(each for each in path.rglob("*") if each.is_file())[::2]:
        each.unlink()


def tear(path, how, size=None):
    """Lose the last half of the bytes that were written and not synced."""
    whole = path.read_bytes()
    lost = (len(whole) if size is None else size) // 2
    kept = whole[: len(whole) - lost]
    with path.open("r+b") as file:
        file.truncate()
        file.write(kept + (bytes(lost) if how == "zeros" else b""))
        file.truncate()


def wal(path):
    return path.with_name(f"{path.name}-wal")


def read(path):
    return path.read_bytes() if path.exists() else b""


def tear_log(path, before):
    """Keep the first half of what the last transaction wrote to the database's log."""
    after = path.read_bytes()
    before += bytes(max(0, len(after) - len(before)))
    changed = [place for place in range(len(after)) if after[place] != before[place]]
    middle = (changed[0] + changed[-1]) // 2
    with path.open("r+b") as file:
        file.write(after[:middle] + before[middle : len(after)])


def run(request):
    """Run one request in this process, which is a fork, and end it."""
    code = 1
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    try:
        if request["cut"]:
            disk.reached = Cut(*request["cut"])
        act = getattr(importlib.import_module(request["module"]), request["act"])
        code = act(Path(request["directory"])) or 0
    except BaseException:  # noqa: BLE001 - the log says it, and the exit code
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def main():
    for line in sys.stdin:
        request = json.loads(line)
        importlib.import_module(request["module"])
        pid = os.fork()
        if pid == 0:
            run(request)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps(status), flush=True)


if __name__ == "__main__":
    main()
