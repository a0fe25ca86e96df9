"""component.toml: read, infer, suggest, render.

`component.toml` is the form in which authors write a manifest; `fleet.protocol.manifest.Manifest` is the normalised
form that is signed. Sizes and durations carry their units (`"16MiB"`, `"500ms"`), every field has a default, and
trigger, world and health check may be left out: the component's exports show them. `docs/component-toml.md` lists every
field.

Every error in the text is a `BadManifestError`, one line that names the field by its path. Rendering writes only what
differs from the defaults, in units for people.
"""

import json
import re
import tomllib
import unicodedata
from collections.abc import Container, Iterable, Sequence
from types import NoneType
from typing import Any, Final, TypeVar, get_args, get_type_hints

import msgspec

from fleet.component import project, served, toml_fields, wasi
from fleet.component.reader import (
    HTTP_HANDLER,
    HTTP_HEALTH,
    SCHEDULE_TASK,
    Component,
    bare,
)
from fleet.component.toml_fields import FILE_NAME, Field, Table, checked, fields
from fleet.protocol import (
    bounds,
    data_packages,
    directories,
    hardware,
    manifest,
    message_topics,
    metrics,
    names,
    outbound,
    wire,
)
from fleet.protocol.hardware import GpioLine, Hardware, SerialPort
from fleet.protocol.manifest import (
    NATIVE_ANSWER_MAX_BYTES,
    STOP_MS,
    BadManifestError,
    BucketRight,
    ConfigKey,
    Data,
    DataUse,
    Full,
    Grants,
    Health,
    Http,
    KeyType,
    Limits,
    Manifest,
    MetricGate,
    OnMessage,
    Schedule,
    SecretKey,
    Service,
    Swap,
    Trigger,
    data_conflict,
    trigger_name,
)

DEV_VERSION: Final = "0.0.0-dev.0"
TOML_MAX_CHARS: Final = 64 * 1024

# Interfaces that a component may export for the host to call: interface, trigger, world. The first match counts.
_ENTRIES: Final[tuple[tuple[str, type[Trigger], str], ...]] = (
    (HTTP_HANDLER, Http, "wasmfleet:http"),
    (wasi.HTTP_HANDLER, Http, "wasi:http"),
    (SCHEDULE_TASK, Schedule, "wasmfleet:schedule"),
    (wasi.MESSAGING_HANDLER, OnMessage, "wasi:messaging"),
    (wasi.RUN, Service, "wasi:cli"),
    (wasi.RUN, Schedule, "wasi:cli"),
)
_SECRET_READERS: Final = (wasi.ENVIRONMENT, *wasi.CONFIG)
_DOTS_MAX: Final = 500
"""Most dots in one line: the memory that tomllib takes for a dotted key grows with the square of its parts."""


class NeedsTomlError(BadManifestError):
    """The component needs a `component.toml`.

    Attributes:
        suggestion: the file to save; its author completes it where a value is left open.
    """

    def __init__(self, message: str, suggestion: str) -> None:
        super().__init__(message)
        self.suggestion = suggestion


class UnservedError(BadManifestError):
    """No device serves or calls what the component asks for, so that no manifest helps."""


