"""CallWatchdog: epochs and limits of the call in flight."""

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple, NoReturn

from agent.host.engine.runtime import TICK_MS
from agent.host.ipc import framing, worker_api
from agent.host.worker.slot_channel import SlotResponse
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Limits

BUSY_MS: Final = 30
GRACE_MS: Final = 1000
TICK_MOST_MS: Final = 3 * TICK_MS
"""Most that one tick counts for: one that came later was kept waiting, and so was the call."""

AGAIN_MS: Final = 1000
"""When a verdict that ended nothing is repeated: the supervisor's socket may have been full."""

WATCHDOG_FAILED_STATUS: Final = 70
"""Exit status of a process whose ticker failed: EX_SOFTWARE of sysexits.h."""

LINE_MAX_CHARS: Final = 1024
NS_PER_MS: Final = 1_000_000

SendToSupervisor = Callable[[worker_api.FromWorker], None]


def do_nothing() -> None:
    """Do nothing."""


class Call(NamedTuple):
    """A call in flight, as the ticker judges it.

    Attributes:
        number: unlike that of any other call of this process.
        budget_ms: of the guest's own time.
        limits: of the instance that is called.
        say: tells that instance's supervisor.
        watch: called at each tick.
        flow: where its answer goes, None for one that is not given out while it is written.
    """

    number: int
    budget_ms: int
    limits: Limits
    say: SendToSupervisor
    watch: Callable[[], None] = do_nothing
    flow: SlotResponse | None = None


@dataclass(slots=True)
class _Sums:
    """Time that passed of one call, in the ticker's thread alone."""

    number: int = 0
    first_ns: int = 0  # the calling thread's processor time when the call was first seen, and at the last tick
    used_ns: int = 0
    carry_ns: int = 0
    own_ms: int = 0
    idle_ms: int = 0
    total_ms: int = 0
    said_ms: int | None = None  # when a verdict was said, in `total_ms`
    busy: bool = False


