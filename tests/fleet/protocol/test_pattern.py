"""Patterns of configuration values: the same as Python's `re` describes, refused with their column, never slow."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.protocol import pattern
from fleet.protocol.bounds import CONFIG_VALUE_MAX_BYTES
from fleet.protocol.pattern import DEPTH_MAX, MAX_CHARS, POSITIONS_MAX, flaw, matches


@pytest.mark.parametrize(
    ("text", "described", "not_described"),
    [
        ("[a-z]{2}[0-9]+", ["ab1", "zz007"], ["ab", "a1", "ab1x", "xab1", "ab1\n", ""]),
        (r"\d{1,3}(\.\d{1,3}){3}", ["10.0.0.1"], ["10.0.0", "10.0.0.1.", "٣.0.0.1", "1000.0.0.1"]),
        ("debug|info|warn", ["debug", "warn"], ["debugx", "xinfo", "", "Debug"]),
        ("(?:a|b)*c?", ["", "abab", "c", "bc"], ["cc", "ca"]),
        ("[^,]*", ["", "a b\n"], ["a,b"]),
        (r"[\]\-^]", ["]", "-", "^"], ["\\", "a"]),
        ("[a-]", ["a", "-"], ["b"]),
        ("a{2,}", ["aa", "aaaaa"], ["a", ""]),
        ("a{0}b", ["b"], ["ab"]),
        ("(|a){3}", ["", "aaa"], ["aaaa"]),
        (r"\w+@\w+\.\w+", ["a_1@b.c"], ["ä@b.c", "a@b"]),
        (r"\x41\u00e4", ["Aä"], ["a"]),
        (".", ["ä", "😀"], ["", "\n", "ab"]),
        ("", [""], ["a"]),
    ],
)
def test_a_pattern_describes_the_whole_value(text, described, not_described):
    assert flaw(text) == ""
    assert [each for each in described if not matches(text, each)] == []
    assert [each for each in not_described if matches(text, each)] == []


@pytest.mark.parametrize(
    ("text", "column", "words"),
    [
        ("^a", 1, "^ has no place: the whole value is meant"),
        ("ab$", 3, "$ has no place"),
        ("a)", 2, "this ) closes nothing"),
        ("x(a", 2, "this ( is never closed"),
        ("x[a", 2, "this [ is never closed"),
        ("[]", 2, "an empty class"),
        ("[[a]]", 2, r"written \["),
        ("a]", 2, "] closes nothing"),
        ("*a", 1, "nothing stands before * to repeat"),
        ("a|+", 3, "nothing stands before +"),
        ("a**", 3, "a repetition is repeated"),
        ("a+?", 3, "a repetition is repeated"),
        ("a{2}{3}", 5, "a repetition is repeated"),
        ("a{x}", 2, "expected {3}, {1,} or {1,5}"),
        ("a{,3}", 2, "expected {3}"),
        ("a{3,2}", 2, "{3,2} ends below its beginning"),
        ("a{99999}", 2, "expected {3}"),
        ("(?=a)b", 2, "only plain groups"),
        ("(?P<n>a)", 2, "only plain groups"),
        (r"(a)\1", 5, r"\1 has no meaning here"),
        (r"\bword", 2, r"\b has no meaning here"),
        ("a\\", 3, "has no meaning here"),
        (r"\x4", 3, "expected hexadecimal digits"),
        (r"\u00e", 3, "expected hexadecimal digits"),
        ("[z-a]", 4, "ends before it begins"),
        (r"[\d-z]", 5, "this range has no beginning"),
        ("a" * (MAX_CHARS + 1), MAX_CHARS + 1, "at most"),
        ("(" * (DEPTH_MAX + 1), DEPTH_MAX + 2, "nested more than"),
        (f"a{{{POSITIONS_MAX + 1}}}", 1, "with its repetitions it has more than"),
        ("((a{99}){99}){99}", 1, "with its repetitions"),
        ("((){9999}){9999}", 1, "with its repetitions"),
        ("((|){99}){99}", 1, "with its repetitions"),
    ],
)
def test_what_cannot_be_meant_is_named_with_its_column(text, column, words):
    said = flaw(text)
    assert (said.startswith(f"column {column}: "), words in said) == (True, True), said
    with pytest.raises(pattern.BadPatternError):
        matches(text, "a")


HOSTILE = [
    "(a+)+b",
    "(a*)*b",
    "(a|a)*b",
    "(a|aa)+b",
    "(a?){50}a{50}",
    "(.*a){12}b",
    "((a{0,9}){0,9})b",
    "(.|a|[ab]|[a-z])*(.|a)*b",
    "a?" * 120 + "a" * 120,
    ".*" * 120 + "b",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_step_costs_at_most_one_pass_over_the_positions(text, monkeypatch):
    """Python's `re` tries 2^n ways of some of these."""
    assert flaw(text) == ""
    machine = pattern._compiled(text)
    steps = []
    follow = pattern._Automaton._follow
    monkeypatch.setattr(
        pattern._Automaton, "_follow", lambda self, there: steps.append(there.bit_length()) or follow(self, there)
    )
    value = "a" * CONFIG_VALUE_MAX_BYTES
    assert not machine.matches(value + "!")
    assert len(steps) <= len(value) + 1
    assert max(steps, default=0) <= POSITIONS_MAX
    assert len(machine._followers) <= pattern._KEPT_MAX


# -- the same as Python's `re` -----------------------------------------------------------------------------------------

ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", "[a-c]", r"\d", r"\W", r"\.", "[^b-]", r"[\s.]", r"\n"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}", "{0,2}", "{1,}", "{0}"])).map(
            lambda both: f"(?:{both[0]}){both[1]}"
        ),
    ),
    max_leaves=6,
)


@given(PATTERNS, st.lists(st.text(alphabet="abc.1 \n-", max_size=6), min_size=1, max_size=8))
def test_a_pattern_describes_as_pythons_does(text, values):
    assert flaw(text) == ""
    for value in values:
        assert matches(text, value) == bool(re.fullmatch(text, value, re.ASCII)), (text, value)


@given(st.text(max_size=30) | st.text(alphabet="ab[](){}|*+?\\^$-.,019dwx", max_size=30))
def test_any_text_is_a_pattern_or_refused_within_itself(text):
    said = flaw(text)
    if said:
        assert 1 <= int(said.split()[1].rstrip(":")) <= len(text) + 1
    else:
        assert matches(text, "a") == bool(re.fullmatch(text, "a", re.ASCII))