def load(
    text: str, *, component: Component | None = None, file_name: str = "component.wasm", version: str = DEV_VERSION
) -> Manifest:
    """Read `component.toml`.

    Args:
        text: the file's contents.
        component: the component as read from its bytes. Without it, name and trigger are required.
        file_name: the component's file, from which the name is taken where the text gives none.
        version: where the text gives none.

    Raises:
        BadManifestError: a syntax error (with its line), an unknown or ill-typed field (with its path), or a text that
            contradicts the component.
    """
    if len(text) > TOML_MAX_CHARS:
        raise BadManifestError(f"{FILE_NAME} has {len(text)} characters, at most {TOML_MAX_CHARS} are read")
    if any(line.count(".") > _DOTS_MAX for line in text.splitlines()):
        raise BadManifestError(f"{FILE_NAME} has a line with more than {_DOTS_MAX} dots")
    try:
        raw = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for a number of thousands of digits
        raise BadManifestError(f"{FILE_NAME} is not TOML: {error}") from error
    table = Table("", raw)
    triggers = _triggers(table, component)
    world = _world(table, component, triggers, file_name)
    place = table.table("health")
    gates = _gates(place.table("metrics"))
    health = msgspec.structs.replace(place.struct(Health), metrics=gates)
    if component is not None:
        serves = any(isinstance(each, Service) for each in triggers)
        health = _health(health, component, file_name, written="check" in raw.get("health", {}), serves=serves)
    grants = _grants(table.table("grants"))
    manifest = Manifest(
        name=_name(table, component, file_name),
        version=checked(names.check_version, table.text("version", version), "version"),
        description=table.text("description", ""),
        trigger=triggers[0],
        more_triggers=triggers[1:],
        world=world,
        grants=grants,
        limits=table.table("limits").struct(Limits),
        health=health,
        config=_config(table.table("config")),
        secrets=_secrets(table.table("secrets"), set(raw.get("config", {}))),
        data=_data(table.table("data")),
        security_epoch=table.whole("security_epoch", 0),
        data_schema=table.whole("data_schema", 0),
        swap=_swap(table, grants),
        arch=table.texts(
            "arch", lambda arch: None if arch in names.ARCHES else f"the known ones are {', '.join(names.ARCHES)}"
        ),
    )
    if table.take("build") is not None:
        project.read_build(raw["build"])  # the author's own: nothing of it is in the manifest
    table.finish()
    if wrong := data_conflict(manifest):
        raise BadManifestError(f"{FILE_NAME}: data{wrong}")
    if component is not None:
        if manifest.data:
            _check_reads_files(component, file_name)
        _check_known(component, manifest.grants)
        _check_gates(component, manifest, file_name)
        if manifest.secrets:
            _check_readable(component, file_name)
    return _bounded(manifest)


def infer(file_name: str, component: Component, *, version: str = DEV_VERSION) -> Manifest:
    """Infer the manifest of a component without a `component.toml`: no grants, default limits.

    Args:
        file_name: the component's file, from which its name is taken.
        component: trigger and health check follow from its exports.
        version: chosen by the caller; each push of a component in development has a version of its own.

    Raises:
        NeedsTomlError: the trigger cannot be inferred.
        BadManifestError: no name follows from the file name, or the component exports nothing that a device can call.
    """
    entry = _entry(component, None)
    if entry is None:
        raise BadManifestError(_nothing_to_call(component, file_name))
    _interface, kind, world = entry
    health = Health(check=component.exported(HTTP_HEALTH) is not None)
    example = Manifest(name=name_of(file_name), version=version, trigger=Http(), world=world, health=health)
    if kind in {Schedule, OnMessage}:
        trigger: Trigger = Schedule(every_ms=60_000) if kind is Schedule else OnMessage(topics=("topic",))
        subscribe = ("topic",) if kind is OnMessage else ()
        what = "when it runs" if kind is Schedule else "which topics it receives"
        example = msgspec.structs.replace(example, trigger=trigger, grants=Grants(subscribe=subscribe))
        raise NeedsTomlError(
            f"{file_name} exports {entry[0]}, so a {FILE_NAME} beside it must say {what}",
            suggest_toml(component, example),
        )
    if kind is Service:
        example = msgspec.structs.replace(example, health=Health())
    return msgspec.structs.replace(example, trigger=kind())


def describe(
    component: Component, text: str | None, *, file_name: str = "component.wasm", version: str = DEV_VERSION
) -> Manifest:
    """Return the manifest of a component to be published: read or inferred, with every import granted.

    Args:
        component: as `fleet.component.reader.read` gives it.
        text: of its `component.toml`, None where there is none.
        file_name: the component's file, as in `load`.
        version: where the text gives none.

    Raises:
        NeedsTomlError: an import is not granted, or a `component.toml` is needed for another reason.
        BadManifestError: any other error, such as an import that no grant can name.
    """
    if text is None:
        manifest = infer(file_name, component, version=version)
    else:
        manifest = load(text, component=component, file_name=file_name, version=version)
    if problems := served.problems(component, manifest, file_name=file_name):
        raise UnservedError(f"{file_name} cannot run: {problems[0]}")
    if missing := check_grants(component, manifest):
        raise NeedsTomlError(
            f"{file_name} imports {', '.join(missing)}, which its manifest does not grant: "
            f"save the suggested {FILE_NAME} to allow them",
            suggest_toml(component, manifest),
        )
    return manifest


def check_grants(component: Component, manifest: Manifest) -> list[str]:
    """Return the full names of the imports that the manifest does not grant, and that need a grant.

    What standard libraries import needs one where the manifest says that it is used: to read configuration, to keep
    files, to send requests.
    """
    grants, imported = manifest.grants, {bare(name): name for name in component.imports if name not in component.plain}
    missing = list(component.missing(grants))
    reads = bool(manifest.config or manifest.secrets) and not any(
        grants.allows(each) for each in imported if each in _SECRET_READERS
    )
    used = {
        wasi.ENVIRONMENT: reads and not imported.keys() & set(wasi.CONFIG),
        wasi.PREOPENS: manifest.data_schema > 0,
        wasi.OUTGOING_HANDLER: bool(grants.requests or grants.instances),
    }
    missing += [imported[each] for each, use in used.items() if use and each in imported and not grants.allows(each)]
    return missing


