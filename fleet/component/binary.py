"""WebAssembly binary format: numbers, names, imports and sections, read within bounds; core modules explained.

Used by `fleet.component.reader`, which reads, and `fleet.component.compose`, which also writes. Whatever the input,
`DamagedError` is the only error, and the work is bounded: by the number of sections, and by a `Budget` of entries and
names for the whole file. Many toolchains still produce core
modules: `how_to_componentize` names the command that makes a component of one.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, TypeVar

MAGIC: Final = b"\0asm"
MODULE: Final = MAGIC + b"\x01\x00\x00\x00"
COMPONENT: Final = MAGIC + b"\x0d\x00\x01\x00"
PREAMBLE_BYTES: Final = 8
NAME_MAX_BYTES: Final = 4096
_WITH_OPTIONS: Final = 2  # the form of a name with options; 0 and, older, 1 are those without
_IMPLEMENTS: Final = 0
_VERSION_SUFFIX: Final = 1
SECTIONS_MAX: Final = 100_000
COUNT_MAX: Final = 10_000
ENTRIES_MAX: Final = 100_000
"""Most entries read of one file, in all of its lists: ten times those of the largest component of a toolchain."""

TEXT_MAX_BYTES: Final = 4 << 20
"""Most bytes of names read of one file."""

_CONTINUES: Final = 0x80


T = TypeVar("T")


class DamagedError(Exception):
    """The bytes are not well-formed; the message says what and at which offset."""


def item(items: Sequence[T], number: int, what: str) -> T:
    """Return an item of an index space. Raises `DamagedError` where it is not there."""
    if not 0 <= number < len(items):
        raise DamagedError(f"{what} {number} is not there")
    return items[number]


class Budget:
    """Work left for one file, shared by all cursors over it, whatever the number of its sections."""

    __slots__ = ("entries", "text_bytes")

    def __init__(self, entries: int = ENTRIES_MAX, text_bytes: int = TEXT_MAX_BYTES) -> None:
        self.entries = entries
        self.text_bytes = text_bytes

    def take_entries(self, count: int) -> None:
        """Account for the entries of a list. Raises `DamagedError`."""
        self.entries -= count
        if self.entries < 0:
            raise DamagedError(f"more than {ENTRIES_MAX} entries in all of its lists")

    def take_text(self, size: int) -> None:
        """Account for the bytes of a name. Raises `DamagedError`."""
        self.text_bytes -= size
        if self.text_bytes < 0:
            raise DamagedError(f"more than {TEXT_MAX_BYTES >> 20} MiB of names")


class Cursor:
    """Position in some bytes that only moves forward, never past the end.

    Lists and names are counted against `budget`; without one given, against a budget of this cursor alone.
    """

    __slots__ = ("at", "budget", "data", "end")

    def __init__(self, data: bytes, at: int = 0, end: int | None = None, *, budget: Budget | None = None) -> None:
        self.data = data
        self.at = at
        self.end = len(data) if end is None else end
        self.budget = Budget() if budget is None else budget

    def __bool__(self) -> bool:
        """Tell whether any bytes are left."""
        return self.at < self.end

    def byte(self) -> int:
        """Read the next byte."""
        if self.at >= self.end:
            raise DamagedError(f"it ends early, at offset {self.at}")
        value = self.data[self.at]
        self.at += 1
        return value

    def peek(self) -> int:
        """Return the next byte without reading past it."""
        if self.at >= self.end:
            raise DamagedError(f"it ends early, at offset {self.at}")
        return self.data[self.at]

    def skip(self, size: int) -> int:
        """Pass over `size` bytes and return where they began."""
        start = self.at
        if size > self.end - start:
            raise DamagedError(
                f"it ends early: {size} bytes are announced at offset {start}, {self.end - start} follow"
            )
        self.at = start + size
        return start

    def take(self, size: int) -> bytes:
        """Read the next `size` bytes."""
        start = self.skip(size)
        return self.data[start : self.at]

    def u32(self) -> int:
        """Read an unsigned LEB128 number of at most 32 bits."""
        value = 0
        for shift in range(0, 35, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < _CONTINUES:
                if value >= 1 << 32:
                    break
                return value
        raise DamagedError(f"a number of more than 32 bits at offset {self.at}")

    def s33(self) -> int:
        """Read a signed LEB128 number of at most 33 bits: a type index, or a negative code for a primitive type."""
        value = 0
        for shift in range(0, 35, 7):
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            if byte < _CONTINUES:
                return value - (1 << (shift + 7)) if byte & 0x40 else value
        raise DamagedError(f"a number of more than 33 bits at offset {self.at}")

    def count(self) -> int:
        """Read the number of entries that follow, at most `COUNT_MAX`."""
        value = self.u32()
        if value > COUNT_MAX:
            raise DamagedError(f"{value} entries in one list at offset {self.at}, at most {COUNT_MAX} are read")
        self.budget.take_entries(value)
        return value

    def name(self) -> str:
        """Read a length and that many bytes of UTF-8."""
        size = self.u32()
        if size > NAME_MAX_BYTES:
            raise DamagedError(f"a name of {size} bytes at offset {self.at}")
        self.budget.take_text(size)
        raw = self.take(size)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise DamagedError(f"a name that is not UTF-8 before offset {self.at}") from error


def extern_name(cursor: Cursor) -> str:
    """Read the name of an import or export, Binary.md `importname'`."""
    form = cursor.byte()
    if form > _WITH_OPTIONS:
        raise DamagedError(f"a name of unknown form {form} at offset {cursor.at}")
    text = cursor.name()
    options: dict[int, str] = {}
    for _ in range(cursor.count() if form == _WITH_OPTIONS else 0):
        kind = cursor.byte()
        options[kind] = cursor.name()
    # With an interface that it implements, the suffix belongs to that one's name.
    return text if _IMPLEMENTS in options else text + options.get(_VERSION_SUFFIX, "")


def extern_type(cursor: Cursor) -> None:
    """Pass over an `externdesc`."""
    sort = cursor.byte()
    match sort:
        case 0x00:
            cursor.byte()
            cursor.u32()
        case 0x01 | 0x04 | 0x05:
            cursor.u32()
        case 0x02:
            if cursor.byte() == 0:
                cursor.u32()
            else:
                cursor.s33()
        case 0x03:
            if cursor.byte() == 0:
                cursor.u32()
        case _:
            raise DamagedError(f"an import or export of unknown sort {sort} at offset {cursor.at}")


@dataclass(frozen=True, slots=True)
class Section:
    """Section: its id and the position of its contents in the file."""

    id: int
    start: int
    end: int

    def cursor(self, data: bytes, budget: Budget) -> Cursor:
        """Return a cursor over the contents, which counts against the budget of the whole file."""
        return Cursor(data, self.start, self.end, budget=budget)


def sections(data: bytes, start: int, end: int) -> Iterator[Section]:
    """Yield the sections after the preamble of the module or component in `data[start:end]`. Raises `DamagedError`."""
    cursor = Cursor(data, start, end)
    cursor.skip(PREAMBLE_BYTES)
    for _ in range(SECTIONS_MAX):
        if not cursor:
            return
        kind = cursor.byte()
        size = cursor.u32()
        at = cursor.skip(size)
        yield Section(kind, at, cursor.at)
    raise DamagedError(f"more than {SECTIONS_MAX} sections")


def u32(value: int) -> bytes:
    """Encode `value` as unsigned LEB128."""
    out = bytearray()
    while value >= _CONTINUES:
        out.append(value & 0x7F | _CONTINUES)
        value >>= 7
    out.append(value)
    return bytes(out)


def s33(value: int) -> bytes:
    """Encode `value` as signed LEB128."""
    out = bytearray()
    while not -0x40 <= value < 0x40:  # noqa: PLR2004 - what fits in the last byte beside the sign
        out.append(value & 0x7F | _CONTINUES)
        value >>= 7
    out.append(value & 0x7F)
    return bytes(out)


def name(text: str) -> bytes:
    """Encode `text` as a length and UTF-8."""
    raw = text.encode()
    return u32(len(raw)) + raw


def section(kind: int, contents: bytes) -> bytes:
    """Encode a whole section."""
    return bytes([kind]) + u32(len(contents)) + contents


# Section ids of a core module, Core Specification 5.5.2
_CUSTOM: Final = 0
_IMPORT: Final = 2
_EXPORT: Final = 7


PREVIEW1: Final = "wasi_snapshot_preview1"
_WASM_BINDGEN: Final = re.compile(r"__wbindgen_|wbg$|\./.*_bg\.js$")
_FOR_COMPONENTS: Final = re.compile(r"wasi_snapshot_preview1$|\$root$|__main_module__$|\[export\]|[^:]+:")
"""Modules that `wasm-tools component new` resolves: the adapter, the world itself, exported resources, interfaces."""


def how_to_componentize(data: bytes, file_name: str) -> str:
    """Say in one line what the core module `file_name` is and which command makes a component of it."""
    stem = file_name.removesuffix(".wasm")
    out = f"-o {stem}.component.wasm"
    try:
        found = core_names(data)
    except DamagedError as error:
        return f"{file_name} is a core module, not a component, and damaged: {error}; build it again"
    head = f"{file_name} is a core module, not a component"
    if foreign := _foreign_host(found.modules):
        return f"{head}, {foreign}"
    if PREVIEW1 in found.modules:
        kind = "command" if "_start" in found.exports else "reactor"
        return (
            f"{head} (WASI preview 1): build it for WASI 0.2 (target wasm32-wasip2), or wasm-tools component new "
            f"{file_name} --adapt {PREVIEW1}.{kind}.wasm {out}, with the adapter from a release of Wasmtime"
        )
    if found.is_embedded():
        return f"{head}: wasm-tools component new {file_name} {out}"
    return (
        f"{head}: wasm-tools component embed --world WORLD WIT-DIRECTORY {file_name} -o {stem}.embed.wasm, "
        f"then wasm-tools component new {stem}.embed.wasm {out}"
    )


def _foreign_host(modules: set[str]) -> str:
    """Say for which host a core module was made that `wasm-tools component new` cannot stand in for; empty for none."""
    if found := sorted(each for each in modules if _WASM_BINDGEN.match(each)):
        return (
            f"made by wasm-bindgen for JavaScript (imports {found[0]}): leave wasm-bindgen and the crates that "
            "use it out, and build with cargo build --target wasm32-wasip2"
        )
    if found := sorted(each for each in modules if each.startswith("fastly_")):
        return (
            f"made for Fastly Compute (imports {found[0]}): replace Fastly's SDK by wasi:http/incoming-handler, "
            "and build for WASI 0.2 (target wasm32-wasip2)"
        )
    if found := sorted(each for each in modules if each.startswith("wasi_ephemeral_")):
        model = "build the model into the component, or ask for it over HTTP"
        instead = model if found[0].endswith("_nn") else "build it for WASI 0.2 without that"
        return f"and imports {found[0]}, which no device serves: {instead}"
    if "wasi_unstable" in modules:
        return "for a WASI older than preview 1: build it with current tools, for WASI 0.2"
    if found := sorted(each for each in modules if not _FOR_COMPONENTS.match(each)):
        named = found[0] or "a module without a name"
        return f"made for a browser or a host of its own (imports {named}): build it for WASI 0.2"
    return ""


class CoreNames(NamedTuple):
    """Names in a core module: the modules and the fields of its imports, its exports, its custom sections."""

    modules: set[str]
    imports: frozenset[str]
    exports: set[str]
    custom: set[str]

    def is_embedded(self) -> bool:
        """Tell whether a world is embedded, which says what component it is to become."""
        return any(section.startswith("component-type") for section in self.custom)


def core_names(data: bytes) -> CoreNames:
    """Return what a core module imports and exports, and its custom sections; Core Specification 5.5.

    Raises:
        DamagedError: no such module.
    """
    modules: set[str] = set()
    imports: set[str] = set()
    exports: set[str] = set()
    custom: set[str] = set()
    budget = Budget()
    for section in sections(data, 0, len(data)):
        cursor = section.cursor(data, budget)
        if section.id == _CUSTOM:
            custom.add(cursor.name())
        elif section.id == _IMPORT:
            for _ in range(cursor.count()):
                modules.add(cursor.name())
                imports.add(cursor.name())
                _core_import_type(cursor)
        elif section.id == _EXPORT:
            for _ in range(cursor.count()):
                exports.add(cursor.name())
                cursor.byte()
                cursor.u32()
    return CoreNames(modules, frozenset(imports), exports, custom)


def unique_imports(data: bytes) -> bytes:
    """Return a core module in which an import that stood before has a number, as wasm-tools gives it: `fd_write [v2]`.

    Go's linker repeats imports, which a module in a component may not.

    Raises:
        DamagedError: no such module.
    """
    budget = Budget()
    start = PREAMBLE_BYTES
    for section in sections(data, 0, len(data)):
        if section.id == _IMPORT:
            return data[:start] + _unique(data, section.cursor(data, budget)) + data[section.end :]
        start = section.end
    return data


def _unique(data: bytes, cursor: Cursor) -> bytes:
    seen: dict[tuple[str, str], int] = {}
    count = cursor.count()
    contents = u32(count)
    for _ in range(count):
        module, field = cursor.name(), cursor.name()
        at = cursor.at
        _core_import_type(cursor)
        number = seen[module, field] = seen.get((module, field), 0) + 1
        contents += name(module) + name(field if number == 1 else f"{field} [v{number}]") + data[at : cursor.at]
    return section(_IMPORT, contents)


def _core_import_type(cursor: Cursor) -> None:
    kind = cursor.byte()
    match kind:
        case 0x00:  # function: its type
            cursor.u32()
        case 0x01:  # table: element type, limits
            cursor.byte()
            _core_limits(cursor)
        case 0x02:  # memory: limits
            _core_limits(cursor)
        case 0x03:  # global: type, mutability
            cursor.byte()
            cursor.byte()
        case 0x04:  # tag: attribute, type
            cursor.byte()
            cursor.u32()
        case _:
            raise DamagedError(f"an import of unknown kind {kind} at offset {cursor.at}")


def _core_limits(cursor: Cursor) -> None:
    if cursor.byte() & 1:
        cursor.u32()
    cursor.u32()
