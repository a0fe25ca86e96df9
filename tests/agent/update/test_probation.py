"""Probation judges by figures, and only by the guest's own faults."""

import pytest

from agent.update.probation import ProbationSample, Terms, Verdict, confirm, judge
from fleet.protocol.codes import InstanceState, RejectCode
from fleet.protocol.messages import HealthChecks, InstanceHealth

TERMS = Terms(probation_s=30, min_calls=20, max_faults=0, max_error_percent=10)
GOOD = ProbationSample(calls=100, p50_us=2_000, memory_bytes=8 << 20)


def test_probation_ends_with_a_commit_when_nothing_is_wrong():
    assert judge(TERMS, GOOD, GOOD, 29.9).verdict is Verdict.CONTINUE
    judgement = judge(TERMS, GOOD, GOOD, 30)
    assert (judgement.verdict, judgement.exercised) == (Verdict.COMMIT, True)


def test_too_few_calls_commit_unexercised():
    judgement = judge(TERMS, ProbationSample(calls=19), None, 30)
    assert (judgement.verdict, judgement.exercised) == (Verdict.COMMIT, False)


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        (ProbationSample(calls=1, faults=1), "trapped"),
        (ProbationSample(quarantined=True, error="exit 1"), "restarted"),
        (ProbationSample(restarts=2), "restarted"),
        (ProbationSample(checks=HealthChecks(asked=6, missed=2)), "health-failed"),
        (ProbationSample(calls=20, errors=3), "error-rate"),
        (ProbationSample(calls=100, p50_us=50_000), "too-late"),
        (ProbationSample(calls=100, p50_us=2_000, memory_bytes=200 << 20), "too-much-memory"),
    ],
)
def test_each_reason_for_a_rollback(facts, code):
    judgement = judge(TERMS, facts, GOOD, 1)
    assert (judgement.verdict, judgement.code) == (Verdict.ROLL_BACK, code)
    assert judgement.code in set(RejectCode)
    assert judgement.message


@pytest.mark.parametrize(
    ("facts", "replaced"),
    [
        (ProbationSample(calls=10, errors=10), GOOD),  # too few to be significant
        (ProbationSample(calls=100, errors=20), ProbationSample(calls=100, errors=30)),  # no worse than before
        (ProbationSample(calls=100, p50_us=15_000), GOOD),  # slower, but not noticeably
        (ProbationSample(calls=100, p50_us=900_000), None),  # nothing to compare with
        (
            ProbationSample(calls=100, p50_us=900_000),
            ProbationSample(calls=3, p50_us=10),
        ),  # the old version had too few calls
        (ProbationSample(restarts=1), GOOD),
        (ProbationSample(checks=HealthChecks(asked=1, missed=1, well=False)), GOOD),
    ],
)
def test_reasons_that_do_not_cause_a_rollback(facts, replaced):
    assert judge(TERMS, facts, replaced, 1).verdict is Verdict.CONTINUE


def test_the_manifest_may_tolerate_faults():
    assert (
        judge(Terms(probation_s=30, max_faults=2), ProbationSample(calls=9, faults=2), None, 1).verdict
        is Verdict.CONTINUE
    )


def test_a_failed_last_health_check_delays_the_commit():
    unwell = ProbationSample(checks=HealthChecks(asked=5, missed=1, well=False))
    assert judge(TERMS, unwell, None, 40).verdict is Verdict.CONTINUE
    well = ProbationSample(checks=HealthChecks(asked=6, missed=1))
    assert judge(TERMS, well, None, 41).verdict is Verdict.COMMIT


@pytest.mark.parametrize(
    ("last", "verdict"),
    [
        (HealthChecks(asked=6), Verdict.COMMIT),
        (HealthChecks(asked=6, missed=1, well=False), Verdict.CONTINUE),
        (HealthChecks(asked=6, missed=2, well=False), Verdict.ROLL_BACK),
        (HealthChecks(asked=5), Verdict.CONTINUE),  # no worker was running
    ],
)
def test_the_last_health_check_decides(last, verdict):
    before = ProbationSample(checks=HealthChecks(asked=5))
    assert confirm(TERMS, before, ProbationSample(checks=last), None, 30).verdict is verdict


def test_the_sample_has_every_figure_that_is_judged():
    figure = InstanceHealth(
        instance="web",
        target="components/acme/web/1.0.0.wasm",
        generation=1,
        state=InstanceState.QUARANTINED,
        restarts=4,
        calls={"ok": 7, "guest-trap": 2, "guest-timeout": 1, "client-gone": 5, "client-slow": 3, "host-error": 1},
        errors=6,
        p50_us=8,
        memory_bytes=9,
        error="exit 1",
        checks=HealthChecks(asked=3, missed=2, well=False),
    )
    facts = ProbationSample(
        calls=11,
        faults=3,
        errors=6,
        restarts=4,
        p50_us=8,
        memory_bytes=9,
        quarantined=True,
        error="exit 1",
        checks=figure.checks,
    )
    assert ProbationSample.of(figure) == facts
    untold = ProbationSample()
    assert [name for name in facts.__slots__ if getattr(facts, name) == getattr(untold, name)] == []
