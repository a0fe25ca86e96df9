"""Servers for wasi:http built by their own toolchains answer on a device as they do under `wasmtime serve`.

A language whose tools are not here is skipped by name, and so is the comparison where there is no `wasmtime`:
`make test-guests` brings the tools.
"""

import contextlib
import os
import subprocess
import sys

import pytest
import support
from serve import serving
from support import Grants, Limits

from agent.host.engine.runtime import Engine
from agent.host.ipc import host_api

BUILD = support.ROOT / "components" / "examples" / "wasi-http" / "build.py"
SAYS = {"rust": "Rust", "js": "JavaScript", "python": "Python"}
# What a language's runtime imports beside wasi:http: all of it served, none of it leading anywhere from a sandbox.
GRANTS = Grants(interfaces=("wasi:cli", "wasi:clocks", "wasi:filesystem", "wasi:http", "wasi:random", "wasi:sockets"))
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
    out = tmp_path_factory.mktemp("built") / f"{request.param}.wasm"
    done = subprocess.run(
        [sys.executable, BUILD, request.param, "-o", out], capture_output=True, text=True, check=False
    )
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return request.param, out


@pytest.fixture(scope="module")
def image(server):
    return Engine().compile(server[1].read_bytes())


@pytest.fixture
def port(host, image):
    """Where the server answers on the device."""
    port = support.free_port()
    fd = support.sealed(image)
    try:
        started = host.ask(host_api.Start, fd, run=support.a_run("server", 1, port=port, grants=GRANTS, limits=LIMITS))
    finally:
        os.close(fd)
    assert isinstance(started, host_api.Started), started
    return port


@pytest.mark.timeout(600)
def test_it_answers_as_it_was_written(server, port):
    greeting = support.http(port, REQUESTS["a greeting"])
    assert (greeting[0], greeting[2]) == (200, f"hello from {SAYS[server[0]]}\n".encode())
    assert greeting[1]["content-type"] == "text/plain"
    assert support.http(port, REQUESTS["no such thing"])[0] == 404
    assert support.http(port, REQUESTS["an echo"])[2] == BODY
    assert support.http(port, REQUESTS["an echo of nothing"])[2] == b""


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
