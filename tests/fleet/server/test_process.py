"""`fleet serve` as a process: it says when it is ready, ends in order, and leaves nothing behind when killed."""

import asyncio
import os
import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fleet.protocol import codes, operator_api
from fleet.protocol.messages import Health
from fleet.protocol.topics import Up
from tests.fleet.server.server_process import serving

PROGRAM = """
import asyncio, sys
from pathlib import Path
from fleet.server.service import ServeError, run
try:
    asyncio.run(run(Path(sys.argv[1]), on_ready=lambda ready: print(ready.broker, flush=True)))
except ServeError as error:
    sys.exit(str(error))
"""


async def serve(home, program=PROGRAM):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(home), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    line = await asyncio.wait_for(process.stdout.readline(), 30)
    return process, line.decode().strip()


def children(pid):
    """The processes that this one started and that still run, by id."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {int(child) for task in tasks for child in (task / "children").read_text().split()}


async def gone(pidfd):
    """Wait until the process has ended: then its descriptor is readable."""
    loop, over = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(pidfd, over.set)
    try:
        await asyncio.wait_for(over.wait(), 60)
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


@pytest.mark.asyncio
async def test_a_server_that_is_told_to_end_ends_and_takes_its_broker_along(new_home, broker):
    process, said = await serve(new_home(broker))
    assert said == broker
    (child,) = children(process.pid)
    broker_process = os.pidfd_open(child)
    process.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(process.wait(), 20) == 0
    await gone(broker_process)


@pytest.mark.asyncio
async def test_a_server_that_is_killed_leaves_no_broker_and_starts_again(new_home, new_fleet, broker):
    home = new_home(broker)
    process, _ = await serve(home)
    (child,) = children(process.pid)
    broker_process = os.pidfd_open(child)
    process.kill()
    await process.wait()
    await gone(broker_process)
    left = [home / "server" / place / ".new-00000000-x" for place in ("", "repository", "tls")]
    for path in left:
        path.write_text("what a power cut left half")
    again, said = await serve(home)
    assert said == broker
    assert not any(path.exists() for path in left)
    again.terminate()
    assert await asyncio.wait_for(again.wait(), 20) == 0


@pytest.mark.asyncio
async def test_a_server_killed_at_any_moment_of_a_push_finishes_it_after_the_next_start(new_fleet):
    """The store is all that it knows: killed right after a rollout was asked for, it goes on by itself."""

    async with new_fleet() as fleet:
        device = await fleet.device("a")
        for number in range(2):
            target = await fleet.operator.publish(f"{number}.1.0")
            view = await fleet.operator.deploy(target)
            await fleet.stop()
            await fleet.start()
            view = await fleet.operator.decided(
                await fleet.operator.get(operator_api.RolloutView, f"/v1/rollouts/{view.id}")
            )
            assert view.state is codes.RolloutState.SUCCEEDED
            assert device.items["hello"].target == target


@pytest.mark.asyncio
async def test_a_server_told_to_end_ends_while_a_device_sends_without_pause(new_fleet):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        await fleet.stop()
        async with serving(fleet.home) as server:
            health = Health(device=device.id, boot_id="boot", at=datetime.now(UTC))
            storm = asyncio.create_task(asyncio.to_thread(send_often, device, health))
            try:
                assert await server.ended() == 0
            finally:
                device.silent.set()
                await storm
        await fleet.start()


def send_often(device, message):
    device.silent = threading.Event()
    for _ in range(50_000):
        if device.silent.is_set():
            break
        device.publish(Up.HEALTH, message)


STUCK = """
import asyncio, sys
from pathlib import Path
from fleet.server import service
async def never(self): await asyncio.Event().wait()
service.Server.stop = never
service.END_S = 0.1
asyncio.run(service.run(Path(sys.argv[1]), on_ready=lambda ready: print(ready.broker, flush=True)))
"""


@pytest.mark.asyncio
async def test_a_server_that_cannot_end_in_order_ends_all_the_same(new_home):
    process, _ = await serve(new_home("embedded"), STUCK)
    (child,) = children(process.pid)
    broker_process = os.pidfd_open(child)
    process.terminate()
    try:
        assert await asyncio.wait_for(process.wait(), 60) == 1
    finally:
        if process.returncode is None:
            process.kill()
    await gone(broker_process)
