"""Figures of the server for Prometheus: https://prometheus.io/docs/specs/om/open_metrics_spec/.

Names, units and types keep to the conventions of OpenMetrics; `deploy/observability` has alerts and a dashboard over
them. No figure has a device's or an operator's name, so that their number does not grow with the fleet; of components
and of versions of the agent the most frequent are shown, and the others together.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import prometheus_client
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from fleet.protocol.codes import AlertKind
from fleet.protocol.names import BadNameError, TargetName
from fleet.server.facts import health_of
from fleet.store.rows import DeviceRow
from fleet.store.store import Store

INSTANCES_MAX: Final = 200
"""Kinds of instances (component, version, state) that are shown."""

AGENTS_MAX: Final = 20
"""Versions of the agent that are shown."""

OTHER: Final = "other"
FRESH_S: Final = 15.0
"""Age of figures that are counted from every device's health, until they are counted again."""

_EXPIRING: Final = timedelta(days=7)
_Family = GaugeMetricFamily | CounterMetricFamily | InfoMetricFamily | HistogramMetricFamily
_Scope = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
_Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[_Scope, _Receive, _Send], Awaitable[None]]

prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


class Latencies:
    """Durations of the answers of both APIs, from the request's head to the answer's head."""

    def __init__(self, registry: prometheus_client.CollectorRegistry, monotonic: Callable[[], float]) -> None:
        self._monotonic = monotonic
        self._seen = prometheus_client.Histogram(
            "wasmfleet_http_request_duration_seconds",
            "Time until an answer began, by listener and status; a request that follows changes waits for them.",
            ("listener", "code"),
            buckets=(0.005, 0.02, 0.1, 0.5, 2, 10, 60),
            registry=registry,
        )

    def of(self, application: Application, listener: str) -> Application:
        """Return an ASGI application whose answers are counted as those of `listener`."""

        async def serve(scope: _Scope, receive: _Receive, send: _Send) -> None:
            if scope["type"] != "http":
                await application(scope, receive, send)
                return
            began = self._monotonic()

            async def note(message: MutableMapping[str, Any]) -> None:
                if message["type"] == "http.response.start":
                    self._seen.labels(listener, message["status"]).observe(self._monotonic() - began)
                await send(message)

            await application(scope, receive, note)

        return serve


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Sources of figures beside the store.

    Attributes:
        version: of the server.
        started_at: its start, UTC.
        connected: whether it is on its broker.
        messages: number of messages from devices, by kind, and of dropped ones, by reason.
        pending: messages that are not written yet.
        certificates: end of each certificate that the fleet stands on, by its name.
        roles: end of each TUF role, by its name.
        ahead: number of devices with newer assignments than the server.
    """

    version: str
    started_at: datetime
    connected: Callable[[], bool]
    messages: Counter[str]
    pending: Callable[[], int]
    certificates: Callable[[], dict[str, datetime]]
    roles: Callable[[], dict[str, datetime]]
    ahead: Callable[[], int]


class Metrics:
    """Figures of the server, as text.

    Attributes:
        latencies: counts the answers of the APIs.
    """

    def __init__(
        self, *, store: Store, figures: Figures, clock: Callable[[], datetime], monotonic: Callable[[], float]
    ) -> None:
        registry = self._registry = prometheus_client.CollectorRegistry()
        self.latencies = Latencies(registry, monotonic)
        prometheus_client.ProcessCollector(registry=registry)
        registry.register(_Fleet(store, figures, clock, monotonic))

    def text(self, accept: str) -> tuple[bytes, str]:
        """Return the figures and their media type: OpenMetrics where `accept` asks for it, else Prometheus' text."""
        encode, kind = choose_encoder(accept)
        return encode(self._registry), kind


