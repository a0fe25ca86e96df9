"""Puts the wasi:http adapter around a guest: encodes one component that nests both.

The adapter's file (components/adapter) is a component that imports what the engine serves to every guest of wasi:http
and nests others: the first defines `wasi:io`, the standard streams, `wasi:http/types` and the handler of outgoing
requests, the second calls the guest, and the rest are shims. What is encoded here is that file, byte for byte,
followed by what joins a guest to it:

    adapter's file   imports of wasi:io, of wasi:cli's streams and of the host's part; component 0, component 1, shims
    imports          the guest's own, where the adapter does not define the same (wasi:clocks and so on)
    next component   the guest, byte for byte
    instances        0 with the engine's part; the guest with 0 for wasi:io, the standard streams and wasi:http; 1 with
                     0 and the guest
    exports          the adapter's bridge; the guest's own `wasmfleet:` interfaces

Since `wasi:io` is the adapter's, what else gives or takes its resources (`wasi:filesystem/types` opens streams) has to
be translated: of such an interface the guest gets the functions named in `_SHIMS` from a shim, which is instantiated
for it, and all others from the engine.

A guest may have been built for any 0.2 release of WASI: within 0.2 a name without its patch version says the same.
Types are rewritten as far as they name other types, since indices differ; nothing is validated (the engine does). Pure:
bytes in, bytes or `ComposeError` out. The format is the Component Model's Binary.md.
"""

import re
from typing import Final

from fleet.protocol import component, deftype, outline, sleeve, wasm
from fleet.protocol.outline import Alias, Outline

BRIDGE: Final = "wasmfleet:adapter/bridge"
HOST: Final = "wasmfleet:adapter/host"
PARTS: Final = 2
"""What the adapter's file nests before its shims."""

_INSTANCE: Final = 5
_ALIAS: Final = 6
_TYPE: Final = 7
_SORT_FUNC: Final = b"\x01"
_SORT_TYPE: Final = b"\x03"
_SORT_INSTANCE: Final = b"\x05"
# Interfaces by `_key`
_HANDLER: Final = f"{component.WASI_HTTP_HANDLER}@0.2"
_TYPES: Final = "wasi:http/types@0.2"
_IO: Final = "wasi:io/"
# The functions that give or take resources of wasi:io, by interface: the shim that stands for each.
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
# What of WASI the parts of the adapter mean by the names under which they import it.
_ENGINE: Final = {
    **{f"wasmfleet:engine/{name}@0.1": f"wasi:io/{name}@0.2" for name in ("error", "poll", "streams")},
    **{f"wasmfleet:engine/{name}@0.1": f"wasi:cli/{name}@0.2" for name in ("stdin", "stdout", "stderr")},
    "wasmfleet:engine/files@0.1": "wasi:filesystem/types@0.2",
    "wasmfleet:engine/network@0.1": "wasi:sockets/network@0.2",
    **{f"wasmfleet:engine/{shim}@0.1": key for key, shims in _SHIMS.items() for shim in shims.values()},
}


class ComposeError(ValueError):
    """These two cannot be put together. The message is for people."""


def needs_adapter(found: component.Component) -> bool:
    """Whether a board runs this component inside the adapter."""
    return bool(found.exported(component.WASI_HTTP_HANDLER)) and not found.exported(component.HTTP_HANDLER)


def compose(adapter: bytes, guest: bytes) -> bytes:
    """The component that nests both and exports the adapter's bridge.

    Args:
        adapter: the adapter's file.
        guest: a component that exports `wasi:http/incoming-handler@0.2.x`.

    Raises:
        ComposeError: the guest exports no such handler, or imports in a way that no toolchain for WASI 0.2 does.
    """
    try:
        shell, inner = outline.read(adapter), outline.read(guest)
        parts = [outline.read(part) for part in shell.components]
        if len(parts) < PARTS:
            raise ComposeError("the adapter's file is damaged: it does not nest its components; install it again")
        if _HANDLER not in map(_key, inner.exports):
            raise ComposeError(f"the component exports no {_HANDLER}: there is nothing to adapt")
        return _join(shell, inner, parts)
    except wasm.DamagedError as error:
        raise ComposeError(f"the component is damaged: {error}; build or copy it again") from error
    except deftype.ForeignTypeError as error:
        raise ComposeError(f"the component's imports are not those of a WASI 0.2 component: {error}") from error


