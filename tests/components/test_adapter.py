"""The wasi:http adapter, tested by a guest that uses all of it (components/adapter/probe.c), through the host's engine.

The answer's body comes out on the process's standard output, so each call here catches that for its duration.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import wasmtime
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.host.engine import adapter_abi, codec
from agent.host.engine.guest import start
from agent.host.engine.runtime import HANDLER, HEALTH, Engine, EngineError, GuestError, describe
from fleet.component import compose
from fleet.protocol.codes import CallOutcome, RejectCode
from fleet.protocol.manifest import Grants, Limits
from tests import packed

ADAPTER = Path(__file__).resolve().parents[2] / "components" / "adapter"
PROBE = packed.guest("probe")
GRANTS = Grants(interfaces=("wasi:http/outgoing-handler",))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    engine = Engine()
    file = tmp_path_factory.mktemp("image") / "probe.cwasm"
    file.write_bytes(engine.compile(PROBE))
    return engine.load(str(file))


@pytest.fixture
def lines():
    return []


class Asked:
    """A guest whose calls catch standard output for as long as they last."""

    def __init__(self, image, lines, **limits):
        self.guest = start(image, limits=Limits(**limits), grants=GRANTS, config={}, log=lines.append)

    def handle(self, *request):
        before = os.dup(1)
        adapter_abi.catch_stdout()
        try:
            return self.guest.handle(*request)
        finally:
            os.dup2(before, 1)
            os.close(before)


@pytest.fixture
def guest(image, lines):
    asked = Asked(image, lines)
    yield asked
    asked.guest.close()


def get(guest, path, *, headers=b"host: example.com:81\r\n"):
    return guest.handle(b"GET", path, headers, b"")


def test_it_counts_as_an_http_handler_and_keeps_its_own_exports(guest):
    assert guest.guest.kinds == {HANDLER, HEALTH}


def test_an_ordinary_answer_arrives_with_its_fields_and_its_body(guest):
    assert get(guest, b"/") == (200, b"content-type: text/plain\r\nx-bytes: caf\xe9\r\n", b"hello over wasi:http\n")


@pytest.mark.parametrize(
    ("method", "target", "headers", "seen"),
    [
        (b"GET", b"/describe?a=b", b"host: here:8080\r\n", "get /describe?a=b http here:8080\n"),
        (b"PATCH", b"/describe", b"x: 1\r\nhost: here\r\ny:2\r\n", "patch /describe http here\nx=1\ny=2\n"),
        (b"PROPFIND", b"/describe", b"", "other PROPFIND /describe http -\n"),
        (b"GET", b"http://there/describe", b"host: here\r\n", "get /describe http there\n"),
        (b"GET", b"/describe", b"host: h\r\nconnection: x\r\nupgrade: y\r\n", "get /describe http h\n"),
        (b"GET", b"/describe", b"x: caf\xe9\r\ny: caf\xc3\xa9\r\n", "get /describe http -\nx=caf\xe9\ny=caf\xc3\xa9\n"),
        (b"GET", b"/describe", b"empty: \r\na: b: c\r\n", "get /describe http -\nempty=\na=b: c\n"),
    ],
)
def test_the_request_arrives_as_it_was_sent(guest, method, target, headers, seen):
    assert guest.handle(method, target, headers, b"")[2].decode("latin-1") == seen


NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789!#$%&'*+-.^_`|~", min_size=1, max_size=30).map("x{}".format)
VALUES = st.binary(max_size=60).map(lambda raw: bytes(c for c in raw if c == 9 or (c > 31 and c != 127)).strip(b" \t"))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.tuples(NAMES, VALUES), max_size=20), target=st.text(min_size=1, max_size=80))
def test_every_field_and_every_target_arrives_byte_for_byte(image, lines, target):
    path = b"/describe" + "".join(c for c in target if c > " " and c != "\x7f").encode()
    guest = Asked(image, [], requests_per_instance=1000)
    sent = b"".join(b"%b: %b\r\n" % (name.encode(), value) for name, value in lines)
    first, *seen = guest.handle(b"GET", path, sent, b"")[2].removesuffix(b"\n").split(b"\n")
    guest.guest.close()
    assert first == b"get %b http -" % path
    assert seen == [b"%b=%b" % (name.encode(), value) for name, value in lines]


LINES = st.lists(
    st.sampled_from([b"200 whole", b"error", b"error 38", b"error 39", b"9 cut", b" ", b"\r\n", b"\xc3\xa9", b"\xff"])
)


@settings(max_examples=300)
@given(raw=st.binary(max_size=200) | LINES.map(b"".join))
def test_whatever_stands_for_a_head_is_an_answer_or_named(raw):
    head = adapter_abi.answer_head(raw)
    assert head.problem or head.status >= 0


@pytest.mark.parametrize("size", [0, 1, 4096, 65_537, 900_000])
def test_bodies_pass_both_ways_whole(guest, size):
    body = (bytes(range(256)) * (size // 256 + 1))[:size]
    assert guest.handle(b"POST", b"/echo", b"", body)[2] == body


@pytest.mark.parametrize("status", [200, 204, 404, 418, 599])
def test_the_status_is_the_guests(guest, status):
    assert get(guest, b"/status/%d" % status)[0] == status


def test_fields_obey_the_rules_of_wasi_http(guest):
    assert get(guest, b"/fields")[2].decode().splitlines() == [
        "append: ok",
        "append a bad name: invalid-syntax",
        "append a bad value: invalid-syntax",
        "append host: forbidden",
        "append to the request's: immutable",
        "delete from the request's: immutable",
        "set: ok",
        "get: 2",
        "delete: ok",
        "has, has in the copy: 01",
        "append to a copy of the request's: ok",
        "from-list: 0",
        "from-list with upgrade: 11",
    ]


def test_what_is_given_once_is_given_once(guest):
    # consume, consume; stream, stream; then trailers: some(ok(ok(none))), and some(err) when asked again
    assert get(guest, b"/twice")[2] == b"0101 1000 11\n"


def test_trailers_do_no_harm(guest):
    assert get(guest, b"/trailers")[2] == b"body\n"


def test_a_body_written_before_the_answer_is_set_and_never_flushed_is_not_lost(guest):
    assert get(guest, b"/late") == (200, b"", b"written first\n")


def test_what_the_guest_prints_goes_to_its_log_and_not_into_the_answer(guest, lines):
    assert get(guest, b"/log")[2] == b"logged\n"
    assert sorted(lines) == ["to standard error", "to standard output"]


def test_an_outgoing_request_is_denied_and_the_log_says_which(guest, lines):
    # two settings refused, three taken; then the error with the number of HTTP-request-denied
    assert get(guest, b"/fetch")[2] == b"11000 1 %d\n" % adapter_abi.REQUEST_DENIED
    denied = "host: GET http://example.org:8080/there?x=1 is denied: no outgoing requests are granted"
    assert lines == [f"{denied}; further ones are counted alone"]
    get(guest, b"/fetch")
    assert len(lines) == 1, "named once"


@pytest.mark.parametrize(
    ("path", "status", "why"),
    [
        (b"/error", 500, "the component answered with the error internal-error"),
        (b"/silent", 500, "the component gave no answer"),
        (b"/cut", 502, "the component dropped its answer's body before its end"),
    ],
)
def test_an_answer_that_is_none_is_named_and_logged(guest, lines, path, status, why):
    got, _, body = get(guest, path)
    assert (got, body.decode()) == (status, f"{why}\n")
    assert lines == [f"host: {why}"]


def test_a_trap_is_the_guests_fault_and_leaves_nothing_behind(guest):
    with pytest.raises(GuestError) as caught:
        get(guest, b"/trap")
    assert caught.value.outcome is CallOutcome.GUEST_TRAP
    assert get(guest, b"/")[2] == b"hello over wasi:http\n"


def test_half_an_answer_before_a_trap_is_not_the_beginning_of_the_next(guest):
    # the engine holds an unfinished line of standard output back, in the process: not in the store that is gone
    with pytest.raises(GuestError):
        get(guest, b"/half")
    assert get(guest, b"/")[2] == b"hello over wasi:http\n"


def test_the_adapters_own_imports_need_no_grant(image):
    assert image.not_granted(Grants()) == ()
    assert {name.partition("@")[0] for name in image.imports} > {"wasi:io/streams", "wasi:cli/stdin"}


def test_composing_grants_nothing_of_the_guests_own_imports(image, tmp_path):
    guest = wasmtime.wat2wasm("""
    (component
      (import "wasi:config/store@0.2.0-rc.1" (instance (export "gone" (func (result u64)))))
      (import "wasi:http/types@0.2.0" (instance $types
        (export "incoming-request" (type (sub resource))) (export "response-outparam" (type (sub resource)))))
      (alias export $types "incoming-request" (type $request))
      (alias export $types "response-outparam" (type $outparam))
      (core module $m (func (export "handle") (param i32 i32)))
      (core instance $i (instantiate $m))
      (func $handle (param "request" (own $request)) (param "response-out" (own $outparam))
        (canon lift (core func $i "handle")))
      (instance $handler (export "handle" (func $handle)))
      (export "wasi:http/incoming-handler@0.2.0" (instance $handler)))""")
    file = tmp_path / "config.cwasm"
    file.write_bytes(image.engine.compile(bytes(guest)))
    config = image.engine.load(str(file))
    assert config.not_granted(Grants()) == ("wasi:config/store@0.2.0-rc.1",)
    with pytest.raises(EngineError) as refused:
        start(config, limits=Limits(), grants=Grants(), config={}, log=print)
    assert refused.value.code is RejectCode.GRANT_DENIED


def test_a_guest_that_cannot_be_composed_is_a_refused_compilation(image):
    with pytest.raises(EngineError) as refused:
        image.engine.compile(PROBE[:9000])
    assert refused.value.code is RejectCode.COMPILE_FAILED


def counted(guest):
    return get(guest, b"/count")[2].decode().strip()


def test_each_request_gets_an_instance_of_its_own(guest):
    assert [counted(guest) for _ in range(3)] == ["1", "1", "1"]


def test_where_the_manifest_allows_it_an_instance_answers_more(image, lines):
    guest = Asked(image, lines, requests_per_instance=3)
    assert [counted(guest) for _ in range(7)] == ["1", "2", "3", "1", "2", "3", "1"]


@pytest.mark.parametrize("between", [b"/error", b"/silent", b"/cut"])
def test_an_instance_whose_answer_was_none_answers_no_more(image, lines, between):
    guest = Asked(image, lines, requests_per_instance=9)
    assert [counted(guest), counted(guest)] == ["1", "2"]
    get(guest, between)
    assert counted(guest) == "1"


def test_a_body_left_unread_is_never_the_next_requests(image, lines):
    guest = Asked(image, lines, requests_per_instance=9)
    assert counted(guest) == "1"
    assert guest.handle(b"POST", b"/", b"", b"not read by this path")[0] == 200
    assert guest.handle(b"POST", b"/echo", b"", b"")[2] == b""
    assert counted(guest) == "2"


def test_ten_thousand_requests_of_one_instance_take_no_more_memory(image, lines):
    # the adapter's arena is emptied at the end of an exchange: without that this would need some 20 MB
    guest = Asked(image, lines, requests_per_instance=10_000, memory_bytes=1 << 20)
    for _ in range(9_998):
        get(guest, b"/fields")
    assert counted(guest) == "9999"


def test_an_engine_that_keeps_the_room_of_instances_takes_the_same_images(tmp_path, lines):
    file = tmp_path / "probe.cwasm"
    file.write_bytes(Engine().compile(PROBE))
    guest = Asked(Engine(pooled=True).load(str(file)), lines)
    for size in (0, 1, 100_000) * 30:
        assert guest.handle(b"POST", b"/echo", b"", bytes(size))[2] == bytes(size)
        assert counted(guest) == "1", "kept room is empty room"


@pytest.mark.parametrize(("data", "status"), [(PROBE, 0), (PROBE[:9000], 3)])
def test_the_compiler_composes_inside_its_sandbox(data, status):
    done = subprocess.run([sys.executable, "-m", "agent.host.compiler"], input=data, capture_output=True, check=False)
    assert done.returncode == status, done.stderr
    assert bool(done.stdout) is (status == 0)


def test_the_compiler_writes_to_no_file_and_says_so(tmp_path):
    """In its sandbox no file can grow, the one behind its output included."""
    with (tmp_path / "image.cwasm").open("wb") as file:
        line = [sys.executable, "-m", "agent.host.compiler"]
        done = subprocess.run(line, input=PROBE, stdout=file, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 3
    assert json.loads(done.stderr)["message"].startswith("standard output is a file")
    assert (tmp_path / "image.cwasm").read_bytes() == b""


def test_an_image_is_made_again_for_another_adapter():
    assert describe()["adapter"] == compose.adapter_digest()[:16]


def test_one_crossing_in_and_one_out_for_a_request(guest, monkeypatch):
    """Bodies included: the engine reads the one from memory and writes the other there. Out goes the answer's end."""
    calls = []
    real = codec.ffi.wasmtime_component_func_call
    monkeypatch.setattr(codec.ffi, "wasmtime_component_func_call", lambda *a: calls.append("in") or real(*a))
    back = []

    def watch(frame, event, _argument):
        # the bindings' functions that the engine calls: host functions, streams
        if event == "call" and frame.f_code.co_name in {"func_impl", "custom_call"}:
            back.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        guest.handle(b"POST", b"/echo", b"host: x\r\n", bytes(65_536))
        guest.handle(b"GET", b"/describe", b"host: x\r\n", b"")
    finally:
        sys.setprofile(None)
    assert (calls, back) == (["in", "in"], ["func_impl"] * 2)

    back.clear()
    sys.setprofile(watch)
    try:
        guest.handle(b"GET", b"/fetch", b"", b"")
    finally:
        sys.setprofile(None)
    assert back == ["func_impl"] * 3, "an outgoing request asks the host twice more: the count sees crossings"
