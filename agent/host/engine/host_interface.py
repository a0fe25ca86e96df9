"""HostInterface: names, versions and types of an interface that the host serves by functions of its own.

The engine knows none of them: `agent.host.interfaces` has a module for each, and the worker hands them in. An interface
is matched by its name, whatever its version, and a function by its type, so that one implementation serves every draft
that has the same types; `agent.host.engine.runtime.Image.check_imports` compares them before any code runs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

from wasmtime import component as wc
from wasmtime.component import Variant

from agent.host.engine.adapter_abi import Denials, Requests
from agent.host.engine.codec import Signature

__all__ = [
    "NOTHING_SERVED",
    "NO_INTERFACES",
    "Function",
    "HostInterface",
    "Interfaces",
    "Part",
    "Served",
    "Surroundings",
    "Variant",
    "own",
    "record",
]


class Part(Protocol):
    """Part of a worker that was set up for one interface, such as its socket to the key-value store."""

    def reset(self) -> None:
        """Forget the handles of an instance that has ended."""


Function = Callable[..., Any]
"""Function for the linker: gets the store, then the arguments of the call."""


@dataclass(frozen=True, slots=True)
class Surroundings:
    """Whatever the functions of one instance of a guest may use.

    Attributes:
        config: configuration and secrets by name; the same mapping for the life of the worker, changed in place.
        log: log of the instance, which counts denials too.
        name: of the import that is served, with its version.
        parts: what the worker has set up for one interface alone, such as its database, by the interface's package.
    """

    config: Mapping[str, str]
    log: Denials
    name: str
    parts: Mapping[str, Part]


@dataclass(frozen=True, slots=True)
class HostInterface:
    """Interface of the host's own.

    Attributes:
        name: without version.
        versions: that `components/wit/versions.toml` lists, newest first.
        functions: type of each function, by name. One that is missing here is not linked, so that a component which
            imports it is refused.
        drafts: types of functions that are others in an earlier version, by version and name; `make` translates.
        make: returns the functions for an instance.
        resources: resource that the host defines -> its number among the host's; `make` returns what is called when a
            guest drops one as `[drop]NAME`.
    """

    name: str
    versions: tuple[str, ...]
    functions: Mapping[str, Signature]
    make: Callable[[Surroundings], Mapping[str, Function]]
    resources: Mapping[str, int] = field(default_factory=dict)
    drafts: Mapping[str, Mapping[str, Signature]] = field(default_factory=dict)

    def types(self, name: str) -> Mapping[str, Signature]:
        """Return the types of the functions for an import by this name with its version."""
        return {**self.functions, **self.drafts.get(name.partition("@")[2], {})}


Interfaces = Mapping[str, HostInterface]
"""Interfaces of the host's own by their names without versions."""

NO_INTERFACES: Final[Interfaces] = {}


@dataclass(frozen=True, slots=True)
class Served:
    """Functions of the host's own for one guest, and the directories that it may read.

    Attributes:
        interfaces: those that a component may import.
        parts: as `Surroundings` has them.
        outgoing: sends the requests of a guest of wasi:http; None to deny them.
        readable: directories that it may read, by the path at which it sees each.
    """

    interfaces: Interfaces = field(default_factory=dict)
    parts: Mapping[str, Part] = field(default_factory=dict)
    outgoing: Requests | None = None
    readable: Mapping[str, str] = field(default_factory=dict)


NOTHING_SERVED: Final = Served()


def own(number: int, kind: int) -> Any:
    """Return a handle for the guest, of the host's resource `kind`; `number` is what comes back with it."""
    return wc.ResourceHost.own(number, kind)


def record(**fields: Any) -> Any:
    """Return a record's value; a field's `_` stands for `-`."""
    made = wc.Record()
    for name, value in fields.items():
        setattr(made, name.replace("_", "-"), value)
    return made
