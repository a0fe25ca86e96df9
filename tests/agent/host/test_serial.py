"""wasmfleet:serial over the real host and its sandboxed workers: a pseudo-terminal has the other end of each port."""

import os
import select
import signal
import termios

import pytest
import support
from host_processes import lanes_of

from agent.host.ipc import host_api
from fleet.protocol.hardware import Hardware, SerialPort
from fleet.protocol.manifest import Grants, Limits
from tests.agent.host.serial_peer import Peer
from tests.eventually import eventually

METER = SerialPort(name="meter", baud=19200, stop_bits=2)
NOT_GRANTED, GONE, OTHER = 500, 501, 502


@pytest.fixture
def peer():
    made = Peer()
    yield made
    made.close()


@pytest.fixture
def start(host):
    """Start a component with serial ports, and return its port."""

    def start(node, *ports, instance="web", generation=1, port=0, limits=None, **rest):
        port = port or support.free_port()
        grants = Grants(interfaces=("wasmfleet:serial",), hardware=Hardware(serial=ports))
        run = support.a_run(
            instance, generation, port=port, grants=grants, limits=limits, serial={"meter": node}, **rest
        )
        reply = host.start("serial", run)
        return port if isinstance(reply, host_api.Started) else reply

    return start


def ask(port, method="POST", data=b"", name="meter"):
    head = f"{method} /{name} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    status, _, answer = support.http(port, head.encode() + data)
    return (status, answer) if status in {200, 201, OTHER} else status


def test_a_component_talks_to_the_port_that_it_is_granted_at_its_speed(start, peer):
    port = start(peer.node, METER)
    answering = peer.answer(5, b"\x00\xff\r\n\x03\x11")
    assert ask(port, data=b"\x01\x04\x0a\x0d\x1a") == (200, b"\x00\xff\r\n\x03\x11"), "bytes as they are"
    answering.join()
    settings = peer.settings()
    assert settings[2] & (termios.PARENB | termios.CSIZE | termios.CSTOPB) == termios.CS8 | termios.CSTOPB
    assert settings[4:6] == [termios.B19200] * 2


def test_a_read_waits_for_its_time_and_no_longer(start, peer):
    port = start(peer.node, METER)
    assert ask(port) == (200, b"")
    assert ask(port, "GET") == (200, b"")
    peer.write(b"late")
    assert ask(port) == (200, b"late")


def test_what_was_not_read_is_dropped_when_asked_and_for_a_new_worker(host, start, peer):
    port = start(peer.node, METER)
    peer.write(b"old")
    assert ask(port, "DELETE") == (200, b"")
    assert ask(port, "GET") == (200, b"")
    peer.write(b"of the worker before")
    (worker,) = lanes_of(host)
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: worker not in (lanes := lanes_of(host)) and lanes, "another worker")
    assert ask(port) == (200, b"")


def test_a_port_stays_open_across_a_swap(host, start, peer):
    port = start(peer.node, METER, swap="replace")
    start(peer.node, METER, generation=2, port=port, swap="replace")
    assert not hung_up(peer)
    answering = peer.answer(1, b"there")
    assert ask(port, data=b"?") == (200, b"there")
    answering.join()


def hung_up(peer):
    poll = select.poll()
    poll.register(peer.fd, 0)
    return bool(poll.poll(0))


def test_a_name_that_is_not_granted_is_denied_and_counted(host, start, peer):
    port = start(peer.node, METER)
    assert ask(port, name="other") == NOT_GRANTED
    assert ask(port, name="") == NOT_GRANTED
    assert host.health("web").denials == 2
    assert ask(start(peer.node, instance="none")) == NOT_GRANTED


def test_a_guest_that_opens_without_end_or_writes_what_nobody_reads_is_held(host, start, peer):
    port = start(peer.node, METER, limits=Limits(idle_ms=500))
    assert ask(port, data=b"x" * 65_536) == (201, b""), "nobody reads, and it took what it had room for"
    assert ask(port, data=b"x" * 65_537) == (OTHER, b"65537 bytes in one call, 65536 are allowed")
    assert ask(port, "MOVE") == (OTHER, b"64 handles are open: drop some")
    assert host.health("web").restarts == 0


