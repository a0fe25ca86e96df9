"""`fleet component inspect`: the manifest that it writes, and what its exit code says."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fleet.cli.main import main
from fleet.component import component_toml, reader

COMPONENTS = Path(__file__).resolve().parents[3] / "components"
FLEET = f"{shlex.quote(sys.executable)} -P -m fleet.cli.main"


@pytest.fixture
def saved(tmp_path, monkeypatch) -> Path:
    """Component of the demo in a directory of its own."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copy(COMPONENTS / "demo" / "v1.wasm", "hello.wasm"))


def inspect(*words: object):
    return CliRunner().invoke(main, ["component", "inspect", *map(str, words)])


def shell(line: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(line, shell=True, capture_output=True, text=True, check=False, timeout=60)


def sufficient(file: Path, text: str) -> bool:
    shape = reader.read(file.read_bytes(), file_name=file.name)
    return bool(component_toml.describe(shape, text, file_name=file.name))


def test_write_makes_the_manifest_beside_the_component(saved):
    done = inspect(saved, "--write")
    assert (done.exit_code, done.stdout) == (0, "Wrote component.toml.\n")
    assert sufficient(saved, Path("component.toml").read_text())
    assert [each.name for each in Path().iterdir() if each.name.startswith(".")] == []
    assert inspect(saved, "--write").exit_code == 0  # nothing to change


def test_write_keeps_what_somebody_wrote(saved):
    ours = shutil.copy(COMPONENTS / "demo" / "v1.toml", "component.toml")
    Path(ours).write_text(before := Path(ours).read_text() + "\n# a word of ours\n")
    refused = inspect(saved, "--write")
    assert refused.exit_code == 2
    assert "component.toml exists; it is replaced only on demand" in refused.stderr
    assert Path(ours).read_text() == before
    assert inspect(saved, "--write", "--force").exit_code == 0
    assert "# a word of ours" not in Path(ours).read_text()
    assert sufficient(saved, Path(ours).read_text())


def test_a_redirection_into_the_manifest_that_the_shell_has_emptied_is_said_and_sufficient(saved):
    shutil.copy(COMPONENTS / "demo" / "v1.toml", "component.toml")
    done = shell(f"{FLEET} component inspect hello.wasm --toml > component.toml")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "note: the shell emptied component.toml before it was read; --write keeps what stands there\n"
    assert sufficient(saved, Path("component.toml").read_text())


def test_print_or_write(saved):
    assert "choose one" in inspect(saved, "--toml", "--write").stderr


def test_a_problem_that_is_printed_is_in_the_exit_code(saved):
    assert inspect(saved).exit_code == 0
    shutil.copy(COMPONENTS / "demo" / "ticker.wasm", "ticker.wasm")
    done = inspect("ticker.wasm")
    assert ("problem" in done.stdout, done.exit_code) == (True, 1)
    assert inspect("ticker.wasm", "--json").exit_code == 1
    assert inspect("ticker.wasm", "--write").exit_code == 0
    assert inspect("ticker.wasm").exit_code == 0
