"""Cron lines: which minute comes next, and which lines are refused."""

import contextlib
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.protocol import manifest


def at(*fields):
    return datetime(*fields)  # noqa: DTZ001 - wall-clock times of a device's zone


FRIDAY = at(2024, 3, 1, 12, 34, 56)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("* * * * *", at(2024, 3, 1, 12, 35)),
        ("*/15 * * * *", at(2024, 3, 1, 12, 45)),
        ("34 12 * * *", at(2024, 3, 2, 12, 34)),
        ("0 3 * * *", at(2024, 3, 2, 3, 0)),
        ("0 0 1 * *", at(2024, 4, 1)),
        ("0 0 * * 0", at(2024, 3, 3)),
        ("0 0 * * 7", at(2024, 3, 3)),
        ("30 9 * * 1-5", at(2024, 3, 4, 9, 30)),
        ("0 0 29 2 *", at(2028, 2, 29)),
        ("5,50-59/3 12 * * *", at(2024, 3, 1, 12, 50)),
        ("0 0 15 * 6", at(2024, 3, 2)),  # both days restricted: either fits
        ("0 0 31 12 *", at(2024, 12, 31)),
        ("10/20 * * * *", at(2024, 3, 1, 12, 50)),
    ],
)
def test_the_next_minute(line, expected):
    assert manifest.parse(manifest.check(line)).next_after(FRIDAY) == expected


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "has 0 fields"),
        ("* * * *", "has 4 fields"),
        ("60 * * * *", "is no minute: 0 to 59"),
        ("* 24 * * *", "is no hour"),
        ("* * 0 * *", "is no day of month"),
        ("* * * 13 *", "is no month"),
        ("* * * * 8", "is no day of week"),
        ("*/0 * * * *", "is no minute"),
        ("5-1 * * * *", "is no minute"),
        ("5- * * * *", "is no minute"),
        ("-5 * * * *", "is no minute"),
        ("1,,2 * * * *", "is no minute"),
        ("*/ * * * *", "is no minute"),
        ("*5 * * * *", "is no minute"),
        ("² * * * *", "is no minute"),
        ("0 0 30 2 *", "never matches"),
    ],
)
def test_what_is_refused(line, says):
    with pytest.raises(manifest.BadCronError, match=says):
        manifest.check(line)


@given(st.text(alphabet="0123456789*/-, ", max_size=30))
def test_whatever_the_text_only_its_own_error_comes_out(line):
    with contextlib.suppress(manifest.BadCronError):
        manifest.parse(line)


@given(st.datetimes(at(2000, 1, 1), at(2030, 1, 1)))
def test_the_next_is_later_and_fits(moment):
    line = manifest.parse("7-50/9 */5 * * 1,3")
    following = line.next_after(moment)
    assert following > moment
    assert (following.minute in line.minutes, following.hour % 5, following.isoweekday() in {1, 3}) == (True, 0, True)
