"""Processes that die and hang, components that misbehave, a full disk: what ran before still answers afterwards."""

import time
from pathlib import Path

from conftest import Joined
from stages import budget

GUESTS = Path(__file__).parents[2] / "components/guests"
HOARD = 'name = "hoard"\nversion = "1.0.0"\ntrigger = "http"\n[limits]\nmemory = "16MiB"\n[health]\nprobation = "2s"\n'
WATCHDOG = "/etc/systemd/system/fleet-agent.service.d/watchdog.conf"


def test_an_agent_that_hangs_is_replaced_and_nobody_notices(running: Joined) -> None:
    board, version = running.board, running.answering()
    # patience for the test; the shipped unit's is two minutes
    board.ok(f"mkdir -p $(dirname {WATCHDOG}) && printf '[Service]\\nWatchdogSec=20\\n' >{WATCHDOG}")
    board.ok("systemctl daemon-reload && systemctl restart fleet-agent", timeout_s=120)
    running.operator.online(running.device)
    before, host = running.pid("fleet-agent"), running.pid("fleet-host")
    with budget("watchdog", 60):
        board.ok(f"kill -STOP {before}")
        deadline = time.monotonic() + 120
        while running.pid("fleet-agent") in {before, "0"}:
            assert running.answering() == version
            assert time.monotonic() < deadline, "the watchdog did not end it"
        assert running.pid("fleet-host") == host
        running.operator.online(running.device)
    board.ok(f"rm {WATCHDOG} && systemctl daemon-reload && systemctl restart fleet-agent", timeout_s=120)


def test_a_killed_host_comes_back_with_what_was_committed(running: Joined) -> None:
    agent, before = running.pid("fleet-agent"), running.answering()
    with budget("host killed", 60):
        running.board.ok(f"kill -KILL {running.pid('fleet-host')}")
        running.answers(before)
    assert running.pid("fleet-agent") == agent, "the agent outlives the host"


def test_systemctl_stop_stops_everything_and_start_brings_it_back(running: Joined) -> None:
    before = running.answering()
    with budget("systemctl stop and start", 60):
        running.board.ok("systemctl stop fleet-agent fleet-host", timeout_s=120)
        assert running.board.ok("ps -eo user:20,args | grep -c '[f]leet-' || true") == "0"
        running.board.ok("systemctl start fleet-host fleet-agent", timeout_s=180)
        running.answers(before)


def test_what_takes_all_memory_fails_alone(running: Joined) -> None:
    # a component that takes what it can get at each request, beside one that goes on answering
    before, component = running.answering(), running.operator.wat(GUESTS / "hoard.wat", HOARD)
    with budget("a component that hoards memory", 90):
        running.operator.pushed(component, group=running.group, instance="hoard")
        for _ in range(3):
            assert running.board.asks_itself("/hoard/") == "", "it traps as soon as it is refused more"
        assert running.answering() == before
    host = running.pid("fleet-host")
    # the kernel's own limit, around all that the instance's lanes take together
    groups = f"/sys/fs/cgroup{running.board.ok(f'cut -d: -f3 /proc/{host}/cgroup').removesuffix('/supervisor')}"
    # of its own, or the one of a lane that small instances share
    hoard, hello = (
        running.board.ok(f"ls -d {groups}/i-{each} 2>/dev/null || ls -d {groups}/i-+*") for each in ("hoard", "hello")
    )
    assert running.board.ok(f"cat {hoard}/memory.max").isdigit()
    with budget("out of memory by the kernel's word", 60):
        # as if it had reached that limit: the kernel ends the component's process, and nothing else
        running.board.ok(f"echo 4096 > {hello}/memory.max")
        killed = f"grep -q 'oom_kill [1-9]' {hello}/memory.events {groups}/memory.events"
        running.board.ok(f"for n in $(seq 100); do {killed} && exit 0; sleep 0.2; done; exit 1")
        running.answers(before)
    assert running.pid("fleet-host") == host
    assert int(running.board.ok(f"cat {hello}/memory.max")) > 4096, "its new process has its limit again"
    running.operator.fleet("remove", "hoard", "--group", running.group)


def test_a_tampered_artifact_is_refused(running: Joined) -> None:
    before, update = running.answering(), running.next()
    with budget("a tampered artifact", 60):
        running.operator.tamper(running.operator.publish(update))
        code, said = running.operator.deploy(f"hello@{update.version}", group=running.group)
    assert code != 0, said
    assert "hash" in running.board.ok("fleet-agent why", timeout_s=120)
    running.answers(before)


def test_too_little_room_is_a_refusal_and_nothing_else(running: Joined) -> None:
    before, update = running.answering(), running.next()
    # less than what the agent keeps in reserve, enough for its own records
    running.board.ok("fallocate -l $(($(df --output=avail -B1 / | tail -1) - 6000000)) /fill")
    with budget("too little room", 60):
        running.offered(update)
        running.operator.until(
            "the operator hears of it",
            lambda: "no-space" in running.operator.fleet("why", running.device, "--limit", "5") or None,
        )
    running.answers(before)
    running.board.ok("rm -f /fill && sync")


def test_a_full_disk_stops_nothing_and_is_caught_up_with(running: Joined) -> None:
    # not even a record can be written: the board takes nothing new, says so, and goes on by itself when there is room
    before, update = running.answering(), running.next()
    running.board.ok("dd if=/dev/zero of=/fill bs=64k 2>/dev/null; true", timeout_s=240)
    with budget("a full disk", 90):
        running.offered(update)
        running.operator.until(
            "the operator hears of it", lambda: "full" in running.operator.device(running.device).problem or None
        )
        running.answers(before)
    running.board.ok("rm -f /fill && sync")
    with budget("and the same once there is room", 90):
        running.operator.succeeded(group=running.group)
        running.answers(update.answer)
