"""Uplink: sends the device's reports until the server has stored them, and its health regularly.

Reports are kept in the store. Each is sent when it is made, again after each reconnect, and again while it is not
acknowledged. The server recognises a report by its sequence, so that none counts twice.
"""

import asyncio
import contextlib
import random
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Protocol

import msgspec

from agent.host.ipc import host_api
from agent.link.host_client import HostClient, HostGoneError, HostRefusedError
from agent.report import device_info
from agent.update.problems import Problems
from agent.update.state import DeploymentState, DeviceContext
from agent.update.store import Database, Store
from fleet.component import wasi
from fleet.protocol import bounds, wire
from fleet.protocol.codes import Phase
from fleet.protocol.messages import Health, InstanceHealth, ReadingsHealth, Report, Versions
from fleet.protocol.metrics import Metric, in_summary
from fleet.protocol.topics import Up

AFTER_CHANGE_S: Final = 1.0
"""Delay of health after a change, so that the figures reflect it and further changes are sent together."""

RESEND_FIRST_S: Final = 30.0
RESEND_MAX_S: Final = 900.0
METRICS_MAX_BYTES: Final = 8 * bounds.KIB
"""Figures of components in one health message: an eighth of what fits."""

WINDOW: Final = 64
"""Maximum number of reports in flight."""


class Publisher(Protocol):
    """Connection to the broker (`agent.link.mqtt.MqttClient`)."""

    def publish(self, channel: Up, payload: bytes, *, retain: bool = False) -> bool:
        """Hand over a message; return false when there is no connection."""


class Signer(Protocol):
    """Signer of reports (`signing.device_statements.DeviceSigner`)."""

    def sign(self, payload: bytes) -> bytes:
        """Return the payload in a signed envelope."""


class Kept(Protocol):
    """Readings that wait for the server (`agent.report.readings.ReadingsUplink`)."""

    def health(self) -> ReadingsHealth:
        """Return their figures."""


@dataclass(frozen=True, slots=True)
class HealthSources:
    """Objects that health and versions are read from, without changing them; `directories`: that the owner offers."""

    host: HostClient
    state: DeploymentState
    problems: Problems
    readings: Kept | None = None
    directories: Collection[str] = ()


