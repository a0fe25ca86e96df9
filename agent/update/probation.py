"""Judgement of a new version against the replaced one: a pure function of their figures.

Only the guest's own faults count: a client that hangs up or reads slowly never causes a rollback.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, Self

from fleet.protocol.codes import GUEST_FAULTS, CallOutcome, InstanceState
from fleet.protocol.manifest import MetricGate
from fleet.protocol.messages import HealthChecks, InstanceHealth
from fleet.protocol.metrics import Metric

LATENCY_FACTOR: Final = 5
LATENCY_FLOOR_US: Final = 20_000  # a slower median below this is noise of a busy device
MEMORY_FACTOR: Final = 4
MEMORY_FLOOR_BYTES: Final = 64 * 1024 * 1024
RESTARTS_MAX: Final = 1
MISSES_MAX: Final = 1
"""Failed health checks that are tolerated: a single failure may be caused by a peripheral or by the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """Terms of probation in the manifest (times in seconds)."""

    probation_s: float
    min_calls: int = 20
    max_faults: int = 0
    max_error_percent: int = 10
    gates: Mapping[str, MetricGate] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSample:
    """Figure of the component's own, its series added up: of a counter `value`, else `total` over `count` values."""

    kind: str
    value: float = 0.0
    count: int = 0
    total: float = 0.0

    @classmethod
    def of(cls, series: Iterable[Metric]) -> "MetricSample | None":
        """Add up series of one name; None without any."""
        found = tuple(series)
        if not found:
            return None
        return cls(
            kind=found[0].kind,
            value=sum(each.value for each in found),
            count=sum(each.count for each in found),
            total=sum(each.total if each.kind == "gauge" else each.value for each in found),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbationSample:
    """Figures of one generation of an instance.

    Attributes:
        calls: calls that ended, except those that a client broke off or held up.
        faults: traps and time-outs of the guest.
        errors: answers with status 500 and above.
        p50_us: guest time of the median call, microseconds. The slowest calls depend on the device, not on the version.
        quarantined: the host no longer restarts the instance.
        checks: answers of the health check; None without a check, or from a host that does not count them.
        metrics: figures of the component's own that gates ask for; None where it has none at all.
    """

    calls: int = 0
    faults: int = 0
    errors: int = 0
    restarts: int = 0
    p50_us: int = 0
    memory_bytes: int = 0
    quarantined: bool = False
    error: str = ""
    checks: HealthChecks | None = None
    metrics: dict[str, MetricSample] | None = None

    @classmethod
    def of(cls, figure: InstanceHealth, gates: Mapping[str, MetricGate] | None = None) -> Self:
        """Take the sample from the host's figures of an instance, with those that `gates` ask for."""
        unheard = figure.calls.get(CallOutcome.CLIENT_GONE, 0) + figure.calls.get(CallOutcome.CLIENT_SLOW, 0)
        return cls(
            calls=sum(figure.calls.values()) - unheard,
            faults=sum(figure.calls.get(outcome, 0) for outcome in GUEST_FAULTS),
            errors=figure.errors,
            restarts=figure.restarts,
            p50_us=figure.p50_us,
            memory_bytes=figure.memory_bytes,
            quarantined=figure.state is InstanceState.QUARANTINED,
            error=figure.error,
            checks=figure.checks,
            metrics=_wanted(figure.metrics, gates or {}) if isinstance(figure.metrics, tuple) else None,
        )


def _wanted(metrics: Iterable[Metric], gates: Mapping[str, MetricGate]) -> dict[str, MetricSample]:
    names = dict.fromkeys((*gates, *(gate.per for gate in gates.values() if gate.per)))
    known = tuple(metrics)
    found = {name: MetricSample.of(each for each in known if each.name == name) for name in names}
    return {name: sample for name, sample in found.items() if sample is not None}


class Verdict(StrEnum):
    """Result of a judgement."""

    CONTINUE = "continue"
    COMMIT = "commit"
    ROLL_BACK = "roll-back"


@dataclass(frozen=True, slots=True)
class Judgement:
    """Verdict with its reason: `code` is a word of `fleet.protocol.codes.RejectCode`.

    Attributes:
        undecided: with COMMIT, which gates had too few samples; empty for none.
    """

    verdict: Verdict
    code: str = ""
    message: str = ""
    exercised: bool = True
    undecided: str = ""


def judge(terms: Terms, facts: ProbationSample, replaced: ProbationSample | None, elapsed_s: float) -> Judgement:
    """Judge a new generation.

    Args:
        terms: of its manifest.
        facts: its figures since it was started.
        replaced: figures of the generation it replaced; None if it is the first.
        elapsed_s: time since the new generation took over, on a clock that does not jump.

    Returns:
        `COMMIT` only once the last health check was answered well, however long that takes.
    """
    worse = _worse(terms, facts, replaced)
    if worse is not None:
        return worse
    gates = [_Gate.of(name, gate, facts, replaced) for name, gate in terms.gates.items()]
    if failed := next((each.said for each in gates if each.failed), ""):
        return Judgement(Verdict.ROLL_BACK, "metric-gate", failed)
    if elapsed_s < terms.probation_s or (facts.checks is not None and not facts.checks.well):
        return Judgement(Verdict.CONTINUE)
    if any(elapsed_s < terms.probation_s + each.wait_s for each in gates):
        return Judgement(Verdict.CONTINUE)
    return Judgement(
        Verdict.COMMIT,
        exercised=facts.calls >= terms.min_calls,
        undecided="; ".join(each.said for each in gates if each.said),
    )


@dataclass(frozen=True, slots=True)
class _Gate:
    """Standing of a gate.

    Attributes:
        said: why it failed or is undecided; empty for one that is passed, or has nothing to compare with.
        wait_s: time after probation in which it may still be decided.
    """

    said: str = ""
    failed: bool = False
    wait_s: float = 0.0

    @classmethod
    def of(cls, name: str, gate: MetricGate, facts: ProbationSample, replaced: ProbationSample | None) -> "_Gate":
        """Compare a figure with that of the replaced version, which a first version and one without metrics lack."""
        if replaced is None or replaced.metrics is None:
            return cls()
        kinds = {each.metrics[name].kind for each in (facts, replaced) if each.metrics and name in each.metrics}
        if len(kinds) > 1:
            return cls(f"{name} is a {' and a '.join(sorted(kinds))} in the two versions, which cannot be compared")
        kind = kinds.pop() if kinds else "counter"
        new, old = _Figure.of(name, gate, kind, facts), _Figure.of(name, gate, kind, replaced)
        if old.samples < gate.min_samples:  # no wait brings it more
            return cls(f"{name}: the replaced version has {old.samples} of {gate.min_samples} {old.what}")
        if new.samples < gate.min_samples:
            return cls(f"{name}: {new.samples} of {gate.min_samples} {new.what}", wait_s=gate.wait_ms / 1000)
        most = old.mean + abs(old.mean) * gate.max_increase_percent / 100
        # Of a counter, one event more than allowed is chance.
        beyond = new.mean > most and (kind != "counter" or new.amount - most * new.samples > 1)
        if not beyond:
            return cls()
        said = f"{name} is {new.mean:.4g} where the replaced version had {old.mean:.4g} ({new.samples} {new.what})"
        return cls(said, failed=True)


@dataclass(frozen=True, slots=True)
class _Figure:
    """Figure of one version: `amount` over `samples`, of which `what` says the word."""

    amount: float
    samples: int
    what: str

    @classmethod
    def of(cls, name: str, gate: MetricGate, kind: str, sample: ProbationSample) -> "_Figure":
        """Take a figure as its gate compares it; a counter that was never added to is 0."""
        metrics = sample.metrics or {}
        found = metrics.get(name) or MetricSample(kind=kind)
        if kind != "counter":
            return cls(found.total, found.count, "values")
        if gate.per:
            per = metrics.get(gate.per)
            return cls(found.value, int(per.value) if per and per.kind == "counter" else 0, gate.per)
        return cls(found.value, sample.calls, "calls")

    @property
    def mean(self) -> float:
        """Amount of one sample."""
        return self.amount / max(1, self.samples)


def confirm(
    terms: Terms, before: ProbationSample, facts: ProbationSample, replaced: ProbationSample | None, elapsed_s: float
) -> Judgement:
    """Judge once more at the end, by figures taken after the last health check.

    A check that was not answered yet, or for which no worker was running, leaves the judgement open.

    Args:
        terms: of its manifest.
        before: the figures by which the version would be committed.
        facts: the figures after the check.
        replaced: as for `judge`.
        elapsed_s: as for `judge`.
    """
    judgement = judge(terms, facts, replaced, elapsed_s)
    unanswered = before.checks is not None and (facts.checks is None or facts.checks.asked <= before.checks.asked)
    return Judgement(Verdict.CONTINUE) if judgement.verdict is Verdict.COMMIT and unanswered else judgement


def _worse(terms: Terms, facts: ProbationSample, replaced: ProbationSample | None) -> Judgement | None:
    detail = f": {facts.error}" if facts.error else ""
    if facts.faults > terms.max_faults:
        return Judgement(
            Verdict.ROLL_BACK, "trapped", f"{facts.faults} of its calls trapped or ran out of time{detail}"
        )
    if facts.quarantined:
        return Judgement(Verdict.ROLL_BACK, "restarted", f"the host gave up restarting it{detail}")
    if facts.restarts > RESTARTS_MAX:
        return Judgement(Verdict.ROLL_BACK, "restarted", f"it was restarted {facts.restarts} times{detail}")
    if facts.checks is not None and facts.checks.missed > MISSES_MAX:
        return Judgement(
            Verdict.ROLL_BACK, "health-failed", f"its health check failed {facts.checks.missed} times{detail}"
        )
    if facts.calls < max(1, terms.min_calls):
        return None
    return _worse_than_replaced(terms, facts, replaced if replaced and replaced.calls >= terms.min_calls else None)


def _worse_than_replaced(terms: Terms, facts: ProbationSample, replaced: ProbationSample | None) -> Judgement | None:
    percent = 100 * facts.errors / facts.calls
    before = 100 * replaced.errors / max(1, replaced.calls) if replaced is not None else 0.0
    if percent > terms.max_error_percent and percent > before:
        return Judgement(
            Verdict.ROLL_BACK, "error-rate", f"{facts.errors} of {facts.calls} answers were errors ({percent:.0f} %)"
        )
    if replaced is None:
        return None
    if facts.p50_us > max(LATENCY_FACTOR * replaced.p50_us, LATENCY_FLOOR_US):
        return Judgement(
            Verdict.ROLL_BACK,
            "too-late",
            f"half of its calls take over {facts.p50_us} us where the replaced version took {replaced.p50_us} us",
        )
    if replaced.memory_bytes and facts.memory_bytes > max(MEMORY_FACTOR * replaced.memory_bytes, MEMORY_FLOOR_BYTES):
        return Judgement(
            Verdict.ROLL_BACK,
            "too-much-memory",
            f"it uses {facts.memory_bytes >> 20} MiB where the replaced version used {replaced.memory_bytes >> 20} MiB",
        )
    return None
