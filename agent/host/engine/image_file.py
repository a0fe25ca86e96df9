"""Names in the file of a compiled image: an ELF file, by which engine's functions its code calls.

An image is made by this device's compiler. What cannot be read of it has no names: they serve sentences only.
"""

import os
import struct
from typing import Final

_TABLE_GROWS: Final = b"wasmtime_builtin_table_grow"
_HEADER: Final = struct.Struct("<40xQ10xHHH")  # e_shoff, e_shentsize, e_shnum, e_shstrndx
_SECTION: Final = struct.Struct("<4xI16xQQ24x")  # sh_type, sh_offset, sh_size
_STRINGS: Final = 3  # SHT_STRTAB
_STRINGS_MAX_BYTES: Final = 64 * 1024 * 1024
_SECTIONS_MAX_BYTES: Final = 64 * 1024  # an image has about ten


def grows_tables(path: str) -> bool:
    """Return whether any code of the image has the instruction `table.grow`."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return any(_TABLE_GROWS in os.pread(fd, size, at) for at, size in _strings(fd) if size <= _STRINGS_MAX_BYTES)
    except (OSError, OverflowError, struct.error):
        return False
    finally:
        os.close(fd)


def _strings(fd: int) -> list[tuple[int, int]]:
    """Return place and size of each table of strings. Raises `struct.error`: there is no such header."""
    at, size, count, _ = _HEADER.unpack_from(os.pread(fd, _HEADER.size, 0))
    raw = os.pread(fd, min(size * count, _SECTIONS_MAX_BYTES), at)
    sections = (_SECTION.unpack_from(raw, number * size) for number in range(count))
    return [(offset, length) for kind, offset, length in sections if kind == _STRINGS]
