"""Component: imports, exports, producers; index of its items.

Reads a component's bytes without an engine, so that the operator's side can say what is wrong with a file before it
is signed, and a device before it is compiled. The engine validates; this module says what a component contains, and
explains in one sentence, with what to do next, why a file cannot be one. Whatever the input, `NotAComponentError` is
the only error.

The format is the Component Model's Binary.md: a preamble, then sections. Top-level import and export sections are
read, nested modules and components are counted. `ComponentIndex` holds what `fleet.component.compose` needs: the
imports, as far as their types go, and the exports. Pure.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from fleet.component import binary, types, wasi
from fleet.component.binary import extern_name, extern_type
from fleet.protocol import bounds
from fleet.protocol.manifest import Grants

# Section ids of a component, Binary.md "Component Definitions"
CUSTOM: Final = 0
CORE_MODULE: Final = 1
NESTED: Final = 4
IMPORT: Final = 10
EXPORT: Final = 11

_DEPTH_MAX: Final = 32
_PRODUCERS_MAX: Final = 1000
"""Most producers of a component; each repeats the name of its field, which may have 4 KiB."""

HTTP_HANDLER: Final = "wasmfleet:http/handler"
HTTP_HEALTH: Final = "wasmfleet:http/health"
SCHEDULE_TASK: Final = "wasmfleet:schedule/task"

_DRAFT: Final = re.compile(r"wasi:(cli|clocks|filesystem|http|io|random|sockets)/[^@]*@0\.2\.0-")
"""Pre-releases of what WASI 0.2.0 itself has; other packages of WASI have only drafts until now."""


class Fault(StrEnum):
    """Reason why a file is not a component that can run here."""

    EMPTY = "empty"
    TOO_LARGE = "too-large"
    NOT_WASM = "not-wasm"
    TEXT = "text"
    CORE_MODULE = "core-module"
    OTHER_VERSION = "other-version"
    DAMAGED = "damaged"
    WASI_0_3 = "wasi-0.3"
    WASI_DRAFT = "wasi-draft"


class NotAComponentError(ValueError):
    """The file is not a component that can run here. The message says what, why and what to do next.

    Attributes:
        fault: the reason in one word.
    """

    def __init__(self, fault: Fault, message: str) -> None:
        super().__init__(message)
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Component:
    """Description of a component, from its own bytes.

    Attributes:
        size_bytes: of the file.
        imports, exports: names as written, in order, such as `wasi:clocks/wall-clock@0.2.3`.
        modules: size in bytes of each core module, at any depth.
        components: number of nested components, at any depth.
        producers: tools that made it, as `field name version`, from its own producers section.
        custom: the names of its own custom sections.
        plain: imports that bring types alone, and therefore reach nothing.
    """

    size_bytes: int
    imports: tuple[str, ...]
    exports: tuple[str, ...]
    modules: tuple[int, ...] = ()
    components: int = 0
    producers: tuple[str, ...] = ()
    custom: tuple[str, ...] = ()
    plain: frozenset[str] = frozenset()

    def exported(self, interface: str) -> str | None:
        """Return the full name of the export that is `interface` in any version, None for none."""
        return next((export for export in self.exports if bare(export) == interface), None)

    def missing(self, grants: Grants) -> tuple[str, ...]:
        """Return the full names of imports that need a grant and have none."""
        asking = (wanted for wanted in self.imports if wanted not in self.plain and bare(wanted) not in wasi.UNGRANTED)
        return tuple(wanted for wanted in asking if not grants.allows(wanted))


def bare(interface: str) -> str:
    """Return an interface's name without its version."""
    return interface.partition("@")[0]


def package(interface: str) -> str:
    """Return the package of an interface, without version: `wasi:clocks` of `wasi:clocks/wall-clock@0.2.3`."""
    return bare(interface).partition("/")[0]


def read(data: bytes, *, file_name: str = "component.wasm") -> Component:
    """Read a component.

    Args:
        data: the whole file.
        file_name: name in messages and in the commands that they suggest.

    Raises:
        NotAComponentError: not a component that can run here.
    """
    _check_kind(data, file_name)
    try:
        component = _read(data)
    except binary.DamagedError as error:
        raise NotAComponentError(
            Fault.DAMAGED, f"{file_name} is a damaged component: {error}; build or copy it again"
        ) from error
    _check_wasi(component, file_name)
    return component


