"""Build the `wasmtime` command for comparisons: `python -m deploy.wasmtime_cli` (or `make wasmtime-serve`).

Tests run the same component in `wasmtime serve` and in the host, and compare. The command must have the version of the
library that devices run; upstream publishes it as a crate. It is built unchanged, from its own lock file, with the
features for serving components (including the pooling allocator and the optimising compiler), in release mode, by the
compiler of the toolchain root.

`$WASMFLEET_WASMTIME` names an existing command; otherwise it is looked for in the cache, then on PATH. Cargo's
`CARGO_PROFILE_RELEASE_*` variables apply: a build with less optimisation is enough to compare answers, not speed.
"""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from deploy import debian, toolchain

VERSION = "50.0.1"
FEATURES = "serve,run,component-model-async,cranelift,pooling-allocator,parallel-compilation"


def place() -> Path:
    """Return the path at which the built command is stored."""
    return debian.cache_dir() / f"wasmtime-{VERSION}" / "bin" / "wasmtime"


def finished() -> Path | None:
    """Find the command, if it was named, built before or installed, and serves components."""
    named = os.environ.get("WASMFLEET_WASMTIME")
    found = shutil.which("wasmtime")
    for each in (Path(named) if named else None, place(), Path(found) if found else None):
        if each is not None and each.is_file() and _serves(each):
            return each
    return None


def _serves(command: Path) -> bool:
    # No --help in this build. Without its sub-command, `serve` would be the name of a file to run.
    output = subprocess.run([command, "serve"], check=False, capture_output=True).stderr
    return b"required arguments" in output


def build() -> Path:
    """Build the command in the toolchain root; return its path. Half an hour on two cores.

    Raises:
        debian.BuildError: if a step fails; its output was shown.
    """
    cache = debian.cache_dir()
    cargo, work, out = cache / "cargo", cache / "wasmtime-build", place().parent.parent
    for each in (cargo, work, out):
        each.mkdir(exist_ok=True)
    install = ["cargo", "install", "wasmtime-cli", "--locked", "--no-track", "--root", "/out", "--version", VERSION]
    debian.run_inside(
        toolchain.toolchain(),
        ["nice", "-n", "10", *install, "--no-default-features", "--features", FEATURES],
        binds={cargo: "/cargo", work: "/work", out: "/out"},
        env={
            "CARGO_HOME": "/cargo",
            "CARGO_TARGET_DIR": "/work",
            "CARGO_BUILD_JOBS": os.environ.get("JOBS", "2"),
            "CARGO_HTTP_CAINFO": "/etc/ssl/certs/ca-certificates.crt",
            **{name: value for name, value in os.environ.items() if name.startswith("CARGO_PROFILE_")},
        },
    )
    return place()


def main() -> int:
    """Build the command unless it exists, and print its path."""
    started = time.monotonic()
    try:
        done = finished()
        if done is None:
            done = build()
            debian.say(f"built in {time.monotonic() - started:.0f} s")
    except debian.BuildError as error:
        debian.say(f"wasmtime: {error}")
        return 1
    print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
