"""Nest a guest in the wasi:http adapter; interface shims; the adapter's bytes.

The adapter's file (components/adapter) is a component that imports what the engine serves to every guest of wasi:http
and nests others: the first defines `wasi:io`, the standard streams, `wasi:http/types` and the handler of outgoing
requests, the second calls the guest, the others are shims. The composed component is that file, byte for byte,
followed by sections that connect it with a guest:

    adapter's file   imports of wasi:io, of wasi:cli's streams and of the host's part; component 0, component 1, shims
    imports          the guest's own, where the adapter does not define the same (wasi:clocks and so on)
    next component   the guest, byte for byte
    instances        0 with the engine's part; the guest with 0 for wasi:io, the standard streams and wasi:http; 1 with
                     0 and the guest
    exports          the adapter's bridge; the guest's own `wasmfleet:` interfaces, its `wasi:cli/run` and its
                     `wasi:messaging/incoming-handler`

A guest that may have sockets gets `wasi:sockets` from the adapter too: the file ends in two other forms of component 0,
which define it, one for guests of wasi:http and one for all others, which need no component 1. They are cut off where
they are not needed, so that other guests carry none of it.

Since `wasi:io` is the adapter's, other interfaces that give or take its resources (`wasi:filesystem/types` opens
streams) are translated: the guest gets the functions named in `_SHIMS` from a shim, which is instantiated for it, and
all others from the engine. Such a mixture needs a component around it, since the Component Model cannot make an
instance of methods alone. `encode_shim` builds that component:

    imports   the interfaces whose types it names, the engine's and, of wasi:io, the adapter's too; the interface
              itself; each function that is replaced, under its shim's name
    exports   the interface, item by item in the order of the guest's import, with the adapter's resources of wasi:io

A guest may have been built for any 0.2 release of WASI: interfaces of different patch versions are the same. Types are
rewritten as far as they name other types, since indices differ; the engine validates the result. Pure: bytes in, bytes
or `ComposeError` out. The format is the Component Model's Binary.md.

The adapter's bytes are shipped compressed, to keep binaries in the repository small; their digest goes into an
image's key. components/adapter has the source, the WIT and a rebuild that compares.
"""

import functools
import hashlib
import re
from dataclasses import dataclass, field, replace
from typing import Final

from fleet.component import binary, reader, types, wasi
from fleet.component.reader import Alias, ComponentIndex

BRIDGE: Final = "wasmfleet:adapter/bridge"
HOST: Final = "wasmfleet:adapter/host"
SOCKETS_HOST: Final = "wasmfleet:adapter/sockets"
HOST_INTERFACES: Final = frozenset({HOST, SOCKETS_HOST})
"""Imports of the adapter itself, which comes with wasi:http, or with sockets; they need no grant."""

_EXPORTS_KEPT: Final = frozenset({wasi.RUN, wasi.MESSAGING_HANDLER})

PARTS: Final = 2
"""Components that the adapter's file nests before its shims."""
WITH_SOCKETS: Final = 2
"""Components that it nests behind them: other forms of the first, for guests with sockets, of wasi:http and others."""

