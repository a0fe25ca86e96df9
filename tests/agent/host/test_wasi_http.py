"""Guest of wasi:http on a running host: the adapter in the worker, and the same HTTP behaviour as other guests."""

import socket
import threading

import pytest
import support
from support import Grants, Limits

from agent.host.ipc import host_api

GRANTS = Grants(interfaces=("wasi:http/outgoing-handler",))


@pytest.fixture
def probe(host):
    port = support.free_port()
    limits = Limits(request_bytes=2 << 20, response_bytes=2 << 20)
    run = support.a_run("probe", 1, port=port, grants=GRANTS, limits=limits)
    assert isinstance(host.start("probe", run), host_api.Started)
    return port


def ask(port, path, *, method="GET", fields="", body=b"", sock=None):
    length = f"content-length: {len(body)}\r\n" if body else ""
    return support.http(port, f"{method} {path} HTTP/1.1\r\nhost: board\r\n{fields}{length}\r\n".encode() + body, sock)


def test_it_answers_over_one_kept_connection(probe):
    with socket.create_connection(("127.0.0.1", probe), timeout=30) as kept:
        for _ in range(20):
            status, headers, body = ask(probe, "/", sock=kept)
            assert (status, body) == (200, b"hello over wasi:http\n")
            assert headers["x-bytes"] == "caf\xe9"


def test_the_request_is_what_the_client_sent(probe):
    _, _, body = ask(probe, "/describe?q=1", method="PUT", fields="x-a: 1\r\nconnection: keep-alive\r\n")
    assert body == b"put /describe?q=1 http board\nx-a=1\n"


def test_a_chunked_body_and_a_large_one_come_back_whole(probe):
    chunked = (
        b"POST /echo HTTP/1.1\r\nhost: b\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n6\r\n there\r\n0\r\n\r\n"
    )
    assert support.http(probe, chunked)[2] == b"hello there"
    large = bytes(range(256)) * 6000
    assert ask(probe, "/echo", method="POST", body=large)[2] == large


def test_an_answer_that_begins_before_its_request_has_ended_keeps_the_connection(probe):
    large = bytes(range(256)) * 4000
    with socket.create_connection(("127.0.0.1", probe), timeout=30) as kept:
        for _ in range(2):
            _, fields, body = ask(probe, "/echo", method="POST", body=large, sock=kept)
            assert "connection" not in fields
            assert body == large
        _, fields, body = ask(probe, "/echo", method="POST", fields="connection: close\r\n", body=large, sock=kept)
        assert (fields["connection"], body) == ("close", large)
        assert kept.recv(1) == b""


@pytest.mark.parametrize(
    ("path", "status", "words"),
    [
        ("/error", 500, "internal-error"),
        ("/silent", 500, "no answer"),
        ("/cut", 502, "before its end"),
        ("/trap", 500, "unreachable"),
        ("/half", 500, "unreachable"),
        ("/status/404", 404, ""),
    ],
)
def test_whatever_one_request_does_the_next_is_answered_clean(host, probe, path, status, words):
    got, _, body = ask(probe, path)
    assert got == status
    assert words in body.decode()
    assert ask(probe, "/")[2] == b"hello over wasi:http\n"
    assert host.health("probe").restarts == 0


def test_an_answer_larger_than_allowed_is_an_error_and_does_not_spill(host):
    port = support.free_port()
    limits = Limits(request_bytes=1 << 20, response_bytes=1000)
    host.start("probe", support.a_run("small", 1, port=port, grants=GRANTS, limits=limits))
    assert ask(port, "/echo", method="POST", body=b"x" * 5000)[0] == 502
    assert ask(port, "/echo", method="POST", body=b"x" * 500_000)[0] == 502
    assert ask(port, "/")[2] == b"hello over wasi:http\n"


def test_what_it_prints_and_what_it_is_denied_are_in_its_log(host, probe):
    ask(probe, "/log")
    ask(probe, "/fetch")
    ask(probe, "/trap")
    log = host.event(lambda event: isinstance(event, host_api.Trapped)).log
    assert "to standard output" in log
    assert "to standard error" in log
    assert any("http://example.org:8080/there?x=1 is denied" in line for line in log)


def test_a_swap_between_the_worlds_loses_no_connection(host):
    port = support.free_port()
    host.start("v1", support.a_run("both", 1, port=port))
    with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
        assert ask(port, "/", sock=kept)[2] == b"hello from v1\n"
        host.start("probe", support.a_run("both", 2, port=port, grants=GRANTS))
        assert ask(port, "/", sock=kept)[2] == b"hello over wasi:http\n"


def test_workers_side_by_side_never_mix_their_answers(host):
    port = support.free_port()
    limits = Limits(concurrency=3, request_bytes=1 << 20, response_bytes=1 << 20)
    host.start("probe", support.a_run("many", 1, port=port, grants=GRANTS, limits=limits))
    wrong = []

    def client(number):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as kept:
            for size in (10, 70_000, 1, 30_000) * 5:
                body = bytes([number]) * size
                if ask(port, "/echo", method="POST", body=body, sock=kept)[2] != body:
                    wrong.append((number, size))

    clients = [threading.Thread(target=client, args=(number,)) for number in range(6)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    assert wrong == []
    assert host.health("many").errors == 0


def test_answers_of_an_instance_with_files_are_no_writes_to_its_files(host):
    port = support.free_port()
    files = Grants(interfaces=(*GRANTS.interfaces, "wasi:filesystem"))
    limits = Limits(storage_bytes=1 << 20, daily_written_bytes=1 << 20)
    host.start("probe", support.a_run("large", 1, port=port, grants=files, limits=limits))
    for _ in range(3):
        assert len(ask(port, "/large/1")[2]) == 1 << 20
    assert ask(port, "/")[0] == 200
    assert host.health("large").written_bytes < 64 * 1024
    assert not [line for line in host.lines_of("large") if "has written" in line]
