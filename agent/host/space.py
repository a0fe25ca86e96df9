"""The board's address space, and how linear memories lie in it.

Sv39 and 39-bit Arm give far less of it than a desktop does: what is there is tried, and the plan follows. Nothing here
knows wasmtime.
"""

import mmap
from dataclasses import dataclass
from typing import Final

from fleet.protocol.caps import MIB

_GIB: Final = 1024 * MIB
_GUARD_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How linear memories lie in the address space: bytes reserved and guarded for each.

    A full reservation lets the hardware check bounds; a small one costs an instruction for each access.
    """

    reservation_bytes: int
    guard_bytes: int


FULL: Final = MemoryPlan(4 * _GIB, 2 * _GIB)
SIZED: Final = MemoryPlan(64 * MIB, _GUARD_BYTES)
NONE: Final = MemoryPlan(0, _GUARD_BYTES)


def reservable_bytes() -> int:
    """The largest power of two, at most 64 TiB, that this process can reserve in one piece."""
    for bits in range(46, 30, -1):
        try:
            mmap.mmap(-1, 1 << bits, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, prot=0).close()
        except (OSError, ValueError, OverflowError):
            continue
        return 1 << bits
    return 0


def memory_plan(reservable: int) -> MemoryPlan:
    """The plan for an address space in which `reservable` bytes fit in one piece.

    From 8 TiB on a thousand memories fit in full; Sv39 and 39-bit Arm give 128 to 256 GiB, where about 27 would.
    """
    if reservable >= 8 * 1024 * _GIB:
        return FULL
    return SIZED if reservable >= 32 * _GIB else NONE
