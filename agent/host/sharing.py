"""Lanes that several instances of one publisher share, where the operator allows it: the supervisor's side.

Each instance in one has a *seat*: a `Lane` handle with a control socket and figures of its own, so that whoever raises,
swaps and ends lanes need not know the difference. What differs is how seats end:

    ended for itself     its socket is closed; the process and the others go on
    its call must end    only ending the process helps: it is to blame, the others are bystanders and are told its name
    the process dies     whoever was in a call is to blame; if nobody was, each has lost its lane as it would its own
    one left in a call   the process ends itself once that call is past a limit, and the others are bystanders

An image can only be mapped before the cell is shut. So an instance takes a seat where its image is already open, and
else a lane is opened for it, with the images of its whole set, that seats of emptier lanes can move to later.
"""

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from agent.host import control
from agent.host.handle import Lane, LaneGoneError
from fleet.protocol.caps import MIB
from fleet.protocol.manifest import Grants, Limits

SEATS: Final = 64
_OPEN_S: Final = 20.0

_IMAGE_MAX_BYTES: Final = 4 * MIB

OnMessage = Callable[[Lane, control.FromLane], None]


def why_alone(grants: Grants, limits: Limits, image_bytes: int, *, files: bool, secrets: bool) -> str:
    """Why an instance that may share a lane has one of its own all the same, as a sentence; empty where it shares.

    Whoever breaks out of one instance has what its process has: so what is worth taking stays out of shared lanes.
    """
    if files:
        return "it has files, which no neighbour may come near"
    if secrets:
        return "it has secrets, which no neighbour may come near"
    if grants.outbound or grants.instances:
        return "it may connect to others, which no neighbour may do in its name"
    if limits.concurrency > 1:
        return f"it may have {limits.concurrency} calls at once, and a shared lane has one"
    if image_bytes > _IMAGE_MAX_BYTES:
        return f"its image has {image_bytes} bytes, and small ones share: at most {_IMAGE_MAX_BYTES}"
    return ""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A seat that is wanted.

    Attributes:
        namespace: the publisher's: only its instances share.
        image, image_fd: the image's name and its memfd.
        limits: of the instance.
        fuel: whether its images count instructions.
        uid: what all lanes of the namespace that are shared become; None to stay.
        admit: puts a new process into its control group.
        dismiss: removes that group, when none is left in it.
    """

    namespace: str
    image: str
    image_fd: int
    limits: Limits
    fuel: bool
    uid: int | None
    admit: Callable[[int], None]
    dismiss: Callable[[], None]

    @property
    def needs(self) -> tuple[int, int, int]:
        """What the process is limited by: the largest of each of its instances."""
        return self.limits.memory_bytes, self.limits.request_bytes, self.limits.response_bytes


class SharedLane:
    """One process and its seats."""

    def __init__(self, number: int, process: Lane, wanted: Wanted, images: frozenset[str]) -> None:
        self.name = process.name
        self._number = number
        self.process = process
        self.seats: list[Lane] = []
        self.images = images
        self._needs = wanted.needs
        self._blamed: Lane | None = None
        self._ending = False
        process.ended.add_done_callback(lambda _: self._ended())
        process.ended.add_done_callback(lambda _: wanted.dismiss())

    @property
    def rank(self) -> tuple[int, int]:
        """The higher, the better a place for one more."""
        return len(self.seats), self._number

    def takes(self, wanted: Wanted) -> bool:
        """Whether there is a seat for this one."""
        return (
            self.process.alive
            and not self._ending
            and len(self.seats) < SEATS
            and wanted.image in self.images
            and all(need <= most for need, most in zip(wanted.needs, self._needs, strict=True))
        )

    def seat(self, name: str, on_message: OnMessage) -> Lane:
        """An instance more. Raises `LaneGoneError`."""
        ours, theirs = control.pair()
        with theirs:
            seat = Lane(name, ours, on_message)
            seat.pid, seat.shared = self.process.pid, self
            try:
                self.process.send(control.Seat(), theirs.fileno())
            except LaneGoneError:
                seat.close()
                raise
        self.seats.append(seat)
        return seat

    def private_bytes(self) -> int:
        """A seat's part of the process's own memory."""
        return self.process.private_bytes() // max(1, len(self.seats))

    def kill(self, asked: Lane, because: str, *, at_fault: bool = False) -> None:
        """End the process, for what `asked` did (`at_fault`), or rather for whoever is in a call."""
        if self._blamed is None:
            self._blamed = asked if at_fault else self._in_call() or asked
        self._ending = True
        self.process.kill(because)

    def _in_call(self) -> Lane | None:
        return next((seat for seat in self.seats if seat.page.began_ns()), None)

    def leave(self, seat: Lane) -> None:
        """End one seat alone, and the process if it was the last."""
        if seat in self.seats:
            self.seats.remove(seat)
            seat.has_ended(0)
        if not self.seats:
            self._ending = True
            self.process.kill("nobody is left in it")

    def _ended(self) -> None:
        blamed = self._blamed or self._in_call()
        seats, self.seats = self.seats, []
        for seat in seats:
            seat.killed_because = seat.killed_because or self.process.describe_end()
            seat.blamed = seat is blamed
            if blamed is not None and not seat.blamed:
                seat.bystander_of = blamed.name.partition("/")[0]
            elif blamed is None and self.process.exit_status == control.ABANDONED:
                seat.bystander_of = "one that had left it"
            seat.has_ended(self.process.exit_status or 0)
        self.process.close()


class Sharing:
    """Every shared lane, by namespace."""

    def __init__(self, fork: Callable[[Wanted, str, OnMessage], Awaitable[Lane]]) -> None:
        """`fork(wanted, name, on_message)` gives a new process; raises `LaneGoneError`."""
        self._fork = fork
        self._lanes: dict[tuple[str, bool], list[SharedLane]] = {}
        self._images: dict[tuple[str, bool], dict[str, int]] = {}
        self._locks: dict[tuple[str, bool], asyncio.Lock] = {}
        self._opened = 0

    async def seat(self, wanted: Wanted, name: str, on_message: OnMessage) -> Lane:
        """A seat for an instance, in a lane that has its image, or in a new one.

        Raises:
            LaneGoneError: there is none to be had.
            TimeoutError: the new lane did not open in time.
        """
        key = wanted.namespace, wanted.fuel
        async with self._locks.setdefault(key, asyncio.Lock()):
            lanes = self._lanes[key] = [lane for lane in self._lanes.get(key, []) if lane.process.alive]
            self._forget(key, wanted.image)
            fitting = [lane for lane in lanes if lane.takes(wanted)]
            if not fitting:
                fitting = [await self._open(key, wanted)]
                lanes += fitting
            return max(fitting, key=lambda lane: lane.rank).seat(name, on_message)

    def better(self, seat: Lane, wanted: Wanted) -> bool:
        """Whether a fuller lane would take this one too: then its own may become empty, and end.

        Of two that are equally full the newer is the fuller: it has the more images open. So seats only ever move up.
        """
        lanes = self._lanes.get((wanted.namespace, wanted.fuel), [])
        mine = next((lane.rank for lane in lanes if lane is seat.shared), (SEATS, 0))
        return mine[0] < SEATS and any(lane.rank > mine and lane.takes(wanted) for lane in lanes)

    def _forget(self, key: tuple[str, bool], but: str) -> None:
        """Close the images that no seat's lane has open."""
        kept = self._images.setdefault(key, {})
        used = frozenset[str]().union(*(lane.images for lane in self._lanes[key] if lane.seats))
        for image in [image for image in kept if image != but and image not in used]:
            os.close(kept.pop(image))

    async def _open(self, key: tuple[str, bool], wanted: Wanted) -> SharedLane:
        kept = self._images[key]
        if wanted.image not in kept:
            kept[wanted.image] = os.dup(wanted.image_fd)
        chosen = list(kept)[-control.IMAGES_MAX :]
        if wanted.image not in chosen:
            chosen[0] = wanted.image
        self._opened += 1
        name = f"{wanted.namespace}-{self._opened}"
        process = await self._fork(wanted, name, _unheard)
        wanted.admit(process.pid)
        order = control.Open(images=tuple(chosen), limits=wanted.limits, seats=SEATS, uid=wanted.uid)
        try:
            answer = await process.ask(
                order, *(kept[image] for image in chosen), answer=control.Opened, timeout_s=_OPEN_S
            )
        except (LaneGoneError, TimeoutError):
            process.kill("it did not open in time")
            raise
        if isinstance(answer, control.Refused):
            process.kill(answer.message)
            raise LaneGoneError(answer.message)
        return SharedLane(self._opened, process, wanted, frozenset(chosen))

    def close(self) -> None:
        """Let go of the images."""
        for images in self._images.values():
            for fd in images.values():
                with contextlib.suppress(OSError):
                    os.close(fd)
        self._images.clear()


def _unheard(_lane: Lane, _message: control.FromLane) -> None:
    """A shared lane's process says nothing of itself."""