_INSTANCE: Final = 5
_ALIAS: Final = 6
_TYPE: Final = 7
_USES_MAX: Final = 32  # no interface of WASI is 10 deep; each costs a few of Python's frames
_SORT_FUNC: Final = b"\x01"
_SORT_TYPE: Final = b"\x03"
_SORT_INSTANCE: Final = b"\x05"
# Interfaces by `_key`
_HANDLER: Final = f"{wasi.HTTP_HANDLER}@0.2"
_TYPES: Final = f"{wasi.HTTP_TYPES}@0.2"
_IO: Final = "wasi:io/"
# Shims of the functions that return or take resources of wasi:io, by interface.
_SHIMS: Final = {
    "wasi:clocks/monotonic-clock@0.2": {"subscribe-instant": "clock-instant", "subscribe-duration": "clock-duration"},
    "wasi:filesystem/types@0.2": {
        "[method]descriptor.read-via-stream": "files-read",
        "[method]descriptor.write-via-stream": "files-write",
        "[method]descriptor.append-via-stream": "files-append",
        "filesystem-error-code": "files-error",
    },
    "wasi:sockets/network@0.2": {"network-error-code": "network-error"},
    "wasi:sockets/tcp@0.2": {
        "[method]tcp-socket.finish-connect": "tcp-connect",
        "[method]tcp-socket.accept": "tcp-accept",
        "[method]tcp-socket.subscribe": "tcp-subscribe",
    },
    "wasi:sockets/udp@0.2": {
        "[method]udp-socket.subscribe": "udp-subscribe",
        "[method]incoming-datagram-stream.subscribe": "udp-incoming",
        "[method]outgoing-datagram-stream.subscribe": "udp-outgoing",
    },
    "wasi:sockets/ip-name-lookup@0.2": {"[method]resolve-address-stream.subscribe": "lookup-subscribe"},
}
_OF_IO: Final = {
    "pollable": "wasi:io/poll@0.2",
    "error": "wasi:io/error@0.2",
    **dict.fromkeys(("input-stream", "output-stream"), "wasi:io/streams@0.2"),
}
# WASI interfaces by the names under which the adapter's parts import them.
_ENGINE: Final = {
    **{f"wasmfleet:engine/{name}@0.1": f"wasi:io/{name}@0.2" for name in ("error", "poll", "streams")},
    **{f"wasmfleet:engine/{name}@0.1": f"wasi:cli/{name}@0.2" for name in ("stdin", "stdout", "stderr")},
    "wasmfleet:engine/files@0.1": "wasi:filesystem/types@0.2",
    "wasmfleet:engine/network@0.1": "wasi:sockets/network@0.2",
    **{f"wasmfleet:engine/{shim}@0.1": key for key, shims in _SHIMS.items() for shim in shims.values()},
}


class ComposeError(ValueError):
    """Adapter and guest cannot be composed. The message is for people."""


def needs_adapter(found: reader.Component) -> bool:
    """Tell whether a device runs a component inside the adapter."""
    return bool(found.exported(wasi.HTTP_HANDLER)) and not found.exported(reader.HTTP_HANDLER)


def has_sockets(found: reader.Component) -> bool:
    """Tell whether a component imports anything of `wasi:sockets`."""
    return any(name.startswith(f"{wasi.SOCKETS}/") for name in found.imports)


def compose(adapter: bytes, guest: bytes, *, sockets: bool = False) -> bytes:
    """Compose a component that nests both and exports the adapter's bridge, or, without wasi:http, what the guest does.

    Args:
        adapter: the adapter's file.
        guest: a component that exports `wasi:http/incoming-handler@0.2.x`; with `sockets`, any.
        sockets: the guest's `wasi:sockets` are the adapter's, and not the engine's.

    Raises:
        ComposeError: the guest exports no such handler, or imports in a way that no toolchain for WASI 0.2 does.
    """
    try:
        shell, inner = reader.read_index(adapter), reader.read_index(guest)
        parts = [reader.read_index(part) for part in shell.components]
        if len(parts) < PARTS + WITH_SOCKETS:
            raise ComposeError("the adapter's file is damaged: it does not nest its components; install it again")
        http = _HANDLER in map(_key, inner.exports)
        if not http and not sockets:
            raise ComposeError(f"the component exports no {_HANDLER}: there is nothing to adapt")
        if not sockets:
            shell = _without_sockets(shell)
        first = 0 if not sockets else -2 if http else -1
        return _join(shell, inner, parts, first % len(parts), http=http)
    except binary.DamagedError as error:
        raise ComposeError(f"the component is damaged: {error}; build or copy it again") from error
    except types.ForeignTypeError as error:
        raise ComposeError(f"the component's imports are not those of a WASI 0.2 component: {error}") from error


def _without_sockets(shell: ComponentIndex) -> ComponentIndex:
    """Cut off the components at the adapter's end that define sockets."""
    *kept, last = shell.components[:-WITH_SOCKETS]
    size = len(shell.data) - sum(len(binary.section(reader.NESTED, each)) for each in shell.components[-WITH_SOCKETS:])
    assert shell.data[:size].endswith(last)
    return replace(shell, data=shell.data[:size], components=[*kept, last])


