"""Puts shims into an interface of WASI: encodes a component that exports what the guest imports of it.

Where some functions of an interface must come from elsewhere than the rest, the Component Model wants a component
around them: an instance cannot simply be made of methods. The sleeve is that component. It imports the interface as
the engine has it and the functions that replace some of it, and exports them all under their own names:

    imports   the interfaces whose types it names, the engine's and, of wasi:io, the adapter's too; the interface
              itself; each function that is replaced, under its shim's name
    exports   the interface, item by item in the order of the guest's import, with the adapter's resources of wasi:io

Pure: bytes in, bytes out. The format is the Component Model's Binary.md.
"""

from dataclasses import dataclass, field

from fleet.protocol import component, deftype, wasm
from fleet.protocol.outline import Alias, Outline

_ALIAS = 6
_TYPE = 7
_FUNC, _SORT_TYPE, _INSTANCE = b"\x01", b"\x03", b"\x05"


@dataclass(frozen=True, slots=True)
class Sleeve:
    """An encoded sleeve, and what it wants.

    Attributes:
        data: the component.
        wanted: its imports of interfaces: a name, the number of the guest's import that is meant, and whether the
            adapter's own is meant (else the engine's).
        shims: the names of the functions that it imports.
    """

    data: bytes
    wanted: tuple[tuple[str, int, bool], ...]
    shims: tuple[str, ...]


def encode(guest: Outline, at: int, own: str, shims: dict[str, str]) -> Sleeve:
    """The sleeve of one of the guest's imports.

    Args:
        guest: the component.
        at: the import's number.
        own: how the names of the interfaces begin that the adapter defines itself.
        shims: of the interface's functions, those that are replaced: by which shim.

    Raises:
        wasm.DamagedError, deftype.ForeignTypeError: the import's type is not that of an interface.
    """
    return _Encoder(guest, at, own, shims).encode()


@dataclass(slots=True)
class _Encoder:
    guest: Outline
    at: int
    own: str
    shims: dict[str, str]
    out: bytearray = field(default_factory=lambda: bytearray(wasm.COMPONENT))
    types: int = 0
    functions: int = 0
    wanted: list[tuple[str, int, bool]] = field(default_factory=list)
    used: list[str] = field(default_factory=list)
    known: dict[tuple[int, bool], int] = field(default_factory=dict)
    imported: dict[tuple[int, bool], int] = field(default_factory=dict)

    def encode(self) -> Sleeve:
        """The whole of it. `inside` are types for what is imported, `outside` the same for what is exported."""
        engine = self._interface(self.at, own=False)
        inside: list[int] = []
        outside: list[int] = []
        for item in deftype.declarations(wasm.Cursor(self.guest.data, *self.guest.kind(self.at))):
            match item:
                case deftype.Definition(start, end):
                    for space in (inside, outside):
                        body = deftype.rewrite(wasm.Cursor(self.guest.data, start, end), space.__getitem__)
                        space.append(self._define(body))
                case deftype.Outer(number):
                    inside.append(self._outer(number, own=True))
                    outside.append(inside[-1])
                case deftype.Export(name, True, int(number)):
                    self._export_function(engine, name, inside[number], outside[number])
                case deftype.Export(name, _, None):
                    inside.append(self._type_of(engine, name))
                    outside.append(self._export_type(name, inside[-1]))
                case deftype.Export(name, _, int(number)):
                    foreign = inside[number] in self.known.values()  # another interface's, passed on
                    inside.append(inside[number] if foreign else self._type_of(engine, name))
                    outside.append(self._export_type(name, outside[number]))
        return Sleeve(bytes(self.out), tuple(self.wanted), tuple(self.used))

    def _outer(self, number: int, *, own: bool) -> int:
        """A type of the guest's type space: the adapter's (`own`, where it has one) or the engine's."""
        found = self.guest.types[number]
        if not isinstance(found, Alias):
            raise deftype.ForeignTypeError(f"type {number} of an import is no interface's")
        own = own and self.guest.instances[found.instance].startswith(self.own)
        if (number, own) not in self.known:
            self.known[number, own] = self._type_of(self._interface(found.instance, own=own), found.name)
        return self.known[number, own]

    def _interface(self, at: int, *, own: bool) -> int:
        """One of the guest's imports, imported here too."""
        if (at, own) not in self.imported:
            cursor = wasm.Cursor(self.guest.data, *self.guest.kind(at))
            kind = self._define(deftype.rewrite(cursor, lambda number: self._outer(number, own=own)))
            name = f"{'own' if own else 'engine'}-i{at}"
            self.wanted.append((name, at, own))
            self._put(component.IMPORT, b"\x00" + wasm.name(name) + _INSTANCE + wasm.u32(kind))
            self.imported[at, own] = len(self.imported)
        return self.imported[at, own]

    def _type_of(self, instance: int, name: str) -> int:
        self._put(_ALIAS, _SORT_TYPE + b"\x00" + wasm.u32(instance) + wasm.name(name))
        return self._further_type()

    def _export_type(self, name: str, number: int) -> int:
        self._put(component.EXPORT, b"\x00" + wasm.name(name) + _SORT_TYPE + wasm.u32(number) + b"\x00")
        return self._further_type()

    def _export_function(self, engine: int, name: str, inside: int, outside: int) -> None:
        shim = self.shims.get(name)
        if shim is None:
            self._put(_ALIAS, _FUNC + b"\x00" + wasm.u32(engine) + wasm.name(name))
        else:
            self.used.append(shim)
            self._put(component.IMPORT, b"\x00" + wasm.name(shim) + _FUNC + wasm.u32(inside))
        item = b"\x00" + wasm.name(name) + _FUNC + wasm.u32(self.functions)
        self._put(component.EXPORT, item + b"\x01" + _FUNC + wasm.u32(outside))
        self.functions += 2  # what is exported is a further one

    def _define(self, body: bytes) -> int:
        self._put(_TYPE, body)
        return self._further_type()

    def _further_type(self) -> int:
        self.types += 1
        return self.types - 1

    def _put(self, kind: int, contents: bytes) -> None:
        self.out += wasm.section(kind, b"\x01" + contents)
