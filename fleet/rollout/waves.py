"""Waves as people write them: `1, 5%, 100%` is one board, then five in a hundred, then all.

Each size counts boards from the first on, so sizes only grow. Which boards come first: those that are online, since
a canary that cannot answer tells nothing; among those the order of their names, so that a rollout is repeatable.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_WAVE = re.compile(r"(\d{1,7})(%?)")
_MAX_WAVES = 20
_ALL = 100


class BadWavesError(ValueError):
    """Waves that cannot be meant; one sentence for people."""


@dataclass(frozen=True, slots=True)
class Wave:
    """A size, in boards or in percent of all."""

    size: int
    percent: bool

    def reach(self, boards: int) -> int:
        """How many of `boards` boards have been reached when this wave is out."""
        return math.ceil(boards * self.size / _ALL) if self.percent else min(self.size, boards)

    def __str__(self) -> str:
        return f"{self.size}%" if self.percent else str(self.size)


def parse(text: str) -> tuple[Wave, ...]:
    """Read waves.

    Raises:
        BadWavesError: not of this form, a size of nothing, sizes that shrink, or a last wave other than 100%.
    """
    waves: list[Wave] = []
    for part in text.split(","):
        match = _WAVE.fullmatch(part.strip())
        if match is None:
            raise BadWavesError(
                f"{part.strip()!r} is not a wave: write numbers of boards or percents, such as '1, 100%'"
            )
        wave = Wave(int(match[1]), match[2] == "%")
        if wave.size == 0 or (wave.percent and wave.size > _ALL):
            raise BadWavesError(f"a wave of {wave} means nothing: sizes go from 1 board to 100%")
        if any(earlier.percent == wave.percent and earlier.size >= wave.size for earlier in waves):
            raise BadWavesError(f"the wave {wave} is not larger than the one before it in {text!r}")
        waves.append(wave)
    if len(waves) > _MAX_WAVES:
        raise BadWavesError(f"{len(waves)} waves, at most {_MAX_WAVES} are accepted")
    if waves[-1] != Wave(_ALL, percent=True):
        raise BadWavesError(f"the last of the waves {text!r} must be 100%, so that the group ends in one state")
    return tuple(waves)


def sizes(waves: Iterable[Wave], boards: int) -> tuple[int, ...]:
    """The number of boards reached after each wave; waves that would bring no board are kept, and pass at once."""
    reached = 0
    result = []
    for wave in waves:
        reached = max(reached, wave.reach(boards))
        result.append(reached)
    return tuple(result)


def order(online: Mapping[str, bool]) -> tuple[str, ...]:
    """Device ids in the order in which they are offered a change."""
    return tuple(sorted(online, key=lambda device: (not online[device], device)))


def wave_of(index: int, reached: tuple[int, ...]) -> int:
    """The wave, from 1, of the board at `index` in the order."""
    return next(number for number, size in enumerate(reached, 1) if index < size)
