"""What a board should run, who says so, and what an undo takes back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.rollout import effective
from fleet.rollout.effective import Conflict, Group, NothingToUndoError, Overlay, Past, SettledValue
from fleet.rollout.model import RolloutState, Value

V1, V2, V3 = (SettledValue(Value(f"v{number}"), f"r{number}") for number in (1, 2, 3))


def what(groups=(), pins=None, overlays=()):
    found = effective.effective(groups, pins or {}, overlays)
    return {instance: (each.value.target, each.source) for instance, each in found.items()}


def test_a_pin_beats_a_group_and_the_higher_priority_beats_the_lower():
    low, high = Group("low", 0, {"a": V1, "b": V1}), Group("high", 5, {"a": V2})
    assert what([high, low]) == {"a": ("v2", "group high"), "b": ("v1", "group low")}
    assert what([high, low], {"a": V3})["a"] == ("v3", "pin")


def test_an_open_rollout_overlays_its_own_scope_only():
    groups = [Group("low", 0, {"a": V1}), Group("high", 5, {"a": V2})]
    low = Overlay("r7", 7, "low", "a", Value("v7"))
    high = Overlay("r8", 8, "high", "a", Value("v8"))
    assert what(groups, overlays=[low])["a"] == ("v2", "group high")
    assert what(groups, overlays=[high])["a"] == ("v8", "rollout 8 (group high)")
    board = Overlay("r9", 9, "", "a", Value("v9"))
    assert what(groups, {"a": V3}, [low, high, board])["a"] == ("v9", "rollout 9 (this device)")


def test_the_newer_of_two_rollouts_in_one_scope_counts():
    group = [Group("g", 0, {"a": V1})]
    older, newer = Overlay("r2", 2, "g", "a", Value("v2")), Overlay("r3", 3, "g", "a", Value("v3"))
    assert what(group, overlays=[newer, older])["a"] == ("v3", "rollout 3 (group g)")


def test_a_removal_is_a_value_too():
    group = [Group("g", 0, {"a": V1})]
    assert what(group, overlays=[Overlay("r2", 2, "g", "a", Value(None))])["a"][0] is None


values = st.sampled_from([V1, V2, V3])
groups_of = st.lists(
    st.builds(
        Group, st.sampled_from("abcdef"), st.integers(0, 2), st.dictionaries(st.sampled_from("xyz"), values, max_size=3)
    ),
    max_size=5,
    unique_by=lambda group: group.name,
)


@given(groups_of, st.randoms(use_true_random=False))
def test_the_order_in_which_groups_are_listed_never_matters(groups, random):
    shuffled = list(groups)
    random.shuffle(shuffled)
    assert effective.effective(groups, {}) == effective.effective(shuffled, {})
    assert effective.conflicts(groups) == effective.conflicts(shuffled)


@given(groups_of)
def test_without_a_conflict_the_value_is_that_of_every_group_with_the_highest_priority(groups):
    conflicted = {conflict.instance for conflict in effective.conflicts(groups)}
    for instance, each in effective.effective(groups, {}).items():
        holders = [group for group in groups if instance in group.values]
        top = max(group.priority for group in holders)
        wanted = {group.values[instance].value for group in holders if group.priority == top}
        assert each.value in wanted
        assert (len(wanted) > 1) == (instance in conflicted)


def test_a_conflict_names_both_groups():
    groups = [Group("b", 0, {"x": V1}), Group("a", 0, {"x": V2}), Group("c", -1, {"x": V3})]
    assert effective.conflicts(groups) == (Conflict("x", "a", "b"),)


# Undo


def past(number, state=RolloutState.SUCCEEDED, undoes=""):
    return Past(f"r{number}", number, state, Value(f"v{number - 1}") if number > 1 else None, undoes)


def test_undo_after_undo_walks_back_through_history():
    first, second, third = past(1), past(2), past(3)
    assert effective.choose_undo([first, second, third]) == third
    assert effective.choose_undo([first, second, third, past(4, undoes="r3")]) == second
    assert effective.choose_undo([first, second, third, past(4, undoes="r3"), past(5, undoes="r2")]) == first
    with pytest.raises(NothingToUndoError):
        effective.choose_undo([first, past(2, undoes="r1")])


def test_a_rollout_that_was_halted_is_not_what_an_undo_takes_back():
    assert effective.choose_undo([past(1), past(2), past(3, RolloutState.HALTED)]) == past(2)
    with pytest.raises(NothingToUndoError, match="rollout 3 was halted"):
        effective.target_of(past(3, RolloutState.HALTED))


def test_an_undo_that_was_halted_itself_may_be_asked_again():
    assert effective.choose_undo([past(1), past(2), past(3, RolloutState.HALTED, undoes="r2")]) == past(2)


def test_undoing_the_first_takes_the_instance_off():
    assert effective.target_of(past(1)) == Value(None)
    assert effective.target_of(past(2)) == Value("v1")
