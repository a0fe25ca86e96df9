"""Probation judges with facts, and only with the guest's own faults."""

import pytest

from agent.update.probation import Facts, Terms, Verdict, judge
from fleet.protocol.codes import RejectCode

TERMS = Terms(probation_s=30, min_calls=20, max_faults=0, max_error_percent=10)
GOOD = Facts(calls=100, p50_us=2_000, memory_bytes=8 << 20)


def test_it_ends_committed_when_nothing_is_wrong():
    assert judge(TERMS, GOOD, GOOD, 29.9).verdict is Verdict.CONTINUE
    judgement = judge(TERMS, GOOD, GOOD, 30)
    assert (judgement.verdict, judgement.exercised) == (Verdict.COMMIT, True)


def test_too_few_calls_commit_unexercised():
    judgement = judge(TERMS, Facts(calls=19), None, 30)
    assert (judgement.verdict, judgement.exercised) == (Verdict.COMMIT, False)


@pytest.mark.parametrize(
    ("facts", "code"),
    [
        (Facts(calls=1, faults=1), "trapped"),
        (Facts(quarantined=True, error="exit 1"), "restarted"),
        (Facts(restarts=2), "restarted"),
        (Facts(unhealthy=True), "health-failed"),
        (Facts(calls=20, errors=3), "error-rate"),
        (Facts(calls=100, p50_us=50_000), "too-late"),
        (Facts(calls=100, p50_us=2_000, memory_bytes=200 << 20), "too-much-memory"),
    ],
)
def test_each_way_to_do_worse(facts, code):
    judgement = judge(TERMS, facts, GOOD, 1)
    assert (judgement.verdict, judgement.code) == (Verdict.ROLL_BACK, code)
    assert judgement.code in set(RejectCode)
    assert judgement.message


@pytest.mark.parametrize(
    ("facts", "replaced"),
    [
        (Facts(calls=10, errors=10), GOOD),  # too few to mean anything
        (Facts(calls=100, errors=20), Facts(calls=100, errors=30)),  # no worse than before
        (Facts(calls=100, p50_us=15_000), GOOD),  # slower, but nobody notices
        (Facts(calls=100, p50_us=900_000), None),  # nothing to compare with
        (Facts(calls=100, p50_us=900_000), Facts(calls=3, p50_us=10)),  # the old one was hardly called
        (Facts(restarts=1), GOOD),
    ],
)
def test_what_is_no_reason_to_go_back(facts, replaced):
    assert judge(TERMS, facts, replaced, 1).verdict is Verdict.CONTINUE


def test_the_manifest_may_tolerate_faults():
    assert judge(Terms(probation_s=30, max_faults=2), Facts(calls=9, faults=2), None, 1).verdict is Verdict.CONTINUE
