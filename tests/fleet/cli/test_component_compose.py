"""`fleet component compose`: what a board makes of a guest of wasi:http, as a file to look into."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from fleet.cli.main import main
from fleet.component import compose, reader

COMPONENTS = Path(__file__).resolve().parents[3] / "components"
PROBE = COMPONENTS / "adapter" / "probe.wasm"


def run(*arguments):
    return CliRunner().invoke(main, ["component", "compose", *map(str, arguments)])


def test_it_writes_what_a_board_would_compile(tmp_path):
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
