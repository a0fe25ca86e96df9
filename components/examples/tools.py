"""Shared parts of the builds of the examples: finding a language's tools, saying which is missing, running them.

Rust's standard library for WebAssembly is looked for beside the `rustc` on PATH, then in the root that
`python -m deploy.toolchain` makes.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).resolve().parent
COMPONENTS = HERE.parent
sys.path.insert(0, str(HERE.parents[1]))

from deploy import debian, toolchain  # noqa: E402 - the house is not installed where components are built


class MissingToolError(Exception):
    """A tool that this language needs is not here."""


def tool(name: str, how: str) -> str:
    """Where a tool is on PATH.

    Raises:
        MissingToolError: saying how to get it.
    """
    if found := shutil.which(name):
        return found
    raise MissingToolError(f"{name} is not on PATH: {how}")


def run(*command: str | Path, cwd: Path = HERE, env: Mapping[str, str] | None = None) -> None:
    """Run a tool to its end; its own words on standard error say what is wrong."""
    subprocess.run(list(map(str, command)), cwd=cwd, env={**os.environ, **(env or {})}, check=True)


def wasm_tools(*args: str | Path) -> None:
    """Run wasm-tools.

    Raises:
        MissingToolError: if it is not here.
    """
    run(tool("wasm-tools", "cargo install wasm-tools --locked"), *args)


def cargo(crate: Path, target: str, scratch: Path) -> Path:
    """Build a crate of this folder for a target of WebAssembly; the directory with what came out.

    Raises:
        MissingToolError: if there is no standard library for that target.
        debian.BuildError: if the build inside the toolchain's root fails.
    """
    rustc = shutil.which("rustc")
    asked = [rustc or "false", "--print", "target-libdir", "--target", target]
    libraries = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    root = debian.cache_dir() / toolchain.SUITE
    here = bool(libraries) and Path(libraries).is_dir()
    if not here and not root.is_dir():
        raise MissingToolError(f"rustc has no std for {target}: rustup target add {target}")
    command = ["cargo", "build", "--locked", "--release", "--target", target]
    # Debian's rustc brings no linker of its own for these targets
    linker = {f"CARGO_TARGET_{target.upper().replace('-', '_')}_LINKER": "wasm-ld"}
    if here:
        env = {"CARGO_TARGET_DIR": str(scratch / "target"), **(linker if shutil.which("wasm-ld") else {})}
        run(*command, cwd=crate, env=env)
    else:
        crates = debian.cache_dir() / "cargo"
        crates.mkdir(exist_ok=True)
        env = {"CARGO_TARGET_DIR": "/scratch/target", "CARGO_HOME": "/cargo", **linker}
        # the whole folder: a crate names interfaces beside itself, such as ../../wit
        binds = {COMPONENTS: "/components", scratch: "/scratch", crates: "/cargo"}
        place = Path("/components") / crate.relative_to(COMPONENTS)
        debian.run_inside(root, ["env", f"--chdir={place}", *command], binds=binds, env=env)
    return scratch / "target" / target / "release"
