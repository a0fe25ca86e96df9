"""Swap barrier; state transfer.

Where the new generations of an atomic set wait for each other: none takes over before all are ready to.

Each start names the others. Who is ready waits here; the last one lets all go, in one turn of the loop. Who fails
before that takes the others with it, and who does not come in time has failed.

Memory carried from one generation to the next: saved by the old one, loaded by the new, before that one serves.

    held     the old generation answers nobody from the moment it saved until it hands over or goes on
    kept     what it saved stays with it while it is warm: should it have to come back, and its successor has nothing
             sound to give, it finds what it had itself

Both must export `wasmfleet:state/state`; a fix that does not load state needs nothing of a version that will not save.
The state travels in a memfd, and neither this process nor the other lane reads it further than its length.
"""

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from agent.host.ipc import worker_api
from agent.host.ipc.host_api import StartError
from agent.host.supervisor.generation import Generation, Saved
from agent.host.supervisor.worker_handle import WorkerGoneError, WorkerHandle
from fleet.protocol.codes import RejectCode

_GRACE_S: Final = 15.0

_REMEMBERED_S: Final = 30.0


class _Meeting:
    """One set that is being swapped."""

    def __init__(self) -> None:
        self.met: set[str] = set()
        self.ready: set[str] = set()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.inside = 0

    def fail(self, instance: str) -> None:
        """This one failed: whoever waits here hears of it, and that may be nobody."""
        self.over.set_exception(StartError(RejectCode.SET_FAILED, instance))
        self.over.exception()


class SwapBarrier:
    """Every set that is being swapped now."""

    def __init__(self) -> None:
        self._meetings: dict[frozenset[str], _Meeting] = {}
        self._untold: dict[frozenset[str], tuple[str, set[str]]] = {}  # who failed, and who has not come yet to hear it

    @asynccontextmanager
    async def joined(self, instance: str, together: tuple[str, ...]) -> AsyncIterator["Place"]:
        """Begin a start that is one of a set; an exception in here is the whole set's, as long as it waits."""
        members = frozenset({instance, *together})
        meeting = self._meetings.get(members)
        if meeting is None or meeting.over.done():
            meeting = self._meetings[members] = _Meeting()
        failed, untold = self._untold.get(members, ("", set()))
        if instance in untold:
            untold.discard(instance)
            meeting.fail(failed)
        meeting.met.add(instance)
        meeting.inside += 1
        try:
            yield Place(meeting, instance, members)
        except BaseException:
            if not meeting.over.done():
                meeting.fail(instance)
                self._untold[members] = (instance, set(members - meeting.met))
                asyncio.get_running_loop().call_later(_REMEMBERED_S, self._untold.pop, members, None)
            raise
        finally:
            meeting.inside -= 1
            if not meeting.inside and self._meetings.get(members) is meeting:
                del self._meetings[members]


class Place:
    """One member's place among the others."""

    def __init__(self, meeting: _Meeting, instance: str, members: frozenset[str]) -> None:
        self._meeting, self._instance, self._members = meeting, instance, members

    async def ready(self, longest_s: float) -> None:
        """Wait until all are ready. Raises `StartError` (SET_FAILED) when one is not, or does not come."""
        meeting = self._meeting
        meeting.ready.add(self._instance)
        if meeting.ready >= self._members and not meeting.over.done():
            meeting.over.set_result(None)
        try:
            await asyncio.wait_for(asyncio.shield(meeting.over), longest_s + _GRACE_S)
        except TimeoutError as error:
            missing = ", ".join(sorted(self._members - meeting.ready))
            raise failure(self._instance, f"{missing}, which did not come") from error
        except StartError as error:
            raise failure(self._instance, f"{error}, which failed") from error


def failure(instance: str, whom: str) -> StartError:
    """That a member is not started because of another."""
    return StartError(
        RejectCode.SET_FAILED, f"{instance}: it is to be swapped together with {whom}; nothing is changed"
    )


STATE: Final = "wasmfleet:state/state"

_TRANSFER_GRACE_S: Final = 5.0

_SEALS: Final = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def carries(old: Generation | None, new: Generation) -> bool:
    """Whether there is memory to carry: both say so, and it is one lane's, kept from request to request."""
    return (
        old is not None
        and STATE in old.kinds
        and STATE in new.kinds
        and len(old.alive) == 1
        and old.run.limits.requests_per_instance == new.run.limits.requests_per_instance == 0
    )


