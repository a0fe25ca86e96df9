"""Whatever the demo starts is gone afterwards: checked by process id."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fleet.demo.environment import ChildDiedError, Processes, python_environment
from tests.eventually import eventually_async

ROOT = Path(__file__).resolve().parents[3]
# A child that makes a grandchild in a session of its own, says its id, and then sleeps.
FAMILY = (
    "import subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True)\n"
    "print(child.pid, flush=True)\n"
    "time.sleep(600)\n"
)
STUBBORN = (
    "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up', flush=True)\ntime.sleep(600)\n"
)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


async def first_line(log: Path) -> str:
    def line() -> str:
        text = log.read_text()
        return text.splitlines()[0] if "\n" in text else ""

    return await eventually_async(line, f"a line in {log.name}")


@pytest.mark.asyncio
async def test_children_and_their_children_are_gone(tmp_path):
    async def go() -> list[int]:
        processes = Processes(logs=tmp_path, environment=python_environment())
        child = await processes.start("family", [sys.executable, "-c", FAMILY])
        grandchild = int(await first_line(child.log))
        pids = [child.process.pid, grandchild]
        assert all(alive(pid) for pid in pids)
        await processes.stop_all()
        return pids

    assert not [pid for pid in await go() if alive(pid)]


@pytest.mark.asyncio
async def test_a_child_that_ignores_sigterm_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("fleet.demo.environment._GRACE_S", 0.1)

    async def go() -> int:
        processes = Processes(logs=tmp_path, environment=python_environment())
        child = await processes.start("stubborn", [sys.executable, "-c", STUBBORN])
        await first_line(child.log)
        await processes.stop_all()
        return child.process.pid

    assert not alive(await go())


def test_children_end_with_a_parent_that_is_killed(tmp_path):
    # SIGKILL gives the demo no chance to clean up: the kernel tells the child.
    script = (
        "import asyncio, pathlib, sys\n"
        "from fleet.demo.environment import Processes, python_environment\n"
        "async def go():\n"
        f"    processes = Processes(logs=pathlib.Path({str(tmp_path)!r}), environment=python_environment())\n"
        "    child = await processes.start('sleeper', [sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "    print(child.process.pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(go())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=ROOT)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    waiting = os.pidfd_open(child)
    parent.kill()
    parent.wait()
    try:
        # readable when the process has ended
        import select

        assert select.select([waiting], [], [], 20)[0]
    finally:
        os.close(waiting)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        parent.stdout.close()


@pytest.mark.asyncio
async def test_a_child_that_died_is_reported_with_its_last_words(tmp_path):
    async def go() -> None:
        processes = Processes(logs=tmp_path, environment=python_environment())
        child = await processes.start("broken", [sys.executable, "-c", "print('no such device'); raise SystemExit(3)"])
        await child.process.wait()
        try:
            child.check()
        finally:
            await processes.stop_all()

    with pytest.raises(ChildDiedError, match=r"broken ended with exit code 3(?s:.*)no such device"):
        await go()


@pytest.mark.asyncio
async def test_a_command_is_run_to_its_end_with_what_it_reads(tmp_path):
    async def go() -> tuple[int, str, str]:
        processes = Processes(logs=tmp_path, environment=python_environment())
        script = "import sys; print(sys.stdin.read().upper()); sys.exit('why')"
        return await processes.run([sys.executable, "-c", script], stdin=b"token")

    assert await go() == (1, "TOKEN\n", "why\n")
