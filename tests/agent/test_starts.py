"""An agent that ends again and again leaves its broker alone, and says so: as processes."""

import asyncio
import contextlib
import signal
import sys

import pytest

from agent.starts import ENDS_MAX, WITHIN_S, Starts
from tests.agent.enrolled_device import enrolled
from tests.agent.small_broker import Broker
from tests.eventually import eventually_async

PROGRAM = "import sys; from agent.cli import main; sys.exit(main())"


@contextlib.asynccontextmanager
async def agent(directory):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, "run", "--state", directory / "state", "--runtime", directory / "run"),
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def said(directory, command):
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, command, "--state", directory / "state", "--runtime", directory / "run"),
        stdout=asyncio.subprocess.PIPE,
    )
    return (await process.communicate())[0].decode()


@pytest.mark.asyncio
async def test_after_three_ends_within_a_minute_the_agent_uses_https_only_and_says_so(tmp_path):
    broker = Broker()
    await broker.start()
    _, store = enrolled(tmp_path, broker=broker.port)
    store.close()
    for turn in range(1, ENDS_MAX + 1):
        async with agent(tmp_path) as process:
            await broker.until(lambda turn=turn: len(broker.subscribed) == turn)
            process.kill()
    async with agent(tmp_path) as process:

        async def told():
            return "leaves the broker (MQTT) alone" in await said(tmp_path, "status")

        await eventually_async(told, "status says so")
        process.send_signal(signal.SIGTERM)
        _, journal = await process.communicate()
        assert process.returncode == 0
        assert b"leaves the broker (MQTT) alone" in journal
    assert len(broker.subscribed) == ENDS_MAX
    async with agent(tmp_path):  # it ended in order
        await broker.until(lambda: len(broker.subscribed) == ENDS_MAX + 1)
    await broker.stop()


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def starts(tmp_path, clock, boot="b"):
    return Starts(tmp_path / "starts.json", boot_id=boot, clock=clock)


def test_ends_that_are_far_apart_or_in_order_do_not_count(tmp_path, clock):
    for _ in range(10):
        assert not starts(tmp_path, clock).begin()
        clock.now += WITHIN_S / 2.5
    for _ in range(10):
        record = starts(tmp_path, clock)
        assert not record.begin()
        record.end()


def test_the_fourth_start_is_another_as_long_as_ends_go_on(tmp_path, clock):
    assert [starts(tmp_path, clock).begin() for _ in range(6)] == [False] * ENDS_MAX + [True] * 3
    clock.now += WITHIN_S
    assert not starts(tmp_path, clock).begin()


def test_starts_before_a_reboot_do_not_count(tmp_path, clock):
    for _ in range(ENDS_MAX):
        starts(tmp_path, clock).begin()
    assert not starts(tmp_path, clock, boot="c").begin()


@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"[]", b'{"boot_id": 3}', b'{"boot_id": "b", "at": "x"}'])
def test_a_damaged_record_is_none(tmp_path, clock, content):
    (tmp_path / "starts.json").write_bytes(content)
    assert not starts(tmp_path, clock).begin()


def test_a_disk_that_cannot_be_written_does_not_keep_the_agent_from_starting(tmp_path, clock):
    record = Starts(tmp_path / "gone" / "starts.json", boot_id="b", clock=clock)
    assert not record.begin()
    record.end()
