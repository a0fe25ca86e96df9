"""Hostile guests beyond single calls: refuse to stop, misreport, exceed limits, or leave files behind."""

import os
import select
import socket
import subprocess

import msgspec
import pytest
import support
from host_processes import lanes_of
from support import Grants, Health, Limits

from agent.host.ipc import host_api
from agent.host.supervisor.generation import storage_problem
from agent.update.probation import ProbationSample, Terms, Verdict, judge
from fleet.protocol import bounds

FILES = Grants(interfaces=("wasi:filesystem", "wasi:io"))


@pytest.mark.parametrize("end", ["swap", "stop", "swap and stop"])
def test_a_guest_that_ignores_drain_holds_up_nobody_and_is_ended(host, neighbour, end):
    """It sits in a call of an hour, and is allowed to: neither its successor nor a stop waits for that."""
    port = support.free_port()
    patient = Limits(idle_ms=3_600_000, total_ms=3_600_000)
    grants = Grants(interfaces=("wasi:io", "wasi:clocks"))
    before = set(lanes_of(host))
    host.start("sleep", support.a_run("bad", 1, port=port, grants=grants, limits=patient))
    (lane,) = set(lanes_of(host)) - before
    stuck = socket.create_connection(("127.0.0.1", port), timeout=60)
    stuck.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    support.await_read(stuck)
    pidfd = os.pidfd_open(lane)
    if "swap" in end:
        assert host.start("hello", support.a_run("bad", 2, port=port)).replaced == 1
        # Whoever comes now is the successor's, while the old one still holds its client.
        assert support.http(port)[2] == b"hello\n"
        assert not select.select([stuck], [], [], 0)[0]
        host.ask(host_api.Commit, instance="bad", generation=2)
    if "stop" in end:
        assert isinstance(host.ask(host_api.Stop, instance="bad"), host_api.Done)
        assert select.select([pidfd], [], [], 0)[0], "whoever is stopped is gone"
    assert select.select([pidfd], [], [], 60)[0], "it is ended at the deadline for draining"
    os.close(pidfd)
    assert support.read_answer(stuck)[0] == 502
    stuck.close()
    if end == "swap":
        # Its end is no fault of its successor's.
        health = host.health("bad")
        assert (health.restarts, set(health.calls), health.errors) == (0, {"ok"}, 0)


@pytest.mark.parametrize(("guest", "why"), [("trap", "trapped"), ("error-500", "error-rate")])
def test_a_guest_that_lies_in_its_health_export_is_judged_by_what_it_did(host, neighbour, guest, why):
    port = support.free_port()
    healthy = Health(check=True)
    host.start("hello", support.a_run("bad", 1, port=port, health=healthy))
    for _ in range(20):
        assert support.http(port)[0] == 200
    replaced = ProbationSample.of(host.health("bad"))
    # It says that it is well, and is believed so far.
    assert isinstance(host.start(guest, support.a_run("bad", 2, port=port, health=healthy)), host_api.Started)
    terms = Terms(probation_s=60, min_calls=20)
    assert judge(terms, ProbationSample.of(host.health("bad")), replaced, 1).verdict is Verdict.CONTINUE
    for _ in range(20):
        assert support.http(port)[0] == 500
    judgement = judge(terms, ProbationSample.of(host.health("bad")), replaced, 2)
    assert (judgement.verdict, judgement.code) == (Verdict.ROLL_BACK, why)
    assert host.ask(host_api.Revert, instance="bad", generation=2).generation == 1
    assert support.http(port)[0] == 200


def test_the_environment_is_the_guests_only_where_it_is_granted_and_holds_its_configuration_alone(tmp_path):
    host = support.Host(tmp_path, env={"SOME_TOKEN": "the-hosts-own"})
    try:
        port = support.free_port()
        config = {"greeting": "good morning"}
        run = support.a_run("bad", 1, port=port, config=config)
        assert isinstance(host.start("environment", run), host_api.Started)
        assert support.http(port)[2] == b""
        line = "host: it cannot read its configuration: wasi:cli/environment is not granted"
        assert line in host.ask(host_api.Logs, instance="bad").lines
        granted = Grants(interfaces=("wasi:cli/environment",))
        run = support.a_run("bad", 2, port=port, grants=granted, config=config)
        assert isinstance(host.start("environment", run), host_api.Started)
        status, _, seen = support.http(port)
        assert status == 200
        assert b"greeting" in seen
        assert b"good morning" in seen
        for others in (b"SOME_TOKEN", b"the-hosts-own", b"PATH", b"TOKIO"):
            assert others not in seen
    finally:
        host.close()


