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
    """An instance of the script and a kept connection to it; in a shared worker, with another instance beside it."""

    def __init__(self, host, place, **limits):
        self.host = host
        names = ["mate", "script"] if place == SHARED else ["script"]
        for name in names:
            run = support.a_run(name, 1, limits=Limits(**limits), share_worker=place == SHARED)
            reply = host.start(SCRIPT, run)
            assert isinstance(reply, host_api.Started), reply
        workers = {host.health(name).shared_worker for name in names}
        assert len(workers) == 1
        assert (workers == {""}) == (place == OWN)
        self.sock = self.connect()

    def connect(self):
        return socket.create_connection(("127.0.0.1", self.host.port), timeout=60)

    def send(self, target, *, method="GET", sock=None, body=b"", of="script"):
        request = f"{method} /{of}{target} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        (sock or self.sock).sendall(request.encode() + body)

    def get(self, target, *, method="GET", sock=None, body=b"", of="script"):
        self.send(target, method=method, sock=sock, body=body, of=of)
        status, _, body = support.read_answer(sock or self.sock)
        return status, body

    def await_calls(self, **wanted):
        wanted = {outcome.replace("_", "-"): count for outcome, count in wanted.items()}
        eventually(lambda: self.host.health("script").calls == wanted, f"calls are {wanted}")

    def log(self):
        return "\n".join(self.host.lines_of("script"))


@pytest.fixture(params=[OWN, SHARED])
def place(request):
    return request.param


@pytest.fixture
def asked(host, place):
    made = []

    def start(**limits):
        made.append(Asked(host, place, **limits))
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


@pytest.mark.parametrize("place", [OWN])
def test_a_guest_that_goes_on_keeps_one_worker_and_calls_go_to_another(asked):
    it = asked(concurrency=2, idle_ms=2000)
    assert it.get(FOREVER) == (200, b"hello")
    for _ in range(3):
        assert it.get(NEXT) == (200, b"next")


@pytest.mark.parametrize("place", [OWN])
def test_a_request_that_is_not_whole_when_its_answer_ends(asked):
    it = asked()
    head = f"POST /script{HELLO}/q/! HTTP/1.1\r\nhost: x\r\ncontent-length: 200000\r\n\r\n"
    it.sock.sendall(head.encode() + bytes(100_000))
    assert support.read_answer(it.sock)[::2] == (200, b"hello")
    it.await_calls(ok=1, guest_trap=1)
    with it.connect() as other:
        assert it.get(NEXT, sock=other) == (200, b"next")


@pytest.mark.parametrize("reused", [FRESH, REUSED])
@pytest.mark.parametrize("answer", ["e38", "r/x", "hcontent-length:9/r/wshort/.", "s700/r/.", "o"])
def test_calls_go_on_after_an_answer_that_was_none(asked, reused, answer):
    """An instance that may answer many requests gets no further one after a failure, and a next one does."""
    it = asked(requests_per_instance=reused)
    for _ in range(3):
        assert it.get(f"/~/{answer}")[0] >= 500
        assert it.get(NEXT) == (200, b"next")
    it.await_calls(ok=6)


@pytest.mark.parametrize("reused", [FRESH, REUSED])
@pytest.mark.parametrize("end", ["p30", "!", "X"])
@pytest.mark.parametrize("size", [60_000, 900_000])
def test_an_answer_larger_than_its_credit_reaches_a_client_who_reads_it_late(asked, reused, end, size):
    it = asked(requests_per_instance=reused)
    with it.connect() as slow:
        it.send(f"/~/r/b{size}/./{end}", sock=slow)
        if it.host.health("script").shared_worker:
            assert it.get(HELLO, of="mate") == (200, b"hello"), "the other instance's turn"
        status, _, body = support.read_answer(slow)
        assert (status, len(body)) == (200, size)
    assert it.get(NEXT) == (200, b"next")
    it.await_calls(ok=2, **({} if end.startswith("p") else {"guest_trap": 1}))


@pytest.mark.parametrize("reused", [FRESH, REUSED])
def test_requests_with_bodies_wait_behind_a_guest_that_goes_on(asked, reused):
    it = asked(requests_per_instance=reused)
    body = bytes(range(256)) * 100
    with it.connect() as second, it.connect() as third:
        assert it.get(f"{HELLO}/p200", method="POST", body=body) == (200, b"hello")
        for sock in (second, third):
            it.send("/~/r/a/.", method="POST", sock=sock, body=body)
        for sock in (second, third):
            status, _, answer = support.read_answer(sock)
            assert (status, answer) == (200, body)
    it.await_calls(ok=3)


@pytest.mark.parametrize("place", [SHARED])
@pytest.mark.parametrize("end", ["!", "X", "@"])
def test_what_ends_one_guest_after_its_answer_costs_the_others_of_its_worker_nothing(asked, end):
    it = asked(requests_per_instance=REUSED, call_ms=100)
    for _ in range(3):
        assert it.get(f"{HELLO}/{end}") == (200, b"hello")
        assert it.get(NEXT, of="mate") == (200, b"next")
    it.await_calls(ok=3, **{"guest_timeout" if end == "@" else "guest_trap": 3})
    assert it.host.health("mate").calls == {"ok": 3}
    assert it.host.health("mate").restarts == it.host.health("script").restarts == 0
    assert it.host.health("mate").shared_worker == it.host.health("script").shared_worker


@pytest.mark.parametrize("place", [SHARED])
def test_a_guest_that_sleeps_after_its_answer_is_named_to_the_others_of_its_worker(asked):
    it = asked(idle_ms=300)
    assert it.get(FOREVER) == (200, b"hello")
    assert it.get(NEXT, of="mate", method="POST") == (200, b"next"), "from the worker that came after"
    eventually(lambda: "(limits.idle)" in it.log(), "the log names the limit")
    assert any("on account of script" in line for line in it.host.lines_of("mate"))


SAID = {
    "a head larger than a frame": b"200 whole\r\nx: " + b"y" * 70_000 + b"\r\n\r\n",
    "trailers larger than a frame": b"200 whole\r\n\r\nx: " + b"y" * 70_000 + b"\r\n",
    "no words": b"",
}


@pytest.mark.parametrize("said", SAID)
def test_what_stands_in_the_adapters_place_ends_no_shared_worker(asked, host, said):
    it = asked()
    run = support.a_run("bad", 1, share_worker=True)
    if isinstance(host.start(support.in_place_of_the_adapter(SAID[said]), run), host_api.Started):
        for _ in range(2):
            assert it.get("/", of="bad")[0] in {500, 502}
            assert it.get(NEXT) == (200, b"next")
    assert host.health("script").restarts == 0


@pytest.mark.parametrize("reused", [0, REUSED])
def test_calls_go_on_after_a_client_has_left_within_an_answer_of_the_native_world(host, reused):
    limits = Limits(response_bytes=8 << 20, requests_per_instance=reused)
    assert isinstance(host.start("large-answer", support.a_run("large", 1, limits=limits)), host_api.Started)
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", host.port), timeout=60) as leaver:
            leaver.sendall(b"GET /large/ HTTP/1.1\r\nhost: x\r\n\r\n")
            assert leaver.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 200"
        assert support.http(host.port, "GET /large/ HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200
