"""Calls of one guest: its store, time limits, statistics and log.

One call runs at a time, on the worker's only thread that enters WebAssembly. A ticker thread watches each call and
parks after an idle tick, so that an idle worker wakes nobody. Epochs advance with the processor time of the calling
thread: waiting for a peer, or for the processor on a busy device, is not guest time. Waiting has limits of its own, for
one uninterrupted wait and in total. A call past one of them is stuck in the host: only the supervisor can end it, by
ending the worker. A tick counts at most a little more than its own length, so that no call is late after a suspended
device resumes.

The two threads share one reference: the immutable `Call` in flight. Each tick reads it once and judges that call by its
own limits; only the ticker writes the sums. A verdict carries the call's number, which the supervisor compares with the
statistics page, since the call may have ended meanwhile.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

from agent.host.engine.adapter_abi import Denials, DenyOutgoing, Requests
from agent.host.engine.codec import Answer
from agent.host.engine.guest import CancelledCallError, ChannelGuest, Guest, Turn, start
from agent.host.engine.host_interface import Served
from agent.host.engine.runtime import COMMAND, RECEIVER, STATE, TASK, EngineError, GuestError, Image
from agent.host.interfaces import messaging, registry, serial
from agent.host.ipc import worker_api
from agent.host.ipc.stats_page import StatsPage
from agent.host.ipc.worker_api import TokenBucket
from agent.host.ipc.write_quota import WriteMeter
from agent.host.sandbox import sandbox
from agent.host.worker.control_thread import ControlThread
from agent.host.worker.service import LOOK_AT_WRITES_S, LOOK_S, ServiceControl
from agent.host.worker.slot_channel import SlotResponse
from agent.host.worker.watchdog import (
    LINE_MAX_CHARS,
    Call,
    CallWatchdog,
    SendToSupervisor,
    WriteTicker,
    do_nothing,
)
from fleet.component.reader import bare
from fleet.component.wasi import CONFIG, ENVIRONMENT
from fleet.protocol.codes import CallOutcome
from fleet.protocol.manifest import Grants, Limits

T = TypeVar("T")
NO_PARTS: Final[Mapping[str, Any]] = {}


def _sentence(problem: str | None) -> str | None:
    """Return what a guest gives as its reason, as far as it fits in a message to the supervisor."""
    return None if problem is None else problem[:LINE_MAX_CHARS]


class GuestRunner:
    """The guest and everything around a call."""

    def __init__(
        self,
        image: Image,
        *,
        limits: Limits,
        grants: Grants,
        config: dict[str, str],
        page: StatsPage,
        say: SendToSupervisor,
        data: str = "",
        readable: Mapping[str, str] = NO_PARTS,
        ticker: CallWatchdog | None = None,
        scheduling_fd: int | None = None,
        redact: Callable[[str], str] = str,
        writes: WriteMeter | None = None,
        outgoing: Callable[[Callable[[str], None]], Requests] | None = None,
        channel: bool = False,
        parts: Mapping[str, Any] = NO_PARTS,
    ) -> None:
        """`channel`: calls come as frames on standard input, and `serve` takes them.

        `outgoing`: makes what the guest sends requests by, given where to log; None for nothing.

        `ticker`: that of the process, where there are other callers; None to start one.

        `parts`: what is set up for one interface alone (`Surroundings`).

        `readable`: directories that it may read, by the path at which the guest sees each.

        `redact` takes what is secret out of a text.
        """
        self._image = image
        self.streams = image.adapted  # true where answers can go out while they are written
        self._redact = redact
        self._writes = writes
        self.limits = limits
        self._parts = parts
        self._grants = grants
        self._config = config
        self._page = page
        self._data = data
        self._readable = readable
        self._channel = channel
        self.say = say
        self._lines = TokenBucket(limits.log_lines_per_minute)
        self._faults = TokenBucket(worker_api.FAULTS_A_MINUTE)
        self._dropped = 0
        self._guest: Guest | None = None
        self._kinds: frozenset[str] = frozenset()
        self._denials = Denials(self.log, page.denied)
        self._outgoing = DenyOutgoing(self._denials) if outgoing is None else outgoing(self.log)
        self._counting = threading.Lock()
        self._way: SlotResponse | None = None
        self._answered = 0
        self._sent_bytes = 0
        self._to_ports = 0
        self.last_returned = 0
        """Number of the last call of the channel from which its guest is known to have returned."""
        self._clock = self._had_ns = 0
        self._meter = WriteTicker(self._count_writes) if channel and writes is not None else None
        self._ticker = ticker or CallWatchdog(image.engine.tick, waits=lambda: sandbox.waits(scheduling_fd))

    def start(self) -> frozenset[str]:
        """Instantiate the guest; what it exports.

        Raises:
            EngineError, GuestError: it cannot be started.
        """
        self._begin(self.limits.start_ms)
        try:
            self._guest = self._instantiate()
        finally:
            self._ticker.end()
            self._page.rest()
        self._kinds = self._guest.kinds
        if self._config and not self._guest.configured:
            self._denials.note(ENVIRONMENT, f"it cannot read its configuration: {ENVIRONMENT} is not granted")
        return self._kinds

    def _instantiate(self) -> Guest:
        make = ChannelGuest if self._channel and self._image.adapted else start
        guest = make(
            self._image,
            limits=self.limits,
            grants=self._grants,
            config=self._config,
            log=self._denials,
            data=self._data,
            served=Served(registry.INTERFACES, self._parts, outgoing=self._outgoing, readable=self._readable),
        )
        if self._meter is not None:
            guest.meter(self._wrote)
        return guest

    def _wrote(self, size: int) -> None:
        """Take note of a call that begins (0), or of bytes that are about to go to the channel, and not to a file."""
        assert self._meter is not None
        if size:
            with self._counting:
                self._sent_bytes += size
        else:
            self._meter.begin()

    def serve(self, token: str, control: ControlThread) -> Turn:
        """Serve calls of the channel until there is a reason not to, and have the next instance ready then.

        `token`: discard what the channel has before it. `control` interrupts calls.

        Raises:
            EngineError: there is no next instance.
            GuestError: the call in flight ended in a trap or a limit.
        """
        guest = self._guest
        assert isinstance(guest, ChannelGuest)
        guest.await_interrupts(control.armed)
        with self._counted(control):
            if guest.ended:
                guest.renew()
            try:
                turn = guest.serve(token)
            except GuestError:
                self._outgoing.reset()
                raise
            self.last_returned = guest.last_call or self.last_returned
            control.ended(self.last_returned)
            if turn is Turn.MISPLACED or guest.spent:
                guest.renew()
        return turn

    def answer(self, method: bytes, target: bytes, headers: bytes, body: bytes, control: ControlThread) -> Answer:
        """Run an HTTP exchange of a native guest that came over the channel. Raises `GuestError`."""
        guest = self._guest
        assert guest is not None
        guest.await_interrupts(control.armed)
        with self._counted(control):
            try:
                if guest.ended:
                    guest.renew()
                if self._meter is not None:
                    self._meter.begin()
                return guest.handle(method, target, headers, body)
            except EngineError as error:
                guest.ended = True
                raise GuestError(CallOutcome.GUEST_TRAP, str(error)) from error
            except GuestError:
                guest.ended = True
                guest.close()  # gives its memory back, which may be large
                raise

    @contextlib.contextmanager
    def _counted(self, control: ControlThread) -> Iterator[None]:
        """Count processor time, and report what ends a call of the channel."""
        had_ns = time.thread_time_ns()
        try:
            yield
        except GuestError as error:
            is_fault = not (isinstance(error, CancelledCallError) or control.has_abandoned)
            control.ended(self._page.number())
            if is_fault:
                self._report(str(error))
            raise
        finally:
            self._page.spent(time.thread_time_ns() - had_ns)
            if self._meter is not None:
                self._meter.end()
                self._count_writes()

    def restore(self) -> None:
        """Have an instance again, if a control message has cost the last one.

        Raises:
            EngineError, GuestError: it cannot be started.
        """
        if self._guest is None:
            self.start()

    def configure(self, config: dict[str, str]) -> str | None:
        """Let the guest read this configuration from its next look on; None for done, else a sentence.

        An environment is fixed when the guest is instantiated.
        """
        names = {bare(name) for name, functions in self._image.imports.items() if functions}
        if ENVIRONMENT in names and not names & set(CONFIG):
            return "it reads its configuration from its environment, which stays as it was at its start"
        self._config.update(config)  # first: a service may read meanwhile
        for gone in self._config.keys() - config.keys():
            del self._config[gone]
        return None

    def _lacks(self, kind: str) -> str | None:
        """Return a sentence for a call to what the guest does not export; None where it does."""
        return None if kind in self._kinds else f"it exports no {kind}"

    def handle(
        self, head: tuple[bytes, bytes, bytes], body: bytes, way: SlotResponse | None
    ) -> tuple[int, bytes, bytes]:
        """Run an HTTP exchange; raises `GuestError`. The router counts it: the answer may still be bad.

        Where the guest can, its answer goes out on `way` while it is written.
        """
        return self._call(lambda guest: guest.handle(*head, body, way), way=way)

    def check(self) -> str | None:
        """Ask for the guest's health: None for well, else a sentence."""
        try:
            return _sentence(self._call(Guest.check))
        except GuestError as error:
            return f"its health check failed: {error}".splitlines()[0]

    def run(self, scheduled_ms: int, arguments: Sequence[str] = ()) -> str | None:
        """Run the task, or the command with its arguments, counted; None for done, else a sentence."""
        if TASK not in self._kinds and COMMAND in self._kinds:
            return self._run_command(arguments)
        if (lacking := self._lacks(TASK)) is not None:
            return lacking
        began_ns = time.monotonic_ns()
        try:
            problem = _sentence(self._call(lambda guest: guest.run(scheduled_ms)))
        except GuestError as error:
            self.count(error.outcome, began_ns, error=True)
            return str(error).splitlines()[0]
        self.count(CallOutcome.OK, began_ns, error=problem is not None)
        return problem

    def receive(self, message: worker_api.Deliver) -> str | None:
        """Run the handler with a message, counted; None for handled, else a sentence, which is a fault of the guest."""
        if (lacking := self._lacks(RECEIVER)) is not None:
            return lacking
        messages = self._parts[messaging.NAME]
        began_ns = time.monotonic_ns()
        try:
            problem = self._call(
                lambda guest: guest.receive(
                    messages.received(message.topic, message.data, message.content_type, message.metadata)
                )
            )
        except GuestError as error:
            self.count(error.outcome, began_ns, error=True)
            return str(error).splitlines()[0]
        if problem is not None:
            problem = _sentence(f"its message handler failed: {problem}")
            self._report(problem or "")  # first: whoever sees the count has its reason
        self.count(CallOutcome.OK if problem is None else CallOutcome.GUEST_TRAP, began_ns, error=problem is not None)
        return problem

    def _run_command(self, arguments: Sequence[str]) -> str | None:
        """Run the command in an instance of its own, whose end costs no other."""
        ended: list[GuestError | EngineError] = []

        def enter(guest: Guest) -> int:
            try:
                return guest.command(arguments)
            except (GuestError, EngineError) as error:
                ended.append(error)
                return 0

        began_ns = time.monotonic_ns()
        code = self._call(enter, self.limits.start_ms + self.limits.call_ms)
        message = str(ended[0]) if ended else f"its run ended with exit code {code}" if code else ""
        outcome = CallOutcome.GUEST_TRAP if message else CallOutcome.OK
        if ended and isinstance(ended[0], GuestError):
            outcome = ended[0].outcome
        self._report(message)  # first: whoever sees the count has its reason
        self.count(outcome, began_ns, error=bool(message))
        return message.splitlines()[0] if message else None

    def serve_as_service(self, arguments: Sequence[str], control: ServiceControl) -> worker_api.ServiceEnded:
        """Run the command until it ends; say how, which is a fault unless it was asked to: none ends by itself."""
        guest = self._guest
        assert guest is not None
        self._clock = time.pthread_getcpuclockid(threading.get_ident())
        self._had_ns = time.clock_gettime_ns(self._clock)
        self._begin(self.limits.start_ms)

        def begins() -> None:
            self._ticker.end()
            self._page.rest()
            control.begins()

        control.start()
        try:
            code = guest.command(arguments, begins)
            fault = how = f"its run ended with exit code {code}"
        except (GuestError, EngineError) as error:
            fault = f"its run ended: {error}"
            how = fault.splitlines()[0]
            if control.interrupted:
                how = "its run did not end within trigger.stop, and was ended"
        finally:
            self._ticker.end()
        self.look()
        return worker_api.ServiceEnded(how=how[:LINE_MAX_CHARS], fault="" if control.draining else fault)

    def look(self) -> None:
        """Count what a service has used so far: processor time of the thread that it runs on, bytes written."""
        with self._counting:
            had_ns, self._had_ns = self._had_ns, time.clock_gettime_ns(self._clock)
            self._page.spent(self._had_ns - had_ns)
        self._count_writes()

    @property
    def look_s(self) -> float:
        """Seconds between two looks at a service."""
        return LOOK_S if self._writes is None else LOOK_AT_WRITES_S

    def save_state(self, most: int) -> tuple[bytes, str | None]:
        """Return the guest's state of at most `most` bytes, or empty and why there is none."""
        if (lacking := self._lacks(STATE)) is not None:
            return b"", lacking
        try:
            state, problem = self._call(Guest.save_state, self.limits.start_ms)
        except GuestError as error:
            return b"", str(error).splitlines()[0]
        if problem is None and len(state) > most:
            return b"", f"its state has {len(state)} bytes, {most} are allowed (limits.state)"
        return state, _sentence(problem)

    def load_state(self, state: bytes) -> str | None:
        """Give the guest a state: None for loaded, else a sentence."""
        if (lacking := self._lacks(STATE)) is not None:
            return lacking
        try:
            return _sentence(self._call(lambda guest: guest.load_state(state), self.limits.start_ms))
        except GuestError as error:
            return str(error).splitlines()[0]

    def count(self, outcome: CallOutcome, began_ns: int | None, *, error: bool = False) -> None:
        """Count a call that began at `began_ns` (None: the guest was not entered)."""
        us = None if began_ns is None else (time.monotonic_ns() - began_ns) // 1000
        self._page.end(outcome, us, error=error)

    def _begin(self, budget_ms: int, way: SlotResponse | None = None) -> None:
        """Let the page and the ticker know of a call. The page first: no verdict comes before its number is there."""
        number = self._ticker.number()
        self._page.begin(time.monotonic_ns(), number)
        watch = do_nothing if self._writes is None else self._count_writes
        self._ticker.begin(Call(number, budget_ms, self.limits, self.say, watch, way))

    def _call(self, enter: Callable[[Guest], T], own_ms: int = 0, way: SlotResponse | None = None) -> T:
        try:
            if self._guest is None:
                self.start()
            assert self._guest is not None
            self._count_writes()
            self._way = way
            self._begin(own_ms or self.limits.call_ms, way)
            had_ns = time.thread_time_ns()
            try:
                return enter(self._guest)
            finally:
                self._page.spent(time.thread_time_ns() - had_ns)
                self._ticker.end()
                self._page.rest()
                self._count_writes()
                self._way, self._answered = None, self._sent_bytes
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
            # Bytes that went through the pipe in place of standard output, to the channel, or to serial ports.
            answered = self._sent_bytes if self._way is None else self._way.read_bytes
            ports = self._parts.get(serial.NAME)
            to_ports = 0 if ports is None else ports.sent_bytes
            too_much = self._writes.look(answered=answered - self._answered + to_ports - self._to_ports)
            self._answered, self._to_ports = answered, to_ports
        if too_much:
            self._page.denied()
            self.say(worker_api.Line(text=f"host: {self._writes.why()}"))

    def close(self) -> None:
        """Give the guest's memory back."""
        if self._guest is not None:
            self._guest.close()
            self._guest = None
        self._page.close()

    def _spend(self, message: str) -> None:
        """Drop a store that a trap has poisoned, and say so, unless there is nothing to say."""
        if self._guest is not None:
            self._guest.close()
            self._guest = None
        self._report(message)

    def _report(self, message: str) -> None:
        if message and self._faults.take():
            self.say(worker_api.Fault(message=message))

    def log(self, text: str) -> None:
        """Pass on what the guest logs, as far as it may: each line of it counts."""
        # Before it is cut: a secret in halves would not be known again.
        lines = self._redact(text).splitlines() or [""]
        for number, line in enumerate(lines):
            if not self._lines.take():
                self._dropped += len(lines) - number
                self._page.dropped(len(lines) - number)
                return
            self.say(worker_api.Line(text=line[:LINE_MAX_CHARS], dropped=self._dropped))
            self._dropped = 0