def test_a_disk_littered_with_empty_files_ends_in_quarantine(host, neighbour):
    """Not one of them has a byte, so no limit on a file or on what is written meets them."""
    port = support.free_port()
    limits = Limits(storage_bytes=1 << 20, daily_written_bytes=1 << 20)
    run = support.a_run("bad", 1, port=port, grants=FILES, limits=limits)
    assert isinstance(host.start("litters", run), host_api.Started)
    assert [support.http(port)[0] for _ in range(4)] == [200] * 4
    assert len(list((host.state / "data" / "bad" / "0").iterdir())) == 400
    event = host.event(lambda event: isinstance(event, host_api.Changed) and event.state == "quarantined")
    assert event.instance == "bad"
    assert "bytes on disk" in event.message
    with pytest.raises(OSError, match=r"refused|reset|closed"):
        support.http(port)


def test_what_a_guest_hides_in_its_data_is_found_and_the_counting_ends_where_it_is_too_much(tmp_path):
    (tmp_path / "small").write_text("x")
    assert storage_problem(str(tmp_path), 1 << 20) == ""
    for number in range(300):
        (tmp_path / f"empty-{number}").touch()
    assert "are allowed" in storage_problem(str(tmp_path), 1 << 20)
    # Deeper than any path reaches: made step by step, as a guest can.
    deep = tmp_path / "deep"
    deep.mkdir()
    fd = os.open(deep, os.O_DIRECTORY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=fd)
        below = os.open("d" * 250, os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    assert "deeper" in storage_problem(str(deep), 1 << 30)
    assert storage_problem(str(tmp_path / "gone"), 1) == ""


def test_a_trap_report_carries_the_last_fifty_lines_in_sixteen_kib_whatever_they_are_made_of(host, neighbour):
    """Control characters would move the cursor of whoever reads them, and take six bytes each in a report."""
    # A thousand characters that clear a terminal; sixty times before the trap, of which each says its number.
    clears = "\\1b[2J" * 250
    text = support.wasm("flood").decode().partition("\n")[2]
    text = text.replace('"the flood rises and the flood rises and the flood rises and the "', f'"00{clears}"')
    text = text.replace("(i32.const 256) (i32.const 64))", "(i32.const 256) (i32.const 1000))")
    text = text.replace("(i32.const 20000)))", "(i32.const 60)))\n      (unreachable)")
    run = support.a_run("bad", 1, port=(port := support.free_port()), grants=Grants(interfaces=("wasi:logging",)))
    assert isinstance(host.start(text, run), host_api.Started)
    assert support.http(port)[0] == 500
    trapped = host.event(lambda event: isinstance(event, host_api.Trapped))
    assert "unreachable" in trapped.log[-1]
    assert 5 <= len(trapped.log) <= 50
    assert sum(len(line.encode()) for line in trapped.log) <= 16 * 1024
    assert not any(ord(sign) < 32 for line in trapped.log for sign in line)
    # Even the longest of them fits into a report as it is sent.
    assert len(msgspec.json.encode(trapped)) < bounds.REPORT_MAX_BYTES


def test_short_lines_are_told_to_fifty(host):
    text = support.wasm("flood").decode().partition("\n")[2]
    text = text.replace("(i32.const 20000)))", "(i32.const 60)))\n      (unreachable)")
    run = support.a_run("bad", 1, port=(port := support.free_port()), grants=Grants(interfaces=("wasi:logging",)))
    host.start(text, run)
    assert support.http(port)[0] == 500
    trapped = host.event(lambda event: isinstance(event, host_api.Trapped))
    assert len(trapped.log) == 50
    assert "unreachable" in trapped.log[-1]
    assert all("the flood rises" in line for line in trapped.log[:-1])


def test_an_endless_complaint_of_a_health_export_does_not_fill_the_devices_health(host):
    """What it says goes to the fleet with the health of every other instance: a sentence is enough."""
    text = support.wasm("unhealthy").decode().partition("\n")[2]
    text = text.replace(
        '"\\80\\00\\00\\00\\1a\\00\\00\\00"', '"\\80\\00\\00\\00\\60\\ea\\00\\00"'
    )  # of 60,000 characters
    reply = host.start(text, support.a_run("bad", 1, port=support.free_port(), health=Health(check=True)))
    assert (type(reply), reply.code) == (host_api.Failed, "health-failed")
    assert "the sensor does not answer" in reply.message
    assert len(reply.message) < 400
    assert "\0" not in reply.message


def test_data_nested_deeper_than_python_follows_are_forgotten_all_the_same(host):
    """They would hold up the commit of the next version."""

    def start(generation, schema):
        run = support.a_run("bad", generation, port=port, grants=FILES, schema=schema)
        return host.start("writes", run)

    port = support.free_port()
    assert isinstance(start(1, 1), host_api.Started)
    data = host.state / "data" / "bad"
    fd = os.open(data / "1", os.O_DIRECTORY)
    for _ in range(1100):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    # The new version gets a copy, goes back, comes again, and stays.
    assert isinstance(start(2, 2), host_api.Started)
    assert host.ask(host_api.Revert, instance="bad", generation=2).generation == 1
    assert isinstance(start(3, 2), host_api.Started)
    assert isinstance(host.ask(host_api.Commit, instance="bad", generation=3), host_api.Done)
    assert [path.name for path in data.iterdir()] == ["2"]
    # Python's own way of removing would stumble over what is left, as it did.
    host.ask(host_api.Stop, instance="bad")
    subprocess.run(["rm", "-rf", str(data)], check=True)


@pytest.mark.parametrize("said", ["9" * 5000 + " whole", "error " + "9" * 5000, "-1 whole", "2_00 whole"])
def test_a_number_that_nobody_can_read_is_an_error_of_the_component_alone(host, neighbour, said):
    """Python refuses to read numbers of more than 4,300 digits, with an error that nobody expects."""
    guest = support.in_place_of_the_adapter(said.encode())
    assert isinstance(host.start(guest, support.a_run("odd", 1)), host_api.Started)
    for _ in range(2):
        status, _, body = support.http(host.port, "GET /odd/ HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (status, body) == (500, b"the component gave no answer\n")
    assert host.health("odd").restarts == 0


ASKS = (support.GUESTS / "asks-tls.wat").read_text().partition("\n(")[2]
PLACE = "GET / https localhost:1   \\0d\\0a"
BEGINS = """(loop $more
  (local.set $id (i32.add (local.get $id) (i32.const 1)))
  (drop (call $begin (i32.const 0)))
  (br_if $more (i32.lt_u (local.get $id) (i32.const 5000))))
(local.set $id (call $begin (i32.const 0)))"""


@pytest.mark.parametrize(
    ("there", "here"),
    [
        (PLACE, "GET"),
        (PLACE, "   \\0d\\0a"),
        (PLACE, "G\\01T / http x.test   \\0d\\0a"),
        (PLACE, "CONNECT / http x.test   \\0d\\0a"),
        (PLACE, "GET /\\09 http x.test   \\0d\\0a"),
        (PLACE, "GET / http x.test 9999999999999999999999 -1 x\\0d\\0a"),
        (PLACE, "GET / http x.test   \\0d\\0ano colon\\0d\\0a"),
        (PLACE, "GET / http x.test   \\0d\\0ax: \\f0\\9f\\98\\80\\0d\\0a"),
        (PLACE, "GET / http x.test   \\0d\\0acontent-length: " + "9" * 600 + "\\0d\\0a"),
        ("(local.set $id (call $begin (i32.const 0)))", "(local.set $id (i32.const 77))"),
        (
            "(local.set $id (call $begin (i32.const 0)))",
            BEGINS,
        ),
    ],
)
def test_what_a_guest_asks_past_its_adapter_is_answered_with_an_error_and_nothing_else(host, neighbour, there, here):
    """The adapter writes requests in a form of its own; a guest in its place may write anything."""
    assert there in ASKS
    grants = Grants(interfaces=("wasi:http/outgoing-handler",), outbound=("http://x.test:80", "https://localhost:1"))
    assert isinstance(
        host.start("(" + ASKS.replace(there, here), support.a_run("odd", 1, grants=grants)), host_api.Started
    )
    for _ in range(2):
        status, _, body = support.http(host.port, "GET /odd/ HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (status, body[:38]) == (500, b"the component answered with the error ")
    health = host.health("odd")
    assert (health.restarts, set(health.calls)) == (0, {"ok"})