def _check_kind(data: bytes, file_name: str) -> None:
    if not data:
        raise NotAComponentError(Fault.EMPTY, f"{file_name} is empty: did its build fail?")
    if len(data) > bounds.ARTIFACT_MAX_BYTES:
        allowed = bounds.ARTIFACT_MAX_BYTES // bounds.MIB
        raise NotAComponentError(
            Fault.TOO_LARGE, f"{file_name} has {len(data)} bytes, at most {allowed} MiB are accepted: build it for size"
        )
    if data.startswith(binary.COMPONENT):
        return
    if data.startswith(binary.MODULE):
        raise NotAComponentError(Fault.CORE_MODULE, binary.how_to_componentize(data, file_name))
    if data.startswith(binary.MAGIC):
        found = data[4:8].hex(" ")
        if len(data) < binary.PREAMBLE_BYTES:
            raise NotAComponentError(Fault.DAMAGED, f"{file_name} ends in its first {len(data)} bytes; copy it again")
        raise NotAComponentError(
            Fault.OTHER_VERSION,
            f"{file_name} is WebAssembly of another format version ({found}): build it with current tools",
        )
    if re.match(rb"\s*(;;[^\n]*\n\s*)*\((component|module)\b", data[:4096]):
        stem = file_name.removesuffix(".wasm").removesuffix(".wat")
        raise NotAComponentError(
            Fault.TEXT, f"{file_name} is WebAssembly text: wasm-tools parse {file_name} -o {stem}.wasm"
        )
    if data.startswith(b"\x7fELF"):
        what = "a native program or an image compiled ahead of time; devices take the component itself"
    else:
        what = f"not WebAssembly: it begins with {data[:4].hex(' ')} instead of 00 61 73 6d"
    raise NotAComponentError(Fault.NOT_WASM, f"{file_name} is {what}")


def _check_wasi(component: Component, file_name: str) -> None:
    newer = [name for name in (*component.imports, *component.exports) if re.match(r"wasi:[^@]*@0\.3\.", name)]
    if newer:
        raise NotAComponentError(
            Fault.WASI_0_3,
            f"{file_name} is built for WASI 0.3 ({newer[0]}), and devices serve WASI 0.2: build it for target "
            "wasm32-wasip2, or with your toolchain's option for WASI 0.2",
        )
    drafts = [name for name in (*component.imports, *component.exports) if _DRAFT.match(name)]
    if drafts:
        raise NotAComponentError(
            Fault.WASI_DRAFT,
            f"{file_name} is built for a pre-release of WASI 0.2 ({drafts[0]}), and devices serve its releases: update "
            "your toolchain and its WIT files, and build it again",
        )


def _read(data: bytes) -> Component:
    imports: list[str] = []
    exports: list[str] = []
    producers: list[str] = []
    custom: list[str] = []
    budget = binary.Budget()
    for section in binary.sections(data, 0, len(data)):
        cursor = section.cursor(data, budget)
        if section.id == IMPORT:
            for _ in range(cursor.count()):
                imports.append(extern_name(cursor))
                extern_type(cursor)
        elif section.id == EXPORT:
            for _ in range(cursor.count()):
                exports.append(extern_name(cursor))
                _export_rest(cursor)
        elif section.id == CUSTOM:
            custom.append(cursor.name())
            if custom[-1] == "producers":
                producers += _producers(cursor, _PRODUCERS_MAX - len(producers))
        if section.id in {IMPORT, EXPORT} and cursor:
            raise binary.DamagedError(f"bytes are left over in a section at offset {cursor.at}")
    modules, components = _nested(data)
    return Component(
        size_bytes=len(data),
        imports=tuple(imports),
        exports=tuple(exports),
        modules=modules,
        components=components,
        producers=tuple(producers),
        custom=tuple(custom),
        plain=types.types_only(data, budget),
    )


def _export_rest(cursor: binary.Cursor) -> None:
    if cursor.byte() == 0:
        cursor.byte()
    cursor.u32()
    if cursor.byte():
        extern_type(cursor)


def _producers(cursor: binary.Cursor, most: int) -> list[str]:
    """Read the producers section of the tool conventions: fields, each with names and versions; at most `most`."""
    found = []
    for _ in range(cursor.count()):
        field = cursor.name()
        for _ in range(cursor.count()):
            found.append(f"{field} {cursor.name()} {cursor.name()}".strip())
            if len(found) > most:
                raise binary.DamagedError(f"more than {_PRODUCERS_MAX} producers")
    return found