def suggest_toml(component: Component, manifest: Manifest) -> str:
    """Write the `component.toml` with which this component may run: the manifest's values, every import granted.

    `load` reads it back to that manifest. A development version is left out, so that each push makes its own.
    """
    wanted = dict.fromkeys(bare(name) for name in check_grants(component, manifest))
    grants = msgspec.structs.replace(manifest.grants, interfaces=(*manifest.grants.interfaces, *wanted))
    return render(msgspec.structs.replace(manifest, grants=grants), leave_out_version=DEV_VERSION)


def beside(file_name: str) -> tuple[str, str]:
    """Return the names that a component's manifest may have beside it; the first that exists counts."""
    return (f"{file_name.removesuffix('.wasm')}.toml", FILE_NAME)


def name_of(file_name: str) -> str:
    """Derive the component's name from its file name. Raises `BadManifestError`."""
    stem = re.split(r"[/\\]", file_name)[-1].removesuffix(".wasm").removesuffix(".component")
    plain = unicodedata.normalize("NFKD", stem.lower())  # an accent becomes a character of its own, and is left out
    plain = "".join(each for each in plain if not unicodedata.combining(each))
    # letters that have no place in a name are not left out in silence: the check refuses them
    label = re.sub(r"[^a-z0-9]+", "-", plain).strip("-") if plain.isascii() else plain
    try:
        return names.check_label(label, "component")
    except names.BadNameError as error:
        raise BadManifestError(
            f"{file_name!r} gives no valid name for the component: write name = ... in {FILE_NAME}"
        ) from error


def _entry(component: Component, kind: type[Trigger] | None) -> tuple[str, type[Trigger], str] | None:
    for interface, trigger, world in _ENTRIES:
        if component.exported(interface) and kind in {None, trigger}:
            return interface, trigger, world
    return None


def _nothing_to_call(component: Component, file_name: str) -> str:
    what = f"only {', '.join(component.exports[:5])}" if component.exports else "nothing"
    known = ", ".join(dict.fromkeys(interface for interface, _, _ in _ENTRIES))
    return f"{file_name} exports {what}; a device can call one of {known}"


def _triggers(table: Table, component: Component | None) -> tuple[Trigger, ...]:
    raw, several = table.take("trigger"), table.take("triggers")
    if several is not None:
        if raw is not None:
            raise BadManifestError(f"{FILE_NAME}: trigger and triggers: write one of them, triggers for several")
        if not isinstance(several, list):
            raise table.wrong("triggers", "a list of triggers", several)
        if not several:
            raise BadManifestError(f"{FILE_NAME}: triggers is empty: name at least one")
        found = tuple(_trigger(f"triggers[{number}]", each) for number, each in enumerate(several))
        if wrong := manifest.trigger_conflict(found):
            raise BadManifestError(f"{FILE_NAME}: triggers: {wrong}")
        return found
    if raw is None:
        entry = _entry(component, None) if component else None
        if entry is None or entry[1] in {Schedule, OnMessage}:
            raise BadManifestError(
                f'{FILE_NAME}: trigger is missing: "http", "service", {{ type = "schedule", every = "10s" }} '
                'or { type = "message", topics = ["name"] }'
            )
        return (entry[1](),)
    return (_trigger("trigger", raw),)


def _trigger(path: str, raw: object) -> Trigger:
    inner = Table(path, raw if isinstance(raw, dict) else {"type": raw})
    kind = inner.text("type", "")
    trigger: Trigger
    match kind:
        case "http":
            trigger = Http()
        case "service":
            trigger = Service(args=_arguments(inner), stop_ms=inner.duration("stop", STOP_MS) or STOP_MS)
        case "schedule":
            trigger = _schedule(inner)
        case "message":
            trigger = _on_message(path, inner)
        case _:
            raise BadManifestError(f"{FILE_NAME}: {path}.type {kind!r}: one of http, schedule, message, service")
    inner.finish()
    return trigger


