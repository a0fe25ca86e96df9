"""The server of a team is gone: several people sign the next one's keys, each at a machine of their own, offline."""

import json
import shutil

import httpx
import pytest

from fleet import ca
from signing import keys, repository, rotation
from tests.fleet.cli.devices_and_people import Device, hello, person


@pytest.fixture
def size():
    return "solo"


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(ca, "_ROUNDS", 1000)  # opening keys is not what is tested here
    monkeypatch.setattr(keys, "PKCS12_ROUNDS", 1000)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def people(fleet, desk, home, work, tmp_path):
    """Alice and Bob hold root together with the operator of this machine: two of three."""
    made = {name: person(home, tmp_path / name, name) for name in ("alice", "bob")}
    for name, run in made.items():
        (work / f"{name}.pub").write_text(run("keys", "show", name).stdout)
        assert fleet("keys", "import", name, f"{name}.pub").exit_code == 0
    to = ("--to", "root", "--to", "alice", "--to", "bob", "--threshold", "2")
    assert fleet("keys", "rotate", "root", *to, "--out", "team.json", "--yes").exit_code == 0
    for run in made.values():
        assert run("sign", "approve", "team.json", "--yes").exit_code == 0
    assert fleet("sign", "publish", "team.json").exit_code == 0
    assert fleet("publish", hello(work), "--version", "1.0.0").exit_code == 0
    for run in made.values():
        run("sign", "status")  # what each machine verifies last, while the server is still there
    return made


def gone(_request):
    raise httpx.ConnectError("no route")


def test_a_teams_server_is_made_anew_with_signatures_given_offline(fleet, people, desk, home, work, monkeypatch):
    device = Device(desk, production=True)
    assert device.runs("1.0.0")
    for name, data in desk.files.items():
        (home / "server/repository" / name).write_bytes(data)
    assert fleet("server", "backup", "-o", "fleet.tar").exit_code == 0
    (home / "server").rename(work / "evidence")
    monkeypatch.setattr(desk, "handle_request", gone)

    # One of the three is not enough: what the others are to sign is a file, and there is no server yet.
    begun = fleet("server", "rebuild", "--backup", "fleet.tar", "--yes")
    assert begun.exit_code == 1, begun.output
    (event,) = work.glob("*.signing.json")
    assert f"fleet sign approve --offline {event.name}" in begun.stdout
    assert not (home / "server").exists()
    assert fleet("server", "rebuild", "--event", event.name, "--yes").exit_code == 1, "the same again completes nothing"

    # Alice compares it with what her machine verified last, reads what it changes, and signs.
    shutil.copy(event, "alice.json")
    assert people["alice"]("sign", "approve", "alice.json", "--yes").exit_code == 3, "there is no server to ask"
    signed = people["alice"]("sign", "approve", "--offline", "alice.json", stdin="y\n")
    assert signed.exit_code == 0, signed.output
    for role in ("snapshot", "timestamp"):
        assert role in signed.stderr
    assert "Sign this with alice?" in signed.stderr
    assert "fleet server rebuild --event alice.json" in signed.stdout, "and not 'fleet sign publish': nobody answers"

    done = fleet("server", "rebuild", "--event", "alice.json", "--yes")
    assert done.exit_code == 0, done.output
    made = {path.name: path.read_bytes() for path in (home / "server/repository").glob("*.json")}
    assert rotation.keys_of(made, "root").threshold == 2
    assert repository.latest(made, "root")[0] == repository.latest(desk.files, "root")[0] + 1
    # The device that slept through all of it follows, and takes the new director's word.
    desk.files = made
    assert device.runs("1.0.0")


def test_an_event_of_another_fleet_gets_no_signature_offline_either(fleet, people, desk, home, work, monkeypatch):
    for name, data in desk.files.items():
        (home / "server/repository" / name).write_bytes(data)
    assert fleet("server", "backup", "-o", "fleet.tar").exit_code == 0
    (home / "server").rename(work / "evidence")
    monkeypatch.setattr(desk, "handle_request", gone)
    assert fleet("server", "rebuild", "--backup", "fleet.tar", "--yes").exit_code == 1
    (path,) = work.glob("*.signing.json")
    whole = json.loads(path.read_text())

    def approve(**changed):
        path.write_text(json.dumps(whole | changed))
        return people["bob"]("sign", "approve", "--offline", path.name, "--yes")

    refused = approve(fleet="other")
    assert refused.exit_code == 2, refused.output
    assert "this event belongs to the fleet 'other'" in refused.stderr
    assert approve().exit_code == 0
