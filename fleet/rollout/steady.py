"""Steady time of a rollout: seconds that the server watched, which no wrong reading of the wall clock moves.

Soaks, time-outs and limits count on it. It runs with the monotonic clock while the server runs, and stands still while
it does not: nobody watched the devices then. A restart continues from the witness, the last pair of both clocks that
was stored. The wall clock decides only when a scheduled rollout begins, and then by readings that agree.
"""

from dataclasses import dataclass
from typing import Final

JUMP_S: Final = 60.0
"""Difference between both clocks from which a reading of the wall clock has jumped."""

AGREED_S: Final = 300.0
"""Time after which a wall clock that jumped and then went on steadily is believed: somebody has set it."""


@dataclass(frozen=True, slots=True)
class Witness:
    """Both clocks at one moment.

    Attributes:
        steady, wall: seconds.
        agreed_since: steady time from which on the wall clock has gone without a jump.
        doubted: whether the jump before that was seen here, so that the wall clock is believed only after a while.
    """

    steady: float
    wall: float
    agreed_since: float = 0.0
    doubted: bool = False

    def observe(self, steady: float, wall: float) -> "Witness":
        """Return the witness after another reading of both clocks."""
        jumped = abs((wall - self.wall) - (steady - self.steady)) > JUMP_S
        if jumped:
            return Witness(steady, wall, steady, doubted=True)
        settled = not self.doubted or steady - self.agreed_since >= AGREED_S
        return Witness(steady, wall, self.agreed_since, doubted=not settled)

    def resumed(self, wall: float) -> "Witness":
        """Return the witness after a restart of the server: steady time goes on where it was."""
        backwards = wall < self.wall - JUMP_S
        return Witness(self.steady, wall, self.steady, doubted=backwards)

    def due(self, at: float) -> bool:
        """Tell whether a time of the wall clock has come, by a reading that is believed."""
        return not self.doubted and self.wall >= at


def remaining(deadline: float, witness: Witness) -> float:
    """Return the seconds left of a duration that ends at a steady time."""
    return max(0.0, deadline - witness.steady)
