"""wasmfleet:serial: serial ports, by the name that the device's owner gives each.

The supervisor opens and sets up a port, and the worker reads and writes its descriptor. A port's handle is its place
among the grants.
"""

import errno
import os
import select
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from agent.host.engine.codec import Failure, Signature
from agent.host.engine.host_interface import Function, HostInterface, Surroundings, Variant, own
from agent.host.interfaces.package import Package
from agent.host.ipc import serial_abi
from fleet.component import wasi
from fleet.protocol.hardware import BAUDS, EACH_MAX, SerialPort
from fleet.protocol.manifest import Limits

NAME: Final = "wasmfleet:serial"
DATA_MAX_BYTES: Final = 64 * 1024
"""Most bytes of one read or write."""

HANDLES_MAX: Final = 64
_MARGIN: Final = 0.8  # of limits.idle, so that the guest gets its answer before the worker is ended for it
_PORT: Final = 44  # number of the host's resource
_GONE: Final = frozenset({errno.EIO, errno.ENXIO, errno.ENODEV, errno.EPIPE})


class _FailedError(Exception):
    """A call ends with this case of `error`."""

    def __init__(self, case: str, text: str | None = None) -> None:
        super().__init__(case)
        self.error = Variant(case, text)


class Ports:
    """Serial ports of one worker's instance, with the descriptor of each.

    Attributes:
        sent_bytes: bytes written so far, which the kernel counts as if to files.
    """

    def __init__(self, ports: tuple[SerialPort, ...], fds: tuple[int, ...], limits: Limits) -> None:
        self.names = [port.name for port in ports]
        self.sent_bytes = 0
        self._fds = fds
        self._wait_s = limits.idle_ms / 1000 * _MARGIN
        self._open = 0

    def reset(self) -> None:
        """Forget the handles of an instance that has ended."""
        self._open = 0

    def opened(self) -> None:
        """Count a handle that the guest gets. Raises `_FailedError`: it has too many."""
        if self._open >= HANDLES_MAX:
            raise _FailedError("other", f"{HANDLES_MAX} handles are open: drop some")
        self._open += 1

    def dropped(self) -> None:
        """Take note that the guest has dropped a handle."""
        self._open = max(0, self._open - 1)

    def read(self, at: int, most: int, timeout_ms: int) -> bytes:
        """Return what has come in, waiting for the first byte. Raises `_FailedError`, `OSError`."""
        until_s = time.monotonic() + min(timeout_ms / 1000, self._wait_s)
        if most == 0:
            return b""
        while True:
            try:
                data = os.read(self._fds[at], min(most, DATA_MAX_BYTES))
            except BlockingIOError:
                if not self._ready(at, select.POLLIN, until_s):
                    return b""
                continue
            if not data:
                raise _FailedError("gone")
            return data

    def write(self, at: int, data: bytes) -> int:
        """Hand bytes to the driver, waiting for room; return how many it took. Raises `_FailedError`, `OSError`."""
        until_s, done = time.monotonic() + self._wait_s, 0
        if len(data) > DATA_MAX_BYTES:
            raise _FailedError("other", f"{len(data)} bytes in one call, {DATA_MAX_BYTES} are allowed")
        while done < len(data):
            try:
                took = os.write(self._fds[at], data[done:])
            except BlockingIOError:
                if not self._ready(at, select.POLLOUT, until_s):
                    break
                continue
            done += took
            self.sent_bytes += took
        return done

    def discard(self, at: int) -> None:
        """Drop what has come in. Raises `OSError`."""
        serial_abi.discard(self._fds[at])

    def _ready(self, at: int, event: int, until_s: float) -> bool:
        poll = select.poll()
        poll.register(self._fds[at], event)
        left_s = until_s - time.monotonic()
        return left_s > 0 and bool(poll.poll(left_s * 1000))


_NO_PORTS: Final = Ports((), (), Limits())


