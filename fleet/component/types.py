"""Component-model types: copied with other indices; imports that bring types alone.

A type names others by their index in its component. Moved into another component (`fleet.component.compose`), only
those indices change. Inside an instance or component type, indices are local, and only `alias outer` refers to the
outside. The grammar is Binary.md's "Type Definitions".

An import that brings types alone needs no grant, since nothing can be reached through it. A `use` in WIT makes a
component import the interface that the type is from, even if it calls nothing of that interface:
`wasi:clocks/monotonic-clock` imported for `duration` alone does not read the clock. An import in a form that the
toolchains of WASI 0.2 do not produce counts as reaching something.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from fleet.component import binary

Index = Callable[[int], int]

_DEPTH_MAX: Final = 16
_SORT_FUNC: Final = 1
_SORT_TYPE: Final = 3
_OUTER: Final = 2
_INSTANCE: Final = 0x42


class ForeignTypeError(Exception):
    """The type has a form that no component for WASI 0.2 imports; the message says which."""


def same(index: int) -> int:
    """Return the index itself: to pass over a type."""
    return index


def rewrite(cursor: binary.Cursor, index: Index) -> bytes:
    """Rewrite the type definition under the cursor, with `index(i)` for every type i outside it.

    Raises:
        wasm.DamagedError: it is not well-formed.
        ForeignTypeError: it is of a newer or rarer kind.
    """
    return _Rewriter(cursor, index).deftype(0)


@dataclass(frozen=True, slots=True)
class Definition:
    """Type that an instance type defines itself, at these offsets."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Outer:
    """Type of the component around the instance type."""

    number: int


@dataclass(frozen=True, slots=True)
class Export:
    """Export: a function of the type `number`, a type equal to it, or (None) a resource."""

    name: str
    function: bool
    number: int | None


def declarations(cursor: binary.Cursor) -> list[Definition | Outer | Export]:
    """Read the items of the instance type under the cursor, in order. Every item but a function takes a type index.

    Raises:
        wasm.DamagedError: it is not well-formed.
        ForeignTypeError: it is not an instance type, or has what no interface of WASI 0.2 has.
    """
    if cursor.byte() != _INSTANCE:
        raise ForeignTypeError(f"a type that is not an instance's at offset {cursor.at}")
    found: list[Definition | Outer | Export] = []
    for _ in range(cursor.count()):
        match cursor.byte():
            case 0x01:
                start = cursor.at
                rewrite(cursor, same)
                found.append(Definition(start, cursor.at))
            case 0x02 if cursor.byte() == _SORT_TYPE and cursor.byte() == _OUTER and cursor.u32() == 1:
                found.append(Outer(cursor.u32()))
            case 0x04:
                name, sort = binary.extern_name(cursor), cursor.byte()
                resource = sort == _SORT_TYPE and cursor.byte() == 1
                if sort not in {_SORT_FUNC, _SORT_TYPE}:
                    raise ForeignTypeError(f"an export of sort {sort} at offset {cursor.at}")
                found.append(Export(name, sort == _SORT_FUNC, None if resource else cursor.u32()))
            case form:
                raise ForeignTypeError(f"a declaration of form 0x{form:02x} at offset {cursor.at}")
    return found


