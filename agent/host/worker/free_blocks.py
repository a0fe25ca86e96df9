"""Fill the free blocks of a process that is about to fork, so that its children share as much memory as possible.

A child that takes a free block out of a page of its parent's gets a copy of that page, however small the block. Where
no such block is left, what a child allocates stands together, on pages of its own: loading an image of a guest of
wasi:http then copies 600 KB less. Blocks are never freed; the pages that they are on were in use before.

Only blocks of the C library's allocator: the same for Python's small blocks saved nothing, since a new pool for each of
their sizes takes as much.
"""

import ctypes
from typing import Final

_BLOCKS_MAX: Final = 50_000
_SIZES: Final = tuple(1 << bits for bits in range(16, 4, -1))


class _Mallinfo2(ctypes.Structure):
    """Figures of the C library's allocator (mallinfo(3))."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks"),
            "keepcost",
        )
    )


def fill() -> None:
    """Take the largest blocks first, until one comes from the top of the heap, where nothing was before."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):  # before glibc 2.33, or another library
        return
    figures = libc.mallinfo2
    figures.restype = _Mallinfo2
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    for size in _SIZES:
        for _ in range(_BLOCKS_MAX):
            before = figures()
            if before.fordblks - before.keepcost < size:
                break
            libc.malloc(size)
            if figures().keepcost != before.keepcost:
                break