def _join(shell: Outline, inner: Outline, parts: list[Outline]) -> bytes:
    if inner.type_imports:
        raise deftype.ForeignTypeError(f"{inner.type_imports[0]} is not an interface")
    out = _Writer(shell)
    types_part, driver_part = parts[:PARTS]
    engine = {_key(name): number for number, name in enumerate(shell.instances)}
    first = out.instantiate(0, {name: engine[_ENGINE.get(_key(name), _key(name))] for name in types_part.instances})
    adapted = {_key(name): out.export_of(first, name) for name in types_part.exports}

    wanted = _Imports(out, inner, engine, adapted, parts).answers()
    middle = out.instantiate(out.component(inner.data), wanted)

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
        if name.startswith("wasmfleet:"):
            out.export(name, out.export_of(middle, name))
    return bytes(out.data)


class _Imports:
    """The imports of the guest, and what each is answered with."""

    def __init__(
        self,
        out: "_Writer",
        inner: Outline,
        engine: dict[str, int],
        adapted: dict[str, int],
        parts: list[Outline],
    ) -> None:
        self._out = out
        self._inner = inner
        self._engine = engine
        self._adapted = adapted
        self._shims = {part.functions[0]: (at, part) for at, part in enumerate(parts[PARTS:], PARTS)}
        self._instances: list[int] = []  # of the guest's instance space, as the engine has them
        self._types: dict[int, int] = {}  # of the guest's type space, in the whole's, as far as needed
        self._of_io: set[int] = set()  # of these, the ones that are the engine's resources of wasi:io, or made of them
        self._met_io = False

    def answers(self) -> dict[str, int]:
        """An instance for each import; what nobody provides is imported by the whole."""
        wanted = {}
        served = dict(self._engine)
        for at, (name, kind) in enumerate(zip(self._inner.instances, self._inner.kinds, strict=True)):
            key = _key(name)
            own = self._adapted.get(key)
            if own is not None:
                # Types that others take from here are the engine's, as far as it has them.
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
        """The engine's instance with a shim's functions for those that have to do with wasi:io."""
        name = self._inner.instances[at]
        if _key(name) not in _SHIMS:
            raise ComposeError(f"the component imports {name}, which hands out streams that no board can serve")
        shims = _SHIMS[_key(name)]
        made = sleeve.encode(self._inner, at, _IO, shims)
        given = {
            each: self._adapted[_key(self._inner.instances[n])] if own else self._instances[n]
            for each, n, own in made.wanted
        }
        functions = {shim: self._shim(shim, instance, served) for shim in made.shims}
        return self._out.instantiate(self._out.component(made.data), given, functions=functions)

    def _shim(self, name: str, instance: int, served: dict[str, int]) -> int:
        """The function of a shim, instantiated for it."""
        number, part = self._shims[name]
        given = {}
        for each in part.instances:
            meant = _ENGINE.get(_key(each))
            given[each] = self._adapted[_key(each)] if meant is None else served[meant]
        types = {
            each: self._out.type_of(self._adapted[_OF_IO[each]] if each in _OF_IO else instance, each)
            for each in part.type_imports
        }
        return self._out.function_of(self._out.instantiate(number, given, types), name)

    def _type(self, number: int) -> int:
        """The whole's index of a type of the guest's."""
        if number not in self._types:
            if number >= len(self._inner.types):
                raise wasm.DamagedError(f"type {number} of an import is not there")
            found = self._inner.types[number]
            before, self._met_io = self._met_io, False
            if isinstance(found, Alias):
                if found.instance >= len(self._instances):
                    raise wasm.DamagedError(f"instance {found.instance} of a type is not there")
                self._types[number] = self._out.type_of(self._instances[found.instance], found.name)
                self._met_io = self._inner.instances[found.instance].startswith(_IO)
            else:
                self._types[number] = self._out.define(
                    deftype.rewrite(wasm.Cursor(self._inner.data, *found), self._type)
                )
            if self._met_io:
                self._of_io.add(number)
            self._met_io |= before
        self._met_io |= number in self._of_io
        return self._types[number]


