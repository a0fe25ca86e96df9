"""One instance with everything that can be granted, in a real worker: each grant works beside the others."""

import contextlib
import tempfile
from pathlib import Path

import pytest

from agent.host.ipc import host_api
from fleet.protocol.hardware import EACH_MAX, GpioLine, Hardware, SerialPort
from fleet.protocol.manifest import Grants
from tests.agent.host import pairs_guest, support
from tests.agent.host.gpio_chips import Chips
from tests.agent.host.serial_peer import Peer

LINES = tuple(
    GpioLine(name=f"line-{at}", chip="gpiochip0", line=at, direction="output" if at else "input")
    for at in range(EACH_MAX)
)
PORTS = tuple(SerialPort(name=f"port-{at}", baud=9600) for at in range(EACH_MAX))
GRANTS = Grants(
    interfaces=(
        *("wasi:filesystem", "wasi:io", "wasi:gpio", "wasi:keyvalue", "wasi:messaging"),
        *("wasmfleet:metrics", "wasmfleet:serial"),
    ),
    instances=("neighbour",),
    publish_local=("plant/#",),
    directories={"/maps": "maps"},
    hardware=Hardware(gpio=LINES, serial=PORTS),
)


@pytest.fixture(scope="module")
def peers():
    with contextlib.ExitStack() as stack:
        yield {port.name: stack.enter_context(contextlib.closing(Peer())) for port in PORTS}


@pytest.fixture(scope="module")
def start(peers):
    """Start one of the guests as the next generation, with everything; its port."""
    with tempfile.TemporaryDirectory(prefix="wasmfleet-all-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        (directory / "maps").mkdir(mode=0o755)
        (directory / "maps" / "m").write_text("a map")
        (directory / "weights").write_text("weights")
        (directory / "weights").chmod(0o444)
        packages = tuple(
            host_api.DataMount(path=path, file=str(directory / "weights"))
            for path in ("/data/m", "/models/m", "/maps/deep/m")
        )
        chips = Chips(directory / "chips", gpiochip0=EACH_MAX)
        with support.shared_host(directory, env=chips.env) as host:
            generations = iter(range(1, 100))

            def start(guest):
                port = support.free_port()
                run = support.a_run(
                    "web",
                    next(generations),
                    port=port,
                    grants=GRANTS,
                    share_worker=True,
                    directories={"/maps": str(directory / "maps")},
                    packages=packages,
                    serial={name: peer.node for name, peer in peers.items()},
                )
                reply = host.start(guest, run)
                assert isinstance(reply, host_api.Started), reply
                assert not host.health("web").shared_worker
                return port

            yield start


def ask(port, method, path, data=b""):
    head = f"{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n\r\n"
    status, _, answer = support.http(port, head.encode() + data)
    return status, answer


def test_an_instance_with_every_grant_at_once_uses_each(start, peers):
    port = start("reads")
    assert ask(port, "PUT", "/", b"0notes")[0] == 200
    found = [ask(port, "GET", "/", b"%dm" % place) for place in range(4)]
    assert sorted(found) == [(200, b"a map"), *[(200, b"weights")] * 3]
    for place in range(1, 4):
        assert ask(port, "PUT", "/", b"%dother" % place)[0] != 200, "nothing but its own can be written"
    port = start("pins")
    assert ask(port, "PUT", f"/{LINES[-1].name}") == (200, b"active")
    port = start("serial")
    for name in (PORTS[0].name, PORTS[-1].name):
        answering = peers[name].answer(4, b"said")
        assert ask(port, "POST", f"/{name}", b"asks") == (200, b"said")
        answering.join()
    assert ask(start("measures"), "GET", "/read_errors?a")[0] == 200
    assert ask(start("publishes"), "POST", "/plant/temperature", b"21.5")[0] == 200
    pairs = pairs_guest.Pairs(start(pairs_guest.guest()))
    assert pairs.set(b"key", b"value") is None
    assert pairs.get(b"key") == b"value"
