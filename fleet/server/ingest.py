"""Messages from devices: decoded strictly, written in batches, acknowledged only when on disk.

Every handler is idempotent: a report is identified by device, boot and sequence; of health only the newest counts;
hello and state overwrite. Only a signed report decides what became of a rollout on a device: hello and health that
speak of an outcome make the server ask for it (`fleet.server.check_ins`).

A message that is not of the protocol, or speaks for another device than its topic, is counted and dropped: the broker
binds topics to certificates, and the sender is checked again here. What goes over a device's budget is dropped before
it is decoded (`fleet.server.device_budget`). A bad message loses itself alone: when decoding or writing it fails, its
changes are undone, it is counted for its device and logged once, and the rest of its batch is kept.
"""

import asyncio
import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Final

from msgspec.structs import replace

from fleet.protocol import bounds, topics, wire
from fleet.protocol.codes import OPEN_STATES, InstanceState, Outcome, Phase, RejectCode, RolloutState
from fleet.protocol.messages import Ack, Health, Hello, Readings, ReadingsAck, Report, State
from fleet.protocol.topics import Topic, Up
from fleet.protocol.wire import Message
from fleet.rollout.model import OPEN, Expected, Member, Observation, observe, returned, wants
from fleet.server.check_ins import CheckIns
from fleet.server.device_budget import DeviceBudget
from fleet.server.director import Director, items_of
from fleet.server.rollout_controller import RolloutController
from fleet.store.rows import Extra, ReportRow, RolloutRow
from fleet.store.sqlite import RolledBackError
from fleet.store.store import ChangeSignal, Store
from signing.device_statements import DeviceVerifier, is_signed, unverified
from signing.errors import Rejected

log = logging.getLogger(__name__)
BATCH_S: Final = 0.02
BATCH_MAX: Final = 2000
BATCH_MAX_BYTES: Final = 8 * bounds.MIB
EARS_MAX: Final = 10_000
BAD_S: Final = 3600.0
"""Time after its last bad message during which the status names a device."""

_NAMED_MAX: Final = 5
_ITS_OWN: Final = frozenset({"forged", "malformed", "foreign"})
"""Reasons that are a device's own fault and count against it; a fault of the server's does not."""

_PHASES: Final = frozenset(phase.value for phase in Phase)
_ENDED: Final = frozenset({Phase.COMMITTED, Phase.FAILED, Phase.ROLLED_BACK})
_LATER_MAX: Final = 50
"""Later reports about a rollout that are read when one comes late; a device makes a handful."""

_EXPECTING: Final = OPEN_STATES | {RolloutState.SUCCEEDED}
"""States of a rollout whose undecided devices are asked: those of any other are offered something else by now."""

_OF_A_DEVICE: Final = (Hello, State, Health, Report, Readings)
_KINDS: Final[dict[Up, type[Message]]] = {
    Up.HELLO: Hello,
    Up.STATE: State,
    Up.HEALTH: Health,
    Up.REPORT: Report,
    Up.READINGS: Readings,
}


