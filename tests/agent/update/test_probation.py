"""Probation judges by figures, and only by the guest's own faults."""

import pytest

from agent.update.probation import MetricSample, ProbationSample, Terms, Verdict, confirm, judge
from fleet.protocol.codes import InstanceState, RejectCode
from fleet.protocol.manifest import MetricGate
from fleet.protocol.messages import HealthChecks, InstanceHealth
from fleet.protocol.metrics import Metric

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
        metrics=(
            Metric(name="errors", kind="counter", labels={"bus": "a"}, value=2.0, count=2),
            Metric(name="errors", kind="counter", labels={"bus": "b"}, value=3.0, count=1),
            Metric(name="other", kind="counter", value=1.0, count=1),
        ),
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
        metrics={"errors": MetricSample(kind="counter", value=5.0, count=3, total=5.0)},
    )
    assert ProbationSample.of(figure, GATES) == facts
    untold = ProbationSample()
    assert [name for name in facts.__slots__ if getattr(facts, name) == getattr(untold, name)] == []


GATES = {
    "errors": MetricGate(max_increase_percent=20, min_samples=50, wait_ms=60_000),
    "level": MetricGate(max_increase_percent=10, min_samples=5, wait_ms=60_000),
}
GATED = Terms(probation_s=30, min_calls=20, max_error_percent=10, gates=GATES)


def with_metrics(calls=100, errors=10.0, level=(50.0, 10), kind="counter"):
    metrics = {"level": MetricSample(kind="gauge", total=level[0] * level[1], count=level[1])} if level else {}
    if errors is not None:
        metrics["errors"] = MetricSample(kind=kind, value=errors, total=errors, count=calls)
    return ProbationSample(calls=calls, metrics=metrics)


BEFORE = with_metrics(1000, 100.0)
PASSES = {
    "as before": with_metrics(),
    "at the bound": with_metrics(100, 12.0, (55.0, 5)),
    "one more is chance": with_metrics(100, 13.0),
    "none at all": with_metrics(100, None),
}
FAILS = {
    "more errors": (with_metrics(100, 13.5), "errors is 0.135 where the replaced version had 0.1 (100 calls)"),
    "a higher level": (with_metrics(level=(55.1, 5)), "level is 55.1 where the replaced version had 50 (5 values)"),
}
TOO_FEW = {
    "calls": (with_metrics(49), BEFORE, True, "errors: 49 of 50 calls"),
    "values": (with_metrics(level=(500.0, 4)), BEFORE, True, "level: 4 of 5 values"),
    "no value": (with_metrics(level=None), BEFORE, True, "level: 0 of 5 values"),
    "calls of the replaced version": (
        with_metrics(),
        with_metrics(49),
        False,
        "the replaced version has 49 of 50 calls",
    ),
    "another kind": (with_metrics(kind="gauge"), BEFORE, False, "errors is a counter and a gauge in the two versions"),
}


@pytest.mark.parametrize("sample", PASSES.values(), ids=PASSES)
def test_a_gate_on_metrics_is_passed(sample):
    judgement = judge(GATED, sample, BEFORE, 30)
    assert (judgement.verdict, judgement.undecided) == (Verdict.COMMIT, "")
    assert judge(GATED, sample, BEFORE, 29).verdict is Verdict.CONTINUE


@pytest.mark.parametrize(("sample", "said"), FAILS.values(), ids=FAILS)
def test_a_gate_on_metrics_fails_as_soon_as_there_are_enough_samples(sample, said):
    judgement = judge(GATED, sample, BEFORE, 1)
    assert (judgement.verdict, judgement.code, judgement.message) == (Verdict.ROLL_BACK, "metric-gate", said)
    assert judgement.code in set(RejectCode)


@pytest.mark.parametrize(("sample", "before", "waits", "said"), TOO_FEW.values(), ids=TOO_FEW)
def test_too_few_samples_wait_and_then_neither_pass_nor_fail(sample, before, waits, said):
    assert (judge(GATED, sample, before, 89.9).verdict is Verdict.CONTINUE) == waits
    judgement = judge(GATED, sample, before, 90)
    assert judgement.verdict is Verdict.COMMIT
    assert said in judgement.undecided


@pytest.mark.parametrize("before", [None, ProbationSample(calls=1000)])
def test_without_a_version_that_has_metrics_there_is_nothing_to_compare(before):
    judgement = judge(GATED, with_metrics(100, 90.0), before, 30)
    assert (judgement.verdict, judgement.undecided) == (Verdict.COMMIT, "")


def test_a_counter_relates_to_another_one():
    terms = Terms(probation_s=30, gates={"errors": MetricGate(max_increase_percent=20, min_samples=50, per="reads")})

    def sample(errors, reads):
        counters = {"errors": errors, "reads": reads}
        return ProbationSample(metrics={name: MetricSample(kind="counter", value=it) for name, it in counters.items()})

    before = sample(10.0, 1000.0)
    assert judge(terms, sample(1.0, 100.0), before, 30).verdict is Verdict.COMMIT
    assert judge(terms, sample(3.0, 100.0), before, 1).message.endswith("had 0.01 (100 reads)")
    assert judge(terms, sample(3.0, 49.0), before, 700).undecided == "errors: 49 of 50 reads"
