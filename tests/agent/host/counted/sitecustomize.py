"""Count the calls of Python and of the engine in each worker, in a file that the test maps; loaded by PYTHONPATH.

A worker is known by its pid. Its main thread alone is counted: no other enters WebAssembly.
"""

import mmap
import os
import struct
import sys
from pathlib import Path

COUNTERS = struct.Struct("=QQ")
SLOTS = 1 << 16

if b"agent.host.worker.zygote" in Path("/proc/self/cmdline").read_bytes():
    with Path(os.environ["PYTHONCOUNTS"]).open("r+b") as file:
        page = mmap.mmap(file.fileno(), COUNTERS.size * SLOTS)

    def count(frame, event, _argument):
        """Count a function of Python; one of the engine's bindings, or one that the engine called, is a crossing."""
        if event == "call":
            at = os.getpid() % SLOTS * COUNTERS.size
            calls, crossings = COUNTERS.unpack_from(page, at)
            crosses = frame.f_code.co_filename.endswith("/wasmtime/_bindings.py") or frame.f_code.co_name == "func_impl"
            COUNTERS.pack_into(page, at, calls + 1, crossings + crosses)

    sys.setprofile(count)
