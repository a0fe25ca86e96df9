"""A lane that several instances of one publisher share, because the board's operator lets them: the process's side.

Every image is mapped before the cell is shut, since nothing in a lane may map machine code afterwards; an instance
whose image is not here gets a seat in another lane. Each seat is a `Lane` with a control socket, an epoll set, clients
and figures of its own, and ends alone: by its socket's end, or by a trap, which takes its store and nothing else. Calls
go one at a time, whosever they are. A guest that hangs can only be ended with the process, and all seats with it.
"""

import os
import select
import socket
import time
from typing import Final, NoReturn

from agent.host import cell, control, flow
from agent.host.caller import Ticker
from agent.host.engine import Engine, Image
from agent.host.faults import EngineError
from agent.host.lane import Lane
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import NATIVE_ANSWER_MAX_BYTES

_CLIENTS_A_SEAT: Final = 32


class Commons:
    """The process of a shared lane."""

    def __init__(self, sock: socket.socket, engine: Engine) -> None:
        self._sock = sock
        self._engine = engine
        self._poll = select.epoll()
        self._poll.register(sock, select.EPOLLIN)
        self._images: dict[str, Image] = {}
        self._seats: dict[int, Lane] = {}
        self._layers: dict[str, bool] = {}
        self._due_s: dict[int, float] = {}  # seats that have something to do at a time

    def open(self, order: control.Open, fds: tuple[int, ...]) -> bool:
        """Map the images and shut the cell; False when that was refused."""
        cell.close_all_but({0, 1, 2, self._sock.fileno(), self._poll.fileno(), *fds})
        try:
            for key, fd in zip(order.images, fds, strict=True):
                self._images[key] = self._engine.load(f"/proc/self/fd/{fd}")
            adapted = any(image.adapted for image in self._images.values())
            if adapted:
                flow.catch()
            figures_fd, scheduling_fd = cell.memory_figures(), cell.scheduling()
            self._layers = cell.enter(
                cell.shared_plan(
                    uid=order.uid,
                    seats=order.seats,
                    clients=_CLIENTS_A_SEAT,
                    memory_bytes=order.limits.memory_bytes,
                    body_bytes=order.limits.request_bytes + min(order.limits.response_bytes, NATIVE_ANSWER_MAX_BYTES),
                )
            )
        except EngineError as error:
            control.send(self._sock, control.Refused(code=error.code, message=str(error), id=order.id))
            return False
        except cell.CellError as error:
            control.send(self._sock, control.Refused(code=RejectCode.CONTAINMENT, message=str(error), id=order.id))
            return False
        for fd in fds:
            os.close(fd)
        self._ticker = Ticker(self._engine.tick, waits=lambda: cell.waits(scheduling_fd))
        opened = control.Opened(layers=self._layers, id=order.id)
        control.send(self._sock, opened, *(() if figures_fd is None else (figures_fd,)))
        if figures_fd is not None:
            os.close(figures_fd)
        return True

    def loop(self) -> NoReturn:
        """Serve until the supervisor's socket closes."""
        own = self._sock.fileno()
        while True:
            wait_s = max(0.0, min(self._due_s.values()) - time.monotonic()) if self._due_s else -1.0
            for fd, _ in self._poll.poll(wait_s):
                if fd == own:
                    self._seat()
                elif fd in self._seats:
                    self._turn(fd)
            if self._due_s:
                now_s = time.monotonic()
                for fd in [fd for fd, due_s in self._due_s.items() if due_s <= now_s]:
                    self._turn(fd)

    def _seat(self) -> None:
        """An instance more."""
        message, fds = control.receive_to_lane(self._sock)
        if not isinstance(message, control.Seat):
            raise control.GoneError("not a seat")
        poll = select.epoll()
        self._poll.register(poll, select.EPOLLIN)
        self._seats[poll.fileno()] = Lane(socket.socket(fileno=fds[0]), poll)

    def _turn(self, fd: int) -> None:
        """Let a seat do what it has to do, and note when it wants to be looked after again."""
        seat = self._seats[fd]
        try:
            if not seat.begun:
                setup, fds = seat.first()
                image = self._images[setup.image]
                seat.begin(setup, image, fds[0], layers=self._layers, ticker=self._ticker, clients_max=_CLIENTS_A_SEAT)
                if not seat.begun:
                    self._end(fd)
                    return
            seat.turn(0)
            wait_s = seat.clients.wait_s()
        except control.GoneError:
            self._end(fd)
            return
        if wait_s >= 0:
            self._due_s[fd] = time.monotonic() + wait_s
        else:
            self._due_s.pop(fd, None)

    def _end(self, fd: int) -> None:
        self._due_s.pop(fd, None)
        self._seats.pop(fd).close()
