"""A network that blocks MQTT and lets HTTPS through: the whole conversation of a device goes on."""

import asyncio
import json
from datetime import UTC, datetime

import pytest

from fleet.protocol.codes import Phase
from tests.e2e.stage import HELLO, publish
from tests.eventually import eventually_async

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

NOWHERE = ["mqtts://127.0.0.1:1"]


async def with_brokers(stage, device, addresses):
    """Start a device's agent again with other addresses of brokers; return the device and the earlier addresses."""
    file = stage.state(device) / "identity" / "enrolled.json"
    if device.agent.process.returncode is None:
        await stage.stop(device.agent)
    who = json.loads(file.read_text())
    before, who["mqtt"] = who["mqtt"], addresses
    file.write_text(json.dumps(who))
    return await stage.start_agent(device), before


async def presence(stage, device, *, online):
    def seen():
        row = next(each for each in stage.scene.client.devices().devices if each.id == device.device)
        return row.online is online

    await eventually_async(lambda: asyncio.to_thread(seen), f"the device is {'online' if online else 'offline'}")


def test_reports_health_presence_logs_and_commands_go_over_https(stage, device):
    async def story():
        here, brokers = await with_brokers(stage, device, NOWHERE)
        began = datetime.now(UTC)
        await presence(stage, here, online=True)

        # reports: an update is proven
        await stage.pushed("v2.wasm")
        await stage.answers(here, "2")
        await stage.reported(here, phase=Phase.COMMITTED, after=began)

        # health
        def healthy():
            health = stage.scene.client.device(here.device).health
            return health if health is not None and health.at > began else None

        assert (await stage.until("health arrives", healthy)).instances[0].instance == HELLO

        # a command, and the log that it asks for
        code, output, errors = await stage.fleet("logs", HELLO, "--device", here.device)
        assert code == 0, output + errors

        # a server that has forgotten the session
        await stage.restart_server()
        await presence(stage, here, online=True)
        await stage.pushed("v1.wasm")
        await stage.answers(here, "1")

        # a goodbye, and the broker again
        await stage.stop(here.agent)
        await presence(stage, here, online=False)
        here, _ = await with_brokers(stage, here, brokers)
        await presence(stage, here, online=True)
        await stage.pushed("v2.wasm")
        await stage.answers(here, "2")

    stage.do(story())


@pytest.mark.nightly
def test_messages_of_components_arrive_over_https(stage, device):
    async def story():
        here, brokers = await with_brokers(stage, stage.scene.devices[0], NOWHERE)
        await presence(stage, here, online=True)
        await stage.push_meter(here)
        for number in (1, 2, 3):
            assert await asyncio.to_thread(publish, here, number)

        async def arrived():
            return await stage.messages() == [1, 2, 3]

        await eventually_async(arrived, "the messages arrive")
        await with_brokers(stage, here, brokers)

    stage.do(story())
