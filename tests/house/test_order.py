"""Files that take long begin first when tests run side by side."""

from pathlib import Path

from tests.order import LONGEST, place

ROOT = Path(__file__).resolve().parents[2]


def test_each_file_that_is_named_is_there():
    assert [file for file in LONGEST if not (ROOT / file).is_file()] == []
    assert len(set(LONGEST)) == len(LONGEST)


def test_the_longest_come_first_and_the_others_stay_in_order():
    others = ["tests/a.py::test_x", "tests/z.py::test_x", "tests/b.py::test_x[a::b]"]
    long = [f"{file}::test_x" for file in LONGEST[:2]]
    assert sorted([*others, *reversed(long)], key=place) == [*long, *others]
