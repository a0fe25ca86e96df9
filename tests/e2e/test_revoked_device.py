"""A device that the fleet revokes: its owner is told, in status, journal and check, as sentences."""

import json

import pytest

from fleet.demo.environment import AGENT, module
from tests.eventually import eventually_async

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def test_the_owner_of_a_revoked_device_is_told(stage, device):
    async def story():
        code, output, errors = await stage.fleet("revoke", device.device, "--yes")
        assert code == 0, output + errors
        places = device.agent.command[device.agent.command.index("--state") :]

        async def told():
            _, output, _ = await stage.scene.processes.run(module(AGENT, "status", *places))
            return "the fleet has revoked this device" in output and output

        status = await eventually_async(told, "status says so")
        assert "enroll --force" in status
        assert "the fleet has revoked this device" in device.agent.log.read_text()
        _, output, _ = await stage.scene.processes.run(module(AGENT, "check", "--json", *places))
        failed = [each for each in json.loads(output) if not each["ok"]]
        assert "revoked this device" in failed[0]["text"], output
        assert not [each for each in json.loads(output) if "{" in each["text"]], "no JSON in a sentence"
        assert await stage.version(device) == "1", "what runs goes on"

    stage.do(story())
