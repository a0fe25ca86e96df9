"""Closed vocabularies: declared once, each code with a remediation."""

import ast
from pathlib import Path

import pytest

from fleet.protocol.codes import (
    CODE_OUTCOMES,
    REMEDIATION,
    RETRYABLE,
    Outcome,
    Phase,
    RejectCode,
    outcome_of,
    remediation,
)

ROOT = Path(__file__).resolve().parents[3]


def vocabularies():
    """Every StrEnum of the product: its place and its words."""
    for package in ("agent", "fleet", "signing"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef) and any(getattr(base, "id", "") == "StrEnum" for base in node.bases):
                    values = [each.value for each in node.body if isinstance(each, ast.Assign)]
                    words = frozenset(each.value for each in values if isinstance(each, ast.Constant))
                    yield f"{file.relative_to(ROOT)}: {node.name}", words


def test_no_vocabulary_is_declared_twice():
    places = {}
    for place, words in vocabularies():
        places.setdefault(words, set()).add(place)
    twins = [sorted(each) for each in places.values() if len(each) > 1]
    assert not twins, f"import these from fleet.protocol.codes: {twins}"


def test_every_code_has_a_remediation_but_the_one_where_nothing_is_wrong():
    assert set(REMEDIATION) == set(RejectCode)
    assert [code for code in RejectCode if not remediation(code)] == [RejectCode.SUPERSEDED]
    assert remediation("a-code-of-tomorrow") == ""


def test_every_code_has_an_outcome():
    assert set(CODE_OUTCOMES) == set(RejectCode)
    assert set(CODE_OUTCOMES.values()) == {Outcome.DEFERRED, Outcome.FAILED, Outcome.SUPERSEDED}


def test_what_a_device_tries_again_by_itself_is_deferred():
    assert {CODE_OUTCOMES[code] for code in RETRYABLE} == {Outcome.DEFERRED}


@pytest.mark.parametrize("phase", [Phase.FAILED, Phase.ROLLED_BACK])
@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        ("no-space", "deferred"),
        ("secret-missing", "deferred"),
        ("port-in-use", "deferred"),
        ("unreachable", "deferred"),
        ("internal", "deferred"),
        ("unsigned", "deferred"),
        ("trapped", "failed"),
        ("health-failed", "failed"),
        ("compile-failed", "failed"),
        ("grant-denied", "failed"),
        ("hash-mismatch", "failed"),
        ("superseded", "superseded"),
    ],
)
def test_a_code_speaks_against_the_version_or_defers_the_device(code, outcome, phase):
    assert outcome_of(code, phase) is Outcome(outcome)
    assert outcome_of(RejectCode(code), phase) is Outcome(outcome)


def test_interruptions_speak_against_a_version_that_ran():
    assert outcome_of("interrupted", Phase.FAILED) is Outcome.DEFERRED
    assert outcome_of("interrupted", Phase.ROLLED_BACK) is Outcome.FAILED


@pytest.mark.parametrize("code", ["", None, "a-code-of-tomorrow"])
def test_without_a_known_code_going_back_is_the_verdict(code):
    assert outcome_of(code, Phase.ROLLED_BACK) is Outcome.FAILED
    assert outcome_of(code, Phase.FAILED) is Outcome.DEFERRED
