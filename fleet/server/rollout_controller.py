"""Rollout loop: carry out what `fleet.rollout` decides, and keep every device's assignment in step.

A single task, woken by messages of devices, acts of operators and the times that decisions name. Everything it knows is
in the store, so that it may end at any instant and resume where it was. Durations count on steady time
(`fleet.rollout.steady`), of which the store keeps a witness.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from dataclasses import replace as with_fields
from datetime import datetime
from typing import Final

from msgspec.structs import replace

from fleet.protocol.codes import OPEN_STATES, PauseCause, RolloutState
from fleet.rollout import advance
from fleet.rollout.advance import Step, advance_set
from fleet.rollout.decide import Close, Offer, Pause, Revert, Rollout
from fleet.rollout.effective import SettledValue, Withdrawal
from fleet.rollout.model import OPEN, Member, Value, leave, overtaken
from fleet.rollout.presence import Polls, by_polls, polled
from fleet.rollout.steady import Witness
from fleet.server.check_ins import CheckIns
from fleet.server.director import Director
from fleet.server.rollout_members import Change, Drawn, Membership, refusal, with_presence
from fleet.store.rollouts import Undecided
from fleet.store.rows import AssignmentRow, RolloutRow, SettledRow
from fleet.store.store import ChangeSignal, DeviceFacts, Store
from signing.errors import SigningError

log = logging.getLogger(__name__)
_BATCH: Final = 50
"""After so many devices the loop lets others run."""

_AGAIN_S: Final = 5.0
"""Delay after a mistake before the next round."""

_REST: Final = 4
_REST_MAX_S: Final = 1.0
_WITNESS_S: Final = 10.0
"""Steady time that a crash may lose."""

_WAITING_MAX: Final = 20
_ENDED: Final = frozenset({RolloutState.REVERTED, RolloutState.ABORTED, RolloutState.REVOKED, RolloutState.SUPERSEDED})


class RolloutController:
    """Carries out rollouts.

    Args:
        clock: the time, UTC.
        monotonic: seconds that do not jump.
        check_ins: asks devices for their signed state.
    """

    def __init__(
        self,
        *,
        store: Store,
        director: Director,
        membership: Membership,
        watch: ChangeSignal,
        clock: Callable[[], datetime],
        check_ins: CheckIns,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store, self._director, self._repository = store, director, membership.repository
        self._membership, self._watch, self._check_ins = membership, watch, check_ins
        self._clock, self._monotonic = clock, monotonic
        known = store.rollouts.witness()
        self._witness = Witness(0, self._now()) if known is None else known.resumed(self._now())
        self._stored, self._base = self._witness, self._witness.steady - monotonic()
        self._wake = asyncio.Event()
        self._dirty: dict[str, None] = {}
        self._next: float | None = None
        self._online: dict[str, float] = {}
        self._heard: dict[str, float] = {}
        self._polls: dict[str, Polls] = {}
        self._began = self.steady()
        self._published: frozenset[str] | None = None
        self.waits: dict[int, tuple[str, ...]] = {}

    def steady(self) -> float:
        """Return steady time: seconds that this server watched, over restarts."""
        return self._base + self._monotonic()

    def wake(self) -> None:
        """Look again soon."""
        self._wake.set()

    def heard(self, device: str) -> None:
        """Note that a device has sent anything."""
        self._heard[device] = self.steady()

    def polled(self, device: str) -> None:
        """Note that a device asked for its assignment over HTTPS; of one at the broker that tells nothing new."""
        if device in self._online:
            return
        before, now = self._polls.get(device), self.steady()
        self._polls[device] = polled(before, now)
        if before is None or now > before.until:
            self._wake.set()

    def touch(self, devices: Iterable[str]) -> None:
        """Look again at devices whose desired state may have changed."""
        before = len(self._dirty)
        self._dirty.update(dict.fromkeys(devices))
        if len(self._dirty) > before:
            self._wake.set()

    async def run(self) -> None:
        """Go on until cancelled. A mistake in one round is logged, and the next round comes."""
        while True:
            self._wake.clear()
            began = self._monotonic()
            try:
                await self.step()
            except Exception:
                log.exception("a round of the rollout loop failed; it is tried again")
                self._look_at(self.steady() + _AGAIN_S)
            # a round over thousands of devices costs something: never more than a fifth of the time goes there
            await asyncio.sleep(min(_REST_MAX_S, _REST * (self._monotonic() - began)))
            pause = None if self._next is None else max(0.05, self._next - self.steady())
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()

    async def step(self) -> None:
        """Run one round: every open rollout until it waits, then every device whose desired state may have changed."""
        self._next = None
        self._keep_witness()
        self._withdraw_unpublished()
        self._note_presence()
        await self._join_dirty()
        for row in self._store.rollouts.scheduled():
            with self._apart(row):
                self._begin_scheduled(row.number)
        for row in (*self._store.rollouts.open(), *self._store.rollouts.queues()):
            with self._apart(row):
                await self._advance(row.number)
        await self._settle_dirty()
        self._watch.changed()

    @contextlib.contextmanager
    def _apart(self, row: RolloutRow) -> Iterator[None]:
        """Log a mistake over one rollout and try it again later, so that it holds up no other one."""
        try:
            yield
        except Exception:
            log.exception("a round of the rollout loop failed over rollout %s; it is tried again", row.number)
            self._look_at(self.steady() + _AGAIN_S)

    def waiting(self) -> list[str]:
        """Return what each open rollout and catch-up queue waits for, as sentences."""
        rollouts = self._store.rollouts
        said = [f"{scope or 'the fleet'} is frozen: {reason}" for scope, reason in sorted(rollouts.freezes().items())]
        for row in (*rollouts.open(), *rollouts.scheduled(), *rollouts.queues()):
            if row.state in OPEN_STATES or row.reason:
                reason = f": {row.reason}" if row.reason else ""
                if wants_approval(row):
                    reason += f"; {approvers(row)}"
                said.append(f"rollout {row.number} ({row.instance} to {row.group or row.device}) {row.state}{reason}")
        return said[:_WAITING_MAX]

    # -- time and presence --------------------------------------------------------------------------------------------

    def _keep_witness(self) -> None:
        self._witness = self._witness.observe(self.steady(), self._now())
        if self._witness.steady - self._stored.steady >= _WITNESS_S:
            self._store.rollouts.set_witness(self._witness)
            self._stored = self._witness

    def _note_presence(self) -> None:
        """Note since when each device is online, as far as this server saw it."""
        online, now = self._store.devices.connected(), self.steady()
        self._online = {device: self._online.get(device, now) for device in online}
        self._polls = by_polls(self._polls, online, now)
        for each in self._polls.values():
            self._look_at(each.until)

    def _look_at(self, until: float | None) -> None:
        if until is not None:
            self._next = until if self._next is None else min(self._next, until)

    def _begin_scheduled(self, number: int) -> None:
        """Resolve the members of a rollout whose time has come, or of the set that it leads."""
        row = self._store.rollouts.get(str(number))
        if row is None or row.state is not RolloutState.SCHEDULED:
            return  # already begun with the one that leads its set
        rows = self.set_of(row)
        if rows[0].number != row.number:
            return
        if any(each.progress.causes for each in rows):
            return  # paused before its time: it begins when it is resumed
        at = row.plan.starts_at or 0
        if not self._witness.due(at):
            self._look_at(self.steady() + min(60.0, max(1.0, at - self._witness.utc)))
            return
        if (frozen := self._freeze_of(row)) is not None:
            for each in rows:
                self._store.rollouts.set_reason(each.number, f"frozen: {frozen}")
            return  # begins when the freeze is over, with the members of that moment
        left_out = self._membership.left_out_of_all([_change(each) for each in rows])
        with self._store.atomic():
            for each in rows:
                self._begin(each, self._membership.draw(_change(each), each.plan, also_out=left_out))

    def _begin(self, row: RolloutRow, drawn: Drawn) -> None:
        """Begin a scheduled rollout, as `RolloutPlanner` begins one at once."""
        progress, reason = replace(drawn.progress, approved=row.progress.approved), ""
        if not progress.gates:
            settles = (row.value.target is None or row.plan.allow_empty) and not drawn.unguarded
            progress = Rollout(RolloutState.SUCCEEDED if settles else RolloutState.REFUSED, (), row.plan.limits)
            reason = drawn.unguarded or refusal(drawn.left_out)
        under_way = self._store.rollouts.open_on(group=row.group, device=row.device, instance=row.instance)
        if row.plan.where and under_way:
            progress, reason = Rollout(RolloutState.REFUSED, (), row.plan.limits), beside_open(under_way)
        if progress.state is not RolloutState.REFUSED:
            self.supersede(row)
        self._store.rollouts.add_members(row.number, drawn.members)
        before = self._store.rollouts.settled_value(group=row.group, device=row.device, instance=row.instance)
        self._store.rollouts.set_drawn(row.number, drawn.waves, before)
        self._store.rollouts.save(row.number, progress, reason=reason, now=self._now())
        if progress.state is RolloutState.SUCCEEDED:
            self._note_state(row, progress.state, reason)
            self.touch_scope(row)

    # -- one rollout --------------------------------------------------------------------------------------------------

    async def _advance(self, number: int) -> None:
        found = self._decide(number)
        if found is None:
            return
        if found.offered:
            await self._note_previous(found.rows, found.offered)
            noted = set(found.offered)
            found = self._decide(number)  # meanwhile operators and devices may have spoken
            if found is None:
                return
            self._note(found.rows, [device for device in found.offered if device not in noted])
        self._save(found)

    def look(self, row: RolloutRow) -> None:
        """Decide over a rollout at once, as after a pause: nothing is offered, and nobody is waited for."""
        found = self._decide(self.set_of(row)[0].number)
        if found is not None and not found.offered:
            self._save(found)

    def _decide(self, number: int) -> "_Decided | None":
        """Decide over a rollout, or the set that it leads; None for one that is over or led by another."""
        row = self._store.rollouts.get(str(number))
        if row is None or row.state not in OPEN_STATES | {RolloutState.SUCCEEDED}:
            return None
        rows = self.set_of(row)
        if rows[0].number != number:
            return None
        stored = [self._store.rollouts.members(each.number) for each in rows]
        taken_over = self._taken_over(row)
        model = self._frozen(row)
        busy = self._store.rollouts.busy([each.number for each in rows]) if model.limits.min_available else frozenset()
        step = advance_set(
            replace(model, closed=model.closed or taken_over),
            [self._present(row, members, busy) for members in stored],
            self.steady(),
        )
        if taken_over:  # closed while the other rollout is open, and no longer
            step = with_fields(step, rollout=replace(step.rollout, closed=row.progress.closed))
        offered = [device for action in step.actions if isinstance(action, Offer) for device in action.devices]
        return _Decided(rows, stored, step, offered)

    def set_of(self, row: RolloutRow) -> list[RolloutRow]:
        """Return the rollouts of a set that are in the same state: one that changed nothing was refused at once."""
        return [each for each in self._store.rollouts.together(row) if each.state is row.state] or [row]

    def _taken_over(self, row: RolloutRow) -> str:
        """Say which rollout closes the catch-up queue of another: a newer one of the instance; empty for none."""
        if row.state is not RolloutState.SUCCEEDED:
            return ""
        newer = self._store.rollouts.open_on(group=row.group, device=row.device, instance=row.instance)
        return f"rollout {newer[-1].number} is {newer[-1].state}" if newer else ""

    def _present(self, row: RolloutRow, members: Iterable[Member], busy: frozenset[str]) -> list[Member]:
        """Return members as they are now: connected or not, and out of the count when revoked or out of the group."""
        there = self._membership.ids(row.group, row.device)
        polling = {device: each.since for device, each in self._polls.items()}
        found = with_presence(members, self._online, self._heard, self._began, polling, busy)
        for place, member in enumerate(found):
            if member.device not in there:
                device = self._store.devices.get(member.device)
                revoked = device is not None and device.revoked
                found[place] = leave(member, "it is revoked" if revoked else "it left the group")
        return found

    def _freeze_of(self, row: RolloutRow) -> str | None:
        """Return the reason of the freeze that a rollout is under; None for none."""
        freezes = self._store.rollouts.freezes()
        return freezes.get(row.group, freezes.get(""))

    def _frozen(self, row: RolloutRow) -> Rollout:
        """Return the rollout as the freezes of the moment leave it."""
        frozen = self._freeze_of(row) is not None
        if frozen and PauseCause.FREEZE not in row.progress.causes:
            return advance.pause(row.model, PauseCause.FREEZE)
        return row.model if frozen else advance.unfreeze(row.model)

    async def _note_previous(self, rows: list[RolloutRow], devices: list[str]) -> None:
        """Record what devices should have run before they are offered something else."""
        for start in range(0, len(devices), _BATCH):
            with self._store.atomic():
                self._note(rows, devices[start : start + _BATCH])
            await asyncio.sleep(0)

    def _note(self, rows: list[RolloutRow], devices: list[str]) -> None:
        facts = self._store.facts(self._store.devices.some(devices)) if devices else {}
        for device in devices:
            found = facts.get(device)
            held = {} if found is None else self._director.effective(found.device, facts=found)
            for row in rows:
                before = held.get(row.instance)
                self._store.rollouts.set_previous(row.number, device, (before and before.value.target) or "")

    def _save(self, found: "_Decided") -> None:
        """Store what was decided, and have the assignments follow it."""
        rows, step = found.rows, found.step
        reason, touched = self._reason(rows[0], step), set(step.changed)
        for action in step.actions:
            if isinstance(action, Pause | Revert | Close):
                log.warning("rollout %s: %s", rows[0].number, action.reason)
        news = [
            [new for old, new in zip(before, after, strict=True) if _differs(old, new)]
            for before, after in zip(found.stored, step.sets, strict=True)
        ]
        touched |= {each.device for changed in news for each in changed}
        if any(news) or any(step.rollout != row.progress or reason != row.reason for row in rows):
            with self._store.atomic():
                for row, changed in zip(rows, news, strict=True):
                    self._store_step(row, changed, step.rollout, reason)
                    self._overtake(row, found.offered)
        if step.rollout.state is not rows[0].state:
            self.touch_scope(rows[0])
        self.waits.pop(rows[0].number, None)
        if step.wait.devices:
            self.waits[rows[0].number] = step.wait.devices
        self.touch(touched)
        self._look_at(step.wait.until)

    def _store_step(self, row: RolloutRow, changed: list[Member], progress: Rollout, reason: str) -> None:
        if changed:
            self._store.rollouts.set_members(row.number, changed, now=self._now())
        if progress != row.progress or reason != row.reason:
            self._store.rollouts.save(row.number, progress, reason=reason, now=self._now())
        if progress.state is not row.state:
            self._note_state(row, progress.state, reason)

    def _reason(self, row: RolloutRow, step: Step) -> str:
        """Return why a rollout ended, is paused or waits."""
        said = [each.reason for each in step.actions if isinstance(each, Pause | Revert)]
        if said:
            return said[-1]
        causes = step.rollout.causes
        if PauseCause.FREEZE in causes and PauseCause.FREEZE not in row.progress.causes:
            return f"frozen: {self._freeze_of(row) or ''}"
        return row.reason if causes and row.progress.causes else step.wait.reason

    def _note_state(self, row: RolloutRow, state: RolloutState, reason: str) -> None:
        """Settle the value of a rollout that succeeded, and record the change of state."""
        log.info("rollout %s %s", row.number, state)
        now = self._now()
        if state is RolloutState.SUCCEEDED:
            self.settle(group=row.group, device=row.device, instance=row.instance, value=row.value, rollout=row.id)
        if state in _ENDED | {RolloutState.SUCCEEDED, RolloutState.PAUSED}:
            self._store.access.audit(actor="server", act=f"rollout-{state}", subject=row.id, detail=reason, now=now)

    def settle(self, *, group: str, device: str, instance: str, value: Value | None, rollout: str) -> None:
        """Set a settled value, or remove it (None); who waits for one before it in a queue is superseded.

        Devices that the new value leaves out by `--where` go on waiting for the one that stands on them.
        """
        rollouts = self._store.rollouts
        scope = {"group": group, "device": device, "instance": instance}
        with self._store.atomic():
            rollouts.settle(**scope, value=value, rollout=rollout, now=self._now())
            queues = [each for each in rollouts.queued_on(**scope) if each.id != rollout]
            members = {each.number: rollouts.members(each.number) for each in queues}
            out = rollouts.unselected({member.device for found in members.values() for member in found})
            stays = {each for each, left_out in out.items() if rollout in left_out}
            for each in queues:
                waiting = [member for member in members[each.number] if member.wave and member.outcome in OPEN]
                ended = [
                    overtaken(member, "another value took its place")
                    for member in waiting
                    if member.device not in stays
                ]
                stays -= {member.device for member in waiting}  # only the newest value stands
                rollouts.set_members(each.number, ended, now=self._now())

    def _overtake(self, row: RolloutRow, devices: Sequence[str]) -> None:
        """Mark devices that are offered something else by now in the rollouts before."""
        before = [
            each
            for each in (self._store.rollouts.in_force() if devices else ())
            if each.number < row.number and each.instance == row.instance and (not row.group or each.group == row.group)
        ]
        word = f"rollout {row.number} offers it something else" if row.group else "it is pinned"
        for device in devices:
            for earlier in before:
                found = self._store.rollouts.member(earlier.number, device)
                after = None if found is None else overtaken(found[0], word)
                if found is not None and after is not None and after is not found[0]:
                    self._store.rollouts.set_members(earlier.number, [after], now=self._now())

    # -- ends that nobody waits for -----------------------------------------------------------------------------------

    def end(self, row: RolloutRow, state: RolloutState, reason: str, *, keep: bool = False) -> None:
        """End a rollout, and its whole set, without its aim: its devices are offered what they had before."""
        log.warning("rollout %s %s: %s", row.number, state, reason)
        with self._store.atomic():
            for each in self.set_of(row):
                before = self._store.rollouts.members(each.number)
                members = {member.device: member for member in before}
                progress = advance.end(each.model, members, state, keep=keep)
                changed = [new for old, new in zip(before, members.values(), strict=True) if old is not new]
                self._store.rollouts.set_members(each.number, changed, now=self._now())
                self._store.rollouts.save(each.number, progress, reason=reason, now=self._now())
                self._store.access.audit(
                    actor="server", act=f"rollout-{state}", subject=each.id, detail=reason, now=self._now()
                )
        self.touch_scope(row)

    def supersede(self, row: RolloutRow) -> None:
        """End the open rollouts whose place a new one takes, those of their sets included."""
        for old in self._store.rollouts.open_on(group=row.group, device=row.device, instance=row.instance):
            if old.number == row.number:
                continue
            for each in self.set_of(old):
                self._store.rollouts.set_superseded_by(each.number, row.number)
            self.end(old, RolloutState.SUPERSEDED, f"rollout {row.number} took over")

    def save(self, row: RolloutRow, progress: Rollout, members: Iterable[Member] = (), *, reason: str) -> None:
        """Store a rollout after an act of an operator, and look again."""
        with self._store.atomic():
            self._store.rollouts.save(row.number, progress, reason=reason, now=self._now())
            self._store.rollouts.set_members(row.number, members, now=self._now())
        self.touch_scope(row)

    def touch_scope(self, row: RolloutRow) -> None:
        """Look again at every device of a rollout."""
        group = self._store.devices.group(row.group) if row.group else None
        self.touch(self._store.devices.members(group) if group is not None else [])
        self.touch(member.device for member in self._store.rollouts.members(row.number))
        self._watch.changed()

    # -- withdrawn releases --------------------------------------------------------------------------------------------

    def _withdraw_unpublished(self) -> None:
        """End rollouts of releases that were withdrawn, and let no settled value point at one."""
        published = frozenset(release.name.path for release in self._repository.releases())
        if published == self._published:
            return
        self._published = published
        for row in self._offering(lambda target: target not in published):
            self.end(row, RolloutState.REVOKED, f"{row.value.target} was withdrawn")
        for settled in self._settled_on(lambda target: target not in published):
            self._replace_withdrawn(settled)
        for row in self._store.rollouts.queues():  # of values that stand beside a settled one
            if row.value.target is not None and row.value.target not in published:
                waiting = [
                    each for each in self._store.rollouts.members(row.number) if each.wave and each.outcome in OPEN
                ]
                ended = [overtaken(each, "its release was withdrawn") for each in waiting]
                self._store.rollouts.set_members(row.number, ended, now=self._now())

    def foresee(self, target: str) -> Withdrawal:
        """Return what would follow if a release were withdrawn now."""
        ended = {each.number for row in self._offering(target.__eq__) for each in self.set_of(row)}
        replaced = {
            (row.group, row.device, row.instance): self._replacement(row, without=target)
            for row in self._settled_on(target.__eq__)
        }
        return Withdrawal(target, frozenset(ended), replaced)

    def _offering(self, chosen: Callable[[str], bool]) -> list[RolloutRow]:
        """Return the rollouts under way or to come that offer one of these targets."""
        rows = (*self._store.rollouts.open(), *self._store.rollouts.scheduled())
        return [row for row in rows if row.value.target is not None and chosen(row.value.target)]

    def _settled_on(self, chosen: Callable[[str], bool]) -> list[SettledRow]:
        """Return the settled values, pins included, that have one of these targets."""
        rows = self._store.rollouts.all_settled()
        return [row for row in rows if row.value.target is not None and chosen(row.value.target)]

    def _replacement(self, settled: SettledRow, *, without: str = "") -> SettledValue | None:
        """Return the newest value that may take the place of a withdrawn one; None: the devices run nothing."""
        history = self._store.rollouts.settled_history(
            group=settled.group, device=settled.device, instance=settled.instance
        )
        return self._director.replacement(settled.rollout, history, without=without)

    def _replace_withdrawn(self, settled: SettledRow) -> None:
        """Settle the value that takes the place of a withdrawn one."""
        held = self._replacement(settled)
        value = None if held is None else held.value
        scope = settled.group or settled.device
        follows = "nothing" if value is None else value.target
        words = f"{settled.instance} on {scope}: {settled.value.target} was withdrawn, {follows} follows"
        log.warning("%s", words)
        with self._store.atomic():
            self.settle(
                group=settled.group,
                device=settled.device,
                instance=settled.instance,
                value=value,
                rollout="" if held is None else held.rollout,
            )
            self._store.access.audit(actor="server", act="withdrawn", subject=scope, detail=words, now=self._now())
        group = self._store.devices.group(settled.group) if settled.group else None
        self.touch([settled.device] if group is None else self._store.devices.members(group))

    # -- devices ------------------------------------------------------------------------------------------------------

    async def _join_dirty(self) -> None:
        """Let devices that joined a group enter its open rollouts and catch-up queues."""
        dirty = list(self._dirty)
        for start in range(0, len(dirty), _BATCH):
            with self._store.atomic():
                self._join(dirty[start : start + _BATCH])
            await asyncio.sleep(0)

    def _join(self, devices: list[str]) -> None:
        rows = [row for row in self._store.devices.some(devices) if not row.revoked]
        groups = self._store.devices.groups_of_each(rows)
        lacking = self._store.rollouts.without(
            {device: [each.name for each in found] for device, found in groups.items()}
        )
        facts = self._store.facts([row for row in rows if row.id in lacking]) if lacking else {}
        for device, rollouts in lacking.items():
            row = facts[device].device
            for rollout in rollouts:
                changes = [_change(each) for each in self.set_of(rollout)]
                said = (self._membership.left_out(each, facts[device]) for each in changes)
                reason = next((each for each in said if each), "")
                self._store.rollouts.add_members(rollout.number, [self._membership.joins(rollout, row, reason)])
                self._wake.set()

    async def _settle_dirty(self) -> None:
        """Renew assignments, one transaction per batch; ask devices that have nothing left to do for their state."""
        while self._dirty:
            batch = list(self._dirty)[:_BATCH]
            for device in batch:
                del self._dirty[device]
            with self._store.atomic():
                facts = self._store.facts(self._store.devices.some(batch))
                undecided = self._store.rollouts.undecided(batch)
                prepared = (self._prepare(device, facts.get(device), undecided.get(device, [])) for device in batch)
                changed = [row for row in prepared if row is not None]
            for row in changed:
                self._director.publish_assignment(row)
            await asyncio.sleep(0)

    def _prepare(self, device: str, facts: DeviceFacts | None, undecided: Iterable[Undecided]) -> AssignmentRow | None:
        if facts is None or self._director.is_ahead_of(facts.device, facts.newest):
            return None  # no assignment of this server reaches it
        try:
            assignment, changed = self._director.prepare_by(facts)
        except SigningError as error:
            log.error("no assignment can be made for %s: %s", device, error)  # noqa: TRY400 - the operator's data
            return None
        version = assignment.version if assignment is not None else 0
        for each in undecided:
            if not each.version or each.member.returning:
                self._note_version(each, version, changed=changed)
        return assignment if changed else None

    def _note_version(self, offer: Undecided, version: int, *, changed: bool) -> None:
        """Note which assignment offers a rollout first; of one that the device had before no report follows."""
        if version == 0:
            left = leave(offer.member, "nothing was ever assigned to it")
            self._store.rollouts.set_members(offer.rollout, [left], now=self._now())
            self.wake()
            return
        self._store.rollouts.set_version(offer.rollout, offer.member.device, version)
        if not changed:
            self._check_ins.ask(offer.member.device)

    def _now(self) -> float:
        return self._clock().timestamp()


@dataclass(frozen=True, slots=True)
class _Decided:
    """Decision over a rollout or a set: the rows, their members as stored, the step, and whom it offers the change."""

    rows: list[RolloutRow]
    stored: list[tuple[Member, ...]]
    step: Step
    offered: list[str]


def _change(row: RolloutRow) -> Change:
    return Change(row.group, row.device, row.instance, row.value, row.plan.where)


def _differs(old: Member, new: Member) -> bool:
    """Tell whether a member changed beside what is known anew in each round."""
    again = replace(new, heard_at=old.heard_at, online_since=old.online_since, busy=old.busy)
    return new is not old and again != old


def beside_open(rows: Sequence[RolloutRow]) -> str:
    """Say why a rollout to some devices of a group does not take the place of open ones; empty for none.

    Devices that it leaves out would lose what the open rollout has brought them, with nobody's word.
    """
    if not rows:
        return ""
    return f"rollout {rows[0].number} of {rows[0].instance} is {rows[0].state}, also on devices that --where leaves out"


def wants_approval(row: RolloutRow) -> bool:
    """Tell whether a rollout waits for an approval, or will when it begins."""
    early = row.state is RolloutState.SCHEDULED and row.progress.unapproved
    return PauseCause.APPROVAL in row.progress.causes or early


def approvers(row: RolloutRow) -> str:
    """Say who may approve the gate of a rollout, and by which command."""
    return f"somebody other than {row.by}: fleet rollout approve {row.number}"
