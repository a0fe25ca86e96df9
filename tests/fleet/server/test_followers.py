"""`fleet rollout N --follow` as a process while `fleet serve` is told to end and started again."""

import asyncio
import os
import sys

import pytest

from fleet.protocol import operator_api
from tests.fleet.server.server_process import ROOT, Crowd, serving


async def read_until(stream, words):
    """Read lines until one has these words; what was read."""
    said = b""
    while words not in said:
        line = await asyncio.wait_for(stream.readline(), 60)
        assert line, said.decode()
        said += line
    return said.decode()


@pytest.mark.asyncio
@pytest.mark.timeout(300)
async def test_a_follower_goes_on_with_the_server_that_is_started_next(new_fleet):
    async with new_fleet("embedded") as fleet:
        await fleet.enrol("a")  # never online: its rollout stays open
        view = await fleet.operator.deploy(await fleet.operator.publish("1.0.0"))
        await fleet.stop()
        async with serving(fleet.home) as server:
            follower = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "fleet.cli.main", "rollout", str(view.number), "--follow"),
                env={**os.environ, "PYTHONPATH": str(ROOT), "WASMFLEET_HOME": str(fleet.home), "PYTHONUNBUFFERED": "1"},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            try:
                await read_until(follower.stdout, b"a-")
                crowd = await Crowd().join(server.operators, 100, tls=server.tls(), says=b"POST /v1/undo HTTP/1.1\r\n")
                assert await server.ended() == 0
                crowd.hang_up()
                async with serving(fleet.home):
                    await fleet.operator.send(operator_api.RolloutView, "POST", f"/v1/rollouts/{view.id}/pause")
                    await read_until(follower.stdout, b"paused")
                    await fleet.operator.send(operator_api.RolloutView, "POST", f"/v1/rollouts/{view.id}/abort")
                    assert await asyncio.wait_for(follower.wait(), 60) == 1
                said = (await follower.stderr.read()).decode()
            finally:
                if follower.returncode is None:
                    follower.kill()
                await follower.wait()
        assert "aborted" in said
        assert "wasmfleet server" not in said
        assert "Traceback" not in said
        await fleet.start()
