"""wasi:gpio over the real host and its sandboxed workers, with a stand-in for the kernel's chips below its calls."""

import os
import signal

import pytest
import support
from gpio_chips import Chips
from host_processes import lanes_of

from agent.host.ipc import host_api
from fleet.protocol.hardware import GpioLine, Hardware
from fleet.protocol.manifest import Grants
from tests.eventually import eventually

RELAY = GpioLine(name="relay", chip="gpiochip0", line=17, direction="output")
DOOR = GpioLine(name="door", chip="gpiochip0", line=4, pull="up")
PUMP = GpioLine(name="pump", chip="gpiochip1", line=0, direction="output", active="low", safe="high")
ACTIVE_HIGH, ACTIVE_LOW, PULL_UP, ACTIVE, INACTIVE, OUTPUT = (bytes([1 << bit]) for bit in (0, 1, 2, 4, 5, 7))
NOT_ALLOWED, MODE_NOT_ALLOWED, NOT_SUPPORTED, INVALID, OTHER = 502, 503, 507, 508, 509


def granted(*lines):
    return Grants(interfaces=("wasi:gpio",), hardware=Hardware(gpio=lines))


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A host with two chips."""
    directory = tmp_path_factory.mktemp("board")
    chips = Chips(directory / "chips", gpiochip0=28, gpiochip1=2)
    with support.shared_host(directory, env=chips.env) as host:
        host.chips = chips
        yield host


@pytest.fixture
def chips(board):
    """Its chips; whatever a test starts is stopped after it."""
    yield board.chips
    for one in board.ask(host_api.Status).instances:
        board.ask(host_api.Stop, instance=one.instance)


@pytest.fixture
def web(board, chips):
    """Start a component with lines, and return its port."""

    def start(*lines, instance="web", generation=1, port=0, **rest):
        port = port or support.free_port()
        how = {name: rest.pop(name) for name in ("probation",) if name in rest}
        run = support.a_run(instance, generation, port=port, grants=granted(*lines), **rest)
        reply = board.start("pins", run, **how)
        assert isinstance(reply, host_api.Started), reply
        return port

    return start


def ask(port, method, label, flags=b""):
    head = f"{method} /{label} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(flags)}\r\n\r\n"
    status, _, answer = support.http(port, head.encode() + flags)
    return (status, answer.decode()) if status in {200, OTHER} else status


def test_a_component_sets_and_reads_the_lines_that_it_is_granted(web, chips):
    port = web(RELAY, DOOR)
    assert not chips.is_high(17)
    assert ask(port, "PUT", "relay") == (200, "active")
    assert chips.is_high(17)
    assert ask(port, "OPTIONS", "relay") == (200, "active")
    assert ask(port, "POST", "relay") == (200, "inactive")
    assert not chips.is_high(17)
    chips.drive(4, "high")
    assert ask(port, "GET", "door") == (200, "active")
    chips.drive(4, "low")
    assert ask(port, "GET", "door", PULL_UP) == (200, "inactive")
    assert chips.flags(4) == 1 << 2 | 1 << 8


def test_active_is_what_the_grant_says(web, chips):
    port = web(PUMP)
    assert chips.is_high(0, "gpiochip1")
    assert ask(port, "OPTIONS", "pump", ACTIVE_LOW) == (200, "inactive")
    assert ask(port, "PUT", "pump") == (200, "active")
    assert not chips.is_high(0, "gpiochip1")
    assert ask(port, "OPTIONS", "pump", INACTIVE) == (200, "inactive"), "a flag of get sets it"


def test_what_no_grant_names_in_this_way_is_denied_counted_and_named_once(board, web, chips):
    port = web(RELAY, DOOR)
    assert ask(port, "PUT", "other") == NOT_ALLOWED
    assert ask(port, "PUT", "x" * 4000) == NOT_ALLOWED
    assert ask(port, "PUT", "door") == MODE_NOT_ALLOWED
    assert ask(port, "GET", "relay") == MODE_NOT_ALLOWED
    assert ask(port, "PUT", "relay", ACTIVE_LOW) == MODE_NOT_ALLOWED
    assert board.health("web").denials == 5
    assert sum("wasi:gpio/digital" in line and "is denied" in line for line in board.lines_of("web")) == 1
    assert not chips.is_high(17)
    assert ask(port, "GET", "door", bytes([4 | 8])) == INVALID
    assert ask(port, "GET", "door", OUTPUT) == INVALID
    assert ask(port, "LOCK", "door") == NOT_SUPPORTED
    assert board.health("web").restarts == 0


def test_without_lines_every_pin_is_denied_and_without_the_grant_nothing_starts(board, web):
    assert ask(web(), "GET", "door") == NOT_ALLOWED
    grants = Grants(hardware=Hardware(gpio=(DOOR,)))
    reply = board.start("pins", support.a_run("other", 1, grants=grants))
    assert isinstance(reply, host_api.Failed)
    assert "wasi:gpio/digital@0.2.0" in reply.message


def test_a_guest_that_opens_pins_without_end_gets_no_more(board, web):
    port = web(DOOR)
    for _ in range(2):
        assert ask(port, "MOVE", "door") == (OTHER, "64 pins are open: drop some")
    assert board.health("web").restarts == 0


def test_a_line_keeps_its_level_when_its_worker_is_killed(board, web, chips):
    port = web(RELAY)
    assert ask(port, "PUT", "relay") == (200, "active")
    (worker,) = lanes_of(board)
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: worker not in (lanes := lanes_of(board)) and lanes, "another worker")
    assert ask(port, "OPTIONS", "relay") == (200, "active")
    assert chips.is_high(17)


@pytest.mark.parametrize("swap", ["replace", "overlap"])
def test_a_line_keeps_its_level_across_a_swap_and_a_rollback(board, web, chips, swap):
    port = web(RELAY, PUMP, swap=swap)
    assert ask(port, "PUT", "relay") == (200, "active")
    assert ask(port, "PUT", "pump") == (200, "active")
    web(RELAY, DOOR, generation=2, port=port, swap=swap, probation=True)
    assert chips.is_high(17)
    assert chips.is_high(0, "gpiochip1"), "safe, as the new version does not have it"
    assert ask(port, "OPTIONS", "relay") == (200, "active")
    reply = board.ask(host_api.Revert, instance="web", generation=2)
    assert isinstance(reply, host_api.Started), reply
    assert ask(port, "OPTIONS", "relay") == (200, "active")
    assert ask(port, "OPTIONS", "pump") == (200, "inactive")
    chips.await_free(4)  # only the version that was left had it
    web(DOOR, generation=3, port=port, swap=swap, probation=True)
    assert chips.is_held(17)
    assert isinstance(board.ask(host_api.Commit, instance="web", generation=3), host_api.Done)
    chips.await_free(17)
    assert not chips.is_high(17)


def test_a_line_goes_to_its_safe_level_and_is_released_when_its_instance_is_stopped(board, web, chips):
    port = web(RELAY, PUMP)
    assert ask(port, "PUT", "relay") == (200, "active")
    assert ask(port, "PUT", "pump") == (200, "active")
    board.ask(host_api.Stop, instance="web")
    assert not chips.is_high(17)
    assert chips.is_high(0, "gpiochip1")
    chips.await_free(17)
    chips.await_free(0, "gpiochip1")


def test_a_line_goes_to_its_safe_level_in_quarantine_and_stays_with_its_instance(board, web, chips):
    port = web(RELAY)
    assert ask(port, "PUT", "relay") == (200, "active")
    while board.health("web").state != "quarantined":
        assert chips.is_high(17)
        for worker in lanes_of(board):
            os.kill(worker, signal.SIGKILL)
        board.event(lambda event: isinstance(event, host_api.Changed))
    eventually(lambda: not chips.is_high(17), "the line is at its safe level")
    assert chips.is_held(17)


def test_a_line_that_somebody_else_has_is_refused_in_words(board, web, chips):
    web(RELAY)
    same = GpioLine(name="lamp", chip="gpiochip0", line=17, direction="output")
    reply = board.start("pins", support.a_run("other", 1, grants=granted(same)))
    assert (type(reply), reply.code) == (host_api.Failed, "start-failed")
    assert "GPIO line gpiochip0:17 as output is held by web: stop that first" in reply.message
    with chips.taken(4):
        reply = board.start("pins", support.a_run("other", 1, grants=granted(DOOR)))
    assert (type(reply), reply.code) == (host_api.Failed, "start-failed")
    assert "gpiochip0:4 as input is in use by another program or driver of this device" in reply.message
    assert isinstance(board.start("pins", support.a_run("other", 1, grants=granted(DOOR))), host_api.Started)


@pytest.mark.parametrize(
    ("chip", "line", "said"),
    [
        ("gpiochip7", 1, "this device has no /dev/gpiochip7 now: grant a chip that it has"),
        ("gpiochip0", 99, "/dev/gpiochip0 has no such line"),
    ],
)
def test_a_line_that_the_device_does_not_have_is_refused_in_words(board, chips, chip, line, said):
    wanted = GpioLine(name="x", chip=chip, line=line)
    reply = board.start("pins", support.a_run("web", 1, grants=granted(RELAY, wanted)))
    assert (type(reply), reply.code) == (host_api.Failed, "start-failed")
    assert said in reply.message
    chips.await_free(17)  # the line that it had got before


def test_a_chip_that_the_hosts_service_keeps_closed_is_refused_with_the_command_that_opens_it(board, chips):
    with chips.closed():
        reply = board.start("pins", support.a_run("web", 1, grants=granted(RELAY)))
    assert (type(reply), reply.code) == (host_api.Failed, "start-failed")
    assert "the host may not open /dev/gpiochip0: 'fleet-host check' prints the drop-in" in reply.message


def test_a_version_that_does_not_start_leaves_the_lines_of_the_one_that_runs_as_they_were(board, web, chips):
    port = web(RELAY)
    assert ask(port, "PUT", "relay") == (200, "active")
    inverted = GpioLine(name="relay", chip="gpiochip0", line=17, direction="output", active="low")
    missing = GpioLine(name="x", chip="gpiochip0", line=99)
    reply = board.start("pins", support.a_run("web", 2, port=port, grants=granted(inverted, DOOR, missing)))
    assert isinstance(reply, host_api.Failed)
    assert ask(port, "OPTIONS", "relay") == (200, "active")
    assert chips.is_high(17)
    assert ask(port, "DELETE", "relay") == (200, "inactive")
    assert not chips.is_high(17)
    chips.await_free(4)


def test_lines_go_to_their_safe_levels_before_the_host_ends_in_order(tmp_path):
    chips = Chips(tmp_path / "chips", gpiochip0=28)
    host = support.Host(tmp_path, env=chips.env)
    port = support.free_port()
    assert isinstance(host.start("pins", support.a_run("web", 1, port=port, grants=granted(RELAY))), host_api.Started)
    assert ask(port, "PUT", "relay") == (200, "active")
    assert chips.is_high(17)
    host.close()
    assert not chips.is_high(17)
