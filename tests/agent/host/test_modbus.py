"""A component speaks Modbus TCP to a real server (pymodbus), over sockets that its grants name."""

from pathlib import Path

import pytest
import support
from modbus_server import UNIT, Meter

from agent.host.ipc import host_api
from fleet.protocol.manifest import Grants, Schedule
from tests.eventually import eventually

PATIENT = support.Limits(call_ms=20_000)  # a busy machine gives a call its time late, and counts that as its own


@pytest.fixture
def meter():
    made = Meter()
    yield made
    made.close()


def frame(number, *pdu):
    """A request of the protocol, as hex: transaction, protocol 0, length, unit, function and data."""
    return (number.to_bytes(2, "big") + bytes(2) + (len(pdu) + 1).to_bytes(2, "big") + bytes([UNIT, *pdu])).hex()


def reads(first, count):
    return (3, *first.to_bytes(2, "big"), *count.to_bytes(2, "big"))


def writes(at, value):
    return (6, *at.to_bytes(2, "big"), *value.to_bytes(2, "big"))


def held(*values):
    return (3, 2 * len(values), *(byte for value in values for byte in value.to_bytes(2, "big")))


def steps(port):
    """Read two registers, write one, read it back, and ask for one that is not there."""
    return [
        *("t 0 4", f"c 0 127.0.0.1 {port}"),
        *(f"h 0 {frame(1, *reads(100, 2))}", "H 0 13"),
        *(f"h 0 {frame(2, *writes(102, 4711))}", "H 0 12"),
        *(f"h 0 {frame(3, *reads(102, 1))}", "H 0 11"),
        *(f"h 0 {frame(4, *reads(500, 1))}", "H 0 9"),
        *("s 0 1", "H 0 1", "d 0"),
    ]


ANSWERS = [
    *("ok", "ok"),
    *("ok", frame(1, *held(230, 501))),
    *("ok", frame(2, *writes(102, 4711))),
    *("ok", frame(3, *held(4711))),
    *("ok", frame(4, 0x83, 2)),
    *("ok", "closed", "ok"),
]


def test_a_request_reads_and_writes_registers(host, meter):
    grants = Grants(outbound=(f"tcp://127.0.0.1:{meter.port}",))
    assert isinstance(host.start("dial", support.a_run("meter", 1, grants=grants, limits=PATIENT)), host_api.Started)
    body = "\n".join(steps(meter.port)).encode()
    head = f"POST /meter/ HTTP/1.1\r\nhost: board\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    status, _, said = support.http(host.port, head + body)
    assert (status, said.decode().splitlines()) == (200, ANSWERS)


def test_a_scheduled_task_reads_and_writes_registers(host, meter):
    grants = Grants(outbound=(f"tcp://127.0.0.0/24:{meter.port}",), interfaces=("wasi:config",))
    config = {"steps": "\n".join(steps(meter.port))}
    run = support.a_run("meter", 1, grants=grants, trigger=Schedule(every_ms=200), config=config, limits=PATIENT)
    assert isinstance(host.start("dial-task", run), host_api.Started)
    eventually(lambda: host.health("meter").errors, "the task tells its answers")
    (told, *_) = [line for line in host.lines_of("meter") if "failed" in line]
    assert frame(1, *held(230, 501)) in told
    assert frame(3, *held(4711)) in told
    assert host.health("meter").denials == 0


@pytest.mark.nightly
@pytest.mark.timeout(600)
def test_pythons_own_socket_module_reads_registers(host, meter, tmp_path):
    """Built by componentize-py, whose C library is the one of other languages too; skipped where that is not here."""
    wasm = support.built("python", tmp_path, "--source", Path(__file__).parent / "modbus" / "app.py")
    grants = Grants(outbound=(f"tcp://127.0.0.1:{meter.port}", f"tcp://localhost:{meter.port}"))
    limits = support.Limits(memory_bytes=128 << 20, call_ms=20_000, start_ms=20_000)
    run = support.a_run("meter", 1, grants=grants, limits=limits)
    assert isinstance(host.start(wasm.read_bytes(), run), host_api.Started)
    for name in ("127.0.0.1", "localhost"):
        request = f"GET /meter/{name}/{meter.port}/100/2 HTTP/1.1\r\nhost: board\r\n\r\n"
        status, _, said = support.http(host.port, request.encode())
        assert (status, said) == (200, b"(230, 501)"), name
    status, _, said = support.http(host.port, b"GET /meter/127.0.0.1/9/100/2 HTTP/1.1\r\nhost: board\r\n\r\n")
    assert (status, said) == (200, b"PermissionError EACCES")
