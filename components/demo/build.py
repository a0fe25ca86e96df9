#!/usr/bin/env python3
"""Build the demo's components from source, byte for byte the same on every machine.

Usage: components/demo/build.py [--check]

Needs the `ziglang` package of the version below (for its C compiler) and `wasm-tools` of the version below on PATH
(`cargo install wasm-tools --locked --version 1.239.0`). Without `--check` the files in this directory and SHA256SUMS
are written anew; with it nothing is written, and the exit code says whether they are what the sources give.
"""

import argparse
import hashlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ZIG = "0.17.1"
WASM_TOOLS = "1.239.0"
HERE = Path(__file__).resolve().parent
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


def tool_versions() -> list[str]:
    """Return what is missing or of another version, as sentences."""
    wrong = []
    try:
        zig = importlib.metadata.version("ziglang")
    except importlib.metadata.PackageNotFoundError:
        zig = "missing"
    if zig != ZIG:
        wrong.append(f"ziglang {ZIG} is needed, here it is {zig}: pip install ziglang=={ZIG}")
    found = shutil.which("wasm-tools")
    version = subprocess.run([found, "--version"], capture_output=True, text=True, check=True).stdout if found else ""
    if version.split()[1:2] != [WASM_TOOLS]:
        wrong.append(f"wasm-tools {WASM_TOOLS} is needed: cargo install wasm-tools --locked --version {WASM_TOOLS}")
    return wrong


def wasm_tools(*args: str | Path) -> None:
    """Run wasm-tools, found on PATH."""
    subprocess.run(["wasm-tools", *map(str, args)], check=True)  # noqa: S607 - its version was checked


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
