"""Build wasmtime's missing riscv64 wheel: `python -m deploy.riscv64.build` (or `make riscv64-wheel`).

Upstream publishes wheels only for x86-64 and aarch64. This program cross-compiles upstream's C API crate, unchanged,
with upstream's default features, against the glibc of Debian 13, and replaces the x86-64 library in upstream's wheel
with the result. Two lines of upstream's Python code must change for that, see `loader`. All inputs are pinned: crates
by Cargo.lock, the wheel by upstream.txt; the printed report names the compiler's version.

The wheel is stored in the wheelhouse (`$WASMFLEET_WHEELHOUSE`, else the cache); its sha256 is printed.
"""

import base64
import csv
import hashlib
import io
import os
import re
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

from deploy import debian, toolchain

HERE = Path(__file__).resolve().parent
VERSION = "50.0.1"
TARGET = "riscv64gc-unknown-linux-gnu"
SYSROOT_PACKAGES = ("libc6-dev", "libc6", "libgcc-s1", "libgcc-14-dev", "linux-libc-dev")
OLDEST_GLIBC = (2, 31)  # the first manylinux tag that knows riscv64
NEWEST_GLIBC = (2, 41)  # Debian 13's
EPOCH = 1767225600  # 2026-01-01; every date inside the wheel, unless SOURCE_DATE_EPOCH says otherwise


def wheelhouses() -> tuple[Path, ...]:
    """List the places of the finished wheel: `$WASMFLEET_WHEELHOUSE`, then the cache. The first is written to."""
    named = os.environ.get("WASMFLEET_WHEELHOUSE")
    cache = debian.cache_dir() / "wheels"
    return (Path(named), cache) if named else (cache,)


def finished() -> Path | None:
    """Find the wheel, if it was built before."""
    found = (path for place in wheelhouses() for path in sorted(place.glob(f"wasmtime-{VERSION}-*riscv64.whl")))
    return next(found, None)


def sysroot() -> Path:
    """Return Debian 13's C library for riscv64, which devices have and the engine must therefore link against."""
    root = debian.bootstrap(
        debian.cache_dir() / "sysroot-riscv64-trixie",
        suite="trixie",
        architectures=("riscv64",),
        packages=SYSROOT_PACKAGES,
        variant="extract",
    )
    if not (root / "lib").exists():
        # no base-files in an extracted root: /lib is a link in Debian, and libc.so names it
        (root / "lib").symlink_to("usr/lib")
    return root


def compile_library() -> Path:
    """Cross-compile libwasmtime.so; return its path. Minutes to half an hour, by the machine.

    Raises:
        debian.BuildError: if a step fails; its output was shown.
    """
    cache = debian.cache_dir()
    cargo, work = cache / "cargo", cache / "riscv64-build"
    for place in (cargo, work):
        place.mkdir(exist_ok=True)
    gcc = "riscv64-linux-gnu-gcc"
    maps = {"/cargo/registry/src": "/crates", "/src": "/wasmfleet"}
    rust = [f"--remap-path-prefix={old}={new}" for old, new in maps.items()]
    rust += ["-Clinker=" + gcc, "-Clink-arg=--sysroot=/sysroot", "-Clink-arg=-Wl,--build-id=none"]
    c_flags = " ".join(["--sysroot=/sysroot", *(f"-ffile-prefix-map={old}={new}" for old, new in maps.items())])
    debian.run_inside(
        toolchain.toolchain(),
        ["nice", "-n", "10", "sh", "-c", f"cd /src && exec cargo build --locked --release --lib --target {TARGET}"],
        binds={HERE: "/src", cargo: "/cargo", work: "/work", sysroot(): "/sysroot"},
        env={
            "CARGO_HOME": "/cargo",
            "CARGO_TARGET_DIR": "/work",
            "CARGO_BUILD_JOBS": os.environ.get("JOBS", "2"),
            "CARGO_HTTP_CAINFO": "/etc/ssl/certs/ca-certificates.crt",
            "CARGO_INCREMENTAL": "0",
            f"CARGO_TARGET_{TARGET.upper().replace('-', '_')}_RUSTFLAGS": " ".join(rust),
            f"CC_{TARGET.replace('-', '_')}": gcc,
            f"AR_{TARGET.replace('-', '_')}": "riscv64-linux-gnu-ar",
            f"CFLAGS_{TARGET.replace('-', '_')}": c_flags,
            "SOURCE_DATE_EPOCH": str(epoch()),
        },
    )
    return work / TARGET / "release" / "libwasmtime.so"


def epoch() -> int:
    """Return the date of all files in the wheel, in seconds since 1970."""
    return int(os.environ.get("SOURCE_DATE_EPOCH", EPOCH))


