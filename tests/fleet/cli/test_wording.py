"""What messages say: numbers, names, advice, times; each as somebody met it."""

import re
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fleet.cli import output
from fleet.cli.signing_event import show_recovery
from fleet.component import component_toml
from fleet.protocol import bounds, operator_api
from fleet.protocol.manifest import BadManifestError
from fleet.protocol.messages import LogView
from signing.keyring import recovery_key
from tests.fleet.cli.walk import COMMANDS

DEVICE = "gate-0a0a0a0a"


@pytest.mark.parametrize("words", ["publish", "component inspect", "component check", "push --group edge-eu"])
def test_a_file_that_is_too_large_has_its_own_size(words, fleet, desk, tmp_path):
    file = tmp_path / "big.wasm"
    with file.open("wb") as stream:
        stream.truncate(70 << 20)
    done = fleet(*words.split(), file)
    assert done.exit_code == 2
    assert f"{file} is too large; it has 70.0 MiB, and at most 64 MiB are accepted" in done.stderr
    assert bounds.ARTIFACT_MAX_BYTES == 64 << 20


@pytest.mark.parametrize(
    ("file_name", "name"),
    [
        ("naïve été.wasm", "naive-ete"),
        ("Hello World.wasm", "hello-world"),
        ("größe.component.wasm", None),
        ("温度.wasm", None),
    ],
)
def test_no_letter_of_a_files_name_is_lost_in_silence(file_name, name):
    if name is None:
        with pytest.raises(BadManifestError, match="gives no valid name"):
            component_toml.name_of(file_name)
    else:
        assert component_toml.name_of(file_name) == name


PAIRS = [
    (name, yes, no)
    for name, command in COMMANDS.items()
    for option in command.params
    for yes, no in zip(option.opts, getattr(option, "secondary_opts", ()), strict=False)
]


@pytest.mark.parametrize(("name", "yes", "no"), PAIRS)
def test_both_words_of_a_pair_contradict_each_other(name, yes, no, fleet, home):
    for pair in ((yes, no), (no, yes)):
        done = fleet(*name.split(), "x", *pair)
        assert done.exit_code == 2
        assert f"{yes} and {no} contradict each other" in done.stderr


def test_there_are_such_pairs():
    assert {(name, yes) for name, yes, _ in PAIRS} >= {("push", "--share-worker"), ("pin", "--share-worker")}


def test_an_empty_public_key_is_called_empty(fleet, home, tmp_path):
    file = tmp_path / "bob.pub"
    for content, words in (("", "is empty; have its owner send it again"), ("Dear Alice,", "is not a public key")):
        file.write_text(content)
        done = fleet("keys", "import", "bob", file)
        assert done.exit_code == 2
        assert words in done.stderr
        assert "chmod" not in done.stderr


def test_the_recovery_key_breaks_between_groups(capsys):
    _, words = recovery_key()
    show_recovery(words)
    first, second = (line.strip() for line in capsys.readouterr().out.splitlines() if line.startswith("    "))
    assert first.endswith("-")
    assert first + second == words
    assert {len(group) for group in first.rstrip("-").split("-")[1:]} == {4}


@pytest.mark.parametrize(
    ("zone", "shown"), [("UTC0", "2026-11-30 18:00:00 UTC"), ("CET-1", "2026-11-30 19:00:00 +01:00")]
)
def test_local_times_carry_their_zone(zone, shown, monkeypatch):
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert output.local(datetime(2026, 11, 30, 18, tzinfo=UTC)) == shown
    finally:
        monkeypatch.undo()
        time.tzset()


def test_why_restart_and_tokens_say_in_which_zone_their_times_are(fleet, desk):
    at = datetime(2026, 11, 30, 18, tzinfo=UTC)
    entry = operator_api.TimelineEntry(at=at, kind="online", text="it is online")
    desk.routes |= {
        ("GET", f"/v1/devices/{DEVICE}/timeline"): operator_api.Timeline(device=DEVICE, entries=(entry,)),
        ("POST", f"/v1/devices/{DEVICE}/command"): operator_api.CommandReply(sequence=7, expires=at),
        ("POST", "/v1/enroll-tokens"): operator_api.EnrollTokenReply(token="wf1.x", group="", expires=at),
    }
    for words in (("why", DEVICE), ("restart", DEVICE, "hello"), ("enroll-token",)):
        assert output.local(at) in fleet(*words).output, words
    assert re.search(r"(UTC|[+-]\d\d:\d\d)$", output.local(at))


def test_a_log_without_lines_says_so(fleet, desk):
    desk.routes["POST", f"/v1/devices/{DEVICE}/command"] = operator_api.CommandReply(
        sequence=7, expires=datetime.now(UTC)
    )
    for left_out, said in ((0, "has written no line since it began"), (3, "3 lines left out, by the device's policy")):
        desk.routes["GET", f"/v1/devices/{DEVICE}/logs"] = LogView(heard=True, left_out=left_out)
        done = fleet("logs", "hello", "--device", DEVICE)
        assert (done.exit_code, done.stdout) == (0, "")
        assert said in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_every_variable_of_the_environment_is_in_a_page():
    root = Path(__file__).resolve().parents[3]
    pages = "".join(page.read_text() for page in (root / "docs").glob("*.md"))
    code = "".join(file.read_text() for file in (root / "fleet").rglob("*.py"))
    names = set(re.findall(r"\"((?:WASMFLEET|FLEET)_[A-Z_]+)\"", code)) - {"FLEET_COMPLETE"}
    assert {name for name in names if name not in pages} == set()
