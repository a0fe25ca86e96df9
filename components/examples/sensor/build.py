#!/usr/bin/env python3
"""Build the sensor: the same program in two languages, each by its own toolchain.

Usage: components/examples/sensor/build.py LANGUAGE -o FILE

    rust     cargo with std for wasm32-wasip2, wasm-tools (or the root of deploy/toolchain.py, where it was made)
    python   componentize-py (PyPI)

Exit code 2 says that a tool is missing, and which.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMPONENTS = HERE.parents[1]
sys.path.insert(0, str(HERE.parent))

from tools import MissingToolError, cargo, debian, run, tool, wasm_tools  # noqa: E402 - shared with the other examples

CORE_MODULE = b"\0asm\x01\0\0\0"


def build_rust(scratch: Path, out: Path) -> None:
    """Rust: an ordinary `main`; bindings by wit-bindgen, which also embeds the world."""
    built = cargo(HERE / "rust", "wasm32-wasip2", scratch) / "sensor.wasm"
    if built.read_bytes().startswith(CORE_MODULE):
        wasm_tools("component", "new", built, "-o", out)
    else:
        shutil.copy(built, out)


def build_python(scratch: Path, out: Path) -> None:
    """Python: CPython in the component, the world `program`."""
    compiler = tool("componentize-py", "pip install componentize-py")
    wit = scratch / "wit"
    shutil.copytree(COMPONENTS / "wit/deps", wit / "deps")
    (wit / "deps/config").mkdir()
    shutil.copy(COMPONENTS / "adapter/config.wit", wit / "deps/config")
    shutil.copy(HERE / "wit/uses.wit", wit)
    shutil.copy(HERE / "wit/program.wit", wit)
    shutil.copytree(HERE / "wit/cli", wit / "deps/cli")
    shutil.copy(HERE / "python/app.py", scratch)
    run(compiler, "-d", wit, "-w", "program", "componentize", "app", "-o", out, cwd=scratch)


BUILDERS: dict[str, Callable[[Path, Path], None]] = {"rust": build_rust, "python": build_python}


def main() -> int:
    """Build what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language", choices=sorted(BUILDERS))
    parser.add_argument("-o", "--output", type=Path, required=True, help="the component to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            BUILDERS[options.language](Path(scratch), options.output.resolve())
        except (MissingToolError, debian.BuildError) as error:
            sys.stderr.write(f"{error}\n")
            return 2 if isinstance(error, MissingToolError) else 1
        except subprocess.CalledProcessError as error:
            return error.returncode or 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
