"""Messages come back as they were sent; what is no message is refused with its reason."""

from datetime import UTC, datetime

import msgspec
import pytest

from fleet.protocol import assignment, messages, wire
from fleet.protocol.codes import RETRYABLE, Phase, RejectCode
from fleet.protocol.manifest import Grants

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
ITEM = assignment.Item(
    instance="hello",
    target="components/main/hello/1.0.0.wasm",
    length=3,
    sha256="0" * 64,
    manifest_sha256="1" * 64,
    grants=Grants(interfaces=("wasi:clocks",)),
    config={"greeting": "hi"},
    port=8081,
)
SAMPLES: list[wire.Message] = [
    messages.Hello(device="a-00000000", nonce="n", boot_id="b", accepted=3),
    messages.State(device="a-00000000", online=True),
    messages.Health(device="a-00000000", boot_id="b", at=NOW, problems=("disk is full",)),
    messages.Report(
        device="a-00000000", boot_id="b", sequence=7, at=NOW, assignment=3, phase=Phase.FAILED, code=RejectCode.NO_SPACE
    ),
    messages.Ack(sequence=9),
    messages.Poke(),
    assignment.Assignment(
        fleet="dev", device="a-00000000", version=4, issued=NOW, expires=NOW, items=(ITEM,), keep_data=("old",)
    ),
    assignment.Fresh(fleet="dev", device="a-00000000", nonce="n", assignment_sha256="", issued=NOW, expires=NOW),
    assignment.Command(
        fleet="dev",
        device="a-00000000",
        sequence=1,
        issued=NOW,
        expires=NOW,
        verb=assignment.Restart(instance="hello"),
    ),
]


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_round_trip(message):
    assert wire.decode(type(message), wire.encode(message)) == message


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_an_unknown_version_is_reported_not_guessed(message):
    data = wire.encode(message).replace(b'"v":1', b'"v":2')
    with pytest.raises(wire.UnknownSchemaError, match="schema version 2"):
        wire.decode(type(message), data)


@pytest.mark.parametrize("message", SAMPLES, ids=lambda message: type(message).__name__)
def test_a_newer_peers_field_does_no_harm(message):
    data = wire.encode(message)[:-1] + b',"from_the_future":{"x":1}}'
    assert wire.decode(type(message), data) == message


def test_figures_of_a_device_are_read_by_the_name_that_older_agents_send():
    figures = messages.DeviceResources(uptime_s=7, cpus=4)
    health = messages.Health(device="a-00000000", boot_id="b", at=NOW, resources=figures)
    older = wire.encode(health).replace(b'"resources":', b'"board":')
    read = wire.decode(messages.Health, older)
    assert read == health
    assert wire.encode(read) == wire.encode(health)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b'"x"', b"\xff\xfe", b'{"v":"1"}', b"[" * 100_000])
def test_what_is_no_message_is_refused(data):
    with pytest.raises(wire.WireError):
        wire.decode(messages.Hello, data)


def test_size_is_checked_first():
    with pytest.raises(wire.TooLargeError, match="at most 1024"):
        wire.decode(messages.Ack, b" " * 1025)


def test_canonical_bytes_do_not_depend_on_the_order_of_keys():
    assert wire.canonical({"b": 1, "a": {"d": 2, "c": 3}}) == b'{"a":{"c":3,"d":2},"b":1}'


def test_an_item_is_the_same_whatever_wants_it():
    again = msgspec.structs.replace(ITEM, attempt=2, rollout="r-2")
    assert again.same_as(ITEM)
    assert not msgspec.structs.replace(ITEM, config={}).same_as(ITEM)


def test_a_token_is_one_line_and_comes_back():
    token = messages.Token(
        url="https://127.0.0.1:1", fleet="dev", ca_sha256="a", root_sha256="b", floor=NOW, expires=NOW, secret="s"
    )
    line = token.encode()
    assert "\n" not in line
    assert messages.Token.decode(line + "\n") == token


@pytest.mark.parametrize("text", ["", "hello", "wf1.", "wf1.%%%", "wf1.e30", "wf1." + "A" * 5000])
def test_a_damaged_token_is_told_from_none(text):
    with pytest.raises(messages.BadTokenError, match=r"not an enrolment token|damaged"):
        messages.Token.decode(text)


def test_vocabularies_do_not_overlap_in_meaning():
    assert set(RejectCode) >= RETRYABLE
