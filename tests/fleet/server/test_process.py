"""`fleet serve` as a process: it says when it is ready, ends in order, and leaves nothing behind when killed."""

import asyncio
import signal
import sys
from pathlib import Path

from fleet.protocol import api

PROGRAM = """
import asyncio, sys
from pathlib import Path
from fleet.server.main import ServeError, run
try:
    asyncio.run(run(Path(sys.argv[1]), on_ready=lambda ready: print(ready.broker, flush=True)))
except ServeError as error:
    sys.exit(str(error))
"""


async def serve(home):
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, str(home), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    line = await asyncio.wait_for(process.stdout.readline(), 30)
    return process, line.decode().strip()


def children(pid):
    """The processes that this one started and that still run, by id."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {int(child) for task in tasks for child in (task / "children").read_text().split()}


def runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def gone(pid):
    async with asyncio.timeout(60):
        while runs(pid):  # noqa: ASYNC110 - a process of somebody else's has no event here
            await asyncio.sleep(0.02)


def test_a_server_that_is_told_to_end_ends_and_takes_its_broker_along(new_home, broker):
    async def story():
        process, said = await serve(new_home(broker))
        assert said == broker
        (child,) = children(process.pid)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0
        await gone(child)

    asyncio.run(story())


def test_a_server_that_is_killed_leaves_no_broker_and_starts_again(new_home, new_fleet, broker):
    async def story():
        home = new_home(broker)
        process, _ = await serve(home)
        (child,) = children(process.pid)
        process.kill()
        await process.wait()
        await gone(child)
        again, said = await serve(home)
        assert said == broker
        again.terminate()
        assert await asyncio.wait_for(again.wait(), 20) == 0

    asyncio.run(story())


def test_a_server_killed_at_any_moment_of_a_push_finishes_it_after_the_next_start(new_fleet):
    """The store is all that it knows: killed right after a rollout was asked for, it goes on by itself."""

    async def story():
        async with new_fleet() as fleet:
            board = await fleet.board("a")
            for number in range(2):
                target = await fleet.operator.publish(f"{number}.1.0")
                view = await fleet.operator.deploy(target)
                await fleet.stop()
                await fleet.start()
                view = await fleet.operator.decided(
                    await fleet.operator.get(api.RolloutView, f"/v1/rollouts/{view.id}")
                )
                assert view.state is api.RolloutState.SUCCEEDED
                assert board.items["hello"].target == target

    asyncio.run(story())
