"""Core modules, which many toolchains still give: not components, but one command away. This names the command."""

from typing import Final

from fleet.protocol import wasm

# Section ids of a core module, Core Specification 5.5.2
_CUSTOM: Final = 0
_IMPORT: Final = 2
_EXPORT: Final = 7


def how_to_componentize(data: bytes, file_name: str) -> str:
    """What `file_name`, a core module, is, and the command that makes a component of it: one line for people."""
    stem = file_name.removesuffix(".wasm")
    out = f"-o {stem}.component.wasm"
    try:
        modules, exports, custom = _core_names(data)
    except wasm.DamagedError as error:
        return f"{file_name} is a core module, not a component, and damaged: {error}; build it again"
    head = f"{file_name} is a core module, not a component"
    if any(section.startswith("component-type") for section in custom) and "wasi_snapshot_preview1" not in modules:
        return f"{head}: wasm-tools component new {file_name} {out}"
    if "wasi_snapshot_preview1" in modules:
        kind = "command" if "_start" in exports else "reactor"
        return (
            f"{head} (WASI preview 1): wasm-tools component new {file_name} "
            f"--adapt wasi_snapshot_preview1.{kind}.wasm {out}"
        )
    if "wasi_unstable" in modules:
        return f"{head}, for a WASI older than preview 1: build it with current tools, for WASI 0.2"
    if "env" in modules or "gojs" in modules or "wbg" in modules:
        return f"{head}, made for a browser or a host of its own (imports {min(modules)}): build it for WASI 0.2"
    return (
        f"{head}: wasm-tools component embed --world WORLD WIT-DIRECTORY {file_name} -o {stem}.embed.wasm, "
        f"then wasm-tools component new {stem}.embed.wasm {out}"
    )


def _core_names(data: bytes) -> tuple[set[str], set[str], set[str]]:
    """The modules that a core module imports from, its exports, its custom sections; Core Spec, section 5.5."""
    modules: set[str] = set()
    exports: set[str] = set()
    custom: set[str] = set()
    for section in wasm.sections(data, 0, len(data)):
        cursor = section.cursor(data)
        if section.id == _CUSTOM:
            custom.add(cursor.name())
        elif section.id == _IMPORT:
            for _ in range(cursor.count()):
                modules.add(cursor.name())
                cursor.name()
                _core_import_type(cursor)
        elif section.id == _EXPORT:
            for _ in range(cursor.count()):
                exports.add(cursor.name())
                cursor.byte()
                cursor.u32()
    return modules, exports, custom


def _core_import_type(cursor: wasm.Cursor) -> None:
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
            raise wasm.DamagedError(f"an import of unknown kind {kind} at offset {cursor.at}")


def _core_limits(cursor: wasm.Cursor) -> None:
    if cursor.byte() & 1:
        cursor.u32()
    cursor.u32()
