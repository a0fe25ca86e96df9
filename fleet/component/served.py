"""Interfaces that devices serve and exports that they call: judge a component without an engine.

The table is what `components/wit/versions.toml` lists. An engine knows more (types, functions that an interface gained
later, memories): `fleet-host check-component` asks it, where it is installed. Pure.
"""

import re
from collections.abc import Collection
from typing import Final, NamedTuple

from fleet.component import wasi
from fleet.component.compose import BRIDGE, HOST, needs_adapter
from fleet.component.reader import HTTP_HANDLER, SCHEDULE_TASK, Component, bare, package
from fleet.component.toml_fields import format_size
from fleet.protocol import bounds, message_topics
from fleet.protocol.manifest import Grants, Http, Manifest, OnMessage, Schedule, Service

ANY: Final = "*"
"""Stands for every version of an interface that the host serves by functions of its own: their types decide."""

_RELEASES: Final = "0.2"
"""Stands for every release of WASI 0.2; pre-releases are not compatible with each other."""

IMPORTS: Final[dict[str, str]] = dict.fromkeys(sorted(wasi.UNGRANTED), _RELEASES) | dict.fromkeys(
    (
        wasi.LOGGING,
        wasi.MESSAGING_TYPES,
        wasi.MESSAGING_PRODUCER,
        *wasi.CONFIG,
        wasi.KEYVALUE_STORE,
        wasi.KEYVALUE_ATOMICS,
        wasi.KEYVALUE_BATCH,
        wasi.GPIO,
        wasi.GPIO_TYPES,
        wasi.SERIAL,
        wasi.METRICS,
    ),
    ANY,
)
"""Interface -> versions in which a component may import it."""

INTERFACE: Final = re.compile(r"[a-zA-Z][a-zA-Z0-9-]*:[a-zA-Z][a-zA-Z0-9-]*(/[a-zA-Z][a-zA-Z0-9-]*)?")
"""Name of an interface or a package, without its version."""

_MEMORY_MAX_BYTES: Final = 4 << 30
"""Memory that a component can address, with 32 bits."""

# Other platforms that serve an import, by the namespace or package of an import
_PLATFORMS: Final = {
    "fermyon": "Spin",
    "spin": "Spin",
    "fastly": "Fastly Compute",
    "wasmcloud": "wasmCloud",
    "wrpc": "wasmCloud",
    "golem": "Golem",
    "hermes": "Hermes",
    "obelisk": "Obelisk",
    "componentized": "another host",
}
_FILES: Final = "keep its data in files under /data (wasi:filesystem)"
_HARDWARE: Final = "have a process on the device offer the hardware over HTTP, and grant it (grants.outbound)"
_INSTEAD: Final = {
    "wasi:blobstore": _FILES,
    "wasi:keyvalue": "use wasi:keyvalue/store, atomics or batch",
    "wasi:sql": "ask a database over HTTP (wasi:http/outgoing-handler)",
    "wasi:messaging": "publish with wasi:messaging/producer, receive with wasi:messaging/incoming-handler",
    "wasi:nn": "build the model into the component, or ask for it over HTTP (wasi:http/outgoing-handler)",
    "wasi:tls": "send requests with wasi:http/outgoing-handler, which speaks TLS",
    "wasi:observe": "write to wasi:logging/logging, and figures to wasmfleet:metrics/metrics",
    "wasi:otel": "write to wasi:logging/logging, and figures to wasmfleet:metrics/metrics",
    "wasi:clocks": "use wasi:clocks/wall-clock, in UTC",
    "wasi:gpio": "use wasi:gpio/digital (0.2.0)",
    "wasi:serial": f"use {wasi.SERIAL} (0.1.0)",
    "wasi:digital-io": "use wasi:gpio/digital (0.2.0)",
    **dict.fromkeys((f"wasi:{name}" for name in ("i2c", "spi", "usb")), _HARDWARE),
    **dict.fromkeys((f"wasi:{name}" for name in ("webgpu", "graphics-context", "surface", "frame-buffer")), _HARDWARE),
}


