"""The words of the protocol and those of the decisions are the same words, and each has an advice."""

import pytest

from fleet.protocol import operator_api
from fleet.protocol.codes import ADVICE, Phase, RejectCode, advice
from fleet.rollout import model


def test_every_code_has_an_advice_but_the_one_where_nothing_is_wrong():
    assert set(ADVICE) == set(RejectCode)
    assert [code for code in RejectCode if not advice(code)] == [RejectCode.SUPERSEDED]
    assert advice("a-code-of-tomorrow") == ""


def test_decisions_speak_of_codes_and_phases_that_exist():
    assert {str(code) for code in RejectCode} >= model.TRIED | model.DEFERRALS | {model.SUPERSEDED}
    assert {str(phase) for phase in Phase} >= {model.COMMITTED, model.ROLLED_BACK, model.FAILED}


@pytest.mark.parametrize(
    ("ours", "theirs"), [(model.Outcome, operator_api.Outcome), (model.State, operator_api.RolloutState)]
)
def test_the_api_shows_the_words_of_the_decisions(ours, theirs):
    assert {str(word) for word in ours} == {str(word) for word in theirs}