class _Fleet(Collector):
    """Figures that are counted in the store at each scrape."""

    def __init__(
        self, store: Store, figures: Figures, clock: Callable[[], datetime], monotonic: Callable[[], float]
    ) -> None:
        self._store, self._figures, self._clock, self._monotonic = store, figures, clock, monotonic
        self._counted_s = float("-inf")
        self._instances: Counter[tuple[str, ...]] = Counter()
        self._agents: Counter[tuple[str, ...]] = Counter()

    def describe(self) -> Iterable[_Family]:
        """Name no figures beforehand: their names do not collide with others."""
        return ()

    def collect(self) -> Iterator[_Family]:
        """Count."""
        yield InfoMetricFamily("wasmfleet_build", "Version of the server.", {"version": self._figures.version})
        yield _one("wasmfleet_start_time_seconds", "Start of the server.", self._figures.started_at.timestamp())
        yield from self._devices()
        yield from self._rollouts()
        yield from self._trust()
        yield from self._messages()

    def _devices(self) -> Iterator[_Family]:
        self._count()
        devices, online = self._store.devices.count()
        alerts = Counter(each.kind for each in self._store.devices.alerts(now=self._clock().timestamp()))
        expiring = self._store.access.count_expiring(before=(self._clock() + _EXPIRING).timestamp())
        yield _one("wasmfleet_devices", "Devices that are enrolled.", devices)
        yield _one("wasmfleet_devices_online", "Devices that are online.", online)
        behind = len(self._store.delivery.behind())
        yield _one("wasmfleet_devices_behind", "Devices that have not accepted their newest assignment.", behind)
        ahead = self._figures.ahead()
        yield _one("wasmfleet_devices_ahead", "Devices with newer assignments than the server's.", ahead)
        yield _each(
            "wasmfleet_device_agents",
            "Devices by version of their agent.",
            ("version",),
            _most(self._agents, AGENTS_MAX),
        )
        yield _each(
            "wasmfleet_device_alerts",
            "Devices with a security event, by kind.",
            ("kind",),
            [((str(kind),), alerts[kind]) for kind in AlertKind],
        )
        yield _one("wasmfleet_device_certificates_expiring", "Devices whose certificate ends in 7 days.", expiring)
        yield _each(
            "wasmfleet_instances",
            "Instances by component, version and state, as devices said last.",
            ("component", "version", "state"),
            _most(self._instances, INSTANCES_MAX),
        )

    def _count(self) -> None:
        """Count what every device's health says, unless that was done a moment ago."""
        now_s = self._monotonic()
        if now_s - self._counted_s < FRESH_S:
            return
        self._counted_s = now_s
        self._instances, self._agents = Counter(), Counter()
        for row in self._store.devices.all():
            if not row.revoked:
                self._agents[(row.versions.agent or OTHER,)] += 1
                self._instances.update(_instances(row))

    def _rollouts(self) -> Iterator[_Family]:
        states = self._store.rollouts.states()
        yield _each(
            "wasmfleet_rollouts",
            "Rollouts by state.",
            ("state",),
            [((state,), number) for state, number in states.items()],
        )
        outcomes: Counter[str] = Counter()
        for row in self._store.rollouts.open():
            outcomes.update(self._store.rollouts.counts(row.number))
        yield _each(
            "wasmfleet_rollout_devices",
            "Devices of open rollouts by outcome.",
            ("outcome",),
            [((outcome,), number) for outcome, number in sorted(outcomes.items())],
        )
        codes = self._store.rollouts.failures(after=(self._clock() - timedelta(days=1)).timestamp())
        yield _each(
            "wasmfleet_failed_devices",
            "Devices on which a deployment failed within a day, by code.",
            ("code",),
            [((code,), number) for code, number in codes.items()],
        )
        yield _one(
            "wasmfleet_catch_up_queues",
            "Rollouts that succeeded and have devices to come.",
            len(self._store.rollouts.queues()),
        )
        yield _one("wasmfleet_freezes", "Freezes in force.", len(self._store.rollouts.freezes()))

    def _trust(self) -> Iterator[_Family]:
        for name, words, label, ends in (
            ("certificate", "End of a certificate of the fleet.", "certificate", self._figures.certificates()),
            ("role", "End of a TUF role.", "role", self._figures.roles()),
        ):
            yield _each(
                f"wasmfleet_{name}_expiry_timestamp_seconds",
                words,
                (label,),
                [((of,), end.timestamp()) for of, end in sorted(ends.items())],
            )

    def _messages(self) -> Iterator[_Family]:
        messages = CounterMetricFamily("wasmfleet_messages", "Messages from devices by kind.", labels=("kind",))
        for kind, number in sorted(self._figures.messages.items()):
            messages.add_metric((kind,), number)
        yield messages
        yield _one("wasmfleet_messages_pending", "Messages that are not written yet.", self._figures.pending())
        yield _one("wasmfleet_broker_connected", "Whether the server is on its broker.", int(self._figures.connected()))


def _instances(row: DeviceRow) -> Iterator[tuple[str, ...]]:
    health = health_of(row)
    for each in () if health is None else health.instances:
        try:
            name = TargetName.from_path(each.target)
        except BadNameError:
            continue
        yield name.component, name.version, str(each.state)


def _most(counts: Counter[tuple[str, ...]], most: int) -> list[tuple[tuple[str, ...], float]]:
    """Return the most frequent, and all others as one."""
    shown: list[tuple[tuple[str, ...], float]] = [*counts.most_common(most)]
    left = counts.total() - sum(int(number) for _, number in shown)
    if left:
        shown.append((tuple(OTHER for _ in shown[0][0]), left))
    return shown


def _one(name: str, words: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, words, value=value)


def _each(
    name: str, words: str, labels: tuple[str, ...], samples: Iterable[tuple[tuple[str, ...], float]]
) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, words, labels=labels)
    for values, value in samples:
        family.add_metric(values, value)
    return family
