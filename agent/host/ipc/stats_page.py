"""Page of a worker's figures in shared memory: the worker writes, the supervisor reads without waking it.

A page is a memfd of fixed size (sealed against resizing, so that no worker can truncate it under the supervisor). A
reader may see a call that is only partly counted, which statistics tolerate.

A worker with a channel has two. Its calls are in the one that the router writes, and the worker never has a descriptor
of it: by that page the supervisor knows which call runs, whatever code in the worker does. The worker writes the other;
there the router only repeats the number of the call, for the thread in the worker that carries out interrupts.
"""

import bisect
import itertools
import mmap
import struct
from dataclasses import dataclass, field
from typing import Final

from agent.host.ipc import keyvalue_api
from agent.host.ipc.framing import sealed_memfd
from fleet.protocol.bounds import NUMBER_MAX
from fleet.protocol.codes import CallOutcome
from fleet.protocol.messages import LATENCY_BOUNDS_MS

SIZE: Final = 4096
_RING: Final = 512
_OUTCOMES: Final = tuple(CallOutcome)

# errors, calls, began (monotonic ns of the call in flight, 0 for none), log lines dropped, denials, requests sent,
# nanoseconds of the processor's time, number of the call in flight (0 for none)
_ERRORS, _CALLS, _BEGAN, _DROPPED, _DENIED, _OUTGOING, _CPU, _NUMBER = 0, 8, 16, 24, 32, 40, 48, 56

_COUNTS: Final = 64
_CPU_MAX_NS: Final = 2**56  # of one page: two years
_CPU_SUM_MAX_NS: Final = NUMBER_MAX * 1_000_000  # reported in milliseconds
_WAITS: Final = 512  # 1 while the call in flight waits for its client, not for anything of the guest's
_PAIRS: Final = 520  # reads, writes and bytes of the key-value store
_DURATIONS: Final = 544  # calls by `LATENCY_BOUNDS_MS` and above, then the sum of their microseconds
_LATENCIES: Final = 1024
_BOUNDS_US: Final = tuple(1000 * each for each in LATENCY_BOUNDS_MS)
_BUCKETS: Final = len(_BOUNDS_US) + 1
_U64: Final = struct.Struct("=Q")
_U32: Final = struct.Struct("=I")


def count_of(value: int) -> int:
    """Return a figure, limited to the largest number that a message may contain."""
    return min(value, NUMBER_MAX)


def create_page(name: str) -> int:
    """Return the descriptor of a new page, all zero."""
    return sealed_memfd(f"figures-{name}", SIZE)


@dataclass(frozen=True, slots=True)
class CallStats:
    """Figures of a page: calls by outcome, responses with status 500 and above, latest latencies in microseconds.

    Attributes:
        durations: all calls by `LATENCY_BOUNDS_MS`, and longer ones.
        durations_us: sum of these, in microseconds.
    """

    calls: dict[str, int] = field(default_factory=dict)
    errors: int = 0
    latencies_us: tuple[int, ...] = ()
    began_ns: int = 0
    dropped_lines: int = 0
    denials: int = 0
    outgoing: int = 0
    cpu_ns: int = 0
    pairs: keyvalue_api.Figures = keyvalue_api.UNUSED
    durations: tuple[int, ...] = (0,) * _BUCKETS
    durations_us: int = 0

    def plus(self, other: "CallStats") -> "CallStats":
        """Return the sum of both; `other` has the newer latencies."""
        calls = dict(self.calls)
        for outcome, count in other.calls.items():
            calls[outcome] = count_of(calls.get(outcome, 0) + count)
        return CallStats(
            calls=calls,
            errors=count_of(self.errors + other.errors),
            latencies_us=(self.latencies_us + other.latencies_us)[-_RING:],
            dropped_lines=count_of(self.dropped_lines + other.dropped_lines),
            denials=count_of(self.denials + other.denials),
            outgoing=count_of(self.outgoing + other.outgoing),
            cpu_ns=min(self.cpu_ns + other.cpu_ns, _CPU_SUM_MAX_NS),
            pairs=keyvalue_api.Figures(*map(count_of, map(sum, zip(self.pairs, other.pairs, strict=True)))),
            durations=tuple(map(count_of, map(sum, zip(self.durations, other.durations, strict=True)))),
            durations_us=count_of(self.durations_us + other.durations_us),
        )

    def percentile_us(self, share: float) -> int:
        """Return the latency within which `share` of the latest calls ended; 0 without calls."""
        ordered = sorted(self.latencies_us)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0

    def spread(self) -> tuple[int, ...]:
        """Return the histogram of latencies by `LATENCY_BOUNDS_MS`, with a last bucket beyond; empty without calls."""
        ordered = sorted(self.latencies_us)
        upto = [bisect.bisect_right(ordered, bound_ms * 1000) for bound_ms in LATENCY_BOUNDS_MS]
        counts = (after - before for before, after in itertools.pairwise((0, *upto, len(ordered))))
        return tuple(counts) if ordered else ()


