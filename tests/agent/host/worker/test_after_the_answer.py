"""What a guest does after its answer has ended neither delays nor breaks that, in real workers.

The guest is `components/adapter/script.c`: a target is a list of steps, `.` ends the answer, `!` traps, `X` exits,
`pN` sleeps and `@` computes without end.
"""

import socket

import pytest
import support
from support import Limits

from agent.host.ipc import host_api
from tests.eventually import eventually

SCRIPT = support.wasm("script")
HELLO = "/~/r/whello/."
NEXT = "/~/r/wnext/."
FOREVER = f"{HELLO}/p600000"
OWN, SHARED = "own worker", "shared worker"
FRESH, REUSED = 1, 1000


class Asked:
    """An instance of the script and a kept connection to it."""

    def __init__(self, host, **limits):
        self.host = host
        run = support.a_run("script", 1, limits=Limits(**limits))
        reply = host.start(SCRIPT, run)
        assert isinstance(reply, host_api.Started), reply
        self.sock = self.connect()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.host.port), timeout=60)

    def send(self, target, *, method="GET", sock=None):
        request = f"{method} /script{target} HTTP/1.1\r\nhost: x\r\ncontent-length: 0\r\n\r\n"
        (sock or self.sock).sendall(request.encode())

    def get(self, target, *, method="GET", sock=None):
        self.send(target, method=method, sock=sock)
        status, _, body = support.read_answer(sock or self.sock)
        return status, body

    def await_calls(self, **wanted):
        wanted = {outcome.replace("_", "-"): count for outcome, count in wanted.items()}
        eventually(lambda: self.host.health("script").calls == wanted, f"calls are {wanted}")

    def log(self):
        return "\n".join(self.host.lines_of("script"))


@pytest.fixture
def asked(host):
    made = []

    def start(**limits):
        made.append(Asked(host, **limits))
        return made[-1]

    yield start
    for each in made:
        each.sock.close()


@pytest.mark.parametrize("reused", [FRESH, REUSED])
@pytest.mark.parametrize(("end", "words"), [("!", "unreachable"), ("X", "exit")])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_failure_after_the_answer_is_counted_and_hurts_nobody(asked, reused, end, words, method):
    it = asked(requests_per_instance=reused)
    for _ in range(5):
        assert it.get(f"{HELLO}/{end}", method=method) == (200, b"hello")
        assert it.get(NEXT, method=method) == (200, b"next")
    it.await_calls(ok=10, guest_trap=5)
    health = it.host.health("script")
    assert (health.restarts, health.errors) == (0, 5)
    assert words in it.log()


@pytest.mark.parametrize("reused", [FRESH, REUSED])
@pytest.mark.parametrize("answer", ["r/s204/.", "u/hello/./r", "s500/r/wno/.", "hcontent-length:5/r/whello/.", "e38"])
def test_each_answer_goes_out_when_it_has_ended(asked, reused, answer):
    it = asked(requests_per_instance=reused, idle_ms=500)
    whole = it.get(f"/~/{answer}")
    assert it.get(f"/~/{answer}/p600000") == whole


@pytest.mark.parametrize("reused", [FRESH, REUSED])
def test_a_guest_that_sleeps_after_its_answer_has_the_limits_of_a_call(asked, reused):
    it = asked(requests_per_instance=reused, idle_ms=300)
    assert it.get(FOREVER) == (200, b"hello")
    assert it.get(NEXT, method="POST") == (200, b"next"), "from the worker that came after"
    eventually(lambda: "(limits.idle)" in it.log(), "the log names the limit")
    assert it.get(NEXT) == (200, b"next")


@pytest.mark.parametrize("reused", [FRESH, REUSED])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_next_call_waits_for_a_guest_that_goes_on(asked, reused, method):
    it = asked(requests_per_instance=reused)
    for _ in range(3):
        assert it.get(f"{HELLO}/p60", method=method) == (200, b"hello")
        assert it.get(NEXT, method=method) == (200, b"next")
    it.await_calls(ok=6)
    assert it.host.health("script").restarts == 0


@pytest.mark.parametrize("reused", [FRESH, REUSED])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_guest_that_computes_after_its_answer_is_ended_at_its_limit(asked, reused, method):
    it = asked(requests_per_instance=reused, call_ms=100)
    with it.connect() as other:
        assert it.get(f"{HELLO}/@") == (200, b"hello")
        it.send(NEXT, method=method)
        it.send(NEXT, method=method, sock=other)
        for sock in (it.sock, other):
            status, _, body = support.read_answer(sock)
            assert (status, body) == (200, b"next")
    it.await_calls(ok=3, guest_timeout=1)
    assert it.host.health("script").restarts == 0


def test_a_guest_that_goes_on_keeps_one_worker_and_calls_go_to_another(asked):
    it = asked(concurrency=2, idle_ms=2000)
    assert it.get(FOREVER) == (200, b"hello")
    for _ in range(3):
        assert it.get(NEXT) == (200, b"next")


def test_a_request_that_is_not_whole_when_its_answer_ends(asked):
    it = asked()
    head = f"POST /script{HELLO}/q/! HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n"
    it.sock.sendall(head.encode() + bytes(100_000))
    assert support.read_answer(it.sock)[::2] == (200, b"hello")
    it.await_calls(ok=1, guest_trap=1)
    with it.connect() as other:
        assert it.get(NEXT, sock=other) == (200, b"next")
