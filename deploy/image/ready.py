"""Prepare this machine to emulate boards: `python -m deploy.image.ready`, part of `make test-boards`.

As root it installs missing packages from this machine's Debian archive; otherwise it says what to install. Then it
makes the parts of boards that rarely change, for both architectures at the same time: a root and a kernel.
"""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from deploy import debian
from deploy.image import root

PROGRAMS = (
    *("mmdebstrap", "qemu-aarch64-static", "qemu-riscv64-static", "qemu-system-aarch64", "qemu-system-riscv64"),
    *("qemu-img", "mke2fs", "mkfs.fat", "mcopy", "dpkg-deb", "cpio", "depmod", "unshare", "mosquitto"),
)
BUDGET_S = 600  # from nothing, on two cores; nothing when it is there
# packages without a program of their own
BESIDES = ("arch-test", "binfmt-support", "opensbi")


def install() -> None:
    """Install missing packages.

    Raises:
        debian.BuildError: this is not root, or apt-get fails.
    """
    if all(shutil.which(name) for name in PROGRAMS):
        return
    if not debian.is_root():
        debian.need(*PROGRAMS)
    packages = sorted({debian.PACKAGE_OF.get(name, name) for name in PROGRAMS} | set(BESIDES))
    debian.say(f"installing {' '.join(packages)}")
    apt = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", *packages]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    if subprocess.run(apt, check=False, env=environment, stdout=subprocess.DEVNULL).returncode != 0:
        raise debian.BuildError("apt-get could not install them: run apt-get update and try again")


def make(architecture: str) -> None:
    """Create the root and the kernel of a board unless they exist; print how long it took."""
    started = time.monotonic()
    root.root(architecture)
    root.kernel(architecture)
    debian.say(f"=== root and kernel {architecture}: {time.monotonic() - started:.0f} s of {BUDGET_S} s")


def main() -> int:
    """Install and create whatever is missing; return 1 if that fails."""
    try:
        install()
        for architecture in root.ARCHITECTURES:
            root.ready(architecture)
        with ThreadPoolExecutor() as both:
            list(both.map(make, root.ARCHITECTURES))
        root.native_python()
    except debian.BuildError as error:
        debian.say(f"boards: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