class StatsPage:
    """Mapped page, for its writer or its reader."""

    def __init__(self, fd: int) -> None:
        self._map = mmap.mmap(fd, SIZE)

    def _add(self, at: int, more: int = 1) -> int:
        value: int = _U64.unpack_from(self._map, at)[0] + more
        _U64.pack_into(self._map, at, value)
        return value

    def begin(self, now_ns: int, number: int) -> None:
        """Record the begin of a call."""
        _U64.pack_into(self._map, _NUMBER, number)
        _U64.pack_into(self._map, _BEGAN, now_ns)

    def rest(self) -> None:
        """Record that no call is in flight."""
        _U64.pack_into(self._map, _BEGAN, 0)
        _U64.pack_into(self._map, _NUMBER, 0)
        _U64.pack_into(self._map, _WAITS, 0)

    def repeat(self, number: int) -> None:
        """Let the worker know the number of the call in flight, which another page records; 0 for none."""
        _U64.pack_into(self._map, _NUMBER, number)

    def wait(self, waits: bool) -> None:  # noqa: FBT001 - written as it is
        """Record whether the call in flight waits for its client."""
        _U64.pack_into(self._map, _WAITS, waits)

    def end(self, outcome: CallOutcome, us: int | None = None, *, error: bool = False) -> None:
        """Count a call that ended after `us` microseconds of guest time (None: the guest was not entered)."""
        _U64.pack_into(self._map, _BEGAN, 0)
        self._add(_COUNTS + 8 * _OUTCOMES.index(outcome))
        if error:
            self._add(_ERRORS)
        if us is not None:
            calls = self._add(_CALLS)
            _U32.pack_into(self._map, _LATENCIES + 4 * ((calls - 1) % _RING), min(us, 0xFFFFFFFF))
            self._add(_DURATIONS + 8 * bisect.bisect_left(_BOUNDS_US, us))
            self._add(_DURATIONS + 8 * _BUCKETS, us)

    def answered(self, outcome: CallOutcome, us: int, *, error: bool = False) -> None:
        """Count a call that was answered after `us` microseconds, and whose guest may go on."""
        began_ns = self.began_ns()
        self.end(outcome, us, error=error)
        _U64.pack_into(self._map, _BEGAN, began_ns)

    def fail_later(self, outcome: CallOutcome) -> None:
        """Count the failure of a guest after its answer, which was counted as what it was."""
        self.count(outcome)
        self._add(_ERRORS)

    def count(self, outcome: CallOutcome) -> None:
        """Count a call that was answered without the guest, whatever is in flight."""
        self._add(_COUNTS + 8 * _OUTCOMES.index(outcome))

    def sent(self, denied: bool) -> None:  # noqa: FBT001 - selects the counter
        """Count a request of the guest: attempted, or `denied`."""
        self._add(_DENIED if denied else _OUTGOING)

    def dropped(self, lines: int) -> None:
        """Count log lines over the limit."""
        self._add(_DROPPED, lines)

    def denied(self) -> None:
        """Count a call of the guest to the host that was denied."""
        self._add(_DENIED)

    def used_pairs(self, reads: int, writes: int, size: int) -> None:
        """Count a use of the key-value store."""
        for number, more in enumerate((reads, writes, size)):
            self._add(_PAIRS + 8 * number, more)

    def spent(self, cpu_ns: int) -> None:
        """Add CPU time of the guest."""
        self._add(_CPU, cpu_ns)

    def began_ns(self) -> int:
        """Return the begin of the call in flight (monotonic ns); 0 for none."""
        value: int = _U64.unpack_from(self._map, _BEGAN)[0]
        return value

    def waits(self) -> bool:
        """Return whether the call in flight waits for its client."""
        return bool(_U64.unpack_from(self._map, _WAITS)[0])

    def number(self) -> int:
        """Return the number of the call in flight; 0 for none."""
        value: int = _U64.unpack_from(self._map, _NUMBER)[0]
        return value

    def _count(self, at: int) -> int:
        """Return a figure within its bounds, as code that escaped its sandbox may write anything there."""
        return count_of(self._raw(at))

    def _raw(self, at: int) -> int:
        value: int = _U64.unpack_from(self._map, at)[0]
        return value

    def read(self) -> CallStats:
        """Read the current figures."""
        counts = [self._count(_COUNTS + 8 * number) for number in range(len(_OUTCOMES))]
        calls = self._count(_CALLS)
        return CallStats(
            calls={outcome.value: count for outcome, count in zip(_OUTCOMES, counts, strict=True) if count},
            errors=self._count(_ERRORS),
            latencies_us=struct.unpack_from(f"={min(calls, _RING)}I", self._map, _LATENCIES),
            began_ns=self.began_ns(),
            dropped_lines=self._count(_DROPPED),
            denials=self._count(_DENIED),
            outgoing=self._count(_OUTGOING),
            cpu_ns=min(self._raw(_CPU), _CPU_MAX_NS),
            pairs=keyvalue_api.Figures(*(self._count(_PAIRS + 8 * number) for number in range(3))),
            durations=tuple(self._count(_DURATIONS + 8 * number) for number in range(_BUCKETS)),
            durations_us=self._count(_DURATIONS + 8 * _BUCKETS),
        )

    def close(self) -> None:
        """Unmap the page."""
        self._map.close()


class CallPage(StatsPage):
    """Page of the calls in a channel, for the router, which writes it."""

    def __init__(self, fd: int, worker_fd: int) -> None:
        """`worker_fd`: the worker's own page, where the number of the call is repeated."""
        super().__init__(fd)
        self._repeated = StatsPage(worker_fd)

    def begin(self, now_ns: int, number: int) -> None:
        """Record the begin of a call."""
        super().begin(now_ns, number)
        self._repeated.repeat(number)

    def rest(self) -> None:
        """Record that no call is in flight."""
        super().rest()
        self._repeated.repeat(0)

    def close(self) -> None:
        """Unmap both pages."""
        super().close()
        self._repeated.close()
