"""Calling the guest of a lane: its store, its time, its figures, its log.

One call at a time, on the lane's only thread that enters wasm. A ticker thread watches while a call is in flight and
parks after an idle tick, so that a lane at rest wakes nobody. It lets epochs pass by the *processor's* time of the
calling thread: waiting for a peer, or for the processor on a busy board, is no time of the guest's. Waiting has limits
of its own, in one piece and in all. A call past one of them stands still in the host: only the supervisor can end that,
by ending the lane. A tick counts for what it saw pass and never for much more than its length, so that a board that was
suspended finds no call too late.
"""

import threading
import time
from collections.abc import Callable
from typing import Final, TypeVar

from agent.host import cell, control
from agent.host.adapted import start
from agent.host.allowance import Allowance
from agent.host.connection import Request
from agent.host.engine import TICK_MS, Guest, Image
from agent.host.faults import EngineError, GuestError
from agent.host.flow import Flow
from agent.host.heads import Nowhere, Requests
from agent.host.page import Page
from agent.host.writes import Writes
from fleet.protocol.codes import CallOutcome
from fleet.protocol.manifest import Grants, Limits

BUSY_MS: Final = 30
GRACE_MS: Final = 1000
TICK_MOST_MS: Final = 3 * TICK_MS
"""What one tick may count for: one that came later than this was kept waiting, and so was the call."""
_LINE_MAX_CHARS: Final = 1024
_NS_PER_MS: Final = 1_000_000

T = TypeVar("T")
Say = Callable[[control.FromLane], None]


