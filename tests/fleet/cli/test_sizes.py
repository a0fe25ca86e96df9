"""dev, solo, team: how a fleet begins, moves on with devices that never enrol again, and outlives a lost machine.

The device is the real verifier with its memory, from the root that was pinned when the fleet was made.
"""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from fleet.cli.main import main
from fleet.client import Client
from fleet.protocol.codes import RejectCode
from signing import keys, repository, rotation
from signing.errors import Rejected
from signing.metadata import profile
from tests.fleet.cli.devices_and_people import Device, hello, person


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def test_from_dev_to_solo_to_team_with_the_devices_of_the_first_day(fleet, desk, home, work, monkeypatch, tmp_path):
    assert fleet("publish", hello(work), "--version", "1.0.0").exit_code == 0
    awake, asleep, production = Device(desk), Device(desk), Device(desk, production=True)
    assert awake.runs("1.0.0")
    with pytest.raises(Rejected) as verdict:
        production.runs("1.0.0")
    assert verdict.value.code is RejectCode.DEVELOPMENT

    # To solo: new keys, all encrypted, and one on paper.
    monkeypatch.setenv("WASMFLEET_KEY_PASSPHRASE", "correct horse")
    moved = fleet("sign", "move", "solo", "--yes")
    assert moved.exit_code == 0, moved.output
    assert "size changes from dev to solo" in moved.stderr
    assert "WFRK1-" in moved.stdout
    assert "root.pem" in moved.stdout
    for name in ("root-2", "targets-2", "main-2"):
        with pytest.raises(keys.EncryptedError):
            keys.load(home / f"operator/keys/{name}.pem")
    for name in ("root", "targets", "main"):
        (home / f"operator/keys/{name}.pem").unlink()
    assert awake.runs("1.0.0")
    assert production.runs("1.0.0"), "a device in production takes it from now on"
    assert fleet("publish", work / "hello.wasm", "--version", "1.1.0").exit_code == 0
    assert awake.runs("1.1.0")

    # To a team: root with two of three, who sign at machines of their own.
    people = {name: person(home, tmp_path / name, name) for name in ("alice", "bob", "carol")}
    for name, run in people.items():
        (work / f"{name}.pub").write_text(run("keys", "show", name).stdout)
        assert fleet("keys", "import", name, f"{name}.pub").exit_code == 0
    words = [word for name in people for word in ("--root", name)]
    proposed = fleet("sign", "move", "team", *words, "--yes", "--out", "team.json")
    assert proposed.exit_code == 0, proposed.output
    for name in ("alice", "carol"):
        assert people[name]("sign", "approve", "team.json", "--yes").exit_code == 0
    assert people["carol"]("sign", "publish", "team.json").exit_code == 0
    root = rotation.keys_of(desk.files, "root")
    assert (root.threshold, len(root.keys)) == (2, 3)

    assert fleet("publish", work / "hello.wasm", "--version", "1.2.0").exit_code == 0
    for device in (awake, production, asleep):
        assert device.runs("1.2.0")


def test_a_dev_fleet_becomes_a_teams_in_one_step(fleet, desk, home, work, monkeypatch):
    device = Device(desk)
    assert fleet("publish", hello(work), "--version", "1.0.0").exit_code == 0
    monkeypatch.setenv("WASMFLEET_KEY_PASSPHRASE", "correct horse")
    for name in ("alice", "bob", "carol"):
        assert fleet("keys", "new", name).exit_code == 0
    words = [word for name in ("alice", "bob", "carol") for word in ("--root", name)]
    assert fleet("sign", "move", "team", *words, "--yes").exit_code == 0
    assert device.runs("1.0.0")
    assert Device(desk, production=True).runs("1.0.0")


def test_what_is_not_to_be_moved_makes_no_keys(fleet, desk, home, work, monkeypatch):
    before = sorted((home / "operator/keys").iterdir())
    monkeypatch.setenv("WASMFLEET_KEY_PASSPHRASE", "correct horse")
    assert fleet("sign", "move", "solo", stdin="n\n").exit_code == 130
    assert fleet("sign", "move", "team").exit_code == 2
    few = fleet("sign", "move", "team", "--root", "main", "--root", "root", "--yes")
    assert few.exit_code == 2
    assert "2 of 3 people" in few.stderr
    assert sorted((home / "operator/keys").iterdir()) == before


# -- beginning


