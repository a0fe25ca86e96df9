"""wasmfleet:metrics on both sides of the page: the rate of calls, secrets, and a page that a worker wrote at will."""

import math
import os
import struct

import pytest

from agent.host.engine.adapter_abi import Denials
from agent.host.interfaces import metrics
from agent.host.interfaces.metrics import Meter
from agent.host.ipc import metrics_page
from agent.host.ipc.metrics_page import Key
from fleet.protocol.bounds import NUMBER_MAX
from fleet.protocol.metrics import SERIES_MAX, VALUE_MAX


@pytest.fixture
def page():
    """The descriptor of a page."""
    fd = metrics_page.create_page("web")
    yield fd
    os.close(fd)


@pytest.fixture
def said():
    """What denials say."""
    return []


@pytest.fixture
def denials(said):
    return Denials(said.append)


def values(fd):
    return {(each.name, *each.labels.values()): each.value for each in metrics_page.metrics(metrics_page.read(fd))}


def test_calls_over_the_rate_are_denied(page, denials, said, monkeypatch):
    monkeypatch.setattr(metrics, "CALLS_A_MINUTE", 3)
    meter = Meter(os.dup(page))
    for _ in range(5):
        meter.call(denials, "counter-add", "seen", [], 1.0)
    assert values(page) == {("seen",): 3}
    assert len(said) == 1
    assert "3 calls a minute are allowed" in said[0]


def test_labels_stand_in_any_order_and_a_secret_in_none(page, denials):
    meter = Meter(os.dup(page), lambda text: text.replace("hunter2", "redacted"))
    meter.call(denials, "counter-add", "seen", [("a", "1"), ("b", "hunter2")], 1.0)
    meter.call(denials, "counter-add", "seen", [("b", "hunter2"), ("a", "1")], 1.0)
    assert values(page) == {("seen", "1", "redacted"): 2}


def test_ways_to_write_series_that_are_remembered_are_bounded(page, denials):
    meter = Meter(os.dup(page))
    names = [f"l{number}" for number in range(6)]
    for turn in range(3000):
        names = names[1:] + names[:1] if turn % 6 else [names[1], names[0], *names[2:]]
        meter.call(denials, "counter-add", "seen", [(name, "") for name in names], 1.0)
    assert values(page) == {("seen", *[""] * 6): 3000}
    assert max(map(len, meter._known.values())) <= metrics._KNOWN_MAX  # a bound on memory, which shows in nothing else


@pytest.mark.parametrize(("function", "value"), [("counter-add", -1.0), ("gauge-set", math.inf), ("gauge-set", 1e16)])
def test_a_value_out_of_bounds_changes_nothing(page, denials, said, function, value):
    meter = Meter(os.dup(page))
    meter.call(denials, function, "seen", [], value)
    assert values(page) == {}
    assert "no number from" in said[0]


def test_sums_stay_within_their_bounds(page, denials):
    meter = Meter(os.dup(page))
    for _ in range(3):
        meter.call(denials, "counter-add", "seen", [], VALUE_MAX)
        meter.call(denials, "histogram-record", "size", [], -VALUE_MAX)
    assert values(page) == {("seen",): VALUE_MAX, ("size",): -VALUE_MAX}


def write(fd, number, *, kind=0, length=None, value=1.0, total=0.0, count=1, text=b"seen", buckets=0):
    record = struct.pack(
        "=QQddQQ23Q", kind, len(text) if length is None else length, value, total, count, 7, *[buckets] * 23
    )
    os.pwrite(fd, record + text, 512 * number)


HOSTILE = [
    {"kind": 3},
    {"kind": 2**64 - 1},
    {"length": 2**64 - 1},
    {"length": 241, "text": b"x" * 241},
    {"text": b"\xff\xfe"},
    {"text": b"seen\0bus"},
    {"text": b"seen\0instance\0other"},
    {"text": b"seen\0bus\0a\nb"},
    {"text": b"seen\0bus\0a\0bus\0b"},
    {"text": b"wasm fleet"},
    {"text": b""},
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_series_that_no_intact_worker_writes_is_left_out(page, hostile):
    write(page, 1, **hostile)
    write(page, 2, text=b"good")
    os.pwrite(page, struct.pack("=Q", 2), 0)
    assert values(page) == {("good",): 1}


def test_numbers_of_a_hostile_page_are_brought_within_their_bounds(page):
    write(page, 1, text=b"a", value=math.nan, total=math.inf, count=2**64 - 1)
    write(page, 2, text=b"b", value=-5.0)
    write(page, 3, text=b"c", kind=1, value=-1e300, total=1e300)
    write(page, 4, text=b"d", kind=2, buckets=2**64 - 1)
    write(page, 5, text=b"d", kind=1)
    os.pwrite(page, struct.pack("=Q", 2**64 - 1), 0)
    found = {each.name: each for each in metrics_page.metrics(metrics_page.read(page))}
    assert (found["a"].value, found["a"].total, found["a"].count) == (0, 0, NUMBER_MAX)
    assert found["b"].value == 0
    assert (found["c"].value, found["c"].total) == (-VALUE_MAX, VALUE_MAX)
    assert (found["d"].kind, set(found["d"].buckets)) == ("histogram", {NUMBER_MAX})


def test_figures_of_several_workers_come_together():
    def series(value, count, set_ns):
        return metrics_page.Series(value, 2 * value, count, set_ns, (count,) * 23)

    count, level, other = Key("counter", "n", ()), Key("gauge", "level", ()), Key("gauge", "n", ())
    old = {count: series(3.0, 2, 0), level: series(5.0, 1, 100)}
    new = {count: series(4.0, 1, 0), level: series(1.0, 4, 50), other: series(9.0, 1, 0)}
    found = metrics_page.merged([old, new])
    assert set(found) == {count, level}
    assert (found[count].value, found[count].times) == (7, 3)
    assert (found[level].value, found[level].total, found[level].times) == (5, 12, 5)
    many = [{Key("counter", f"n{number}", ()): series(1.0, 1, 0)} for number in range(SERIES_MAX + 9)]
    assert len(metrics_page.merged(many)) == SERIES_MAX
