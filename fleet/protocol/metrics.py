"""Figures of components: names, labels, bounds, and the gates that compare them with the version before.

A series is a kind, a name and its labels. Names follow Prometheus, with less freedom: a name is exported with a prefix,
labels that say where a figure comes from are the device's, and endings that other series of a figure have are taken.
Whatever a worker says is read by the same rules as what a guest asks for, since code that escaped may write anything.
"""

import re
from collections.abc import Iterable
from typing import Annotated, Final, Literal

import msgspec
from msgspec import Meta

from fleet.protocol.bounds import Count

MetricKind = Literal["counter", "gauge", "histogram"]

SERIES_MAX: Final = 64
"""Series of one instance: each combination of a name and labels is one."""

LABELS_MAX: Final = 8
NAME_MAX_CHARS: Final = 64
SERIES_MAX_BYTES: Final = 240
"""A name with its labels, in UTF-8."""

VALUE_MAX: Final = 1e15
"""Largest figure, either way: whole numbers below it are exact."""

BOUNDS: Final = (*(float(f"{digit}e{power}") for power in range(-3, 4) for digit in (1, 2, 5)), 10_000.0)
"""Upper bounds of a histogram's buckets, from 0.001 to 10,000; a last bucket has what is above."""

TOTAL: Final = "_total"
_ENDINGS: Final = ("_bucket", "_count", "_sum", "_created", "_info", "_gcount", "_gsum")
_NAME: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_OF_THE_DEVICE: Final = frozenset(
    {"component", "device", "instance", "instance_name", "job", "le", "quantile", "version"}
)

Labels = tuple[tuple[str, str], ...]


def family(kind: str, name: str) -> str:
    """Return the name of a figure without the `_total` with which a counter may be written."""
    return name.removesuffix(TOTAL) if kind == "counter" else name


def name_flaw(name: str) -> str:
    """Say why a figure cannot have this name, to follow its name; empty where it can."""
    if len(name) > NAME_MAX_CHARS:
        return f"has more than {NAME_MAX_CHARS} characters"
    if _NAME.fullmatch(name) is None or name.startswith("__"):
        return "is no name of a metric: letters, digits and _, no digit first"
    if found := next((each for each in (*_ENDINGS, TOTAL) if name.endswith(each)), ""):
        return f"ends with {found}, which other figures end with"
    return ""


def labels_flaw(labels: Labels) -> str:
    """Say why a figure cannot have these labels; empty where it can."""
    if len(labels) > LABELS_MAX:
        return f"{len(labels)} labels, at most {LABELS_MAX} are taken"
    if len({name for name, _ in labels}) < len(labels):
        return "a label is there twice"
    for name, value in labels:
        if len(name) > NAME_MAX_CHARS or _NAME.fullmatch(name) is None or name.startswith("__"):
            return f"{name[:40]!r} is no name of a label: letters, digits and _, no digit first"
        if name in _OF_THE_DEVICE:
            return f"the label {name} is the device's"
        if not value.isprintable():
            return f"the value of the label {name} has control characters"
    return ""


class Metric(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Series of figures of a component, since the version that runs started on this device.

    Attributes:
        value: of a counter its sum, of a gauge what it was set to last, of a histogram the sum of its values.
        count: how often a counter was added to, a gauge was set, a histogram got a value.
        total: of a gauge, the sum of everything that it was set to.
        buckets: of a histogram, values up to each of `BOUNDS`, and above; left out where the figures are summed up.
    """

    name: Annotated[str, Meta(max_length=NAME_MAX_CHARS)]
    kind: MetricKind
    labels: Annotated[dict[str, str], Meta(max_length=LABELS_MAX)] = {}
    value: Annotated[float, Meta(ge=-VALUE_MAX, le=VALUE_MAX)] = 0.0
    count: Count = 0
    total: Annotated[float, Meta(ge=-VALUE_MAX, le=VALUE_MAX)] = 0.0
    buckets: Annotated[tuple[Count, ...], Meta(max_length=len(BOUNDS) + 1)] = ()

    @property
    def flaw(self) -> str:
        """Say why no intact device says this; empty where one may."""
        return name_flaw(self.name) or labels_flaw(tuple(self.labels.items()))


Metrics = Annotated[tuple[Metric, ...], Meta(max_length=SERIES_MAX)]
"""Figures of one instance."""


def in_summary(metrics: Iterable[Metric]) -> tuple[Metric, ...]:
    """Return figures without buckets."""
    return tuple(msgspec.structs.replace(each, buckets=()) for each in metrics)