class _Rewriter:
    """Copy one definition."""

    def __init__(self, cursor: binary.Cursor, index: Index) -> None:
        self._in = cursor
        self._index = index

    def deftype(self, depth: int) -> bytes:
        """Copy a `deftype`, nested in `depth` instance or component types below the definition itself."""
        if depth > _DEPTH_MAX:
            raise binary.DamagedError(f"types nested deeper than {_DEPTH_MAX} at offset {self._in.at}")
        form = self._in.byte()
        match form:
            case 0x40:
                body = self._fields(depth) + self._results(depth)
            case 0x41 | 0x42:
                body = self._many(lambda: self._declaration(depth + 1))
            case _:
                return self._value(form, depth)
        return bytes([form]) + body

    def _value(self, form: int, depth: int) -> bytes:  # noqa: PLR0911 - one arm for each kind of value type
        head = bytes([form])
        match form:
            case _ if 0x73 <= form <= 0x7F:  # noqa: PLR2004 - the primitive types
                return head
            case 0x72:
                return head + self._fields(depth)
            case 0x71:
                return head + self._many(lambda: self._case(depth))
            case 0x70 | 0x6B:
                return head + self._valtype(depth)
            case 0x6F:
                return head + self._many(lambda: self._valtype(depth))
            case 0x6E | 0x6D:
                return head + self._many(self._name)
            case 0x6A:
                return head + self._optional(depth) + self._optional(depth)
            case 0x69 | 0x68:
                return head + self._type(self._in.u32(), depth)
            case _:
                raise ForeignTypeError(f"a type of form 0x{form:02x} at offset {self._in.at}")

    def _declaration(self, depth: int) -> bytes:
        kind = self._in.byte()
        match kind:
            case 0x01:
                body = self.deftype(depth)
            case 0x02:
                body = self._alias(depth)
            case 0x03 | 0x04:
                body = self._extern_name() + self._extern_type(depth)
            case _:
                raise ForeignTypeError(f"a declaration of form 0x{kind:02x} at offset {self._in.at}")
        return bytes([kind]) + body

    def _alias(self, depth: int) -> bytes:
        sort, target = self._in.byte(), self._in.byte()
        if sort != _SORT_TYPE:
            raise ForeignTypeError(f"an alias of sort {sort} at offset {self._in.at}")
        head = bytes([sort, target])
        match target:
            case 0x00:
                return head + binary.u32(self._in.u32()) + self._name()
            case 0x02:
                count, number = self._in.u32(), self._in.u32()
                if count > depth:
                    raise binary.DamagedError(f"an alias reaches out of the component at offset {self._in.at}")
                return head + binary.u32(count) + binary.u32(self._index(number) if count == depth else number)
            case _:
                raise ForeignTypeError(f"an alias of form {target} at offset {self._in.at}")

    def _extern_type(self, depth: int) -> bytes:
        sort = self._in.byte()
        head = bytes([sort])
        match sort:
            case 0x01 | 0x04 | 0x05:
                return head + self._type(self._in.u32(), depth)
            case 0x03:
                bound = self._in.byte()
                if bound == 1:
                    return head + b"\x01"
                return head + b"\x00" + self._type(self._in.u32(), depth)
            case _:
                raise ForeignTypeError(f"an item of sort {sort} at offset {self._in.at}")

    def _extern_name(self) -> bytes:
        form = self._in.byte()
        if form > 1:
            raise ForeignTypeError(f"a name of form {form} at offset {self._in.at}")
        return bytes([form]) + self._name()

    def _results(self, depth: int) -> bytes:
        form = self._in.byte()
        if form == 0:
            return b"\x00" + self._valtype(depth)
        return bytes([form]) + self._fields(depth)

    def _fields(self, depth: int) -> bytes:
        return self._many(lambda: self._name() + self._valtype(depth))

    def _case(self, depth: int) -> bytes:
        return self._name() + self._optional(depth) + self._zero()

    def _zero(self) -> bytes:
        if self._in.byte():
            raise ForeignTypeError(f"a variant that refines another at offset {self._in.at}")
        return b"\x00"

    def _optional(self, depth: int) -> bytes:
        return b"\x01" + self._valtype(depth) if self._in.byte() else b"\x00"

    def _valtype(self, depth: int) -> bytes:
        number = self._in.s33()
        return binary.s33(number) if number < 0 else self._type(number, depth, signed=True)

    def _type(self, number: int, depth: int, *, signed: bool = False) -> bytes:
        moved = self._index(number) if depth == 0 else number
        return binary.s33(moved) if signed else binary.u32(moved)

    def _name(self) -> bytes:
        return binary.name(self._in.name())

    def _many(self, one: Callable[[], bytes]) -> bytes:
        count = self._in.count()
        return binary.u32(count) + b"".join(one() for _ in range(count))