def test_a_port_that_goes_away_is_gone_and_opened_again_for_the_next_worker(host, start, peer):
    port = start(peer.node, METER)
    peer.hang_up()
    assert ask(port) == GONE
    other = Peer()
    try:
        start(other.node, METER, generation=2, port=port, swap="replace")
        answering = other.answer(1, b"back")
        assert ask(port, data=b"?") == (200, b"back")
        answering.join()
    finally:
        other.close()


@pytest.mark.parametrize(
    ("node", "ports", "said"),
    [
        (
            "/dev/ttyNONE9",
            (METER,),
            "this device has no /dev/ttyNONE9 now: plug it in, or name another in policy.serial",
        ),
        ("/dev/null", (METER,), "/dev/null is no serial port: name another in policy.serial"),
        ("/etc/passwd", (METER,), "policy.serial: meter: '/etc/passwd' is no device"),
        ("/dev/../etc/passwd", (METER,), "is no device: write one such as /dev/ttyUSB0"),
        ("", (SerialPort(name="meter", baud=9601),), "serial[1].baud: 9601 is none of 300,"),
    ],
)
def test_what_is_no_port_is_refused_in_words(start, node, ports, said):
    reply = start(node, *ports)
    assert isinstance(reply, host_api.Failed)
    assert said in reply.message


def test_a_driver_that_cannot_do_what_is_granted_is_named(start, peer):
    start(peer.node, METER)
    reply = start(peer.node, SerialPort(name="meter", baud=9600, parity="even"), generation=2, swap="replace")
    assert isinstance(reply, host_api.Failed)
    assert f"the driver of {peer.node} cannot do this: grant another speed or frame" in reply.message


def test_a_driver_without_rs485_is_named(start, peer):
    reply = start(peer.node, SerialPort(name="meter", baud=9600, rs485=True))
    assert isinstance(reply, host_api.Failed)
    assert f"the driver of {peer.node} has no RS-485: leave rs485 out" in reply.message


def test_one_device_under_two_names_is_one_port(host, start, peer):
    start(peer.node, METER)
    run = support.a_run(
        "other",
        1,
        grants=Grants(
            interfaces=("wasmfleet:serial",), hardware=Hardware(serial=(SerialPort(name="modem", baud=9600),))
        ),
        serial={"modem": peer.node},
    )
    reply = host.start("serial", run)
    assert isinstance(reply, host_api.Failed)
    assert f"{peer.node} is held by web as meter: stop that first" in reply.message


def test_a_worker_without_its_port_waits_for_it_which_is_no_crash(host, start, peer):
    start(peer.node, METER)
    (worker,) = lanes_of(host)
    peer.hang_up()
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: "this device has no" in host.health("web").error, "it says what it waits for")
    assert (host.health("web").state, host.health("web").restarts) == ("backoff", 1), "the kill alone counts"


def test_two_instances_cannot_have_one_port(host, start, peer):
    start(peer.node, METER)
    reply = start(peer.node, METER, instance="other")
    assert "serial port meter at 19200 8N2 is held by web: stop that first" in reply.message
    assert peer.is_exclusive()
    host.ask(host_api.Stop, instance="web")
    assert not peer.is_exclusive(), "other programs may open it again, also where one has it open"
    assert isinstance(start(peer.node, METER, instance="other"), int)


def test_bytes_for_a_port_are_no_writes_to_files(host, peer):
    port = support.free_port()
    grants = Grants(interfaces=("wasi:filesystem", "wasi:io", "wasmfleet:serial"), hardware=Hardware(serial=(METER,)))
    limits = Limits(daily_written_bytes=4096)
    run = support.a_run("web", 1, port=port, grants=grants, limits=limits, serial={"meter": peer.node})
    assert isinstance(host.start("serial", run), host_api.Started)
    for _ in range(3):
        answering = peer.answer(3000, b"ok")
        assert ask(port, data=b"x" * 3000) == (200, b"ok")
        answering.join()
    health = host.health("web")
    assert health.written_bytes < 3000
    assert health.denials == 0
