"""Control of a worker while a service's run holds its main thread.

A service reads standard input from a pipe, whose other end this process has: a drain closes it, so that a guest that
reads learns that it has to end. One that does not is ended by an epoch, since its deadline is the next one; one that is
blocked in the host can only be ended with the process, by the supervisor.
"""

import os
import select
import socket
import threading
from collections.abc import Callable
from typing import Final

from agent.host.ipc import framing, worker_api

_STACK_BYTES: Final = 256 * 1024

LOOK_S: Final = 30.0
"""Pause between two looks at a service's processor time."""

LOOK_AT_WRITES_S: Final = 1.0
"""The same where it may have files: a quota that it has used up holds from then on."""


class StdinPipe:
    """Standard input of the process, open until `close`."""

    def __init__(self) -> None:
        """Put the pipe in place. Nothing else in such a worker reads standard input."""
        theirs, self._fd = os.pipe2(os.O_CLOEXEC)
        os.dup2(theirs, 0, inheritable=False)
        os.close(theirs)

    def close(self) -> None:
        """Let the guest read the end."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class ServiceControl:
    """Thread that reads the control socket in place of the main thread."""

    def __init__(
        self,
        sock: socket.socket,
        stdin: StdinPipe,
        *,
        tick: Callable[[], None],
        look: Callable[[], None],
        obey: Callable[[worker_api.ToWorker], None],
        look_s: float,
    ) -> None:
        """Prepare the thread.

        Args:
            sock: control socket.
            stdin: of the guest.
            tick: lets one epoch pass.
            look: called every `look_s`, to count what the guest has used.
            obey: carries out what needs no guest.
            look_s: seconds.
        """
        self._sock = sock
        self._stdin = stdin
        self._tick = tick
        self._look = look
        self._obey = obey
        self._look_s = look_s
        self._ending = threading.Lock()
        self._runs = self.interrupted = False
        self.draining = False
        """True once the run was asked to end."""

    def start(self) -> None:
        """Begin to read; the main thread does not, from here on."""
        threading.stack_size(_STACK_BYTES)
        threading.Thread(target=self._run, name="control", daemon=True).start()

    def begins(self) -> None:
        """Take note that the next epoch ends the run; let one pass if that was asked for before."""
        with self._ending:
            self._runs = True
            if self.interrupted:
                self._tick()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        try:
            while True:
                if poll.poll(self._look_s * 1000):
                    self._take(*worker_api.receive_to_worker(self._sock))
                self._look()
        except framing.GoneError:
            os._exit(0)  # the supervisor has ended this worker, or itself
        except BaseException:  # noqa: BLE001 - whatever it is: nobody could end the service any more
            os._exit(1)

    def _take(self, message: worker_api.ToWorker, fds: tuple[int, ...]) -> None:
        framing.close_all(fds)
        match message:
            case worker_api.Drain():
                self.draining = True
                self._stdin.close()
            case worker_api.Interrupt():
                with self._ending:
                    self.interrupted = True
                    if self._runs:
                        self._tick()
            case _:
                self._obey(message)
