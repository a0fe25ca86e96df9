"""Read the processes of a running host from /proc: descendants, workers, whether a process has ended."""

import select
from pathlib import Path


def children(pid):
    """Every descendant of a process, with its command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        found.setdefault(int(text.rpartition(")")[2].split()[1]), []).append((int(path.parent.name), command))
    todo, out = [pid], {}
    while todo:
        for child, command in found.get(todo.pop(), []):
            out[child] = command
            todo.append(child)
    return out


def ended(pidfds, timeout_s=20):
    """Whether all of these processes end, waiting for each."""
    for pidfd in pidfds:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            return False
    return True


def lanes_of(host):
    """The pids of workers: children of a zygote."""
    all_of_them = children(host.process.pid)
    zygotes = [pid for pid, command in all_of_them.items() if b"agent.host.worker.zygote" in command]
    return [pid for zygote in zygotes for pid in children(zygote)]


def forks(host):
    """The host's forks, as router and egress: processes with its own command line, which zygotes do not have."""
    everyone = children(host.process.pid)
    own = Path(f"/proc/{host.process.pid}/cmdline").read_bytes()
    return {pid for pid, command in everyone.items() if command == own}
