"""Calling the guest of a lane: its store, its time, its figures, its log.

One call at a time, on the lane's only thread that enters wasm. A ticker thread watches while a call is in flight and
parks after an idle tick, so that a lane at rest wakes nobody. It lets epochs pass by the *processor's* time of the
calling thread: waiting for a peer, or for the processor on a busy board, is no time of the guest's. Waiting has limits
of its own, in one piece and in all. A call past one of them stands still in the host: only the supervisor can end that,
by ending the lane. A tick counts for what it saw pass and never for much more than its length, so that a board that was
suspended finds no call too late.

The two threads share one reference: the `Call` in flight, which never changes. Each tick reads it once and judges that
call by that call's own limits; the sums are the ticker's alone. A verdict carries the call's number, which the
supervisor compares with the page of figures, since the call may have ended meanwhile.
"""

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple, NoReturn, TypeVar

from agent.host import cell, control, heads
from agent.host.adapted import start
from agent.host.allowance import Allowance
from agent.host.connection import Request
from agent.host.engine import TICK_MS, Guest, Image
from agent.host.faults import EngineError, GuestError
from agent.host.flow import Flow
from agent.host.heads import Nowhere, Requests
from agent.host.page import Page
from agent.host.writes import Writes
from fleet.protocol.codes import CallOutcome, RejectCode
from fleet.protocol.manifest import Grants, Limits

BUSY_MS: Final = 30
GRACE_MS: Final = 1000
TICK_MOST_MS: Final = 3 * TICK_MS
"""What one tick may count for: one that came later than this was kept waiting, and so was the call."""
AGAIN_MS: Final = 1000
"""When a verdict that ended nothing is repeated: the supervisor's socket may have been full."""
FAILED: Final = 70
"""Exit status of a process whose ticker failed: EX_SOFTWARE of sysexits.h."""
_LINE_MAX_CHARS: Final = 1024
_NS_PER_MS: Final = 1_000_000

T = TypeVar("T")
Say = Callable[[control.FromLane], None]


def _nothing() -> None:
    """Do nothing."""


class Call(NamedTuple):
    """A call in flight, as the ticker judges it.

    Attributes:
        number: unlike that of any other call of this process.
        budget_ms: of the guest's own time.
        limits: of the instance that is called.
        say: tells that instance's supervisor.
        relieve: called once the call takes its time.
        watch: called at each tick.
        flow: where its answer goes, None for one that is not given out while it is written.
    """

    number: int
    budget_ms: int
    limits: Limits
    say: Say
    relieve: Callable[[], None] = _nothing
    watch: Callable[[], None] = _nothing
    flow: Flow | None = None


@dataclass(slots=True)
class _Sums:
    """What passed of one call, in the ticker's thread alone."""

    number: int = 0
    first_ns: int = 0  # the calling thread's processor time when the call was first seen, and at the last tick
    used_ns: int = 0
    carry_ns: int = 0
    own_ms: int = 0
    idle_ms: int = 0
    total_ms: int = 0
    said_ms: int | None = None  # when a verdict was said, in `total_ms`
    busy: bool = False


