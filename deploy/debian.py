"""Debian root file systems for builds: mirror, cache, and running commands inside a root.

The mirror is the one that this machine's apt uses (or `$WASMFLEET_DEBIAN_MIRROR`), so that no host is named here. Roots
are made by mmdebstrap: directly as root, otherwise in a user namespace. A root is made under another name and renamed,
so it is complete or absent. `deploy/riscv64`, `deploy/packages`, `deploy/image` and the board tests use this module.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# program -> the Debian package that brings it, for sentences that say what to install
PACKAGE_OF = {
    "mmdebstrap": "mmdebstrap",
    "qemu-aarch64-static": "qemu-user-static",
    "qemu-riscv64-static": "qemu-user-static",
    "qemu-system-aarch64": "qemu-system-arm",
    "qemu-system-riscv64": "qemu-system-misc",
    "qemu-img": "qemu-utils",
    "npm": "npm",
    "mke2fs": "e2fsprogs",
    "mkfs.fat": "dosfstools",
    "mcopy": "mtools",
    "mosquitto": "mosquitto",
    "dpkg-deb": "dpkg-dev",
    "lintian": "lintian",
    "cpio": "cpio",
    "depmod": "kmod",
    "xz": "xz-utils",
    "unshare": "util-linux",
    "objdump": "binutils",
}


class BuildError(Exception):
    """Failure of a build; the message says what failed and what to do."""


def say(sentence: str) -> None:
    """Print progress to the terminal."""
    sys.stderr.write(f"{sentence}\n")
    sys.stderr.flush()


def cache_dir() -> Path:
    """Return the cache of slow results: `$WASMFLEET_CACHE`, else `wasmfleet` in the user's cache."""
    named = os.environ.get("WASMFLEET_CACHE")
    base = Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wasmfleet"
    base.mkdir(parents=True, exist_ok=True)
    return base


def need(*programs: str) -> None:
    """Check that every program is installed.

    Raises:
        BuildError: naming the Debian packages to install.
    """
    missing = [name for name in programs if shutil.which(name) is None]
    if missing:
        packages = " ".join(sorted({PACKAGE_OF.get(name, name) for name in missing}))
        raise BuildError(f"missing {', '.join(missing)}: apt-get install --no-install-recommends {packages}")


def mirror() -> str:
    """Return the URL of the Debian archive that this machine's apt uses.

    Raises:
        BuildError: if apt knows none and `$WASMFLEET_DEBIAN_MIRROR` is not set.
    """
    named = os.environ.get("WASMFLEET_DEBIAN_MIRROR")
    if named:
        return named.rstrip("/")
    need("apt-get")
    wanted = ["Created-By: Packages", "Origin: Debian", "Label: Debian"]
    listed = _output(["apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted]).split()
    if not listed:
        raise BuildError("apt knows no Debian archive: run apt-get update, or set WASMFLEET_DEBIAN_MIRROR")
    return listed[0].rstrip("/")


def key(*parts: object) -> str:
    """Return a short name for a cached result: a hash of its inputs."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def native() -> str:
    """Return Debian's name of this machine's architecture."""
    return _output(["dpkg", "--print-architecture"]).strip()


def is_root() -> bool:
    """Check for the right to build roots without a user namespace."""
    return os.geteuid() == 0


def bootstrap(
    place: Path,
    *,
    suite: str,
    architectures: Sequence[str],
    packages: Sequence[str],
    variant: str = "minbase",
    options: Sequence[str] = (),
) -> Path:
    """Create a Debian root at `place` unless it exists; return `place`.

    Raises:
        BuildError: when mmdebstrap is missing or fails (its output was shown).
    """
    if place.exists():
        return place
    need("mmdebstrap")
    source = f"deb {mirror()} {suite} main"
    fresh = place.with_name(f"{place.name}.{os.getpid()}.new")
    command = [
        "nice",
        "-n",
        "10",
        "mmdebstrap",
        f"--variant={variant}",
        f"--mode={'root' if is_root() else 'unshare'}",
        f"--architectures={','.join(architectures)}",
        f"--include={','.join(packages)}",
        # an archive snapshot's Release file may be past its date; signatures are checked all the same
        '--aptopt=Acquire::Check-Valid-Until "false"',
        '--aptopt=APT::Install-Recommends "false"',
        *(f"--dpkgopt=path-exclude={path}/*" for path in ("/usr/share/doc", "/usr/share/man", "/usr/share/locale")),
        "--dpkgopt=path-include=/usr/share/doc/*/copyright",
        *options,
        suite,
        str(fresh),
        source,
    ]
    say(f"making a Debian {suite} root ({', '.join(architectures)}) at {place}")
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode != 0:
        shutil.rmtree(fresh, ignore_errors=True)
        raise BuildError(f"mmdebstrap could not make {place}: see its messages above")
    fresh.rename(place)
    return place


def enter(
    root: Path, command: Sequence[str], *, binds: Mapping[Path, str] | None = None, env: Mapping[str, str] | None = None
) -> list[str]:
    """Return the command line that runs a command inside a root, with host directories bound in.

    Args:
        root: the directory of the root.
        command: what to run, as seen from inside.
        binds: host directory -> mount point inside, made if it is missing.
        env: the whole environment inside, beside PATH and HOME.
    """
    place = shlex.quote(str(root))
    sources = {Path("/dev"): "/dev", Path("/proc"): "/proc", **(binds or {})}
    points = [(shlex.quote(str(outside)), f"{place}{shlex.quote(inside)}") for outside, inside in sources.items()]
    mounts = [f"mkdir -p {point} && mount --rbind {source} {point}" for source, point in points]
    outer = [] if is_root() else ["--map-root-user", "--map-auto"]
    inside_env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LANG": "C.UTF-8", **(env or {})}
    script = " && ".join([*mounts, f'exec chroot {place} env -i "$@"'])
    variables = [f"{name}={value}" for name, value in inside_env.items()]
    return ["unshare", *outer, "--mount", "--propagation=private", "sh", "-c", script, "sh", *variables, *command]


def run_inside(
    root: Path, command: Sequence[str], *, binds: Mapping[Path, str] | None = None, env: Mapping[str, str] | None = None
) -> None:
    """Run a command inside a root, its output shown.

    Raises:
        BuildError: if it fails.
    """
    need("unshare")
    if subprocess.run(enter(root, command, binds=binds, env=env), check=False, stdout=sys.stderr).returncode != 0:
        raise BuildError(f"{' '.join(command[:3])} failed inside {root}")


def lend_network(root: Path) -> None:
    """Give a root this machine's resolver and certificate authorities, so that registries answer inside it."""
    for name in ("/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt"):
        if Path(name).exists():
            inside = root / name.lstrip("/")
            inside.parent.mkdir(parents=True, exist_ok=True)
            inside.unlink(missing_ok=True)
            shutil.copyfile(name, inside)


def _output(command: Sequence[str]) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)} failed: {done.stderr.strip().splitlines()[-1:]}")
    return done.stdout