_CUSTOM: Final = 0
_CORE_MODULE: Final = 1
_ALIAS: Final = 6
_TYPE: Final = 7
_IMPORT: Final = 10
_INSTANCE_TYPE: Final = 0x42

_SORT_INSTANCE: Final = 5


def types_only(data: bytes, budget: binary.Budget) -> frozenset[str]:
    """Return the names of a component's imports that bring no function and no resource.

    Args:
        data: the whole component.
        budget: for the whole file; a type counts again for each import of it.

    Raises:
        wasm.DamagedError: the bytes are not well-formed.
    """
    reader = _Reader(data, budget)
    try:
        for section in binary.sections(data, 0, len(data)):
            if section.id not in {_CUSTOM, _CORE_MODULE}:
                if section.id not in {_TYPE, _ALIAS, _IMPORT}:
                    break
                reader.section(section.id, section.cursor(data, budget))
    except ForeignTypeError:
        pass
    return frozenset(reader.plain)


class _Reader:
    """Follow the type space of a component up to its last import."""

    def __init__(self, data: bytes, budget: binary.Budget) -> None:
        self._data = data
        self._budget = budget
        self._types: list[int | None] = []  # position of each type's definition, None for types of elsewhere
        self.plain: set[str] = set()

    def section(self, kind: int, cursor: binary.Cursor) -> None:
        """Read a section of types, aliases or imports."""
        for _ in range(cursor.count()):
            if kind == _TYPE:
                self._types.append(cursor.at)
                rewrite(cursor, same)
            elif kind == _ALIAS:
                self._types += [None] * _alias(cursor)
            else:
                self._import(cursor)

    def _import(self, cursor: binary.Cursor) -> None:
        name = binary.extern_name(cursor)
        sort, at = cursor.peek(), cursor.at
        binary.extern_type(cursor)
        if sort == _SORT_TYPE:
            self._types.append(None)
            if self._data[at + 1] == 0:  # equal to another type, as a world's `use` has it: nothing of its own
                self.plain.add(name)
        elif sort == _SORT_INSTANCE and self._plain(binary.Cursor(self._data, at + 1).u32()):
            self.plain.add(name)

    def _plain(self, index: int) -> bool:
        """Tell whether type `index` is an instance type that exports only types defined inside it."""
        at = self._types[index] if index < len(self._types) else None
        if at is None or self._data[at] != _INSTANCE_TYPE:
            return False
        return _plain(binary.Cursor(self._data, at + 1, budget=self._budget))


def _alias(cursor: binary.Cursor) -> int:
    """Pass over an alias and return the number of types that it adds."""
    sort = cursor.byte()
    if sort == 0:
        cursor.byte()
    target = cursor.byte()
    cursor.u32()
    if target == 2:  # noqa: PLR2004 - an outer alias: a scope and an index
        cursor.u32()
    else:
        cursor.name()
    return int(sort == _SORT_TYPE)


def _plain(cursor: binary.Cursor) -> bool:
    """Tell whether the declarations of an instance type under the cursor export only types defined inside it."""
    own: list[bool] = []  # for each type of the instance: defined there, and no resource
    for _ in range(cursor.count()):
        match cursor.byte():
            case 0x01:
                own.append(cursor.peek() < 0x80 and cursor.peek() != 0x3F)  # noqa: PLR2004 - 3f is a resource
                rewrite(cursor, same)
            case 0x02:
                own += [False] * _alias(cursor)
            case 0x04:
                binary.extern_name(cursor)
                if cursor.byte() != _SORT_TYPE or cursor.byte() != 0:
                    return False
                bound = cursor.u32()
                if bound >= len(own) or not own[bound]:
                    return False
                own.append(True)
            case _:
                return False
    return True
