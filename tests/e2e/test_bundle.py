"""Offline update: without a network, a device verifies a bundle, swaps, and later reports how the update came."""

import contextlib
import os

import pytest
import wasmtime

from fleet.demo.environment import AGENT, free_ports, module
from tests.e2e.secret_reader import FIRST, GUEST, SECOND, TOML, answers
from tests.e2e.stage import GROUP, HELLO
from tests.eventually import eventually_async

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


async def heard(path):
    """Until an agent reads from its FIFO."""

    def opened():
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
            return True
        return False

    await eventually_async(opened, f"somebody reads {path}")


def said_so(stage, device):
    """True when the device's timeline says how the update came; None before."""
    entries = stage.scene.client.timeline(device.device, limit=200).entries
    return any("came in a bundle" in entry.text for entry in entries) or None


def test_an_update_without_a_network(stage, device, tmp_path):
    bundle = tmp_path / "update.tar"
    config = stage.scene.directory / "devices" / device.name / "agent.toml"

    async def story():
        # The device cannot be reached while v2 is rolled out.
        await stage.stop(device.agent)
        code, output, errors = await stage.push("v2.wasm", "--detach")
        assert code == 0, output + errors
        code, output, errors = await stage.fleet("bundle", "create", "--group", GROUP, "-o", str(bundle))
        assert code == 0, output + errors
        assert device.device in output
        await stage.kill(stage.scene._server)

        # Its owner does not allow bundles, then does.
        places = device.agent.command[device.agent.command.index("--state") :]
        apply = module(AGENT, "apply", *places, str(bundle))
        again = await stage.start_agent(device)
        await heard(stage.state(device) / "wake")
        code, output, errors = await stage.scene.processes.run(apply)
        assert code == 1, output
        assert "[policy] bundles" in errors
        await stage.stop(again.agent)
        config.write_text(config.read_text() + "\n[policy]\nbundles = true\n")
        again = await stage.start_agent(again)
        await heard(stage.state(device) / "wake")
        code, output, errors = await stage.scene.processes.run(apply)
        assert code == 0, output + errors
        await stage.answers(again, "2")

        # When the network is back the server hears how it came.
        await stage.scene.serve()
        await stage.until("the device reports the bundle", lambda: said_so(stage, again))

    stage.do(story())


def test_a_rotated_secret_comes_on_a_stick(stage, tmp_path):
    component, bundle = tmp_path / "reader.wasm", tmp_path / "update.tar"
    component.write_bytes(wasmtime.wat2wasm(GUEST.read_text()))
    (tmp_path / "reader.toml").write_text(TOML.format(version="1.0.0", probation="100ms"))

    async def ok(*arguments, stdin=None):
        code, output, errors = await stage.fleet(*arguments, stdin=stdin)
        assert code == 0, output + errors

    async def story():
        device = await stage.scene.add_device("paris", "field")
        config = stage.scene.directory / "devices" / device.name / "agent.toml"
        config.write_text(config.read_text() + "\n[policy]\nbundles = true\n")
        (port,) = free_ports(1)
        where = ("--device", device.device, "--instance", HELLO)
        await ok("secret", "set", "db-password", *where, "--seal-here", "--ahead", stdin=FIRST.encode())
        await ok("push", str(component), "--as", HELLO, "--group", "field", "--port", str(port))
        await answers(port, FIRST)

        # The device cannot be reached while its secret is rotated; the stick is for it by name.
        await stage.stop(device.agent)
        await ok("secret", "rotate", "db-password", *where, "--seal-here", stdin=SECOND.encode())
        await ok("bundle", "create", "--device", device.device, "-o", str(bundle))
        assert SECOND.encode() not in bundle.read_bytes()
        await stage.kill(stage.scene._server)
        device = await stage.start_agent(device)
        await heard(stage.state(device) / "wake")
        places = device.agent.command[device.agent.command.index("--state") :]
        code, output, errors = await stage.scene.processes.run(module(AGENT, "apply", *places, str(bundle)))
        assert code == 0, output + errors
        await answers(port, SECOND)
        for path in (each for each in stage.state(device).rglob("*") if each.is_file()):
            assert SECOND.encode() not in path.read_bytes(), path

    stage.do(story())
