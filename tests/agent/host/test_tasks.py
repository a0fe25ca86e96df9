"""Scheduled tasks: run when due, never two at once, and counted like any call."""

from datetime import datetime

import pytest
import support
from support import Limits

from agent.host import ipc
from agent.host.schedule import BadCronError, Cron
from fleet.protocol.manifest import Schedule


@pytest.mark.parametrize(
    ("line", "after", "due"),
    [
        ("* * * * *", "2026-01-01 10:00", "2026-01-01 10:01"),
        ("*/15 * * * *", "2026-01-01 10:16", "2026-01-01 10:30"),
        ("0 3 * * *", "2026-01-01 10:00", "2026-01-02 03:00"),
        ("30 8-10 * * 1-5", "2026-01-02 10:30", "2026-01-05 08:30"),
        ("0 0 29 2 *", "2026-01-01 00:00", "2028-02-29 00:00"),
        ("0 0 1 1 0", "2026-01-01 00:00", "2026-01-04 00:00"),  # either day, as POSIX says: the Sunday comes first
        ("0 0 * * 7", "2026-01-01 00:00", "2026-01-04 00:00"),
        ("5,10 0 31 12 *", "2026-12-31 00:05", "2026-12-31 00:10"),
    ],
)
def test_a_cron_line_says_when(line, after, due):
    assert Cron.parse(line).after(datetime.fromisoformat(after)) == datetime.fromisoformat(due)


@pytest.mark.parametrize("line", ["", "* * * *", "60 * * * *", "* 24 * * *", "a * * * *", "*/0 * * * *", "5-1 * * * *"])
def test_what_is_no_cron_line_is_refused(line):
    with pytest.raises(BadCronError):
        Cron.parse(line)


def test_a_date_that_never_comes_is_an_error_and_no_endless_search():
    with pytest.raises(BadCronError, match="never"):
        Cron.parse("0 0 30 2 *").after(datetime.fromisoformat("2026-01-01"))


def ran(host, instance, times):
    """Wait until the task has run so often, and return its figures."""
    while True:
        health = host.health(instance)
        if sum(health.calls.values()) >= times:
            return health


def test_a_task_runs_every_so_often_and_its_failures_are_told(host):
    every = Schedule(every_ms=100)
    assert isinstance(host.start("task", support.a_run("good", 1, trigger=every)), ipc.Started)
    assert isinstance(host.start("task-fails", support.a_run("sad", 1, trigger=every)), ipc.Started)
    host.start("task-traps", support.a_run("bad", 1, trigger=every))
    host.start("task-spins", support.a_run("slow", 1, trigger=every, limits=Limits(call_ms=100)))
    assert set(ran(host, "good", 3).calls) == {"ok"}
    assert ran(host, "sad", 2).errors >= 2
    assert any("failed" in line for line in host.ask(ipc.Logs, instance="sad").lines)
    assert set(ran(host, "bad", 2).calls) == {"guest-trap"}
    assert set(ran(host, "slow", 2).calls) == {"guest-timeout"}


def test_a_task_is_swapped_like_any_other(host):
    every = Schedule(every_ms=100)
    host.start("task", support.a_run("good", 1, trigger=every))
    ran(host, "good", 1)
    assert host.start("task", support.a_run("good", 2, trigger=every)).replaced == 1
    assert ran(host, "good", 2).generation == 2


def test_a_component_of_another_trigger_is_refused(host):
    reply = host.start("hello", support.a_run("web", 1, trigger=Schedule(every_ms=1000)))
    assert (reply.code, "wasmfleet:schedule/task" in reply.message) == ("start-failed", True)
    reply = host.start("task", support.a_run("web", 1))
    assert (reply.code, "wasmfleet:http/handler" in reply.message) == ("start-failed", True)
    reply = host.start("task", support.a_run("web", 1, trigger=Schedule(cron="61 * * * *")))
    assert (reply.code, "0-59" in reply.message) == ("start-failed", True)
