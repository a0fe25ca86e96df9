"""Ordinary programs (`wasi:cli/run`): by a schedule, and as a service that runs until it is stopped."""

import os
import signal
from pathlib import Path

import pytest
import support
from host_processes import lanes_of
from support import Grants, Limits

from agent.host.ipc import host_api
from agent.host.supervisor.worker_pool import why_not_shared
from fleet.protocol.manifest import Health, Http, Schedule, Service
from tests import odd_components
from tests.eventually import eventually

VARIABLES = Grants(interfaces=("wasi:cli",))


def runs(what, *more, every_ms=100):
    return Schedule(every_ms=every_ms, args=(what, *more))


def started(host, name, trigger, guest="command", number=1, **more):
    reply = host.start(guest, support.a_run(name, number, trigger=trigger, **more))
    assert isinstance(reply, host_api.Started), reply
    return reply


def lines_with(host, name, *wanted):
    """Wait until the log has each of these lines; return it all."""

    def found():
        lines = host.lines_of(name)
        return lines if all(any(each in line for line in lines) for each in wanted) else None

    return eventually(found, f"{name} logs {wanted}")


def figures(host, name, holds):
    def found():
        health = host.health(name)
        return health if holds(health) else None

    return eventually(found, f"the figures of {name}")


def test_each_run_is_a_call_with_an_instance_of_its_own_and_its_output_has_levels(host):
    started(host, "prints", runs("print"))
    lines = lines_with(host, "prints", "info hello from run", "warn a warning", "warn without an end")
    assert not any("host:" in line for line in lines), lines
    health = figures(host, "prints", lambda health: health.calls.get("ok", 0) >= 3)
    assert (health.errors, health.restarts, set(health.calls)) == (0, 0, {"ok"})


@pytest.mark.parametrize("granted", [True, False])
def test_arguments_are_the_manifest_s_and_configuration_is_there_by_grant(host, granted):
    config = {"greeting": "good day", "pump.rate": "7"}
    grants = VARIABLES if granted else Grants()
    started(host, "args", runs("args", "-x", "a b", "", every_ms=60_000), grants=grants, config=config)
    host.ask(host_api.Stop, instance="args")
    started(host, "args", runs("args", "-x", "a b", ""), grants=grants, config=config)
    lines = lines_with(host, "args", "info component", "info args", "info -x", "info a b")
    assert any("info good day" in line for line in lines) is granted
    assert any("info pump.rate" in line for line in lines) is granted


@pytest.mark.parametrize(
    ("what", "outcome", "said"),
    [
        ("exit", "guest-trap", "its run ended with exit code 1"),
        ("fail", "guest-trap", "its run ended with exit code 1"),
        ("trap", "guest-trap", "unreachable"),
        ("loop", "guest-timeout", "it used up its time for one call"),
    ],
)
def test_a_run_that_fails_is_a_fault(host, what, outcome, said):
    started(host, what, runs(what), limits=Limits(call_ms=100))
    event = host.event(lambda event: isinstance(event, host_api.Trapped) and event.instance == what)
    assert said in event.message
    health = figures(host, what, lambda health: health.calls.get(outcome, 0) >= 2)
    assert set(health.calls) == {outcome}
    assert (health.errors, health.restarts) == (health.calls[outcome], 0), "the worker goes on"


def test_a_run_that_waits_too_long_ends_with_its_worker(host):
    started(host, "waits", runs("block"), limits=Limits(idle_ms=200))
    figures(host, "waits", lambda health: health.calls.get("guest-timeout", 0) >= 1)
    lines_with(host, "waits", "limits.idle")


MAIN = """
  (core module $main (func (export "run") (result i32) (i32.const 0)))
  (core instance $main' (instantiate $main))
  (func $run (result (result)) (canon lift (core func $main' "run")))
  (instance $command (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $command))"""


def test_a_server_of_wasi_http_may_have_a_main_beside_its_handler(host):
    port = support.free_port()
    both = {"more_triggers": (Http(),), "port": port, "health": Health()}
    started(host, "both", Schedule(every_ms=100), odd_components.server(MAIN), **both)
    figures(host, "both", lambda health: health.calls.get("ok", 0) >= 3)
    assert support.http(port)[0] == 500, "it does not answer"
    ran = host.health("both").calls["ok"]
    figures(host, "both", lambda health: health.calls["ok"] > ran)
    assert host.health("both").workers == 1


def test_a_service_shares_no_worker(host):
    assert why_not_shared(Grants(), Limits(), 1, files=False, secrets=False) == ""
    assert "a service" in why_not_shared(Grants(), Limits(), 1, files=False, secrets=False, service=True)


