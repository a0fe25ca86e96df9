"""Rollout loop: carry out what `fleet.rollout` decides, and keep every device's assignment in step.

A single task, woken by messages of devices, acts of operators and the times that decisions name. Everything it knows is
in the store, so that it may end at any instant and resume where it was.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import datetime
from typing import Final, assert_never

from fleet.protocol.codes import OPEN_STATES, Outcome, RolloutState
from fleet.rollout.decide import Action, Complete, Expire, Halt, Offer, Wait, decide, merge_set
from fleet.rollout.model import Rollout
from fleet.server.check_ins import CheckIns
from fleet.server.director import Director
from fleet.store.rows import AssignmentRow, RolloutRow
from fleet.store.store import ChangeSignal, Store
from signing.errors import SigningError

log = logging.getLogger(__name__)
_BATCH: Final = 25
"""After so many devices the loop lets others run."""

_MAX_STEPS: Final = 100
_REST: Final = 4
_REST_MAX_S: Final = 1.0


class RolloutController:
    """Carries out rollouts.

    Args:
        clock: the time, UTC.
        check_ins: asks devices for their signed state.
    """

    def __init__(
        self,
        *,
        store: Store,
        director: Director,
        watch: ChangeSignal,
        clock: Callable[[], datetime],
        check_ins: CheckIns,
    ) -> None:
        self._store, self._director, self._watch, self._clock = store, director, watch, clock
        self._check_ins = check_ins
        self._wake = asyncio.Event()
        self._dirty: dict[str, None] = {}
        self._next: float | None = None

    def wake(self) -> None:
        """Something happened: look again soon."""
        self._wake.set()

    def touch(self, devices: Iterable[str]) -> None:
        """Look again at devices whose desired state may have changed."""
        self._dirty.update(dict.fromkeys(devices))
        self._wake.set()

    async def run(self) -> None:
        """Go on until cancelled. A mistake in one round is logged, and the next round comes."""
        while True:
            self._wake.clear()
            began = time.perf_counter()
            try:
                await self.step()
            except Exception:
                log.exception("a round of the rollout loop failed; it is tried again")
                self._next = self._now() + 5
            # a round over thousands of devices costs something: never more than a fifth of the time goes there
            await asyncio.sleep(min(_REST_MAX_S, _REST * (time.perf_counter() - began)))
            pause = None if self._next is None else max(0.05, self._next - self._now())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)

    async def step(self) -> None:
        """Run one round: every open rollout until it waits, then every device whose desired state may have changed."""
        self._next = None
        for row in self._store.rollouts.open():
            await self._advance(row.number)
        await self._settle_dirty()
        self._watch.changed()

    async def _advance(self, number: int) -> None:
        for _ in range(_MAX_STEPS):
            row = self._store.rollouts.get(str(number))
            if row is None or row.state not in OPEN_STATES:
                return
            members = self._open_set(row)
            if members[0].number != number:
                return  # the first of a set leads it
            standing = merge_set([self._store.rollouts.standing(each.number) for each in members])
            if not await self._carry_out(row, decide(_model(row), standing, self._now())):
                return
        log.error("rollout %s does not come to rest", number)

    def _open_set(self, row: RolloutRow) -> list[RolloutRow]:
        return [each for each in self._store.rollouts.together(row) if each.state in OPEN_STATES]

    async def _carry_out(self, row: RolloutRow, actions: Iterable[Action]) -> bool:
        """Carry out actions; false when the rollout waits now."""
        moved = False
        for action in actions:
            match action:
                case Offer(wave, devices):
                    await self._offer(row, wave, devices)
                    moved = True
                case Expire(device, message):
                    self._expire(row, device, message)
                    moved = True
                case Halt(reason):
                    self.end(row, RolloutState.HALTED, reason)
                case Complete():
                    self._complete(row)
                case Wait(reason, until):
                    self._wait(row, reason, until)
                case _:
                    assert_never(action)
        return moved

    async def _offer(self, row: RolloutRow, wave: int, devices: Iterable[str]) -> None:
        log.info("rollout %s: wave %s of %s", row.number, wave, len(row.sizes))
        waiting = list(devices)
        for start in range(0, len(waiting), _BATCH):
            with self._store.atomic():
                for device in waiting[start : start + _BATCH]:
                    self._note_previous(row, device)
            await asyncio.sleep(0)
        now = self._store.rollouts.get(row.id)
        if now is None or now.state is not RolloutState.RUNNING:
            return  # an operator was quicker
        with self._store.atomic():  # a device is never asked for a part of a set
            for each in self._open_set(now):
                self._store.rollouts.offer(each.number, wave, now=self._now())
        self._watch.changed()
        self.touch(devices)
        await self._settle_dirty()

    def _note_previous(self, row: RolloutRow, device: str) -> None:
        board = self._store.devices.get(device)
        held = {} if board is None else self._director.effective(board)
        for each in self._open_set(row):
            before = held.get(each.instance)
            self._store.rollouts.set_previous(each.number, device, (before and before.value.target) or "")

    def _expire(self, row: RolloutRow, device: str, message: str) -> None:
        for each in self._open_set(row):
            found = self._store.rollouts.board(each.number, device)
            if found is not None and found[0].outcome is Outcome.IN_PROGRESS:
                board, extra = found
                late = replace(board, outcome=Outcome.FAILED, message=message, ended_at=self._now())
                self._store.rollouts.set_board(each.number, late, extra)

    def end(self, row: RolloutRow, state: RolloutState, reason: str) -> None:
        """End a rollout, and its whole set, without its aim: its devices are offered what they had before."""
        log.warning("rollout %s %s: %s", row.number, state, reason)
        with self._store.atomic():
            for each in self._open_set(row):
                self._store.rollouts.set_state(each.number, state, reason=reason, now=self._now())
                self._store.access.audit(
                    actor="server", act=f"rollout-{state}", subject=each.id, detail=reason, now=self._now()
                )
        self._touch_scope(row)

    def _complete(self, row: RolloutRow) -> None:
        log.info("rollout %s succeeded", row.number)
        with self._store.atomic():
            for each in self._open_set(row):
                self._store.rollouts.settle(
                    group=each.group,
                    device=each.device,
                    instance=each.instance,
                    value=each.value,
                    rollout=each.id,
                    now=self._now(),
                )
                self._store.rollouts.set_state(each.number, RolloutState.SUCCEEDED, now=self._now())
                self._store.access.audit(actor="server", act="rollout-succeeded", subject=each.id, now=self._now())
        self._touch_scope(row)

    def _touch_scope(self, row: RolloutRow) -> None:
        group = self._store.devices.group(row.group) if row.group else None
        self.touch(self._store.devices.members(group) if group is not None else [])
        self.touch(board.device for board, _ in self._store.rollouts.boards(row.number))
        self._watch.changed()

    def _wait(self, row: RolloutRow, reason: str, until: float | None) -> None:
        if row.state is RolloutState.RUNNING:
            for each in self._open_set(row):
                self._store.rollouts.set_reason(each.number, reason)
        if until is not None:
            self._next = until if self._next is None else min(self._next, until)

    async def _settle_dirty(self) -> None:
        """Renew assignments, one transaction per batch; ask devices that have nothing left to do for their state."""
        while self._dirty:
            batch = list(self._dirty)[:_BATCH]
            for device in batch:
                del self._dirty[device]
            with self._store.atomic():
                changed = [row for row in map(self._prepare, batch) if row is not None]
            for row in changed:
                self._director.publish_assignment(row)
            await asyncio.sleep(0)

    def _prepare(self, device: str) -> AssignmentRow | None:
        row = self._store.devices.get(device)
        if row is not None and self._director.is_ahead(row):
            return None  # no assignment of this server reaches it
        try:
            assignment, changed = self._director.prepare(device)
        except SigningError as error:
            log.error("no assignment can be made for %s: %s", device, error)  # noqa: TRY400 - the operator's data
            return None
        self._note_version(device, assignment.version if assignment is not None else 0, changed=changed)
        return assignment if changed else None

    def _note_version(self, device: str, version: int, *, changed: bool) -> None:
        """Note which assignment offers a rollout first; of one that the device had before no report follows."""
        for rollout in self._store.rollouts.offered(device, undecided=True):
            found = self._store.rollouts.board(rollout.number, device)
            if found is None or found[1].version:
                continue
            if version == 0:
                self._skip(rollout, device)
                continue
            self._store.rollouts.set_version(rollout.number, device, version)
            if not changed:
                self._check_ins.ask(device)

    def _skip(self, rollout: RolloutRow, device: str) -> None:
        """Leave out a device to which nothing was ever assigned, and nothing is now."""
        found = self._store.rollouts.board(rollout.number, device)
        if found is not None:
            board, extra = found
            left_out = replace(board, outcome=Outcome.SKIPPED, message="nothing was ever assigned to it")
            self._store.rollouts.set_board(rollout.number, left_out, extra)
            self.wake()

    def _now(self) -> float:
        return self._clock().timestamp()


def _model(row: RolloutRow) -> Rollout:
    return Rollout(
        id=row.id,
        state=row.state,
        sizes=row.sizes,
        wave=row.wave,
        failures=row.failures,
        soak_s=row.soak_s,
        timeout_s=row.timeout_s,
    )