def _on_message(path: str, table: Table) -> OnMessage:
    topics = table.texts("topics", _check_filter)
    if not topics:
        raise BadManifestError(f"{FILE_NAME}: {path}.topics is missing: list the topics that it receives")
    if len(topics) > message_topics.FILTERS_MAX:
        most = message_topics.FILTERS_MAX
        raise BadManifestError(f"{FILE_NAME}: {path}.topics: {len(topics)} filters, at most {most} are allowed")
    match table.text("full", "refuse"):
        case "refuse" | "drop-oldest" as full:
            return OnMessage(topics=topics, full=full)
        case other:
            raise BadManifestError(f"{FILE_NAME}: {path}.full {other[:40]!r}: one of {', '.join(get_args(Full))}")


def _arguments(table: Table) -> tuple[str, ...]:
    """Take a list of texts, of which some may be the same."""
    value = table.take("args")
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise table.wrong("args", "a list of texts", value)
    if any("\0" in each for each in value):
        raise BadManifestError(f"{FILE_NAME}: {table.at('args')}: an argument holds no NUL")
    return tuple(value)


def _schedule(table: Table) -> Schedule:
    args = _arguments(table)
    every = table.duration("every", None)
    spec = table.take("cron")
    if (every is None) == (spec is None):
        either = 'a schedule has either every = "10s" or cron = "*/5 * * * *"'
        raise BadManifestError(f"{FILE_NAME}: {table.path}: {either}")
    if spec is None:
        return Schedule(every_ms=every, args=args)
    if not isinstance(spec, str):
        raise table.wrong("cron", 'a text such as "*/5 * * * *"', spec)
    return Schedule(cron=checked(manifest.check, spec, table.at("cron")), args=args)


def _world(table: Table, component: Component | None, triggers: Sequence[Trigger], file_name: str) -> str:
    """Return the world of the first trigger. Raises `BadManifestError` for a trigger without its export."""
    written = table.text("world", "")
    if component is None:
        return written
    alone = len(triggers) == 1
    first, *_ = [
        _entry_of(component, each, "trigger" if alone else f"trigger {trigger_name(each)!r}", file_name)
        for each in triggers
    ]
    if written not in {"", first[2]}:
        raise BadManifestError(f"{FILE_NAME}: world is {written!r}, but {file_name} exports {first[0]}")
    return first[2]


def _entry_of(component: Component, trigger: Trigger, where: str, file_name: str) -> tuple[str, type[Trigger], str]:
    kind = type(trigger)
    entry = _entry(component, kind)
    if entry is None:
        wanted = " nor ".join(interface for interface, other, _ in _ENTRIES if other is kind)
        which = "neither " if " nor " in wanted else "no "
        raise BadManifestError(f"{FILE_NAME}: {where} does not fit: {file_name} exports {which}{wanted}")
    if entry[0] == SCHEDULE_TASK and isinstance(trigger, Schedule) and trigger.args:
        raise BadManifestError(f"{FILE_NAME}: {where} has args, and {SCHEDULE_TASK} takes none: {wasi.RUN} does")
    return entry


def _health(health: Health, component: Component, file_name: str, *, written: bool, serves: bool) -> Health:
    """Infer the health check from the exports; a service, which `serves`, has none."""
    if health.check and serves:
        raise BadManifestError(
            f"{FILE_NAME}: health.check is true, but a service is in its run, and answers no health check: "
            "it ends with an exit code when it is not well"
        )
    exported = component.exported(HTTP_HEALTH) is not None and not serves
    if health.check and not exported:
        raise BadManifestError(f"{FILE_NAME}: health.check is true, but {file_name} exports no {HTTP_HEALTH}")
    return health if written else msgspec.structs.replace(health, check=exported)


_PERCENT: Final = re.compile(r"([0-9]{1,9})%")


def _gates(table: Table) -> dict[str, MetricGate]:
    """Take the gates on figures of the component's own; a counter may be written with its `_total`."""
    gates: dict[str, MetricGate] = {}
    for key in list(table.raw):
        inner = table.table(key)
        name = metrics.family("counter", key)
        if name in gates:
            raise BadManifestError(f"{FILE_NAME}: {inner.path}: {name} has a gate already")
        increase = inner.text("max-increase", "")
        found = _PERCENT.fullmatch(increase)
        if found is None:
            said = f"{increase[:40]!r} is none" if increase else "missing"
            raise BadManifestError(
                f'{FILE_NAME}: {inner.at("max-increase")}: {said}: write a percentage, such as "20%"'
            )
        default = MetricGate(max_increase_percent=0)
        gates[name] = MetricGate(
            max_increase_percent=int(found[1]),
            min_samples=inner.whole("min-samples", default.min_samples),
            per=metrics.family("counter", inner.text("per", "")),
            wait_ms=inner.duration("wait", default.wait_ms) or 0,
        )
        inner.finish()
    if wrong := Health(metrics=gates).gate_flaw():
        raise BadManifestError(f"{FILE_NAME}: {table.path}: {wrong}")
    return gates


