"""Watch over a call that takes long in a worker with a channel: the limits of its time.

The router reports a call once it has taken `LONG_CALL_S`; most end before, and cost nothing here. From then on the
worker's processor clock is read when a limit can be reached at the earliest: a few looks in a call of many seconds.

    limits.call    the guest's own time, by the processor clock: the guest is interrupted, and killed after a grace
    limits.idle    time without any: the guest is blocked in the host, where no interrupt reaches it, and is killed;
                   waiting for its client does not count, which the router times
    limits.total   time that has passed: killed

The number in the page of the channel's calls says whether the call still runs. The router writes it, and the worker has
no part in it. A router that writes nonsense delays no limit but its own calls', and `Instance.tick` kills what is left
after all limits.
"""

import asyncio
import contextlib
import time
from typing import Final, Protocol

from agent.host.ipc import worker_api
from agent.host.supervisor.worker_handle import WorkerGoneError, WorkerHandle
from fleet.protocol.manifest import Limits

_GRACE_S: Final = 1.0  # from an interrupt to the end of the call
_LOOK_MIN_S: Final = 0.01
_CLOCK_PROCESS: Final = 2  # CPUCLOCK_SCHED of the whole process, see clock_getcpuclockid(3)


def processor_ns(pid: int) -> int:
    """Return the processor time of a process and its threads. Raises `OSError`: there is no such process."""
    return time.clock_gettime_ns((~pid << 3) | _CLOCK_PROCESS)


class CallJudge(Protocol):
    """Receiver of verdicts."""

    def call_must_end(self, worker: WorkerHandle, reason: str, *, at_fault: bool) -> None:
        """End the worker, as its call has not ended otherwise; not `at_fault`: nobody wanted its answer any more."""


class CallWatch:
    """Watch over one call, until it has ended.

    Attributes:
        call: number of the call.
    """

    def __init__(self, worker: WorkerHandle, call: int, limits: Limits, judge: CallJudge) -> None:
        self._worker = worker
        self.call = call
        self._limits = limits
        self._judge = judge
        self._used_ns = self._first_ns = self._processor_ns()
        self._changed_s = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._interrupted = False
        if self.runs:
            self._look()

    @property
    def runs(self) -> bool:
        """True while the call is in the worker."""
        return self._worker.alive and self._worker.calls.number() == self.call

    def abandon(self) -> None:
        """End the call, whose answer nobody wants."""
        if self.runs:
            self._interrupt("its client had gone, and its call did not end", at_fault=False)

    def _processor_ns(self) -> int:
        try:
            return processor_ns(self._worker.pid)
        except OSError:
            return 0

    def _look(self) -> None:
        self._timer = None
        if not self.runs or self._interrupted:
            return
        now_s, used_ns = time.monotonic(), self._processor_ns()
        if used_ns != self._used_ns or self._worker.calls.waits():
            self._used_ns, self._changed_s = used_ns, now_s
        began_ns = self._worker.calls.began_ns()
        if not began_ns:  # the router is about to write that it begins, or that it has ended
            self._timer = asyncio.get_running_loop().call_later(_LOOK_MIN_S, self._look)
            return
        total_ms = (time.monotonic_ns() - began_ns) // 1_000_000
        own_ms, idle_ms = (used_ns - self._first_ns) // 1_000_000, int((now_s - self._changed_s) * 1000)
        limits = self._limits
        if own_ms >= limits.call_ms:
            self._interrupt(
                f"a call had {own_ms} ms of its own time, {limits.call_ms} are allowed (limits.call), and did not end",
                at_fault=True,
            )
        elif idle_ms > limits.idle_ms:
            self._kill(f"a call was blocked for {idle_ms} ms in one piece, {limits.idle_ms} are allowed (limits.idle)")
        elif total_ms > limits.total_ms:
            self._kill(f"a call took {total_ms} ms in all, {limits.total_ms} are allowed (limits.total)")
        else:
            left_ms = min(limits.call_ms - own_ms, limits.idle_ms - idle_ms, limits.total_ms - total_ms) + 1
            self._timer = asyncio.get_running_loop().call_later(max(_LOOK_MIN_S, left_ms / 1000), self._look)

    def _kill(self, reason: str) -> None:
        self._judge.call_must_end(self._worker, reason, at_fault=True)

    def _interrupt(self, reason: str, *, at_fault: bool) -> None:
        if self._interrupted:
            return
        self._interrupted = True
        with contextlib.suppress(WorkerGoneError):
            self._worker.notify(worker_api.Interrupt(call=self.call, abandoned=not at_fault))
        asyncio.get_running_loop().call_later(_GRACE_S, self._after_grace, reason, at_fault)

    def _after_grace(self, reason: str, at_fault: bool) -> None:  # noqa: FBT001 - the loop passes no keywords
        if self.runs:
            self._judge.call_must_end(self._worker, reason, at_fault=at_fault)

    def close(self) -> None:
        """Watch no longer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
