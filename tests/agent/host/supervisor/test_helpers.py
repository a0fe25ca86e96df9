"""Helper processes are replaced, also where the device cannot fork at first."""

import asyncio
import errno
import mmap
import os
import socket
from types import SimpleNamespace

import pytest

from agent.host.ipc import framing, stats_page
from agent.host.supervisor import helpers, worker_handle
from fleet.protocol.manifest import Limits


class ShortLived(helpers.HelperProcess):
    """Ends at once, three times; the second time, no process can be forked."""

    def __init__(self):
        super().__init__("helper")
        self.tries = 0
        self.third = asyncio.Event()
        self._fork()

    def _spawn(self):
        self.tries += 1
        if self.tries == 2:
            raise BlockingIOError(errno.EAGAIN, "no process is left")
        if self.tries == 3:
            self.third.set()
        return os.posix_spawn("/bin/true", ["true"], {}), framing.socket_pair()[0]

    def _tell_everything(self):
        pass

    def _is_needed(self):
        return not self.third.is_set()


@pytest.mark.asyncio
async def test_a_helper_that_cannot_be_forked_is_tried_again(monkeypatch, capsys):
    monkeypatch.setattr(helpers, "_PAUSE_S", 0)
    helper = ShortLived()
    async with asyncio.timeout(30):
        await helper.third.wait()
        await helper._gone
    assert "cannot start the helper: no process is left; trying again" in capsys.readouterr().err


class Hopeless(helpers.HelperProcess):
    """Ends at once, eight times."""

    def __init__(self):
        super().__init__("helper")
        self.tries = 0
        self.last = asyncio.Event()
        self._fork()

    def _spawn(self):
        self.tries += 1
        if self.tries == 8:
            self.last.set()
        return os.posix_spawn("/bin/true", ["true"], {}), framing.socket_pair()[0]

    def _tell_everything(self):
        pass

    def _is_needed(self):
        return not self.last.is_set()


@pytest.mark.asyncio
async def test_a_helper_that_cannot_work_here_is_tried_less_and_less_often(monkeypatch, capsys):
    loop, pauses = asyncio.get_running_loop(), []
    call_later = loop.call_later

    def soon(delay, *what, **how):
        pauses.append(delay)
        return call_later(0, *what, **how)

    monkeypatch.setattr(loop, "call_later", soon)
    helper = Hopeless()
    async with asyncio.timeout(30):
        await helper.last.wait()
        await helper._gone
    assert pauses == [0.5, 1, 2, 4, 8, 15, 15]
    assert "starting another in 15 s" in capsys.readouterr().err
    assert helper._next_pause(loop.time() + 60) == 0.5, "one that lived for a minute is replaced as at first"
    assert helper._next_pause(loop.time()) == 1


class Deaf(helpers.RouterHandle):
    """Router of which the test holds the other end of its socket."""

    def _spawn(self):
        ours, self.theirs = framing.socket_pair()
        self._page = mmap.mmap(-1, mmap.PAGESIZE)
        return os.posix_spawn("/bin/cat", ["cat"], {}, file_actions=[(os.POSIX_SPAWN_CLOSE, 0)]), ours


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.asyncio
async def test_the_router_writes_numbers_of_calls_into_no_page_of_a_slot(is_shared):
    """A process that is shared numbers calls itself, and its verdict on one that hangs would be lost."""
    router = Deaf(None)
    try:
        ours, theirs = socket.socketpair()
        pages = [stats_page.create_page(name) for name in ("calls", "own")]
        channel = worker_handle.Channel(theirs, *pages)
        worker = SimpleNamespace(
            take_channel=lambda: channel,
            ready=None,
            process=SimpleNamespace(is_shared=is_shared),
            ended=asyncio.get_running_loop().create_future(),
        )
        with ours:
            calls, own = (os.fstat(fd).st_ino for fd in pages)
            attached = asyncio.ensure_future(router.attach("web", worker, Limits(), reuses=False))
            await asyncio.sleep(0)
        fds = ()
        while len(fds) < 3:
            _, fds = framing.receive_packet(router.theirs)
        assert [os.fstat(fd).st_ino for fd in fds[1:]] == [calls, calls if is_shared else own]
        framing.close_all(fds)
        attached.cancel()
    finally:
        router.close()
        router.theirs.close()