def _check_gates(component: Component, manifest: Manifest, file_name: str) -> None:
    """Refuse gates of a component that has no figures of its own. Raises `BadManifestError`."""
    if manifest.health.metrics and not any(bare(name) == wasi.METRICS for name in component.imports):
        raise BadManifestError(
            f"{FILE_NAME}: health.metrics: {file_name} does not import {wasi.METRICS}, so it has no figures to compare"
        )


def _default_swap(grants: Grants) -> Swap:
    """Return how versions take over from each other where nothing is written: two cannot hold a line or a port."""
    return "overlap" if grants.devices == hardware.NONE else "replace"


def _swap(table: Table, grants: Grants) -> Swap:
    match table.text("swap", _default_swap(grants)):
        case "overlap":
            return "overlap"
        case "replace":
            return "replace"
        case other:
            raise BadManifestError(f"{FILE_NAME}: swap: {other[:40]!r} is none of {', '.join(get_args(Swap))}")


def _name(table: Table, component: Component | None, file_name: str) -> str:
    name = table.text("name", "")
    if name:
        return checked(lambda text: names.check_label(text, "component"), name, "name")
    if component is None:
        raise BadManifestError(f"{FILE_NAME}: name is missing")
    return name_of(file_name)


def _grants(table: Table) -> Grants:
    grants = Grants(
        interfaces=table.texts("interfaces", _check_interface),
        outbound=tuple(str(outbound.parse(each)) for each in table.texts("outbound", _check_outbound)),
        instances=table.texts("instances", _check_instance),
        publish=_filters(table, "publish"),
        publish_local=_filters(table, "publish_local"),
        subscribe=_filters(table, "subscribe"),
        directories=_directories(table.table("directories")),
        hardware=_hardware(table),
        buckets=_buckets(table.table("buckets")),
    )
    table.finish()
    return grants


def _directories(table: Table) -> dict[str, str]:
    found = {place: table.text(place, "") for place in table.raw}
    for place, name in found.items():
        checked(directories.check_place, place, table.path)
        checked(directories.check_name, name, table.at(text(place)))
    if len(found) > directories.DIRECTORIES_MAX:
        most = directories.DIRECTORIES_MAX
        raise BadManifestError(f"{FILE_NAME}: {table.path}: {len(found)} directories, at most {most} are allowed")
    return found


def _filters(table: Table, name: str) -> tuple[str, ...]:
    found, most = table.texts(name, _check_filter), message_topics.FILTERS_MAX
    if len(found) > most:
        raise BadManifestError(f"{FILE_NAME}: {table.at(name)}: {len(found)} filters, at most {most} are allowed")
    return found


def _hardware(table: Table) -> Hardware:
    found = Hardware(**{kind: _pieces(table, kind, struct) for kind, struct in _HARDWARE.items()})
    if wrong := found.flaw():
        raise BadManifestError(f"{FILE_NAME}: {table.path}.{wrong}")
    return found


_HARDWARE: Final[dict[str, type[Any]]] = {"gpio": GpioLine, "serial": SerialPort}
_Piece = TypeVar("_Piece")


def _pieces(table: Table, key: str, struct: type[_Piece]) -> tuple[_Piece, ...]:
    """Take a list of tables, `[[grants.gpio]]`."""
    value = table.take(key)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise table.wrong(key, f"tables, each as [[{table.at(key)}]]", value)
    return tuple(_piece(Table(f"{table.at(key)}[{at}]", each), struct) for at, each in enumerate(value, 1))


def _piece(table: Table, struct: type[_Piece]) -> _Piece:
    kinds, made = get_type_hints(struct), dict[str, Any]()
    for field in msgspec.structs.fields(struct):  # type: ignore[arg-type]
        value = _piece_field(table, field.encode_name, kinds[field.name])
        if value is not None:
            made[field.name] = value
        elif field.required:
            raise BadManifestError(f"{FILE_NAME}: {table.at(field.encode_name)} is missing")
    table.finish()
    return struct(**made)


