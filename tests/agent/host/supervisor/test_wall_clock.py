"""Due times of cron lines over summer time and changes of the clock."""

import asyncio
import os
import time
from datetime import UTC, datetime
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest

from agent.host.supervisor import wall_clock
from agent.host.supervisor.wall_clock import CronTimer, SystemClock, next_due
from fleet.protocol.manifest import parse


def zone(name):
    place = ZoneInfo(name)
    return lambda at: int(datetime.fromtimestamp(at, place).utcoffset().total_seconds())


def times(line, start, number, place="Europe/Berlin"):
    """The next due times of a line after a UTC time, as local times with their offset in hours."""
    offset, found = zone(place), []
    at = datetime.fromisoformat(start).replace(tzinfo=UTC).timestamp()
    for _ in range(number):
        at = next_due(parse(line), at, offset)
        found.append(datetime.fromtimestamp(at, ZoneInfo(place)).strftime("%m-%d %H:%M %z"))
    return found


def test_a_line_for_every_hour_goes_on_through_the_hour_that_occurs_twice():
    assert times("*/20 * * * *", "2026-10-24T23:50", 8) == [
        "10-25 02:00 +0200",
        "10-25 02:20 +0200",
        "10-25 02:40 +0200",
        "10-25 02:00 +0100",
        "10-25 02:20 +0100",
        "10-25 02:40 +0100",
        "10-25 03:00 +0100",
        "10-25 03:20 +0100",
    ]


@pytest.mark.parametrize(
    ("line", "start", "expected"),
    [
        # summer time begins on 29 March: 02:00 to 02:59 is skipped
        ("*/30 * * * *", "2026-03-29T00:20", ["03-29 01:30 +0100", "03-29 03:00 +0200", "03-29 03:30 +0200"]),
        ("30 2 * * *", "2026-03-28T00:00", ["03-28 02:30 +0100", "03-30 02:30 +0200"]),
        ("0 3 * * *", "2026-03-28T12:00", ["03-29 03:00 +0200", "03-30 03:00 +0200"]),
        # it ends on 25 October: 02:00 to 02:59 occurs twice
        ("30 2 * * *", "2026-10-24T00:00", ["10-24 02:30 +0200", "10-25 02:30 +0200", "10-26 02:30 +0100"]),
        ("30 2 * * *", "2026-10-25T00:40", ["10-26 02:30 +0100"]),
        ("0,30 1-3 * * *", "2026-10-25T00:10", ["10-25 02:30 +0200", "10-25 03:00 +0100", "10-25 03:30 +0100"]),
        ("0 0 * * *", "2026-10-24T12:00", ["10-25 00:00 +0200", "10-26 00:00 +0100"]),
        # over a year with both changes, and to the next leap day
        ("0 12 1 6 *", "2026-06-02T00:00", ["06-01 12:00 +0200"]),
        ("0 12 25 12 *", "2026-06-02T00:00", ["12-25 12:00 +0100"]),
        ("0 0 29 2 *", "2026-06-02T00:00", ["02-29 00:00 +0100"]),
    ],
)
def test_a_line_that_names_its_hours_is_due_once_and_skipped_hours_are_not_made_up_for(line, start, expected):
    assert times(line, start, len(expected)) == expected


@pytest.mark.parametrize("place", ["Australia/Lord_Howe", "Asia/Kathmandu", "America/St_Johns", "UTC"])
def test_due_times_never_fall_and_each_minute_of_the_year_is_found_once(place):
    offset = zone(place)
    at = datetime(2026, 1, 1, tzinfo=UTC).timestamp()
    end = datetime(2027, 1, 1, tzinfo=UTC).timestamp()
    found = []
    while at < end:
        at = next_due(parse("0 * * * *"), at, offset)
        found.append(at)
        assert datetime.fromtimestamp(at, ZoneInfo(place) if place != "UTC" else UTC).minute == 0
    assert all(earlier < later for earlier, later in pairwise(found))
    # Lord Howe's clock changes by half an hour
    assert {later - earlier for earlier, later in pairwise(found)} <= {1800.0, 3600.0, 5400.0}


