"""Files that commands write for people: one that exists is replaced only with --force."""

import shutil
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fleet.cli.main import main
from tests import packed
from tests.fleet.cli.walk import COMMANDS

DEMO = Path(__file__).resolve().parents[3] / "components" / "demo"
OURS = "what somebody keeps here"


def written(command: click.Command) -> list[click.Option]:
    """Options that name a file which the command writes, by what their help says."""
    return [
        each
        for each in command.params
        if isinstance(each, click.Option)
        and isinstance(each.type, click.Path)
        and each.type.dir_okay is False
        and (each.help or "").split()[0] in {"Write", "Save"}
    ]


WRITERS = [
    (name, option)
    for name, command in COMMANDS.items()
    # a token's file is never replaced (test_operators.py), and an archive is secret (test_archive.py)
    if not name.startswith("operators ") and name != "device show"
    for option in written(command)
]


def test_the_known_ones_are_among_them() -> None:
    found = {f"{name} {option.opts[-1]}" for name, option in WRITERS}
    assert {"server backup --output", "bundle create --output", "component compose --output"} <= found
    assert {"keys rotate --out", "sign approve --out", "sbom show --save"} <= found


@pytest.mark.parametrize(("name", "option"), WRITERS, ids=lambda value: getattr(value, "name", value))
def test_a_file_that_exists_is_kept_without_force(name, option, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine"
    file.write_text(OURS)
    required = [
        word
        for each in COMMANDS[name].params
        if each.required and each is not option
        for word in ([each.opts[-1], "x"] if isinstance(each, click.Option) else ["x"])
    ]
    words = ["--home", str(tmp_path), *name.split(), *required, option.opts[-1], str(file)]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 2, done.output
    assert done.stderr == f"error: {file} exists; it is replaced only on demand; name another file, or add --force\n"
    assert file.read_text() == OURS
    assert "--force" in {opt for each in COMMANDS[name].params for opt in each.opts}
    assert f"{file} exists" not in CliRunner().invoke(main, [*words, "--force"]).stderr


@pytest.mark.parametrize("place", ["file", "dangling link", "pipe"])
def test_compose_writes_with_force_and_into_what_is_no_file(place, tmp_path) -> None:
    guest = Path(shutil.copy(packed.guest_file("probe"), tmp_path / "guest.wasm"))
    target = tmp_path / "whole.wasm"
    if place == "file":
        target.write_text(OURS)
    elif place == "dangling link":
        target.symlink_to(tmp_path / "elsewhere")
    else:
        target = Path("/dev/null")
    words = ["component", "compose", str(guest), "-o", str(target)]
    assert CliRunner().invoke(main, words).exit_code == (0 if place == "pipe" else 2)
    assert CliRunner().invoke(main, [*words, "--force"]).exit_code == 0
    assert place == "pipe" or target.read_bytes().startswith(b"\0asm")


def test_the_public_keys_of_a_signing_host_are_kept(fleet, home, tmp_path) -> None:
    (tmp_path / "timestamp.pub").write_text(OURS)
    done = fleet("publisher", "keys", "--out", tmp_path)
    assert done.exit_code == 2
    assert "timestamp.pub exists" in done.stderr
    assert (tmp_path / "timestamp.pub").read_text() == OURS
    assert not list(home.glob("publisher/keys/*"))  # no key was made either
    assert fleet("publisher", "keys", "--out", tmp_path, "--force").exit_code == 0
    assert "BEGIN PUBLIC KEY" in (tmp_path / "timestamp.pub").read_text()