def check(generation: Generation) -> None:
    """Raise `StartError` for a generation whose state could not be carried by what else its manifest says."""
    limits = generation.run.limits
    if STATE not in generation.kinds:
        return
    if limits.concurrency > 1:
        why = f"limits.concurrency is {limits.concurrency}, and the memory of several lanes is not one state"
    elif limits.requests_per_instance:
        why = f"limits.requests_per_instance is {limits.requests_per_instance}: there is no memory to carry"
    else:
        return
    raise StartError(RejectCode.START_FAILED, f"{generation.run.instance}: it exports {STATE}, but {why}")


async def transfer_state(old: Generation, new: Generation) -> None:
    """Have `old` save and `new` load; then `old` is held, and keeps what it saved.

    Raises:
        StartError: STATE_FAILED; `old` goes on.
    """
    try:
        saved = await save(old, _lane(old))
    except StateError as error:
        raise _failed(old, f"{_version(old)} did not save its state: {error}") from error
    try:
        await load(new, _lane(new), saved)
    except StateError as error:
        saved.close()
        go_on(old)
        raise _failed(old, f"{_version(new)} did not load the state of {_version(old)}: {error}") from error
    _keep(old, saved)


async def carry_back(current: Generation, warm: Generation) -> str:
    """Give `warm` what `current` knows, or else what it knew itself; what went wrong, as a sentence. Never raises."""
    problem = ""
    if carries(current, warm):
        try:
            saved = await save(current, _lane(current))
            try:
                await load(warm, _lane(warm), saved)
            finally:
                saved.close()
        except StateError as error:
            problem = f"{_version(warm)} goes on with the state it had: {error}"
        else:
            return ""
    if warm.saved is not None and warm.alive:
        try:
            await load(warm, _lane(warm), warm.saved)
        except StateError as error:
            problem = f"{_version(warm)} starts without its state: {error}"
    return problem


def go_on(generation: Generation) -> None:
    """End the hold on its lanes."""
    for lane in generation.alive:
        with contextlib.suppress(WorkerGoneError):
            lane.send(worker_api.Resume())


class StateError(Exception):
    """A state could not be saved or loaded; one sentence."""


def _lane(generation: Generation) -> WorkerHandle:
    """Its one lane. Raises `StateError`: it may end at any time."""
    if not generation.alive:
        raise StateError(generation.lost or "its lane has ended")
    return generation.alive[0]


async def save(generation: Generation, lane: WorkerHandle) -> Saved:
    """The lane's state; from now on it is held. Raises `StateError`, and then it is not."""
    limits = generation.run.limits
    saved = Saved(os.memfd_create("state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), 0)
    try:
        os.ftruncate(saved.fd, limits.state_bytes)
        fcntl.fcntl(saved.fd, fcntl.F_ADD_SEALS, _SEALS)
        answer = await _ask(lane, worker_api.SaveState(), saved.fd, worker_api.StateSaved, generation)
        saved.length = _length(answer, limits.state_bytes)
    except BaseException:
        saved.close()
        raise
    return saved


def _length(answer: worker_api.FromWorker, most: int) -> int:
    assert isinstance(answer, worker_api.StateSaved)
    if answer.problem is not None:
        raise StateError(answer.problem)
    if not 0 <= answer.length <= most:
        raise StateError("its lane tells a length that cannot be")
    return answer.length


async def load(generation: Generation, lane: WorkerHandle, saved: Saved) -> None:
    """Give a lane a state. Raises `StateError`."""
    most = generation.run.limits.state_bytes
    if saved.length > most:
        raise StateError(f"it has {saved.length} bytes, {most} are allowed (limits.state)")
    answer = await _ask(lane, worker_api.LoadState(length=saved.length), saved.fd, worker_api.StateLoaded, generation)
    assert isinstance(answer, worker_api.StateLoaded)
    if answer.problem is not None:
        raise StateError(answer.problem)


async def _ask(
    lane: WorkerHandle, message: worker_api.Request, fd: int, answer: type[worker_api.Reply], generation: Generation
) -> worker_api.FromWorker:
    # A call of before is ended first, and the lane's own watch ends both: this is for a lane that is none any more.
    timeout_s = 2 * generation.run.limits.total_ms / 1000 + _TRANSFER_GRACE_S
    try:
        return await lane.ask(message, fd, answer=answer, timeout_s=timeout_s)
    except WorkerGoneError as error:
        raise StateError(str(error)) from error
    except TimeoutError as error:
        lane.kill("it did not answer for its state")
        raise StateError("it did not answer in time") from error


def _keep(generation: Generation, saved: Saved) -> None:
    if generation.saved is not None:
        generation.saved.close()
    generation.saved = saved


def _version(generation: Generation) -> str:
    return generation.run.manifest.version


def _failed(old: Generation, why: str) -> StartError:
    return StartError(RejectCode.STATE_FAILED, f"{old.run.instance}: {why}; {_version(old)} goes on")
