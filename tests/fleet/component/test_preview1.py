"""Commands of WASI Preview 1 become components; other modules are explained."""

import contextlib
import lzma
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from wasmtime import component as wc
from wasmtime import wat2wasm

from agent.host.engine.runtime import Engine
from deploy import debian
from fleet.component import preview1, reader

COMPONENTS = Path(__file__).resolve().parents[3] / "components"
PROBE = lzma.decompress((COMPONENTS / "preview1/probe1.wasm.xz").read_bytes())
WRITE = '(import "wasi_snapshot_preview1" "fd_write" (func (param i32 i32 i32 i32) (result i32)))'
START = '(func (export "_start"))'
MEMORY = '(memory (export "memory") 1)'


def module(*parts):
    return bytes(wat2wasm(f"(module {' '.join(parts)})"))


def test_a_command_becomes_a_component_with_the_command_in_it_unchanged():
    whole = preview1.adapted(PROBE)
    found = reader.read(whole)
    assert found.exports == ("wasi:cli/run@0.2.12",)
    assert found.modules[0] == len(PROBE)
    assert PROBE in whole
    assert len(whole) - len(PROBE) < 50_000
    assert preview1.adapted(PROBE) == whole
    wc.Component(Engine().raw, whole)  # the engine validates


@pytest.mark.parametrize("times", [2, 3])
def test_a_function_that_is_imported_again_is_the_same(times):
    """Go's linker does so."""
    whole = preview1.adapted(module(*[WRITE] * times, MEMORY, START))
    wc.Component(Engine().raw, whole)
    assert whole.count(b"fd_write [v2]") > 1


@pytest.mark.parametrize(
    "parts",
    [
        (WRITE, MEMORY),
        (MEMORY, START),
        ('(import "env" "f" (func))', WRITE, MEMORY, START),
        (WRITE, MEMORY, START, '(@custom "component-type:x" "y")'),
    ],
    ids=["a reactor", "nothing of Preview 1", "another host's", "a world of its own"],
)
def test_other_modules_are_left_to_the_reader(parts):
    data = module(*parts)
    assert preview1.adapted(data) is None
    with pytest.raises(reader.NotAComponentError):
        reader.read(data)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((WRITE, START), "a command of WASI Preview 1 that exports no memory"),
        ((WRITE.replace("fd_write", "sock_open"), MEMORY, START), "imports sock_open, which Preview 1 does not have"),
        ((*[WRITE] * 4, MEMORY, START), r"imports fd_write \[v4\]"),
    ],
)
def test_a_command_that_cannot_be_adapted_says_why(parts, words):
    with pytest.raises(reader.NotAComponentError, match=words):
        preview1.adapted(module(*parts), file_name="job.wasm")


@given(st.binary(max_size=300), st.integers(0, len(PROBE)), st.integers(0, 300))
@settings(max_examples=200, deadline=None)
def test_damaged_commands_are_refused_or_left(inserted, at, cut):
    with contextlib.suppress(reader.NotAComponentError):
        preview1.adapted(PROBE[:at] + inserted + PROBE[at + cut :])


def test_the_adapter_is_the_published_one_and_the_file_its_build():
    crate = "wasi-preview1-component-adapter-provider-50.0.1"
    name = "artefacts/wasi_snapshot_preview1.command.wasm"
    found = list(debian.cache_dir().glob(f"corpus-cargo/registry/src/*/{crate}/{name}"))
    if not found or not shutil.which("wasm-tools"):
        pytest.skip("the crate of the adapter or wasm-tools is not here")
    build = [COMPONENTS / "preview1/build.py", found[0], "--check"]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert (done.returncode, done.stderr) == (0, "")
