"""Simulated devices: each updates, fails, goes away, reboots or lies by the traits that a seed gave it.

A device knows nothing of the rollout. It follows the assignment that it was given last, and reports what it does, as
`agent.update` would: with the sha256 of its assignment, the manifest of what it runs, and a sequence number.
"""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from fleet.protocol.codes import Phase, RejectCode
from fleet.rollout.model import Observation

MINUTE: Final = 60.0
HOUR: Final = 3600.0
DAY: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Traits:
    """Conduct of one device; times in seconds.

    Attributes:
        away: intervals without network.
        pace: factor on how long each step takes.
        fails: the new version fails on it; `refuses` before it ran.
        deferrals: times that it says later before it begins.
        reboots: interruptions of an update that it takes up again.
        lies: sends reports that prove nothing: unsigned, of other assignments, of other versions.
        mute: its agent is too old to sign its state.
        loses: share of its reports that never arrive; `doubles` share that arrive twice, at any time.
    """

    away: tuple[tuple[float, float], ...] = ()
    pace: float = 1.0
    fails: bool = False
    refuses: bool = False
    deferrals: int = 0
    reboots: int = 0
    lies: bool = False
    mute: bool = False
    loses: float = 0.0
    doubles: float = 0.0

    def online(self, at: float) -> bool:
        """Tell whether the device has a network at a time."""
        for start, end in self.away:  # noqa: SIM110 - asked at every event, and twice as fast without a generator
            if start <= at < end:
                return False
        return True


@dataclass(frozen=True, slots=True)
class Mix:
    """Share of a fleet that has each trait; a device may have several."""

    slow: float = 0.15
    flapping: float = 0.1
    days_away: float = 0.1
    rebooting: float = 0.1
    deferring: float = 0.1
    lying: float = 0.1
    mute: float = 0.03
    lossy: float = 0.2


def traits(rng: random.Random, mix: Mix, *, failure_rate: float) -> Traits:
    """Draw the traits of one device."""
    away: list[tuple[float, float]] = []
    if rng.random() < mix.days_away:
        start = rng.choice((0.0, rng.uniform(0, HOUR)))
        away.append((start, start + rng.uniform(0.2, 3) * DAY))
    if rng.random() < mix.flapping:
        at = rng.uniform(0, 10 * MINUTE)
        for _ in range(rng.randint(2, 6)):
            length = rng.uniform(5, 15 * MINUTE)
            away.append((at, at + length))
            at += length + rng.uniform(MINUTE, 30 * MINUTE)
    lossy = rng.random() < mix.lossy
    return Traits(
        away=tuple(away),
        pace=rng.uniform(5, 40) if rng.random() < mix.slow else rng.uniform(0.5, 2),
        fails=rng.random() < failure_rate,
        refuses=rng.random() < 0.2,  # noqa: PLR2004 - of those that fail
        deferrals=rng.randint(1, 3) if rng.random() < mix.deferring else 0,
        reboots=rng.randint(1, 2) if rng.random() < mix.rebooting else 0,
        lies=rng.random() < mix.lying,
        mute=rng.random() < mix.mute,
        loses=rng.uniform(0, 0.4) if lossy else 0.0,
        doubles=rng.uniform(0, 0.5) if lossy else 0.0,
    )


@dataclass(frozen=True, slots=True)
class Order:
    """An assignment as far as the simulation needs it; `version` None for nothing to run."""

    number: int
    sha256: str
    version: str | None
    attempt: int = 0


STEPS: Final[Mapping[Phase, float]] = {
    Phase.FETCHING: 20.0,
    Phase.COMPILING: 10.0,
    Phase.SWAPPING: 2.0,
    Phase.PROBATION: 30.0,
}
_NEXT: Final = dict(zip(STEPS, [*list(STEPS)[1:], None], strict=True))


