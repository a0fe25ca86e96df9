"""Servers for wasi:http built by their own toolchains answer on a device as they do under `wasmtime serve`.

A language whose tools are not here is skipped by name, and so is the comparison where there is no `wasmtime`:
`make test-guests` brings the tools.
"""

import contextlib
import os
from pathlib import Path

import pytest
import support
from serve import serving
from support import Limits, built
from wire import streamed

from agent.host.engine.runtime import Engine
from agent.host.ipc import host_api

SAYS = {"rust": "Rust", "js": "JavaScript", "python": "Python"}
HERE = Path(__file__).parent
# What a language's runtime imports needs no grant.
LIMITS = Limits(memory_bytes=128 << 20, call_ms=20_000, start_ms=20_000, request_bytes=2 << 20, response_bytes=2 << 20)
BODY = bytes(n % 251 for n in range(300_000))
REQUESTS = {
    "a greeting": b"GET / HTTP/1.1\r\nhost: board\r\n\r\n",
    "no such thing": b"GET /nothing?here=1 HTTP/1.1\r\nhost: board\r\n\r\n",
    "an echo": b"POST /echo HTTP/1.1\r\nhost: board\r\ncontent-length: %d\r\n\r\n%b" % (len(BODY), BODY),
    "an echo of nothing": b"POST /echo HTTP/1.1\r\nhost: board\r\ncontent-length: 0\r\n\r\n",
}


@pytest.fixture(scope="module", params=SAYS)
def server(request, tmp_path_factory):
    """A language, and the component that its toolchain makes."""
    return request.param, built(request.param, tmp_path_factory.mktemp("built"))


@pytest.fixture(scope="module")
def image(server):
    return Engine().compile(server[1].read_bytes())


@pytest.fixture
def port(host, image):
    """Where the server answers on the device."""
    port = support.free_port()
    start(host, image, port)
    return port


def start(host, image, port):
    """Start the image, which is granted nothing."""
    fd = support.sealed(image)
    try:
        started = host.ask(host_api.Start, fd, run=support.a_run("server", 1, port=port, limits=LIMITS))
    finally:
        os.close(fd)
    assert isinstance(started, host_api.Started), started


@pytest.mark.timeout(600)
def test_it_answers_as_it_was_written(server, port):
    greeting = support.http(port, REQUESTS["a greeting"])
    assert (greeting[0], greeting[2]) == (200, f"hello from {SAYS[server[0]]}\n".encode())
    assert greeting[1]["content-type"] == "text/plain"
    assert support.http(port, REQUESTS["no such thing"])[0] == 404
    assert support.http(port, REQUESTS["an echo"])[2] == BODY
    assert support.http(port, REQUESTS["an echo of nothing"])[2] == b""


@pytest.mark.timeout(600)
def test_what_it_streams_goes_out_while_the_request_still_comes(server, port):
    """A runtime that sets its answer late, or writes before that, is heard from the moment it has done both."""
    if server[0] != "js":
        pytest.skip(f"the server in {server[0]} has no such path")
    assert streamed(port, BODY) == (200, b"first\n" + BODY)


@pytest.mark.timeout(600)
def test_the_same_file_answers_the_same_way_under_wasmtime_serve(server, port):
    with serving(server[1], "-S", "cli") as theirs:
        for what, request in REQUESTS.items():
            here, there = support.http(port, request), served(theirs, request)
            assert (here[0], here[1].get("content-type"), here[2]) == there, what


def served(port, request):
    """A request to another server, which may answer in chunks: (status, content type, body)."""
    import http.client

    head, _, body = request.partition(b"\r\n\r\n")
    method, target, _ = head.split(b"\r\n")[0].decode().split(" ")
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
        client.request(method, target, body or None, {"host": "board"})
        answer = client.getresponse()
        return answer.status, answer.getheader("content-type"), answer.read()


def get(port, path):
    return support.http(port, f"GET {path} HTTP/1.1\r\nhost: board\r\n\r\n".encode())


USES = {
    "js": {"/requests": (b"denied: ", "host: GET http://example.test/ is denied")},
    "python": {
        "/sockets": (b"denied: PermissionError EACCES", "host: wasi:sockets/tcp-create-socket.create-tcp-socket"),
        "/names": (b"denied: ", "host: wasi:sockets/ip-name-lookup.resolve-addresses"),
        "/files": (b"denied: FileNotFoundError ENOENT", ""),
        "/environment": (b"[] True 8", ""),
    },
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("language", USES)
def test_what_a_standard_library_uses_without_a_grant_is_denied_and_a_throw_is_a_500(host, language, tmp_path):
    source = HERE / "ungranted" / f"app.{'py' if language == 'python' else language}"
    wasm = built(language, tmp_path, "--source", source)
    port = support.free_port()
    start(host, Engine().compile(wasm.read_bytes()), port)
    denials = 0
    for path, (said, line) in USES[language].items():
        for _ in range(2):
            status, _, body = get(port, path)
            assert (status, body[: len(said)]) == (200, said), body
        denials += 2 * bool(line)
        lines = host.ask(host_api.Logs, instance="server").lines
        assert not line or len([each for each in lines if each.startswith(line)]) == 1, lines
    assert host.health("server").denials == denials
    assert get(port, "/throws")[0] == 500
    assert (get(port, "/")[0], get(port, "/")[2]) == (200, b"here\n")
