"""Refusals of a device: reported with their code, while the previous version keeps serving."""

import signal

import pytest

from fleet.demo.scenario import fixture
from fleet.protocol.codes import RejectCode
from tests.e2e import hostile
from tests.e2e.stage import GROUP

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def other(stage, device):
    """A second device of the group."""
    made = stage.do(stage.scene.add_device("paris", GROUP))
    stage.do(stage.answers(made, "1"))
    return made


def refused(stage, device, code, attack, *, or_by=()):
    """Play `attack`, wait for the device's report with `code`, and see that v1 still answers.

    A rollout halts on the first device that refuses, perhaps before the second was asked: `or_by` are the others that
    may be the first.
    """

    async def story():
        began = await stage.latest(device)
        await attack()
        entry = await stage.reported(device, *or_by, code=code, after=began)
        return entry, await stage.version(device)

    entry, version = stage.do(story())
    assert version == "1"
    assert entry.message
    return entry


def test_an_assignment_for_another_device(stage, device, other):
    foreign = hostile.envelope(stage, other)
    refused(stage, device, RejectCode.WRONG_DEVICE, lambda: hostile.say(stage, device, foreign))


def test_an_older_assignment(stage, device, other):
    older = hostile.envelope(stage, device)
    stage.do(stage.pushed("v2.wasm"))
    code, output, errors = stage.do(stage.fleet("undo", "--group", GROUP))
    assert code == 0, output + errors
    refused(stage, device, RejectCode.ROLLBACK, lambda: hostile.say(stage, device, older))


def test_an_assignment_that_the_director_did_not_sign(stage, device, other):
    forged = hostile.envelope(stage, device)
    at = forged.index(b'"sig":"') + 10
    forged = forged[:at] + (b"A" if forged[at : at + 1] != b"A" else b"B") + forged[at + 1 :]
    refused(stage, device, RejectCode.UNSIGNED, lambda: hostile.say(stage, device, forged))


def test_an_artifact_that_was_changed_on_the_server(stage, device, other):
    # the server still has v2's bytes; neither device has them any more
    async def attack():
        code, output, errors = await stage.fleet("publish", str(fixture("v2.wasm")))
        assert code == 0, output + errors
        for each in (device, other):
            for kept in (stage.state(each) / "artifacts").iterdir():
                kept.unlink()
            for image in (stage.state(each) / "images").iterdir():
                if not image.is_dir():
                    image.unlink()
        artifact = stage.artifact(stage.published("2.0.0").sha256)
        damaged = bytearray(artifact.read_bytes())
        damaged[-1] ^= 1
        artifact.chmod(0o600)
        artifact.write_bytes(damaged)
        code, output, _ = await stage.fleet("deploy", "hello@2.0.0", "--group", GROUP, "--waves", "100%")
        assert code == 1, output

    refused(stage, device, RejectCode.HASH_MISMATCH, attack, or_by=[other])


def flipped_signature(data):
    at = data.index(b'"sig"') + 12
    return data[:at] + (b"0" if data[at : at + 1] != b"0" else b"1") + data[at + 1 :]


@pytest.mark.parametrize(
    ("version", "role", "damage", "code"),
    [
        # the signature holds, and the timestamp promised other bytes: the assignment is refused as a whole
        ("2.1.0", "*.snapshot.json", lambda data: data + b" ", RejectCode.TOO_LARGE),
        # the snapshot promised other bytes: the item is refused
        ("2.2.0", "*.main.json", flipped_signature, RejectCode.HASH_MISMATCH),
    ],
    ids=["snapshot", "namespace"],
)
def test_metadata_that_was_changed_on_the_server(stage, device, other, tmp_path, version, role, damage, code):
    # a new release, and metadata that is changed before any device has seen it: they stand still meanwhile
    v2 = tmp_path / "hello.wasm"
    v2.write_bytes(fixture("v2.wasm").read_bytes() + b"\x00\x02\x01x")
    (tmp_path / "hello.toml").write_text(fixture("v2.toml").read_text().replace("2.0.0", version))
    agents = [each.agent.process for each in (device, other)]
    for agent in agents:
        agent.send_signal(signal.SIGSTOP)
    done, output, errors = stage.do(stage.fleet("publish", str(v2)))
    assert done == 0, output + errors
    files = (stage.scene.home / "server" / "repository").glob(role)
    newest = max(files, key=lambda file: file.stat().st_mtime)
    good = newest.read_bytes()

    async def attack():
        newest.write_bytes(damage(good))
        await stage.restart_server()
        for agent in agents:
            agent.send_signal(signal.SIGCONT)
        # whoever deploys it is told, and does not wait for ever
        done, output, errors = await stage.fleet("deploy", f"hello@{version}", "--group", GROUP, "--waves", "100%")
        assert done == 1, output + errors
        assert code in output + errors

    try:
        refused(stage, device, code, attack, or_by=[other])
    finally:
        stage.do(stage.fleet("rollout", "abort", str(stage.do(stage.newest_rollout()).number)))
        newest.write_bytes(good)
        stage.do(stage.restart_server())