class CallWatchdog:
    """The thread that lets a guest's time pass. Make it on the thread that will call."""

    def __init__(self, tick: Callable[[], None], *, waits: Callable[[], bool] = lambda: True) -> None:
        """Watch calls of this thread. `waits`: true if it waits for something else where it has had no processor."""
        self._tick = tick
        self._waits = waits
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._wake = threading.Event()
        self._parked = False
        self._numbers = itertools.count(1)
        self._call: Call | None = None
        self._current = threading.Lock()  # held while something is done to the call in flight, and to change it
        self._sums = _Sums()
        threading.stack_size(256 * 1024)
        threading.Thread(target=self._run, name="ticker", daemon=True).start()

    def number(self) -> int:
        """Give the next call's number."""
        return next(self._numbers)

    def begin(self, call: Call) -> None:
        """Watch a call, which begins now."""
        with self._current:
            self._call = call
        if self._parked:
            self._wake.set()

    def end(self) -> None:
        """Watch nothing: the call has ended. No epoch passes for it, and nothing is said of it, from here on."""
        with self._current:
            self._call = None

    def _run(self) -> None:
        try:
            self._watch_calls()
        except framing.GoneError:
            os._exit(worker_api.ABANDONED)  # nobody is left who could end this process for a call that is too late
        except BaseException as error:  # noqa: BLE001 - whatever it is: without a ticker no limit holds
            call = self._call
            if call is not None:
                why = f"the worker's ticker failed: {type(error).__name__}: {error}"
                with contextlib.suppress(Exception):
                    call.say(worker_api.Refused(code=RejectCode.INTERNAL, message=why[:LINE_MAX_CHARS]))
            os._exit(WATCHDOG_FAILED_STATUS)

    def _watch_calls(self) -> NoReturn:
        idle = 0
        while True:
            call = self._call
            if call is None:
                idle += 1
                if idle > 1:
                    self._park()
                    idle = 0
                else:
                    time.sleep(TICK_MS / 1000)
                continue
            idle = 0
            self._see(call, time.clock_gettime_ns(self._clock))
            began_ns = time.monotonic_ns()
            self._sleep(call)
            passed_ms = (time.monotonic_ns() - began_ns) // NS_PER_MS
            self.passed(call, passed_ms, time.clock_gettime_ns(self._clock))

    def _park(self) -> None:
        self._parked = True
        if self._call is None:
            self._wake.wait()
        self._parked = False
        self._wake.clear()

    def _see(self, call: Call, used_ns: int) -> None:
        if self._sums.number != call.number:
            # The time until now was less than a tick, and counts as one.
            self._sums = _Sums(call.number, first_ns=used_ns, used_ns=used_ns, carry_ns=TICK_MS * NS_PER_MS)

    def _sleep(self, call: Call) -> None:
        """Let a tick pass, and move meanwhile what a call's answer brings that takes longer than one."""
        flow, sums = call.flow, self._sums
        # A call that needs little of the processor's time and stands nowhere still goes out whole.
        long = sums.idle_ms > 0 or sums.used_ns - sums.first_ns >= TICK_MS * NS_PER_MS
        if flow is None or not sums.total_ms or not (long or flow.live):
            time.sleep(TICK_MS / 1000)
            return
        flow.live = True
        until_ns = time.monotonic_ns() + TICK_MS * NS_PER_MS
        while self._call is call and (left_ns := until_ns - time.monotonic_ns()) > 0:
            if flow.wait(left_ns // NS_PER_MS + 1):
                flow.pump()

    def passed(self, call: Call, passed_ms: int, used_ns: int) -> None:
        """Note that `passed_ms` of a call went by; of one that has ended meanwhile, nothing.

        `used_ns` is the processor's time that the calling thread has had in its life.
        """
        if self._call is not call:
            return
        self._see(call, used_ns)
        sums = self._sums
        own_ns, sums.used_ns = used_ns - sums.used_ns, used_ns
        passed_ms = min(passed_ms, TICK_MOST_MS)
        sums.total_ms += passed_ms
        sums.idle_ms = 0 if own_ns or not self._waits() else sums.idle_ms + passed_ms
        self._mind(call)
        sums.carry_ns += own_ns
        while sums.carry_ns >= TICK_MS * NS_PER_MS:
            sums.carry_ns -= TICK_MS * NS_PER_MS
            sums.own_ms += TICK_MS
            self._let_pass(call)
        self._judge(call)
        call.watch()

    def _let_pass(self, call: Call) -> None:
        """Let an epoch pass for this call, and for no other."""
        with self._current:
            if self._call is call:
                self._tick()

    def _mind(self, call: Call) -> None:
        """Wait for a client that does not take its answer, as long as a call may; end the guest if that is gone."""
        flow, sums = call.flow, self._sums
        if flow is None or not flow.live:
            return
        with flow.lock:
            if flow.over:
                return
            if flow.out:
                sums.idle_ms = 0  # the guest's peer is the client, who has a limit of its own
                if sums.total_ms + TICK_MOST_MS > call.limits.total_ms:
                    flow.end("slow")
            if flow.ended and flow.begun:
                for _ in range(call.budget_ms // TICK_MS + 2):
                    self._let_pass(call)

    def _judge(self, call: Call) -> None:
        sums, limits = self._sums, call.limits
        why = ""
        if sums.idle_ms > limits.idle_ms:
            why = f"a call was blocked for {sums.idle_ms} ms in one piece, {limits.idle_ms} are allowed (limits.idle)"
        elif sums.total_ms > limits.total_ms:
            why = f"a call took {sums.total_ms} ms in all, {limits.total_ms} are allowed (limits.total)"
        elif sums.own_ms > call.budget_ms + GRACE_MS:
            limit = "limits.call" if call.budget_ms == limits.call_ms else "limits.start"
            why = f"a call had {sums.own_ms} ms of its own time, {call.budget_ms} are allowed ({limit})"
        if why and (sums.said_ms is None or sums.total_ms - sums.said_ms >= AGAIN_MS):
            sums.said_ms = sums.total_ms
            with self._current:
                if self._call is call:
                    call.say(worker_api.Overdue(call=call.number, why=why))
        elif limits.concurrency > 1 and sums.total_ms > BUSY_MS and not sums.busy:
            sums.busy = True
            call.say(worker_api.Busy())


class WriteTicker:
    """Thread that looks after the writes of calls of a channel, which the watchdog does not watch."""

    def __init__(self, look: Callable[[], None]) -> None:
        """Call `look` at each tick between `begin` and `end`."""
        self._look = look
        self._in_call = threading.Event()
        threading.stack_size(256 * 1024)
        threading.Thread(target=self._run, name="writes", daemon=True).start()

    def begin(self) -> None:
        """Take note that a call begins."""
        self._in_call.set()

    def end(self) -> None:
        """Take note that it has ended."""
        self._in_call.clear()

    def _run(self) -> NoReturn:
        while True:
            self._in_call.wait()
            time.sleep(TICK_MS / 1000)
            try:
                self._look()
            except BaseException:  # noqa: BLE001 - whatever it is: without this thread no quota holds within a call
                os._exit(WATCHDOG_FAILED_STATUS)
