"""Package lists that a toolchain built into the component itself: cargo-auditable's `.dep-v0` custom sections.

Such a section is zlib-compressed JSON; it may stand in the component or in any module or component nested in it. The
component's own hash covers it, so it needs no file beside it. Whatever the bytes, only `DocumentError` comes out, and
no more than a fixed amount is inflated.
"""

import zlib
from typing import Final

import msgspec

from fleet.evidence import document
from fleet.evidence.document import DocumentError
from fleet.evidence.packages import Package
from fleet.protocol import wasm

SECTION: Final = ".dep-v0"
INFLATED_MAX_BYTES: Final = 8 * 1024 * 1024
_DEPTH_MAX: Final = 32
_CUSTOM, _CORE_MODULE, _NESTED = 0, 1, 4


class _Crate(msgspec.Struct):
    name: str
    version: str


def read(data: bytes) -> tuple[Package, ...] | None:
    """The packages that a component says are built into it; None where it says nothing.

    Raises:
        DocumentError: a section that cannot be read.
    """
    try:
        sections = _sections(data)
    except wasm.DamagedError as error:
        raise DocumentError(f"a damaged component: {error}") from error
    if not sections:
        return None
    return tuple(sorted({crate for section in sections for crate in _crates(section)}))


def _crates(section: bytes) -> list[Package]:
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(section, INFLATED_MAX_BYTES)
    except zlib.error as error:
        raise DocumentError(f"its section {SECTION} is not compressed by zlib: {error}") from error
    if not inflate.eof:
        raise DocumentError(f"its section {SECTION} is cut off, or inflates to more than {INFLATED_MAX_BYTES} bytes")
    value = document.load(text, f"its section {SECTION}")
    crates = document.convert(value.get("packages"), list[_Crate], f"its section {SECTION}: packages")
    return [Package(crate.name, crate.version, "cargo") for crate in crates]


def _sections(data: bytes) -> list[bytes]:
    """The contents of every such section, at any depth."""
    found = []
    todo = [(0, len(data), 0)]
    seen = 0
    while todo:
        start, end, depth = todo.pop()
        module = data[start : start + wasm.PREAMBLE_BYTES] == wasm.MODULE
        for section in wasm.sections(data, start, end):
            seen += 1
            if seen > wasm.SECTIONS_MAX or depth > _DEPTH_MAX:
                raise wasm.DamagedError("too many sections, or nested too deep")
            if section.id == _CUSTOM:
                cursor = section.cursor(data)
                if cursor.name() == SECTION:
                    found.append(data[cursor.at : section.end])
            elif not module and section.id in {_CORE_MODULE, _NESTED}:
                todo.append((section.start, section.end, depth + 1))
    return found