class Ticker:
    """The thread that lets a guest's time pass. Make it on the thread that will call."""

    def __init__(self, tick: Callable[[], None], *, waits: Callable[[], bool] = lambda: True) -> None:
        """`waits`: whether the calling thread, when it has had no processor, waits for something else."""
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
        except control.GoneError:
            os._exit(control.ABANDONED)  # nobody is left who could end this process for a call that is too late
        except BaseException as error:  # noqa: BLE001 - whatever it is: without a ticker no limit holds
            call = self._call
            if call is not None:
                why = f"the lane's ticker failed: {type(error).__name__}: {error}"
                with contextlib.suppress(Exception):
                    call.say(control.Refused(code=RejectCode.INTERNAL, message=why[:_LINE_MAX_CHARS]))
            os._exit(FAILED)

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
            passed_ms = (time.monotonic_ns() - began_ns) // _NS_PER_MS
            self.passed(call, passed_ms, time.clock_gettime_ns(self._clock))

    def _park(self) -> None:
        self._parked = True
        if self._call is None:
            self._wake.wait()
        self._parked = False
        self._wake.clear()

    def _see(self, call: Call, used_ns: int) -> None:
        if self._sums.number != call.number:
            # Its time until now was less than a tick, and counts as one.
            self._sums = _Sums(call.number, first_ns=used_ns, used_ns=used_ns, carry_ns=TICK_MS * _NS_PER_MS)

    def _sleep(self, call: Call) -> None:
        """Let a tick pass, and move meanwhile what a call's answer brings that takes longer than one."""
        flow, sums = call.flow, self._sums
        # What needs little of the processor's time and stands nowhere still goes out whole.
        long = sums.idle_ms > 0 or sums.used_ns - sums.first_ns >= TICK_MS * _NS_PER_MS
        if flow is None or not sums.total_ms or not (long or flow.live):
            time.sleep(TICK_MS / 1000)
            return
        flow.live = True
        until_ns = time.monotonic_ns() + TICK_MS * _NS_PER_MS
        while self._call is call and (left_ns := until_ns - time.monotonic_ns()) > 0:
            if flow.wait(left_ns // _NS_PER_MS + 1):
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
        self._mind(call, passed_ms)
        sums.carry_ns += own_ns
        while sums.carry_ns >= TICK_MS * _NS_PER_MS:
            sums.carry_ns -= TICK_MS * _NS_PER_MS
            sums.own_ms += TICK_MS
            self._let_pass(call)
        self._judge(call)
        call.watch()

    def _let_pass(self, call: Call) -> None:
        """Let an epoch pass for this call, and for no other."""
        with self._current:
            if self._call is call:
                self._tick()

    def _mind(self, call: Call, passed_ms: int) -> None:
        """Wait no longer than a call may for a client that does not take its answer; end the guest if that is gone."""
        flow, sums = call.flow, self._sums
        if flow is None or not flow.live:
            return
        with flow.lock:
            if flow.over:
                return
            flow.waited(passed_ms, most_ms=call.limits.idle_ms)
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
            why = f"a call was blocked for {sums.idle_ms} ms in one piece, {limits.idle_ms} are allowed"
        elif sums.total_ms > limits.total_ms:
            why = f"a call took {sums.total_ms} ms in all, {limits.total_ms} are allowed"
        elif sums.own_ms > call.budget_ms + GRACE_MS:
            why = f"a call had {sums.own_ms} ms of its own time, {call.budget_ms} are allowed"
        if why and (sums.said_ms is None or sums.total_ms - sums.said_ms >= AGAIN_MS):
            sums.said_ms = sums.total_ms
            with self._current:
                if self._call is call:
                    call.say(control.Overdue(call=call.number, why=why))
        elif limits.concurrency > 1 and sums.total_ms > BUSY_MS and not sums.busy:
            sums.busy = True
            call.say(control.Busy())
            call.relieve()


def _sentence(problem: str | None) -> str | None:
    """What a guest gives as its reason, as far as it fits in a message to the supervisor."""
    return None if problem is None else problem[:_LINE_MAX_CHARS]


class Caller:
    """The guest and everything around a call."""

    def __init__(
        self,
        image: Image,
        *,
        limits: Limits,
        grants: Grants,
        config: dict[str, str],
        page: Page,
        say: Say,
        data: str = "",
        ticker: Ticker | None = None,
        scheduling_fd: int | None = None,
        redact: Callable[[str], str] = str,
        writes: Writes | None = None,
        outgoing: Callable[[Callable[[str], None]], Requests] | None = None,
    ) -> None:
        """`outgoing`: makes what the guest sends requests by, given where to log; None for nothing.

        `ticker`: that of the process, where there are other callers; None to start one.

        `redact` takes what is secret out of a text.
        """
        self._image = image
        self.streams = image.adapted  # whether its answers can go out while they are written
        self._redact = redact
        self._writes = writes
        self.limits = limits
        self._grants = grants
        self._config = config
        self._page = page
        self._data = data
        self.say = say
        self.relieve: Callable[[], None] = lambda: None
        """What is called once a call takes its time, by the ticker: nobody should wait behind it."""
        self._lines = Allowance(limits.log_lines_per_minute)
        self._faults = Allowance(control.FAULTS_A_MINUTE)
        self._dropped = 0
        self._guest: Guest | None = None
        self._outgoing = Nowhere(self.log, lambda: page.sent(True)) if outgoing is None else outgoing(self.log)
        self._counting = threading.Lock()
        self._way: Flow | None = None
        self._answered = 0
        self._ticker = ticker or Ticker(image.engine.tick, waits=lambda: cell.waits(scheduling_fd))

    def start(self) -> frozenset[str]:
        """Instantiate the guest; what it exports.

        Raises:
            EngineError, GuestError: it cannot be started.
        """
        self._begin(self.limits.start_ms)
        try:
            self._guest = start(
                self._image,
                limits=self.limits,
                grants=self._grants,
                config=self._config,
                log=self.log,
                data=self._data,
                outgoing=self._outgoing,
            )
        finally:
            self._ticker.end()
            self._page.rest()
        return self._guest.kinds

    def handle(self, request: Request, way: Flow | None) -> tuple[int, bytes, bytes]:
        """One HTTP exchange; raises `GuestError`. The caller counts it: the answer may still be bad.

        Where the guest can, its answer goes out on `way` while it is written.
        """
        method, target, headers = request.method, request.target, request.headers
        self._outgoing.hops = heads.hops(headers)
        return self._call(lambda guest: guest.handle(method, target, headers, bytes(request.body), way), way=way)

    def check(self) -> str | None:
        """The guest's health: None for well, else a sentence."""
        try:
            return _sentence(self._call(Guest.check))
        except GuestError as error:
            return f"its health check failed: {error}".splitlines()[0]

    def run(self, scheduled_ms: int) -> str | None:
        """Run the task, counted; None for done, else a sentence."""
        began_ns = time.monotonic_ns()
        try:
            problem = _sentence(self._call(lambda guest: guest.run(scheduled_ms)))
        except GuestError as error:
            self.count(error.outcome, began_ns, error=True)
            return str(error).splitlines()[0]
        self.count(CallOutcome.OK, began_ns, error=problem is not None)
        return problem

    def save_state(self, most: int) -> tuple[bytes, str | None]:
        """The guest's state of at most `most` bytes, or empty and why there is none."""
        try:
            state, problem = self._call(Guest.save_state, self.limits.start_ms)
        except GuestError as error:
            return b"", str(error).splitlines()[0]
        if problem is None and len(state) > most:
            return b"", f"its state has {len(state)} bytes, {most} are allowed (limits.state)"
        return state, _sentence(problem)

    def load_state(self, state: bytes) -> str | None:
        """Give the guest a state: None for loaded, else a sentence."""
        try:
            return _sentence(self._call(lambda guest: guest.load_state(state), self.limits.start_ms))
        except GuestError as error:
            return str(error).splitlines()[0]

    def count(self, outcome: CallOutcome, began_ns: int | None, *, error: bool = False) -> None:
        """Count a call that began at `began_ns` (None: the guest was not entered)."""
        us = None if began_ns is None else (time.monotonic_ns() - began_ns) // 1000
        self._page.end(outcome, us, error=error)

    def _begin(self, budget_ms: int, way: Flow | None = None) -> None:
        """Let the page and the ticker know of a call. The page first: no verdict comes before its number is there."""
        number = self._ticker.number()
        self._page.begin(time.monotonic_ns(), number)
        watch = _nothing if self._writes is None else self._count_writes
        self._ticker.begin(Call(number, budget_ms, self.limits, self.say, self.relieve, watch, way))

    def _call(self, enter: Callable[[Guest], T], own_ms: int = 0, way: Flow | None = None) -> T:
        try:
            if self._guest is None:
                self.start()
            assert self._guest is not None
            self._count_writes()
            self._way, self._answered = way, 0
            self._begin(own_ms or self.limits.call_ms, way)
            had_ns = time.thread_time_ns()
            try:
                return enter(self._guest)
            finally:
                self._page.spent(time.thread_time_ns() - had_ns)
                self._ticker.end()
                self._page.rest()
                self._count_writes()
                self._way = None
        except GuestError as error:
            self._spend("" if way is not None and way.ended else str(error))
            raise
        except EngineError as error:
            self._spend(str(error))
            raise GuestError(CallOutcome.GUEST_TRAP, str(error)) from error

    def _count_writes(self) -> None:
        """Before and after each call, and at each tick of a long one."""
        if self._writes is None:
            return
        with self._counting:
            answered = 0 if self._way is None else self._way.read_bytes  # by the pipe in place of standard output
            too_much = self._writes.look(answered=answered - self._answered)
            self._answered = answered
        if too_much:
            self._page.denied()
            self.say(control.Line(text=f"host: {self._writes.why()}"))

    def close(self) -> None:
        """Give the guest's memory back."""
        if self._guest is not None:
            self._guest.close()
            self._guest = None
        self._page.close()

    def _spend(self, message: str) -> None:
        """A trap poisons the store: drop it, and say so, unless there is nothing to say."""
        if self._guest is not None:
            self._guest.close()
            self._guest = None
        if message and self._faults.take():
            self.say(control.Fault(message=message))

    def log(self, text: str) -> None:
        """What the guest logs, as far as it may: each line of it counts."""
        # Before it is cut: a secret in halves would not be known again.
        lines = self._redact(text).splitlines() or [""]
        for number, line in enumerate(lines):
            if not self._lines.take():
                self._dropped += len(lines) - number
                self._page.dropped(len(lines) - number)
                return
            self.say(control.Line(text=line[:_LINE_MAX_CHARS], dropped=self._dropped))
            self._dropped = 0
