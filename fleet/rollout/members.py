"""Members of a rollout: sizes and stages as people write them, and the draw that gives each device its wave.

Waves are written as `1, 5%, 100%`: one device, then five in a hundred, then all; each size counts devices from the
first on. A group's plan has stages instead: each takes a number or a share of the devices that its labels select.

The draw is made once, at the start of a rollout. Its order comes from a seed, so that the same device is not
everybody's canary, and online devices come first, since a canary that cannot answer tells nothing.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

_AMOUNT: Final = re.compile(r"(\d{1,7})(%?)")
WAVES_MAX: Final = 20
_ALL: Final = 100
_SMALL, _MEDIUM = 10, 1000


class BadWavesError(ValueError):
    """Waves or a plan that cannot be meant; one sentence for people."""


@dataclass(frozen=True, slots=True)
class Amount:
    """A number of devices, or a percentage of some."""

    number: int
    percent: bool = False

    @classmethod
    def parse(cls, text: str) -> "Amount":
        """Read `3` or `5%`.

        Raises:
            BadWavesError: of another form, or more than 100%.
        """
        match = _AMOUNT.fullmatch(text.strip())
        if match is None or (match[2] and int(match[1]) > _ALL):
            raise BadWavesError(f"{text.strip()!r} is no number of devices: write one such as 3, or a share such as 5%")
        return cls(int(match[1]), bool(match[2]))

    def up(self, of: int) -> int:
        """Return how many of `of` devices, rounded up."""
        return math.ceil(of * self.number / _ALL) if self.percent else min(self.number, of)

    def down(self, of: int) -> int:
        """Return how many of `of` devices, rounded down."""
        return of * self.number // _ALL if self.percent else min(self.number, of)

    def __str__(self) -> str:
        return f"{self.number}%" if self.percent else str(self.number)


EVERYBODY: Final = Amount(_ALL, percent=True)
UNGUARDED: Final = "wants an approval, and takes no device that the change concerns"
"""Said of a stage that refuses a rollout: `--allow-empty` does not pass it."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A wave before the draw.

    Attributes:
        size: counts devices from the first of all on where `from_first`, otherwise those that the stage adds itself.
        selector: labels that its devices have.
        soak_s: None for the rollout's own.
        approval: whether somebody other than who began the rollout has to agree before the next stage.
    """

    size: Amount
    from_first: bool = True
    selector: tuple[tuple[str, str], ...] = ()
    soak_s: float | None = None
    approval: bool = False

    def takes(self, labels: Mapping[str, str]) -> bool:
        """Tell whether a device with these labels may be in this stage."""
        return all(labels.get(key) == value for key, value in self.selector)

    def __str__(self) -> str:
        chosen = "+".join(f"{key}={value}" for key, value in self.selector)
        return f"{chosen}: {self.size}" if chosen else str(self.size)


def default_waves(devices: int) -> str:
    """Return the waves for a group of this size where nobody names any."""
    if devices <= _SMALL:
        return "1, 100%"
    return "1, 10%, 100%" if devices <= _MEDIUM else "1, 1%, 10%, 100%"


def parse_waves(text: str) -> tuple[Stage, ...]:
    """Read waves.

    Raises:
        BadWavesError: not of this form, a size of nothing, sizes that shrink, or a last wave other than 100%.
    """
    sizes: list[Amount] = []
    for part in text.split(","):
        if _AMOUNT.fullmatch(part.strip()) is None:
            raise BadWavesError(
                f"{part.strip()!r} is not a wave: write numbers of devices or percents, such as '1, 100%'"
            )
        size = Amount.parse(part)
        if size.number == 0:
            raise BadWavesError(f"a wave of {size} means nothing: sizes go from 1 device to 100%")
        if any(earlier.percent == size.percent and earlier.number >= size.number for earlier in sizes):
            raise BadWavesError(f"the wave {size} is not larger than the one before it in {text!r}")
        sizes.append(size)
    if len(sizes) > WAVES_MAX:
        raise BadWavesError(f"{len(sizes)} waves, at most {WAVES_MAX} are accepted")
    if sizes[-1] != EVERYBODY:
        raise BadWavesError(f"the last of the waves {text!r} must be 100%, so that the group ends in one state")
    return tuple(Stage(size) for size in sizes)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A device that the change concerns, at the moment of the draw."""

    device: str
    online: bool
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Draw:
    """Members of each wave.

    Attributes:
        stages: of the waves that are left; those without any device are dropped.
        order: every device, in the order of the draw.
        vacancies: places in wave 1 that are open for the first devices that come online.
        unguarded: a stage without devices whose approval no stage before it can ask for; None for none.
    """

    waves: tuple[tuple[str, ...], ...]
    stages: tuple[Stage, ...]
    order: tuple[str, ...]
    vacancies: int = 0
    unguarded: Stage | None = None

    @property
    def refusal(self) -> str:
        """Return why a rollout must not begin like this; empty for no reason."""
        if self.unguarded is None:
            return ""
        return f"the stage {self.unguarded} {UNGUARDED}"


