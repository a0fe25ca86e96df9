"""Rust examples built in the toolchain's root find the paths that they refer to."""

import importlib.util
import os
import posixpath
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from deploy import debian, toolchain

EXAMPLES = Path(__file__).resolve().parents[2] / "components/examples"
CRATES = sorted(file.parent for file in EXAMPLES.rglob("Cargo.toml"))
TARGET = "wasm32-unknown-unknown"
# Stands for cargo: copies what the crate's macro reads, from where the macro looks for it.
CARGO = """#!/bin/sh
for path in $(cat src/lib.rs | while read -r word rest; do case "$word" in path:) echo "$rest";; esac; done); do
    path=${path#'"'}
    cat "${path%'",'}/worlds.wit" > /scratch/seen || exit 1
done
"""


@pytest.fixture
def tools():
    spec = importlib.util.spec_from_file_location("examples_tools", EXAMPLES / "tools.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The place of the toolchain's root, on a machine whose own rustc has no std for WebAssembly."""
    monkeypatch.setenv("WASMFLEET_CACHE", str(tmp_path / "cache"))
    path = debian.cache_dir() / toolchain.SUITE
    path.mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/rustc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/rustc").chmod(0o755)
    return path


@pytest.mark.parametrize("crate", CRATES, ids=lambda crate: str(crate.relative_to(EXAMPLES)))
def test_each_path_that_a_crate_names_is_bound_into_the_root(tools, root, tmp_path, monkeypatch, crate):
    calls = []
    monkeypatch.setattr(tools.debian, "run_inside", lambda *call, **more: calls.append((call, more)))
    tools.cargo(crate, TARGET, tmp_path)
    ((_, command), more) = calls[0]
    (inside,) = (word.removeprefix("--chdir=") for word in command if word.startswith("--chdir="))

    def outside(path):
        """The directory of this machine that stands behind a path inside."""
        for bound, place in more["binds"].items():
            if posixpath.commonpath([path, place]) == place:
                return Path(bound) / posixpath.relpath(path, place)
        raise AssertionError(f"{path} is not bound into the root: {more['binds']}")

    assert outside(inside).resolve() == crate
    source = "".join(file.read_text() for file in sorted((crate / "src").glob("*.rs")))
    for named in re.findall(r'path: "([^"]+)"', source):
        found = outside(posixpath.normpath(posixpath.join(inside, named)))
        assert found.resolve() == (crate / named).resolve()
        assert found.is_dir()


def furnish(root, programs):
    """Copy programs of this machine into a root, with the libraries that they load."""
    for program in programs:
        found = Path(shutil.which(program)).resolve()
        listed = subprocess.run(["ldd", found], capture_output=True, text=True, check=False).stdout
        for file in (str(found), *re.findall(r"(/\S+) \(0x", listed)):
            (root / file[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, root / file[1:])
        place = root / "usr/bin" / program
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists():
            shutil.copy(found, place)
    if not (root / "bin").exists():
        (root / "bin").symlink_to("usr/bin")


def test_the_http_example_reads_its_interfaces_inside_a_root(tools, root, tmp_path):
    """Real mounts, and a root with a shell and a stand-in for cargo where the toolchain would be."""
    furnish(root, ["sh", "env", "cat"])
    entered = subprocess.run(debian.enter(root, ["sh", "-c", "exit 0"]), capture_output=True, text=True, check=False)
    if entered.returncode != 0:
        pytest.skip(f"this user cannot enter a root: {entered.stderr.strip()}")
    (root / "usr/bin/cargo").write_text(CARGO)
    (root / "usr/bin/cargo").chmod(0o755)
    tools.cargo(EXAMPLES / "rust", TARGET, tmp_path)
    assert (tmp_path / "seen").read_text() == (EXAMPLES.parent / "wit/worlds.wit").read_text()