class _Calls:
    """Functions of one import for one instance."""

    def __init__(self, around: Surroundings) -> None:
        part = around.parts.get(NAME)
        self._ports = part if isinstance(part, Ports) else _NO_PORTS
        self._log = around.log

    def open(self, _store: Any, name: str) -> Any:
        """Open a port."""
        if name not in self._ports.names:
            said = f"{wasi.SERIAL}.open of {name[:40]!r} is denied: no entry of grants.serial has this name"
            self._log.deny(wasi.SERIAL, said)
            raise _FailedError("not-granted")
        self._ports.opened()
        return own(self._ports.names.index(name), _PORT)

    def read(self, store: Any, port: Any, most: int, timeout_ms: int) -> bytes:
        """Read."""
        return self._ports.read(int(port.to_host(store).rep), most, timeout_ms)

    def write(self, store: Any, port: Any, data: bytes) -> int:
        """Write."""
        return self._ports.write(int(port.to_host(store).rep), data)

    def discard(self, store: Any, port: Any) -> None:
        """Drop what has come in."""
        self._ports.discard(int(port.to_host(store).rep))

    def drop(self, _store: Any, _at: int) -> None:
        """Take note that the guest has dropped a handle."""
        self._ports.dropped()


def _failing(call: Callable[..., Any]) -> Function:
    """Return a function for the linker whose errors are results."""

    def called(store: Any, *arguments: Any) -> Any:
        try:
            return call(store, *arguments)
        except _FailedError as error:
            return Failure(error.error)
        except OSError as error:
            gone = error.errno in _GONE
            return Failure(Variant("gone") if gone else Variant("other", str(error.strerror)))

    return called


def _make(around: Surroundings) -> Mapping[str, Function]:
    calls = _Calls(around)
    return {
        "[static]port.open": _failing(calls.open),
        "[method]port.read": _failing(calls.read),
        "[method]port.write": _failing(calls.write),
        "[method]port.discard": _failing(calls.discard),
        "[drop]port": calls.drop,
    }


_ERROR: Final = "variant { not-granted, gone, other(string) }"
_SELF: Final = ("self", "borrow")
_TYPES: Final = {
    "[static]port.open": Signature((("name", "string"),), f"result<own, {_ERROR}>"),
    "[method]port.read": Signature((_SELF, ("most", "u32"), ("timeout-ms", "u32")), f"result<list<u8>, {_ERROR}>"),
    "[method]port.write": Signature((_SELF, ("data", "list<u8>")), f"result<u32, {_ERROR}>"),
    "[method]port.discard": Signature((_SELF,), f"result<_, {_ERROR}>"),
}

PACKAGE: Final = Package(
    name=NAME,
    about="""\
Serial ports, RS-485 included, by the name that the device's owner gives each (`policy.serial`). There is no draft of
WASI; the WIT is this project's (`components/wit/deps/serial`). Speed, frame and mode are the grant's. The host keeps
the port open while the instance lives, so that its control lines do not move at a swap; each worker begins without
what came in before. An adapter that was pulled out is `gone`, and opened again for the next worker
(`fleet restart`, or a service that ends).""",
    grant="""\
`interfaces = ["wasmfleet:serial"]`, and a table for each port ([component.toml](component-toml.md#hardware)). The \
device's owner names ports in `policy.serial`, none by default, and opens them for the host \
([hardware](host.md#hardware)).""",
    limits={
        "ports": f"{EACH_MAX}",
        "handles open at once": f"{HANDLES_MAX}",
        "speed": f"{BAUDS[0]} to {BAUDS[-1]} baud",
        "one read or write": f"{DATA_MAX_BYTES // 1024} KiB; the port's speed is the rate",
        "waiting": "four fifths of `limits.idle`: then a read has nothing, and a write took less",
        "calls at once": "1: `limits.concurrency` of more is refused at push",
    },
    counters={"denials": "names that no grant has"},
    rust="""\
use wasmfleet::serial::port::Port;

let meter = Port::open("meter")?;
meter.write(&[0x01, 0x04, 0x00, 0x00, 0x00, 0x02, 0x71, 0xcb])?;
let answer = meter.read(256, 500)?;""",
    python="""\
from wit_world.imports.port import Port

meter = Port.open("meter")
meter.write(bytes([0x01, 0x04, 0x00, 0x00, 0x00, 0x02, 0x71, 0xCB]))
answer = meter.read(256, 500)""",
    interfaces=(HostInterface(wasi.SERIAL, ("0.1.0",), _TYPES, _make, resources={"port": _PORT}),),
)
