"""Life of a secret with real processes: set, read, rotated, rolled back, and not found by an attacker."""

import base64
import contextlib
import tarfile
from pathlib import Path

import pytest
import wasmtime

from fleet.demo.environment import free_ports
from fleet.protocol.codes import Phase
from tests.e2e.secret_reader import FIRST, GUEST, SECOND, TOML, answers, get
from tests.e2e.stage import GROUP, HELLO, alive, descendants

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def sought(stage):
    """Every place where a thief would look: all files of server, broker, operator and device, and of processes."""
    for path in stage.scene.directory.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()
    for device in stage.scene.devices:
        for child in (each for each in (device.host, device.agent) if alive(each.process.pid)):
            for pid in (child.process.pid, *descendants(child.process.pid)):
                for name in ("environ", "cmdline"):
                    path = Path(f"/proc/{pid}/{name}")
                    # a lane's environment is closed even to the user it runs as
                    with contextlib.suppress(PermissionError):
                        yield path, path.read_bytes()


def test_a_secret_is_given_read_rotated_and_taken_back(stage, tmp_path):
    component = tmp_path / "reader.wasm"
    component.write_bytes(wasmtime.wat2wasm(GUEST.read_text()))
    toml = tmp_path / "reader.toml"

    async def ok(*arguments, stdin=None):
        code, output, errors = await stage.fleet(*arguments, stdin=stdin)
        assert code == 0, output + errors
        return output

    async def story():
        device = await stage.scene.add_device("berlin", GROUP)
        (port,) = free_ports(1)
        toml.write_text(TOML.format(version="1.0.0", probation="100ms"))
        push = ("push", str(component), "--as", HELLO, "--group", GROUP, "--port", str(port))

        # Without the secret nothing is published, and the sentence says what to do.
        code, _, errors = await stage.fleet(*push)
        assert code == 4
        assert f"fleet secret set db-password --group {GROUP} --instance {HELLO}" in errors

        # Sealed on the operator's machine: the server never sees it.
        where = ("--group", GROUP, "--instance", HELLO)
        said = await ok("secret", "set", "db-password", *where, "--seal-here", stdin=FIRST.encode() + b"\n")
        assert "the server has not seen it" in said
        await ok(*push)
        await answers(port, FIRST)
        assert "operator" in await ok("secret", "list")

        # Rotated, this time sealed by the server: the same version runs on with the next value.
        before = await stage.latest(device)
        await ok("secret", "rotate", "db-password", *where, stdin=SECOND.encode())
        await answers(port, SECOND)
        await stage.reported(device, phase=Phase.COMMITTED, after=before)

        # A rotation under which it does worse is taken back by the device, to the value before.
        toml.write_text(TOML.format(version="2.0.0", probation="60s"))
        before = await stage.latest(device)
        await ok(*push, "--detach")
        await stage.until("the new version is watched", lambda: watched(stage, device))
        get(port, "/trap")
        await stage.reported(device, phase=Phase.ROLLED_BACK, after=before)
        await answers(port, SECOND)

        # Its log and the report of its trap name no value.
        shown = await ok("logs", HELLO, "--device", device.device)
        assert "redacted" in shown
        timeline = await ok("why", device.device, "--log", "--limit", "100")
        assert "redacted" in timeline
        assert "goes to the fleet" in timeline

        # A stick for this device has its box, and none with its group's name on it.
        stick, without = tmp_path / "stick.tar", tmp_path / "group.tar"
        await ok("bundle", "create", "--device", device.device, "-o", str(stick))
        await ok("bundle", "create", "--group", GROUP, "-o", str(without))
        assert boxes_in(stick)
        assert not boxes_in(without)

        # The device's power fails: host and restore alone, without agent or server, give it back.
        await stage.kill(device.agent)
        await stage.kill(device.host)
        device = await stage.start_host(device)
        await answers(port, SECOND)
        device = await stage.start_agent(device)

        for value in (FIRST, SECOND):
            for form in (value.encode(), base64.b64encode(value.encode()), value.encode().hex().encode()):
                for path, data in sought(stage):
                    assert form not in data, f"{path} has the value"
                assert form not in stick.read_bytes()
                assert form.decode() not in shown + timeline

    stage.do(story())


def boxes_in(bundle):
    with tarfile.open(bundle) as tar:
        return [name for name in tar.getnames() if name.startswith("secrets/")]


def watched(stage, device):
    entries = stage.scene.client.timeline(device.device, limit=50).entries
    return any(each.phase is Phase.PROBATION and "2.0.0" in each.target for each in entries) or None
