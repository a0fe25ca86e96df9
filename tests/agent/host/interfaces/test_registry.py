"""Modules of the interfaces: page, versions, WIT packages and adapter name the same, and a difference is said."""

import shutil
import subprocess
import sys

import pytest

from agent.host.engine import runtime
from agent.host.interfaces import page, registry
from fleet.protocol.codes import RejectCode

WIT = "components/wit"


def test_the_check_agrees():
    command = [sys.executable, "-m", "agent.host.interfaces.page", "--check"]
    done = subprocess.run(command, cwd=page.ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def tree(tmp_path):
    """Return a copy of what is checked."""
    for part in (WIT, "components/adapter/wit"):
        shutil.copytree(page.ROOT / part, tmp_path / part)
    assert page.faults(tmp_path) == []
    return tmp_path


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (f"{WIT}/versions.toml", '"0.2.0-draft", "0.2.0-rc.1"', '"0.2.0-rc.1"', "versions.toml: wasi:config/store has"),
        (f"{WIT}/versions.toml", '"wasi:random" = ["0.2"]', "", "versions.toml: wasi:random has nothing"),
        (f"{WIT}/versions.toml", "[imports]", '[imports]\n"acme:x/y" = ["1.0.0"]', "acme:x/y has ['1.0.0']"),
        (f"{WIT}/deps/logging/logging.wit", "@0.1.0-draft;", "@0.1.0-draft2;", "0.1.0-draft2 is not listed"),
        (
            f"{WIT}/deps/logging/logging.wit",
            "log: func(",
            "flush: func();\n    log: func(",
            "the module lacks ['flush']",
        ),
        ("components/adapter/wit/deps/io/io.wit", "wasi:io@0.2.12", "wasi:io@0.3.0", "wasi:io@0.3.0 is not served"),
        ("components/adapter/wit/adapter.wit", "cancelled: func", "canceled: func", "interface host: ['canceled'"),
    ],
)
def test_a_difference_is_said(tree, file, old, new, said):
    path = tree / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert any(said in each for each in page.faults(tree)), page.faults(tree)


@pytest.mark.parametrize("name", registry.INTERFACES)
def test_every_function_of_a_module_has_a_type_and_is_made(name):
    served = registry.INTERFACES[name]
    assert served.versions
    assert all(served.functions.values())


def test_an_import_of_another_type_is_refused():
    text = '(component (import "wasi:logging/logging@0.1.0-draft" (instance (export "log" (func (param "x" u8))))))'
    image = runtime.Engine().read(text)
    with pytest.raises(runtime.EngineError, match=r"another type of log: expected func\(level: enum") as caught:
        image.check_imports(registry.INTERFACES)
    assert caught.value.code is RejectCode.START_FAILED
