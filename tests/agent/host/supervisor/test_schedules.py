"""Scheduled tasks: run when due, never two at once, and counted like calls."""

from itertools import groupby, pairwise

import pytest
import support
from support import Grants, Limits

from agent.host.ipc import host_api
from fleet.protocol.manifest import Schedule
from tests.eventually import eventually


@pytest.mark.parametrize(
    ("line", "said"), [("", "0 fields"), ("60 * * * *", "'60' is no minute"), ("0 0 30 2 *", "never matches")]
)
def test_a_cron_line_that_never_comes_due_does_not_start(host, line, said):
    # the reader of such lines is the protocol's, the same one that refuses them at push
    reply = host.start("task", support.a_run("web", 1, trigger=Schedule(cron=line)))
    assert reply.code == "start-failed"
    assert said in reply.message


def ran(host, instance, times):
    """Wait until the task has run so often, and return its figures."""

    def figures():
        health = host.health(instance)
        return health if sum(health.calls.values()) >= times else None

    return eventually(figures, f"{instance} runs {times} times")


def test_a_task_runs_every_so_often_and_its_failures_are_told(host):
    every = Schedule(every_ms=100)
    assert isinstance(host.start("task", support.a_run("good", 1, trigger=every)), host_api.Started)
    assert isinstance(host.start("task-fails", support.a_run("sad", 1, trigger=every)), host_api.Started)
    host.start("task-traps", support.a_run("bad", 1, trigger=every))
    host.start("task-spins", support.a_run("slow", 1, trigger=every, limits=Limits(call_ms=100)))
    assert set(ran(host, "good", 3).calls) == {"ok"}
    assert ran(host, "sad", 2).errors >= 2
    assert any("failed" in line for line in host.ask(host_api.Logs, instance="sad").lines)
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
    assert (reply.code, "0 to 59" in reply.message) == ("start-failed", True)


TELLS = Grants(interfaces=("wasi:logging", "wasi:io", "wasi:clocks"))


def tells(version):
    """The guest that logs when its task begins and ends, as this version of itself."""
    text = support.wasm("task-tells").decode().partition("\n")[2].replace('"v1 ', f'"v{version} ')
    # Longer than a worker is given to hand its connections over.
    return text.replace("250000000", "1600000000")


def begun(host, after=()):
    """Wait until another task than those of an earlier log is under way, and return the log so far."""

    def under_way():
        lines = host.lines_of("tells")
        if len(lines) > len(after) and lines[-1].endswith("begins"):
            return lines
        assert len(lines) < 45, "the log is about to forget its first lines"
        return None

    return eventually(under_way, "another task begins")


@pytest.mark.parametrize("by", ["swap", "rollback", "restart"])
def test_a_task_under_way_ends_before_the_first_of_the_next_begins(host, by):
    every = Schedule(every_ms=100)  # of a task that takes longer than that: there is always one under way

    def start(version):
        return host.start(tells(version), support.a_run("tells", version, trigger=every, grants=TELLS))

    for version in (1, 2):
        support.compiled(tells(version))
    assert isinstance(start(1), host_api.Started)
    lines = begun(host)
    if by == "restart":
        assert isinstance(host.ask(host_api.Restart, instance="tells"), host_api.Done)
    else:
        assert start(2).replaced == 1
    lines = begun(host, lines)
    if by == "rollback":
        assert host.ask(host_api.Revert, instance="tells", generation=2).generation == 1
        begun(host, lines)
    said = [line.split()[-2:] for line in host.lines_of("tells")]
    # Whatever began has ended, as the same version, before anything else began.
    for (version, what), (next_version, next_what) in pairwise(said):
        if what == "begins":
            assert (next_version, next_what) == (version, "ends"), said
        else:
            assert next_what == "begins", said
    versions = [version for version, what in said if what == "begins"]
    met = [version for version, _ in groupby(versions)]
    assert met == {"swap": ["v1", "v2"], "rollback": ["v1", "v2", "v1"], "restart": ["v1"]}[by]