def _join(
    shell: ComponentIndex, inner: ComponentIndex, parts: list[ComponentIndex], number: int, *, http: bool
) -> bytes:
    if inner.type_imports:
        raise types.ForeignTypeError(f"{inner.type_imports[0]} is not an interface")
    out = _Writer(shell)
    first_part, driver_part = parts[number], parts[1]
    engine = {_key(name): number for number, name in enumerate(shell.instances)}
    given = {}
    for at, name in enumerate(first_part.instances):
        key = _ENGINE.get(_key(name), _key(name))
        given[name] = engine[key] if key in engine else out.import_plain(first_part, at)
    first = out.instantiate(number, given)
    adapted = {_key(name): out.export_of(first, name) for name in first_part.exports}

    wanted = _Imports(out, inner, engine, adapted, parts).answers()
    middle = out.instantiate(out.component(inner.data), wanted)
    if not http:
        for name in inner.exports:
            out.export(name, out.export_of(middle, name))
        return bytes(out.data)

    handler = out.export_of(middle, next(name for name in inner.exports if _key(name) == _HANDLER))
    handler = out.bundle(
        types=dict.fromkeys(("incoming-request", "response-outparam"), adapted[_TYPES]),
        functions={"handle": out.function_of(handler, "handle")},
    )
    joints = engine | adapted | {_HANDLER: handler}
    last = out.instantiate(1, {name: joints[_key(name)] for name in driver_part.instances})
    for name in driver_part.exports:
        out.export(name, out.export_of(last, name))
    for name in inner.exports:
        if name.startswith("wasmfleet:") or reader.bare(name) in _EXPORTS_KEPT:
            out.export(name, out.export_of(middle, name))
    return bytes(out.data)


class _Imports:
    """Imports of the guest, and the item that satisfies each."""

    def __init__(
        self,
        out: "_Writer",
        inner: ComponentIndex,
        engine: dict[str, int],
        adapted: dict[str, int],
        parts: list[ComponentIndex],
    ) -> None:
        self._out = out
        self._inner = inner
        self._engine = engine
        self._adapted = adapted
        self._shims = {part.functions[0]: (at, part) for at, part in enumerate(parts[PARTS:-WITH_SOCKETS], PARTS)}
        self._instances: list[int] = []  # by index of the guest's instances: as the engine provides them
        self._types: dict[int, int] = {}  # by index of the guest's types: index in the outer one, if needed
        self._of_io: set[int] = set()  # subset: the engine's resources of wasi:io, or types that contain some
        self._met_io = False
        self._depth = 0

    def answers(self) -> dict[str, int]:
        """Return an instance for each import; imports without a provider become imports of the outer component."""
        wanted = {}
        served = dict(self._engine)
        for at, (name, kind) in enumerate(zip(self._inner.instances, self._inner.kinds, strict=True)):
            if kind < 0:  # of the guest's own
                self._instances.append(-1)
                continue
            key = _key(name)
            own = self._adapted.get(key)
            if own is not None:
                # Types that other imports take from here are the engine's where it has them.
                self._instances.append(self._engine.get(key, own))
                wanted[name] = own
                continue
            self._met_io = False
            instance = self._engine.get(key)
            if instance is None:
                instance = self._out.import_instance(name, self._type(kind))
                served[key] = instance
            self._instances.append(instance)
            wanted[name] = self._shimmed(at, instance, served) if self._met_io else instance
        return wanted

    def _shimmed(self, at: int, instance: int, served: dict[str, int]) -> int:
        """Replace the functions of an engine's instance that concern wasi:io by those of a shim."""
        name = self._inner.instances[at]
        if _key(name) not in _SHIMS:
            raise ComposeError(f"the component imports {name}, whose streams no device can serve")
        shims = _SHIMS[_key(name)]
        made = encode_shim(self._inner, at, _IO, shims)
        given = {
            each: _at(self._adapted, _key(binary.item(self._inner.instances, n, "instance")))
            if own
            else self._imported(n, each)
            for each, n, own in made.wanted
        }
        functions = {shim: self._shim(shim, instance, served) for shim in made.shims}
        return self._out.instantiate(self._out.component(made.data), given, functions=functions)

    def _shim(self, name: str, instance: int, served: dict[str, int]) -> int:
        """Instantiate a shim and return its function."""
        number, part = self._shims[name]
        given = {}
        for each in part.instances:
            meant = _ENGINE.get(_key(each))
            given[each] = self._adapted[_key(each)] if meant is None else _at(served, meant)
        types = {
            each: self._out.type_of(self._adapted[_OF_IO[each]] if each in _OF_IO else instance, each)
            for each in part.type_imports
        }
        return self._out.function_of(self._out.instantiate(number, given, types), name)

    def _imported(self, number: int, what: str) -> int:
        """Return the instance that answers an import of the guest before the one at hand."""
        found = binary.item(self._instances, number, "instance")
        if found < 0:
            raise types.ForeignTypeError(f"the type {what} of an import is an instance's of its own")
        return found

    def _type(self, number: int) -> int:
        """Return the outer component's index of a type of the guest."""
        if number not in self._types:
            if self._depth > _USES_MAX:
                raise binary.DamagedError(f"types that use one another in a circle, or more than {_USES_MAX} deep")
            if number >= len(self._inner.types):
                raise binary.DamagedError(f"type {number} of an import is not there")
            found = self._inner.types[number]
            before, self._met_io = self._met_io, False
            if isinstance(found, Alias):
                self._types[number] = self._out.type_of(self._imported(found.instance, found.name), found.name)
                self._met_io = self._inner.instances[found.instance].startswith(_IO)
            else:
                self._depth += 1
                self._types[number] = self._out.define(
                    types.rewrite(binary.Cursor(self._inner.data, *found), self._type)
                )
                self._depth -= 1
            if self._met_io:
                self._of_io.add(number)
            self._met_io |= before
        self._met_io |= number in self._of_io
        return self._types[number]


