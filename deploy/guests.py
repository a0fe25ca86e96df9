"""The toolchains of components in Rust, Go, JavaScript and Python: `python -m deploy.guests COMMAND...`.

Runs a command with all of them on PATH, after installing those that are not cached yet: wasm-tools and Rust's standard
library come with the root of `deploy.toolchain`, the JavaScript tools from npm, the Python tools from PyPI, in the
versions named here. Go must be installed on the machine. Devices need none of this, nor does pushing built components.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from deploy import debian, toolchain
from fleet.component.toolchains import TOOLS

NPM_PACKAGES = (
    f"@bytecodealliance/jco@{TOOLS['jco'].version}",
    f"componentize-qjs@{TOOLS['componentize-qjs'].version}",
)
PYPI_PACKAGES = (f"componentize-py=={TOOLS['componentize-py'].version}",)
# jco carries the adapter that makes components of preview 1 modules; Go's need it
PREVIEW1_ADAPTER = "node_modules/@bytecodealliance/jco/lib/wasi_snapshot_preview1.reactor.wasm"


def javascript() -> Path:
    """Return the directory of jco and componentize-qjs, installed by npm on first use.

    Raises:
        debian.BuildError: if npm is missing or fails.
    """
    debian.need("npm")
    place = debian.cache_dir() / f"npm-{debian.key(*NPM_PACKAGES)}"
    install = ["npm", "install", "--silent", "--no-fund", "--no-audit", "--prefix", str(place)]
    _once(place, [[*install, *NPM_PACKAGES]])
    return place


def python() -> Path:
    """Return a virtual environment with componentize-py, created on first use.

    Raises:
        debian.BuildError: if pip fails.
    """
    place = debian.cache_dir() / f"componentize-py-{debian.key(*PYPI_PACKAGES, sys.version)}"
    install = [str(place / "bin" / "python"), "-m", "pip", "install", "--quiet", *PYPI_PACKAGES]
    _once(place, [[sys.executable, "-m", "venv", "--clear", str(place)], install])
    return place


def commands() -> Path:
    """Return a directory for PATH with wasm-tools and componentize-py only, without the Python beside it.

    wasm-tools comes from the toolchain root, and is started with that root's libraries.
    """
    root = toolchain.toolchain()
    place = debian.cache_dir() / "guests-bin"
    place.mkdir(exist_ok=True)
    start = f"{root}/usr/lib64/ld-linux-x86-64.so.2 --library-path {root}/usr/lib/x86_64-linux-gnu"
    for name, program in {
        "wasm-tools": f"{start} {root}/usr/bin/wasm-tools",
        "componentize-py": str(python() / "bin" / "componentize-py"),
    }.items():
        script = place / name
        script.write_text(f'#!/bin/sh\nexec {program} "$@"\n')
        script.chmod(0o755)
    return place


def environment() -> Mapping[str, str]:
    """Return this process's environment with every toolchain on PATH.

    Raises:
        debian.BuildError: if one of them cannot be made.
    """
    node = javascript()
    path = [str(commands()), str(node / "node_modules" / ".bin"), os.environ.get("PATH", "")]
    return {**os.environ, "PATH": os.pathsep.join(path), "WASI_PREVIEW1_ADAPTER": str(node / PREVIEW1_ADAPTER)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    command = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return subprocess.run(command, env=environment(), check=False).returncode
    except debian.BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def _once(place: Path, commands: Sequence[Sequence[str]]) -> None:
    """Fill a directory by commands, once; an incomplete one is created again."""
    done = place / ".complete"
    if done.exists():
        return
    debian.say(f"making {place}")
    place.mkdir(exist_ok=True)
    for command in commands:
        if subprocess.run(command, check=False, stdout=sys.stderr).returncode != 0:
            raise debian.BuildError(f"{command[0]} could not make {place}: see its messages above")
    done.touch()


if __name__ == "__main__":
    sys.exit(main())
