"""MQTT and HTTPS over a radio link of 64 kbit/s, 300 ms and 5 % loss: the whole conversation of a device goes on.

`tests/boards/test_network.py` has the same with a real kernel's queue; here both ways are links of their own, so it
is certain which was used.
"""

import asyncio
import json
from datetime import UTC, datetime
from urllib.parse import urlsplit

import pytest

from fleet.protocol.codes import Phase
from tests.agent.slow_link import SlowLink
from tests.e2e.stage import HELLO
from tests.eventually import eventually_async

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(400)]


def slowed(url, links):
    """An address behind a slow link of its own."""
    port = urlsplit(url).port
    links.append(SlowLink(port, seed=port))
    return url.replace(f":{port}", f":{links[-1].port}")


async def presence(stage, device, *, online):
    def seen():
        row = next(each for each in stage.scene.client.devices().devices if each.id == device.device)
        return row.online is online

    await eventually_async(lambda: asyncio.to_thread(seen), f"online is {online}", within_s=120)


def test_connect_presence_reports_commands_and_an_update(stage, device):
    links = []

    async def story():
        file = stage.state(device) / "identity" / "enrolled.json"
        log = stage.state(device) / "log" / "agent.log"
        await stage.stop(device.agent)
        who = json.loads(file.read_text())
        who["mqtt"] = [slowed(each, links) for each in who["mqtt"]]
        brokers = list(links)
        who["devices_url"] = slowed(who["devices_url"], links)
        file.write_text(json.dumps(who))
        said, began = log.stat().st_size, datetime.now(UTC)
        here = await stage.start_agent(device)

        await presence(stage, here, online=True)

        def connected():
            return b"connected to the broker" in log.read_bytes()[said:]

        await eventually_async(connected, "the broker is connected", within_s=120)

        # the assignment comes by the broker, the component over HTTPS, the reports by the broker
        await stage.pushed("v2.wasm")
        await stage.answers(here, "2")
        await stage.reported(here, phase=Phase.COMMITTED, after=began)

        def healthy():
            health = stage.scene.client.device(here.device).health
            return health if health is not None and health.at > began else None

        assert (await stage.until("health arrives", healthy)).instances[0].instance == HELLO
        code, output, errors = await stage.fleet("logs", HELLO, "--device", here.device)
        assert code == 0, output + errors
        new = log.read_text()[said:]
        assert "over HTTPS" not in new, "the conversation has never left the broker"
        assert sum(link.connections for link in brokers) == 1, "no connection was given up"

        # gone without a word: the broker tells, and the device comes back
        await stage.kill(here.agent)
        await presence(stage, here, online=False)
        here = await stage.start_agent(here)
        await presence(stage, here, online=True)
        await stage.stop(here.agent)  # the goodbye
        await presence(stage, here, online=False)

    try:
        stage.do(story())
    finally:
        for link in links:
            link.close()
