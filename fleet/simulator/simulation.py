"""Simulation of one rollout over a fleet of simulated devices, on a clock of its own.

Server and devices exchange what they would in earnest: assignments, signed reports, presence. The server's half drives
`fleet.rollout.advance` as the rollout controller does; the devices' half is `fleet.simulator.devices`. Everything comes
from one seed, so that a run can be played again.
"""

import heapq
import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as with_fields
from functools import partial
from typing import Final

from msgspec.structs import replace

from fleet.protocol.codes import OPEN_STATES, Outcome, RolloutState
from fleet.rollout.advance import Step, advance_standing, approve, end, pause, resume
from fleet.rollout.decide import Gate, Limits, Rollout, deadlines, next_silence
from fleet.rollout.members import Candidate, Stage, draw
from fleet.rollout.model import OPEN, Expected, Member, Observation, leave, observe, returned, wants
from fleet.rollout.standing import Standing
from fleet.simulator.devices import DAY, MINUTE, Device, Order, Traits

NEW: Final = "new"
OLD: Final = "old"


@dataclass(frozen=True, slots=True)
class Site:
    """Place and labels of a device, and whether it can run the change at all."""

    name: str = ""
    affected: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Act:
    """An operator's act at a time: `pause`, `resume`, `abort`, `revoke`."""

    at: float
    verb: str


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that one simulated rollout is made from.

    Attributes:
        devices: traits by device id; `sites` where they are.
        before: the version that the group runs, None for none.
        resumes: whether an operator approves and resumes what the rollout paused.
        tick_s: how long the server gathers messages before it decides, 0 for deciding after each one. With a tick, it
            decides only after messages that may change a decision, so that large fleets play faster.
    """

    seed: int
    devices: dict[str, Traits]
    stages: tuple[Stage, ...]
    limits: Limits = field(default_factory=Limits)
    soak_s: float = 0
    sites: dict[str, Site] = field(default_factory=dict)
    before: str | None = OLD
    acts: tuple[Act, ...] = ()
    resumes: bool = False
    horizon_s: float = 6 * DAY
    tick_s: float = 0


Watcher = Callable[["Simulation", Step], None]


class Simulation:
    """A rollout over simulated devices.

    Attributes:
        rollout, members: as the server has them; `rests` is when it came to each state.
        devices: as they really are.
        log: every report that left a device, in the order in which they were sent, by device.
    """

    def __init__(self, scenario: Scenario, watchers: Sequence[Watcher] = ()) -> None:
        self.scenario, self._watchers = scenario, watchers
        self._rng = random.Random(scenario.seed)  # noqa: S311 - a simulation, not a secret
        self.now, self._count = 0.0, 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self.devices = {
            name: Device(name, traits, self._rng, bad=NEW, running=scenario.before)
            for name, traits in scenario.devices.items()
        }
        self._stepping: set[str] = set()
        self._orders = 0
        self.orders: dict[str, list[Order]] = {name: [] for name in self.devices}
        self.log: dict[str, list[Observation]] = {name: [] for name in self.devices}
        self.steps: list[Step] = []
        self.rests: list[tuple[float, Step]] = []
        self._shown = 0
        self.ended: dict[str, float] = {}
        self.rollout, self.members = self._begin()
        self._wake: float | None = None
        self._ticking = False
        self._looked_at = 0.0

    def run(self) -> "Simulation":
        """Play until nothing is left to happen, or the horizon."""
        for name, device in self.devices.items():
            self._order(name)
            for start, finish in device.traits.away:
                self._at(start, partial(self._presence, name))
                self._at(finish, partial(self._presence, name))
            if device.traits.lies:
                self._at(self._rng.uniform(0, 30 * MINUTE), partial(self._lie, name))
        for act in self.scenario.acts:
            self._at(act.at, partial(self._act, act.verb))
        self._advance()
        self._show()
        while self._queue:
            at, _, happens = heapq.heappop(self._queue)
            if at > self.scenario.horizon_s:
                break
            self.now = max(self.now, at)
            happens()
            self._show()
        return self

    def _show(self) -> None:
        """Let the watchers see the steps since the last time."""
        for step in self.steps[self._shown :]:
            for watch in self._watchers:
                watch(self, step)
        self._shown = len(self.steps)

    def count(self, *outcomes: Outcome) -> int:
        """Count members with one of these outcomes."""
        return sum(each.outcome in outcomes for each in self.members.values())

    def hurt(self) -> int:
        """Count devices on which the new version failed, as they really are."""
        return sum(any(version == NEW for version, _ in each.failed) for each in self.devices.values())

    def met(self) -> int:
        """Count devices that began with the new version."""
        return sum(NEW in each.began for each in self.devices.values())

    # -- the server -------------------------------------------------------------------------------------------------

    def _begin(self) -> tuple[Rollout, Standing]:
        affected = [name for name in self.devices if self._site(name).affected]
        drawn = draw(
            [Candidate(name, self.devices[name].traits.online(0), self._site(name).labels) for name in affected],
            self.scenario.stages,
            seed=self.scenario.seed,
        )
        wave_of = {name: wave for wave, names in enumerate(drawn.waves, 1) for name in names}
        rank = {name: place for place, name in enumerate(drawn.order)}
        members = Standing(
            Member(
                name,
                wave_of.get(name, 0),
                Outcome.PENDING if name in wave_of else Outcome.NOT_AFFECTED,
                rank=rank.get(name, 0),
                canary=bool(drawn.stages) and drawn.stages[0].takes(self._site(name).labels),
                site=self._site(name).name,
                heard_at=0.0,
                online_since=0.0 if device.traits.online(0) else None,
            )
            for name, device in self.devices.items()
        )
        gates = tuple(
            Gate(self.scenario.soak_s if stage.soak_s is None else stage.soak_s, stage.approval)
            for stage in drawn.stages
        )
        state = RolloutState.RUNNING if gates else RolloutState.REFUSED
        return Rollout(state, gates, self.scenario.limits, vacancies=drawn.vacancies), members

    def _site(self, name: str) -> Site:
        return self.scenario.sites.get(name, Site())

    def _look(self) -> None:
        """Decide now, or with the next tick; of a rollout that has ended there is nothing to decide."""
        if not self.scenario.tick_s:
            self._advance()
        elif not self._ticking and self.rollout.state in OPEN_STATES | {RolloutState.SUCCEEDED}:
            self._ticking = True
            self._at(self.now + self.scenario.tick_s, self._advance)

    def _advance(self) -> None:
        self._ticking = False
        before = self.rollout
        step = advance_standing(self.rollout, self.members, self.now)
        self.rollout, self._looked_at = step.rollout, self.now
        for name in self.members if step.rollout.state is not before.state else step.changed:
            self._order(name)
        if not self.scenario.tick_s:
            step = with_fields(step, sets=(self.members.everybody(),))
        self.steps.append(step)
        if not self.rests or self.rests[-1][1].rollout.state is not step.rollout.state:
            self.rests.append((self.now, step))
        if self.scenario.tick_s:
            for name in self.members if step.rollout.wave != before.wave else step.changed:
                self._watch(self.members[name])
            self._wake_at(None if step.wait.devices else step.wait.until)
        else:
            self._wake_at(step.wait.until)
        if self.rollout.state is RolloutState.PAUSED and self.scenario.resumes:
            self._at(self.now + 10 * MINUTE, partial(self._act, "resume"))

    def _wake_at(self, at: float | None) -> None:
        """Look at a time, unless that is done earlier anyway."""
        if at is not None and (self._wake is None or not self.now < self._wake <= at):
            self._wake = at
            self._at(at, self._wakes)

    def _wakes(self) -> None:
        """Decide where a member has been silent for too long; those that were heard meanwhile have longer."""
        last = self.steps[-1]
        due = not self.scenario.tick_s or (last.rollout.state in OPEN_STATES and not last.wait.devices)
        silent_at = None if due else next_silence(self.rollout, self.members, self._looked_at)
        if due or (silent_at is not None and silent_at <= self.now):
            self._advance()
        else:
            self._wake_at(silent_at)

    def _watch(self, member: Member) -> None:
        """Look when a member has been silent for too long, unless it is heard before."""
        later = [time for time in deadlines(self.rollout, member) if self.now < time < math.inf]
        self._wake_at(min(later, default=None))

    def _put(self, member: Member) -> None:
        """Note how a member stands. Whoever is online in its swap is heard: it sends its health all the time."""
        if member.swapping and member.online_since is not None:
            member = replace(member, heard_at=math.inf)
        self.members[member.device] = member

    def wanted(self, name: str) -> str | None:
        """Return the version that the server wants on a device."""
        member = self.members[name]
        if not wants(self.rollout.state, member):
            return self.scenario.before
        settled = self.rollout.state is RolloutState.SUCCEEDED
        affected = member.wave > 0 or settled
        return NEW if affected and self._site(name).affected else self.scenario.before

    def _order(self, name: str) -> None:
        version, given = self.wanted(name), self.orders[name]
        if given and given[-1].version == version:
            return
        if not given and version is None:
            return
        self._orders += 1
        given.append(Order(self._orders, f"{name}-{self._orders}", version))
        self._at(self.now + self._rng.uniform(0.01, 1), partial(self._deliver, name))

    def _hear(self, name: str, seen: Observation) -> None:
        """Take in a report that arrived, as ingest does."""
        before = self.members[name]
        member = replace(before, heard_at=self.now)
        seen = replace(seen, at=self.now)
        version = self.scenario.before if member.returning else NEW
        orders = frozenset(each.sha256 for each in self.orders[name] if each.version == version)
        proof = Expected(orders, version or "")
        member = returned(member, seen, proof) if member.returning else observe(member, seen, proof)
        self._put(member)
        if self._matters(before, member):
            self._look()
        if self.scenario.tick_s:
            self._watch(self.members[name])
        self._order(name)  # a report may cross an offer that is withdrawn: the device has begun, and goes on

    def _matters(self, before: Member, after: Member) -> bool:
        """Tell whether a change of a member may bring a decision about.

        A device that begins, or goes on, only lets the rollout wait for it. Where one that has an outcome is online or
        not is asked by the budget of a site alone.
        """
        if not self.scenario.tick_s:
            return True
        if after.online is not before.online:
            return after.outcome in OPEN or self.rollout.limits.min_available is not None
        return after.outcome is not before.outcome and after.outcome is not Outcome.IN_PROGRESS

    def _act(self, verb: str) -> None:
        match verb:
            case "pause" if self.rollout.state in OPEN_STATES:
                self.rollout = pause(self.rollout)
            case "resume" if self.rollout.state is RolloutState.PAUSED:
                self.rollout, after, _ = resume(approve(self.rollout), tuple(self.members.values()))
                self.members = Standing(after)
            case "abort" if self.rollout.state in OPEN_STATES:
                self.rollout = end(self.rollout, self.members, RolloutState.ABORTED)
            case "revoke" if self.rollout.state in OPEN_STATES | {RolloutState.SUCCEEDED}:
                self.rollout = end(self.rollout, self.members, RolloutState.REVOKED)
            case "leave":
                name = min(self.members)
                self.members[name] = leave(self.members[name], "revoked")
            case _:
                return
        self.ended[verb] = self.now
        self._advance()
        for name in self.members:
            self._order(name)

    # -- the network ------------------------------------------------------------------------------------------------

    def _at(self, at: float, happens: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (at, self._count, happens))

    def _presence(self, name: str) -> None:
        """Break a connection, or bring it back."""
        online = self.devices[name].traits.online(self.now)
        member = self.members[name]
        if online is member.online:
            return
        heard_at = self.now if online or member.swapping else member.heard_at
        self._put(replace(member, online_since=self.now if online else None, heard_at=heard_at))
        if online:
            self._deliver(name)
            self._send(name, self.devices[name].state(self.now))
        if self._matters(member, self.members[name]):
            self._look()
        if self.scenario.tick_s:
            self._watch(self.members[name])

    def _deliver(self, name: str) -> None:
        """Give a device that is online its newest order."""
        device, given = self.devices[name], self.orders[name]
        if given and device.traits.online(self.now):
            self._send(name, device.accept(given[-1], self.now))
            self._go_on(name)

    def _go_on(self, name: str) -> None:
        if name in self._stepping:
            return
        wait = self.devices[name].due()
        if wait is not None:
            self._stepping.add(name)
            self._at(self.now + wait, partial(self._device_step, name))

    def _device_step(self, name: str) -> None:
        self._stepping.discard(name)
        device = self.devices[name]
        if device.due() is None:
            return
        if not device.phase.value.startswith(("comp", "swap", "prob")) and not device.traits.online(self.now):
            return  # a download needs the network: the next order or connection goes on with it
        self._send(name, device.step(self.now))
        self._go_on(name)

    def _send(self, name: str, reports: Iterable[Observation]) -> None:
        """Send reports: each may be late, lost or doubled. What is lost is asked for again by a check-in."""
        traits = self.devices[name].traits
        for report in reports:
            self.log[name].append(report)
            arrives = self._arrival(name)
            if self._rng.random() < traits.loses:
                self._at(arrives + 20 * MINUTE, partial(self._check_in, name))
                continue
            self._at(arrives, partial(self._hear, name, report))
            if self._rng.random() < traits.doubles:
                self._at(arrives + self._rng.uniform(0, 40 * MINUTE), partial(self._hear, name, report))

    def _arrival(self, name: str) -> float:
        """Return when a report sent now arrives: an offline device sends it when it is back."""
        at = self.now
        for start, finish in self.devices[name].traits.away:
            if start <= at < finish:
                at = finish
        return at + self._rng.uniform(0.01, 5)

    def _check_in(self, name: str) -> None:
        device = self.devices[name]
        if device.traits.online(self.now):
            self._send(name, device.state(self.now))

    def _lie(self, name: str) -> None:
        """Let claims arrive that prove nothing, as from a hostile device or a confused agent."""
        for report in self.devices[name].lie(self.now, NEW):
            self._hear(name, report)
