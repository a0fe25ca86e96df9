"""Scenario of a soak: what happens to a device, round after round, drawn from a seed.

A round is one change of what the device should run, and what breaks meanwhile. Two stages play the same rounds: local
processes (`tests/e2e/test_soak.py`) and an emulated board (`tests/boards/test_soak.py`). SEED=N repeats a run, and
SOAK=3600 makes it last an hour; both are printed.
"""

import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

SEED: Final = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
SECONDS: Final = float(os.environ.get("SOAK", "300"))

PUSH, UNDO, PUSH_AND_UNDO, NOTHING = "push", "undo", "push and undo", "nothing"
RETRY = "push and retry"
CHANGES: Final = {PUSH: 6, UNDO: 2, PUSH_AND_UNDO: 2, RETRY: 2, NOTHING: 1}

CUT, AGENT, AGENT_STOPPED, HOST, HELPER = "power cut", "agent killed", "agent stopped", "host killed", "helper killed"
SILENT, REFUSED, SERVER = "network silent", "network refused", "server killed"
FULL, FORWARD, BACK = "disk full", "clock forward", "clock back"
FAULTS: Final = {
    CUT: 3,
    AGENT: 2,
    AGENT_STOPPED: 1,
    HOST: 2,
    HELPER: 2,
    SILENT: 2,
    REFUSED: 2,
    SERVER: 1,
    FULL: 2,
    FORWARD: 2,
    BACK: 2,
}
JUMPS_S: Final = (60, 3_600, 5 * 3_600, 36 * 3_600, 20 * 86_400, 400 * 86_400, 9 * 365 * 86_400)
"""How far a clock jumps, forward or back: beyond time zones, probations, certificates and metadata."""
DOWN: Final = frozenset({CUT, HOST, HELPER})
"""Faults in which what answers is itself killed: the only ones in which it may be down, until it is back."""


@dataclass(frozen=True)
class Fault:
    """Fault of a round.

    Attributes:
        after_s: time from the begin of the change, or from the end of the fault before.
        lasts_s: of one that is mended.
        choice: which of several processes; larger than there are.
    """

    kind: str
    after_s: float
    lasts_s: float
    choice: int

    @property
    def jump_s(self) -> int:
        """How far a clock jumps; negative for back."""
        seconds = JUMPS_S[self.choice % len(JUMPS_S)]
        return seconds if self.kind == FORWARD else -seconds


@dataclass(frozen=True)
class Round:
    """One change, and what breaks meanwhile."""

    number: int
    change: str
    faults: tuple[Fault, ...]

    def __str__(self) -> str:
        faults = ", ".join(f"{each.kind} after {each.after_s:.2f} s" for each in self.faults)
        return f"round {self.number}: {self.change}; {faults or 'nothing breaks'}"


def rounds(seed: int, *, without: frozenset[str] = frozenset(), pace: float = 1.0) -> Iterator[Round]:
    """Yield the rounds of a seed.

    Args:
        seed: of the draw.
        without: faults that a stage has no means for; the others come in the same order.
        pace: factor on all times: an emulated board takes longer for everything.
    """
    draw = random.Random(seed)
    number = 0
    while True:
        number += 1
        change = draw.choices(list(CHANGES), list(CHANGES.values()))[0]
        kinds = draw.choices(list(FAULTS), list(FAULTS.values()), k=draw.choices((0, 1, 2), (1, 5, 3))[0])
        faults = [
            Fault(kind, pace * draw.expovariate(1.0), pace * draw.uniform(0.2, 4.0), draw.randrange(1 << 16))
            for kind in kinds
        ]
        yield Round(number, change, tuple(each for each in faults if each.kind not in without))
