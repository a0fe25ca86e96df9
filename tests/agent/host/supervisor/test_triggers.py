"""Several triggers of one instance: one worker, one memory, one health, whichever of them calls."""

import pytest
import support

from agent.host.ipc import host_api
from fleet.protocol.manifest import Http, Schedule
from tests.eventually import eventually

EVERY = Schedule(every_ms=100)


def start(host, guest, name, number=1, **more):
    port = support.free_port()
    reply = host.start(guest, support.a_run(name, number, port=port, **more))
    return reply, port


def test_requests_and_tasks_of_an_instance_share_worker_memory_and_figures(host):
    reply, port = start(host, "two-triggers", "both", trigger=Http(), more_triggers=(EVERY,))
    assert isinstance(reply, host_api.Started), reply
    runs = eventually(
        lambda: count if (count := int(support.http(port)[2])) >= 3 else None, "the task runs three times"
    )
    health = host.health("both")
    assert health.workers == 1
    assert health.calls["ok"] > runs, "requests and tasks are counted together"
    assert int(support.http(port)[2]) >= runs


def test_two_schedules_call_the_same_task(host):
    hourly = Schedule(cron="0 * * * *")
    reply, port = start(
        host, "two-triggers", "twice", trigger=Schedule(every_ms=150), more_triggers=(hourly, Http(), EVERY)
    )
    assert isinstance(reply, host_api.Started), reply
    eventually(lambda: int(support.http(port)[2]) >= 4, "both schedules run it")


@pytest.mark.parametrize("order", ["first", "second"])
def test_each_trigger_needs_its_export(host, order):
    triggers = (Http(), EVERY) if order == "first" else (EVERY, Http())
    for guest, name in (("hello", "wasmfleet:schedule/task"), ("task", "wasmfleet:http/handler")):
        reply, _ = start(host, guest, "lacks", trigger=triggers[0], more_triggers=triggers[1:])
        assert (reply.code, name in reply.message) == ("start-failed", True)


def test_a_swap_carries_both_over(host):
    reply, port = start(host, "two-triggers", "both", trigger=Http(), more_triggers=(EVERY,))
    eventually(lambda: int(support.http(port)[2]) >= 1, "the task runs")
    reply = host.start("two-triggers", support.a_run("both", 2, port=port, trigger=EVERY, more_triggers=(Http(),)))
    assert reply.replaced == 1
    eventually(lambda: int(support.http(port)[2]) >= 1, "the task of the new generation runs")
    assert host.health("both").generation == 2