def _piece_field(table: Table, key: str, kind: Any) -> Any:
    """Take a field of a piece of hardware; None where there is none."""
    if key not in table.raw:
        table.take(key)
        return None
    if kind is int:
        return table.signed(key)
    if kind is bool:
        return table.switch(key, False)
    value = table.text(key, "")
    choices = [each for each in get_args(kind) if isinstance(each, str)]
    for each in get_args(kind):
        choices += get_args(each) if each is not NoneType else ()
    if choices and value not in choices:
        raise BadManifestError(f"{FILE_NAME}: {table.at(key)}: {value[:40]!r} is none of {', '.join(choices)}")
    return value


def _buckets(table: Table) -> dict[str, tuple[BucketRight, ...]]:
    found: dict[str, tuple[BucketRight, ...]] = {}
    for name in table.raw:
        rights = table.texts(name, lambda each: None if each in get_args(BucketRight) else "durable or shared")
        found[name] = tuple(each for each in get_args(BucketRight) if each in rights)
    try:
        Grants(buckets=found)
    except ValueError as error:
        raise BadManifestError(f"{FILE_NAME}: {table.path}: {error}") from error
    return found


def _check_interface(text: str) -> str | None:
    return None if served.INTERFACE.fullmatch(text) else served.unknown(text)


def _check_known(component: Component, grants: Grants) -> None:
    """Refuse a grant that names nothing: a mistake that nobody would notice. Raises `BadManifestError`."""
    for each in grants.interfaces:
        if wrong := served.unknown(each, component.imports):
            raise BadManifestError(f"{FILE_NAME}: grants.interfaces: {each!r}: {wrong}")


def _check_outbound(text: str) -> str | None:
    try:
        outbound.parse(text)
    except outbound.BadOutboundError as error:
        return str(error)
    return None


def _check_filter(text: str) -> str | None:
    try:
        message_topics.check_filter(text)
    except message_topics.BadMessageTopicError as error:
        return str(error)
    return None


def _check_instance(text: str) -> str | None:
    try:
        names.check_label(text, "instance")
    except names.BadNameError as error:
        return str(error)
    return None


def _config(table: Table) -> dict[str, ConfigKey]:
    keys: dict[str, ConfigKey] = {}
    for key in list(table.raw):
        checked(names.check_config_key, key, "config")
        inner = table.table(key)
        keys[key] = _config_key(inner)
        default = keys[key].default
        if len((default or "").encode()) > bounds.CONFIG_VALUE_MAX_BYTES:
            raise BadManifestError(f"{FILE_NAME}: config.{key}.default: at most {bounds.CONFIG_VALUE_MAX_BYTES} bytes")
    return keys


def _config_key(table: Table) -> ConfigKey:
    kind = table.text("type", "text")
    if kind not in get_args(KeyType):
        raise BadManifestError(
            f"{FILE_NAME}: {table.at('type')}: {kind[:40]!r} is none of {', '.join(get_args(KeyType))}"
        )
    least, most = (table.signed(name) for name in ("min", "max"))
    given: dict[str, Any] = {
        "description": table.text("description", ""),
        "default": table.text("default", "") if "default" in table.raw else None,
        "type": kind,
        "min": least,
        "max": most,
        "enum": table.texts("enum", lambda _: None),
        "pattern": table.text("pattern", ""),
        "restart": table.switch("restart", True),
    }
    table.finish()
    key = ConfigKey(**given)
    if wrong := key.contradiction():
        raise BadManifestError(f"{FILE_NAME}: {table.path}: {wrong}")
    return key


def _secrets(table: Table, config: Container[str]) -> dict[str, SecretKey]:
    keys: dict[str, SecretKey] = {}
    for key in list(table.raw):
        checked(names.check_secret, key, "secrets")
        if key in config:
            raise BadManifestError(f"{FILE_NAME}: secrets.{key}: a configuration key has the same name")
        inner = table.table(key)
        keys[key] = SecretKey(description=inner.text("description", ""), required=inner.switch("required", True))
        inner.finish()
    if len(keys) > bounds.SECRETS_MAX:
        raise BadManifestError(f"{FILE_NAME}: secrets: {len(keys)} secrets, at most {bounds.SECRETS_MAX} are allowed")
    return keys


def _data(table: Table) -> dict[str, DataUse]:
    """Read the data packages that the component reads."""
    uses: dict[str, DataUse] = {}
    for name in list(table.raw):
        inner = table.table(name)
        path = checked(data_packages.check_path, inner.text("path", ""), inner.at("path"))
        version = checked(data_packages.check_range, inner.text("version", data_packages.ANY), inner.at("version"))
        uses[name] = DataUse(path=path, version=version)
        inner.finish()
    return uses


