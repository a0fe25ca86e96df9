"""Repacking upstream's wheel for riscv64: one change to the loader, and a wheel that pip accepts."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deploy import debian
from deploy.riscv64 import build

ROOT = Path(__file__).resolve().parents[2]
TAG = "py3-none-manylinux_2_34_riscv64"


@pytest.fixture(scope="module")
def upstream_loader() -> str:
    import wasmtime

    return (Path(wasmtime.__file__).parent / "_ffi.py").read_text()


def test_the_loader_gets_a_further_machine_and_a_notice_of_the_change(upstream_loader: str) -> None:
    changed = build.loader(upstream_loader)
    assert "'riscv64'" in changed
    assert "Changed by wasmfleet" in changed
    # and nothing else of upstream's code is changed
    before, after = upstream_loader.splitlines(), changed.splitlines()
    assert len([line for line in after if line not in before]) == 2
    compile(changed, "_ffi.py", "exec")


def test_a_loader_that_upstream_changed_is_refused(upstream_loader: str) -> None:
    with pytest.raises(debian.BuildError, match="loader has changed"):
        build.loader(upstream_loader.replace("'aarch64'", "'arm64e'"))


@pytest.fixture
def upstream(tmp_path: Path, upstream_loader: str) -> Path:
    path = tmp_path / "wasmtime-50.0.1-py3-none-manylinux1_x86_64.whl"
    info = "wasmtime-50.0.1.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("wasmtime/_ffi.py", upstream_loader)
        wheel.writestr("wasmtime/__init__.py", "")
        wheel.writestr("wasmtime/linux-x86_64/_libwasmtime.so", b"\x7fELF x86-64")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: wasmtime\nVersion: 50.0.1\n")
        wheel.writestr(f"{info}/licenses/LICENSE", "Apache-2.0 WITH LLVM-exception")
        wheel.writestr(f"{info}/WHEEL", "Tag: py3-none-manylinux1_x86_64\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def test_the_wheel_holds_our_library_and_upstreams_licence_and_is_reproducible(upstream: Path, tmp_path: Path) -> None:
    library = tmp_path / "libwasmtime.so"
    library.write_bytes(b"\x7fELF riscv64")
    made = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        made.append(build.repack(upstream, library, TAG, tmp_path / name))
    assert made[0].read_bytes() == made[1].read_bytes()
    with zipfile.ZipFile(made[0]) as wheel:
        names = wheel.namelist()
        assert wheel.read("wasmtime/linux-riscv64/_libwasmtime.so") == b"\x7fELF riscv64"
        assert not [name for name in names if "x86_64" in name]
        assert "wasmtime-50.0.1.dist-info/licenses/LICENSE" in names
        assert "cranelift-codegen" in wheel.read("wasmtime-50.0.1.dist-info/licenses/LIBWASMTIME-CRATES.txt").decode()
    # pip checks RECORD's hashes and the tag
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--only-binary=:all:"]
    install += ["--no-compile", "--platform", "manylinux_2_34_riscv64", "--target", str(target), str(made[0])]
    assert subprocess.run(install, check=False).returncode == 0
    assert (target / "wasmtime/linux-riscv64/_libwasmtime.so").exists()


def test_a_wheel_is_found_in_the_wheelhouse_or_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house, cache = tmp_path / "house", tmp_path / "cache"
    monkeypatch.setenv("WASMFLEET_CACHE", str(cache))
    monkeypatch.setenv("WASMFLEET_WHEELHOUSE", str(house))
    assert build.finished() is None, "neither there nor there, and a wheelhouse that is not there is no error"
    ours = cache / "wheels" / f"wasmtime-{build.VERSION}-{TAG}.whl"
    ours.parent.mkdir(parents=True)
    ours.touch()
    assert build.finished() == ours
    house.mkdir()
    (house / "wasmtime-1.0.0-py3-none-manylinux_2_34_riscv64.whl").touch()
    assert build.finished() == ours, "another version is none"
    (house / ours.name).touch()
    assert build.finished() == house / ours.name
    monkeypatch.delenv("WASMFLEET_WHEELHOUSE")
    assert build.finished() == ours


def test_the_engine_has_the_required_version() -> None:
    import tomllib

    agent = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["agent"]
    assert f"wasmtime=={build.VERSION}" in agent
    assert f'version = "={build.VERSION}"' in (ROOT / "deploy/riscv64/Cargo.toml").read_text()
    for pins in ("riscv64/upstream.txt", "packages/wasmfleet-agent/engine.txt"):
        assert f"wasmtime=={build.VERSION} " in (ROOT / "deploy" / pins).read_text()


def test_every_crate_is_locked_by_its_hash() -> None:
    text = (ROOT / "deploy/riscv64/Cargo.lock").read_text()
    packages = text.count("[[package]]")
    # all except the crate of this directory
    assert text.count("\nchecksum = ") == packages - 1
    assert text.count('source = "registry+') == packages - 1
