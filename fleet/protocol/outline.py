"""What `fleet.protocol.compose` needs to know of a component: its imports, as far as its types go, and what it exports.

Pure: bytes in, an `Outline` or an error out. The format is the Component Model's Binary.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fleet.protocol import component, deftype, wasm

_INSTANCES: Final = 5
_ALIAS: Final = 6
_TYPE: Final = 7
_FUNC: Final = 1
_SORT_TYPE: Final = 3
_INSTANCE: Final = 5


@dataclass(frozen=True, slots=True)
class Alias:
    """A type that an imported instance exports."""

    instance: int
    name: str


@dataclass(slots=True)
class Outline:
    """What joining needs to know of a component.

    Attributes:
        instances, kinds: the name and the type's index of each imported instance, in order.
        exports: of instances; functions: of functions.
        type_imports: the names of imported types, which no guest has.
        components: what is nested.
        types: for each index of the type space, up to the last import, where it is defined or what it is an alias of.
    """

    data: bytes
    instances: list[str] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    exports: list[str] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)
    type_imports: list[str] = field(default_factory=list)
    components: list[bytes] = field(default_factory=list)
    types: list[tuple[int, int] | Alias] = field(default_factory=list)

    def kind(self, instance: int) -> tuple[int, int]:
        """Where the type of an imported instance stands."""
        found = self.types[self.kinds[instance]]
        if isinstance(found, Alias):
            raise deftype.ForeignTypeError(f"{self.instances[instance]} has a type of another's")
        return found


def read(data: bytes) -> Outline:
    """Walk the top level of a component: its types as far as its imports go, and what it nests and exports."""
    if not data.startswith(wasm.COMPONENT):
        raise wasm.DamagedError("it does not begin like a component")
    out = Outline(data)
    every = list(wasm.sections(data, 0, len(data)))
    last_import = max((at for at, section in enumerate(every) if section.id == component.IMPORT), default=-1)
    for at, section in enumerate(every):
        if section.id == component.NESTED:
            out.components.append(data[section.start : section.end])
        elif section.id == _INSTANCES and at < last_import:
            raise deftype.ForeignTypeError(f"an instance before an import at offset {section.start}")
        elif section.id in _ENTRIES and (at <= last_import or section.id == component.EXPORT):
            cursor = section.cursor(data)
            for _ in range(cursor.count()):
                _ENTRIES[section.id](out, cursor)
    return out


def _type(out: Outline, cursor: wasm.Cursor) -> None:
    start = cursor.at
    deftype.rewrite(cursor, deftype.same)
    out.types.append((start, cursor.at))


def _import(out: Outline, cursor: wasm.Cursor) -> None:
    name = wasm.extern_name(cursor)
    sort = cursor.byte()
    if sort == _SORT_TYPE and cursor.byte() == 0:
        out.type_imports.append(name)
        out.types.append(Alias(-1, name))
        cursor.u32()
        return
    if sort != _INSTANCE:
        raise deftype.ForeignTypeError(f"{name} is not an interface")
    out.instances.append(name)
    out.kinds.append(cursor.u32())


def _export(out: Outline, cursor: wasm.Cursor) -> None:
    name = wasm.extern_name(cursor)
    sort = cursor.byte()
    if sort == 0:
        cursor.byte()
    cursor.u32()
    if cursor.byte():
        wasm.extern_type(cursor)
    if sort == _INSTANCE:
        out.exports.append(name)
    elif sort == _FUNC:
        out.functions.append(name)


def _alias(out: Outline, cursor: wasm.Cursor) -> None:
    sort = cursor.byte()
    if sort == 0:
        cursor.byte()
    target = cursor.byte()
    match target:
        case 0x00 | 0x01:
            instance, name = cursor.u32(), cursor.name()
            if sort == _SORT_TYPE:
                out.types.append(Alias(instance, name))
        case _:
            raise deftype.ForeignTypeError(f"an alias of form {target} at offset {cursor.at}")


_ENTRIES: Final[dict[int, Callable[[Outline, wasm.Cursor], None]]] = {
    component.IMPORT: _import,
    component.EXPORT: _export,
    _ALIAS: _alias,
    _TYPE: _type,
}
