#!/usr/bin/env python3
"""Build the file in which `fleet` adapts commands of WASI Preview 1, and the guest of its tests.

Usage: components/preview1/build.py ADAPTER [--check]

ADAPTER is `artefacts/wasi_snapshot_preview1.command.wasm` of the crate `wasi-preview1-component-adapter-provider`, in
the version and with the digest that `fleet.component.preview1` names. Needs the `ziglang` package and `wasm-tools` on
PATH in the versions of `c_toolchain.py`. Without `--check` the files are written anew; with it nothing is written, and
the exit code says whether they are what the sources give.

`wasm-tools component new` makes a component of the adapter and a command that imports every function of Preview 1 and
does nothing. `fleet.component.preview1` puts other commands in the place of that one.
"""

import argparse
import hashlib
import lzma
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]

from c_toolchain import tool_versions, wasm_tools  # noqa: E402 - shared with the adapter of wasi:http

from fleet.component import preview1  # noqa: E402 - not installed where components are built

OUTPUTS = {"preview1": ROOT / "fleet" / "component" / "preview1.wasm.xz", "probe1": HERE / "probe1.wasm.xz"}
FLAGS = ["--target=wasm32-freestanding", "-mcpu=mvp+bulk_memory", "-Oz", "-flto", "-nostdlib"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wl,--no-entry", "-Wl,-z,stack-size=16384"]
# A dictionary no larger than needed: who unpacks has memory for it.
LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 128 * 1024}]


def build(adapter: Path, scratch: Path) -> dict[str, bytes]:
    """Build the files. Raises CalledProcessError when a tool fails; it has said why on standard error."""
    out = scratch / "preview1.wasm"
    adapt = ("--adapt", f"{preview1.MODULE}={adapter}")
    wasm_tools("component", "new", HERE / "nothing.wat", *adapt, "-o", out)
    wasm_tools("strip", "--all", out, "-o", out)
    wasm_tools("validate", out)
    probe = scratch / "probe.wasm"
    subprocess.run([sys.executable, "-m", "ziglang", "cc", *FLAGS, "probe1.c", "-o", str(probe)], cwd=HERE, check=True)
    wasm_tools("strip", "--all", probe, "-o", probe)
    return {"preview1": out.read_bytes(), "probe1": probe.read_bytes()}


def main() -> int:
    """Build the file, then write or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file differs")
    options = parser.parse_args()
    wrong = tool_versions()
    if (found := hashlib.sha256(options.adapter.read_bytes()).hexdigest()) != preview1.ADAPTER_SHA256:
        wrong.append(f"{options.adapter} has sha256 {found}: another one than {preview1.ADAPTER} is")
    if wrong:
        sys.stderr.write("".join(f"{line}\n" for line in wrong))
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        built = build(options.adapter, Path(scratch))
    if options.check:
        stale = [path.name for name, path in OUTPUTS.items() if lzma.decompress(path.read_bytes()) != built[name]]
        sys.stderr.write("".join(f"{name} is not what its source gives: run build.py\n" for name in stale))
        return 1 if stale else 0
    for name, path in OUTPUTS.items():
        path.write_bytes(lzma.compress(built[name], filters=LZMA))
    return 0


if __name__ == "__main__":
    sys.exit(main())
