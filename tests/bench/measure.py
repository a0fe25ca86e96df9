"""Samples of the request bench: what one run of wrk says, medians of them, ratios of pairs, and the tables.

Everything here is a function of its arguments; `tests/bench/request_path.py` runs the processes.

A *pair* is a sample of the product and one of its peer out of the same round. The ratio of a case is the median of the
pairs' ratios, not the ratio of two medians: a round that another process disturbed then counts once, on both sides.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

CLIENT_FULL = 0.9
"""Share of its core above which the client, not the server, may have been the limit."""

DISTURBED = 0.05
"""Share of the server's core above which other processes' work is named beside the figure."""

MARK = "wasmfleet-bench"

# The last line is ours: wrk's own report rounds, and hides errors that are none.
SCRIPT = f"""
done = function(summary, latency, requests)
  local e = summary.errors
  io.write(string.format("{MARK} %d %d %d %d %d %d %d %d %d\\n", summary.requests, summary.duration,
    e.connect, e.read, e.write, e.status, e.timeout, latency:percentile(50), latency:percentile(99)))
end
"""


class WrkError(Exception):
    """wrk ended without its figures."""


@dataclass(frozen=True)
class Load:
    """Figures of one run of wrk. Times in microseconds."""

    requests: int
    duration_us: int
    errors: Mapping[str, int]
    p50_us: int
    p99_us: int


@dataclass(frozen=True)
class Sample:
    """Run of a contestant.

    Attributes:
        rate: good answers a second.
        p50_us, p99_us: time until an answer was whole, as the client saw it.
        errors: kind of error (connect, read, write, status, timeout) -> how many; only kinds that occurred.
        server_us: processor time of all processes of the server for one answer.
        front_us: the part of it that the router or proxy in front took; None without one.
        client: share of its core that the client used.
        server: share of its core that the server used; what is missing to 1 it waited, or others took.
        others: share of the server's core that processes outside of the bench used.
    """

    rate: float
    p50_us: float
    p99_us: float
    errors: Mapping[str, int]
    server_us: float
    front_us: float | None
    client: float
    server: float
    others: float


@dataclass(frozen=True)
class Row:
    """A contestant's line of a table: medians of its samples, and of the ratios to its peer.

    Attributes:
        ratio: the median of the pairs' ratios, and how many pairs; None for a peer, or without one.
        low, high: the least and greatest of these ratios.
        remarks: what a reader must know to believe the figures.
    """

    name: str
    rate: float
    p50_us: float
    p99_us: float
    server_us: float
    front_us: float | None
    server: float
    ratio: float | None
    low: float | None
    high: float | None
    remarks: tuple[str, ...]


def script(method: str, body_bytes: int) -> str:
    """Write the Lua script that makes wrk send these requests and report as `parse` reads."""
    lines = [f'wrk.method = "{method}"'] if method != "GET" else []
    if body_bytes:
        lines.append(f'wrk.body = string.rep("x", {body_bytes})')
    return "\n".join(lines) + SCRIPT


def parse(output: str) -> Load:
    """Read the figures from wrk's output.

    Raises:
        WrkError: they are not there.
    """
    for line in reversed(output.splitlines()):
        mark, _, rest = line.partition(" ")
        if mark == MARK:
            requests, duration_us, *errors, p50_us, p99_us = (int(word) for word in rest.split())
            kinds = ("connect", "read", "write", "status", "timeout")
            found = {kind: number for kind, number in zip(kinds, errors, strict=True) if number}
            return Load(requests, duration_us, found, p50_us, p99_us)
    raise WrkError(f"wrk printed no figures: {output.strip()[-500:]!r}")


def sample(
    load: Load, *, server_ns: int, front_ns: int | None, client_s: float, busy_ns: int, elapsed_ns: int
) -> Sample:
    """Relate what wrk counted to the processor time of its run.

    Args:
        load: wrk's own figures.
        server_ns: processor time of the server's processes during the run.
        front_ns: the same of the router or proxy among them, None without one.
        client_s: processor time of wrk, in seconds.
        busy_ns: time during which the server's core was busy with anything, ours included.
        elapsed_ns: time in which that was: wrk's own duration and its start and end.
    """
    good = max(load.requests - load.errors.get("status", 0), 0)
    each = max(good, 1) * 1000
    return Sample(
        rate=good * 1_000_000 / max(load.duration_us, 1),
        p50_us=load.p50_us,
        p99_us=load.p99_us,
        errors=load.errors,
        server_us=server_ns / each,
        front_us=None if front_ns is None else front_ns / each,
        client=client_s * 1_000_000 / max(load.duration_us, 1),
        server=server_ns / max(load.duration_us * 1000, 1),
        others=max(busy_ns - server_ns, 0) / elapsed_ns,
    )


def ratios(ours: Sequence[Sample], theirs: Sequence[Sample]) -> list[float]:
    """Return the ratio of rates of each pair; a pair whose peer answered nothing has none."""
    return [mine.rate / other.rate for mine, other in zip(ours, theirs, strict=True) if other.rate]


def front_ratio(ours: Sequence[Sample], theirs: Sequence[Sample]) -> float | None:
    """Return the median of the pairs' ratios of processor time in front; None if either has nothing in front."""
    pairs = ((mine.front_us, other.front_us) for mine, other in zip(ours, theirs, strict=True))
    found = [mine / other for mine, other in pairs if mine is not None and other]
    return statistics.median(found) if found else None


