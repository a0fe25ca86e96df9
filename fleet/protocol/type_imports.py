"""Which imports of a component bring types alone: nothing can be reached through them, so they need no grant.

A `use` in WIT makes a component import the interface that the type is from, even if it calls nothing of it: who knows
`wasi:clocks/monotonic-clock` only for its `duration` does not read the clock. Where an import's form is one that the
toolchains of WASI 0.2 do not make, it counts as reaching something.
"""

from typing import Final

from fleet.protocol import deftype, wasm

_CUSTOM: Final = 0
_CORE_MODULE: Final = 1
_ALIAS: Final = 6
_TYPE: Final = 7
_IMPORT: Final = 10
_INSTANCE_TYPE: Final = 0x42
_SORT_TYPE: Final = 3
_SORT_INSTANCE: Final = 5


def types_only(data: bytes) -> frozenset[str]:
    """The names of the imports of `data`, a whole component, that bring no function and no resource.

    Raises:
        wasm.DamagedError: the bytes are not well-formed.
    """
    reader = _Reader(data)
    try:
        for section in wasm.sections(data, 0, len(data)):
            if section.id not in {_CUSTOM, _CORE_MODULE}:
                if section.id not in {_TYPE, _ALIAS, _IMPORT}:
                    break
                reader.section(section.id, section.cursor(data))
    except deftype.ForeignTypeError:
        pass
    return frozenset(reader.plain)


class _Reader:
    """Follows the type space of a component as far as its imports go."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._types: list[int | None] = []  # where each type is defined, None for elsewhere
        self.plain: set[str] = set()

    def section(self, kind: int, cursor: wasm.Cursor) -> None:
        """Take in a section of types, aliases or imports."""
        for _ in range(cursor.count()):
            if kind == _TYPE:
                self._types.append(cursor.at)
                deftype.rewrite(cursor, deftype.same)
            elif kind == _ALIAS:
                self._types += [None] * _alias(cursor)
            else:
                self._import(cursor)

    def _import(self, cursor: wasm.Cursor) -> None:
        name = wasm.extern_name(cursor)
        sort, at = cursor.peek(), cursor.at
        wasm.extern_type(cursor)
        if sort == _SORT_TYPE:
            self._types.append(None)
        elif sort == _SORT_INSTANCE and _plain(self._data, self._types, wasm.Cursor(self._data, at + 1).u32()):
            self.plain.add(name)


def _alias(cursor: wasm.Cursor) -> int:
    """Pass over an alias; how many types it adds."""
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


def _plain(data: bytes, types: list[int | None], index: int) -> bool:
    """Whether type `index` is an instance type that exports nothing but types it defines itself."""
    at = types[index] if index < len(types) else None
    if at is None or data[at] != _INSTANCE_TYPE:
        return False
    cursor = wasm.Cursor(data, at + 1)
    own: list[bool] = []  # of each type in the instance's space: defined there, and no resource
    for _ in range(cursor.count()):
        match cursor.byte():
            case 0x01:
                own.append(cursor.peek() < 0x80 and cursor.peek() != 0x3F)  # noqa: PLR2004 - 3f is a resource
                deftype.rewrite(cursor, deftype.same)
            case 0x02:
                own += [False] * _alias(cursor)
            case 0x04:
                wasm.extern_name(cursor)
                if cursor.byte() != _SORT_TYPE or cursor.byte() != 0:
                    return False
                bound = cursor.u32()
                if bound >= len(own) or not own[bound]:
                    return False
                own.append(True)
            case _:
                return False
    return True
