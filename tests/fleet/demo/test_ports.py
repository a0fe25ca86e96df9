"""Ports for servers that are started soon: nobody takes them by chance meanwhile."""

import contextlib
import socket
from pathlib import Path

import pytest

from fleet.demo import environment


def range_of(tmp_path, lowest):
    file = tmp_path / "ip_local_port_range"
    file.write_text(f"{lowest}\t60999\n")
    return file


def test_they_are_different_free_and_below_those_of_connections():
    given = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = environment.free_ports(20)
    assert len(set(found)) == 20
    assert max(found) < given
    with contextlib.ExitStack() as stack:
        for port in found:
            stack.enter_context(socket.create_server(("127.0.0.1", port)))


def test_a_port_that_somebody_has_is_not_given(monkeypatch):
    with socket.create_server(("127.0.0.1", environment.free_ports(1)[0])) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(environment.random.SystemRandom, "sample", lambda *_, **__: [port])
        with pytest.raises(OSError, match="no free port"):
            environment.free_ports(1)


def test_where_connections_may_have_any_port_the_kernel_chooses(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "_RANGE", range_of(tmp_path, 1024))
    assert len(set(environment.free_ports(3))) == 3
