"""`fleet device ID --diagnose`: what people see of each way in which it can end."""

import os
from datetime import UTC, datetime

import httpx
import pytest

from fleet.cli import archive
from fleet.protocol import operator_api
from fleet.protocol.messages import ArchiveView
from signing import sealing
from signing.sealing import ArchivePurpose
from tests.fleet.cli.conftest import problem

GATE = "gate-0a1b2c3d"
ASK = ("POST", f"/v1/devices/{GATE}/command")
LOOK = ("GET", f"/v1/devices/{GATE}/diagnose")
FETCH = ("GET", f"/v1/devices/{GATE}/diagnose/archive")
SHOW = ("GET", f"/v1/devices/{GATE}")
CONTENT = b"an archive" * 100


@pytest.fixture
def gate(desk, monkeypatch):
    """A device that is online and goes through these steps, with the key that the command has made."""
    key = sealing.archive_key()
    monkeypatch.setattr(sealing, "archive_key", lambda: key)

    def answer(*views, online=True, **row):
        row = {"id": GATE, "name": "gate", "online": online, **row}
        detail = operator_api.DeviceDetail(row=operator_api.DeviceRow(**row), enrolled_at=datetime.now(UTC))
        desk.routes[SHOW] = detail
        desk.routes[ASK] = operator_api.CommandReply(sequence=7, expires=datetime.now(UTC))
        desk.routes[LOOK] = [*views]
        purpose = ArchivePurpose(device=GATE, command=7)
        sealed = sealing.seal_archive(CONTENT, recipient=sealing.public_key(key), purpose=purpose)
        desk.routes[FETCH] = httpx.Response(200, content=sealed)
        return sealed

    return answer


def test_progress_is_shown_until_the_archive_is_there(fleet, desk, gate, tmp_path):
    gate(
        ArchiveView(step="asked"),
        ArchiveView(step="made"),
        ArchiveView(step="made"),
        ArchiveView(step="sent", received=512, bytes=1024),
        httpx.ConnectError("the server is restarted"),
        ArchiveView(step="sent", received=1000, bytes=1024),
        ArchiveView(step="ready", received=1024, bytes=1024),
    )
    file = tmp_path / "gate.tar.gz"
    done = fleet("device", GATE, "--diagnose", "-o", file)
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines() == [
        f"asked {GATE}",
        f"{GATE} makes the archive",
        f"{GATE} sends it: 50 % of 1.0 KiB",
        f"{GATE} sends it: 90 % of 1.0 KiB",
    ]
    assert file.read_bytes() == CONTENT
    assert file.stat().st_mode & 0o777 == 0o600
    assert desk.sent(ASK[1])["verb"]["verb"] == "diagnose"
    assert fleet("-q", "device", GATE, "--diagnose", "-o", file).exit_code == 2, "it is there"


@pytest.mark.parametrize(
    ("view", "code", "words"),
    [
        (ArchiveView(step="refused", refused="[policy] diagnose in agent.toml"), 4, "refused to send an archive"),
        (ArchiveView(step="failed", refused="it took more than 300 s"), 1, "sent no archive; it took more than 300 s"),
        (problem("not-found", "no", 404), 1, "does not know of an archive"),
    ],
)
def test_the_devices_reason_is_given(fleet, gate, tmp_path, view, code, words):
    gate(view)
    done = fleet("device", GATE, "--diagnose", "-o", tmp_path / "gate.tar.gz")
    assert (done.exit_code, words in done.stderr) == (code, True), done.output
    assert not (tmp_path / "gate.tar.gz").exists()


@pytest.mark.parametrize("step", ["refused", "failed"])
def test_a_devices_reason_is_printed_as_text_alone(fleet, gate, tmp_path, step):
    gate(ArchiveView(step=step, refused="no \x1b[2J\u202e\nforged-0a0a0a0a"))
    done = fleet("device", GATE, "--diagnose", "-o", tmp_path / "gate.tar.gz")
    assert {each for each in done.stderr if not each.isprintable()} == {"\n"}
    assert not [line for line in done.stderr.splitlines() if line.startswith("forged")]


def test_a_device_that_is_away_is_not_waited_for(fleet, desk, gate, tmp_path, monkeypatch):
    for words, state in (("is offline", {"online": False}), ("is revoked", {"revoked": True})):
        gate(**state)
        done = fleet("device", GATE, "--diagnose", "-o", tmp_path / "gate.tar.gz")
        assert words in done.stderr
        assert ASK[1] not in desk.paths("POST")
    monkeypatch.setattr(archive, "ANSWER_S", 0)
    gate(ArchiveView(step="asked"))
    done = fleet("device", GATE, "--diagnose", "-o", tmp_path / "gate.tar.gz")
    assert (done.exit_code, "does not answer" in done.stderr) == (1, True), done.output
    monkeypatch.setattr(archive, "SILENCE_S", 0)
    gate(ArchiveView(step="sent", bytes=9))
    done = fleet("device", GATE, "--diagnose", "-o", tmp_path / "gate.tar.gz")
    assert (done.exit_code, "has stopped sending" in done.stderr) == (1, True), done.output


def test_an_earlier_agent_is_named(fleet, desk, gate, tmp_path):
    gate()
    desk.routes[ASK] = problem("unknown-command", "diagnose is not known to this agent: gate runs version 0.2.0", 409)
    done = fleet("device", GATE, "--diagnose", "-o", tmp_path / "gate.tar.gz")
    assert (done.exit_code, "not known to this agent" in done.stderr) == (4, True), done.output


def test_an_archive_that_was_changed_on_its_way_is_not_written(fleet, desk, gate, tmp_path):
    sealed = gate(ArchiveView(step="ready"))
    desk.routes[FETCH] = httpx.Response(200, content=sealed[:-1] + bytes([sealed[-1] ^ 1]))
    done = fleet("device", GATE, "--diagnose", "-o", tmp_path / "gate.tar.gz")
    assert (done.exit_code, "cannot be opened" in done.stderr) == (1, True), done.output
    assert not (tmp_path / "gate.tar.gz").exists()


def test_nothing_but_a_file_of_ones_own_is_replaced(fleet, desk, gate, tmp_path):
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "nowhere", "directory", "fifo", "missing/file", "target/file"):
        gate(ArchiveView(step="ready"))
        done = fleet("device", GATE, "--diagnose", "-o", tmp_path / name, "--force")
        assert done.exit_code == 2, (name, done.output)
    assert ASK[1] not in desk.paths("POST"), "the device is not asked for what cannot be written"
    assert target.read_text() == "mine"
    gate(ArchiveView(step="ready"))
    assert fleet("device", GATE, "--diagnose", "-o", target).exit_code == 2
    assert fleet("device", GATE, "--diagnose", "-o", target, "--force").exit_code == 0
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    "arguments", [["--diagnose"], ["-o", "x"], ["--force"], ["--diagnose", "-o", "x", "--effective"]]
)
def test_options_that_do_not_belong_together_are_refused(fleet, desk, arguments):
    assert fleet("device", GATE, *arguments).exit_code == 2
    assert not desk.paths("POST")