def _check_reads_files(component: Component, file_name: str) -> None:
    """Refuse data packages that the component has no interface to read. Raises `BadManifestError`."""
    if not any(bare(name) == wasi.PREOPENS for name in component.imports):
        raise BadManifestError(
            f"{FILE_NAME}: data: {file_name} does not import {wasi.PREOPENS}, so it cannot read files"
        )


def _check_readable(component: Component, file_name: str) -> None:
    """Refuse secrets that no interface of the component can read. Raises `BadManifestError`."""
    if not any(bare(name) in _SECRET_READERS for name in component.imports):
        raise BadManifestError(
            f"{FILE_NAME}: secrets: {file_name} imports none of {', '.join(_SECRET_READERS)}, so it cannot read secrets"
        )


def _bounded(manifest: Manifest) -> Manifest:
    if manifest.grants.devices.serial and manifest.limits.concurrency > 1:
        raise BadManifestError(
            f"{FILE_NAME}: limits.concurrency is {manifest.limits.concurrency}, and two calls at once would mix what "
            "they send and receive on a serial port: leave it at 1"
        )
    if manifest.world == "wasmfleet:http" and manifest.limits.response_bytes > NATIVE_ANSWER_MAX_BYTES:
        raise BadManifestError(
            f"{FILE_NAME}: limits.response: an answer of wasmfleet:http has at most {NATIVE_ANSWER_MAX_BYTES} bytes "
            "(2730KiB); a component that answers with more exports wasi:http/incoming-handler"
        )
    size = len(wire.canonical(manifest))
    if size > bounds.MANIFEST_MAX_BYTES:
        raise BadManifestError(
            f"{FILE_NAME} makes a manifest of {size} bytes, at most {bounds.MANIFEST_MAX_BYTES} are signed: "
            "shorten descriptions or defaults"
        )
    return manifest


_BARE_KEY: Final = re.compile(r"[A-Za-z0-9_-]+")


def render(manifest: Manifest, *, leave_out_version: str = "") -> str:
    """Render a manifest as text that `load` reads back to an equal one.

    Args:
        manifest: what to write.
        leave_out_version: version that the reader fills in by itself.
    """
    lines = [f"name = {text(manifest.name)}"]
    if manifest.version != leave_out_version:
        lines.append(f"version = {text(manifest.version)}")
    if manifest.description:
        lines.append(f"description = {text(manifest.description)}")
    triggers = [_trigger_lines(each) for each in manifest.triggers]
    lines.append(f"trigger = {triggers[0]}" if len(triggers) == 1 else f"triggers = [{', '.join(triggers)}]")
    if manifest.world:
        lines.append(f"world = {text(manifest.world)}")
    if manifest.security_epoch:
        lines.append(f"security_epoch = {manifest.security_epoch}")
    if manifest.data_schema:
        lines.append(f"data_schema = {manifest.data_schema}")
    if manifest.swap != _default_swap(manifest.grants):
        lines.append(f"swap = {text(manifest.swap)}")
    if manifest.arch:
        lines.append(f"arch = {texts(manifest.arch)}")
    lines += _table("grants", _grant_lines(manifest.grants))
    lines += _hardware_lines(manifest.grants.devices)
    lines += _table("limits", _numbers(manifest.limits, Limits()))
    lines += _table("health", _numbers(manifest.health, Health()), always=_check(manifest.health))
    lines += _gate_tables(manifest.health)
    for key, value in manifest.config.items():
        inner = [f"description = {text(value.description)}"] if value.description else []
        inner += [] if value.default is None else [f"default = {text(value.default)}"]
        inner += [] if value.type == "text" else [f"type = {text(value.type)}"]
        inner += [f"{name} = {of}" for name, of in (("min", value.min), ("max", value.max)) if of is not None]
        inner += [f"enum = {texts(value.enum)}"] if value.enum else []
        inner += [f"pattern = {text(value.pattern)}"] if value.pattern else []
        inner += [] if value.restart else ["restart = false"]
        name = key if _BARE_KEY.fullmatch(key) else text(key)
        lines += ["", f"[config.{name}]", *inner]
    for key, secret in manifest.secrets.items():
        inner = [f"description = {text(secret.description)}"] if secret.description else []
        inner += [] if secret.required else ["required = false"]
        lines += ["", f"[secrets.{key if _BARE_KEY.fullmatch(key) else text(key)}]", *inner]
    lines += [line for key, use in manifest.data.items() for line in _data_lines(key, use)]
    return "\n".join(lines) + "\n"


