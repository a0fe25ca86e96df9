"""Everything that crosses a boundary has bounds: walked by reflection, so that a new field is held to it too."""

import importlib
import pkgutil
from datetime import UTC, datetime

import msgspec
import pytest

import fleet.protocol
from fleet.protocol import bounds, operator_api, wire
from fleet.protocol.wire import Message

MODULES = (
    *(f"fleet.protocol.{module.name}" for module in pkgutil.iter_modules(fleet.protocol.__path__)),
    "agent.link.bundle",
    "agent.identity.enrolment",
    "agent.host.ipc.worker_api",
    "agent.host.egress",
    "agent.host.ipc.host_api",
    "agent.host.http.router",
    "fleet.evidence.sbom",
    "fleet.evidence.provenance",
    "fleet.admin.signing_host",
    "fleet.server.tuf_repository",
    "signing.dsse",
    "signing.sealing",
)
"""Where the messages are defined. What a program stores for itself alone is not among them."""


def structs():
    """Every struct of these modules, by name."""
    found = {}
    for name in MODULES:
        for each in vars(importlib.import_module(name)).values():
            if isinstance(each, type) and issubclass(each, msgspec.Struct) and each.__module__ in MODULES:
                found[f"{each.__module__}.{each.__qualname__}"] = each
    return found


STRUCTS = structs()


def flaw(kind):
    """Why a type may hold what nobody expects; empty for no reason."""
    match kind:
        case msgspec.inspect.IntType(ge=ge, le=le) | msgspec.inspect.FloatType(ge=ge, le=le) if None in {ge, le}:
            return "a number without bounds"
        case msgspec.inspect.DateTimeType(tz=tz) if tz is not True:
            return "a time that may have no zone"
        case msgspec.inspect.AnyType():
            return "anything at all"
    return ""


def parts(kind):
    """The types within a type; structs are walked by themselves."""
    match kind:
        case msgspec.inspect.UnionType(types=types):
            return types
        case msgspec.inspect.DictType():
            return (kind.key_type, kind.value_type)
        case msgspec.inspect.CollectionType():
            return (kind.item_type,)
        case msgspec.inspect.TupleType(item_types=types):
            return types
    return ()


def unbounded(kind, path):
    """Numbers without bounds, times without a zone and untyped values within a type."""
    if found := flaw(kind):
        yield path, found
    for each in parts(kind):
        yield from unbounded(each, path)


@pytest.mark.parametrize("name", STRUCTS)
def test_no_number_is_without_bounds_and_no_time_without_a_zone(name):
    found = [
        f"{path}: {what}"
        for field in msgspec.inspect.type_info(STRUCTS[name]).fields
        for path, what in unbounded(field.type, field.name)
    ]
    assert not found, f"{name}: {', '.join(found)}: use the types of fleet.protocol.bounds"


class _Unheld(msgspec.Struct):
    number: int
    share: float
    at: datetime
    several: tuple[int, ...]
    counts: dict[str, int]
    more: bounds.Count | float | None = None
    well: bounds.Count = 0
    measured: bounds.Figure = 0.0
    since: bounds.Utc | None = None


def test_the_walk_finds_what_it_is_for():
    fields = msgspec.inspect.type_info(_Unheld).fields
    found = {field.name for field in fields for _ in unbounded(field.type, field.name)}
    assert found == {"number", "share", "at", "several", "counts", "more"}
    assert len(STRUCTS) > 100


MESSAGES = [each for each in STRUCTS.values() if issubclass(each, Message) and each is not Message]


@pytest.mark.parametrize("kind", MESSAGES, ids=lambda kind: kind.__name__)
def test_strings_and_collections_are_bounded_by_the_size_of_their_message(kind):
    """Each message says how large it may be, and nothing larger is decoded."""
    assert "MAX_BYTES" in vars(kind)
    assert kind.MAX_BYTES <= bounds.API_BODY_MAX_BYTES
    with pytest.raises(wire.TooLargeError):
        wire.decode(kind, b" " * (kind.MAX_BYTES + 1))


@pytest.mark.parametrize("number", [2**53 + 1, 2**63, 2**64, 10**400, -1, -(2**63) - 1, 1.0, 1e300])
def test_a_count_is_a_whole_number_that_everybody_can_hold(number):
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(f"{number}".encode(), type=bounds.Count)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400", "1e13", "-1e13", "9" * 400])
def test_a_figure_is_a_finite_number(number):
    with pytest.raises(msgspec.MsgspecError):
        msgspec.json.decode(number.encode(), type=bounds.Figure)


def test_the_longest_wait_ends_at_a_time():
    assert datetime.fromtimestamp(datetime(2100, 1, 1, tzinfo=UTC).timestamp() + bounds.WAIT_MAX_S, UTC)


def test_the_largest_of_everything_is_taken():
    assert msgspec.json.decode(str(2**53).encode(), type=bounds.Count) == 2**53
    assert msgspec.json.decode(str(2**63 - 1).encode(), type=bounds.Stored) == 2**63 - 1
    request = operator_api.RolloutRequest(
        instance="i", port=65_535, attempt=2**53, soak_s=bounds.WAIT_MAX_S, failures=2**53, timeout_s=bounds.WAIT_MAX_S
    )
    assert msgspec.json.decode(msgspec.json.encode(request), type=operator_api.RolloutRequest) == request
