"""Rollout, waves, a device's place in it, and the effect of a report on that place, as frozen data and pure functions.

No clock, no database, no message: times are seconds on the caller's clock, and every decision over this data
(`decide`, `effective`) is a pure function of it.

Waves are written as `1, 5%, 100%`: one device, then five in a hundred, then all. Each size counts devices from the
first on, so sizes only grow. Online devices come first, since a canary that cannot answer tells nothing; among those
the order of their names, so that a rollout is repeatable. A report has the same effect whether it arrives once or
three times.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from fleet.protocol.codes import Outcome, Phase, RolloutState, outcome_of

_WAVE = re.compile(r"(\d{1,7})(%?)")
_MAX_WAVES = 20
_ALL = 100


class BadWavesError(ValueError):
    """Waves that cannot be meant; one sentence for people."""


@dataclass(frozen=True, slots=True)
class Wave:
    """A size, in devices or in percent of all."""

    size: int
    percent: bool

    def reach(self, boards: int) -> int:
        """Return how many of `boards` devices have been reached when this wave is out."""
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
                f"{part.strip()!r} is not a wave: write numbers of devices or percents, such as '1, 100%'"
            )
        wave = Wave(int(match[1]), match[2] == "%")
        if wave.size == 0 or (wave.percent and wave.size > _ALL):
            raise BadWavesError(f"a wave of {wave} means nothing: sizes go from 1 device to 100%")
        if any(earlier.percent == wave.percent and earlier.size >= wave.size for earlier in waves):
            raise BadWavesError(f"the wave {wave} is not larger than the one before it in {text!r}")
        waves.append(wave)
    if len(waves) > _MAX_WAVES:
        raise BadWavesError(f"{len(waves)} waves, at most {_MAX_WAVES} are accepted")
    if waves[-1] != Wave(_ALL, percent=True):
        raise BadWavesError(f"the last of the waves {text!r} must be 100%, so that the group ends in one state")
    return tuple(waves)


def sizes(waves: Iterable[Wave], boards: int) -> tuple[int, ...]:
    """The number of devices reached after each wave; waves that would bring no device are kept, and pass at once."""
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
    """The wave, from 1, of the device at `index` in the order."""
    return next(number for number, size in enumerate(reached, 1) if index < size)


@dataclass(frozen=True, slots=True)
class Value:
    """Desired state of an instance.

    Attributes:
        target: TUF target path; None for "not there", which a removal leaves behind.
        config: pairs of key and value, sorted by key.
        grants: narrowed grants as canonical JSON, empty for all that the manifest asks.
        port: a port of its own, None for the shared one.
        share_worker: whether it may share a worker with other instances of its publisher.
        keep_data: of an absent instance, whether its data stays on the device.
        attempt: raised to make a device try again what failed there.
        atomic: the word that it shares with what is swapped together with it; empty for what is swapped alone.
    """

    target: str | None
    config: tuple[tuple[str, str], ...] = ()
    grants: str = ""
    port: int | None = None
    keep_data: bool = False
    attempt: int = 0
    share_worker: bool = False
    atomic: str = ""

    def same(self, other: "Value") -> bool:
        """Tell whether a device would run the same by both."""
        return replace(self, attempt=0, atomic="") == replace(other, attempt=0, atomic="")


DECIDED = frozenset({Outcome.SUCCEEDED, Outcome.FAILED, Outcome.REFUSED, Outcome.SKIPPED, Outcome.SUPERSEDED})
BREACHES = frozenset({Outcome.FAILED, Outcome.REFUSED})
COMPLETED = BREACHES | {Outcome.SUCCEEDED}
UNCOUNTED = frozenset({Outcome.SKIPPED, Outcome.SUPERSEDED, Outcome.UNPROVEN})
"""Outcomes that are named, in no count."""


@dataclass(frozen=True, slots=True)
class DeviceProgress:
    """Progress of one device in a rollout.

    Attributes:
        wave: from 1.
        online: as far as the server knows.
        offered_at, acked_at, ended_at: seconds; None until it happened. The clock of a time-out starts at `acked_at`.
        attempt: of the item as offered; older reports do not count.
        retrying: its last failure is one that the device tries again by itself.
    """

    device: str
    wave: int
    outcome: Outcome = Outcome.PENDING
    online: bool = False
    offered_at: float | None = None
    acked_at: float | None = None
    ended_at: float | None = None
    attempt: int = 0
    phase: str = ""
    progress: int | None = None
    code: str = ""
    message: str = ""
    running: str = ""
    exercised: bool = True
    retrying: bool = False


@dataclass(frozen=True, slots=True)
class Rollout:
    """A change on its way.

    Attributes:
        sizes: how many devices have been reached when each wave is out, ascending; the last is all of them.
        wave: how many waves have been offered.
        failures: devices that may fail or refuse before it halts.
        soak_s: how long the devices of a wave must have run well before the next is offered.
        timeout_s: how long a device may take from its first word on.
        answer_s: how long an online device that says nothing holds up the next wave.
        minimum: devices that must have completed, well or not, before the next wave.
    """

    id: str
    state: RolloutState
    sizes: tuple[int, ...]
    wave: int = 0
    failures: int = 0
    soak_s: float = 0
    timeout_s: float = 900
    answer_s: float = 60
    minimum: int = 1


@dataclass(frozen=True, slots=True)
class Observation:
    """Report of a device about the instance of a rollout.

    Attributes:
        at: when the server heard it, seconds.
        signed: whether the device's own key signed it.
        assignment_sha256, manifest_sha256: of the assignment that the device had accepted and of what the report names.
        generation: of the instance as the device signs it; None from an agent that does not say.
        retryable: whether the device tries again by itself after `code`.
    """

    at: float
    phase: str
    attempt: int = 0
    signed: bool = False
    assignment_sha256: str = ""
    manifest_sha256: str = ""
    generation: int | None = None
    code: str = ""
    message: str = ""
    running: str = ""
    progress: int | None = None
    exercised: bool = True
    retryable: bool = False


@dataclass(frozen=True, slots=True)
class Expected:
    """Proof that a commit must carry: an assignment that offered the value, and the manifest (empty for a removal)."""

    assignments: frozenset[str]
    manifest_sha256: str

    def proven_by(self, word: Observation) -> bool:
        """Tell whether a report carries both."""
        return word.assignment_sha256 in self.assignments and word.manifest_sha256 == self.manifest_sha256


TOO_OLD = "its agent is too old to sign its state"


def apply_report(board: DeviceProgress, word: Observation, expected: Expected) -> DeviceProgress:
    """The device's standing after a report. Only a signed one that carries its proof decides.

    A decided device stays decided, unless by a later attempt, a proven commit, or a verdict on what it had committed. A
    report of an older attempt changes nothing. A failure that does not speak against the version decides nothing.
    """
    if word.attempt < board.attempt or board.outcome is Outcome.PENDING or word.phase == Phase.IDLE:
        return board
    again = board.outcome in {Outcome.FAILED, Outcome.REFUSED} and word.attempt > board.attempt
    outcome = _outcome(word, expected)
    if (board.outcome, outcome) == (Outcome.UNPROVEN, Outcome.IN_PROGRESS) and word.attempt == board.attempt:
        return board  # a late word of what has ended
    stays = board.outcome in DECIDED and not again and outcome is not Outcome.SUCCEEDED
    if outcome is None or (stays and (board.outcome, outcome) != (Outcome.SUCCEEDED, Outcome.FAILED)):
        return board
    is_late = board.outcome is Outcome.SUCCEEDED and outcome is Outcome.SUCCEEDED
    return replace(
        board,
        outcome=outcome,
        attempt=word.attempt,
        acked_at=word.at if again or board.acked_at is None else board.acked_at,
        ended_at=(board.ended_at if is_late else word.at) if outcome in DECIDED else None,
        phase=word.phase,
        progress=word.progress,
        code=word.code,
        message=TOO_OLD if outcome is Outcome.UNPROVEN else word.message,
        running=word.running or board.running,
        exercised=word.exercised if outcome is Outcome.SUCCEEDED else board.exercised,
        retrying=outcome is Outcome.DEFERRED and word.retryable,
    )


_ENDED = frozenset({Phase.COMMITTED, Phase.FAILED, Phase.ROLLED_BACK})


def _outcome(word: Observation, expected: Expected) -> Outcome | None:
    """Return the outcome that a report speaks for; None for a commit of something else."""
    if word.phase not in _ENDED:
        return Outcome.IN_PROGRESS
    if not word.signed:
        return Outcome.UNPROVEN
    if word.phase != Phase.COMMITTED:
        return outcome_of(word.code, word.phase)
    if not expected.proven_by(word):
        return None
    return Outcome.SUCCEEDED if word.generation is not None else Outcome.UNPROVEN
