"""A serial number for an emulated board, where real ones have theirs: in the device tree (its specification, 5)."""

import struct
import subprocess
from pathlib import Path

_MAGIC = 0xD00DFEED
_BEGIN_NODE, _PROPERTY = 1, 3
_NAME = b"serial-number\0"
_HEADER = ">10I"
_SIZE, _STRUCTURE, _STRINGS, _STRINGS_SIZE, _STRUCTURE_SIZE = 1, 2, 3, 8, 9


def with_serial(emulator: str, options: tuple[str, ...], serial: str, out: Path) -> Path:
    """QEMU's own device tree of a machine, with a serial number in it."""
    machine = list(options)
    place = machine.index("-M") + 1
    machine[place] += f",dumpdtb={out}"
    command = [emulator, *machine, "-smp", "2", "-m", "512", "-nodefaults", "-display", "none"]
    subprocess.run(command, check=True, capture_output=True)
    out.write_bytes(add_property(out.read_bytes(), serial.encode() + b"\0"))
    return out


def add_property(tree: bytes, value: bytes) -> bytes:
    """A flattened device tree whose root has the property `serial-number`."""
    head = list(struct.unpack_from(_HEADER, tree))
    assert head[0] == _MAGIC, "no device tree"
    structure = tree[head[_STRUCTURE] : head[_STRUCTURE] + head[_STRUCTURE_SIZE]]
    strings = tree[head[_STRINGS] : head[_STRINGS] + head[_STRINGS_SIZE]]
    assert structure[:8] == struct.pack(">II", _BEGIN_NODE, 0), "the root has no name"
    added = struct.pack(">III", _PROPERTY, len(value), len(strings)) + value + b"\0" * (-len(value) % 4)
    structure = structure[:8] + added + structure[8:]
    strings += _NAME
    before = tree[: head[_STRUCTURE]]  # header and memory reservations lie first in what QEMU writes
    assert head[_STRINGS] > head[_STRUCTURE], "the structure lies before the strings"
    head[_STRINGS], head[_STRUCTURE_SIZE] = len(before) + len(structure), len(structure)
    head[_STRINGS_SIZE] = len(strings)
    head[_SIZE] = len(before) + len(structure) + len(strings)
    return struct.pack(_HEADER, *head) + before[40:] + structure + strings
