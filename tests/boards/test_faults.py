"""What goes wrong around a board: power, network, server, processes, disk. What ran before still answers afterwards."""

import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import rig
from conftest import enrol
from operator_side import OperatorSide, budget

from deploy.riscv64 import build as riscv64

# arm64 always; riscv64 has the same code and takes the same time again
ARCHITECTURES = ["arm64", *(["riscv64"] if os.environ.get("FULL") and riscv64.finished() else [])]
SEED = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(1 << 30)
# seconds after the push began: while it is offered, fetched, compiled, swapped, on probation, committed
MOMENTS = [0.5, 2.0, 4.0, 7.0, 11.0, 16.0, *(round(random.Random(SEED).uniform(0.5, 20.0), 1) for _ in range(2))]


@dataclass
class Scene:
    board: rig.Board
    device: str
    group: str
    operator: OperatorSide

    def answers(self, version: str) -> None:
        self.operator.answers(self.board.port, version, timeout_s=300)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def scene(
    request: pytest.FixtureRequest, new_board: Callable[..., rig.Board], operator: OperatorSide
) -> Iterator[Scene]:
    architecture = str(request.param)
    board = new_board(architecture, f"faults-{architecture}")
    group = f"faults-{architecture}"
    device = enrol(board, operator, group)
    operator.pushed("v1.wasm", group=group)
    made = Scene(board, device, group, operator)
    made.answers("1")
    # patience for the tests; the shipped unit's is two minutes
    board.ok("mkdir -p /etc/systemd/system/fleet-agent.service.d")
    board.put("/etc/systemd/system/fleet-agent.service.d/test.conf", b"[Service]\nWatchdogSec=20\n")
    board.ok("systemctl daemon-reload && systemctl restart fleet-agent", timeout_s=120)
    operator.online(device)
    return made


def pid_of(board: rig.Board, unit: str) -> str:
    return board.ok(f"systemctl show --property=MainPID --value {unit}")


def test_an_agent_that_hangs_is_replaced_and_nobody_notices(scene: Scene) -> None:
    before, host = pid_of(scene.board, "fleet-agent"), pid_of(scene.board, "fleet-host")
    scene.board.ok(f"kill -STOP {before}")
    deadline = time.monotonic() + 120
    while pid_of(scene.board, "fleet-agent") in {before, "0"}:
        assert scene.operator.version(scene.board.port) == "1"
        assert time.monotonic() < deadline, "the watchdog did not end it"
    assert pid_of(scene.board, "fleet-host") == host
    scene.operator.online(scene.device)


def test_a_killed_host_comes_back_with_what_was_committed(scene: Scene) -> None:
    agent = pid_of(scene.board, "fleet-agent")
    scene.board.ok(f"kill -KILL {pid_of(scene.board, 'fleet-host')}")
    scene.answers("1")
    assert pid_of(scene.board, "fleet-agent") == agent, "the agent outlives the host"


def test_systemctl_stop_stops_everything_and_start_brings_it_back(scene: Scene) -> None:
    scene.board.ok("systemctl stop fleet-agent fleet-host", timeout_s=120)
    assert scene.board.ok("ps -eo user:20,args | grep -c '[f]leet-' || true") == "0"
    scene.board.ok("systemctl start fleet-host fleet-agent", timeout_s=180)
    scene.answers("1")


def test_with_the_cable_out_it_answers_and_catches_up_later(scene: Scene) -> None:
    scene.board.set_link(up=False)
    code, said = scene.operator.push("v2.wasm", "--detach", group=scene.group)
    assert code == 0, said
    scene.board.set_link(up=True)
    scene.answers("2")


def test_a_tampered_artifact_is_refused(scene: Scene) -> None:
    # bytes that this board has not fetched before
    scene.operator.tamper(scene.operator.publish("v3.wasm", version="9.0.0"))
    code, said = scene.operator.deploy("hello@9.0.0", group=scene.group)
    assert code != 0, said
    assert "hash" in scene.board.ok("fleet-agent why", timeout_s=120)
    scene.answers("2")


def test_a_board_whose_agent_is_disabled_still_runs_after_a_power_cut(scene: Scene) -> None:
    scene.board.ok("systemctl disable --now fleet-agent.service fleet-agent.path && sync", timeout_s=120)
    scene.board.pull_the_plug()
    with budget("boot without the agent", 120):
        scene.board.start()
        scene.answers("2")
    assert scene.board.run("systemctl is-active fleet-agent").text == "inactive"
    scene.board.ok("systemctl enable --now fleet-agent.path fleet-agent.service", timeout_s=180)
    scene.operator.online(scene.device)


def test_a_full_disk_is_a_refusal_and_nothing_else(scene: Scene) -> None:
    scene.board.ok("fallocate -l $(df --output=avail -B1 / | tail -1) /fill || dd if=/dev/zero of=/fill bs=1M; true")
    try:
        code, said = scene.operator.push("v1.wasm", "--version", "1.0.8", group=scene.group)
        assert code != 0, said
        scene.answers("2")
    finally:
        scene.board.ok("rm -f /fill")


def test_it_holds_together_as_raspberry_pi_os_comes(scene: Scene) -> None:
    # no memory cgroup, no Landlock
    scene.board.shut_down()
    scene.board.append = "lsm= cgroup_disable=memory"
    try:
        scene.board.start()
        scene.answers("2")
        said = scene.board.run("fleet-host check", timeout_s=120).text
        layers = {line.split()[0]: line.split()[1] for line in said.splitlines() if line.startswith("  ")}
        assert layers.pop("landlock") == "NO"
        assert set(layers.values()) == {"yes"}, said
    finally:
        scene.board.append = ""


@pytest.mark.parametrize(("number", "moment_s"), list(enumerate(MOMENTS)))
def test_the_plug_is_pulled_during_an_update(scene: Scene, number: int, moment_s: float) -> None:
    component, answer = (("v1.wasm", "1"), ("v2.wasm", "2"))[number % 2]
    code, said = scene.operator.push(component, "--version", f"3.0.{number}", "--detach", group=scene.group)
    assert code == 0, said
    time.sleep(moment_s)  # the moment is the point
    scene.board.pull_the_plug()
    with budget(f"boot after the plug at {moment_s} s (SEED={SEED})", 120):
        scene.board.start()
        # either the old one or the new one, never neither
        deadline = time.monotonic() + 300
        while scene.operator.version(scene.board.port) not in {"1", "2"}:
            assert time.monotonic() < deadline, "nothing answers after the power cut"
    # and then the update comes to its end: here the new one is sound, so it is the one that stays
    scene.operator.settled(scene.device)
    scene.answers(answer)
