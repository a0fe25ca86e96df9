"""Swap of generations, step by step; barrier of an atomic set; transfer of state.

`take_over` is the sequence of a start, `go_back` that of a revert. Until the new generation serves, each step can be
undone, and a failure leaves the old generation serving; after that, nothing can fail. Where one of the two may not
overlap (`swap = "replace"`), the old one is stopped first, and a failure starts it again, with the state that it saved.

Barrier: the starts of an atomic set wait for each other, and no member serves before all are ready. The last member
that becomes ready releases all, in the same turn of the event loop; if a member fails or does not arrive in time, all
fail.

State: saved by the old generation and loaded by the new one before that serves. Once it has saved, the old generation
is held: it answers no request until it hands over or resumes. It keeps its saved state while it is warm, for a revert
in which the new generation cannot save. Both must export `wasmfleet:state/state`; otherwise nothing is transferred, so
that a fix can replace a version that cannot save. State is passed in a memfd, which this process does not read.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

from agent.host.ipc import framing, worker_api
from agent.host.ipc.host_api import StartError
from agent.host.supervisor.generation import Generation, SavedState
from agent.host.supervisor.instance_log import InstanceLog
from agent.host.supervisor.resources import Listeners, check_room, no_room
from agent.host.supervisor.timers import InstanceTimers, ScheduleTimer, ask_health
from agent.host.supervisor.worker_handle import R, WorkerGoneError, WorkerHandle
from agent.host.supervisor.worker_set import WorkerSet
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import BadCronError, Http, OnMessage, Schedule

STATE: Final = "wasmfleet:state/state"

_BARRIER_GRACE_S: Final = 15.0  # in addition to the longest start: members arrive one after the other

_FAILURE_REMEMBERED_S: Final = 30.0

_TRANSFER_GRACE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class SwapParts:
    """Parts of an instance that a swap uses."""

    name: str
    workers: WorkerSet
    timers: InstanceTimers
    listeners: Listeners
    log: InstanceLog


async def take_over(
    parts: SwapParts, old: Generation | None, new: Generation, place: "BarrierPlace | None" = None
) -> float:
    """Start `new` beside `old` until it serves; return when the handover began (monotonic clock).

    Raises:
        StartError: `new` has been dropped, and `old` keeps serving.
    """
    if old is not None and (old.is_exclusive or new.is_exclusive):
        return await _replace(parts, old, new, place)
    async with AsyncExitStack() as undo:
        undo.callback(parts.workers.drop, new)
        check_schedule(new)
        await _start_checked(parts, old, new)
        open_listener(parts, new, undo)
        if place is not None:
            await place.ready(new.run.limits.start_ms / 1000)
        began_s = time.monotonic()
        if old is not None:
            undo.callback(parts.timers.start, old)
            parts.timers.stop()
            await finish_task(parts, old)
            if transfers_state(old, new):
                await transfer_state(old, new)
                undo.callback(resume, old)
        await listen(parts, new, old, undo)
        let_serve(parts, new)
        undo.pop_all()  # from here on calls go to the new generation
    return began_s


async def _replace(parts: SwapParts, old: Generation, new: Generation, place: "BarrierPlace | None") -> float:
    """Stop `old`, then start `new`, as `take_over`; until `new` serves, a failure starts `old` again."""
    async with AsyncExitStack() as undo:
        undo.callback(parts.workers.drop, new)
        check_schedule(new)
        check_room(parts.name)
        began_s = time.monotonic()
        undo.push_async_callback(_start_again, parts, old, new)
        problem = await _stop(parts, old)
        await _start_checked(parts, old, new)
        if STATE in new.kinds and new.service is None:
            if problem:
                raise _failed(old, f"{_version(old)} did not save its state: {problem}")
            await _load_kept(old, new)
        open_listener(parts, new, undo)
        if place is not None:
            await place.ready(new.run.limits.start_ms / 1000)
        await listen(parts, new, old, undo)
        let_serve(parts, new)
        undo.pop_all()
    _note_gap(parts, old, new, began_s)
    return began_s


async def _start_checked(parts: SwapParts, old: Generation | None, new: Generation) -> None:
    """Start a worker of `new`, without traffic, and check what it says of itself. Raises `StartError`."""
    await parts.workers.prepare_data(new, old)
    if new.unshared_reason:
        parts.log.note(f"host: it has a worker of its own: {new.unshared_reason}")
    worker = await parts.workers.start_worker(new, serve=False)
    check_exports(new)
    await check_health(new, worker)
    check_state(new)


async def _stop(parts: SwapParts, generation: Generation) -> str:
    """Stop a generation that serves, and keep its state if it has one; return why that could not be saved."""
    parts.timers.stop()
    await finish_task(parts, generation)
    problem = ""
    generation.is_serving = False  # from here on no worker of it is replaced
    if keeps_state(generation):
        try:
            generation.keep_state(await save(generation))
        except StateError as error:
            problem = str(error)
    await parts.workers.halt(generation)
    return problem


async def _start_again(parts: SwapParts, generation: Generation, other: Generation) -> None:
    """Let a generation that was stopped serve again, with the state that it had, in place of the `other` one."""
    await parts.workers.end_all(other)
    generation.is_serving = True
    parts.timers.start(generation)
    try:
        await parts.workers.start_worker(generation, serve=False)
        if generation.saved is not None:
            await load(generation, generation.saved)
    except (StateError, StartError) as error:
        parts.log.note(f"host: {_version(generation)} was not started again as it was: {error}")
    with contextlib.suppress(StartError):  # without a worker: whoever asked for the swap starts another
        let_serve(parts, generation)


async def _load_kept(old: Generation, new: Generation) -> None:
    if old.saved is None:
        return
    try:
        await load(new, old.saved)
    except StateError as error:
        raise _failed(old, f"{_version(new)} did not load the state of {_version(old)}: {error}") from error


def keeps_state(generation: Generation) -> bool:
    """Return whether a generation has state to carry over: one worker that lives from request to request."""
    limits = generation.run.limits
    exports = STATE in generation.kinds and generation.service is None
    return exports and len(generation.alive) == 1 and limits.requests_per_instance == 0


def _note_gap(parts: SwapParts, old: Generation, new: Generation, began_s: float) -> None:
    gap_ms = int((time.monotonic() - began_s) * 1000)
    parts.log.note(f"host: {_version(new)} has replaced {_version(old)}: neither ran for {gap_ms} ms")


async def _go_back_by_replacement(parts: SwapParts, current: Generation, warm: Generation) -> float:
    """Stop `current`, then start `warm`, as `go_back`."""
    check_room(parts.name)
    began_s = time.monotonic()
    async with AsyncExitStack() as undo:
        undo.push_async_callback(_start_again, parts, current, warm)
        problem = await _stop(parts, current)
        open_listener(parts, warm, undo)
        if not warm.alive:
            await parts.workers.start_worker(warm, serve=False)
        if STATE in warm.kinds and (state := current.saved or warm.saved) is not None:
            try:
                await load(warm, state)
            except StateError as error:
                problem = problem or str(error)
        if problem:
            parts.log.note(f"host: {_version(warm)} goes on without the latest state: {problem}")
        await listen(parts, warm, current, undo)
        let_serve(parts, warm)
        undo.pop_all()
    _note_gap(parts, current, warm, began_s)
    return began_s


async def go_back(parts: SwapParts, current: Generation, warm: Generation) -> float:
    """Make the generation kept `warm` serve again in place of `current`; returns as `take_over`.

    Raises:
        StartError: `current` keeps serving.
    """
    if current.is_exclusive or warm.is_exclusive:
        return await _go_back_by_replacement(parts, current, warm)
    began_s = time.monotonic()
    async with AsyncExitStack() as undo:
        open_listener(parts, warm, undo)
        if not warm.alive:
            await parts.workers.start_worker(warm, serve=False)
        undo.callback(parts.timers.start, current)
        parts.timers.stop()
        await finish_task(parts, current)
        undo.callback(resume, current)
        if problem := await transfer_back(current, warm):
            parts.log.note(f"host: {problem}")
        await listen(parts, warm, current, undo)
        let_serve(parts, warm)
        undo.pop_all()
    return began_s


def check_schedule(generation: Generation) -> None:
    """Raise `StartError` for a schedule that is malformed or never due."""
    for trigger in generation.run.manifest.triggers_of(Schedule):
        try:
            ScheduleTimer(trigger)
        except BadCronError as error:
            raise StartError(RejectCode.START_FAILED, f"{generation.run.instance}: {error}") from error


def check_exports(generation: Generation) -> None:
    """Raise `StartError` for a guest that does not export what one of its triggers calls."""
    for trigger in generation.run.manifest.triggers:
        if what := worker_api.lacking(trigger, generation.kinds):
            raise StartError(RejectCode.START_FAILED, f"{generation.run.instance}: {what}")
    if generation.service is not None and generation.run.manifest.health.check:
        what = "a service is in its run, and answers no health check"
        raise StartError(RejectCode.START_FAILED, f"{generation.run.instance}: {what}")


async def check_health(generation: Generation, worker: WorkerHandle) -> None:
    """Raise `StartError` (HEALTH_FAILED) for a guest whose health check, if it has one, fails."""
    if generation.run.manifest.health.check:
        problem = await ask_health(generation, worker)
        if problem is not None:
            raise StartError(RejectCode.HEALTH_FAILED, f"{generation.run.instance} is not well: {problem}")


def check_state(generation: Generation) -> None:
    """Raise `StartError` for a guest that exports state, but whose manifest makes transferring it impossible."""
    limits = generation.run.limits
    if STATE not in generation.kinds:
        return
    if limits.concurrency > 1:
        why = f"limits.concurrency is {limits.concurrency}, and the memory of several workers is not one state"
    elif limits.requests_per_instance:
        why = f"limits.requests_per_instance is {limits.requests_per_instance}: there is no memory to carry"
    else:
        return
    raise StartError(RejectCode.START_FAILED, f"{generation.run.instance}: it exports {STATE}, but {why}")


def open_listener(parts: SwapParts, generation: Generation, undo: AsyncExitStack) -> None:
    """Give a generation the listener of its port: the open one, or a new one that `undo` closes again.

    Raises:
        StartError: PORT_IN_USE; INTERNAL: there is no descriptor for it.
    """
    if not generation.run.manifest.triggers_of(Http):
        return
    port = generation.run.port
    was_open = parts.listeners.is_open(parts.name, port)
    try:
        generation.listener = parts.listeners.open(parts.name, port)
    except OSError as error:
        if error.errno in framing.NO_DESCRIPTORS:
            raise no_room(parts.name, error) from error
        code, what = (
            (RejectCode.INTERNAL, "make its socket for the router")
            if port is None
            else (RejectCode.PORT_IN_USE, f"listen on port {port}")
        )
        raise StartError(code, f"{parts.name}: cannot {what}: {error.strerror or error}") from error
    if not was_open:
        undo.callback(parts.listeners.close_port, parts.name, port)


async def listen(parts: SwapParts, new: Generation, old: Generation | None, undo: AsyncExitStack) -> None:
    """Have the router accept clients from the new generation's listener, until `undo` gives it the old one's again.

    Raises:
        StartError: there is no room for it, and the old one stays.
    """
    await parts.workers.listen(new)
    if old is None or old.listener is None or old.listener.sock.fileno() < 0:
        undo.callback(parts.workers.stop_listening)
    else:
        undo.push_async_callback(parts.workers.listen, old)


async def finish_task(parts: SwapParts, generation: Generation) -> None:
    """Wait for a scheduled task or a message in flight: two generations never run one at once."""
    triggers = generation.run.manifest.triggers
    if any(isinstance(each, Schedule | OnMessage) for each in triggers):
        await parts.workers.finish_task(generation)


def let_serve(parts: SwapParts, generation: Generation) -> None:
    """Make a generation accept connections. Raises `StartError`."""
    try:
        parts.workers.serve_all(generation)
    except WorkerGoneError as error:
        raise StartError(RejectCode.START_FAILED, str(error)) from error


# The barrier of an atomic set.


class _Meeting:
    """Atomic set during its swap."""

    def __init__(self) -> None:
        self.came: set[str] = set()
        self.ready: set[str] = set()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.inside = 0

    def fail(self, instance: str) -> None:
        """Fail every member that waits, because of this one."""
        self.over.set_exception(StartError(RejectCode.SET_FAILED, instance))
        self.over.exception()


class _Failure(NamedTuple):
    """Failed set: the member that failed, and the members that have not arrived yet."""

    instance: str
    untold: set[str]


class SwapBarrier:
    """Barrier of all atomic sets that are being swapped."""

    def __init__(self) -> None:
        self._meetings: dict[frozenset[str], _Meeting] = {}
        self._failures: dict[frozenset[str], _Failure] = {}

    @asynccontextmanager
    async def joined(self, instance: str, together: tuple[str, ...]) -> AsyncIterator["BarrierPlace"]:
        """Begin the start of a member; an exception within fails the whole set if it still waits."""
        members = frozenset({instance, *together})
        meeting = self._meetings.get(members)
        if meeting is None or meeting.over.done():
            meeting = self._meetings[members] = _Meeting()
        failure = self._failures.get(members)
        if failure is not None and instance in failure.untold:
            failure.untold.discard(instance)
            meeting.fail(failure.instance)
        meeting.came.add(instance)
        meeting.inside += 1
        try:
            yield BarrierPlace(meeting, instance, members)
        except BaseException:
            if not meeting.over.done():
                meeting.fail(instance)
                self._failures[members] = _Failure(instance, set(members - meeting.came))
                asyncio.get_running_loop().call_later(_FAILURE_REMEMBERED_S, self._failures.pop, members, None)
            raise
        finally:
            meeting.inside -= 1
            if not meeting.inside and self._meetings.get(members) is meeting:
                del self._meetings[members]


class BarrierPlace:
    """Place of a member at the barrier."""

    def __init__(self, meeting: _Meeting, instance: str, members: frozenset[str]) -> None:
        self._meeting, self._instance, self._members = meeting, instance, members

    async def ready(self, start_s: float) -> None:
        """Wait until all members are ready, each of which may take `start_s` to start.

        Raises:
            StartError: SET_FAILED: a member failed, or did not arrive.
        """
        meeting = self._meeting
        meeting.ready.add(self._instance)
        if meeting.ready >= self._members and not meeting.over.done():
            meeting.over.set_result(None)
        # Not `asyncio.timeout`: a set that is complete in the turn of the time-out takes over as a whole.
        await asyncio.wait([meeting.over], timeout=start_s + _BARRIER_GRACE_S)
        if not meeting.over.done():
            missing = ", ".join(sorted(self._members - meeting.ready))
            raise self._failed(f"{missing}, which did not arrive")
        try:
            meeting.over.result()
        except StartError as error:
            raise self._failed(f"{error}, which failed") from error

    def _failed(self, other: str) -> StartError:
        return StartError(
            RejectCode.SET_FAILED,
            f"{self._instance}: not swapped, as it belongs to an atomic set with {other}",
        )


# Transfer of state.


class StateError(Exception):
    """State could not be saved or loaded; the message says why."""


def transfers_state(old: Generation, new: Generation) -> bool:
    """Return whether there is state to transfer: both export it, and a single worker keeps it between requests."""
    return (
        old.service is None
        and new.service is None
        and STATE in old.kinds
        and STATE in new.kinds
        and len(old.alive) == 1
        and old.run.limits.requests_per_instance == new.run.limits.requests_per_instance == 0
    )


async def transfer_state(old: Generation, new: Generation) -> None:
    """Have `old` save its state and `new` load it; `old` is then held, and keeps the saved state.

    Raises:
        StartError: STATE_FAILED; `old` is not held.
    """
    try:
        saved = await save(old)
    except StateError as error:
        raise _failed(old, f"{_version(old)} did not save its state: {error}") from error
    try:
        await load(new, saved)
    except StateError as error:
        saved.close()
        resume(old)
        raise _failed(old, f"{_version(new)} did not load the state of {_version(old)}: {error}") from error
    except BaseException:
        saved.close()
        resume(old)
        raise
    old.keep_state(saved)


async def transfer_back(current: Generation, warm: Generation) -> str:
    """Give `warm` the state of `current`, or else its own saved state. Return what went wrong; empty for nothing.

    Failures do not prevent the revert.
    """
    problem = ""
    if transfers_state(current, warm):
        try:
            saved = await save(current)
            try:
                await load(warm, saved)
            finally:
                saved.close()
        except StateError as error:
            problem = f"{_version(warm)} goes on with the state it had: {error}"
        else:
            return ""
    if warm.saved is not None and warm.alive:
        try:
            await load(warm, warm.saved)
        except StateError as error:
            problem = f"{_version(warm)} starts without its state: {error}"
    return problem


def resume(generation: Generation) -> None:
    """End the hold on a generation's workers."""
    for worker in generation.alive:
        with contextlib.suppress(WorkerGoneError):
            worker.notify(worker_api.Resume())


