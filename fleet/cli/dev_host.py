"""Host of this machine for an author: `fleet-host dev` as a child process, its events in a queue."""

import os
import queue
import signal
import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Final, NoReturn

import msgspec

from fleet.cli import host_check
from fleet.cli.base import Fault, reason
from fleet.protocol import dev, wire

_END_S: Final = 30
_ENDS: Final = (signal.SIGTERM, signal.SIGHUP)


class DevHost:
    """Host of one component at a time."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._events: queue.SimpleQueue[dev.Event | None] = queue.SimpleQueue()
        assert process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            with suppress(*wire.JSON_ERRORS):  # an event of a version to come
                self._events.put(dev.EVENTS.decode(line))
        self._events.put(None)

    def run(self, request: dev.DevRequest) -> None:
        """Have a component take over."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # an end is read as an event
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            self._process.stdin.flush()

    def next(self, timeout_s: float | None = None) -> dev.Event | None:
        """Return the next event, or None where none comes in time.

        Raises:
            Fault: the host has ended.
        """
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            return None
        if event is None:
            status = self._process.wait()
            raise Fault("this machine's host ended", f"exit code {status}", "its last words stand above")
        return event

    def end(self) -> None:
        """End the host, and wait for it."""
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):  # a second interrupt: without waiting for a compile
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # compiler and inner host too
            self._process.wait()


def check_port(port: int) -> None:
    """Raise `Fault` where nothing can listen on this port of the loopback address; before a long build, not after."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
            sock.listen()
        except OSError as error:
            raise Fault(
                f"cannot listen on port {port} of this machine", reason(error), "choose another --port, or 0 for any"
            ) from None


def _leave(number: int, _frame: FrameType | None) -> NoReturn:
    for each in _ENDS:
        signal.signal(each, signal.SIG_IGN)  # the host is being ended already
    raise SystemExit(128 + number)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """Within the block, a closed terminal or a plain kill ends it as an error does: nothing is left over."""
    before = {each: signal.signal(each, _leave) for each in _ENDS if signal.getsignal(each) == signal.SIG_DFL}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@contextmanager
def started(port: int) -> Iterator[DevHost]:
    """Start this machine's host on a port of the loopback address, 0 for any free one; end it with the block.

    Raises:
        Fault: it is not installed.
    """
    if not host_check.is_host_installed():
        raise Fault(
            "there is no host on this machine", "it comes with wasmfleet[agent]", "pip install 'wasmfleet[agent,cli]'"
        )
    with _ended_in_order(), tempfile.TemporaryDirectory(prefix="fleet-component-") as directory:
        Path(directory).chmod(0o755)  # as root, workers are other users
        process = subprocess.Popen(
            host_check.host_command("dev", "--directory", directory, "--ingress", f"127.0.0.1:{port}"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONSAFEPATH": "1"},
            start_new_session=True,  # an interrupt from the terminal is ours to pass on
        )
        host = DevHost(process)
        try:
            yield host
        finally:
            host.end()