class Ticker:
    """The thread that lets a guest's time pass. Make it on the thread that will call."""

    def __init__(
        self,
        tick: Callable[[], None],
        say: Say,
        limits: Limits,
        *,
        waits: Callable[[], bool] = lambda: True,
        watch: Callable[[], None] | None = None,
    ) -> None:
        """`waits`: whether the calling thread, when it has had no processor, waits for something else."""
        self._tick = tick
        self._say = say
        self._limits = limits
        self._waits = waits
        self._watch = watch
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._wake = threading.Event()
        self._parked = False
        self._way: Flow | None = None
        self._caller: Caller | None = None
        self._began_ns = 0
        self._limit_ms = 0
        self._watched = self._said = self._busy = 0
        self._used_ns = self._carry_ns = self._first_ns = 0
        self._total_ms = self._idle_ms = self._own_ms = 0
        threading.stack_size(256 * 1024)
        threading.Thread(target=self._run, name="ticker", daemon=True).start()

    def begin(self, now_ns: int, limit_ms: int, caller: "Caller | None" = None, way: Flow | None = None) -> None:
        """A call begins that may take `limit_ms` of the guest's own time.

        Where several callers share the ticker, it is `caller` that is told, within its limits.
        """
        self._caller = caller
        if caller is not None:
            self._say, self._limits = caller.say, caller.limits
        self._limit_ms = limit_ms
        self._way = way
        self._began_ns = now_ns
        if self._parked:
            self._wake.set()

    def end(self) -> None:
        """The call has ended."""
        self._began_ns = 0
        self._way = None

    def _run(self) -> None:
        idle = 0
        while True:
            idle = 0 if self._began_ns else idle + 1
            if idle > 1:
                self._parked = True
                if not self._began_ns:
                    self._wake.wait()
                self._parked = False
                self._wake.clear()
                idle = 0
            slept_ns = time.monotonic_ns()
            self._sleep()
            began_ns = self._began_ns
            if began_ns:
                passed_ms = (time.monotonic_ns() - slept_ns) // _NS_PER_MS
                self.passed(began_ns, passed_ms, time.clock_gettime_ns(self._clock))

    def _sleep(self) -> None:
        """Let a tick pass, and move meanwhile what a call's answer brings that takes longer than one."""
        way, began_ns = self._way, self._began_ns
        # What needs little of the processor's time and stands nowhere still goes out whole.
        long = self._idle_ms > 0 or self._used_ns - self._first_ns >= TICK_MS * _NS_PER_MS
        if way is None or not began_ns or self._watched != began_ns or not (long or way.live):
            time.sleep(TICK_MS / 1000)
            return
        way.live = True
        until_ns = time.monotonic_ns() + TICK_MS * _NS_PER_MS
        while self._way is way and (left_ns := until_ns - time.monotonic_ns()) > 0:
            if way.wait(left_ns // _NS_PER_MS + 1):
                way.pump()

    def _mind(self, passed_ms: int) -> None:
        """Wait no longer than a call may for a client that does not take its answer; end the guest if that is gone."""
        way = self._way
        if way is None or not way.live:
            return
        with way.lock:
            if way.over:
                return
            way.waited(passed_ms, most_ms=self._limits.idle_ms)
            if way.out:
                self._idle_ms = 0  # the guest's peer is the client, who has a limit of its own
                if self._total_ms + TICK_MOST_MS > self._limits.total_ms:
                    way.end("slow")
            if way.ended and way.begun:
                for _ in range(self._limit_ms // TICK_MS + 2):
                    self._tick()

    def passed(self, began_ns: int, passed_ms: int, used_ns: int) -> None:
        """Note that `passed_ms` of the call that began at `began_ns` went by.

        `used_ns` is the processor's time that the calling thread has had in its life.
        """
        if self._watched != began_ns:
            self._watched, self._used_ns, self._carry_ns = began_ns, used_ns, TICK_MS * _NS_PER_MS
            self._first_ns = used_ns
            self._total_ms = self._idle_ms = self._own_ms = 0
        own_ns, self._used_ns = used_ns - self._used_ns, used_ns
        passed_ms = min(passed_ms, TICK_MOST_MS)
        self._total_ms += passed_ms
        self._idle_ms = 0 if own_ns or not self._waits() else self._idle_ms + passed_ms
        self._mind(passed_ms)
        self._carry_ns += own_ns
        while self._carry_ns >= TICK_MS * _NS_PER_MS:
            self._carry_ns -= TICK_MS * _NS_PER_MS
            self._own_ms += TICK_MS
            self._tick()
        self._judge(began_ns)
        if self._watch is not None:
            self._watch()

    def _judge(self, began_ns: int) -> None:
        why = ""
        if self._idle_ms > self._limits.idle_ms:
            why = f"a call was blocked for {self._idle_ms} ms in one piece, {self._limits.idle_ms} are allowed"
        elif self._total_ms > self._limits.total_ms:
            why = f"a call took {self._total_ms} ms in all, {self._limits.total_ms} are allowed"
        elif self._own_ms > self._limit_ms + GRACE_MS:
            why = f"a call had {self._own_ms} ms of its own time, {self._limit_ms} are allowed"
        if why and self._said != began_ns:
            self._said = began_ns
            self._say(control.Overdue(why=why))
        elif self._limits.concurrency > 1 and self._total_ms > BUSY_MS and self._busy != began_ns:
            self._busy = began_ns
            self._say(control.Busy())
            if self._caller is not None:
                self._caller.relieve()


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
        self._ticker = ticker or Ticker(
            image.engine.tick,
            say,
            limits,
            waits=lambda: cell.waits(scheduling_fd),
            watch=self._count_writes if writes is not None else None,
        )

    def start(self) -> frozenset[str]:
        """Instantiate the guest; what it exports.

        Raises:
            EngineError, GuestError: it cannot be started.
        """
        now_ns = time.monotonic_ns()
        self._page.begin(now_ns)
        self._ticker.begin(now_ns, self.limits.start_ms, self)
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
            self._page.begin(0)
        return self._guest.kinds

    def handle(self, request: Request, way: Flow | None) -> tuple[int, bytes, bytes]:
        """One HTTP exchange; raises `GuestError`. The caller counts it: the answer may still be bad.

        Where the guest can, its answer goes out on `way` while it is written.
        """
        method, target, headers = request.method, request.target, request.headers
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

    def _call(self, enter: Callable[[Guest], T], own_ms: int = 0, way: Flow | None = None) -> T:
        try:
            if self._guest is None:
                self.start()
            assert self._guest is not None
            self._count_writes()
            now_ns = time.monotonic_ns()
            self._page.begin(now_ns)
            self._way, self._answered = way, 0
            self._ticker.begin(now_ns, own_ms or self.limits.call_ms, self, way)
            had_ns = time.thread_time_ns()
            try:
                return enter(self._guest)
            finally:
                self._page.spent(time.thread_time_ns() - had_ns)
                self._ticker.end()
                self._page.begin(0)
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
