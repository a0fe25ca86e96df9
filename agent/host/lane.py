"""A lane: a process that runs calls of one instance, one at a time. Forked by a zygote, it never returns.

It waits for its `Setup`, maps the image, shuts itself into its cell, instantiates the guest and says `Ready`. From then
on it has its clients' connections, the supervisor's socket and nothing else. When that socket closes, it ends.
"""

import contextlib
import os
import select
import socket
import time
from typing import NoReturn

from agent.host import cell, control, heads
from agent.host.caller import Caller
from agent.host.clients import Clients
from agent.host.engine import Engine
from agent.host.faults import EngineError, GuestError
from agent.host.page import Page
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import NATIVE_ANSWER_MAX_BYTES


def main(sock: socket.socket, engine: Engine) -> NoReturn:
    """Be a lane on this end of a control socket."""
    status = 1
    try:
        lane = Lane(sock, engine)
        if lane.set_up():
            lane.loop()
        status = 0
    except control.GoneError:
        status = 0
    except BaseException as error:  # noqa: BLE001 - nobody above could handle it: this process was forked
        message = f"the lane failed: {type(error).__name__}: {error}"
        with contextlib.suppress(OSError, control.GoneError):
            control.send(sock, control.Refused(code=RejectCode.INTERNAL, message=message))
    finally:
        os._exit(status)


class Lane:
    """One lane's life."""

    def __init__(self, sock: socket.socket, engine: Engine) -> None:
        self._sock = sock
        self._engine = engine

    def say(self, message: control.FromLane) -> None:
        """Tell the supervisor; a line of log is dropped rather than waited for."""
        try:
            if isinstance(message, control.Line | control.Fault | control.Busy | control.Overdue):
                self._sock.sendmsg([control.encode(message)], [], socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
            else:
                control.send(self._sock, message)
        except BlockingIOError:
            pass
        except OSError as error:
            raise control.GoneError(str(error)) from error

    def set_up(self) -> bool:
        """Become the lane of one instance; False when that was refused."""
        setup, fds = control.receive_to_lane(self._sock)
        if not isinstance(setup, control.Setup):
            raise control.GoneError("the first message is not a setup")
        image_fd, page_fd = fds
        cell.close_all_but({0, 1, 2, self._sock.fileno(), *fds})
        try:
            image = self._engine.load(f"/proc/self/fd/{image_fd}")
            page = Page(page_fd)
            if image.adapted:
                heads.catch()
            figures_fd = cell.memory_figures()
            layers = cell.enter(
                cell.lane_plan(
                    uid=setup.uid,
                    memory_bytes=setup.limits.memory_bytes,
                    body_bytes=setup.limits.request_bytes + min(setup.limits.response_bytes, NATIVE_ANSWER_MAX_BYTES),
                    storage_bytes=setup.limits.storage_bytes,
                    answer_bytes=setup.limits.response_bytes if image.adapted else 0,
                    data=setup.data,
                    lanes=setup.limits.concurrency,
                )
            )
            where = "" if not setup.data else cell.DATA if layers["mount"] else setup.data
            self._caller = Caller(
                image,
                limits=setup.limits,
                grants=setup.grants,
                config=setup.config,
                page=page,
                say=self.say,
                data=where,
            )
            kinds = self._caller.start()
        except EngineError as error:
            self.say(control.Refused(code=error.code, message=str(error)))
            return False
        except GuestError as error:
            self.say(control.Refused(code=RejectCode.START_FAILED, message=str(error)))
            return False
        except cell.CellError as error:
            self.say(control.Refused(code=RejectCode.CONTAINMENT, message=str(error)))
            return False
        for fd in (image_fd, page_fd):
            os.close(fd)
        self._poll = select.epoll()
        self._clients = Clients(self._poll, self._caller, setup.limits, self._handed_over)
        ready = control.Ready(kinds=tuple(sorted(kinds)), layers=layers)
        control.send(self._sock, ready, *(() if figures_fd is None else (figures_fd,)))
        if figures_fd is not None:
            os.close(figures_fd)
        return True

    def _handed_over(self, passed: int, cut: int) -> None:
        self.say(control.HandedOver(passed=passed, cut=cut))

    def loop(self) -> NoReturn:
        """Serve until the supervisor's socket closes."""
        own = self._sock.fileno()
        self._poll.register(own, select.EPOLLIN)
        while True:
            for fd, mask in self._poll.poll(self._clients.wait_s()):
                if fd == own:
                    self._obey(*control.receive_to_lane(self._sock))
                else:
                    self._clients.event(fd, mask)
            self._clients.tick()

    def _obey(self, message: control.ToLane, fds: tuple[int, ...]) -> None:
        match message:
            case control.Serve():
                self._clients.serve(socket.socket(fileno=fds[0]))
            case control.Adopt():
                self._clients.adopt(socket.socket(fileno=fds[0]))
            case control.HandOver(deadline_ms=deadline_ms):
                successor = socket.socket(fileno=fds[0]) if fds else None
                self._clients.hand_over(successor, deadline_s=deadline_ms / 1000)
            case control.Check(id=number):
                self.say(control.Checked(id=number, problem=self._caller.check()))
            case control.Task(id=number, scheduled_ms=scheduled_ms):
                self.say(control.Ran(id=number, problem=self._caller.run(scheduled_ms or int(time.time() * 1000))))
            case control.Probe(id=number):
                self.say(control.Probed(id=number))
            case control.Setup():
                raise control.GoneError("set up twice")