def _at(instances: dict[str, int], name: str) -> int:
    """Return the instance of an interface. Raises `ForeignTypeError` where there is none."""
    if name not in instances:
        raise types.ForeignTypeError(f"a type of an import is of {name!r}, which is not there")
    return instances[name]


def _key(name: str) -> str:
    """Return an interface's name without patch version: `wasi:io/poll@0.2` of `wasi:io/poll@0.2.3`."""
    return re.sub(r"(@(?:0\.)?[0-9]+)(?:\.[0-9]+)*$", r"\1", name)


class _Writer:
    """Append sections of one item to the adapter's file, and count the index spaces."""

    def __init__(self, shell: ComponentIndex) -> None:
        self.data = bytearray(shell.data)
        self._types = len(shell.types)
        self._instances = len(shell.instances)
        self._components = len(shell.components)
        self._functions = 0

    def _put(self, kind: int, contents: bytes) -> None:
        self.data += binary.section(kind, b"\x01" + contents)

    def component(self, data: bytes) -> int:
        """Nest a component."""
        self.data += binary.section(reader.NESTED, data)
        self._components += 1
        return self._components - 1

    def define(self, body: bytes) -> int:
        """Define a type."""
        self._put(_TYPE, body)
        self._types += 1
        return self._types - 1

    def type_of(self, instance: int, name: str) -> int:
        """Alias the type that an instance exports."""
        self._put(_ALIAS, _SORT_TYPE + b"\x00" + binary.u32(instance) + binary.name(name))
        self._types += 1
        return self._types - 1

    def function_of(self, instance: int, name: str) -> int:
        """Alias the function that an instance exports."""
        self._put(_ALIAS, _SORT_FUNC + b"\x00" + binary.u32(instance) + binary.name(name))
        self._functions += 1
        return self._functions - 1

    def export_of(self, instance: int, name: str) -> int:
        """Alias the instance that an instance exports."""
        self._put(_ALIAS, _SORT_INSTANCE + b"\x00" + binary.u32(instance) + binary.name(name))
        return self._instance()

    def import_instance(self, name: str, kind: int) -> int:
        """Import an instance of a type."""
        self._put(reader.IMPORT, b"\x00" + binary.name(name) + _SORT_INSTANCE + binary.u32(kind))
        return self._instance()

    def import_plain(self, part: ComponentIndex, at: int) -> int:
        """Import what a nested component does, where its type names no other."""
        kind = self.define(types.rewrite(binary.Cursor(part.data, *part.kind(at)), _no_type))
        return self.import_instance(part.instances[at], kind)

    def instantiate(
        self,
        number: int,
        instances: dict[str, int],
        types: dict[str, int] | None = None,
        functions: dict[str, int] | None = None,
    ) -> int:
        """Instantiate a component with its imports."""
        sorts = ((_SORT_INSTANCE, instances), (_SORT_TYPE, types or {}), (_SORT_FUNC, functions or {}))
        given = [binary.name(name) + sort + binary.u32(at) for sort, each in sorts for name, at in each.items()]
        self._put(_INSTANCE, b"\x00" + binary.u32(number) + binary.u32(len(given)) + b"".join(given))
        return self._instance()

    def bundle(self, *, types: dict[str, int], functions: dict[str, int]) -> int:
        """Bundle an instance of types, each the export of that name of an instance, and of functions."""
        items = [
            b"\x00" + binary.name(name) + _SORT_TYPE + binary.u32(self.type_of(at, name)) for name, at in types.items()
        ]
        items += [b"\x00" + binary.name(name) + _SORT_FUNC + binary.u32(index) for name, index in functions.items()]
        self._put(_INSTANCE, b"\x01" + binary.u32(len(items)) + b"".join(items))
        return self._instance()

    def export(self, name: str, instance: int) -> None:
        """Export an instance, which gives it a further index."""
        self._put(reader.EXPORT, b"\x00" + binary.name(name) + _SORT_INSTANCE + binary.u32(instance) + b"\x00")
        self._instance()

    def _instance(self) -> int:
        self._instances += 1
        return self._instances - 1