_NOTES: Final = {
    wasi.ENVIRONMENT: "wasi:cli/environment has no variables: grant it where configuration is read there",
    wasi.PREOPENS: "wasi:filesystem has no directories: grant it where files are kept in /data",
    wasi.OUTGOING_HANDLER: "wasi:http/outgoing-handler denies each request (HTTP-request-denied): grant it, and "
    "destinations in grants.outbound, where requests are sent",
}
"""By import: what it is without a grant."""

_SOCKETS: Final = (
    "wasi:sockets is there for standard libraries: every socket and name is refused with access-denied, unless "
    "grants.outbound names where they lead, such as tcp://10.1.0.5:502"
)
_NO_TOPICS: Final = (
    f"{wasi.MESSAGING_PRODUCER} denies each message (permission-denied): name topics in grants.publish, "
    'such as "plant/#", or in grants.publish_local'
)
_NO_LINES: Final = (
    f"{wasi.GPIO} denies each pin (pin-not-allowed): name its lines in [[grants.gpio]], such as "
    'chip = "gpiochip0", line = 17, direction = "output", name = "relay"'
)
_NO_PORTS: Final = (
    f"{wasi.SERIAL} denies each port (not-granted): name its ports in [[grants.serial]], such as "
    'name = "meter", baud = 9600'
)
_NO_SOCKETS: Final = "grants.outbound names where sockets may lead, and the component does not import wasi:sockets"
_NO_FILES: Final = "grants.directories names directories, and the component does not import wasi:filesystem"
_NO_PAIRS: Final = "grants.buckets names buckets, and the component does not import wasi:keyvalue"
_NOT_ADAPTED: Final = (
    f"wasi:http/outgoing-handler denies each request: only a component that exports {wasi.HTTP_HANDLER} sends any"
)


class Unserved(NamedTuple):
    """Import that no device serves: its name as written, and a sentence that says why and what to do."""

    name: str
    why: str


def unserved(
    component: Component, *, file_name: str = "component.wasm", device: Collection[str] = ()
) -> tuple[Unserved, ...]:
    """List the imports of a component that devices do not serve.

    Args:
        component: as `fleet.component.reader.read` gives it.
        file_name: for the commands that are suggested.
        device: packages that a device reported, such as `wasi.SERVED`; empty to judge by this version's own table.
    """
    wanted = (name for name in component.imports if name not in component.plain)
    return tuple(Unserved(name, reason(name, file_name)) for name in wanted if not _served(name, component, device))


def unknown(granted: str, imports: Collection[str] = ()) -> str | None:
    """Say that a grant names nothing, and what it may mean; None for what devices serve or a component imports.

    Args:
        granted: an interface or a package, without version.
        imports: names of the component's imports.
    """
    if INTERFACE.fullmatch(granted) is None:
        if "@" in granted:
            return f"without the version: {bare(granted)!r}"
        return 'expected an interface or a package, such as "wasi:clocks" or "wasi:cli/stdout"'
    interfaces = {*IMPORTS, *map(bare, imports)}
    names = interfaces | {package(each) for each in interfaces}
    if granted in names:
        return None
    import difflib  # noqa: PLC0415 - for the sentence about a mistake alone

    if near := difflib.get_close_matches(granted, sorted(names), 1, 0.7):
        return f"no such interface; did you mean {near[0]}?"
    return f"no such interface; devices serve {', '.join(sorted({package(each) for each in IMPORTS}))}"


def is_served(name: str) -> bool:
    """Tell whether devices serve an interface in this version, to some component."""
    interface, _, version = name.partition("@")
    allowed = IMPORTS.get(interface)
    return allowed == ANY or (allowed is not None and fits(version, allowed))


