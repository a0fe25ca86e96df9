"""Steady time: durations that no wrong reading of the UTC clock ends."""

from fleet.rollout.steady import AGREED_S, Witness, remaining

YEAR = 365 * 86_400.0


def test_a_wall_clock_that_jumps_a_year_for_a_moment_moves_no_duration():
    witness = Witness(steady=100, utc=1_000_000)
    for steady, utc in [(110, 1_000_010 + YEAR), (120, 1_000_020)]:
        witness = witness.observe(steady, utc)
        assert remaining(900, witness) == 900 - steady


def test_a_scheduled_rollout_does_not_begin_on_a_reading_that_jumped():
    witness = Witness(steady=0, utc=1_000_000).observe(10, 1_000_010 + YEAR)
    assert not witness.due(1_000_500)
    witness = witness.observe(20, 1_000_020)
    assert not witness.due(1_000_500)


def test_a_clock_that_was_set_is_believed_after_a_while():
    at = 1_000_000 + YEAR
    witness = Witness(steady=0, utc=1_000_000).observe(10, at + 10)
    for steady in range(20, 10 + int(AGREED_S), 10):
        witness = witness.observe(steady, at + steady)
        assert not witness.due(at)
    assert witness.observe(10 + AGREED_S, at + 10 + AGREED_S).due(at)


def test_a_steady_clock_begins_what_is_due():
    witness = Witness(steady=0, utc=1_000_000)
    assert not witness.observe(10, 1_000_010).due(1_000_011)
    assert witness.observe(11, 1_000_011).due(1_000_011)


def test_a_restart_goes_on_where_it_was_and_a_clock_that_went_back_is_doubted():
    before = Witness(steady=100, utc=1_000_000)
    later = before.resumed(1_000_000 + 3600)
    assert (later.steady, remaining(400, later), later.due(1_000_100)) == (100, 300, True)
    assert not before.resumed(10_000).due(9_000)