def _nested(data: bytes) -> tuple[tuple[int, ...], int]:
    modules: list[int] = []
    components = 0
    todo = [(0, len(data), 0)]
    seen = 0
    while todo:
        start, end, depth = todo.pop()
        for section in binary.sections(data, start, end):
            seen += 1
            if seen > binary.SECTIONS_MAX:
                raise binary.DamagedError(f"more than {binary.SECTIONS_MAX} sections")
            if section.id == CORE_MODULE:
                if data[section.start : section.start + 8] != binary.MODULE:
                    raise binary.DamagedError(f"no core module at offset {section.start}, where one is announced")
                modules.append(section.end - section.start)
            elif section.id == NESTED:
                if data[section.start : section.start + 8] != binary.COMPONENT:
                    raise binary.DamagedError(f"no component at offset {section.start}, where one is announced")
                if depth == _DEPTH_MAX:
                    raise binary.DamagedError(f"components nested deeper than {_DEPTH_MAX}")
                components += 1
                todo.append((section.start, section.end, depth + 1))
    return tuple(modules), components


_INSTANCES: Final = 5
_ALIAS: Final = 6
_TYPE: Final = 7
_FUNC: Final = 1
_SORT_TYPE: Final = 3
_INSTANCE: Final = 5


@dataclass(frozen=True, slots=True)
class Alias:
    """Type that an imported instance exports."""

    instance: int
    name: str


@dataclass(slots=True)
class ComponentIndex:
    """Index of a component's items, as far as composing needs it.

    Attributes:
        instances, kinds: the name and the type's index of each imported instance, in order; empty and -1 for an
            instance that the component makes itself between its imports, as compositions do.
        exports: of instances; functions: of functions.
        type_imports: the names of imported types, which no guest has.
        components: nested components.
        types: by index of the type space, up to the last import: where the type is defined, or what it is an alias of.
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
        """Return where the type of an imported instance is defined."""
        if binary.item(self.kinds, instance, "instance") < 0:
            raise types.ForeignTypeError("a type of an import is that of an instance of its own")
        found = binary.item(self.types, self.kinds[instance], "type")
        if isinstance(found, Alias):
            raise types.ForeignTypeError(f"{self.instances[instance]} has a type of another's")
        return found


def read_index(data: bytes) -> ComponentIndex:
    """Walk the top level of a component: its types as far as its imports go, and what it nests and exports."""
    if not data.startswith(binary.COMPONENT):
        raise binary.DamagedError("it does not begin like a component")
    out = ComponentIndex(data)
    every = list(binary.sections(data, 0, len(data)))
    budget = binary.Budget()
    last_import = max((at for at, section in enumerate(every) if section.id == IMPORT), default=-1)
    for at, section in enumerate(every):
        if section.id == NESTED:
            out.components.append(data[section.start : section.end])
        elif section.id == _INSTANCES and at < last_import:
            for _ in range(section.cursor(data, budget).count()):
                _own_instance(out)
        elif section.id in _ENTRIES and (at <= last_import or section.id == EXPORT):
            cursor = section.cursor(data, budget)
            for _ in range(cursor.count()):
                _ENTRIES[section.id](out, cursor)
    return out


def _type(out: ComponentIndex, cursor: binary.Cursor) -> None:
    start = cursor.at
    types.rewrite(cursor, types.same)
    out.types.append((start, cursor.at))


def _import(out: ComponentIndex, cursor: binary.Cursor) -> None:
    name = binary.extern_name(cursor)
    sort = cursor.byte()
    if sort == _SORT_TYPE and cursor.byte() == 0:
        out.type_imports.append(name)
        out.types.append(Alias(-1, name))
        cursor.u32()
        return
    if sort != _INSTANCE:
        raise types.ForeignTypeError(f"{name} is not an interface")
    out.instances.append(name)
    out.kinds.append(cursor.u32())


def _own_instance(out: ComponentIndex) -> None:
    """Count an instance that is not imported, whose types no import may have."""
    out.instances.append("")
    out.kinds.append(-1)


def _export(out: ComponentIndex, cursor: binary.Cursor) -> None:
    name = binary.extern_name(cursor)
    sort = cursor.byte()
    if sort == 0:
        cursor.byte()
    cursor.u32()
    if cursor.byte():
        binary.extern_type(cursor)
    if sort == _INSTANCE:
        out.exports.append(name)
    elif sort == _FUNC:
        out.functions.append(name)


def _alias(out: ComponentIndex, cursor: binary.Cursor) -> None:
    sort = cursor.byte()
    if sort == 0:
        cursor.byte()
    target = cursor.byte()
    match target:
        case 0x00 | 0x01:
            instance, name = cursor.u32(), cursor.name()
            if sort == _SORT_TYPE:
                out.types.append(Alias(instance, name))
            elif sort == _INSTANCE:
                _own_instance(out)
        case _:
            raise types.ForeignTypeError(f"an alias of form {target} at offset {cursor.at}")


_ENTRIES: Final[dict[int, Callable[[ComponentIndex, binary.Cursor], None]]] = {
    IMPORT: _import,
    EXPORT: _export,
    _ALIAS: _alias,
    _TYPE: _type,
}