def glibc_needed(library: Path) -> tuple[int, int]:
    """Return the newest glibc version that the library requires.

    Raises:
        debian.BuildError: Debian 13's glibc is older than that.
    """
    debian.need("objdump")
    # objdump reads the symbol versions of any architecture's ELF
    listing = subprocess.run(["objdump", "-p", str(library)], capture_output=True, text=True, check=True).stdout
    versions = {(int(a), int(b)) for a, b in re.findall(r"\bGLIBC_(\d+)\.(\d+)\b", listing)}
    newest = max({*versions, OLDEST_GLIBC})
    if newest > NEWEST_GLIBC:
        raise debian.BuildError(f"{library.name} needs glibc {newest}, but Debian 13 has {NEWEST_GLIBC}")
    return newest


def upstream_wheel() -> Path:
    """Fetch upstream's wheel by pip, checked against the pinned hash.

    Raises:
        debian.BuildError: if pip cannot fetch it or the hash differs.
    """
    place = debian.cache_dir() / "upstream"
    fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    fetch += ["--platform", "manylinux1_x86_64", "--require-hashes", "-r", str(HERE / "upstream.txt"), "-d", str(place)]
    if subprocess.run(fetch, check=False).returncode != 0:
        raise debian.BuildError("pip could not fetch upstream's wheel with the pinned hash: see its message above")
    return next(place.glob(f"wasmtime-{VERSION}-*x86_64.whl"))


def loader(source: str) -> str:
    """Return upstream's `wasmtime/_ffi.py` with riscv64 added: the only change to upstream's code.

    The loader looks for `linux-<machine>/_libwasmtime.so`, and refuses any machine but two by name.

    Raises:
        debian.BuildError: if upstream's text is not the one that this was written for.
    """
    refusal = "if machine != 'x86_64' and machine != 'aarch64':\n"
    if source.count(refusal) != 1:
        raise debian.BuildError("upstream's loader has changed: look at _ffi.py and at deploy/riscv64/build.py")
    accepted = (
        "# Changed by wasmfleet: upstream has no riscv64 build; this wheel carries one.\n"
        "if machine not in ('x86_64', 'aarch64', 'riscv64'):\n"
    )
    return source.replace(refusal, accepted)


def repack(upstream: Path, library: Path, tag: str, place: Path) -> Path:
    """Repack upstream's wheel with the library under a new tag; return the new wheel. Same input, same bytes."""
    info = f"wasmtime-{VERSION}.dist-info"
    files: dict[str, bytes] = {}
    with zipfile.ZipFile(upstream) as wheel:
        for name in wheel.namelist():
            if "linux-x86_64" not in name and not name.endswith(("/", "/RECORD")):
                files[name] = wheel.read(name)
    files["wasmtime/_ffi.py"] = loader(files["wasmtime/_ffi.py"].decode()).encode()
    files["wasmtime/linux-riscv64/_libwasmtime.so"] = library.read_bytes()
    files[f"{info}/WHEEL"] = (
        f"Wheel-Version: 1.0\nGenerator: wasmfleet deploy/riscv64\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    )
    files[f"{info}/licenses/LIBWASMTIME-CRATES.txt"] = crates().encode()
    files[f"{info}/RECORD"] = record(files, f"{info}/RECORD").encode()
    wheel_path = place / f"wasmtime-{VERSION}-{tag}.whl"
    fresh = wheel_path.with_suffix(".new")
    stamp = time.gmtime(epoch())[:6]
    with zipfile.ZipFile(fresh, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as wheel:
        for name in sorted(files, key=lambda each: (each.startswith(info), each)):
            entry = zipfile.ZipInfo(name, stamp)
            entry.external_attr = (0o755 if name.endswith(".so") else 0o644) << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            wheel.writestr(entry, files[name])
    fresh.rename(wheel_path)
    return wheel_path


def record(files: Mapping[str, bytes], own_name: str) -> str:
    """Return the wheel's RECORD: each file with its hash and size."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    for name, data in sorted(files.items()):
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        rows.writerow([name, f"sha256={digest}", len(data)])
    rows.writerow([own_name, "", ""])
    return out.getvalue()


def crates() -> str:
    """List the crates locked for the library, by name, version and hash, to look up their licences."""
    entry = re.compile(r'name = "(.+)"\nversion = "(.+)"\nsource = .*\nchecksum = "(.+)"')
    rows = entry.findall((HERE / "Cargo.lock").read_text())
    head = "libwasmtime.so was built from these published Rust crates (name, version, sha256 of the crate):\n\n"
    return head + "".join(f"{name} {version} {digest}\n" for name, version, digest in rows)


def main() -> int:
    """Build, repack, and print the wheel's path."""
    started = time.monotonic()
    try:
        done = finished()
        if done is None:
            library = compile_library()
            major, minor = glibc_needed(library)
            place = wheelhouses()[0]
            place.mkdir(parents=True, exist_ok=True)
            done = repack(upstream_wheel(), library, f"py3-none-manylinux_{major}_{minor}_riscv64", place)
            debian.say(f"built in {time.monotonic() - started:.0f} s")
    except debian.BuildError as error:
        debian.say(f"riscv64 wheel: {error}")
        return 1
    print(f"{hashlib.sha256(done.read_bytes()).hexdigest()}  {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
