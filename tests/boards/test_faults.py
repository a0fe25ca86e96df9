"""Processes that die and hang, components that misbehave, a full disk: what ran before still answers afterwards."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Joined
from stages import budget

from deploy.riscv64 import build as riscv64

# arm64 always; riscv64 has the same code and takes the same time again
ARCHITECTURES = ["arm64", *(["riscv64"] if os.environ.get("FULL") and riscv64.finished() else [])]
GUESTS = Path(__file__).parents[2] / "components/guests"
HOARD = 'name = "hoard"\nversion = "1.0.0"\ntrigger = "http"\n[limits]\nmemory = "16MiB"\n[health]\nprobation = "2s"\n'


@pytest.fixture(scope="module", params=ARCHITECTURES)
def scene(request: pytest.FixtureRequest, joined: Callable[[str, str], Joined]) -> Joined:
    made = joined(str(request.param), f"faults-{request.param}")
    # patience for the tests; the shipped unit's is two minutes
    made.board.ok("mkdir -p /etc/systemd/system/fleet-agent.service.d")
    made.board.put("/etc/systemd/system/fleet-agent.service.d/test.conf", b"[Service]\nWatchdogSec=20\n")
    made.board.ok("systemctl daemon-reload && systemctl restart fleet-agent", timeout_s=120)
    made.operator.online(made.device)
    return made


def test_an_agent_that_hangs_is_replaced_and_nobody_notices(scene: Joined) -> None:
    before, host = scene.pid("fleet-agent"), scene.pid("fleet-host")
    with budget("watchdog", 60):
        scene.board.ok(f"kill -STOP {before}")
        deadline = time.monotonic() + 120
        while scene.pid("fleet-agent") in {before, "0"}:
            assert scene.operator.version(scene.board.port) == "1"
            assert time.monotonic() < deadline, "the watchdog did not end it"
        assert scene.pid("fleet-host") == host
        scene.operator.online(scene.device)


def test_a_killed_host_comes_back_with_what_was_committed(scene: Joined) -> None:
    agent = scene.pid("fleet-agent")
    with budget("host killed", 60):
        scene.board.ok(f"kill -KILL {scene.pid('fleet-host')}")
        scene.answers("1")
    assert scene.pid("fleet-agent") == agent, "the agent outlives the host"


def test_systemctl_stop_stops_everything_and_start_brings_it_back(scene: Joined) -> None:
    with budget("systemctl stop and start", 60):
        scene.board.ok("systemctl stop fleet-agent fleet-host", timeout_s=120)
        assert scene.board.ok("ps -eo user:20,args | grep -c '[f]leet-' || true") == "0"
        scene.board.ok("systemctl start fleet-host fleet-agent", timeout_s=180)
        scene.answers("1")


def test_what_takes_all_memory_fails_alone(scene: Joined) -> None:
    # a component that takes what it can get at each request, beside one that goes on answering
    component = scene.operator.wat(GUESTS / "hoard.wat", HOARD)
    with budget("a component that hoards memory", 90):
        scene.operator.pushed(component, group=scene.group, instance="hoard")
        for _ in range(3):
            assert scene.board.asks_itself("/hoard/") == "", "it traps as soon as it is refused more"
        assert scene.operator.version(scene.board.port) == "1"
    host = scene.pid("fleet-host")
    # the kernel's own limit, around all that the instance's lanes take together
    groups = f"/sys/fs/cgroup{scene.board.ok(f'cut -d: -f3 /proc/{host}/cgroup').removesuffix('/supervisor')}"
    # of its own, or the one of a lane that small instances share
    hoard, hello = (
        scene.board.ok(f"ls -d {groups}/i-{each} 2>/dev/null || ls -d {groups}/i-+*") for each in ("hoard", "hello")
    )
    assert scene.board.ok(f"cat {hoard}/memory.max").isdigit()
    with budget("out of memory by the kernel's word", 60):
        # as if it had reached that limit: the kernel ends the component's process, and nothing else
        scene.board.ok(f"echo 4096 > {hello}/memory.max")
        killed = f"grep -q 'oom_kill [1-9]' {hello}/memory.events {groups}/memory.events"
        scene.board.ok(f"for n in $(seq 100); do {killed} && exit 0; sleep 0.2; done; exit 1")
        scene.answers("1")
    assert scene.pid("fleet-host") == host
    assert int(scene.board.ok(f"cat {hello}/memory.max")) > 4096, "its new process has its limit again"
    scene.operator.fleet("remove", "hoard", "--group", scene.group)


def test_a_tampered_artifact_is_refused(scene: Joined) -> None:
    # bytes that this board has not fetched before
    with budget("a tampered artifact", 60):
        scene.operator.tamper(scene.operator.publish("v3.wasm", version="9.0.0"))
        code, said = scene.operator.deploy("hello@9.0.0", group=scene.group)
    assert code != 0, said
    assert "hash" in scene.board.ok("fleet-agent why", timeout_s=120)
    scene.answers("1")


def offered(scene: Joined, version: str) -> None:
    """Push what the board has not fetched before, and do not wait for it."""
    component = scene.operator.variant("v2.wasm", int(version.replace(".", "")))
    code, said = scene.operator.push(component, "--version", version, "--detach", group=scene.group)
    assert code == 0, said


def test_too_little_room_is_a_refusal_and_nothing_else(scene: Joined) -> None:
    # less than what the agent keeps in reserve, enough for its own records
    scene.board.ok("fallocate -l $(($(df --output=avail -B1 / | tail -1) - 6000000)) /fill")
    try:
        with budget("too little room", 60):
            offered(scene, "4.0.1")
            scene.operator.until(
                "the operator hears of it",
                lambda: "no-space" in scene.operator.fleet("why", scene.device, "--limit", "5") or None,
            )
        scene.answers("1")
    finally:
        scene.board.ok("rm -f /fill && sync")


def test_a_full_disk_stops_nothing_and_is_caught_up_with(scene: Joined) -> None:
    # not even a record can be written: the board takes nothing new, says so, and goes on by itself when there is room
    scene.board.ok("dd if=/dev/zero of=/fill bs=64k 2>/dev/null; true", timeout_s=240)
    try:
        with budget("a full disk", 90):
            offered(scene, "4.0.2")
            scene.operator.until(
                "the operator hears of it", lambda: "full" in scene.operator.device(scene.device).problem or None
            )
            scene.answers("1")
    finally:
        scene.board.ok("rm -f /fill && sync")
    with budget("and the same once there is room", 90):
        scene.operator.succeeded(group=scene.group)
        scene.answers("2")
