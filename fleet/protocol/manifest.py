"""Signed form of a component's declaration: trigger, grants, limits, health, config, evidence; cron lines.

A manifest is what an author declares beside a component and a publisher's signature covers, in normalised form:
integers with units in their names, nothing optional left open. The target's signed metadata holds it
(`custom.manifest`); its sha256 is bound again in the assignment, the image's key and the device's report.
`fleet.component.component_toml` reads `component.toml`, the form that people write.

Evidence is what a publisher binds beside a component: provenance and bills of materials, each named by kind, sha256
and length (`custom.evidence`). Devices read none of it; operators ask it which devices run a package, and who built
it.

Cron lines have the five fields of POSIX crontab(5): minute 0-59, hour 0-23, day of month 1-31, month 1-12, day of
week 0-7 (0 and 7 are Sunday). A field is `*`, a number, a range `a-b`, a step `*/n` or `a-b/n`, or a list of these
with commas. When both days are restricted, either fits. Times are naive: wall-clock times of the device's zone.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final, Literal, TypeVar, assert_never

import msgspec

from fleet.protocol import (
    bounds,
    data_packages,
    directories,
    hardware,
    message_topics,
    metrics,
    names,
    outbound,
    pattern,
    wire,
)
from fleet.protocol.bounds import MIB, Count, Whole
from fleet.protocol.hardware import Hardware

CYCLONEDX: Final = "cyclonedx"
SPDX: Final = "spdx"
PROVENANCE: Final = "slsa-provenance"
SBOMS: Final = frozenset({CYCLONEDX, SPDX})

MAX_BYTES: Final = 16 * MIB
"""Largest evidence file, bytes."""

FILES_MAX: Final = 8
"""Most evidence files of one target."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """Reference to a file: `kind` is `cyclonedx`, `spdx`, `slsa-provenance`, or a later label, only passed on."""

    kind: str
    sha256: str
    length: Count


class BadEvidenceError(ValueError):
    """Evidence bound beside a target cannot be read."""


def convert_evidence(value: object) -> tuple[Evidence, ...]:
    """Read `custom.evidence` from decoded JSON, where None means no evidence.

    Raises:
        BadEvidenceError: not a list of files with kind, sha256 and length, or too many.
    """
    if value is None:
        return ()
    try:
        found = msgspec.convert(value, tuple[Evidence, ...])
        for each in found:
            names.check_label(each.kind, "kind")
            names.check_sha256(each.sha256)
    except (msgspec.ValidationError, names.BadNameError) as error:
        raise BadEvidenceError(f"evidence: {error}") from error
    if len(found) > FILES_MAX or any(not 0 < each.length <= MAX_BYTES for each in found):
        raise BadEvidenceError(f"evidence: at most {FILES_MAX} files of 1 to {MAX_BYTES} bytes are kept")
    return found


_FIELDS: Final = (("minute", 0, 59), ("hour", 0, 23), ("day of month", 1, 31), ("month", 1, 12), ("day of week", 0, 7))
_SEARCH: Final = timedelta(days=366 * 8 + 2)
_SUNDAY_TOO: Final = 7
_TEXT_MAX: Final = 200


class BadCronError(ValueError):
    """Not a cron line; the message names the field."""


@dataclass(frozen=True, slots=True)
class Cron:
    """Minutes, hours, days, months and weekdays (0 is Sunday) that match a cron line."""

    minutes: frozenset[int]
    hours: frozenset[int]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either_day: bool

    def next_after(self, moment: datetime) -> datetime | None:
        """Return the first full minute after `moment` that matches; None where none does, as on 30 February."""
        at = moment.replace(second=0, microsecond=0) + timedelta(minutes=1)
        end = at + _SEARCH
        while at < end:
            if at.month not in self.months or not self._day_fits(at):
                at = at.replace(hour=0, minute=0) + timedelta(days=1)
            elif at.hour not in self.hours:
                at = at.replace(minute=0) + timedelta(hours=1)
            elif at.minute not in self.minutes:
                at += timedelta(minutes=1)
            else:
                return at
        return None

    def _day_fits(self, at: datetime) -> bool:
        day, weekday = at.day in self.days, at.isoweekday() % 7 in self.weekdays
        return day or weekday if self.either_day else day and weekday


def parse(text: str) -> Cron:
    """Parse a cron line. Raises `BadCronError`."""
    words = text.split()
    if len(words) != len(_FIELDS) or len(text) > _TEXT_MAX:
        raise BadCronError(f"{text[:80]!r} has {len(words)} fields, expected are minute, hour, day, month, day of week")
    values = [_field(word, *field) for word, field in zip(words, _FIELDS, strict=True)]
    weekdays = frozenset(day % _SUNDAY_TOO for day in values[4])
    either = not words[2].startswith("*") and not words[4].startswith("*")
    return Cron(values[0], values[1], values[2], values[3], weekdays, either)


def check(text: str) -> str:
    """Return `text` if it is a cron line that matches some time. Raises `BadCronError`."""
    if parse(text).next_after(datetime(2000, 1, 1)) is None:  # noqa: DTZ001 - naive on purpose, see above
        raise BadCronError(f"{text!r} never matches: there is no such day")
    return text


def _field(word: str, what: str, least: int, most: int) -> frozenset[int]:
    found: set[int] = set()
    for part in word.split(","):
        span, slash, step = part.partition("/")
        first, dash, last = span.partition("-")
        numbers = [first, *([last] if dash else []), *([step] if slash else [])]
        if span == "*":
            numbers = [step] if slash else []
            start, end = least, most
        else:
            start, end = (int(first or -1), int(last or -1)) if _digits(first, last or first) else (-1, -1)
            end = end if dash else (most if slash else start)
        if not _digits(*numbers) or not least <= start <= end <= most or (slash and not int(step)):
            raise BadCronError(f"{word[:40]!r} is no {what}: {least} to {most}, as *, 5, 1-5, */10 or 1,15")
        found.update(range(start, end + 1, int(step) if slash else 1))
    return frozenset(found)


def _digits(*words: str) -> bool:
    return all(word.isascii() and word.isdigit() and len(word) < 4 for word in words)  # noqa: PLR2004


class Http(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="http"):
    """Called for each HTTP request."""


class Schedule(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="schedule"):
    """Called by the clock: `every_ms` after the last start, or by `cron` (five fields, the device's zone).

    Attributes:
        args: arguments of `wasi:cli/run`.
    """

    every_ms: Count | None = None
    cron: str | None = None
    args: tuple[str, ...] = ()


Full = Literal["refuse", "drop-oldest"]


class OnMessage(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True, tag="message"
):
    """Called for each message on the device's bus: `wasi:messaging/incoming-handler`.

    Attributes:
        topics: filters of the topics that it gets (`fleet.protocol.message_topics`), within `grants.subscribe`.
        full: what happens once its queue is full: senders wait, and are refused in the end, or the oldest is dropped.
    """

    topics: tuple[str, ...] = ()
    full: Full = "refuse"

    def __post_init__(self) -> None:
        """Refuse what are no filters. Raises `ValueError`."""
        _check_filters("topics", self.topics)


def _check_filters(name: str, filters: tuple[str, ...]) -> None:
    for each in filters:
        message_topics.check_filter(each)
    if len(filters) > message_topics.FILTERS_MAX:
        raise ValueError(f"{name} has more than {message_topics.FILTERS_MAX} filters")


STOP_MS: Final = 10_000
STOP_MAX_MS: Final = 600_000
"""A device waits no longer for a service to end, whatever its manifest says."""


class Service(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True, tag="service"):
    """Runs until it is stopped: `wasi:cli/run`.

    Attributes:
        args: its arguments.
        stop_ms: time to end by itself once its standard input has ended; then it is ended.
    """

    args: tuple[str, ...] = ()
    stop_ms: Count = STOP_MS


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, tag="data"):
    """Called by nothing: the artifact is a data package, a file that instances read and that never runs."""


Trigger = Http | Schedule | OnMessage | Service | Data

TriggerKind = TypeVar("TriggerKind", bound=Trigger)

TRIGGERS_MAX: Final = 8
"""Most triggers of one component."""


def trigger_name(trigger: Trigger) -> str:
    """Return the type of a trigger as manifests have it, such as `schedule`."""
    return str(trigger.__struct_config__.tag)


def describe_trigger(trigger: Trigger) -> str:
    """Describe what calls a component, for people."""
    match trigger:
        case Http():
            return "HTTP requests"
        case Schedule(every_ms=int(every)):
            return f"a timer, every {every} ms{_with(trigger.args)}"
        case Schedule(cron=cron):
            return f"a timer, at {cron}{_with(trigger.args)}"
        case OnMessage(topics=topics):
            return f"messages on {', '.join(topics) or 'no topic'}"
        case Service():
            return f"nothing: it runs until it is stopped{_with(trigger.args)}"
        case Data():
            return "nothing: it is data, which components read"
        case other:
            assert_never(other)


def _with(args: tuple[str, ...]) -> str:
    return f", with {' '.join(map(repr, args))}" if args else ""


def trigger_conflict(triggers: Sequence[Trigger]) -> str:
    """Say why one instance cannot have all of these triggers; empty where it can."""
    if len(triggers) > TRIGGERS_MAX:
        return f"{len(triggers)} triggers, at most {TRIGGERS_MAX} are allowed"
    if len(set(triggers)) < len(triggers):
        return "one of the triggers is there twice"
    for kind, name in ((Http, "http"), (OnMessage, "message"), (Service, "service")):
        if sum(isinstance(each, kind) for each in triggers) > 1:
            return f"an instance has at most one trigger of type {name}"
    if len(triggers) > 1 and any(isinstance(each, Service | Data) for each in triggers):
        return (
            "a service runs without end, so that its instance has no turn for other triggers: "
            "make it a component of its own"
        )
    if any("\0" in argument for each in triggers if isinstance(each, Schedule | Service) for argument in each.args):
        return "args: an argument holds no NUL"
    return ""


BucketRight = Literal["durable", "shared"]

OWN_BUCKET: Final = "default"
"""Bucket that each instance with a grant of `wasi:keyvalue` has to itself."""

BUCKETS_MAX: Final = 8
"""Buckets of one grant."""


def _check_buckets(buckets: Mapping[str, tuple[BucketRight, ...]]) -> None:
    """Refuse names that are none, and what cannot be shared. Raises `ValueError`."""
    if len(buckets) > BUCKETS_MAX:
        raise ValueError(f"{len(buckets)} buckets, at most {BUCKETS_MAX} are allowed")
    for name, rights in buckets.items():
        names.check_label(name, "bucket")
        if name == OWN_BUCKET and "shared" in rights:
            raise ValueError("the bucket 'default' is each instance's own: share one of another name")


class Grants(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Interfaces, addresses and neighbours that a component may reach. Empty means none: deny by default.

    Attributes:
        interfaces: interfaces or whole packages it may import, without version: `wasi:clocks`, `wasi:cli/stdout`.
        outbound: where it may send requests, as `https://api.example.com:443`, and where sockets may lead, as
            `tcp://10.1.0.5:502` (`fleet.protocol.outbound`).
        instances: neighbours on the device it may call over `http://<instance>.internal/`.
        publish: filters of the topics on which it may publish (`fleet.protocol.message_topics`): to the device's bus,
            and to the operator; unset for none, and then left out, since earlier hosts and agents refuse the field.
        publish_local: the same, to the device's bus alone.
        subscribe: filters of the topics that it may receive from the device's bus, left out likewise.
        directories: directories of the device that it may read, by the path at which it sees each; their names are the
            device owner's (`fleet.protocol.directories`). Unset for none, as `publish`.
        hardware: lines, buses and devices of the machine; unset for none, as `publish`.
        buckets: buckets of key-value pairs by name, and what each is: `durable`, where a write is on the disk before it
            is answered; `shared` by the instances of its namespace that declare it. Unset for none, as `publish`.
    """

    interfaces: tuple[str, ...] = ()
    outbound: tuple[str, ...] = ()
    instances: tuple[str, ...] = ()
    publish: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    directories: dict[str, str] | msgspec.UnsetType = msgspec.UNSET
    publish_local: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    subscribe: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    hardware: Hardware | msgspec.UnsetType = msgspec.UNSET
    buckets: dict[str, tuple[BucketRight, ...]] | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        """Refuse what are no filters, and no directories. Raises `ValueError`."""
        for name in ("publish", "publish_local", "subscribe"):
            filters = getattr(self, name)
            if filters == ():
                msgspec.structs.force_setattr(self, name, msgspec.UNSET)
            elif filters is not msgspec.UNSET:
                _check_filters(name, filters)
        directories.check_grant(self.mounts)
        _check_buckets(self.stores)
        for later in ("directories", "buckets"):
            if getattr(self, later) == {}:
                msgspec.structs.force_setattr(self, later, msgspec.UNSET)
        if self.hardware == hardware.NONE:
            msgspec.structs.force_setattr(self, "hardware", msgspec.UNSET)

    @property
    def devices(self) -> Hardware:
        """Lines, buses and devices of the machine that it may have."""
        return hardware.NONE if isinstance(self.hardware, msgspec.UnsetType) else self.hardware

    @property
    def publishes(self) -> tuple[str, ...]:
        """Filters of the topics on which it may publish, to the operator too."""
        return () if isinstance(self.publish, msgspec.UnsetType) else self.publish

    @property
    def mounts(self) -> dict[str, str]:
        """Names of the device's directories that it may read, by the path at which it sees each."""
        return {} if isinstance(self.directories, msgspec.UnsetType) else self.directories

    @property
    def publishes_locally(self) -> tuple[str, ...]:
        """Filters of the topics on which it may publish to the device's bus alone."""
        return () if isinstance(self.publish_local, msgspec.UnsetType) else self.publish_local

    @property
    def subscribes(self) -> tuple[str, ...]:
        """Filters of the topics that it may receive."""
        return () if isinstance(self.subscribe, msgspec.UnsetType) else self.subscribe

    def messages_beyond(self, ceiling: "Grants") -> tuple[str, ...]:
        """Describe what of these grants of messages `ceiling` does not cover, for people."""
        anywhere = (*ceiling.publishes, *ceiling.publishes_locally)
        return tuple(
            f"{what} {each}"
            for what, filters, most in (
                ("messages on", self.publishes, ceiling.publishes),
                ("messages within the device on", self.publishes_locally, anywhere),
                ("receiving messages on", self.subscribes, ceiling.subscribes),
            )
            for each in filters
            if not message_topics.covered(each, most)
        )

    def messages_within(self, ceiling: "Grants") -> dict[str, tuple[str, ...]]:
        """Return these grants of messages, as arguments, without those that `ceiling` does not cover."""
        anywhere = (*ceiling.publishes, *ceiling.publishes_locally)
        return {
            name: tuple(each for each in filters if message_topics.covered(each, most))
            for name, filters, most in (
                ("publish", self.publishes, ceiling.publishes),
                ("publish_local", self.publishes_locally, anywhere),
                ("subscribe", self.subscribes, ceiling.subscribes),
            )
        }

    @property
    def stores(self) -> dict[str, tuple[BucketRight, ...]]:
        """Buckets of key-value pairs that are named, and how each is."""
        return {} if isinstance(self.buckets, msgspec.UnsetType) else self.buckets

    def allows(self, interface: str) -> bool:
        """Tell whether an import, such as `wasi:clocks/wall-clock@0.2.3`, is granted."""
        bare = interface.partition("@")[0]
        package = bare.partition("/")[0]
        return bare in self.interfaces or package in self.interfaces

    @property
    def sockets(self) -> bool:
        """True where `wasi:sockets` may lead anywhere; without, each call of it is denied."""
        return any(map(outbound.is_socket, self.outbound))

    @property
    def requests(self) -> tuple[str, ...]:
        """Return the destinations of requests alone."""
        return tuple(each for each in self.outbound if not outbound.is_socket(each))

    def within(self, ceiling: "Grants") -> bool:
        """Tell whether `ceiling` grants everything that is granted here."""
        return (
            all(ceiling.allows(interface) for interface in self.interfaces)
            and all(outbound.covered(each, ceiling.outbound) for each in self.outbound)
            and set(self.instances) <= set(ceiling.instances)
            and not self.messages_beyond(ceiling)
            and not self.named_beyond(ceiling)
            and not self.devices.beyond(ceiling.devices)
        )

    def named_beyond(self, known: "Grants") -> tuple[str, ...]:
        """Return the directories and buckets granted here and not in `known`, for people."""
        places = sorted(set(self.mounts.values()) - set(known.mounts.values()))
        beyond = {
            name: rights
            for name, rights in self.stores.items()
            if name not in known.stores or not set(rights) <= set(known.stores[name])
        }
        return (
            *(f"directory {name}" for name in places),
            *(f"{' and '.join(rights)} bucket {name}".strip() for name, rights in sorted(beyond.items())),
        )


NATIVE_ANSWER_MAX_BYTES: Final = 128 * bounds.MIB // 48
"""The engine copies at most 128 MiB out of a guest in one call, and each byte of a body takes 48."""


TABLE_ELEMENTS_MAX: Final = 100_000
CORE_INSTANCES_MAX: Final = 128
"""Tables and instances for which the engine reserves space: no manifest and no policy exceeds them."""

MAY_BE_NONE: Final = frozenset(
    {"fuel", "request_bytes", "log_lines_per_minute", "storage_bytes", "daily_written_bytes", "state_bytes"}
    | {"requests_per_instance"}
)
"""Limits that may be 0: nothing is allowed, or, for `fuel` and `requests_per_instance`, as `Limits` says."""


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Limits on what the component may use. The device's policy caps each.

    Attributes:
        memory_bytes: linear memory of one instance.
        call_ms: guest time of one call; time blocked on a peer does not count.
        start_ms: guest time of instantiation and start, and of saving or loading state.
        idle_ms: how long a call may wait for others in one piece.
        total_ms: how long a call may take in all, waiting included.
        concurrency: workers at most.
        request_bytes, response_bytes: one HTTP body. In world `wasmfleet:http` an answer has at most
            `NATIVE_ANSWER_MAX_BYTES`, whatever stands here. In `wasi:http` a request that arrives may have a body of
            any size, and `request_bytes` bounds those that the guest sends.
        log_lines_per_minute: further lines are dropped and counted.
        fuel: instructions of one call (wasmtime's fuel), 0 for no such limit.
        storage_bytes: the instance's own data.
        daily_written_bytes: bytes written to its data in one day (UTC).
        state_bytes: memory that it may hand to its successor at a swap.
        requests_per_instance: requests that one instance may answer before a fresh one replaces it; 0 for the default
            of its world: one in `wasi:http`, else any number.
        table_elements: elements of each of its tables (functions that are called through a table, references).
        core_instances: core modules that may be instantiated in one instance, and its memories and tables, each.
        queue_bytes, queue_messages: messages that wait for the instance, with all that belongs to them.
    """

    memory_bytes: Count = 16 * bounds.MIB
    call_ms: Count = 1000
    start_ms: Count = 5000
    idle_ms: Count = 10_000
    total_ms: Count = 60_000
    concurrency: Count = 1
    request_bytes: Count = 1 * bounds.MIB
    response_bytes: Count = 2 * bounds.MIB
    log_lines_per_minute: Count = 600
    fuel: Count = 0
    storage_bytes: Count = 16 * bounds.MIB
    daily_written_bytes: Count = 64 * bounds.MIB
    state_bytes: Count = 1 * bounds.MIB
    requests_per_instance: Count = 0
    table_elements: Count = TABLE_ELEMENTS_MAX
    core_instances: Count = CORE_INSTANCES_MAX
    queue_bytes: Count = 256 * bounds.KIB
    queue_messages: Count = 256

    def __post_init__(self) -> None:
        """Refuse values below their minimum: the engine takes a negative number for no limit. Raises `ValueError`."""
        for name in self.__struct_fields__:
            value, least = getattr(self, name), 0 if name in MAY_BE_NONE else 1
            if value < least:
                raise ValueError(f"limits.{name} is {value}, and must be at least {least}")


GATES_MAX: Final = 8
GATE_INCREASE_MAX_PERCENT: Final = 100_000
GATE_WAIT_MAX_MS: Final = 86_400_000


class MetricGate(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Comparison of one of the component's own figures with the version that it replaces, on the same device.

    A counter is compared by its rate, for each call or for each of another counter; a gauge and a histogram by the mean
    of their values.

    Attributes:
        max_increase_percent: by which the figure may be above that of the version before.
        min_samples: calls, or values, that both versions must have; with fewer there is no verdict.
        per: counter to which a counter relates; empty for calls.
        wait_ms: time after probation in which the new version may still get so many; then an operator decides.
    """

    max_increase_percent: Count
    min_samples: Count = 50
    per: str = ""
    wait_ms: Count = 600_000

    def flaw(self, name: str) -> str:
        """Say why this is no gate for the figure of this name; empty where it is one."""
        for each in filter(None, (name, self.per)):
            if wrong := metrics.name_flaw(each):
                return f"{each[:64]!r} {wrong}"
        if self.max_increase_percent > GATE_INCREASE_MAX_PERCENT:
            return f"max-increase is above {GATE_INCREASE_MAX_PERCENT}%"
        if self.min_samples < 1:
            return "min-samples is at least 1"
        if self.wait_ms > GATE_WAIT_MAX_MS:
            return "wait is at most a day"
        return "per names the figure itself" if self.per == name else ""


class Health(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Health check of a version.

    Attributes:
        check: whether it exports the health check, asked before traffic, every `interval_ms` and, on probation, more
            often.
        probation_ms: time after a swap in which the device rolls back by itself.
        min_calls: with fewer calls in probation the report says that the version was not exercised.
        max_faults: guest faults (traps and time-outs) tolerated in probation.
        max_error_percent: share of answers of 500 and above in probation, from `min_calls` calls on.
        metrics: gates on figures of the component's own, by their names.
    """

    check: bool = False
    interval_ms: Count = 30_000
    probation_ms: Count = 30_000
    min_calls: Count = 20
    max_faults: Count = 0
    max_error_percent: Count = 10
    metrics: dict[str, MetricGate] = {}

    def gate_flaw(self) -> str:
        """Say which gate is none, and why; empty where all are."""
        if len(self.metrics) > GATES_MAX:
            return f"{len(self.metrics)} gates, at most {GATES_MAX} are judged"
        found = ((name, gate.flaw(name)) for name, gate in self.metrics.items())
        return next((f"{name[:64]}: {wrong}" for name, wrong in found if wrong), "")


KeyType = Literal["text", "integer", "number", "boolean"]
Swap = Literal["overlap", "replace"]


class ConfigKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """A configuration key that an operator may set.

    Written without what has its default, since earlier hosts and agents refuse the fields of `LATER_OF_KEYS`.

    Attributes:
        default: value where none is set.
        type: form of a value, which is always carried as text.
        min, max: smallest and largest number; of a text, its fewest and most characters.
        enum: values that are allowed; empty for any.
        pattern: of a text, what describes the whole value (`fleet.protocol.pattern`); empty for any.
        restart: whether a change of its value makes a new generation; otherwise it reaches the one that runs.
    """

    description: str = ""
    default: str | None = None
    type: KeyType = "text"
    min: Whole | None = None
    max: Whole | None = None
    enum: tuple[str, ...] = ()
    pattern: str = ""
    restart: bool = True

    def contradiction(self) -> str:
        """Say what no value can meet, or which of the declared values is none; empty for nothing."""
        if self.pattern and self.type != "text":
            return f"pattern is for texts, and this is {'an' if self.type == 'integer' else 'a'} {self.type}"
        if wrong := pattern.flaw(self.pattern):
            return f"pattern: {wrong}"
        if self.type == "boolean" and (self.min, self.max) != (None, None):
            return "min and max are for numbers and texts"
        if self.min is not None and self.max is not None and self.min > self.max:
            return f"min is {self.min}, above max, {self.max}"
        for each in self.enum:
            if wrong := self._form(each):
                return f"enum: {each[:40]!r} is {wrong}"
        wrong = "" if self.default is None else self.flaw(self.default)
        return f"default: {(self.default or '')[:40]!r} is {wrong}" if wrong else ""

    def flaw(self, value: str) -> str:
        """Say why a value is not one of this key, to follow "is"; empty where it is one."""
        wrong = self._form(value)
        return wrong or ("" if not self.enum or value in self.enum else f"none of {', '.join(self.enum)}")

    def _form(self, value: str) -> str:
        if (form := _FORMS.get(self.type)) is not None and form.fullmatch(value) is None:
            return _NOT_OF_FORM[self.type]
        counted = {"text": len(value), "boolean": 0}.get(self.type, value)
        size, what = Decimal(counted), " characters" * (self.type == "text")
        if self.type == "integer" and abs(size) > bounds.NUMBER_MAX:
            return "beyond 2^53"
        if self.min is not None and size < self.min:
            return f"less than {self.min}{what}"
        if self.max is not None and size > self.max:
            return f"more than {self.max}{what}"
        described = not self.pattern or pattern.matches(self.pattern, value)
        return "" if described else f"not of the pattern {self.pattern}"


_FORMS: Final = {
    "integer": re.compile(r"-?(0|[1-9][0-9]{0,15})"),
    "number": re.compile(r"-?(0|[1-9][0-9]{0,15})(\.[0-9]{1,16})?"),
    "boolean": re.compile("true|false"),
}
_NOT_OF_FORM: Final = {
    "integer": "not a whole number, such as 5",
    "number": "not a number, such as 0.5",
    "boolean": "neither true nor false",
}


class SecretKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A secret that the component reads, as it reads configuration.

    Attributes:
        required: the component does not start without it.
    """

    description: str = ""
    required: bool = True


class DataUse(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Data package of the same namespace that the component reads.

    Attributes:
        path: of its one file, as the guest opens it.
        version: range of the versions that it can read (`fleet.protocol.data_packages`).
    """

    path: str
    version: str = data_packages.ANY


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Declaration of a component: identity, triggers, grants, limits, health check, configuration.

    Attributes:
        name, version: of the component; the signing key determines the namespace.
        trigger, more_triggers: what it is called by; the first, which devices of every version read, and others.
        world: contract that it exports, such as `wasmfleet:http` (small native world) or `wasi:http`.
        security_epoch: a device that has run epoch N refuses older ones.
        data_schema: version of the instance's data; a change copies it before the swap.
        arch: CPUs it may run on (`x86_64`, `aarch64`, `riscv64`); empty for any.
        secrets: names of the secrets that it receives; no other reaches it.
        swap: whether the new version starts beside the old one, or once that has stopped.
        data: data packages that it reads, by name.
    """

    name: str
    version: str
    trigger: Trigger
    world: str = ""
    description: str = ""
    grants: Grants = Grants()
    limits: Limits = Limits()
    health: Health = Health()
    config: dict[str, ConfigKey] = {}
    security_epoch: Count = 0
    data_schema: Count = 0
    arch: tuple[str, ...] = ()
    secrets: dict[str, SecretKey] = {}
    more_triggers: tuple[Trigger, ...] = ()
    swap: Swap = "overlap"
    data: dict[str, DataUse] = {}

    @property
    def is_data(self) -> bool:
        """True for a data package, which no device runs."""
        return isinstance(self.trigger, Data)

    @property
    def triggers(self) -> tuple[Trigger, ...]:
        """Everything that it is called by."""
        return (self.trigger, *self.more_triggers)

    def triggers_of(self, kind: type[TriggerKind]) -> tuple[TriggerKind, ...]:
        """Return its triggers of one kind."""
        return tuple(each for each in self.triggers if isinstance(each, kind))

    def plain(self) -> dict[str, Any]:
        """Convert to JSON types for signing, without later fields that have their default: `LATER`, `LATER_OF_KEYS`."""
        value: dict[str, Any] = msgspec.to_builtins(self)
        for path in LATER:
            within, _, name = path.rpartition(".")
            struct, place = (getattr(self, within), value[within]) if within else (self, value)
            if getattr(struct, name) == _default(struct, name):
                del place[name]
        for each in (value["trigger"], *value.get("more_triggers", ())):
            if not each.get("args", True):
                del each["args"]
        for key, declared in self.config.items():
            first = {"description": declared.description, "default": declared.default}  # signed at their defaults too
            place = value["config"][key] = {**first, **value["config"][key]}
            for name in LATER_OF_KEYS:
                if getattr(declared, name) == _default(declared, name):
                    place.pop(name, None)
        return value

    def digest(self) -> str:
        """Return the sha256 of the manifest's canonical JSON, in hex."""
        return wire.digest(self.plain())


LATER: Final = (
    *("secrets", "limits.table_elements", "limits.core_instances", "more_triggers", "swap"),
    *("limits.queue_bytes", "limits.queue_messages", "health.metrics", "data"),
)
"""Fields added since the first schema, as `secrets` or `limits.name`: left out at their default, so that a new field
changes no digest and older devices can read manifests that do not use it. Their defaults never change."""


LATER_OF_KEYS: Final = ("type", "min", "max", "enum", "pattern", "restart")
"""The same, in each configuration key."""


_DEFAULTS: Final[dict[tuple[type[msgspec.Struct], str], object]] = {}
"""Defaults of later fields; to find one takes longer than to convert a manifest."""


def _default(struct: msgspec.Struct, name: str) -> object:
    key = (type(struct), name)
    if key not in _DEFAULTS:
        field = next(each for each in msgspec.structs.fields(struct) if each.name == name)
        _DEFAULTS[key] = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    return _DEFAULTS[key]


class BadManifestError(ValueError):
    """A manifest that does not follow the schema; the message names the field."""


def decode(data: bytes) -> Manifest:
    """Read a normalised manifest from JSON.

    Raises:
        BadManifestError: too large, not JSON, an unknown field or one of another type, a key that contradicts itself,
            triggers that do not go together, a gate that is none.
    """
    if len(data) > bounds.MANIFEST_MAX_BYTES:
        raise BadManifestError(f"the manifest has {len(data)} bytes, at most {bounds.MANIFEST_MAX_BYTES} fit")
    try:
        found = msgspec.json.decode(data, type=Manifest)
    except wire.JSON_ERRORS as error:
        raise BadManifestError(f"manifest: {error}") from error
    for key, declared in found.config.items():
        if wrong := declared.contradiction():
            raise BadManifestError(f"manifest: config.{key}: {wrong}")
    if wrong := found.health.gate_flaw():
        raise BadManifestError(f"manifest: health.metrics: {wrong}")
    if wrong := found.grants.devices.flaw():
        raise BadManifestError(f"manifest: grants.hardware.{wrong}")
    if wrong := trigger_conflict(found.triggers):
        raise BadManifestError(f"manifest: triggers: {wrong}")
    if wrong := data_conflict(found):
        raise BadManifestError(f"manifest: data{wrong}")
    return found


def data_conflict(found: Manifest) -> str:
    """Say why a component cannot read its data packages so; empty where it can."""
    if found.is_data and found.data:
        return ": a data package reads no other"
    if len(found.data) > bounds.DATA_USES_MAX:
        return f": {len(found.data)} packages, at most {bounds.DATA_USES_MAX} are allowed"
    mounts = found.grants.mounts
    for name, use in found.data.items():
        try:
            names.check_label(name, "data package")
            data_packages.check_path(use.path)
            data_packages.check_range(use.version)
        except ValueError as error:
            return f".{name[:80]}: {error}"
        others = ["/data", *mounts, *(each.path for other, each in found.data.items() if other != name)]
        if wrong := _place_conflict(use.path, others, mounts):
            return f".{name}: path: {wrong}"
    return ""


def _place_conflict(path: str, others: Sequence[str], mounts: Collection[str]) -> str:
    """Say why a package has no place beside other paths, `mounts` those of directories; empty where it has one."""
    if path == "/data" or path in mounts or any(each.startswith(f"{path}/") for each in others):
        return f"a directory of the component is at {path}"
    if path in others:
        return f"another package is at {path}"
    parent = path.rpartition("/")[0]
    return f"the device's directory that is granted at {parent} would be hidden" if parent in mounts else ""


def convert(value: object) -> Manifest:
    """Read a normalised manifest from decoded JSON, as TUF's `custom` holds it. Raises `BadManifestError`."""
    return decode(wire.canonical(value))
