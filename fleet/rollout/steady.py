"""Steady time of a rollout: seconds that the server watched, which no wrong reading of the UTC clock moves.

Soaks, time-outs and limits count on it. It runs with the monotonic clock while the server runs, and stands still while
it does not: nobody watched the devices then. A restart continues from the witness, the last pair of both clocks that
was stored. The UTC clock decides only when a scheduled rollout begins, and then by readings that agree.
"""

from dataclasses import dataclass
from typing import Final

JUMP_S: Final = 60.0
"""Difference between both clocks from which a reading of the UTC clock has jumped."""

AGREED_S: Final = 300.0
"""Time after which a UTC clock that jumped and then went on steadily is believed: somebody has set it."""


@dataclass(frozen=True, slots=True)
class Witness:
    """Both clocks at one moment.

    Attributes:
        steady, utc: seconds.
        agreed_since: steady time from which on the UTC clock has gone without a jump.
        doubted: whether the jump before that was seen here, so that the UTC clock is believed only after a while.
    """

    steady: float
    utc: float
    agreed_since: float = 0.0
    doubted: bool = False

    def observe(self, steady: float, utc: float) -> "Witness":
        """Return the witness after another reading of both clocks."""
        jumped = abs((utc - self.utc) - (steady - self.steady)) > JUMP_S
        if jumped:
            return Witness(steady, utc, steady, doubted=True)
        settled = not self.doubted or steady - self.agreed_since >= AGREED_S
        return Witness(steady, utc, self.agreed_since, doubted=not settled)

    def resumed(self, utc: float) -> "Witness":
        """Return the witness after a restart of the server: steady time goes on where it was."""
        backwards = utc < self.utc - JUMP_S
        return Witness(self.steady, utc, self.steady, doubted=backwards)

    def due(self, at: float) -> bool:
        """Tell whether a time of the UTC clock has come, by a reading that is believed."""
        return not self.doubted and self.utc >= at


def remaining(deadline: float, witness: Witness) -> float:
    """Return the seconds left of a duration that ends at a steady time."""
    return max(0.0, deadline - witness.steady)
