"""Root file system of a board: Debian 13 for arm64 or riscv64, created on this machine, cached by its inputs.

    python -m deploy.image.root arm64        make it (minutes, once) and print where it is

mmdebstrap creates the root through qemu-user. Meanwhile Python's byte-compilation is replaced by a stub, as it would
take longer than everything else under emulation; wasmfleet's packages byte-compile their files when they are installed.
The kernel is unpacked beside the root, not installed in it, which would build an initramfs under emulation.
"""

import shutil
import subprocess
import sys
from pathlib import Path

from deploy import debian

SUITE = "trixie"
ARCHITECTURES = {"arm64": "aarch64", "riscv64": "riscv64"}

# Dependencies of the agent's package, and what a small board has anyway.
BASE = (
    "systemd systemd-sysv udev kmod iproute2 procps login passwd "
    "python3 python3-cryptography python3-paho-mqtt python3-systemd python3-msgspec libseccomp2"
).split()

_STUBBED = ("/usr/bin/python3.13", "/usr/bin/py3compile")
_STUB = (
    'chroot "$1" dpkg-divert --quiet --local --rename --divert {0}.real --add {0}; '
    'mkdir -p "$1"/usr/bin; printf "#!/bin/sh\\nexit 0\\n" >"$1"{0}; chmod 755 "$1"{0}'
)
_UNSTUB = 'rm "$1"{0}; chroot "$1" dpkg-divert --quiet --local --rename --remove {0}'


def ready(architecture: str) -> None:
    """Check that programs of the architecture run here.

    Raises:
        debian.BuildError: naming what to install or to run.
    """
    machine = ARCHITECTURES[architecture]
    debian.need("mmdebstrap", f"qemu-{machine}-static")
    binfmt = Path("/proc/sys/fs/binfmt_misc")
    if not (binfmt / "status").exists() and debian.is_root():
        subprocess.run(["mount", "-t", "binfmt_misc", "binfmt_misc", str(binfmt)], check=False)
    if not (binfmt / f"qemu-{machine}").exists() and debian.is_root() and shutil.which("update-binfmts"):
        subprocess.run(["update-binfmts", "--enable", f"qemu-{machine}"], check=False)
    if not (binfmt / f"qemu-{machine}").exists():
        raise debian.BuildError(
            f"this kernel does not run {machine} programs yet; as root: apt-get install binfmt-support "
            f"qemu-user-static && update-binfmts --enable qemu-{machine}"
        )


def root(architecture: str) -> Path:
    """Return the board's root directory; treat it as read-only."""
    ready(architecture)
    hooks = [f"--essential-hook={_STUB.format(path)}" for path in _STUBBED]
    hooks += [f"--customize-hook={_UNSTUB.format(path)}" for path in _STUBBED]
    return debian.bootstrap(
        debian.cache_dir() / f"board-{architecture}-{debian.key(SUITE, BASE, hooks)}",
        suite=SUITE,
        architectures=(architecture,),
        packages=BASE,
        variant="minbase",
        options=hooks,
    )


def kernel(architecture: str) -> Path:
    """Return Debian's kernel with its modules, and a static busybox, unpacked and not configured."""
    packages = (f"linux-image-{architecture}", "busybox-static")
    return debian.bootstrap(
        debian.cache_dir() / f"kernel-{architecture}-{debian.key(SUITE, packages)}",
        suite=SUITE,
        architectures=(architecture,),
        packages=packages,
        variant="extract",
    )


def native_python() -> Path:
    """Return a root of this machine's own architecture with the boards' Python."""
    packages = ("python3",)
    return debian.bootstrap(
        debian.cache_dir() / f"python-{debian.key(SUITE, packages)}",
        suite=SUITE,
        architectures=(debian.native(),),
        packages=packages,
        variant="essential",
    )


def byte_compile(tree: Path) -> None:
    """Byte-compile a root's Python files with the same Python of this machine's architecture: seconds, not minutes.

    What it writes is the same on every architecture; under emulation the same takes twenty times as long.
    """
    native = native_python()
    places = [f"/tree/usr/lib/{each}" for each in ("python3.13", "python3/dist-packages", "wasmfleet")]
    here = [place for place in places if (tree / place.removeprefix("/tree/")).is_dir()]
    command = ["python3", "-m", "compileall", "-q", "-j2", "-x", "/(test|lib2to3|idlelib)/", "-s", "/tree", "-p", "/"]
    debian.run_inside(native, [*command, *here], binds={tree: "/tree"})


def without_byte_compiling(tree: Path) -> list[str]:
    """Return shell commands that keep packages from byte-compiling inside `tree`, and let them again."""
    stub = _STUB.format("/usr/bin/py3compile").replace('"$1"', str(tree))
    return [stub, _UNSTUB.format("/usr/bin/py3compile").replace('"$1"', str(tree))]


def main() -> int:
    """Create the roots of the architectures named on the command line."""
    for architecture in sys.argv[1:] or ARCHITECTURES:
        try:
            print(root(architecture), kernel(architecture))
        except (debian.BuildError, KeyError) as error:
            debian.say(f"board root: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
