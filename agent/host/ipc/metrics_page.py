"""Page of a component's own figures in shared memory: the worker writes, the supervisor reads without waking it.

A page is a memfd of fixed size with room for `SERIES_MAX` series. A number is written in one piece, and a series is
whole before the page counts it. Whoever reads a page believes nothing: what does not follow `fleet.protocol.metrics` is
left out, and every number is brought within its bounds.
"""

import math
import mmap
import os
import struct
from bisect import bisect_left
from collections.abc import Iterable
from typing import Final, NamedTuple, get_args

from agent.host.ipc.framing import sealed_memfd
from fleet.protocol.bounds import NUMBER_MAX
from fleet.protocol.metrics import (
    BOUNDS,
    SERIES_MAX,
    SERIES_MAX_BYTES,
    VALUE_MAX,
    Labels,
    Metric,
    MetricKind,
    labels_flaw,
    name_flaw,
)

_RECORD: Final = 512
SIZE: Final = -(-_RECORD * (SERIES_MAX + 1) // mmap.PAGESIZE) * mmap.PAGESIZE
KINDS: Final[tuple[MetricKind, ...]] = get_args(MetricKind)
_BUCKETS: Final = len(BOUNDS) + 1

# Of a record, in words of eight bytes: kind (index), bytes of the name and labels, value, sum, count, when it was set
# last (monotonic ns), buckets, then name and labels, separated by NUL.
_WORDS: Final = _RECORD // 8
_KIND, _LENGTH, _VALUE, _TOTAL, _COUNT, _SET, _FIRST_BUCKET = range(7)
_TEXT: Final = 8 * (_FIRST_BUCKET + _BUCKETS)
_HEAD: Final = struct.Struct(f"=QQddQQ{_BUCKETS}Q")

assert _TEXT + SERIES_MAX_BYTES <= _RECORD


def create_page(name: str) -> int:
    """Return the descriptor of a new page without series. Raises `OSError`."""
    return sealed_memfd(f"metrics-{name}", SIZE)


class Key(NamedTuple):
    """Identity of a series; its labels are sorted."""

    kind: MetricKind
    name: str
    labels: Labels

    def encode(self) -> bytes:
        """Return name and labels as a page has them."""
        return "\0".join((self.name, *(part for label in self.labels for part in label))).encode()


class MetricsPage:
    """Mapped page, for the worker."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, SIZE)
        self._words = memoryview(self._map).cast("Q")
        self._floats = memoryview(self._map).cast("d")
        self._series = 0

    def add(self, key: Key) -> int:
        """Add a series and return its number; -1 where there is no room for more."""
        if self._series == SERIES_MAX:
            return -1
        text = key.encode()
        self._series += 1
        at = self._series * _WORDS
        self._map[8 * at + _TEXT : 8 * at + _TEXT + len(text)] = text
        self._words[at + _KIND] = KINDS.index(key.kind)
        self._words[at + _LENGTH] = len(text)
        self._words[0] = self._series
        return self._series

    def increase(self, series: int, by: float) -> None:
        """Add to a counter."""
        at = series * _WORDS
        self._floats[at + _VALUE] = min(self._floats[at + _VALUE] + by, VALUE_MAX)
        self._words[at + _COUNT] += 1

    def set(self, series: int, value: float, now_ns: int) -> None:
        """Set a gauge."""
        at = series * _WORDS
        self._floats[at + _VALUE] = value
        self._floats[at + _TOTAL] = _within(self._floats[at + _TOTAL] + value)
        self._words[at + _SET] = now_ns
        self._words[at + _COUNT] += 1

    def record(self, series: int, value: float) -> None:
        """Put a value into a histogram."""
        at = series * _WORDS
        self._words[at + _FIRST_BUCKET + bisect_left(BOUNDS, value)] += 1
        self._floats[at + _VALUE] = _within(self._floats[at + _VALUE] + value)
        self._words[at + _COUNT] += 1


class Series(NamedTuple):
    """Figures of a series; `times` is `Metric.count`, and the rest is as there."""

    value: float
    total: float
    times: int
    set_ns: int
    buckets: tuple[int, ...]

    def plus(self, other: "Series", kind: MetricKind) -> "Series":
        """Return the figures of two workers together; a gauge has the value that was set last."""
        later = max(self, other, key=lambda each: each.set_ns)
        return Series(
            value=later.value if kind == "gauge" else _within(self.value + other.value),
            total=_within(self.total + other.total),
            times=min(self.times + other.times, NUMBER_MAX),
            set_ns=later.set_ns,
            buckets=tuple(min(sum(pair), NUMBER_MAX) for pair in zip(self.buckets, other.buckets, strict=True)),
        )


Figures = dict[Key, Series]
NOTHING: Final[Figures] = {}


def read(fd: int) -> Figures:
    """Read a page, as far as it can be believed."""
    data = os.pread(fd, SIZE, 0)
    series = min(int.from_bytes(data[:8], "little"), SERIES_MAX) if len(data) == SIZE else 0
    found: Figures = {}
    for number in range(1, series + 1):
        entry = _read(data[number * _RECORD : (number + 1) * _RECORD])
        if entry is not None:
            found[entry[0]] = entry[1]
    return merged([found])


def _read(record: bytes) -> tuple[Key, Series] | None:
    kind, length, value, total, count, set_ns, *buckets = _HEAD.unpack_from(record)
    if kind >= len(KINDS) or length > SERIES_MAX_BYTES:
        return None
    try:
        name, *words = record[_TEXT : _TEXT + length].decode().split("\0")
    except UnicodeDecodeError:
        return None
    labels = tuple(sorted(zip(words[::2], words[1::2], strict=False)))
    if len(words) % 2 or name_flaw(name) or labels_flaw(labels):
        return None
    numbers = tuple(min(each, NUMBER_MAX) for each in buckets) if KINDS[kind] == "histogram" else (0,) * _BUCKETS
    least = 0.0 if KINDS[kind] == "counter" else -VALUE_MAX
    figures = Series(max(_within(value), least), _within(total), min(count, NUMBER_MAX), set_ns, numbers)
    return Key(KINDS[kind], name, labels), figures


def _within(value: float) -> float:
    return min(max(value, -VALUE_MAX), VALUE_MAX) if math.isfinite(value) else 0.0


def merged(parts: Iterable[Figures]) -> Figures:
    """Return the figures of several workers together: `SERIES_MAX` series, and one kind for each name."""
    found: Figures = {}
    kinds: dict[str, MetricKind] = {}
    for part in parts:
        for key, series in part.items():
            if kinds.setdefault(key.name, key.kind) != key.kind:
                continue
            if key in found:
                found[key] = found[key].plus(series, key.kind)
            elif len(found) < SERIES_MAX:
                found[key] = series
    return found


def metrics(figures: Figures) -> tuple[Metric, ...]:
    """Return figures as messages have them, by name and labels."""
    return tuple(
        Metric(
            name=key.name,
            kind=key.kind,
            labels=dict(key.labels),
            value=series.value,
            count=series.times,
            total=series.total,
            buckets=series.buckets if key.kind == "histogram" else (),
        )
        for key, series in sorted(figures.items())
    )