def _served(name: str, component: Component, device: Collection[str]) -> bool:
    interface, _, version = name.partition("@")
    if interface == HOST:  # a guest that its author has put into the adapter
        return component.exported(BRIDGE) is not None
    if not device:
        return is_served(name)
    packages = dict(each.rpartition("@")[::2] for each in device)
    allowed = packages.get(package(name))
    known = interface in IMPORTS or package(name) not in {package(each) for each in IMPORTS}
    return known and (allowed == ANY or (allowed is not None and fits(version, allowed)))


def fits(version: str, allowed: str) -> bool:
    """Tell whether a version is `allowed`, or a release of it, as `0.2.3` is of `0.2`."""
    return version == allowed or re.fullmatch(re.escape(allowed) + r"(\.\d+)+(\+.*)?", version) is not None


def reason(name: str, file_name: str = "component.wasm") -> str:
    """Say why no device serves an import, and what to do."""
    interface = bare(name)
    if INTERFACE.fullmatch(interface) is None:
        return (
            f"{name[:80]!r} belongs to no package, so that no device serves it: move it into an interface of a "
            "package, or compose the component with the one that exports it: " + _plug(file_name)
        )
    if interface in {wasi.HTTP_HANDLER, HTTP_HANDLER, SCHEDULE_TASK}:
        return (
            f"{name} is what a device calls, and does not serve: this is middleware, compose it with the component "
            "that answers behind it: " + _plug(file_name)
        )
    if interface in IMPORTS:
        return f"{name} is of a version that no device serves; devices serve its releases of 0.2: build against those"
    return _foreign(name, file_name)


def _foreign(name: str, file_name: str) -> str:
    """Say what to do about an interface that devices do not know."""
    of = package(name)
    namespace = of.partition(":")[0]
    if platform := _PLATFORMS.get(namespace):
        return (
            f"{name} is an interface of {platform}, which no device serves: build without its SDK, "
            "against WASI 0.2 (wasi:http, wasi:filesystem, wasi:logging)"
        )
    if namespace == "wasi":
        return f"no device serves {name}: " + _INSTEAD.get(of, "leave it out, or compose a component that exports it")
    return f"no device serves {name}: compose it with the component that exports it: {_plug(file_name)}"


def _plug(file_name: str) -> str:
    stem = file_name.removesuffix(".wasm")
    return f"wac plug {file_name} --plug OTHER.wasm -o {stem}.whole.wasm"


def uncalled(component: Component | None, manifest: Manifest, device: Collection[str]) -> str:
    """Say what of the manifest a device does not have, by what it reported: triggers, swaps, sockets; empty for none.

    `device`: as in `unserved`; of a device of before, which reports none of these, everything later is missing.
    """
    tasks = component is None or component.exported(SCHEDULE_TASK)
    runs = any(isinstance(each, Service) or (isinstance(each, Schedule) and not tasks) for each in manifest.triggers)
    grants = manifest.grants
    bus = bool(manifest.triggers_of(OnMessage)) or bool(grants.subscribes or grants.publishes_locally)
    needs = (
        (runs, wasi.RUNS, f"it does not run {wasi.RUN}"),
        (manifest.swap == "replace", wasi.REPLACES, "it does not swap by replacement"),
        (len(manifest.triggers) > 1, wasi.SEVERAL_TRIGGERS, "it knows manifests with one trigger only"),
        (grants.sockets, wasi.SOCKETS_BY_GRANT, "it denies every socket, whatever grants.outbound names"),
        (bool(grants.mounts), wasi.DIRECTORIES, "it gives components no directories but their own"),
        (bool(manifest.health.metrics), wasi.GATES, "it knows no gates on metrics (health.metrics)"),
        (
            manifest.is_data or bool(manifest.data),
            wasi.DATA_PACKAGES,
            "it knows no data packages: its agent and host are of an earlier version",
        ),
        (bool(grants.stores), wasi.BUCKETS, "it has no key-value buckets but default, which is not durable"),
        (bus, wasi.BUS, "it has no bus for messages between components"),
    )
    return next((sentence for needed, way, sentence in needs if needed and way not in device), "")


