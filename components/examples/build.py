#!/usr/bin/env python3
"""Build one example: the same HTTP component in several languages, each by its own toolchain.

Usage: components/examples/build.py LANGUAGE -o FILE [--preview1-adapter FILE]

    c        python -m ziglang (PyPI), wasm-tools             ../demo/http.c, version 1
    zig      python -m ziglang (PyPI), wasm-tools
    rust     cargo with std for wasm32-unknown-unknown (or the root of deploy/toolchain.py), wasm-tools
    go       go, wasm-tools, and wasi_snapshot_preview1.reactor.wasm from wasmtime's releases
    js       componentize-qjs (npm)
    python   componentize-py (PyPI)
    wat      wasmtime (PyPI; `make install` brings it)

Exit code 2 says that a tool is missing, and which.
"""

import argparse
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tools import MissingToolError, cargo, debian, run, tool, wasm_tools

HERE = Path(__file__).resolve().parent
WIT = HERE.parent / "wit"
WORLD = "wasmfleet:worlds/http"
RUST_TARGET = "wasm32-unknown-unknown"


def embed(core: Path, out: Path, *adapt: str | Path) -> None:
    """Make a component of a core module whose exports already have the names of the world."""
    embedded = core.with_suffix(".embedded.wasm")
    wasm_tools("component", "embed", "--world", "http", WIT, core, "-o", embedded)
    wasm_tools("component", "new", embedded, *adapt, "-o", out)


def ziglang() -> tuple[str, ...]:
    """Zig and its C compiler, as a Python package brings them."""
    if importlib.util.find_spec("ziglang") is None:
        raise MissingToolError("ziglang is not installed: pip install ziglang==0.17.1")
    return (sys.executable, "-m", "ziglang")


def build_c(scratch: Path, out: Path, _adapter: Path | None) -> None:
    """C: freestanding, the canonical ABI by hand."""
    core = scratch / "hello.wasm"
    flags = (
        "--target=wasm32-freestanding",
        "-mcpu=mvp",
        "-Os",
        "-nostdlib",
        "-Wl,--no-entry",
        "-Wl,-z,stack-size=4096",
    )
    run(*ziglang(), "cc", *flags, '-DVERSION="1"', "http.c", "-o", core, cwd=HERE.parent / "demo")
    embed(core, out)


def build_zig(scratch: Path, out: Path, _adapter: Path | None) -> None:
    """Zig: freestanding, the canonical ABI by hand."""
    core = scratch / "hello.wasm"
    flags = ("-target", "wasm32-freestanding", "-fno-entry", "-rdynamic", "-O", "ReleaseSmall")
    cache = ("--cache-dir", scratch / "cache")
    run(*ziglang(), "build-exe", "hello.zig", *flags, *cache, f"-femit-bin={core}", cwd=HERE / "zig")
    embed(core, out)


def build_rust(scratch: Path, out: Path, _adapter: Path | None) -> None:
    """Rust: std without a system, bindings by wit-bindgen, which also embeds the world."""
    wasm_tools("component", "new", cargo(HERE / "rust", RUST_TARGET, scratch) / "hello_rust.wasm", "-o", out)


def build_go(scratch: Path, out: Path, adapter: Path | None) -> None:
    """Go: a WASI preview 1 reactor, adapted; its runtime wants many of WASI's interfaces."""
    go = tool("go", "go.dev/dl")
    if adapter is None:
        raise MissingToolError(
            "--preview1-adapter is needed: wasi_snapshot_preview1.reactor.wasm of wasmtime's releases"
        )
    core = scratch / "hello.wasm"
    flags = ("-buildmode=c-shared", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=")
    run(go, "build", *flags, "-o", core, ".", cwd=HERE / "go", env={"GOOS": "wasip1", "GOARCH": "wasm"})
    embed(core, out, "--adapt", f"wasi_snapshot_preview1={adapter.resolve()}")


def build_js(_scratch: Path, out: Path, _adapter: Path | None) -> None:
    """JavaScript: QuickJS in the component."""
    compiler = tool("componentize-qjs", "npm install -g componentize-qjs")
    flags = ("--stub-wasi", "--opt-size", "--sync", "--minify")
    run(compiler, "--wit", WIT, "--world", "http", *flags, "--js", HERE / "js/hello.js", "-o", out)


def build_python(scratch: Path, out: Path, _adapter: Path | None) -> None:
    """Python: CPython in the component."""
    compiler = tool("componentize-py", "pip install componentize-py")
    shutil.copy(HERE / "python/app.py", scratch)
    run(compiler, "-d", WIT, "-w", WORLD, "componentize", "--stub-wasi", "app", "-o", out, cwd=scratch)


def build_wat(_scratch: Path, out: Path, _adapter: Path | None) -> None:
    """WebAssembly text: assembled by the engine's own library."""
    if importlib.util.find_spec("wasmtime") is None:
        raise MissingToolError("wasmtime is not installed: make install, then run this with .venv/bin/python")
    import wasmtime  # noqa: PLC0415 - other languages build without it

    out.write_bytes(wasmtime.wat2wasm((HERE / "wat/hello.wat").read_text(encoding="utf-8")))


BUILDERS: dict[str, Callable[[Path, Path, Path | None], None]] = {
    "c": build_c,
    "zig": build_zig,
    "rust": build_rust,
    "go": build_go,
    "js": build_js,
    "python": build_python,
    "wat": build_wat,
}


def main() -> int:
    """Build what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language", choices=sorted(BUILDERS))
    parser.add_argument("-o", "--output", type=Path, required=True, help="the component to write")
    parser.add_argument("--preview1-adapter", type=Path, help="for Go: wasi_snapshot_preview1.reactor.wasm")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            BUILDERS[options.language](Path(scratch), options.output.resolve(), options.preview1_adapter)
        except (MissingToolError, debian.BuildError) as error:
            sys.stderr.write(f"{error}\n")
            return 2 if isinstance(error, MissingToolError) else 1
        except subprocess.CalledProcessError as error:
            return error.returncode or 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
