"""Control socket of a worker whose main thread is in the guest's loop: read by a thread of its own.

The guest is entered by the main thread alone. So a message that needs the guest waits until the main thread leaves the
loop, which the router asks the guest for once such a message has been sent; what needs no guest is done here, at once.
An interrupt lets one epoch pass, which ends the call in flight: its deadline is the next epoch.
"""

import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from agent.host.ipc import framing, worker_api
from agent.host.ipc.stats_page import StatsPage

_STACK_BYTES = 256 * 1024


class ControlMessage(NamedTuple):
    """A message of the supervisor with its descriptors, which the receiver owns."""

    message: worker_api.ToWorker
    fds: tuple[int, ...]


class ControlThread:
    """Reader of the control socket. `take` and `wait` belong to the main thread."""

    def __init__(
        self,
        sock: socket.socket,
        page: StatsPage,
        *,
        tick: Callable[[], None],
    ) -> None:
        """Start the thread. `tick` lets one epoch pass; `page` has the number of the call in flight."""
        self._sock = sock
        self._page = page
        self._tick = tick
        # Under the lock; the thread has one of its own, as no two threads may use one at once.
        self._more = select.poll()
        self._more.register(sock, select.POLLIN)
        self._messages: deque[ControlMessage] = deque()
        self._calls = threading.Lock()
        self._interrupted = 0  # number of the call that was interrupted and has not ended
        self._abandoned = False  # interrupted since nobody wants its answer
        self._ended = 0
        self._reading = threading.Lock()
        self._arrived = threading.Event()
        threading.stack_size(_STACK_BYTES)
        threading.Thread(target=self._run, name="control", daemon=True).start()

    def take(self) -> list[ControlMessage]:
        """Return every message that was sent before now and needs the guest."""
        self._read()
        with self._reading:
            taken = list(self._messages)
            self._messages.clear()
            self._arrived.clear()
        return taken

    def wait(self) -> list[ControlMessage]:
        """Return the next messages that need the guest, waiting for one."""
        self._arrived.wait()
        return self.take()

    def armed(self) -> None:
        """Let an epoch pass again for a call that was interrupted before its deadline was set."""
        with self._calls:
            if self._interrupted:
                self._tick()

    @property
    def has_abandoned(self) -> bool:
        """True if the call in flight was interrupted only since nobody wants its answer."""
        with self._calls:
            return bool(self._interrupted) and self._abandoned

    def ended(self, call: int) -> None:
        """Take note that calls up to this number have ended: whoever interrupts one of them comes too late."""
        with self._calls:
            self._ended = max(self._ended, call)
            if self._interrupted <= self._ended:
                self._interrupted = 0

    def _interrupt(self, call: int, *, abandoned: bool) -> None:
        with self._calls:
            if call > self._ended and call == self._page.number():
                self._interrupted, self._abandoned = call, abandoned
                self._tick()

    def _run(self) -> None:
        arrival = select.poll()
        arrival.register(self._sock, select.POLLIN)
        try:
            while True:
                arrival.poll()
                self._read()
        except framing.GoneError:
            os._exit(0)  # the supervisor has ended this worker, or itself
        except BaseException:  # noqa: BLE001 - whatever it is: nobody could interrupt a call any more
            os._exit(1)

    def _read(self) -> None:
        """Read what has come. Raises `framing.GoneError`."""
        with self._reading:
            while self._more.poll(0):
                self._sort(ControlMessage(*worker_api.receive_to_worker(self._sock)))

    def _sort(self, received: ControlMessage) -> None:
        match received.message:
            case worker_api.Interrupt(call=call, abandoned=abandoned):
                self._interrupt(call, abandoned=abandoned)
            case worker_api.Serve():
                framing.close_all(received.fds)
            case _:
                self._messages.append(received)
                self._arrived.set()
