"""A network that fails in every way that networks do: what runs goes on, and what was missed is caught up with."""

import os
import signal
from collections.abc import Callable

import pytest
from conftest import Joined
from stages import budget

from deploy.riscv64 import build as riscv64

ARCHITECTURES = ["arm64", *(["riscv64"] if os.environ.get("FULL") and riscv64.finished() else [])]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def scene(request: pytest.FixtureRequest, joined: Callable[[str, str], Joined]) -> Joined:
    return joined(str(request.param), f"network-{request.param}")


def offered(scene: Joined, component: str) -> None:
    """Push without waiting: the board cannot hear of it."""
    code, said = scene.operator.push(component, "--detach", group=scene.group)
    assert code == 0, said


def caught_up(scene: Joined, version: str, agent: str) -> None:
    scene.operator.succeeded(group=scene.group)
    scene.answers(version)
    scene.operator.online(scene.device)
    assert scene.pid("fleet-agent") == agent, "the agent lived through it"


def test_with_the_cable_out_it_answers_and_catches_up_later(scene: Joined) -> None:
    agent = scene.pid("fleet-agent")
    with budget("cable out and in", 90):
        scene.board.set_link(up=False)
        offered(scene, "v2.wasm")
        assert scene.board.asks_itself("/hello/") == "hello from v1"
        scene.board.set_link(up=True)
        caught_up(scene, "2", agent)


def test_a_black_hole_is_noticed_and_left(scene: Joined) -> None:
    # the cable is in and the carrier is there, and nothing arrives anywhere
    agent = scene.pid("fleet-agent")
    try:
        with budget("black hole", 150):
            scene.board.ok("tc qdisc add dev eth0 root netem loss 100%")
            offered(scene, "v1.wasm")
            scene.operator.offline(scene.device)
            assert scene.board.asks_itself("/hello/") == "hello from v2"
            scene.board.ok("tc qdisc del dev eth0 root")
            caught_up(scene, "1", agent)
    finally:
        scene.board.run("tc qdisc del dev eth0 root")


def test_64_kbit_a_second_and_lost_packets_are_enough(scene: Joined) -> None:
    agent = scene.pid("fleet-agent")
    scene.board.ok("tc qdisc add dev eth0 root netem delay 300ms loss 5% rate 64kbit")
    try:
        with budget("an update over 64 kbit/s with loss", 150):
            scene.operator.pushed("v2.wasm", group=scene.group)
    finally:
        scene.board.ok("tc qdisc del dev eth0 root")
    caught_up(scene, "2", agent)


def test_without_a_broker_the_update_comes_by_https(scene: Joined) -> None:
    agent, broker = scene.pid("fleet-agent"), scene.operator.broker()
    # hung, not ended: the server would start an ended one again at once
    os.kill(broker, signal.SIGSTOP)
    try:
        with budget("an update without the broker", 120):
            offered(scene, "v1.wasm")
            scene.answers("1")
    finally:
        os.kill(broker, signal.SIGCONT)
    caught_up(scene, "1", agent)


def test_a_broker_that_died_is_found_again(scene: Joined) -> None:
    agent = scene.pid("fleet-agent")
    os.kill(scene.operator.broker(), signal.SIGKILL)
    with budget("an update after the broker died", 90):
        scene.operator.pushed("v2.wasm", group=scene.group)
    caught_up(scene, "2", agent)
