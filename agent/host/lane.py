"""A lane: a process that runs calls of one instance, one at a time. Forked by a zygote, it never returns.

It waits for its `Setup`, maps the image, shuts itself into its cell, instantiates the guest and says `Ready`. From then
on it has its clients' connections, the supervisor's socket and nothing else. When that socket closes, it ends.

A lane that several instances share begins with `Open` instead: `agent.host.commons`, where each of them is a `Lane`
with a control socket of its own.
"""

import contextlib
import mmap
import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NoReturn

import msgspec

from agent.host import cell, control, flow
from agent.host.caller import Caller, Ticker
from agent.host.clients import CLIENTS_MAX, Clients
from agent.host.engine import Engine, Image
from agent.host.faults import EngineError, GuestError
from agent.host.heads import Requests
from agent.host.page import Page
from agent.host.redact import Redactor
from agent.host.tally import Tally
from agent.host.writes import Writes, open_counter
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import NATIVE_ANSWER_MAX_BYTES


class Lane:
    """One instance in this process: its control socket, its guest, its clients."""

    def __init__(self, sock: socket.socket, poll: select.epoll) -> None:
        """What it waits for is in `poll`."""
        self._sock = sock
        self._poll = poll
        self._secrets: dict[str, str] = {}
        self._redactor = Redactor(())
        self._outgoing: Callable[[Callable[[bool], None], Callable[[str], None]], Requests] | None = None
        self.begun = False
        self._leaving = 0  # the id of the `HandOver` that is carried out
        poll.register(sock, select.EPOLLIN)

    def say(self, message: control.FromLane) -> None:
        """Tell the supervisor; a line of log is dropped rather than waited for. No value of a secret leaves here."""
        message = self._redactor.message(message)
        try:
            if isinstance(message, control.Line | control.Fault | control.Busy | control.Overdue):
                self._sock.sendmsg([control.encode(message)], [], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            else:
                control.send(self._sock, message)
        except BlockingIOError:
            pass
        except OSError as error:
            raise control.GoneError(str(error)) from error

    def set_up(self, engine: Engine, setup: control.Setup, fds: tuple[int, ...]) -> bool:
        """Become the lane of one instance alone, and shut the cell; False when that was refused."""
        image_fd, page_fd, *more = fds
        if setup.secrets:
            self._secrets = _read_secrets(more.pop())
            self._redactor = Redactor(self._secrets.values())
        ask_fd = more.pop() if setup.egress else -1
        tally_fd = more.pop() if setup.data else -1
        kept = {image_fd, page_fd, *((ask_fd,) if setup.egress else ()), *((tally_fd,) if setup.data else ())}
        cell.close_all_but({0, 1, 2, self._sock.fileno(), self._poll.fileno(), *kept})
        if setup.egress:
            self._outgoing = _outgoing(setup, ask_fd)
        try:
            image = engine.load(f"/proc/self/fd/{image_fd}")
            if image.adapted:
                flow.catch()
            figures_fd, scheduling_fd = cell.memory_figures(), cell.scheduling()
            counter_fd = open_counter() if setup.data else None
            layers = cell.enter(
                cell.lane_plan(
                    uid=setup.uid,
                    memory_bytes=setup.limits.memory_bytes,
                    body_bytes=setup.limits.request_bytes + min(setup.limits.response_bytes, NATIVE_ANSWER_MAX_BYTES),
                    storage_bytes=setup.limits.storage_bytes,
                    data=setup.data,
                    lanes=setup.limits.concurrency,
                    connects=setup.egress,
                )
            )
        except EngineError as error:
            return self._refuse(setup, error.code, error)
        except cell.CellError as error:
            return self._refuse(setup, RejectCode.CONTAINMENT, error)
        os.close(image_fd)
        where = "" if not setup.data else cell.DATA if layers["mount"] else setup.data
        writes = None
        if setup.data:
            tally = Tally(tally_fd)
            os.close(tally_fd)
            writes = Writes(counter_fd, most=setup.limits.daily_written_bytes, tally=tally, place=setup.place)
        return self.begin(
            setup,
            image,
            page_fd,
            layers=layers,
            figures_fd=figures_fd,
            data=where,
            scheduling_fd=scheduling_fd,
            writes=writes,
        )

    def begin(
        self,
        setup: control.Setup,
        image: Image,
        page_fd: int,
        *,
        layers: dict[str, bool],
        figures_fd: int | None = None,
        data: str = "",
        ticker: Ticker | None = None,
        scheduling_fd: int | None = None,
        writes: Writes | None = None,
        clients_max: int = CLIENTS_MAX,
    ) -> bool:
        """Instantiate the guest and say `Ready`; False when that was refused. The descriptors are closed."""
        page = Page(page_fd)
        os.close(page_fd)
        self._caller = Caller(
            image,
            outgoing=None if self._outgoing is None else partial(self._outgoing, page.sent),
            limits=setup.limits,
            grants=setup.grants,
            config={**setup.config, **self._secrets},
            page=page,
            say=self.say,
            data=data,
            redact=self._redactor.text,
            ticker=ticker,
            scheduling_fd=scheduling_fd,
            writes=writes,
        )
        try:
            kinds = self._caller.start()
        except EngineError as error:
            return self._refuse(setup, error.code, error)
        except GuestError as error:
            return self._refuse(setup, RejectCode.START_FAILED, error)
        self.clients = Clients(self._poll, self._caller, setup.limits, self._handed_over, clients_max=clients_max)
        ready = control.Ready(kinds=tuple(sorted(kinds)), layers=layers, id=setup.id)
        control.send(self._sock, ready, *(() if figures_fd is None else (figures_fd,)))
        if figures_fd is not None:
            os.close(figures_fd)
        self.begun = True
        return True

    def _refuse(self, setup: control.Setup, code: RejectCode, error: Exception) -> bool:
        self.say(control.Refused(code=code, message=str(error), id=setup.id))
        return False

    def _handed_over(self, passed: int, cut: int) -> None:
        self.say(control.HandedOver(passed=passed, cut=cut, id=self._leaving))

    def first(self) -> tuple[control.Setup, tuple[int, ...]]:
        """The first message, of a seat in a shared lane. Raises `control.GoneError`."""
        setup, fds = control.receive_to_lane(self._sock)
        if not isinstance(setup, control.Setup):
            raise control.GoneError("the first message is not a setup")
        return setup, fds

    def turn(self, wait_s: float) -> None:
        """Do what there is to do, after waiting at most `wait_s` (-1: however long) for something."""
        own = self._sock.fileno()
        for fd, mask in self._poll.poll(wait_s):
            if fd == own:
                self.obey(*control.receive_to_lane(self._sock))
            else:
                self.clients.event(fd, mask)
        self.clients.tick()

    def loop(self) -> NoReturn:
        """Serve until the supervisor's socket closes."""
        while True:
            self.turn(self.clients.wait_s())

    def close(self) -> None:
        """End this instance, and not the process."""
        if self.begun:
            self._caller.close()
            self.clients.close()
        self._poll.close()
        self._sock.close()

    def obey(self, message: control.ToLane, fds: tuple[int, ...]) -> None:
        """Do what the supervisor says."""
        match message:
            case control.Serve():
                listener, *queue = (socket.socket(fileno=fd) for fd in fds)
                self.clients.serve(listener, (queue[0], queue[1]) if queue else None)
            case control.Adopt():
                self.clients.adopt(socket.socket(fileno=fds[0]))
            case control.HandOver(id=number, deadline_ms=deadline_ms):
                self._leaving = number
                successor = socket.socket(fileno=fds[0]) if fds else None
                self.clients.hand_over(successor, deadline_s=deadline_ms / 1000)
            case control.Check(id=number):
                self.say(control.Checked(id=number, problem=self._caller.check()))
            case control.Task(id=number, scheduled_ms=scheduled_ms):
                self.say(control.Ran(id=number, problem=self._caller.run(scheduled_ms or int(time.time() * 1000))))
            case control.Probe(id=number):
                self.say(control.Probed(id=number))
            case control.SaveState() | control.LoadState() | control.Resume():
                self._carry(message, fds)
            case control.Setup() | control.Open() | control.Seat():
                raise control.GoneError("set up twice")

    def _carry(self, message: control.SaveState | control.LoadState | control.Resume, fds: tuple[int, ...]) -> None:
        match message:
            case control.SaveState(id=number):
                with open_state(fds[0]) as room:
                    state, problem = self._caller.save_state(len(room))
                    room[: len(state)] = state
                if problem is None:
                    self.clients.hold()
                self.say(control.StateSaved(length=len(state), problem=problem, id=number))
            case control.LoadState(length=length, id=number):
                with open_state(fds[0]) as room:
                    state = bytes(room[:length])
                self.say(control.StateLoaded(problem=self._caller.load_state(state), id=number))
            case control.Resume():
                self.clients.resume()


def _read_secrets(fd: int) -> dict[str, str]:
    """The values by name; the lanes of a generation share the descriptor, and so no place in it."""
    return msgspec.json.decode(os.pread(fd, os.fstat(fd).st_size, 0), type=dict[str, str])


def _outgoing(setup: control.Setup, ask_fd: int) -> Callable[[Callable[[bool], None], Callable[[str], None]], Requests]:
    """What makes this instance's `Outgoing`; what that takes is loaded now, while files can be read."""
    from agent.host import outgoing  # noqa: PLC0415 - lanes without such grants go without asyncio, ssl and http.client

    encrypted = any(not each.startswith("http:") for each in setup.grants.outbound)
    context = outgoing.trust() if encrypted else None
    sock = socket.socket(fileno=ask_fd)
    return lambda count, log: outgoing.Outgoing(sock, setup.grants, setup.limits, log=log, count=count, context=context)


@contextlib.contextmanager
def open_state(fd: int) -> Iterator[mmap.mmap | bytearray]:
    """The memfd's memory; the descriptor is closed."""
    try:
        size = os.fstat(fd).st_size
        if not size:
            yield bytearray()
            return
        with mmap.mmap(fd, size) as room:
            yield room
    finally:
        os.close(fd)
