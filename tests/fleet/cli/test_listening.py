"""`fleet init --url …` and `fleet serve` as processes: the server listens where the url says that devices come."""

import contextlib
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from fleet.cli.main import main
from fleet.demo.environment import free_ports
from fleet.server.config import has_ipv6

ROOT = Path(__file__).resolve().parents[3]
ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this kernel has no IPv6")


def run(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WASMFLEET_HOME": str(home)}
    command = [sys.executable, "-P", "-m", "fleet.cli.main", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def init(home: Path, ports: list[int], host: str, broker: str = "auto") -> subprocess.CompletedProcess[str]:
    url = f"https://{host}:{ports[0]}"
    others = ("--devices-port", str(ports[1]), "--mqtt-port", str(ports[2]))
    return run(home, "init", "--dev", "--broker", broker, "--url", url, *others)


@contextlib.contextmanager
def serving(home: Path) -> Iterator[None]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WASMFLEET_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-P", "-m", "fleet.cli.main", "serve"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            while "broker" not in (line := server.stdout.readline()):
                assert line, "the server ended"
            yield
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(60) == 0


def answers(home: Path, address: str, port: int) -> bool:
    """Whether a TLS server of this fleet listens at an address; the devices' ports want a certificate later."""
    context = ssl.create_default_context(cafile=str(home / "operator" / "ca.pem"))
    context.maximum_version = ssl.TLSVersion.TLSv1_3
    try:
        with (
            socket.create_connection((address, port), timeout=30) as sock,
            context.wrap_socket(sock, server_hostname=address),
        ):
            return True
    except ConnectionRefusedError:
        return False


@pytest.mark.parametrize(
    ("host", "addresses"),
    [
        pytest.param("[::1]", ["::1"], marks=ipv6),
        ("127.0.0.1", ["127.0.0.1"]),
        ("localhost", ["localhost"]),
    ],
)
@pytest.mark.parametrize("broker", ["embedded", "auto"])
def test_the_server_listens_where_the_url_says(host, addresses, broker, tmp_path):
    home, ports = tmp_path / "home", free_ports(3)
    made = init(home, ports, host, broker)
    assert made.returncode == 0, made.stderr
    with serving(home):
        status = run(home, "status")
        assert status.returncode == 0, status.stderr
        assert "not connected to its broker" not in status.stdout
        for address in addresses:
            assert [answers(home, address, port) for port in ports] == [True, True, True]


@ipv6
def test_everywhere_is_both_families(tmp_path):
    home, ports = tmp_path / "home", free_ports(3)
    assert init(home, ports, "127.0.0.1").returncode == 0
    path = home / "server" / "server.toml"
    # the broker too where it is Mosquitto; the embedded one serves this machine only
    path.write_text(
        re.sub(r'^(operators|devices) = "127\.0\.0\.1:', r'\1 = "[::]:', path.read_text(), flags=re.MULTILINE)
    )
    with serving(home):
        for address in ("127.0.0.1", "::1"):
            assert [answers(home, address, port) for port in ports[:2]] == [True, True]


@pytest.mark.parametrize(
    ("host", "bound"),
    [
        ("fleet.example.com", "[::]"),
        ("[2001:db8::7]", "[::]"),
        ("192.0.2.7", "0.0.0.0"),
    ],
)
def test_a_url_that_others_reach_listens_at_every_address_of_its_kind(host, bound, tmp_path):
    home = tmp_path / "home"
    assert init(home, [9743, 9744, 9883], host, "mosquitto").returncode == 0
    text = (home / "server" / "server.toml").read_text()
    for name, port in (("operators", 9743), ("devices", 9744), ("mqtt", 9883)):
        assert f'{name} = "{bound}:{port}"' in text


def test_a_url_that_is_refused_is_one_line_of_the_process(tmp_path):
    done = run(tmp_path / "home", "init", "--dev", "--url", "https://0.0.0.0:9743")
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "url",
    [
        "https://0.0.0.0:9743",
        "https://[::]:9743",
        "https://[fe80::1%25eth0]:9743",
        "https://a:0",
        "https://a:²",
        "https://user@a",
        "https://a/?b",
        "https://a/b",
        "http://a",
        "https://",
        "https://[::1",
    ],
)
def test_a_url_that_no_device_can_connect_to_is_refused_in_one_line(url, tmp_path):
    done = CliRunner().invoke(main, ["init", "--dev", "--url", url], env={"WASMFLEET_HOME": str(tmp_path / "home")})
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert not (tmp_path / "home").exists()
