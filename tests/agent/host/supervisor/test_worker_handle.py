"""Supervisor's handle of a compromised worker: limits on everything that it sends."""

import asyncio
import contextlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from agent.host.ipc import framing, stats_page, worker_api
from agent.host.supervisor.worker_handle import WorkerProcess


class Heard:
    """Keeps what a worker reports."""

    def __init__(self):
        self.messages = []

    def worker_message(self, _worker, message):
        self.messages.append(message)

    def worker_exited(self, _worker, _uptime_s):
        pass


async def as_a_worker(speak):
    """Play a worker before the supervisor's handle of it: (the handle, what it passed on).

    `speak(socket)` says what it likes; behind the handle is a process that waits to be ended.
    """
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])  # noqa: ASYNC220 - a plain child
    heard = Heard()

    ours, theirs = framing.socket_pair()
    worker = WorkerProcess("web/1", ours)
    worker.pid, worker.pidfd = process.pid, os.pidfd_open(process.pid)
    slot = worker.only_slot("web/1", heard)
    with theirs:
        await asyncio.to_thread(speak, theirs)
    await slot.control.closed.wait()
    process.kill()
    worker.has_ended(process.wait())
    return slot, heard.messages


@pytest.mark.asyncio
async def test_a_worker_that_sends_too_many_messages_is_killed():
    def flood(sock):
        with contextlib.suppress(framing.GoneError):
            for number in range(20_000):
                worker_api.send(sock, worker_api.Fault(message=f"fault {number}"))

    slot, heard = await as_a_worker(flood)
    assert "more messages than any worker" in slot.describe_end()
    # What it may say, and what it earned while it was read.
    assert len(heard) < 10_000
    slot.close()


def open_here():
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.asyncio
async def test_unexpected_descriptors_are_closed():
    def send_many(sock):
        read, write = os.pipe()
        for _ in range(100):
            worker_api.send(sock, worker_api.Ready(kinds=(), layers={}), read)
        os.close(read)
        os.close(write)

    before = open_here()
    slot, _ = await as_a_worker(send_many)
    slot.close()
    assert open_here() <= before + 1


def test_impossible_figures_are_limited():
    fd = stats_page.create_page("bad")
    os.pwrite(fd, b"\xff" * stats_page.SIZE, 0)
    figures = stats_page.StatsPage(fd).read()
    os.close(fd)
    for value in (figures.errors, figures.denials, figures.cpu_ns, *figures.calls.values()):
        assert struct.pack("=q", 64 * value), "the sum over as many workers as there may be fits into what stores keep"