def _key(name: str) -> str:
    """What two names have in common that mean the same interface: `wasi:io/poll@0.2` of `wasi:io/poll@0.2.3`."""
    return re.sub(r"(@(?:0\.)?[0-9]+)(?:\.[0-9]+)*$", r"\1", name)


class _Writer:
    """Appends sections, one item each, to the adapter's file, and counts the index spaces."""

    def __init__(self, shell: Outline) -> None:
        self.data = bytearray(shell.data)
        self._types = len(shell.types)
        self._instances = len(shell.instances)
        self._components = len(shell.components)
        self._functions = 0

    def _put(self, kind: int, contents: bytes) -> None:
        self.data += wasm.section(kind, b"\x01" + contents)

    def component(self, data: bytes) -> int:
        """Nest a component."""
        self.data += wasm.section(component.NESTED, data)
        self._components += 1
        return self._components - 1

    def define(self, body: bytes) -> int:
        """Define a type."""
        self._put(_TYPE, body)
        self._types += 1
        return self._types - 1

    def type_of(self, instance: int, name: str) -> int:
        """The type that an instance exports."""
        self._put(_ALIAS, _SORT_TYPE + b"\x00" + wasm.u32(instance) + wasm.name(name))
        self._types += 1
        return self._types - 1

    def function_of(self, instance: int, name: str) -> int:
        """The function that an instance exports."""
        self._put(_ALIAS, _SORT_FUNC + b"\x00" + wasm.u32(instance) + wasm.name(name))
        self._functions += 1
        return self._functions - 1

    def export_of(self, instance: int, name: str) -> int:
        """The instance that an instance exports."""
        self._put(_ALIAS, _SORT_INSTANCE + b"\x00" + wasm.u32(instance) + wasm.name(name))
        return self._instance()

    def import_instance(self, name: str, kind: int) -> int:
        """Import an instance of a type."""
        self._put(component.IMPORT, b"\x00" + wasm.name(name) + _SORT_INSTANCE + wasm.u32(kind))
        return self._instance()

    def instantiate(
        self,
        number: int,
        instances: dict[str, int],
        types: dict[str, int] | None = None,
        functions: dict[str, int] | None = None,
    ) -> int:
        """Instantiate a component with what it imports."""
        sorts = ((_SORT_INSTANCE, instances), (_SORT_TYPE, types or {}), (_SORT_FUNC, functions or {}))
        given = [wasm.name(name) + sort + wasm.u32(at) for sort, each in sorts for name, at in each.items()]
        self._put(_INSTANCE, b"\x00" + wasm.u32(number) + wasm.u32(len(given)) + b"".join(given))
        return self._instance()

    def bundle(self, *, types: dict[str, int], functions: dict[str, int]) -> int:
        """An instance made of types, each the export of that name of an instance, and of functions."""
        items = [
            b"\x00" + wasm.name(name) + _SORT_TYPE + wasm.u32(self.type_of(at, name)) for name, at in types.items()
        ]
        items += [b"\x00" + wasm.name(name) + _SORT_FUNC + wasm.u32(index) for name, index in functions.items()]
        self._put(_INSTANCE, b"\x01" + wasm.u32(len(items)) + b"".join(items))
        return self._instance()

    def export(self, name: str, instance: int) -> None:
        """Export an instance; that gives it a further index."""
        self._put(component.EXPORT, b"\x00" + wasm.name(name) + _SORT_INSTANCE + wasm.u32(instance) + b"\x00")
        self._instance()

    def _instance(self) -> int:
        self._instances += 1
        return self._instances - 1
