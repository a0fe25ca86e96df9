"""Messages of a component reach the operator, whatever breaks on the way: each acknowledged one, in order, once."""

import asyncio
import signal

import pytest

from tests.e2e.stage import publish
from tests.eventually import eventually_async

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(240)]


def test_each_acknowledged_number_arrives_over_an_outage_of_server_and_broker_and_kills_of_the_agent(stage, device):
    async def story():
        here, kept, number = device, [], 0

        async def publish_some(count):
            nonlocal number
            for _ in range(count):
                number += 1
                if await asyncio.to_thread(publish, here, number):
                    kept.append(number)

        async def arrive():
            async def all_there():
                return set(kept) <= set(await stage.messages())

            await eventually_async(all_there, "each acknowledged number arrives")
            found = await stage.messages()
            assert found == sorted(set(found)), "in order, each once"

        await stage.push_meter(here)
        await publish_some(5)
        assert kept == [1, 2, 3, 4, 5]
        await arrive()

        # the server and its broker are away, and numbers go on
        server = stage.scene._server
        await stage.kill(server)
        await publish_some(20)
        assert kept[-1] == number

        # the agent is killed while numbers are on their way, and started again
        killed = here.agent
        publishing = asyncio.ensure_future(publish_some(20))
        await asyncio.sleep(0)
        killed.process.send_signal(signal.SIGKILL)
        await killed.process.wait()
        here = await stage.start_agent(here)
        await publishing
        await publish_some(20)
        assert kept[-1] == number
        assert len(kept) > 45

        await stage.scene.serve()
        await publish_some(5)
        await arrive()

        # health tells what waits: nothing
        def nothing_waits():
            health = stage.scene.client.device(here.device).health
            return health if health is not None and health.readings is not None else None

        health = await stage.until("health has readings", nothing_waits)
        assert health.readings.dropped == 0

    stage.do(story())
