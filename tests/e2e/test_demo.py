"""`fleet demo` as a person runs it: all of it holds, Ctrl-C ends it at any time, and no process is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


class Demo:
    """A demo on its way, and every line that it has printed."""

    def __init__(self, *arguments: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-P", "-m", "fleet.cli.main", "demo", *arguments]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
        )
        self.lines: list[str] = []

    def until(self, words: str) -> str:
        """Read on up to a line with these words, and return it."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if words in line:
                return line
        raise AssertionError(f"it ended without {words!r}:\n" + "\n".join(self.lines))

    def end(self) -> int:
        """Read on up to its end; the exit code."""
        assert self.process.stdout is not None
        self.lines += [line.rstrip("\n") for line in self.process.stdout]
        return self.process.wait()


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[Demo]:
    demo = Demo(*arguments)
    try:
        yield demo
    finally:
        if demo.process.poll() is None:
            demo.process.kill()
        demo.process.wait()
        assert demo.process.stdout is not None
        demo.process.stdout.close()


def started_at(pid: int) -> str | None:
    """When a process started, in clock ticks: with its id that names it for good. None when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


def family(pid: int) -> dict[int, str]:
    """Every process below one, with the time it started."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                parents.setdefault(int(fields[1]), []).append(int(entry.name))
    found, todo = {}, [pid]
    while todo:
        for child in parents.get(todo.pop(), []):
            if (when := started_at(child)) is not None:
                found[child] = when
                todo.append(child)
    return found


def left(known: dict[int, str]) -> list[str]:
    """Those of the processes that still run, by their command lines."""
    return [
        Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
        for pid, when in known.items()
        if started_at(pid) == when
    ]


def test_the_whole_main_job_then_it_stays_up_and_ctrl_c_leaves_nothing(tmp_path):
    with running("--directory", str(tmp_path / "demo")) as demo:
        demo.until("The fleet stays up until Ctrl-C")
        curl = demo.until("curl ").split()[-1]
        with urllib.request.urlopen(curl, timeout=10) as answer:
            assert answer.read() == b"hello from v1\n"
        known = family(demo.process.pid)
        # a server, and three devices of an agent and a host with its zygote and lanes
        assert len(known) > 7
        demo.process.send_signal(signal.SIGINT)
        assert demo.end() == 0, "\n".join(demo.lines)
    assert left(known) == []
    text = "\n".join(demo.lines)
    # every claim of the demo, and what a person sees of it
    claims = [line for line in demo.lines if line.startswith(("  yes ", "  NO  "))]
    assert len(claims) == 10
    assert all(claim.startswith("  yes ") for claim in claims), text
    acts = {line.split()[0]: line for line in demo.lines if line.startswith(("  v1 ", "  v2 ", "  v3 ", "  undo "))}
    assert acts["v2"].split()[-1] == acts["undo"].split()[-1] == "0"
    assert "rolled back (trapped), reverted before the 2nd device" in acts["v3"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_can_be_ended_in_the_middle(how, tmp_path):
    with running("--once", "--directory", str(tmp_path / "demo")) as demo:
        demo.until("Three devices")
        demo.until("fleet-agent enroll")
        known = family(demo.process.pid)
        demo.process.send_signal(how)
        assert demo.end() == 130
    assert left(known) == []


def test_a_demo_that_is_killed_takes_its_processes_with_it(tmp_path):
    with running("--once", "--directory", str(tmp_path / "demo")) as demo:
        demo.until("Three devices")
        demo.until("fleet-agent enroll")
        known = family(demo.process.pid)
        ends = {pid: os.pidfd_open(pid) for pid in known if started_at(pid) is not None}
        demo.process.kill()
    try:
        for pid, end in ends.items():
            # the kernel told its children to end; theirs end with them
            import select

            assert select.select([end], [], [], 30)[0], f"{pid} is still there: {left(known)}"
    finally:
        for end in ends.values():
            os.close(end)