def _no_type(number: int) -> int:
    raise binary.DamagedError(f"type {number} of the adapter's import is not its own")


_FUNC: Final = b"\x01"


@dataclass(frozen=True, slots=True)
class InterfaceShim:
    """Encoded shim component and its imports.

    Attributes:
        data: the component.
        wanted: its imports of interfaces: a name, the number of the guest's import, and whether the adapter's own
            interface satisfies it (else the engine's).
        shims: the names of the functions that it imports.
    """

    data: bytes
    wanted: tuple[tuple[str, int, bool], ...]
    shims: tuple[str, ...]


def encode_shim(guest: ComponentIndex, at: int, own: str, shims: dict[str, str]) -> InterfaceShim:
    """Encode the shim around one of the guest's imports.

    Args:
        guest: the component.
        at: the import's number.
        own: prefix of the names of interfaces that the adapter defines itself.
        shims: functions of the interface that are replaced, with their shims.

    Raises:
        wasm.DamagedError, deftype.ForeignTypeError: the import's type is not that of an interface.
    """
    return _Encoder(guest, at, own, shims).encode()


@dataclass(slots=True)
class _Encoder:
    guest: ComponentIndex
    at: int
    own: str
    shims: dict[str, str]
    out: bytearray = field(default_factory=lambda: bytearray(binary.COMPONENT))
    types: int = 0
    functions: int = 0
    wanted: list[tuple[str, int, bool]] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    known: dict[tuple[int, bool], int] = field(default_factory=dict)
    imported: dict[tuple[int, bool], int] = field(default_factory=dict)
    depth: int = 0

    def encode(self) -> InterfaceShim:
        """Encode the component. `inside` holds the types of its imports, `outside` those of its exports."""
        engine = self._interface(self.at, own=False)
        inside: list[int] = []
        outside: list[int] = []
        find = functools.partial(binary.item, what="type")
        for item in types.declarations(binary.Cursor(self.guest.data, *self.guest.kind(self.at))):
            match item:
                case types.Definition(start, end):
                    for space in (inside, outside):
                        cursor = binary.Cursor(self.guest.data, start, end)
                        body = types.rewrite(cursor, functools.partial(find, space))
                        space.append(self._define(body))
                case types.Outer(number):
                    inside.append(self._outer(number, own=True))
                    outside.append(inside[-1])
                case types.Export(name, True, int(number)):
                    self._export_function(engine, name, find(inside, number), find(outside, number))
                case types.Export(name, _, None):
                    inside.append(self._type_of(engine, name))
                    outside.append(self._export_type(name, inside[-1]))
                case types.Export(name, _, int(number)):
                    known, exported = find(inside, number), find(outside, number)
                    foreign = known in self.known.values()  # of another interface, passed on
                    inside.append(known if foreign else self._type_of(engine, name))
                    outside.append(self._export_type(name, exported))
        return InterfaceShim(bytes(self.out), tuple(self.wanted), tuple(self.used))

    def _outer(self, number: int, *, own: bool) -> int:
        """Rewrite a type of the guest: with `own` to the adapter's where it has one, else to the engine's."""
        found = binary.item(self.guest.types, number, "type")
        if not isinstance(found, Alias):
            raise types.ForeignTypeError(f"type {number} of an import is no interface's")
        own = own and binary.item(self.guest.instances, found.instance, "instance").startswith(self.own)
        if (number, own) not in self.known:
            self.known[number, own] = self._type_of(self._interface(found.instance, own=own), found.name)
        return self.known[number, own]

    def _interface(self, at: int, *, own: bool) -> int:
        """Import an interface that the guest imports."""
        if (at, own) not in self.imported:
            if self.depth > _USES_MAX:
                raise binary.DamagedError(f"interfaces that use one another in a circle, or more than {_USES_MAX} deep")
            cursor = binary.Cursor(self.guest.data, *self.guest.kind(at))
            self.depth += 1
            kind = self._define(types.rewrite(cursor, lambda number: self._outer(number, own=own)))
            self.depth -= 1
            name = f"{'own' if own else 'engine'}-i{at}"
            self.wanted.append((name, at, own))
            self._put(reader.IMPORT, b"\x00" + binary.name(name) + _SORT_INSTANCE + binary.u32(kind))
            self.imported[at, own] = len(self.imported)
        return self.imported[at, own]

    def _type_of(self, instance: int, name: str) -> int:
        self._put(_ALIAS, _SORT_TYPE + b"\x00" + binary.u32(instance) + binary.name(name))
        return self._further_type()

    def _export_type(self, name: str, number: int) -> int:
        self._put(reader.EXPORT, b"\x00" + binary.name(name) + _SORT_TYPE + binary.u32(number) + b"\x00")
        return self._further_type()

    def _export_function(self, engine: int, name: str, inside: int, outside: int) -> None:
        shim = self.shims.get(name)
        if shim is None:
            self._put(_ALIAS, _FUNC + b"\x00" + binary.u32(engine) + binary.name(name))
        else:
            self.used.append(shim)
            self._put(reader.IMPORT, b"\x00" + binary.name(shim) + _FUNC + binary.u32(inside))
        item = b"\x00" + binary.name(name) + _FUNC + binary.u32(self.functions)
        self._put(reader.EXPORT, item + b"\x01" + _FUNC + binary.u32(outside))
        self.functions += 2  # an export makes a further one

    def _define(self, body: bytes) -> int:
        self._put(_TYPE, body)
        return self._further_type()

    def _further_type(self) -> int:
        self.types += 1
        return self.types - 1

    def _put(self, kind: int, contents: bytes) -> None:
        self.out += binary.section(kind, b"\x01" + contents)


_FILE: Final = "adapter.wasm.xz"


@functools.cache
def load_adapter() -> bytes:
    """Read the adapter."""
    import lzma  # noqa: PLC0415 - many processes import this module, few read the adapter
    from importlib import resources  # noqa: PLC0415

    return lzma.decompress(resources.files("fleet.component").joinpath(_FILE).read_bytes())


def adapter_digest() -> str:
    """Return the sha256 of the adapter, in hex."""
    return hashlib.sha256(load_adapter()).hexdigest()
