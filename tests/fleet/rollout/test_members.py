"""Members of a rollout: waves as people write them, and the draw that fills them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.rollout.members import Amount, BadWavesError, Candidate, Stage, default_waves, draw, parse_waves


def candidates(online, away=0, **labels):
    names = [f"d{number:03}" for number in range(online + away)]
    return [Candidate(name, number < online, labels) for number, name in enumerate(names)]


def sizes(drawn):
    return tuple(len(wave) for wave in drawn.waves)


@pytest.mark.parametrize(
    ("devices", "waves"),
    [(1, "1, 100%"), (10, "1, 100%"), (11, "1, 10%, 100%"), (1000, "1, 10%, 100%"), (1001, "1, 1%, 10%, 100%")],
)
def test_the_waves_follow_from_the_size_of_the_group(devices, waves):
    assert default_waves(devices) == waves


@pytest.mark.parametrize(
    ("text", "devices", "expected"),
    [
        ("1, 100%", 10, (1, 9)),
        ("1, 1%, 10%, 100%", 5000, (1, 49, 450, 4500)),
        ("1, 10%, 100%", 5, (1, 4)),
        ("100%", 3, (3,)),
        ("2, 4, 100%", 3, (2, 1)),
        ("1, 100%", 1, (1,)),
    ],
)
def test_a_wave_has_the_members_that_it_adds_and_empty_waves_are_dropped(text, devices, expected):
    assert sizes(draw(candidates(devices), parse_waves(text), seed=1)) == expected


@pytest.mark.parametrize(
    "text", ["", "0, 100%", "1", "50%", "100%, 1", "5, 3, 100%", "1, 101%", "a, 100%", "1,,100%", "1, 1, 100%"]
)
def test_waves_that_cannot_be_meant_are_refused(text):
    with pytest.raises(BadWavesError):
        parse_waves(text)


@pytest.mark.parametrize(("text", "up", "down"), [("10%", 2, 1), ("3", 3, 3), ("0", 0, 0), ("100%", 15, 15)])
def test_amounts_are_numbers_or_shares(text, up, down):
    assert (Amount.parse(text).up(15), Amount.parse(text).down(15)) == (up, down)


@pytest.mark.parametrize("text", ["101%", "-1", "x", "1.5", ""])
def test_amounts_that_are_none_are_refused(text):
    with pytest.raises(BadWavesError):
        Amount.parse(text)


def test_the_canary_is_drawn_by_seed_and_never_an_offline_device():
    fleet = candidates(20, 20)
    canaries = {draw(fleet, parse_waves("1, 100%"), seed=seed).waves[0] for seed in range(60)}
    assert len(canaries) > 10, "the same device is not everybody's canary"
    assert {device for wave in canaries for device in wave} <= {each.device for each in fleet if each.online}


def test_the_same_seed_draws_the_same_wherever_devices_stand_in_the_list():
    fleet = candidates(30, 5)
    assert draw(fleet, parse_waves("1, 10%, 100%"), seed=7) == draw(fleet[::-1], parse_waves("1, 10%, 100%"), seed=7)


def test_with_nobody_online_wave_1_has_open_seats():
    drawn = draw(candidates(0, 5), parse_waves("2, 100%"), seed=1)
    assert (sizes(drawn), drawn.vacancies) == ((0, 5), 2)
    for waves in ("100%", "5, 100%", "9, 100%"):
        assert draw(candidates(0, 5), parse_waves(waves), seed=1).vacancies == 0, "the wave has room for everybody"


def test_stages_select_by_labels_and_the_last_takes_the_rest():
    lab = [Candidate(f"lab{number}", online=True, labels={"ring": "lab"}) for number in range(4)]
    stages = (
        Stage(Amount(2), from_first=False, selector=(("ring", "lab"),), approval=True),
        Stage(Amount(50, percent=True), from_first=False),
        Stage(Amount(100, percent=True)),
    )
    drawn = draw([*lab, *candidates(10)], stages, seed=1)
    assert sizes(drawn) == (2, 6, 6)
    assert all(device.startswith("lab") for device in drawn.waves[0])
    assert [stage.approval for stage in drawn.stages] == [True, False, False]
    without = draw(candidates(10), stages, seed=1)
    assert (sizes(without), [stage.approval for stage in without.stages]) == ((5, 5), [False, False])


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from(["1, 100%", "100%", "2, 10%, 100%"]), st.integers())
def test_every_device_is_in_one_wave(online, away, text, seed):
    drawn = draw(candidates(online, away), parse_waves(text), seed=seed)
    placed = [device for wave in drawn.waves for device in wave]
    assert sorted(placed) == sorted(each.device for each in candidates(online, away))
    assert len(drawn.stages) == len(drawn.waves)
    assert all(drawn.waves[1 if drawn.vacancies else 0 :])
