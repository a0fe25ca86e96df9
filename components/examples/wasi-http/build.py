#!/usr/bin/env python3
"""Build one wasi:http server: the same in three languages, each by its own toolchain, none of it made for devices.

Usage: components/examples/wasi-http/build.py LANGUAGE -o FILE [--source FILE]

    rust     cargo with std for wasm32-wasip2, wasm-tools (or the root of deploy/toolchain.py, where it was made)
    js       jco with componentize-js (npm)
    python   componentize-py (PyPI)

`--source` names another program in JavaScript or Python for the same world.

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
ROOT = HERE.parents[2]
sys.path.insert(0, str(HERE.parent))

from tools import MissingToolError, cargo, debian, run, tool, wasm_tools  # noqa: E402 - shared with the other examples

RUST_TARGET = "wasm32-wasip2"
CORE_MODULE = b"\0asm\x01\0\0\0"


def wit(scratch: Path, wasi: str) -> Path:
    """Lay out a directory with the world and the interfaces that it names, in one release of WASI."""
    place = scratch / "wit"
    shutil.copytree(ROOT / "components" / "adapter" / "wit" / "deps", place / "deps")
    shutil.copy(HERE / "world.wit", place)
    for file in place.rglob("*.wit"):
        file.write_text(file.read_text().replace("@0.2.12", f"@{wasi}"))
    return place


def build_rust(scratch: Path, out: Path, _source: Path | None = None) -> None:
    """Rust: the crate wasip2, world wasi:http/proxy."""
    built = cargo(HERE / "rust", RUST_TARGET, scratch) / "hello_wasi_http.wasm"
    if built.read_bytes().startswith(CORE_MODULE):
        wasm_tools("component", "new", built, "-o", out)
    else:
        shutil.copy(built, out)


def build_js(scratch: Path, out: Path, source: Path | None = None) -> None:
    """JavaScript: StarlingMonkey in the component; the handler is a listener for fetch events."""
    jco = tool("jco", "npm install -g @bytecodealliance/jco @bytecodealliance/componentize-js")
    world = ("--wit", wit(scratch, "0.2.3"), "--world-name", "server")
    run(jco, "componentize", source or HERE / "js" / "hello.js", *world, "-o", out)


def build_python(scratch: Path, out: Path, source: Path | None = None) -> None:
    """Python: CPython in the component."""
    compiler = tool("componentize-py", "pip install componentize-py")
    place = wit(scratch, "0.2.6")
    shutil.copy(source or HERE / "python" / "app.py", scratch / "app.py")
    run(compiler, "-d", place, "-w", "server", "componentize", "app", "-o", out, cwd=scratch)


BUILDERS: dict[str, Callable[[Path, Path, Path | None], None]] = {
    "rust": build_rust,
    "js": build_js,
    "python": build_python,
}


def main() -> int:
    """Build what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language", choices=sorted(BUILDERS))
    parser.add_argument("-o", "--output", type=Path, required=True, help="the component to write")
    parser.add_argument("--source", type=Path, help="the program, in place of the example's")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            BUILDERS[options.language](
                Path(scratch), options.output.resolve(), options.source and options.source.resolve()
            )
        except (MissingToolError, debian.BuildError) as error:
            sys.stderr.write(f"{error}\n")
            return 2 if isinstance(error, MissingToolError) else 1
        except subprocess.CalledProcessError as error:
            return error.returncode or 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
