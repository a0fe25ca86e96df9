"""Figures of the device for Prometheus: as text, on a local socket, and over that in a file of node_exporter.

Names follow OpenMetrics. The number of series is bounded by what a device may run: each instance has a fixed number
of them, and those that its component counts itself, which are bounded too. Whatever components say is escaped; their
names have a prefix, so that none looks like a figure of somebody else's.
"""

import asyncio
import contextlib
import logging
import os
import socket
import stat
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Final, Protocol

from fleet.protocol.bounds import MIB
from fleet.protocol.messages import LATENCY_BOUNDS_MS, Health, InstanceHealth
from fleet.protocol.metrics import BOUNDS, Metric
from fleet.protocol.names import BadNameError, TargetName

log = logging.getLogger("agent.report.metrics")

PREFIX: Final = "wasmfleet_component_"
"""Of the names of components' own figures."""

BODY_MAX_BYTES: Final = 32 * MIB
"""Several times of all that a device can have to say."""

_TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
_OPENMETRICS: Final = "application/openmetrics-text"
_HEAD_MAX_BYTES: Final = 8192
_CLIENT_S: Final = 10.0
_CLIENTS_MAX: Final = 8
_AGE_S: Final = 0.5  # figures that are so young are not asked for again: a socket is no way to keep the host busy

Labels = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class Family:
    """Figures of one name.

    Attributes:
        samples: ending of the name, labels, value; a counter's ending is added.
    """

    name: str
    kind: str
    text: str
    samples: list[tuple[str, Labels, float]] = field(default_factory=list)

    def add(self, value: float, *labels: tuple[str, str], ending: str = "") -> None:
        """Add a sample."""
        self.samples.append((ending, labels, value))

    def add_histogram(
        self, bounds: Iterable[float], counts: Iterable[int], total: float, *labels: tuple[str, str]
    ) -> None:
        """Add a histogram: `counts` up to each bound and not to the one before, then those above all."""
        upto = list(accumulate(counts))
        for bound, count in zip((*bounds, float("inf")), upto, strict=True):
            self.add(count, *labels, ("le", "+Inf" if bound == float("inf") else repr(float(bound))), ending="_bucket")
        self.add(total, *labels, ending="_sum")
        self.add(upto[-1], *labels, ending="_count")

    def lines(self, *, openmetrics: bool) -> Iterator[str]:
        """Return the family as text."""
        ending = "_total" if self.kind == "counter" else ""
        declared = self.name if openmetrics else self.name + ending
        yield f"# HELP {declared} {self.text}\n# TYPE {declared} {self.kind}\n"
        for part, labels, value in self.samples:
            said = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels)
            yield f"{self.name}{ending}{part}{f'{{{said}}}' if said else ''} {_number(value)}\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def text(families: Iterable[Family], *, openmetrics: bool = False) -> str:
    """Return figures in Prometheus' text format, or in that of OpenMetrics."""
    lines = [line for family in families if family.samples for line in family.lines(openmetrics=openmetrics)]
    return "".join([*lines, "# EOF\n"] if openmetrics else lines)


def down() -> str:
    """Return the figures of a device whose agent does not answer."""
    return text([_agent_up(0)])


def _agent_up(value: int) -> Family:
    family = Family("wasmfleet_agent_up", "gauge", "1 while the agent of the device answers.")
    family.add(value)
    return family


class Connection(Protocol):
    """Connection of the agent, to its fleet or to the host."""

    @property
    def connected(self) -> bool:
        """True while there is one."""


@dataclass(frozen=True, slots=True)
class Connections:
    """Connections of the agent."""

    fleet: Connection
    host: Connection


def families(health: Health, connections: Connections) -> list[Family]:
    """Return the figures of a device; `health` has every figure of its instances."""
    return [*_of_the_device(health, connections), *_of_instances(health), *_of_components(health.instances)]