def _only_worker(generation: Generation) -> WorkerHandle:
    """Return the generation's only worker. Raises `StateError` if it has ended."""
    if not generation.alive:
        raise StateError(generation.lost or "its worker has ended")
    return generation.alive[0]


async def save(generation: Generation) -> SavedState:
    """Save the state of a generation, which is then held. If this raises `StateError`, it is not held."""
    worker, max_bytes = _only_worker(generation), generation.run.limits.state_bytes
    try:
        saved = SavedState(framing.sealed_memfd("state", max_bytes), 0)
    except OSError as error:
        raise StateError(f"there is no memory for it: {error.strerror}") from error
    try:
        answer = await _ask(generation, worker, worker_api.SaveState(), saved.fd, worker_api.StateSaved)
        saved.length = _length(answer, max_bytes)
    except BaseException:
        saved.close()
        raise
    return saved


def _length(answer: worker_api.StateSaved, max_bytes: int) -> int:
    if answer.problem is not None:
        raise StateError(answer.problem)
    if not 0 <= answer.length <= max_bytes:
        raise StateError("its worker reports an impossible length")
    return answer.length


async def load(generation: Generation, saved: SavedState) -> None:
    """Load a state into a generation. Raises `StateError`."""
    worker, max_bytes = _only_worker(generation), generation.run.limits.state_bytes
    if saved.length > max_bytes:
        raise StateError(f"it has {saved.length} bytes, but {max_bytes} are allowed (limits.state)")
    message = worker_api.LoadState(length=saved.length)
    answer = await _ask(generation, worker, message, saved.fd, worker_api.StateLoaded)
    if answer.problem is not None:
        raise StateError(answer.problem)


async def _ask(generation: Generation, worker: WorkerHandle, message: worker_api.Request, fd: int, reply: type[R]) -> R:
    # A call before it is ended first, and the worker's own watchdog ends both: this is for a worker that has none left.
    timeout_s = 2 * generation.run.limits.total_ms / 1000 + _TRANSFER_GRACE_S
    try:
        return await worker.request(message, fd, reply=reply, timeout_s=timeout_s)
    except WorkerGoneError as error:
        raise StateError(str(error)) from error
    except TimeoutError as error:
        worker.kill("it did not answer a request for its state")
        raise StateError("it did not answer in time") from error


def _version(generation: Generation) -> str:
    return generation.run.manifest.version


def _failed(old: Generation, why: str) -> StartError:
    return StartError(RejectCode.STATE_FAILED, f"{old.run.instance}: {why}; {_version(old)} goes on")
