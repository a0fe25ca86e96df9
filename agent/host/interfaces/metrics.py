"""wasmfleet:metrics: counters, gauges and histograms of a component."""

import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Final

from agent.host.engine.adapter_abi import Denials
from agent.host.engine.codec import Signature
from agent.host.engine.host_interface import Function, HostInterface, Surroundings
from agent.host.interfaces.package import Package
from agent.host.ipc.metrics_page import Key, MetricsPage
from agent.host.ipc.worker_api import TokenBucket
from fleet.component import wasi
from fleet.protocol.metrics import (
    SERIES_MAX,
    SERIES_MAX_BYTES,
    VALUE_MAX,
    MetricKind,
    family,
    labels_flaw,
    name_flaw,
)

NAME: Final = "wasmfleet:metrics"
CALLS_A_MINUTE: Final = 600_000
"""Calls that a worker's component may make in a minute, and at once: figures are summed up there beyond that."""

_KNOWN_MAX: Final = 4 * SERIES_MAX
"""Ways to write a series that are found again at once, such as other orders of its labels."""

_FUNCTIONS: Final[Mapping[str, MetricKind]] = {
    "counter-add": "counter",
    "gauge-set": "gauge",
    "histogram-record": "histogram",
}
_Written = tuple[str, tuple[tuple[str, str], ...]]


class Meter:
    """Figures of one worker's component; they outlive an instance of the guest."""

    def __init__(self, fd: int | None, redact: Callable[[str], str] = str) -> None:
        """`fd`: of the page, closed here; None without the grant. `redact` takes what is secret out of a text."""
        self._page = None if fd is None else MetricsPage(fd)
        if fd is not None:
            os.close(fd)
        self._redact = redact
        self._calls = TokenBucket(CALLS_A_MINUTE)
        self._kinds: dict[str, MetricKind] = {}
        self._series: dict[Key, int] = {}
        self._known: dict[MetricKind, dict[_Written, int]] = {kind: {} for kind in _FUNCTIONS.values()}

    def reset(self) -> None:
        """Keep everything: figures are the component's, whatever becomes of an instance."""

    def call(self, denials: Denials, function: str, name: str, labels: list[tuple[str, str]], value: float) -> None:
        """Take a value for a series, or count the call as denied."""
        kind = _FUNCTIONS[function]
        if not self._calls.take():
            self._deny(denials, function, "rate", f"{CALLS_A_MINUTE} calls a minute are allowed")
            return
        if not math.isfinite(value) or abs(value) > VALUE_MAX or (kind == "counter" and value < 0):
            least = "0" if kind == "counter" else f"-{VALUE_MAX:.0e}"
            self._deny(
                denials, function, "value", f"{name[:64]!r}: {value} is no number from {least} to {VALUE_MAX:.0e}"
            )
            return
        written = name, tuple(labels)
        series = self._known[kind].get(written) or self._find(denials, function, written)
        if series is None or self._page is None:
            return
        if kind == "counter":
            self._page.increase(series, value)
        elif kind == "gauge":
            self._page.set(series, value, time.monotonic_ns())
        else:
            self._page.record(series, value)

    def _find(self, denials: Denials, function: str, written: _Written) -> int | None:
        """Return the number of a series, which is added where it is new; None where it is denied."""
        kind, labels = _FUNCTIONS[function], tuple(sorted((name, self._redact(value)) for name, value in written[1]))
        name = family(kind, written[0])
        key = Key(kind, name, labels)
        if flaw := name_flaw(name):
            self._deny(denials, function, "name", f"{name[:64]!r} {flaw}")
        elif flaw := labels_flaw(labels):
            self._deny(denials, function, "labels", f"{name}: {flaw}")
        elif len(key.encode()) > SERIES_MAX_BYTES:
            self._deny(denials, function, "size", f"{name} and its labels have more than {SERIES_MAX_BYTES} bytes")
        elif self._kinds.get(name, kind) != kind:
            self._deny(denials, function, "kind", f"{name} is a {self._kinds[name]}")
        else:
            series = self._series.get(key) or self._add(key)
            if series > 0:
                known = self._known[kind]
                if len(known) >= _KNOWN_MAX:
                    known.clear()
                known[written] = series
                return series
            said = f"{name}: {SERIES_MAX} names with different labels are there, more are not kept"
            self._deny(denials, function, "series", said)
        return None

    def _add(self, key: Key) -> int:
        series = -1 if self._page is None else self._page.add(key)
        if series > 0:
            self._series[key] = series
            self._kinds[key.name] = key.kind
        return series

    def _deny(self, denials: Denials, function: str, why: str, said: str) -> None:
        called = f"{wasi.METRICS}.{function}"
        denials.deny(f"{called} {why}", f"{called} is denied: {said}")


def _make(around: Surroundings) -> Mapping[str, Function]:
    meter = around.parts.get(NAME)
    found, denials = meter if isinstance(meter, Meter) else Meter(None), around.log

    def function(called: str) -> Function:
        return lambda _store, name, labels, value: found.call(denials, called, name, labels, value)

    return {each: function(each) for each in _FUNCTIONS}


_SIGNATURE: Final = Signature((("name", "string"), ("labels", "list<tuple<string, string>>"), ("value", "f64")))

PACKAGE: Final = Package(
    name=NAME,
    about="""\
Figures of a component, for [Prometheus and for gates](monitoring.md#figures-of-components): counters that are added to,
gauges that are set, histograms that get values. A series exists from the first call on. Nothing is returned: a value
that is not taken is counted as a denial, and the first one of each reason is named in the log. Figures are those of
the version that runs: they begin at zero with the next one, and outlive traps and restarts of workers, not of the
host.""",
    grant='`interfaces = ["wasmfleet:metrics"]`',
    limits={
        "series": "64 of an instance: each name with other labels is one",
        "name": "64 characters: letters, digits and `_`; a counter may end with `_total`, which is left out; not "
        "`_bucket`, `_count`, `_sum`, `_created`, `_info`",
        "labels": "8; with the name 240 bytes; not `component`, `device`, `instance`, `instance_name`, `job`, "
        "`le`, `quantile`, `version`",
        "value": "finite, up to 10^15; of a counter not below 0",
        "histogram": "buckets at 1, 2 and 5 of each power of ten, from 0.001 to 10,000",
        "calls a minute": "600,000 of a worker",
    },
    counters={"denials": "values that were not taken"},
    rust="""\
use wasmfleet::metrics::metrics::{counter_add, gauge_set, histogram_record};

counter_add("read_errors", &[("bus".into(), "rs485".into())], 1.0);
gauge_set("tank_litres", &[], 812.5);
histogram_record("read_seconds", &[], 0.042);""",
    python="""\
from wit_world.imports import metrics

metrics.counter_add("read_errors", [("bus", "rs485")], 1.0)
metrics.gauge_set("tank_litres", [], 812.5)
metrics.histogram_record("read_seconds", [], 0.042)""",
    interfaces=(HostInterface(wasi.METRICS, ("0.1.0",), dict.fromkeys(_FUNCTIONS, _SIGNATURE), _make),),
)
