"""Waves as people write them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.rollout import model
from fleet.rollout.model import BadWavesError, Wave


def test_a_canary_then_five_in_a_hundred_then_all():
    parsed = model.parse("1, 5%, 100%")
    assert parsed == (Wave(1, percent=False), Wave(5, percent=True), Wave(100, percent=True))
    assert model.sizes(parsed, 200) == (1, 10, 200)
    # small groups: a wave that brings nobody passes at once
    assert model.sizes(parsed, 3) == (1, 1, 3)
    assert model.sizes(parsed, 0) == (0, 0, 0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not a wave"),
        ("1, many, 100%", "'many' is not a wave"),
        ("1", "must be 100%"),
        ("5%, 50%", "must be 100%"),
        ("0, 100%", "means nothing"),
        ("0%, 100%", "means nothing"),
        ("101%", "means nothing"),
        ("50%, 5%, 100%", "not larger than the one before"),
        ("3, 3, 100%", "not larger than the one before"),
        ("100%, 100%", "not larger than the one before"),
        (", ".join(str(n) for n in range(1, 25)) + ", 100%", "at most 20"),
    ],
)
def test_waves_that_cannot_be_meant_are_refused_with_a_sentence(text, said):
    with pytest.raises(BadWavesError, match=said):
        model.parse(text)


@given(
    st.lists(st.integers(1, 500), max_size=5, unique=True), st.lists(st.integers(1, 99), max_size=5, unique=True),
    st.integers(0, 2000),
)  # fmt: skip
def test_every_board_is_in_exactly_one_wave(counts, percents, boards):
    text = ", ".join([*(str(n) for n in sorted(counts)), *(f"{n}%" for n in sorted(percents)), "100%"])
    reached = model.sizes(model.parse(text), boards)
    assert list(reached) == sorted(reached)
    assert reached[-1] == boards
    numbers = [model.wave_of(index, reached) for index in range(boards)]
    assert numbers == sorted(numbers)
    for wave, size in enumerate(reached, 1):
        assert sum(number <= wave for number in numbers) == size


def test_boards_that_are_online_come_first_so_that_the_canary_can_answer():
    assert model.order({"c": True, "a": False, "b": True}) == ("b", "c", "a")
