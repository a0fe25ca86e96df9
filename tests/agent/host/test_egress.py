"""Egress of a running host: destinations that components may reach, and errors for others."""

import contextlib
import os
import select
import signal
import socket
import threading

import pytest
import support
from host_processes import forks
from support import Grants

from agent.host.ipc import host_api

HANDLER = ("wasi:http/outgoing-handler",)


@pytest.fixture
def peer():
    """A server on loopback; its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with contextlib.suppress(OSError), connection:
                    connection.recv(65536)
                    connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello")

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def fetch(host, instance, place):
    return support.http(host.port, f"GET /{instance}/get?{place} HTTP/1.1\r\nhost: board\r\n\r\n")[2]


def started(host, instance, **grants):
    run = support.a_run(instance, 1, grants=Grants(interfaces=HANDLER, **grants))
    answer = host.start("probe", run)
    assert isinstance(answer, host_api.Started), answer


def test_a_granted_request_goes_out_and_is_counted(host, peer):
    started(host, "granted", outbound=(f"http://127.0.0.1:{peer}",))
    assert fetch(host, "granted", f"127.0.0.1:{peer}/") == b"200\ncontent-length=5\n\nhello"
    health = host.health("granted")
    assert (health.outgoing, health.denials) == (1, 0)


def test_an_ungranted_one_is_denied_counted_and_named(host, peer):
    started(host, "closed")
    started(host, "elsewhere", outbound=("http://127.0.0.1:1",))
    for instance in ("closed", "elsewhere"):
        assert fetch(host, instance, f"127.0.0.1:{peer}/") == b"error 15"
        health = host.health(instance)
        assert (health.outgoing, health.denials) == (0, 1)
        lines = host.ask(host_api.Logs, instance=instance).lines
        assert any(f"127.0.0.1:{peer}" in line and "denied" in line for line in lines), lines


def test_a_neighbour_is_reached_where_it_is_granted(host):
    started(host, "asks", instances=("answers",))
    started(host, "answers")
    assert fetch(host, "asks", "answers.internal/").endswith(b"\n\nhello over wasi:http\n")
    assert fetch(host, "answers", "asks.internal/") == b"error 15"


def test_there_is_an_egress_while_somebody_needs_it_and_another_when_it_dies(host, peer):
    before = forks(host)
    started(host, "one", outbound=(f"http://127.0.0.1:{peer}",))
    (egress,) = forks(host) - before
    assert fetch(host, "one", f"127.0.0.1:{peer}/").startswith(b"200")
    os.kill(egress, signal.SIGKILL)
    # what is asked meanwhile is answered by the next
    assert fetch(host, "one", f"127.0.0.1:{peer}/").startswith(b"200")
    (another,) = forks(host) - before
    assert another != egress
    ended = os.pidfd_open(another)
    host.ask(host_api.Stop, instance="one")
    assert select.select([ended], [], [], 30)[0], "the egress is still there, and nobody needs it"
    os.close(ended)