def not_offered(grants: Grants, device: Collection[str]) -> str:
    """Say which directories the owner of a device does not offer, by what it reported; empty where it offers all."""
    missing = sorted({name for name in grants.mounts.values() if wasi.offered_directory(name) not in device})
    if not missing:
        return ""
    return f"its owner offers no directory {', '.join(missing)} ([policy.directories] in its agent.toml)"


def problems(component: Component, manifest: Manifest | None, *, file_name: str = "component.wasm") -> tuple[str, ...]:
    """Say in sentences why no device could run a component; nothing where the table has no objection.

    `manifest`: None where there is none yet; then its imports alone are judged.
    """
    found = [each.why for each in unserved(component, file_name=file_name)]
    if manifest is None:
        return tuple(found)
    if manifest.is_data:
        found.append("it is a data package, which no device calls")
    found += [
        f"grants.subscribe does not cover {each!r}, so that none of its messages would come: "
        f'write subscribe = ["{each}"] under [grants]'
        for trigger in manifest.triggers_of(OnMessage)
        for each in trigger.topics
        if not message_topics.covered(each, manifest.grants.subscribes)
    ]
    if manifest.limits.memory_bytes > _MEMORY_MAX_BYTES:
        most = format_size(manifest.limits.memory_bytes)
        found.append(f"limits.memory is {most}: a component addresses at most {format_size(_MEMORY_MAX_BYTES)}")
    return tuple(found)


def notes(component: Component, grants: Grants) -> tuple[str, ...]:
    """Say what is served and yet does not do what its name promises, with these grants."""
    names = [name for name in component.imports if name not in component.plain]
    wanted = [bare(name) for name in names if not grants.allows(name)]
    found = [note for interface, note in _NOTES.items() if interface in wanted]
    if any(bare(name) == wasi.OUTGOING_HANDLER for name in names) and not needs_adapter(component):
        found = [note for note in found if note != _NOTES[wasi.OUTGOING_HANDLER]] + [_NOT_ADAPTED]
    sockets = any(package(name) == wasi.SOCKETS for name in names)
    if sockets and not grants.sockets:
        found.append(_SOCKETS)
    topics = (*grants.publishes, *grants.publishes_locally)
    if any(bare(name) == wasi.MESSAGING_PRODUCER for name in names) and not topics:
        found.append(_NO_TOPICS)
    if any(bare(name) == wasi.GPIO for name in names) and not grants.devices.gpio:
        found.append(_NO_LINES)
    if any(bare(name) == wasi.SERIAL for name in names) and not grants.devices.serial:
        found.append(_NO_PORTS)
    if grants.sockets and not sockets:
        found.append(_NO_SOCKETS)
    if grants.stores and not any(package(name) == wasi.KEYVALUE for name in names):
        found.append(_NO_PAIRS)
    if grants.mounts:
        found = [note for note in found if note != _NOTES[wasi.PREOPENS]]
        if wasi.PREOPENS not in map(bare, names):
            found.append(_NO_FILES)
    return tuple(found)


def serial(manifest: Manifest) -> str:
    """Say that requests wait for each other, where the manifest allows one at a time; empty otherwise."""
    if not manifest.triggers_of(Http) or manifest.limits.concurrency > 1:
        return ""
    return (
        "requests are answered one at a time, the next waits until the last is answered: "
        "limits.concurrency in component.toml (1 to 64) allows more at once"
    )


def too_large(manifest: Manifest, memory_bytes: int) -> str:
    """Say that a device has less memory than a component may ask for; empty where it fits or nothing is known."""
    if not memory_bytes or manifest.limits.memory_bytes <= memory_bytes:
        return ""
    return (
        f"it has {memory_bytes // bounds.MIB} MiB of memory, limits.memory is "
        f"{format_size(manifest.limits.memory_bytes)}"
    )
