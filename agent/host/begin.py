"""Where a forked process becomes a lane: of one instance alone, or one that several share. It never returns.

The first message says which. What goes wrong here is told to the supervisor, since this process was forked and nobody
above could handle it.
"""

import contextlib
import os
import select
import socket
from typing import NoReturn

from agent.host import control
from agent.host.commons import Commons
from agent.host.engine import Engine
from agent.host.lane import Lane
from fleet.protocol.codes import RejectCode


def main(sock: socket.socket, engine: Engine) -> NoReturn:
    """Be a lane on this end of a control socket."""
    status = 1
    try:
        _serve(sock, engine)
        status = 0
    except control.GoneError:
        status = 0
    except BaseException as error:  # noqa: BLE001 - nobody above could handle it: this process was forked
        message = f"the lane failed: {type(error).__name__}: {error}"
        with contextlib.suppress(OSError, control.GoneError):
            control.send(sock, control.Refused(code=RejectCode.INTERNAL, message=message))
    finally:
        os._exit(status)


def _serve(sock: socket.socket, engine: Engine) -> None:
    first, fds = control.receive_to_lane(sock)
    match first:
        case control.Setup():
            lane = Lane(sock, select.epoll())
            if lane.set_up(engine, first, fds):
                lane.loop()
        case control.Open():
            commons = Commons(sock, engine)
            if commons.open(first, fds):
                commons.loop()
        case _:
            raise control.GoneError("the first message is not a setup")