@dataclass(slots=True)
class Device:
    """A simulated device.

    Attributes:
        running: version that answers now, None for none.
        began: versions that it ever began to swap to, and `committed` those that it ever kept.
    """

    id: str
    traits: Traits
    rng: random.Random
    bad: str
    running: str | None = None
    order: Order | None = None
    phase: Phase = Phase.IDLE
    sequence: int = 0
    deferrals: int = 0
    reboots: int = 0
    failed: set[tuple[str | None, int]] = field(default_factory=set)
    began: set[str] = field(default_factory=set)
    committed: set[str] = field(default_factory=set)

    def accept(self, order: Order, at: float) -> list[Observation]:
        """Take an order; an older one changes nothing."""
        if self.order is not None and order.number <= self.order.number:
            return []
        self.order = order
        if order.version == self.running:
            self.phase = Phase.IDLE
            return [self._report(Phase.COMMITTED, at)]
        if order.version is None:
            self.running, self.phase = None, Phase.IDLE
            return [self._report(Phase.COMMITTED, at)]
        self.phase = Phase.IDLE
        return []

    def due(self) -> float | None:
        """Return how long until the device does its next step; None when it has nothing to do."""
        if self.order is None or self.order.version in {None, self.running}:
            return None
        if (self.order.version, self.order.attempt) in self.failed:
            return None
        step = 1.0 if self.phase is Phase.IDLE else STEPS[self.phase]
        return step * self.traits.pace * self.rng.uniform(0.5, 1.5)

    def step(self, at: float) -> list[Observation]:
        """Do the next step of the update and report it."""
        assert self.order is not None
        assert self.order.version is not None
        if self.phase is Phase.IDLE and self.deferrals < self.traits.deferrals:
            self.deferrals += 1
            return [self._report(Phase.FAILED, at, RejectCode.NO_SPACE)]
        if self.phase is not Phase.IDLE and self.reboots < self.traits.reboots:
            self.reboots += 1
            self.phase = Phase.IDLE
            return []
        fails = self.order.version == self.bad and self.traits.fails
        if self.phase is Phase.COMPILING and fails and self.traits.refuses:
            return [self._fail(Phase.FAILED, RejectCode.COMPILE_FAILED, at)]
        if self.phase is Phase.PROBATION:
            if fails:
                return [self._fail(Phase.ROLLED_BACK, RejectCode.TRAPPED, at)]
            self.running, self.phase = self.order.version, Phase.IDLE
            self.committed.add(self.order.version)
            return [self._report(Phase.COMMITTED, at)]
        self.phase = Phase.FETCHING if self.phase is Phase.IDLE else _NEXT[self.phase] or Phase.IDLE
        if self.phase is Phase.SWAPPING:
            self.began.add(self.order.version)
        return [self._report(self.phase, at)]

    def state(self, at: float) -> list[Observation]:
        """Answer a check-in: sign again what the newest order came to, where it came to something."""
        if self.order is None:
            return []
        if self.order.version == self.running:
            return [self._report(Phase.COMMITTED, at)]
        if (self.order.version, self.order.attempt) in self.failed:
            return [self._report(Phase.ROLLED_BACK, at, RejectCode.TRAPPED)]
        return []

    def lie(self, at: float, claimed: str) -> list[Observation]:
        """Claim to run a version without any proof of it."""
        if not self.traits.lies:
            return []
        self.sequence += 1
        unproven = self.order.sha256 if self.order is not None and self.order.version != claimed else "0" * 8
        return [
            Observation(at, self.sequence, Phase.COMMITTED, assignment_sha256=unproven, manifest_sha256=claimed,
                        generation=7),
            Observation(at, self.sequence, Phase.COMMITTED, generation=7,
                        assignment_sha256=self.order.sha256 if self.order is not None else "", manifest_sha256="other"),
        ]  # fmt: skip

    def _fail(self, phase: Phase, code: RejectCode, at: float) -> Observation:
        assert self.order is not None
        self.failed.add((self.order.version, self.order.attempt))
        self.phase = Phase.IDLE
        return self._report(phase, at, code)

    def _report(self, phase: Phase, at: float, code: RejectCode | None = None) -> Observation:
        assert self.order is not None
        self.sequence += 1
        return Observation(
            at=at,
            sequence=self.sequence,
            phase=phase,
            signed=not self.traits.mute,
            attempt=self.order.attempt,
            assignment_sha256=self.order.sha256,
            manifest_sha256=(self.running if phase is Phase.COMMITTED else self.order.version) or "",
            generation=None if self.traits.mute or self.running is None else self.sequence,
            code=code or "",
            running=self.running or "",
        )