class Clock:
    """Clock that runs as tests say; `reach` waits until the test moves it."""

    def __init__(self, at):
        self.at = datetime.fromisoformat(at).replace(tzinfo=UTC).timestamp()
        self.waits = asyncio.Queue()

    def now(self):
        return self.at

    async def reach(self, at):
        moved = asyncio.get_running_loop().create_future()
        self.waits.put_nowait((at, moved))
        await moved

    async def asked(self):
        """Time that is waited for."""
        self.wanted, self.moved = await self.waits.get()
        return datetime.fromtimestamp(self.wanted, UTC).strftime("%Y-%m-%d %H:%M")

    def show(self, at):
        self.at = datetime.fromisoformat(at).replace(tzinfo=UTC).timestamp()
        self.moved.set_result(None)


async def waits(clock, line):
    timer = CronTimer(parse(line), clock, lambda _: 0)
    return timer, asyncio.ensure_future(timer.next())


def due(task):
    return datetime.fromtimestamp(task.result(), UTC).strftime("%Y-%m-%d %H:%M")


@pytest.mark.asyncio
async def test_a_clock_set_back_a_year_does_not_stop_a_task_for_a_year():
    clock = Clock("2027-05-01T12:03")
    _, task = await waits(clock, "*/10 * * * *")
    assert await clock.asked() == "2027-05-01 12:10"
    clock.show("2026-05-01T08:41")
    assert await clock.asked() == "2026-05-01 08:50"
    clock.show("2026-05-01T08:50")
    await task
    assert due(task) == "2026-05-01 08:50"


@pytest.mark.asyncio
async def test_a_clock_set_forward_years_runs_nothing_of_the_past():
    clock = Clock("1970-01-01T00:03")
    _, task = await waits(clock, "0 3 * * *")
    assert await clock.asked() == "1970-01-01 03:00"
    clock.show("2026-05-01T08:41")
    assert await clock.asked() == "2026-05-02 03:00"
    task.cancel()


@pytest.mark.asyncio
async def test_corrections_of_the_clock_run_each_task_once():
    clock = Clock("2026-05-01T02:59:58")
    timer, task = await waits(clock, "0 3 * * *")
    assert await clock.asked() == "2026-05-01 03:00"
    clock.show("2026-05-01T03:00:40")  # set forward, over the time
    await task
    assert due(task) == "2026-05-01 03:00"
    clock.at -= 60  # and back again, before it
    task = asyncio.ensure_future(timer.next())
    assert await clock.asked() == "2026-05-02 03:00"
    task.cancel()


@pytest.mark.asyncio
async def test_a_clock_that_is_set_but_not_moved_goes_on():
    clock = Clock("2026-05-01T02:00")
    _, task = await waits(clock, "0 3 * * *")
    assert await clock.asked() == "2026-05-01 03:00"
    clock.show("2026-05-01T02:00:01")
    assert await clock.asked() == "2026-05-01 03:00"
    task.cancel()


@pytest.mark.asyncio
async def test_the_system_clock_is_waited_for():
    clock = SystemClock()
    before = clock.now()
    await clock.reach(before + 0.05)
    assert clock.now() >= before + 0.05
    await clock.reach(before - 1)


@pytest.mark.root
@pytest.mark.asyncio
async def test_a_wait_ends_when_the_clock_is_set(monkeypatch):
    """By nobody else in this machine: the clock is set to what it shows."""
    armed = asyncio.Event()
    add_reader = asyncio.get_running_loop().add_reader

    def watched(*arguments):
        add_reader(*arguments)
        armed.set()

    monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", watched)
    task = asyncio.ensure_future(SystemClock().reach(time.time() + 86_400))
    await armed.wait()
    try:
        time.clock_settime_ns(time.CLOCK_REALTIME, time.clock_gettime_ns(time.CLOCK_REALTIME))
    except PermissionError:
        task.cancel()
        pytest.skip("this root may not set the clock")
    async with asyncio.timeout(30):
        await task


def test_the_offset_is_that_of_the_device(monkeypatch):
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        assert wall_clock.local_offset(datetime(2026, 7, 1, tzinfo=UTC).timestamp()) == 7200
        assert wall_clock.local_offset(datetime(2026, 12, 1, tzinfo=UTC).timestamp()) == 3600
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()
    assert os.environ.get("TZ") is None
