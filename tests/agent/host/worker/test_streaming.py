"""Streaming responses of wasi:http: sent while the guest still writes, at the client's pace."""

import pytest
import support
from support import Grants, Limits
from wire import Wire

from agent.host.ipc import host_api

GRANTS = Grants(interfaces=("wasi:http/outgoing-handler",))
MIB = 1 << 20
LIMITS = Limits(request_bytes=16 * MIB, response_bytes=16 * MIB, call_ms=20_000)


@pytest.fixture(params=["own port", "router"])
def probe(host, request):
    """A port, and what stands before paths there."""
    own = support.free_port() if request.param == "own port" else None
    started = host.start("probe", support.a_run("probe", 1, port=own, grants=GRANTS, limits=LIMITS))
    assert isinstance(started, host_api.Started), started
    return (own, b"") if own else (host.port, b"/probe")


def get(probe, path, *fields):
    return b"GET %b%b HTTP/1.1\r\nhost: b\r\n%b\r\n" % (probe[1], path, b"".join(f + b"\r\n" for f in fields))


def outcomes(host):
    return host.health("probe").calls


def test_the_first_event_comes_before_the_guest_ends_and_a_client_that_leaves_ends_it(host, probe):
    with Wire(probe[0]) as wire:
        wire.send(get(probe, b"/events"))
        status, fields = wire.head()
        assert (status, fields["transfer-encoding"]) == (200, "chunked")
        # The guest writes without end: that anything comes at all says that nobody waits for it.
        assert wire.chunk().startswith(b"event\nevent\n")
    with Wire(probe[0]) as wire:
        wire.send(get(probe, b"/"))
        assert wire.answer()[2] == b"hello over wasi:http\n"
    assert (outcomes(host).get("client-gone"), host.health("probe").restarts) == (1, 0)
    assert not any(isinstance(event, host_api.Trapped) for event in host.events), "nothing to report"


def test_sixteen_mebibytes_arrive_as_they_were_written(probe):
    with Wire(probe[0]) as wire:
        for _ in range(2):
            wire.send(get(probe, b"/large/16"))
            body = wire.answer()[2]
            assert len(body) == 16 * MIB
            assert all(body[at : at + 4] == (at // 4096).to_bytes(4, "little") for at in range(0, len(body), 4096))


def test_more_than_allowed_is_cut_off_and_never_ended_as_if_whole(host, probe):
    with Wire(probe[0]) as wire:
        wire.send(get(probe, b"/large/17"))
        with pytest.raises(EOFError):
            wire.answer()
    with Wire(probe[0]) as wire:
        wire.send(get(probe, b"/"))
        assert wire.answer()[0] == 200
    assert host.health("probe").errors == 1


def test_http_1_0_gets_no_chunks(probe):
    with Wire(probe[0]) as wire:
        wire.send(b"GET %b/large/4 HTTP/1.0\r\n\r\n" % probe[1])
        status, fields, body = wire.answer()
        assert (status, "transfer-encoding" in fields, len(body)) == (200, False, 4 * MIB)


def test_trailers_both_ways(probe):
    with Wire(probe[0]) as wire:
        wire.send(get(probe, b"/trailers", b"te: trailers"))
        _, fields, body = wire.answer()
        assert (body, fields[None]) == (b"body\n", ["x-sum: 7"])
        wire.send(get(probe, b"/trailers"))
        _, fields, body = wire.answer()
        assert (body, fields["content-length"]) == (b"body\n", "5"), "who does not ask gets none"
        chunks = b"3\r\nabc\r\n0\r\nx-mine: 1\r\nhost: forged\r\n\r\n"
        wire.send(get(probe, b"/sum", b"transfer-encoding: chunked") + chunks)
        assert wire.answer()[2] == b"\nx-mine=1\n"