def _of_the_device(health: Health, connections: Connections) -> Iterator[Family]:
    def one(name: str, kind: str, text: str, value: float, *labels: tuple[str, str]) -> Family:
        family = Family(f"wasmfleet_{name}", kind, text)
        family.add(value, *labels)
        return family

    yield _agent_up(1)
    versions = health.versions
    labels = (("version", versions.agent), ("host_version", versions.host), ("engine", versions.engine))
    yield one("agent_info", "gauge", "Versions of agent, host and engine.", 1, *labels)
    yield one("host_up", "gauge", "1 while the host runs.", connections.host.connected)
    yield one("fleet_connected", "gauge", "1 while the device is connected to its fleet.", connections.fleet.connected)
    yield one("agent_problems", "gauge", "Problems that the device reports.", len(health.problems))
    yield one("assignment_accepted", "gauge", "Version of the newest assignment that was accepted.", health.accepted)
    yield one("assignment_committed", "gauge", "Version of the newest assignment that is committed.", health.committed)
    written = health.resources.written_bytes
    yield one("disk_written_bytes", "counter", "Bytes that agent and host wrote since the agent started.", written)
    if (readings := health.readings) is not None:
        yield one("readings_waiting", "gauge", "Messages of components that wait for the server.", readings.waiting)
        size = readings.waiting_bytes
        yield one("readings_waiting_bytes", "gauge", "Bytes of the messages that wait for the server.", size)
        yield one("readings_oldest_seconds", "gauge", "Age of the oldest message that waits.", readings.oldest_s)
        yield one(
            "readings_dropped", "counter", "Messages given up for want of room or for their age.", readings.dropped
        )
        yield one("readings_refused", "counter", "Messages not taken since the agent started.", readings.refused)


def _of_instances(health: Health) -> Iterator[Family]:
    info = Family("wasmfleet_instance_info", "gauge", "Component, version and state of an instance.")
    calls = Family("wasmfleet_instance_calls", "counter", "Calls by their end.")
    durations = Family("wasmfleet_instance_call_duration_seconds", "histogram", "Time of calls in the component.")
    rows = {name: Family(f"wasmfleet_instance_{name}", kind, text) for name, (kind, text, _) in _OF_AN_INSTANCE.items()}
    for each in health.instances:
        name = ("instance_name", each.instance)
        component, version = _target(each.target)
        info.add(1, name, ("component", component), ("version", version), ("state", each.state.value))
        for outcome, count in sorted(each.calls.items()):
            calls.add(count, name, ("outcome", outcome))
        if each.local and len(each.local.durations) == len(LATENCY_BOUNDS_MS) + 1:
            bounds = [bound / 1000 for bound in LATENCY_BOUNDS_MS]
            durations.add_histogram(bounds, each.local.durations, each.local.durations_us / 1e6, name)
        for row, (_, _, figure) in _OF_AN_INSTANCE.items():
            rows[row].add(figure(each), name)
    yield from (info, calls, durations, *rows.values())


def _swaps(figure: InstanceHealth) -> int:
    return figure.local.swaps if figure.local else 0


def _swap_s(figure: InstanceHealth) -> float:
    return figure.local.swap_ms / 1000 if figure.local else 0.0


_OF_AN_INSTANCE: Final[Mapping[str, tuple[str, str, Callable[[InstanceHealth], float]]]] = {
    "errors": ("counter", "Answers with a status of 500 and above.", lambda each: each.errors),
    "restarts": ("counter", "Restarts after a crash, or on demand.", lambda each: each.restarts),
    "denials": ("counter", "Calls to the host that no grant allowed.", lambda each: each.denials),
    "dropped_log_lines": ("counter", "Log lines over the limit.", lambda each: each.dropped_lines),
    "requests_sent": ("counter", "Requests that the component sent.", lambda each: each.outgoing),
    "cpu_seconds": ("counter", "Processor time of calls.", lambda each: each.cpu_ms / 1000),
    "memory_bytes": ("gauge", "Private memory of its workers.", lambda each: each.memory_bytes),
    "workers": ("gauge", "Workers that run.", lambda each: each.workers),
    "written_today_bytes": ("gauge", "Bytes written to its data today (UTC).", lambda each: each.written_bytes),
    "swaps": ("counter", "Changes of its version since the host started.", _swaps),
    "swap_seconds": ("counter", "Time that these took to hand over.", _swap_s),
}
"""Figures of each instance with one value: kind, what it is, and where it comes from."""


def _target(path: str) -> tuple[str, str]:
    try:
        target = TargetName.from_path(path)
    except BadNameError:
        return path, ""
    return target.component, target.version


def _of_components(instances: Iterable[InstanceHealth]) -> Iterator[Family]:
    """Return the figures of components; a name that has another kind in an instance before is left out."""
    found: dict[str, Family] = {}
    left_out = Family("wasmfleet_component_series_left_out", "gauge", "Series whose name is of another kind elsewhere.")
    for each in instances:
        left = 0
        for metric in each.metrics or ():
            text = f"{metric.kind.capitalize()} of a component."
            family = found.setdefault(metric.name, Family(PREFIX + metric.name, metric.kind, text))
            if family.kind != metric.kind or metric.flaw:
                left += 1
            else:
                _add(family, metric, each.instance)
        if left:
            left_out.add(left, ("instance_name", each.instance))
    yield left_out
    yield from (family for _, family in sorted(found.items()))


