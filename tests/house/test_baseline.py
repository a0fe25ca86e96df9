"""Counts of faults in prose and shape, held by `make check`: no file has more than is recorded for it."""

import pytest

from tests.house import baseline


def test_no_file_has_more_faults_than_are_recorded() -> None:
    assert baseline.risen(baseline.measure(), baseline.read()) == []


@pytest.mark.parametrize(
    ("source", "words", "openings"),
    [
        ('"""Worker of one instance."""', 0, 0),
        ('"""What a lane is."""', 1, 1),
        ('def a():\n    """Its crew."""', 1, 1),
        ('class A:\n    """One seat.\n\n    All lanes."""', 2, 1),
        ("a = 1  # so that it waits", 0, 1),
        ('A = 1\n"""How many lanes there are."""', 1, 1),
        ("# Wait here:\n# this takes long", 0, 0),
        ("# Wait here\n\n# this takes long", 0, 1),
        ('"""Flag `--share-lane`, also as share-lane, of the wall-clock; `lane`."""', 0, 0),
        ("lane = 'a lane'", 0, 0),
        ('"""Somebody."""', 0, 0),
    ],
)
def test_each_fault_of_prose_is_seen(source: str, words: int, openings: int) -> None:
    found = baseline.of_source(source)
    assert (found["words"], found["openings"]) == (words, openings)


def test_code_in_pages_is_passed_over() -> None:
    page = "A lane.\n\n    in a lane\n\n```sh\nlane\n```\n\nThe flag `--own-lane`, and a nursery.\n"
    assert baseline.of_page(page)["words"] == 2


def test_counts_fall_and_never_rise() -> None:
    recorded = {("words", "agent/cli.py"): 2, ("openings", "agent/gone.py"): 3}
    assert not baseline.risen({("words", "agent/cli.py"): 1}, recorded)
    assert baseline.risen({("words", "agent/cli.py"): 3}, recorded)
    assert baseline.risen({("words", "agent/new.py"): 1}, recorded)
    assert baseline.raised({("words", "agent/cli.py"): 3}, recorded), "recording raises nothing"
    # a renamed file brings its own along, and nothing besides
    assert not baseline.raised({("openings", "agent/renamed.py"): 3}, recorded)
    assert baseline.raised({("openings", "agent/renamed.py"): 4}, recorded)
    assert baseline.raised({("words", "agent/renamed.py"): 1}, recorded)
