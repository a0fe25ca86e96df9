"""A network that fails in every way that networks do: what runs goes on, and what was missed is caught up with."""

import os
import signal

from conftest import Joined
from operator_side import Update
from stages import budget


def caught_up(running: Joined, update: Update, agent: str) -> None:
    running.operator.succeeded(group=running.group)
    running.answers(update.answer)
    running.operator.online(running.device)
    assert running.pid("fleet-agent") == agent, "the agent lived through it"


def test_with_the_cable_out_it_answers_and_catches_up_later(running: Joined) -> None:
    agent, before, update = running.pid("fleet-agent"), running.answering(), running.next()
    with budget("cable out and in", 90):
        running.board.set_link(up=False)
        running.offered(update)
        assert running.board.asks_itself("/hello/") == f"hello from v{before}"
        running.board.set_link(up=True)
        caught_up(running, update, agent)


def test_a_black_hole_is_noticed_and_left(running: Joined) -> None:
    # the cable is in and the carrier is there, and nothing arrives anywhere
    agent, before, update = running.pid("fleet-agent"), running.answering(), running.next()
    with budget("black hole", 150):
        running.board.ok("tc qdisc add dev eth0 root netem loss 100%")
        running.offered(update)
        running.operator.offline(running.device)
        assert running.board.asks_itself("/hello/") == f"hello from v{before}"
        running.board.ok("tc qdisc del dev eth0 root")
        caught_up(running, update, agent)


def test_64_kbit_a_second_and_lost_packets_are_enough(running: Joined) -> None:
    agent, update = running.pid("fleet-agent"), running.next()
    running.board.ok("tc qdisc add dev eth0 root netem delay 300ms loss 5% rate 64kbit")
    with budget("an update over 64 kbit/s with loss", 150):
        running.operator.pushed(update, group=running.group)
    running.board.ok("tc qdisc del dev eth0 root")
    caught_up(running, update, agent)


def test_the_conversation_goes_by_mqtt_over_64_kbit_a_second_and_lost_packets(running: Joined) -> None:
    update = running.next()
    running.board.ok("tc qdisc add dev eth0 root netem delay 300ms loss 5% rate 64kbit")
    with budget("connect, presence, reports and an update by MQTT", 300):
        running.board.ok("systemctl restart fleet-agent", timeout_s=180)
        running.operator.online(running.device)
        agent = running.pid("fleet-agent")
        running.operator.pushed(update, group=running.group)
    said = running.board.ok(f"journalctl -o cat _PID={agent}")
    running.board.ok("tc qdisc del dev eth0 root")
    assert "connected to the broker" in said
    assert "over HTTPS" not in said, "the conversation has never left the broker"
    caught_up(running, update, agent)


def test_without_a_broker_the_update_comes_by_https(running: Joined) -> None:
    agent, broker, update = running.pid("fleet-agent"), running.operator.broker(), running.next()
    # hung, not ended: the server would start an ended one again at once
    os.kill(broker, signal.SIGSTOP)
    try:
        with budget("an update without the broker", 120):
            running.offered(update)
            running.answers(update.answer)
    finally:
        os.kill(broker, signal.SIGCONT)
    caught_up(running, update, agent)


def test_a_broker_that_died_is_found_again(running: Joined) -> None:
    agent, update = running.pid("fleet-agent"), running.next()
    os.kill(running.operator.broker(), signal.SIGKILL)
    with budget("an update after the broker died", 90):
        running.operator.pushed(update, group=running.group)
    caught_up(running, update, agent)
