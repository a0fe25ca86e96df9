"""A command of WASI Preview 1 is inspected, checked, composed and published as what it is adapted to."""

import hashlib
import json
import lzma
from pathlib import Path

import pytest
from click.testing import CliRunner

from fleet.cli.main import main
from fleet.component import preview1

PROBE = lzma.decompress((Path(__file__).resolve().parents[3] / "components/preview1/probe1.wasm.xz").read_bytes())
WITH = "wasi_snapshot_preview1.command.wasm of Wasmtime 50.0.1"
TOML = '[grants]\ninterfaces = ["wasi:filesystem"]\n\n[trigger]\ntype = "schedule"\nevery = "10s"\n'


@pytest.fixture
def job(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "job.wasm"
    file.write_bytes(PROBE)
    file.with_suffix(".toml").write_text(TOML)
    return file


def run(*words):
    return CliRunner().invoke(main, [*map(str, words)])


def test_inspect_and_check_say_what_it_is_adapted_with(job):
    for command in ("inspect", "check"):
        done = run("component", command, job)
        assert done.exit_code == 0, done.output
        assert f"a command of WASI Preview 1, adapted with {WITH}" in " ".join(done.output.split())
        notes = json.loads(run("component", command, job, "--json").output)["notes"]
        assert f"a command of WASI Preview 1, adapted with {WITH}" in notes


def test_check_has_the_host_start_what_it_is_adapted_to(job):
    said = json.loads(run("component", "check", job, "--json").output)
    assert (said["ok"], said["file"]) == (True, str(job))
    assert said["checked_by"].startswith("this machine's host: wasmtime ")


def test_compose_writes_the_component(job, tmp_path):
    done = run("component", "compose", job, "-o", tmp_path / "whole.wasm", "--json")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "whole.wasm").read_bytes() == preview1.adapted(PROBE)
    assert json.loads(done.output)["adapter"] == preview1.ADAPTER_SHA256


def test_what_is_published_is_the_component(job, fleet, desk):
    done = fleet("publish", job, "--version", "1.0.0")
    assert done.exit_code == 0, done.output
    assert f"adapted with {WITH}" in " ".join(done.output.split())
    whole = preview1.adapted(PROBE)
    assert desk.artifacts[hashlib.sha256(whole).hexdigest()] == whole


def test_a_command_that_cannot_be_adapted_is_refused_by_name(job, fleet, desk):
    job.write_bytes(PROBE.replace(b"fd_pread", b"fd_pxxxx"))
    done = fleet("publish", job, "--version", "1.0.0")
    assert done.exit_code != 0
    assert "job.wasm is a command of WASI Preview 1 and imports fd_pxxxx, which Preview 1 does not have" in " ".join(
        done.output.split()
    )
    assert not desk.seen
