"""Puts the wasi:http adapter around a guest: encodes one component that nests both.

The adapter's file (components/adapter) is a component that imports what guest and adapter share, whole, and nests two
components: the first defines `wasi:http/types` and the handler of outgoing requests, the second calls the guest. What
is encoded here is that file, byte for byte, followed by what joins a guest to it:

    adapter's file   imports of wasi:io, of wasi:cli's streams and of the host's part; component 0, component 1
    imports          the guest's own, where the adapter's file does not import the same (wasi:clocks and so on)
    component 2      the guest, byte for byte
    instances        0 with the shared imports; 2 with those, with 0 for wasi:http, and with standard error for its
                     standard output (which carries the answer's body); 1 with 0 and 2
    exports          the adapter's bridge; the guest's own `wasmfleet:` interfaces

A guest may have been built for any 0.2 release of WASI: within 0.2 a name without its patch version says the same.
Types are rewritten as far as they name other types, since indices differ; nothing is validated (the engine does). Pure:
bytes in, bytes or `ComposeError` out. The format is the Component Model's Binary.md.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fleet.protocol import component, deftype, wasm

BRIDGE: Final = "wasmfleet:adapter/bridge"
HOST: Final = "wasmfleet:adapter/host"
PARTS: Final = 2

_INSTANCE: Final = 5
_ALIAS: Final = 6
_TYPE: Final = 7
_SORT_FUNC: Final = b"\x01"
_SORT_TYPE: Final = b"\x03"
_SORT_INSTANCE: Final = b"\x05"
# Interfaces by `_key`
_HANDLER: Final = f"{component.WASI_HTTP_HANDLER}@0.2"
_TYPES: Final = "wasi:http/types@0.2"
_STDOUT: Final = "wasi:cli/stdout@0.2"
_STDERR: Final = "wasi:cli/stderr@0.2"


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
        shell, inner = _outline(adapter), _outline(guest)
        parts = [_outline(part) for part in shell.components]
        if len(parts) != PARTS:
            raise ComposeError("the adapter's file is damaged: it does not nest two components; install it again")
        if _HANDLER not in map(_key, inner.exports):
            raise ComposeError(f"the component exports no {_HANDLER}: there is nothing to adapt")
        return _join(shell, inner, parts)
    except wasm.DamagedError as error:
        raise ComposeError(f"the component is damaged: {error}; build or copy it again") from error
    except deftype.ForeignTypeError as error:
        raise ComposeError(f"the component's imports are not those of a WASI 0.2 component: {error}") from error


def _join(shell: "_Outline", inner: "_Outline", parts: list["_Outline"]) -> bytes:
    out = _Writer(shell)
    types_part, driver_part = parts
    shared = {_key(name): number for number, name in enumerate(shell.instances)}
    first = out.instantiate(0, {name: shared[_key(name)] for name in types_part.imports})
    adapted = {_key(name): out.export_of(first, name) for name in types_part.exports}

    provided = shared | adapted
    stderr = provided[_STDERR]
    provided[_STDOUT] = out.bundle(
        types={"output-stream": stderr}, functions={"get-stdout": out.function_of(stderr, "get-stderr")}
    )
    wanted = _imports(out, inner, provided)
    middle = out.instantiate(out.component(inner.data), wanted)

    handler = out.export_of(middle, next(name for name in inner.exports if _key(name) == _HANDLER))
    handler = out.bundle(
        types=dict.fromkeys(("incoming-request", "response-outparam"), adapted[_TYPES]),
        functions={"handle": out.function_of(handler, "handle")},
    )
    joints = shared | adapted | {_HANDLER: handler}
    last = out.instantiate(1, {name: joints[_key(name)] for name in driver_part.imports})
    for name in driver_part.exports:
        out.export(name, out.export_of(last, name))
    for name in inner.exports:
        if name.startswith("wasmfleet:"):
            out.export(name, out.export_of(middle, name))
    return bytes(out.data)


def _imports(out: "_Writer", inner: "_Outline", provided: dict[str, int]) -> dict[str, int]:
    """What each import of the guest is answered with; what nobody provides is imported by the whole."""
    instances: list[int] = []  # of the guest's instance space, in the whole's
    types: dict[int, int] = {}  # of the guest's type space, in the whole's, as far as needed

    def type_index(number: int) -> int:
        if number not in types:
            if number >= len(inner.types):
                raise wasm.DamagedError(f"type {number} of an import is not there")
            found = inner.types[number]
            if isinstance(found, _Alias):
                if found.instance >= len(instances):
                    raise wasm.DamagedError(f"instance {found.instance} of a type is not there")
                types[number] = out.type_of(instances[found.instance], found.name)
            else:
                types[number] = out.define(deftype.rewrite(wasm.Cursor(inner.data, *found), type_index))
        return types[number]

    wanted = {}
    for name, kind in zip(inner.instances, inner.kinds, strict=True):
        instance = provided.get(_key(name))
        if instance is None:
            instance = out.import_instance(name, type_index(kind))
        instances.append(instance)
        wanted[name] = instance
    return wanted


def _key(name: str) -> str:
    """What two names have in common that mean the same interface: `wasi:io/poll@0.2` of `wasi:io/poll@0.2.3`."""
    return re.sub(r"(@(?:0\.)?[0-9]+)(?:\.[0-9]+)*$", r"\1", name)


@dataclass(frozen=True, slots=True)
class _Alias:
    """A type that an imported instance exports."""

    instance: int
    name: str


@dataclass(slots=True)
class _Outline:
    """What joining needs to know of a component.

    Attributes:
        instances, kinds: the name and the type's index of each imported instance, in order.
        exports: of instances.
        components: what is nested.
        types: for each index of the type space, up to the last import, where it is defined or what it is an alias of.
    """

    data: bytes
    instances: list[str] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    exports: list[str] = field(default_factory=list)
    components: list[bytes] = field(default_factory=list)
    types: list[tuple[int, int] | _Alias] = field(default_factory=list)

    @property
    def imports(self) -> tuple[str, ...]:
        """The names of what it imports."""
        return tuple(self.instances)


def _outline(data: bytes) -> _Outline:
    """Walk the top level of a component: its types as far as its imports go, and what it nests and exports."""
    if not data.startswith(wasm.COMPONENT):
        raise wasm.DamagedError("it does not begin like a component")
    out = _Outline(data)
    every = list(wasm.sections(data, 0, len(data)))
    last_import = max((at for at, section in enumerate(every) if section.id == component.IMPORT), default=-1)
    for at, section in enumerate(every):
        if section.id == component.NESTED:
            out.components.append(data[section.start : section.end])
        elif section.id == _INSTANCE and at < last_import:
            raise deftype.ForeignTypeError(f"an instance before an import at offset {section.start}")
        elif section.id in _ENTRIES and (at <= last_import or section.id == component.EXPORT):
            cursor = section.cursor(data)
            for _ in range(cursor.count()):
                _ENTRIES[section.id](out, cursor)
    return out


def _type(out: _Outline, cursor: wasm.Cursor) -> None:
    start = cursor.at
    deftype.rewrite(cursor, deftype.same)
    out.types.append((start, cursor.at))


def _import(out: _Outline, cursor: wasm.Cursor) -> None:
    name = wasm.extern_name(cursor)
    sort = cursor.byte()
    if sort != _SORT_INSTANCE[0]:
        raise deftype.ForeignTypeError(f"{name} is not an interface")
    out.instances.append(name)
    out.kinds.append(cursor.u32())


def _export(out: _Outline, cursor: wasm.Cursor) -> None:
    name = wasm.extern_name(cursor)
    sort = cursor.byte()
    if sort == 0:
        cursor.byte()
    cursor.u32()
    if cursor.byte():
        wasm.extern_type(cursor)
    if sort == _SORT_INSTANCE[0]:
        out.exports.append(name)


def _alias(out: _Outline, cursor: wasm.Cursor) -> None:
    sort = cursor.byte()
    if sort == 0:
        cursor.byte()
    target = cursor.byte()
    match target:
        case 0x00 | 0x01:
            instance, name = cursor.u32(), cursor.name()
            if sort == _SORT_TYPE[0]:
                out.types.append(_Alias(instance, name))
        case _:
            raise deftype.ForeignTypeError(f"an alias of form {target} at offset {cursor.at}")


_ENTRIES: Final[dict[int, Callable[[_Outline, wasm.Cursor], None]]] = {
    component.IMPORT: _import,
    component.EXPORT: _export,
    _ALIAS: _alias,
    _TYPE: _type,
}


class _Writer:
    """Appends sections, one item each, to the adapter's file, and counts the index spaces."""

    def __init__(self, shell: _Outline) -> None:
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

    def instantiate(self, number: int, arguments: dict[str, int]) -> int:
        """Instantiate a component with instances for what it imports."""
        given = b"".join(wasm.name(name) + _SORT_INSTANCE + wasm.u32(index) for name, index in arguments.items())
        self._put(_INSTANCE, b"\x00" + wasm.u32(number) + wasm.u32(len(arguments)) + given)
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
