"""`fleet component compose`: what a device makes of a guest of wasi:http, as a file to look into."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from wasmtime import wat2wasm

from fleet.cli.main import main
from fleet.component import compose, reader
from tests import packed

ROOT = Path(__file__).resolve().parents[3]
COMPONENTS = ROOT / "components"
PROBE = packed.guest_file("probe")


def run(*arguments):
    return CliRunner().invoke(main, ["component", "compose", *map(str, arguments)])


def test_it_writes_what_a_device_would_compile(tmp_path):
    out = tmp_path / "whole.wasm"
    done = run(PROBE, "-o", out)
    assert done.exit_code == 0, done.output
    assert out.read_bytes() == compose.compose(compose.load_adapter(), PROBE.read_bytes())
    assert compose.adapter_digest() in done.output


def test_for_machines_it_says_the_same_in_json(tmp_path):
    out = tmp_path / "whole.wasm"
    said = json.loads(run(PROBE, "-o", out, "--json").output)
    assert (said["output"], said["adapter"]) == (str(out), compose.adapter_digest())
    assert tuple(said["imports"]) == reader.read(out.read_bytes()).imports


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (COMPONENTS / "demo" / "v1.wasm", "needs no adapter"),
        (COMPONENTS / "adapter" / "driver.c", "not WebAssembly"),
        (COMPONENTS / "adapter" / "none.wasm", "none.wasm"),
    ],
)
def test_what_cannot_be_composed_is_one_line_and_no_file(tmp_path, source, words):
    done = run(source, "-o", tmp_path / "whole.wasm")
    assert done.exit_code == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "whole.wasm").exists()


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    done = run(PROBE, "-o", tmp_path / "no" / "whole.wasm")
    assert done.exit_code != 0
    assert "cannot write" in done.stderr


def in_a_process(*arguments: object, at_most_bytes: int = resource.RLIM_INFINITY) -> subprocess.CompletedProcess[bytes]:
    """Compose in a process of its own, whose files may become no larger than `at_most_bytes`, as on a full disk."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (at_most_bytes, at_most_bytes))

    command = [sys.executable, "-P", "-m", "fleet.cli.main", "component", "compose", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, cwd=ROOT, check=False, preexec_fn=limit)


def test_a_file_that_cannot_be_written_whole_stays_as_it_was(tmp_path):
    out = tmp_path / "whole.wasm"
    out.write_bytes(b"of yesterday")
    done = in_a_process(PROBE, "-o", out, "--force", at_most_bytes=1000)
    assert done.returncode == 2
    assert b"cannot write" in done.stderr
    assert b"file too large" in done.stderr
    assert out.read_bytes() == b"of yesterday"
    assert list(tmp_path.iterdir()) == [out]


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    done = in_a_process(PROBE, "-o", "/dev/stdout", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(compose.compose(compose.load_adapter(), PROBE.read_bytes()))


def test_a_link_keeps_pointing_to_the_file_that_is_replaced(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link.wasm").symlink_to("real/whole.wasm")
    (tmp_path / "real" / "whole.wasm").write_bytes(b"of yesterday")
    assert run(PROBE, "-o", tmp_path / "link.wasm", "--force").exit_code == 0
    assert (tmp_path / "link.wasm").is_symlink()
    assert (tmp_path / "real" / "whole.wasm").read_bytes().startswith(b"\0asm")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('(component (instance $i) (export "my:own/thing@1.0.0" (instance $i)))', "exports only my:own/thing@1.0.0"),
        ('(component (import "host-log" (func)))', "a device can call one of"),
        (
            '(component (import "host-log" (func)) (instance $i) (export "wasi:cli/run@0.2.0" (instance $i)))',
            "'host-log' belongs to no package",
        ),
    ],
    ids=["a library", "nothing to call", "a function of no package"],
)
def test_a_component_that_no_device_runs_is_shown_with_its_problem(tmp_path, text, problem):
    file = tmp_path / "thing.wasm"
    file.write_bytes(wat2wasm(text))
    done = CliRunner().invoke(main, ["component", "inspect", str(file)])
    assert (done.exit_code, "component.toml:" in done.output) == (1, False), done.output
    assert problem in " ".join(done.output.split())
    said = json.loads(CliRunner().invoke(main, ["component", "inspect", str(file), "--json"]).output)
    assert problem in said["problem"]
    assert said["component_toml"] == ""
    assert CliRunner().invoke(main, ["component", "inspect", str(file), "--toml"]).exit_code != 0