class Ingest:
    """Takes in the messages of devices. All methods run on the loop.

    Attributes:
        counts: messages by kind, and those that were dropped by reason.
        bad: messages that are none of the protocol, by device.
        dropped: those and what went over the budget, by device.
    """

    def __init__(
        self,
        *,
        store: Store,
        director: Director,
        conductor: RolloutController,
        check_ins: CheckIns,
        watch: ChangeSignal,
        budget: DeviceBudget,
        clock: Callable[[], datetime],
    ) -> None:
        self._budget = budget
        self._store, self._director, self._conductor, self._watch = store, director, conductor, watch
        self._clock = clock
        self._check_ins = check_ins
        self._unproven: dict[str, None] = {}
        self._pending: list[tuple[Message, bytes]] = []
        self._pending_bytes = 0
        self._timer: asyncio.TimerHandle | None = None
        self._ears: dict[
            str, DeviceVerifier
        ] = {}  # a device's key never changes: renewing keeps it, and another is another device
        self._signing: set[str] = set()
        self._new_signing: dict[str, None] = {}  # devices of `_signing` of which the store does not know it yet
        self._rollouts: dict[str, RolloutRow | None] = {}  # by the name that reports of one batch use
        self._members: dict[tuple[int, str], tuple[Member, Extra]] = {}  # changed by reports of one batch
        self._moved: set[int] = set()  # rollouts whose devices went on by reports of one batch
        self._readings: dict[str, ReadingsAck] = {}  # answers to devices that brought readings in one batch
        self._seen: dict[str, None] = {}  # devices that reported in one batch
        self.counts: Counter[str] = Counter()
        self.bad: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._bad_at: dict[str, float] = {}
        self._logged: set[tuple[str, str]] = set()

    @property
    def pending(self) -> int:
        """Number of messages that are not written yet."""
        return len(self._pending)

    def on_message(self, topic: str, payload: bytes) -> None:
        """Take one message; it is written with the next batch. Raise nothing, whatever came."""
        device = topics.sender(topic)
        try:
            channel = _channel(topic)
            if channel is None:
                self._stray(topic, device, payload)
            elif not self._budget.admit(device, channel, len(payload)):
                self.counts["throttled"] += 1
                self.dropped[device] += 1
            elif payload:  # an empty one says nothing, and is how a retained message is cleared
                self._take(device, channel, payload)
        except Rejected as error:
            self._drop("forged", device, f"a report: {error}")
        except (ValueError, wire.WireError) as error:
            self._drop("malformed", device, f"a message on {topic[:200]!r}: {error}")
        except Exception as error:  # noqa: BLE001 - logged with its traceback; no message stops the others
            self._drop("failed", device, f"a message on {topic[:200]!r}", error)

    def _stray(self, topic: str, device: str, payload: bytes) -> None:
        """Drop a message on a topic that the protocol does not have."""
        if device and not payload:  # nothing is retained: an echo of the clearing, most likely
            self._budget.admit(device, Up.STATE, 0)
            return
        if device:
            self._budget.stray(device, topic)
        self._drop("malformed", device, f"a message on {topic[:200]!r}, which is not a topic of this protocol")

    def _take(self, device: str, channel: Up, payload: bytes) -> None:
        kind = _KINDS[channel]
        body = self._heard(device, payload) if kind is Report else payload
        message = wire.decode(kind, body)
        if _speaker(message) != device:
            self._drop("foreign", device, f"a {channel} that speaks for another device")
            return
        if isinstance(message, Hello):
            self._budget.greet(message)
        self.counts[str(channel)] += 1
        self._pending.append((message, payload))
        self._pending_bytes += len(payload)
        if len(self._pending) >= BATCH_MAX or self._pending_bytes >= BATCH_MAX_BYTES:
            self.flush()
        else:
            self._flush_soon()

    def _flush_soon(self) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(BATCH_S, self.flush)

    def problems(self) -> list[str]:
        """Devices whose messages were dropped within the last hour, in one sentence."""
        since = self._clock().timestamp() - BAD_S
        recent = sorted(device for device, at in self._bad_at.items() if at > since)
        if not recent:
            return []
        some = ", ".join(f"{device} ({self.bad[device]})" for device in recent[:_NAMED_MAX])
        return [f"messages of {len(recent)} devices cannot be taken and are dropped, the server's log says why: {some}"]

    def _drop(self, reason: str, device: str, what: str, error: Exception | None = None) -> None:
        """Count a dropped message for its device, and log the first of a kind: no device fills the log."""
        self.counts[reason] += 1
        if len(self.bad) >= EARS_MAX and device not in self.bad:
            self.bad.clear()
            self.dropped.clear()
            self._bad_at.clear()
            self._logged.clear()
        self.bad[device] += 1
        self.dropped[device] += 1
        if reason in _ITS_OWN:
            self._budget.reject(device)
        if device:
            self._bad_at[device] = self._clock().timestamp()
        first = (device, reason) not in self._logged
        self._logged.add((device, reason))
        level = logging.WARNING if first else logging.DEBUG
        log.log(level, "dropped from %s: %s", device or "nobody", what, exc_info=error)

    @contextlib.contextmanager
    def _alone(self, device: str, what: str) -> Iterator[None]:
        """Write what one message says: if that fails, nothing of it is kept, and the rest of its batch is.

        Raises:
            RolledBackError: the whole batch is gone.
        """
        try:
            with self._store.savepoint():
                yield
        except RolledBackError:
            raise
        except Exception as error:  # noqa: BLE001 - logged with its traceback; no message stops the others
            self._members.clear()
            self._drop("failed", device, what, error)

    def _heard(self, device: str, payload: bytes) -> bytes:
        """Return the report that this device signed; raises `Rejected` for anybody else's."""
        if not is_signed(payload):
            if device in self._signing or self._store.devices.signs(device):
                raise Rejected(RejectCode.UNSIGNED, "this device signs its reports, and this one is not signed")
            return payload
        ear = self._ears.get(device)
        if ear is None:
            certificate = self._store.access.newest_certificate(device)
            if certificate is None:
                raise Rejected(RejectCode.UNSIGNED, "no certificate was ever given to this device")
            if len(self._ears) >= EARS_MAX:
                self._ears.clear()
                self._signing &= self._new_signing.keys()
            ear = self._ears[device] = DeviceVerifier(certificate.pem.encode())
        report = ear.verify(payload)
        if device not in self._signing:
            self._signing.add(device)
            self._new_signing[device] = None
            self._flush_soon()
        return report

    def flush(self) -> None:
        """Write what came, in one transaction, then answer and let the rollouts look."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        batch, self._pending, self._pending_bytes = self._pending, [], 0
        if not batch and not self._new_signing:
            return
        self._unproven.clear()
        try:
            acks = self._store_batch(batch)
        except Exception:
            # nothing was acknowledged: devices keep their reports and send them again
            log.exception("%d messages could not be stored", len(batch))
            self.counts["failed"] += len(batch)
            return
        # rollouts and followers are concerned by what was written, whatever becomes of the answers
        self._conductor.wake()
        self._watch.changed()
        for device, sequence in acks.items():
            with self._answering(device, "reports, which were stored and cannot be acknowledged"):
                self._director.acknowledge(device, Ack(sequence=sequence))
        for device, taken in self._readings.items():
            with self._answering(device, "readings, which were stored and cannot be acknowledged"):
                self._director.acknowledge_readings(device, taken)
        for message, _ in batch:
            if isinstance(message, Hello):
                with self._answering(message.device, "a hello, which was stored and cannot be answered"):
                    self._answer(message)
        for device in self._unproven:
            with self._answering(device, "a state, of which no proof can be asked for"):
                self._check_ins.ask(device)

    def _store_batch(self, batch: list[tuple[Message, bytes]]) -> dict[str, int]:
        """Write a batch in one transaction, and with it which devices sign; return what to acknowledge."""
        answers: dict[str, int | None] = {}
        acks: dict[str, int] = {}
        new_signing = list(self._new_signing)
        self._rollouts.clear()
        self._members.clear()
        self._moved.clear()
        self._readings.clear()
        self._seen.clear()
        with self._store.atomic():
            for device in new_signing:
                self._store.devices.set_signs(device)
            self._write(batch, answers)
            self._store.devices.touch(self._seen, self._clock().timestamp())
            for number in self._moved:
                self._store.rollouts.moved(number)
            acked = self._store.delivery.acked(answers)
            for device, again in answers.items():
                with self._alone(device, "an acknowledgement"):
                    acks[device] = self._store.delivery.acknowledge(device, acked.get(device, 0), again=again)
        for device in new_signing:
            del self._new_signing[device]
        return acks

    @contextlib.contextmanager
    def _answering(self, device: str, what: str) -> Iterator[None]:
        """Answer one device: if that fails, the others are answered."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - logged with its traceback
            self._drop("failed", device, what, error)

    def _write(self, batch: list[tuple[Message, bytes]], answers: dict[str, int | None]) -> None:
        now = self._clock().timestamp()
        newest: dict[str, tuple[Health, bytes]] = {}
        admitted = self._store.devices.online({_speaker(message) for message, _ in batch})
        for message, raw in batch:
            if _speaker(message) not in admitted:  # unknown, or shut out a moment ago
                self.counts["not-admitted"] += 1
                continue
            if not isinstance(message, State) or message.online:
                self._conductor.heard(_speaker(message))
            if isinstance(message, Health):
                newest[message.device] = (message, raw)
                continue
            with self._alone(_speaker(message), f"a {wire.plain_name(type(message))}"):
                self._write_one(message, raw, answers, now)
        self._hear_healths(list(newest.values()), now)

    def _write_one(self, message: Message, raw: bytes, answers: dict[str, int | None], now: float) -> None:
        match message:
            case Report():
                row = ReportRow(
                    device=message.device,
                    boot_id=message.boot_id,
                    sequence=message.sequence,
                    at=now,
                    rollout=message.rollout,
                    raw=raw,
                )
                if self._store.delivery.add_report(row):
                    self._hear_report(message, now, signed=is_signed(raw))
                    answers.setdefault(message.device, None)
                else:
                    answers[message.device] = max(answers.get(message.device) or 0, message.sequence)
            case Hello():
                self._store.devices.hear_hello(message, now)
                self._director.heard(message.device)
                self._doubt_undecided({message.device: message.committed})
            case State():
                self._hear_state(message, now)
            case Readings():
                position = self._store.readings.add(message, now=now)
                self._readings[message.device] = ReadingsAck(epoch=message.epoch, position=position)
            case _:
                raise AssertionError(type(message))

    def _hear_state(self, state: State, now: float) -> None:
        if self._store.devices.hear_state(state, now):
            kind = "online" if state.online else "offline"
            words = "came online" if state.online else "went offline"
            self._store.devices.note(state.device, kind, words, now=now)

    def _hear_healths(self, messages: list[tuple[Health, bytes]], now: float) -> None:
        """Write the newest health of some devices at once; where that fails, each alone."""
        if len(messages) > 1:
            try:
                with self._store.savepoint():
                    self._hear_health(messages, now)
            except RolledBackError:
                raise
            except Exception:  # whose message it is shows below, and is logged there
                log.debug("a batch of health is written one by one", exc_info=True)
            else:
                return
        for health, raw in messages:
            with self._alone(health.device, "a health"):
                self._hear_health([(health, raw)], now)

    def _hear_health(self, messages: list[tuple[Health, bytes]], now: float) -> None:
        self._store.devices.hear_health(messages, now)
        self._doubt_undecided({health.device: health.committed for health, _ in messages})
        for health, _ in messages:
            if self._director.heard(health.device):
                self._conductor.touch([health.device])
            fallen = {
                (each.instance, each.target) for each in health.instances if each.state is InstanceState.QUARANTINED
            }
            if fallen:
                self._doubt_succeeded(health.device, fallen)

    def _hear_report(self, report: Report, now: float, *, signed: bool) -> None:
        self._seen[report.device] = None
        if report.phase in _ENDED:
            if self._is_overtaken(report):
                return
            if signed:
                self._check_ins.answered(report.device)
        for rollout in self._meant(report):
            key = (rollout.number, report.device)
            found = self._members.get(key) or self._store.rollouts.member(*key)
            if found is not None and rollout.state in _EXPECTING:
                self._apply(report, rollout, *found, signed=signed)
        if signed and report.phase is Phase.COMMITTED:
            self._hear_return(report, now)

    def _apply(self, report: Report, rollout: RolloutRow, member: Member, extra: Extra, *, signed: bool) -> None:
        """Apply a report to a device's progress in a rollout."""
        if rollout.state is RolloutState.SUCCEEDED and member.outcome is Outcome.SUCCEEDED:
            return
        seen = self._observation(report, member, signed=signed)
        after = observe(member, seen, self._expected(rollout, extra, report))
        if after is member:
            if report.phase is Phase.COMMITTED and member.outcome in OPEN:
                self._unproven[report.device] = None  # of an assignment that is not this one's
            return
        timings, now = {**extra.timings_ms, **_timings(report)}, self._clock().timestamp()
        log = _last_lines(report.log) or extra.log
        self._store.rollouts.hear(rollout.number, after, timings_ms=timings, log=log, now=now)
        self._members[rollout.number, report.device] = (after, replace(extra, timings_ms=timings, log=log))
        self._moved.add(rollout.number)
        if wants(rollout.state, after) is not wants(rollout.state, member):
            self._conductor.touch([report.device])

    def _observation(self, report: Report, member: Member, *, signed: bool) -> Observation:
        return Observation(
            at=self._conductor.steady(),
            sequence=report.sequence,
            phase=report.phase,
            signed=signed,
            attempt=report.attempt if report.rollout else member.attempt,
            assignment_sha256=report.assignment_sha256,
            manifest_sha256=report.manifest_sha256,
            generation=report.generation,
            code=report.code or "",
            message=report.message,
            running=report.running,
            progress=report.progress,
            exercised=report.exercised,
            undecided=report.undecided or "",
            tries_ended=report.tries_ended,
        )

    def _hear_return(self, report: Report, now: float) -> None:
        """Note that a device confirmed what it had before a rollout that ended."""
        going_back = self._store.rollouts.returning(report.device)
        row = self._store.delivery.assignment_of(report.device, report.assignment_sha256) if going_back else None
        if row is None:
            return
        for rollout in going_back:
            found = self._store.rollouts.member(rollout.number, report.device)
            item = next((each for each in items_of(row) if each.instance == rollout.instance), None)
            about = report.instance in {"", rollout.instance}
            if found is None or not about or (item is not None and item.rollout == rollout.id):
                continue
            manifest = "" if item is None else item.manifest_sha256
            seen = self._observation(report, found[0], signed=True)
            if not report.instance:  # the whole assignment is committed, and this part with it
                seen = replace(seen, manifest_sha256=manifest)
            after = returned(found[0], seen, Expected(frozenset({row.sha256}), manifest))
            if after is not found[0]:
                self._store.rollouts.set_members(rollout.number, [after], now=now)
                self._members.pop((rollout.number, report.device), None)

    def _meant(self, report: Report) -> list[RolloutRow]:
        """Return the rollouts that a report speaks of."""
        if report.rollout:
            if report.rollout not in self._rollouts:
                self._rollouts[report.rollout] = self._store.rollouts.get(report.rollout)
            row = self._rollouts[report.rollout]
            return [] if row is None else [row]
        undecided = self._store.rollouts.offered(report.device, undecided=True)
        if report.instance:  # a removal is no item, and so names no rollout
            return [row for row in undecided if row.instance == report.instance and row.value.target is None]
        if report.phase is Phase.COMMITTED:  # of the whole assignment, removals included
            return [row for row in undecided if row.value.target is None]
        if report.phase is not Phase.FAILED:
            return []
        refused = self._refused(report)
        found = []
        for row in undecided:
            member = self._store.rollouts.member(row.number, report.device)
            if member is not None and 0 < member[1].version <= refused:
                found.append(row)
        return found

    def _refused(self, report: Report) -> int:
        """Return the version of the assignment that was refused as a whole; 0 where that concerns no rollout.

        What a device refuses may be anybody's: only the newest envelope that this server signed, byte for byte, counts.
        A refusal for being too old says that the server is behind its devices, which `_greet` mends.
        """
        if not report.refused_sha256:
            return report.assignment  # an agent that does not say what it refused
        row = self._store.delivery.assignment(report.device)
        ours = row is not None and hashlib.sha256(row.envelope).hexdigest() == report.refused_sha256
        if row is None or not ours or report.code is RejectCode.ROLLBACK:
            self.counts["refused-foreign"] += 1
            return 0
        return row.version

    def _expected(self, rollout: RolloutRow, extra: Extra, report: Report) -> Expected:
        """Return what a commit of this rollout must carry: the assignment that the report names, if it offered it."""
        nothing = Expected(frozenset(), "")
        if report.phase is not Phase.COMMITTED or not report.assignment_sha256:
            return nothing
        row = self._store.delivery.assignment_of(report.device, report.assignment_sha256)
        if row is None:
            return nothing
        item = next((each for each in items_of(row) if each.instance == rollout.instance), None)
        if rollout.value.target is None:
            gone = item is None and 0 < extra.version <= row.version
            return Expected(frozenset({row.sha256}), "") if gone else nothing
        if item is None or item.rollout != rollout.id or item.target != rollout.value.target:
            return nothing
        return Expected(frozenset({row.sha256}), item.manifest_sha256)

    def _is_overtaken(self, report: Report) -> bool:
        """Tell whether a later report of the device about the same rollout and instance has decided already."""
        if not report.rollout:
            return False
        later = self._store.delivery.reports_after(
            report.device, report.sequence, rollout=report.rollout, limit=_LATER_MAX
        )
        for row in later:
            with contextlib.suppress(Rejected, wire.WireError):
                other = wire.decode(Report, unverified(row.raw))
                if other.phase in _ENDED and other.instance == report.instance:
                    return True
        return False

    def _doubt_succeeded(self, device: str, fallen: set[tuple[str, str]]) -> None:
        """Ask a device whose health shows in quarantine what an open rollout counts as succeeded."""
        for rollout, member in self._store.rollouts.overlays(device):
            if (rollout.instance, rollout.value.target) in fallen and member.outcome is Outcome.SUCCEEDED:
                self._unproven[device] = None

    def _doubt_undecided(self, committed: dict[str, int]) -> None:
        """Ask devices that have committed a whole assignment and have not signed what became of a part of it."""
        there = {device: version for device, version in committed.items() if version}
        for device, offers in (self._store.rollouts.undecided(there) if there else {}).items():
            for offer in offers:
                if 0 < offer.version <= there[device] and self._expects(offer.rollout):
                    self._unproven[device] = None

    def _expects(self, number: int) -> bool:
        """Tell whether reports about a rollout still count."""
        rollout = self._store.rollouts.get(str(number))
        return rollout is not None and rollout.state in _EXPECTING

    def _answer(self, hello: Hello) -> None:
        if self._store.devices.online([hello.device]):
            self._greet(hello)

    def _greet(self, hello: Hello) -> None:
        """Answer a device that connected: its assignment where it is behind or ahead, and that this is current."""
        if hello.readings:
            position = self._store.readings.position(hello.device, hello.readings)
            self._director.acknowledge_readings(hello.device, ReadingsAck(epoch=hello.readings, position=position))
        device = self._store.devices.get(hello.device)
        if device is not None and hello.acked > device.acked:
            log.warning("%s sent reports up to %s, %s are stored here", hello.device, hello.acked, device.acked)
            self._director.acknowledge(hello.device, Ack(sequence=device.acked, again=True))
        row = self._store.delivery.assignment(hello.device)
        if device is not None and self._director.is_ahead_of(device, row):
            log.warning("%s accepted version %s, which this server never signed", hello.device, hello.accepted)
            self._check_ins.ask(hello.device)  # after which the device polls, and shows its assignment
            return
        if row is not None and hello.accepted > row.version:  # beyond any honest director
            row = self._director.reconcile(hello.device)
        elif row is not None and hello.accepted < row.version:
            row, _ = self._director.prepare(hello.device)  # another director's key may have signed it
            if row is not None:
                self._director.publish_assignment(row)
        else:
            self._conductor.touch([hello.device])
        if row is not None:
            self._director.answer_nonce(hello.device, hello.nonce)


def _last_lines(log: tuple[str, ...]) -> tuple[str, ...]:
    """Return the last lines of an excerpt, for the member of a rollout; its report keeps the whole."""
    kept: list[str] = []
    size = 0
    for line in reversed(log[-bounds.LOG_LINES :]):
        size += len(line.encode())
        if size > bounds.LOG_MAX_BYTES:
            break
        kept.append(line)
    return tuple(reversed(kept))


def _timings(report: Report) -> dict[str, int]:
    """Return how long each phase took, ms, under names of phases only: every report adds to the same row."""
    return {name: spent for name, spent in report.timings_ms.items() if name in _PHASES}


def _channel(topic: str) -> Up | None:
    """Return the channel that a device wrote to; None where that is none of the protocol."""
    try:
        return Up(Topic.parse(topic).channel)
    except ValueError:
        return None


def _speaker(message: Message) -> str:
    assert isinstance(message, _OF_A_DEVICE)
    return message.device
