"""The wasmtime command that tests and benches compare with: a named one first, then the package's, then PATH's."""

import stat

import pytest

from deploy import wasmtime_cli

SERVES = "#!/bin/sh\necho 'error: the following required arguments were not provided' >&2\nexit 2\n"
RUNS_FILES_ONLY = "#!/bin/sh\necho 'error: failed to open serve' >&2\nexit 1\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package as pip unpacks the wheel: its command lacks the permission to be run."""
    folder = tmp_path / "site" / "wasmtime_cli"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    command = folder / "wasmtime"
    command.write_text(SERVES)
    command.chmod(0o644)
    monkeypatch.syspath_prepend(folder.parent)
    monkeypatch.delenv("WASMFLEET_WASMTIME", raising=False)
    return command


def test_the_packages_command_is_made_executable(package):
    assert wasmtime_cli.finished() == package
    assert package.stat().st_mode & stat.S_IXOTH


def test_a_named_command_comes_first_if_it_serves_components(package, tmp_path, monkeypatch):
    named = tmp_path / "named"
    monkeypatch.setenv("WASMFLEET_WASMTIME", str(named))
    for text, found in ((RUNS_FILES_ONLY, package), (SERVES, named)):
        named.write_text(text)
        named.chmod(0o755)
        assert wasmtime_cli.finished() == found


def test_a_command_that_cannot_be_run_is_none(package, monkeypatch):
    package.write_bytes(b"\x7fELF of another machine")
    monkeypatch.setenv("PATH", "")
    assert wasmtime_cli.finished() is None