class Uplink:
    """Sender of reports and health."""

    name = "uplink"

    def __init__(
        self,
        *,
        device: DeviceContext,
        mqtt: Publisher,
        db: Database,
        signer: Signer,
        sources: HealthSources,
        health_s: float,
    ) -> None:
        """Prepare an uplink; health is sent every `health_s` seconds and after changes."""
        self._device = device
        self._mqtt = mqtt
        self._db = db
        self._host = sources.host
        self._state = sources.state
        self._problems = sources.problems
        self._readings = sources.readings
        self._offered = tuple(map(wasi.offered_directory, sources.directories))
        self._lossy: dict[str, str] = {}
        self._signer = signer
        self._health_s = health_s
        self._health_due = asyncio.Event()
        self._reports_due = asyncio.Event()
        self._sent = 0
        self._asked_again = False

    async def run(self) -> None:
        """Send reports and health, forever."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._send_reports())
            tasks.create_task(self._send_health())

    # Reports

    def saved(self, _report: Report | None = None) -> None:
        """Send a report that was just stored, and health AFTER_CHANGE_S later."""
        self._reports_due.set()
        asyncio.get_running_loop().call_later(AFTER_CHANGE_S, self._health_due.set)

    def reconnected(self) -> None:
        """Send every unacknowledged report again: those sent on an earlier connection may be lost."""
        self._sent = 0
        self._asked_again = False
        self._reports_due.set()

    async def acknowledge(self, sequence: int) -> None:
        """Mark every report up to `sequence` as stored by the server."""
        if await self._db(Store.acknowledge, sequence):
            self._reports_due.set()

    async def again(self, sequence: int) -> None:
        """Send the reports after `sequence` again, for a server that lost them.

        The request is not signed, so it is followed once for each connection.
        """
        if self._asked_again:
            return
        self._asked_again = True
        if await self._db(Store.unacknowledge, sequence):
            self._sent = 0
            self._reports_due.set()

    async def _send_reports(self) -> None:
        delay = RESEND_FIRST_S
        while True:
            self._reports_due.clear()
            pending = await self._db(Store.unacked, WINDOW)
            sent = self._sent
            for sequence, body in pending:
                if sequence > sent and self._mqtt.publish(Up.REPORT, self._signer.sign(body)):
                    self._sent = sequence
            if self._sent > sent:
                delay = RESEND_FIRST_S
            if not pending:
                await self._reports_due.wait()
                continue
            try:
                async with asyncio.timeout(delay):
                    await self._reports_due.wait()
            except TimeoutError:
                self._sent = 0
                delay = min(RESEND_MAX_S, delay * 2)

    # Health

    def changed(self) -> None:
        """Send health soon; changes until then are sent together."""
        self._health_due.set()

    async def _send_health(self) -> None:
        while True:
            with contextlib.suppress(TimeoutError):
                jitter = random.uniform(0.9, 1.1)  # noqa: S311 - jitter, not a secret
                async with asyncio.timeout(self._health_s * jitter):
                    await self._health_due.wait()
                    await asyncio.sleep(AFTER_CHANGE_S)
            self._health_due.clear()
            self._mqtt.publish(Up.HEALTH, self.encoded(await self.health()))

    def encoded(self, health: Health) -> bytes:
        """Return health as it is sent: with the figures of a newer host that this agent does not know, if they fit.

        Figures for the device's own metrics stay here; of components' own, as many as `for_server` lets go.
        """
        health = msgspec.structs.replace(health, instances=for_server(health.instances))
        plain = msgspec.json.decode(wire.encode(health))
        plain["instances"] = [self._host.relayed(each) for each in health.instances]
        whole = msgspec.json.encode(plain)
        if len(whole) <= Health.MAX_BYTES:
            return whole
        bare = (msgspec.structs.replace(each, metrics=msgspec.UNSET) for each in health.instances)
        return wire.encode(msgspec.structs.replace(health, instances=tuple(bare)))

    def versions(self) -> Versions:
        """Return the versions of the software on this device; the host's as it reported them last."""
        welcome = self._host.welcome
        if welcome is None:
            return device_info.versions()
        interfaces = (*welcome.interfaces, *self._offered) if welcome.interfaces else ()
        return device_info.versions(host=welcome.version, engine=welcome.engine, interfaces=interfaces)

    async def health(self) -> Health:
        """Return the health of device and instances as it is now."""
        figures: tuple[InstanceHealth, ...] = ()
        without_host: list[str] = []
        written = 0
        try:
            answer = await self._host.stats()
            figures, written = answer.instances, answer.written_bytes
            self._note_queues(figures)
        except (HostGoneError, HostRefusedError):
            why = await asyncio.to_thread(host_api.why_not, self._device.places.runtime)
            reason = f"; it did not start: {why}" if why else ""
            without_host = [self._host.mismatch or f"the host does not run, so no instance answers{reason}"]
        problems = [*without_host, *self._problems.texts(), *self._state.problems]
        resources = await asyncio.to_thread(
            device_info.device_resources, self._device.places.state, host_written_bytes=written
        )
        welcome = self._host.welcome
        return Health(
            device=self._device.device,
            boot_id=self._device.boot_id,
            at=datetime.now(UTC),
            accepted=await self._db(Store.counter, "accepted"),
            committed=await self._db(Store.counter, "committed"),
            versions=self.versions(),
            resources=resources,
            instances=tuple(self._with_phase(each) for each in figures),
            containment=welcome.containment if welcome is not None else {},
            host_runs_as=welcome.runs_as if welcome is not None else "",
            problems=tuple(problems),
            readings=None if self._readings is None else self._readings.health(),
            data={name: each.item.target for name, each in self._state.committed.items() if each.manifest.is_data},
        )

    def _note_queues(self, figures: tuple[InstanceHealth, ...]) -> None:
        """Keep a problem for each instance that has lost messages since the host started."""
        said = {each.instance: _lost(each) for each in figures}
        for instance in self._lossy.keys() | said.keys():
            if (text := said.get(instance, "")) == self._lossy.get(instance, ""):
                continue
            self._lossy[instance] = text
            if text:
                self._problems.set(f"messages for {instance}", text)
            else:
                self._problems.clear(f"messages for {instance}")
                del self._lossy[instance]

    def _with_phase(self, figure: InstanceHealth) -> InstanceHealth:
        """Add to the host's figures the instance's phase and manifest, which only the agent knows."""
        active = self._state.active.get(figure.instance)
        committed = self._state.committed.get(figure.instance)
        manifest = committed.item.manifest_sha256 if committed is not None else ""
        phase = Phase.IDLE
        if active is not None:
            phase = active.change.phase
            if active.change.item is not None and active.change.generation == figure.generation:
                manifest = active.change.item.manifest_sha256
        return msgspec.structs.replace(figure, phase=phase, manifest_sha256=manifest)


def _lost(figures: InstanceHealth) -> str:
    """Say that messages of the device's bus for an instance were lost; empty for none."""
    queue = figures.messages
    if queue is None or not (queue.dropped or queue.dead_letters):
        return ""
    return (
        f"{figures.instance}: {queue.dead_letters} messages from other components are dead letters, {queue.dropped} "
        "were dropped; its log names them"
    )


def for_server(instances: tuple[InstanceHealth, ...]) -> tuple[InstanceHealth, ...]:
    """Return figures as the server gets them: without buckets, and the first of each instance that fit its share."""
    share = METRICS_MAX_BYTES // max(1, sum(bool(each.metrics) for each in instances))
    return tuple(
        msgspec.structs.replace(
            each,
            local=msgspec.UNSET,
            metrics=(_first(in_summary(each.metrics), share) if each.metrics else ()) or msgspec.UNSET,
        )
        for each in instances
    )


def _first(metrics: tuple[Metric, ...], most_bytes: int) -> tuple[Metric, ...]:
    """Return the first that fit."""
    kept, size = [], 0
    for each in metrics:
        size += len(msgspec.json.encode(each)) + 1
        if size > most_bytes:
            break
        kept.append(each)
    return tuple(kept)