def approvals(waves: Iterable[bool], *, first: bool) -> Iterator[str]:
    """Tell which approvals a rollout would wait for: of which waves, and before the first."""
    if first:
        yield "nothing is offered before the approval of a second person"
    for wave, approval in enumerate(waves, 1):
        if approval:
            yield f"wave {wave} wants the approval of a second person once it is done"


def lot(seed: int, device: str) -> str:
    """Return the device's lot: the smaller one comes first."""
    return hashlib.sha256(f"{seed}:{device}".encode()).hexdigest()


def draw(candidates: Iterable[Candidate], stages: Sequence[Stage], *, seed: int) -> Draw:
    """Give each device its wave. The last stage takes every device that no other took.

    Wave 1 takes online devices only, unless it has room for every device. What it lacks are open vacancies. A stage
    without devices is dropped; its approval goes to the stage before it, although nobody may be left after that one:
    devices that join the group later catch up to what was approved.
    """
    order = sorted(candidates, key=lambda each: (not each.online, lot(seed, each.device)))
    waves: list[tuple[str, ...]] = []
    kept: list[Stage] = []
    rest, vacancies, unguarded = order, 0, None
    for number, stage in enumerate(stages):
        if number == len(stages) - 1:
            fit = rest
        else:
            fit = [each for each in rest if stage.takes(each.labels)]
            fit = fit[: _room(stage, of=len(order) if stage.from_first else len(fit), taken=len(order) - len(rest))]
            if not waves and len(fit) < len(rest):
                online = [each for each in fit if each.online]
                vacancies, fit = len(fit) - len(online), online
        if not fit and not (not waves and vacancies):
            if stage.approval and kept:
                kept[-1] = replace(kept[-1], approval=True)
            elif stage.approval and unguarded is None:
                unguarded = stage
            continue
        chosen = {each.device for each in fit}
        rest = [each for each in rest if each.device not in chosen]
        waves.append(tuple(each.device for each in fit))
        kept.append(stage)
    return Draw(tuple(waves), tuple(kept), tuple(each.device for each in order), vacancies, unguarded)


def taken(labels: Iterable[Mapping[str, str]], stages: Sequence[Stage]) -> tuple[int, ...]:
    """Return how many devices with these labels each stage takes, those without any included."""
    plain = [replace(stage, approval=False) for stage in stages]
    drawn = draw((Candidate(str(place), online=True, labels=each) for place, each in enumerate(labels)), plain, seed=0)
    sizes = {id(stage): len(wave) for stage, wave in zip(drawn.stages, drawn.waves, strict=True)}
    return tuple(sizes.get(id(stage), 0) for stage in plain)


def _room(stage: Stage, *, of: int, taken: int) -> int:
    return max(0, stage.size.up(of) - taken) if stage.from_first else stage.size.up(of)