@pytest.fixture
def begin(tmp_path, monkeypatch, work):
    """`fleet init`, and then a desk that serves what it made."""
    from tests.fleet.cli.conftest import Desk

    monkeypatch.delenv("WASMFLEET_HOME", raising=False)
    monkeypatch.setenv("WASMFLEET_KEY_PASSPHRASE", "correct horse")

    def run(*words: str) -> tuple[Result, Desk | None]:
        result = CliRunner().invoke(main, ["--home", str(tmp_path / "home"), "init", *words])
        if result.exit_code:
            return result, None
        desk = Desk(tmp_path / "home")
        monkeypatch.setattr(Client, "__init__", functools.partialmethod(Client.__init__, transport=desk))
        return result, desk

    return run


def printed(text: str) -> str:
    """The recovery key as a person would copy it from paper: blanks and lines wherever they fell."""
    found = re.search(r"WFRK1-[A-Z2-7-]+\s+[A-Z2-7-]+", text)
    assert found
    return found[0]


def test_a_solo_fleet_outlives_the_loss_of_its_only_machine(begin, fleet, tmp_path, work):
    made, desk = begin("--solo")
    assert made.exit_code == 0, made.output
    words = printed(made.stdout)
    everything = b"".join(path.read_bytes() for path in (tmp_path / "home").rglob("*") if path.is_file())
    assert "".join(words.split())[:30].encode() not in everything, "the recovery key is on paper only"
    assert fleet("publish", hello(work), "--version", "1.0.0").exit_code == 0
    device = Device(desk, production=True)
    assert device.runs("1.0.0")

    # The machine is gone with every key on it. On a new one there is the paper, and a colleague's public files.
    shutil.rmtree(tmp_path / "home/operator/keys")
    (tmp_path / "home/operator/keys").mkdir()
    assert fleet("keys", "import", "recovery", "--recovery", stdin=words).exit_code == 0
    for name in ("anna", "offline", "publisher"):
        assert fleet("keys", "new", name).exit_code == 0
    for role, to in (("root", ("anna", "recovery")), ("targets", ("offline",)), ("main", ("publisher",))):
        rotated = fleet("keys", "rotate", role, *(word for name in to for word in ("--to", name)), "--yes")
        assert rotated.exit_code == 0, rotated.output
    assert fleet("publish", work / "hello.wasm", "--version", "1.1.0").exit_code == 0
    assert device.runs("1.1.0")


def test_a_solo_fleets_json_holds_the_recovery_key_for_a_script_that_prints_it(begin):
    made, _ = begin("--solo", "--json")
    assert json.loads(made.stdout)["recovery"].startswith("WFRK1-")


def test_a_teams_fleet_begins_with_an_event_for_its_people(begin, fleet, tmp_path, work):
    ring = tmp_path / "people"
    files = []
    for name in ("alice", "bob", "carol"):
        from signing.keyring import Keyring, public_pem

        (ring / name).mkdir(parents=True)
        entry, _ = Keyring(ring / name).generate(name, passphrase=b"correct horse")
        (work / f"{name}.pub").write_text(public_pem(entry.key))
        files += ["--root", f"{name}.pub"]
    made, desk = begin("--team", *files)
    assert made.exit_code == 0, made.output
    event = "fleet-root-2.signing.json"
    assert event in made.stdout

    early = fleet("sign", "publish", event)
    assert early.exit_code == 4
    assert "alice" in early.stdout
    for name in ("bob", "alice"):  # each at a machine of his own
        for path in (ring / name).iterdir():
            shutil.copy(path, tmp_path / "home/operator/keys" / path.name)
        assert fleet("sign", "approve", event, "--key", name, "--yes").exit_code == 0
    assert fleet("sign", "publish", event).exit_code == 0
    assert rotation.keys_of(desk.files, "root").threshold == 2
    from tuf.api.metadata import Root

    from signing import metadata

    root = metadata.parse(Root, repository.latest(desk.files, "root")[1], "root").signed
    assert profile(root)["size"] == "team"
    assert fleet("publish", hello(work), "--version", "1.0.0").exit_code == 0
    assert Device(desk, production=True).runs("1.0.0")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--team",), "belong together"),
        (("--solo", "--root", "alice.pub"), "belong together"),
        (("--team", "--root", "alice.pub"), "2 of 3 people"),
        (("--team", "--root", "junk.pub", "--root", "alice.pub"), "not a public key"),
    ],
)
def test_a_team_that_is_none(words, sentence, begin, work):
    from signing.keyring import Keyring, public_pem

    (work / "alice.pub").write_text(public_pem(Keyring(work).generate("alice", passphrase=None)[0].key))
    (work / "junk.pub").write_text("hello")
    refused, _ = begin(*words)
    assert refused.exit_code == 2
    assert sentence in refused.stderr
    assert not (work.parent / "home/server").exists()
