"""Packages of other projects that hold WebAssembly: fetched by their registries' clients, checked, unpacked.

Components of toolchains and of their own tests, binary or as text, and the core modules beside them: what a person may
hand to `fleet component inspect`. Each archive is fetched once, and must have the digest that is recorded here.
"""

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from deploy import debian

# By package and version, the SHA-256 of the archive.
CRATES: Final = {
    "wit-component@0.263.0": "4189bd180353b942b788715519dff886517b540e648c6f6e5129f57429945bf7",
    "wasm-compose@0.263.0": "556cf3f0ea89f5944d254f94fcda920e3e6f79d892dc8558dfee493e52d775b4",
    "wac-graph@0.12.0": "f0418130ea1c8f995ac51fd495080942604bca6455e6fb11f110aa1cefd3f549",
    "wasi-preview1-component-adapter-provider@50.0.1": (
        "08af31e188aec735fabb6370000e3c5954eae92d434a63ad22f665b55b01dda4"
    ),
}
NPM: Final = {
    "@bytecodealliance/jco@1.35.0": "893e80e993a2cb3735e195a0c2dc3ab7d683877a813bb024a27499ee86e12b13",
    "@bytecodealliance/jco-transpile@0.15.0": "8386c1fe1919f57747626ac9622f7505efd560394ee0b43544907ff963fb6aff",
    "@bytecodealliance/componentize-js@0.23.0": "b2e4b6fdee055805370950f127c21d7c549dcc7a1e907f20c5ee769ebba7ad10",
    "@arcjet/analyze-wasm@1.13.0": "8234f037127513e537e8b0ff784cd189c3b71fd97c36c47d1608e156ba1ae93a",
}
PYPI: Final = {
    "itkwasm-compress-stringify-wasi==3.5.0": "e100f72568b73737be0d245ab3387141fb53c750955976145202188160646852"
}
_NAMES: Final = (".wasm", ".wat")


def fetch() -> Path:
    """Return the directory of the archives, fetched on first use.

    Raises:
        debian.BuildError: if a client is missing or fails, or an archive is another one than recorded.
    """
    debian.need("cargo", "npm")
    place = debian.cache_dir() / f"corpus-{debian.key(*CRATES, *NPM, *PYPI)}"
    if not (place / ".complete").exists():
        place.mkdir(exist_ok=True)
        _fetch(place)
        (place / ".complete").touch()
    for package, digest in (CRATES | NPM | PYPI).items():
        if (found := hashlib.sha256(archive(place, package).read_bytes()).hexdigest()) != digest:
            raise debian.BuildError(f"{package} has the digest {found}, {digest} is recorded in {__file__}")
    return place


def _fetch(place: Path) -> None:
    for package in NPM:
        _run("npm", "pack", "--silent", "--pack-destination", str(place), package)
    for package in PYPI:
        _run(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(place), package)
    _crates(place)


def archive(place: Path, package: str) -> Path:
    """Return where the archive of a package lies.

    Raises:
        debian.BuildError: there is none.
    """
    wheel = f"{package.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
    name = package.lstrip("@").replace("@", "-").replace("/", "-")
    for each in (f"{name}.crate", f"{name}.tgz", wheel):
        if (path := place / each).exists():
            return path
    raise debian.BuildError(f"{package} was not fetched into {place}")


def files() -> Iterator[tuple[str, bytes]]:
    """Yield every file of WebAssembly in the packages, binary or text, by `package:path`."""
    place = fetch()
    for package in CRATES | NPM | PYPI:
        for name, data in _members(archive(place, package)):
            if name.endswith(_NAMES):
                yield f"{package}:{name}", data


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                yield name, wheel.read(name)
        return
    with tarfile.open(path) as packed:
        for member in sorted(packed.getmembers(), key=lambda each: each.name):
            content = packed.extractfile(member)
            if content is not None:
                yield member.name.partition("/")[2], content.read()


def _crates(place: Path) -> None:
    """Have cargo fetch the crates, by a package that depends on them, and keep their archives."""
    project = place / "crates"
    (project / "src").mkdir(parents=True, exist_ok=True)
    (project / "src" / "lib.rs").touch()
    wanted = "".join(f'{name} = "={version}"\n' for name, _, version in (each.partition("@") for each in CRATES))
    head = '[package]\nname = "corpus"\nversion = "0.0.0"\nedition = "2021"\n\n[dependencies]\n'
    (project / "Cargo.toml").write_text(f"{head}{wanted}\n[workspace]\n", encoding="utf-8")
    home = debian.cache_dir() / "corpus-cargo"
    _run("env", f"CARGO_HOME={home}", "cargo", "fetch", "--quiet", "--manifest-path", str(project / "Cargo.toml"))
    for package in CRATES:
        name = f"{package.replace('@', '-')}.crate"
        fetched = next(home.glob(f"registry/cache/*/{name}"), None)
        if fetched is None:
            raise debian.BuildError(f"cargo did not fetch {package}")
        (place / name).write_bytes(fetched.read_bytes())


def _run(*command: str) -> None:
    if subprocess.run(command, check=False, stdout=sys.stderr).returncode != 0:
        raise debian.BuildError(f"{' '.join(command[:3])} failed: see its messages above")