# Services


def up(host, name, number=1, what="serve", **more):
    reply = started(host, name, Service(args=(what,), stop_ms=more.pop("stop_ms", 30_000)), number=number, **more)
    lines_with(host, name, "info up")
    return reply


def test_a_service_runs_until_it_is_stopped_and_its_input_ends_first(host):
    up(host, "serves")
    health = host.health("serves")
    assert (health.state, health.workers, health.calls, health.restarts) == ("running", 1, {}, 0)
    assert isinstance(host.ask(host_api.Stop, instance="serves"), host_api.Done)
    kept = (host.state / "logs" / "serves.log").read_text().splitlines()
    assert [line.partition(" ")[2] for line in kept[-3:]] == [
        "info up",
        "info down",
        "host: its run ended with exit code 0",
    ]


def test_a_call_s_time_does_not_limit_a_service(host):
    limits = Limits(call_ms=100, total_ms=200, idle_ms=100)
    up(host, "long", limits=limits)
    started(host, "beside", runs("print", every_ms=200), limits=limits)
    figures(host, "beside", lambda health: health.calls.get("ok", 0) >= 4)
    health = host.health("long")
    assert (health.workers, health.calls, health.restarts) == (1, {}, 0)


@pytest.mark.parametrize("what", ["block", "loop"])
def test_a_service_that_does_not_stop_is_ended(host, what):
    started(host, what, Service(args=(what,), stop_ms=100))
    if what == "block":
        lines_with(host, what, "info up")
    assert isinstance(host.ask(host_api.Stop, instance=what), host_api.Done)
    assert not any(one.instance == what for one in host.ask(host_api.Status).instances)


@pytest.mark.parametrize(("what", "said"), [("print", "exit code 0"), ("exit", "exit code 1"), ("trap", "unreachable")])
def test_a_service_that_ends_is_a_fault_and_is_started_again_after_a_pause(host, what, said):
    started(host, what, Service(args=(what,)))
    event = host.event(
        lambda event: isinstance(event, host_api.Changed) and event.instance == what and event.state == "backoff"
    )
    assert said in event.message
    health = figures(host, what, lambda health: health.restarts >= 2)
    assert set(health.calls) == {"guest-trap"}
    assert health.calls["guest-trap"] >= 2


def test_a_swap_starts_the_new_service_and_drains_the_old_one(host):
    up(host, "serves")
    reply = started(host, "serves", Service(args=("serve",)), number=2)
    assert reply.replaced == 1
    lines = eventually(
        lambda: found if (found := [x for x in host.lines_of("serves") if x.endswith((" up", " down"))])[2:] else None,
        "the old one ends",
    )
    assert sorted(lines) == ["info down", "info up", "info up"]
    health = host.health("serves")
    assert (health.generation, health.workers, health.restarts) == (2, 1, 0)
    assert host.ask(host_api.Revert, instance="serves", generation=2).generation == 1
    eventually(lambda: len([x for x in host.lines_of("serves") if x.endswith(" up")]) == 3, "the first runs again")
    health = host.health("serves")
    assert (health.generation, health.workers, health.restarts) == (1, 1, 0)


def test_a_restart_starts_another_run(host):
    up(host, "serves")
    assert isinstance(host.ask(host_api.Restart, instance="serves"), host_api.Done)
    eventually(lambda: len([x for x in host.lines_of("serves") if x.endswith(" up")]) == 2, "another run")
    eventually(lambda: any(x.endswith(" down") for x in host.lines_of("serves")), "the first run ends")
    assert host.health("serves").state == "running"


def test_a_service_has_no_health_check_and_needs_its_export(host):
    reply = host.start("command", support.a_run("checked", 1, trigger=Service(), health=Health(check=True)))
    assert (reply.code, "health" in reply.message) == ("start-failed", True)
    reply = host.start("hello", support.a_run("none", 1, trigger=Service()))
    assert (reply.code, "it exports no wasi:cli/run" in reply.message) == ("start-failed", True)
    reply = host.start("command", support.a_run("none", 1, trigger=Http()))
    assert (reply.code, "wasmfleet:http/handler" in reply.message) == ("start-failed", True)


def test_a_service_whose_process_is_killed_is_started_again(host):
    up(host, "serves")
    (pid,) = [pid for pid in lanes_of(host) if Path(f"/proc/{pid}/comm").read_text() == "worker:serves\n"]
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: len([line for line in host.lines_of("serves") if line.endswith(" up")]) == 2, "another run")
    health = figures(host, "serves", lambda health: health.restarts == 1)
    assert (health.state, health.calls) == ("running", {})