def remarks(samples: Sequence[Sample]) -> Iterable[str]:
    """Say what a reader must know about these figures: errors, a client that was full, other work on the core."""
    total: dict[str, int] = {}
    for each in samples:
        for kind, number in each.errors.items():
            total[kind] = total.get(kind, 0) + number
    if total:
        yield "errors: " + ", ".join(f"{number} {kind}" for kind, number in sorted(total.items()))
    if any(each.client > CLIENT_FULL for each in samples):
        yield "client's core full: the server can do more"
    if (others := statistics.median(each.others for each in samples)) > DISTURBED:
        yield f"other processes used {others:.0%} of the core"


def row(name: str, samples: Sequence[Sample], peer: Sequence[Sample] | None) -> Row:
    """Make a contestant's line from its samples and those of its peer, in the order of the rounds."""
    found = ratios(samples, peer) if peer is not None else []
    fronts = [each.front_us for each in samples if each.front_us is not None]
    return Row(
        name=name,
        rate=statistics.median(each.rate for each in samples),
        p50_us=statistics.median(each.p50_us for each in samples),
        p99_us=statistics.median(each.p99_us for each in samples),
        server_us=statistics.median(each.server_us for each in samples),
        front_us=statistics.median(fronts) if fronts else None,
        server=statistics.median(each.server for each in samples),
        ratio=statistics.median(found) if found else None,
        low=min(found, default=None),
        high=max(found, default=None),
        remarks=tuple(remarks(samples)),
    )


HEAD = (
    "",
    "requests/s",
    "of its peer (least-greatest)",
    "p50 us",
    "p99 us",
    "processor us",
    "of it in front",
    "of its core",
    "",
)


def cells(line: Row) -> tuple[str, ...]:
    """Return a line's cells, as text."""
    ratio = "" if line.ratio is None else f"**{line.ratio:.2f}**"
    if line.low != line.high:
        ratio += f" ({line.low:.2f}-{line.high:.2f})"
    front = "" if line.front_us is None else f"{line.front_us:.0f}"
    figures = (f"{line.p50_us:,.0f}", f"{line.p99_us:,.0f}", f"{line.server_us:.0f}", front, f"{line.server:.0%}")
    return (line.name, f"{line.rate:,.0f}", ratio, *figures, "; ".join(line.remarks))


def table(rows: Iterable[Row], absent: Mapping[str, str]) -> str:
    """Render a table of Markdown; `absent` names contestants that did not run, and why, each on a line of its own."""
    lines = [HEAD, ("---", *["---:"] * (len(HEAD) - 2), "---"), *map(cells, rows)]
    lines += [(name, *["-"] * (len(HEAD) - 2), f"**not measured**: {why}") for name, why in absent.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