def _data_lines(name: str, use: DataUse) -> list[str]:
    version = [] if use.version == data_packages.ANY else [f"version = {text(use.version)}"]
    return ["", f"[data.{name}]", f"path = {text(use.path)}", *version]


def build_table(source: str | None) -> str:
    """Render the `[build]` of an author's text, empty for none: `render` has only what is signed."""
    raw = tomllib.loads(source or "")
    if "build" not in raw:
        return ""
    command, output, watch = project.read_build(raw["build"])
    watched = [f"watch = {texts(watch)}"] if watch else []
    return "\n".join(["", "[build]", f"command = {texts(command)}", f"output = {text(output)}", *watched, ""])


def text(value: str) -> str:
    """Quote a basic string; TOML 1.0, section "String"."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def texts(values: Iterable[str]) -> str:
    """Render an array of basic strings."""
    return f"[{', '.join(text(value) for value in values)}]"


def _table(name: str, lines: list[str], always: tuple[str, ...] = ()) -> list[str]:
    return ["", f"[{name}]", *always, *lines] if lines or always else []


def _check(health: Health) -> tuple[str, ...]:
    """Render the check always: without it, the reader infers it from the exports."""
    return (f"check = {'true' if health.check else 'false'}",)


def _trigger_lines(trigger: Trigger) -> str:
    match trigger:
        case Http() | Data() | Service(args=(), stop_ms=manifest.STOP_MS):
            return text(trigger_name(trigger))
        case Service():
            stop = [f"stop = {text(toml_fields.format_duration(trigger.stop_ms))}"] * (trigger.stop_ms != STOP_MS)
            return _inline('type = "service"', *stop, *_args_line(trigger.args))
        case Schedule(every_ms=int(every)):
            due = f"every = {text(toml_fields.format_duration(every))}"
            return _inline('type = "schedule"', due, *_args_line(trigger.args))
        case Schedule():
            return _inline('type = "schedule"', f"cron = {text(trigger.cron or '')}", *_args_line(trigger.args))
        case OnMessage():
            full = [f"full = {text(trigger.full)}"] * (trigger.full != "refuse")
            return _inline('type = "message"', f"topics = {texts(trigger.topics)}", *full)


def _inline(*fields: str) -> str:
    return f"{{ {', '.join(fields)} }}"


def _args_line(args: tuple[str, ...]) -> list[str]:
    return [f"args = {texts(args)}"] if args else []


def _gate_tables(health: Health) -> list[str]:
    lines = []
    for name, gate in health.metrics.items():
        lines += ["", f"[health.metrics.{name}]", f'max-increase = "{gate.max_increase_percent}%"']
        lines += [f"min-samples = {gate.min_samples}"]
        lines += [f"per = {text(gate.per)}"] if gate.per else []
        lines += [f"wait = {text(toml_fields.format_duration(gate.wait_ms))}"]
    return lines


def _grant_lines(grants: Grants) -> list[str]:
    named = {"interfaces": grants.interfaces, "outbound": grants.outbound, "instances": grants.instances}
    named |= {"publish": grants.publishes, "publish_local": grants.publishes_locally, "subscribe": grants.subscribes}
    lines = [f"{key} = {texts(values)}" for key, values in named.items() if values]
    mounts = [f"{text(place)} = {text(name)}" for place, name in grants.mounts.items()]
    stores = [f"{name} = {texts(rights)}" for name, rights in grants.stores.items()]
    tables = {"directories": mounts, "buckets": stores}
    return [*lines, *(f"{key} = {_inline(*values)}" for key, values in tables.items() if values)]


def _hardware_lines(devices: Hardware) -> list[str]:
    lines = []
    for kind, pieces in msgspec.to_builtins(devices).items():
        for piece in pieces:
            values = {key: text(each) if isinstance(each, str) else json.dumps(each) for key, each in piece.items()}
            lines += ["", f"[[grants.{kind}]]", *(f"{key} = {value}" for key, value in values.items())]
    return lines


def _numbers(value: Limits | Health, default: Limits | Health) -> list[str]:
    lines = []
    for field in fields(type(value)):
        number = getattr(value, field.name)
        if number != getattr(default, field.name) and field.kind != "switch":
            lines.append(f"{field.key} = {quantity(field, number)}")
    return lines


def quantity(field: Field, value: int) -> str:
    """Format a value in the unit of its field."""
    match field.kind:
        case "size":
            return text(toml_fields.format_size(value))
        case "duration":
            return text(toml_fields.format_duration(value))
        case "number":
            return str(value)
        case "switch":
            return "true" if value else "false"
