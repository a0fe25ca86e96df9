"""Ranges of versions of data packages, and the paths at which guests find them."""

import pytest

from fleet.protocol import data_packages
from fleet.protocol.data_packages import BadPathError, BadRangeError


@pytest.mark.parametrize(
    ("wanted", "fits", "does_not"),
    [
        ("*", ["1.0.0", "9.9.9"], ["2.0.0-rc.1"]),
        (">=2", ["2.0.0", "2.1.0", "10.0.0"], ["1.9.9", "2.0.0-rc.1"]),
        (">=2, <4", ["2.0.0", "3.9.9"], ["4.0.0", "1.0.0"]),
        (">1.2.3,<=2", ["1.2.4", "2.0.0"], ["1.2.3", "2.0.1"]),
        ("1.4", ["1.4.0", "1.4.9"], ["1.5.0", "2.4.0"]),
        ("1", ["1.0.0", "1.9.9"], ["2.0.0"]),
        ("1.4.2", ["1.4.2"], ["1.4.3"]),
        ("=2", ["2.0.0"], ["2.0.1"]),
        (">=2.0.0-rc.1", ["2.0.0-rc.1", "2.0.0-rc.2", "2.0.0"], ["2.0.0-beta", "2.1.0-rc.1"]),
    ],
)
def test_a_range_takes_what_it_says(wanted, fits, does_not):
    assert [each for each in fits if not data_packages.matches(wanted, each)] == []
    assert [each for each in does_not if data_packages.matches(wanted, each)] == []


@pytest.mark.parametrize("text", ["", ">", ">= two", "1.2.3.4", "01", "2.*", ">=2 <4", "^2", "2-rc.1", ">=1," * 60])
def test_what_is_no_range_is_refused_by_its_text(text):
    with pytest.raises(BadRangeError):
        data_packages.check_range(text)


@pytest.mark.parametrize(
    "text", ["", "m", "/", "/data/", "/data//m", "/data/../m", "/.m", "/a b", "/m\0", "/" + "m" * 200]
)
def test_what_is_no_path_is_refused(text):
    with pytest.raises(BadPathError):
        data_packages.check_path(text)


def test_a_version_may_be_a_whole_number_and_the_next_one_follows_the_newest():
    assert [data_packages.full_version(each) for each in ("2", "2.1", "2.1.3")] == ["2.0.0", "2.1.0", "2.1.3"]
    assert data_packages.next_version([]) == "1.0.0"
    assert data_packages.next_version(["1.0.0", "10.2.0", "9.0.0"]) == "11.0.0"