def _add(family: Family, metric: Metric, instance: str) -> None:
    labels = (("instance_name", instance), *metric.labels.items())
    if metric.kind != "histogram":
        family.add(metric.value, *labels)
    elif len(metric.buckets) == len(BOUNDS) + 1:
        family.add_histogram(BOUNDS, metric.buckets, metric.value, *labels)


class MetricsSocket:
    """Local socket on which the device's figures are read: `GET /metrics` over HTTP, for those in its group."""

    name = "metrics"

    def __init__(self, path: Path, health: Callable[[], Awaitable[Health]], connections: Connections) -> None:
        self._path = path
        self._health = health
        self._connections = connections
        self._lock = asyncio.Lock()
        self._newest: tuple[float, list[Family]] = (-_AGE_S, [])
        self._clients = 0

    async def run(self) -> None:
        """Answer, until cancelled; without a place for the socket, wait."""
        try:
            sock = self._listen()
        except OSError as error:
            log.warning("no figures at %s: %s", self._path, error.strerror or error)
            await asyncio.Event().wait()
            return
        server = await asyncio.start_unix_server(self._answer, sock=sock, limit=_HEAD_MAX_BYTES)
        try:
            await server.serve_forever()
        finally:
            server.close()
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _listen(self) -> socket.socket:
        """Listen in place of a socket that an agent before left. Raises `OSError`."""
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(self._path.lstat().st_mode):
                self._path.unlink()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        directory = -1
        try:
            directory = os.open(self._path.parent, os.O_PATH | os.O_CLOEXEC)
            sock.bind(f"/proc/self/fd/{directory}/{self._path.name}")  # a path of any length
            self._path.chmod(0o660)
            sock.listen(_CLIENTS_MAX)
        except BaseException:
            sock.close()
            raise
        finally:
            if directory >= 0:
                os.close(directory)
        return sock

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            async with asyncio.timeout(_CLIENT_S):
                status, kind, body = await self._reply(reader)
                data = body.encode()
                head = (
                    f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: {kind}\r\n"
                    f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
                )
                writer.write(head.encode() + data)
                await writer.drain()
        except (OSError, TimeoutError):
            pass  # a client that went away, or reads nothing
        finally:
            self._clients -= 1
            writer.close()

    async def _reply(self, reader: asyncio.StreamReader) -> tuple[int, str, str]:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return 400, _TEXT, ""
        if self._clients > _CLIENTS_MAX:  # said now: closed with something unread, the answer would be lost
            return 503, _TEXT, ""
        method, _, rest = head.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if path != "/metrics":
            return 404, _TEXT, ""
        if method != "GET":
            return 405, _TEXT, ""
        openmetrics = _OPENMETRICS in head.lower()
        kind = f"{_OPENMETRICS}; version=1.0.0; charset=utf-8" if openmetrics else _TEXT
        return 200, kind, text(await self._families(), openmetrics=openmetrics)

    async def _families(self) -> list[Family]:
        async with self._lock:
            now = asyncio.get_running_loop().time()
            if now - self._newest[0] >= _AGE_S:
                self._newest = now, families(await self._health(), self._connections)
            return self._newest[1]


_REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    503: "Service Unavailable",
}


class NoAnswerError(Exception):
    """The agent does not answer on its socket; the message says why."""


def fetch(path: Path, *, openmetrics: bool = False) -> str:
    """Return the figures that the agent gives on its socket. Raises `NoAnswerError`."""
    accept = f"Accept: {_OPENMETRICS}\r\n" if openmetrics else ""
    directory = -1
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
            sock.settimeout(_CLIENT_S)
            directory = os.open(path.parent, os.O_PATH | os.O_CLOEXEC)
            sock.connect(f"/proc/self/fd/{directory}/{path.name}")
            sock.sendall(f"GET /metrics HTTP/1.1\r\nHost: device\r\n{accept}\r\n".encode())
            with sock.makefile("rb") as file:
                answer = file.read(BODY_MAX_BYTES)
    except OSError as error:
        raise NoAnswerError(f"the agent does not answer at {path}: {error.strerror or error}") from error
    finally:
        if directory >= 0:
            os.close(directory)
    head, _, body = answer.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        said = head.partition(b"\r\n")[0].decode(errors="replace")
        raise NoAnswerError(f"the agent at {path} answers {said[:80]!r}")
    return body.decode()
