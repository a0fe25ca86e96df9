"""Topics of components' messages, and filters over them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.protocol import message_topics
from fleet.protocol.message_topics import BadMessageTopicError

LEVELS = st.sampled_from(["a", "b", "c", "+"])
FILTERS = st.builds(
    lambda levels, end: "/".join([*levels, *end]),
    st.lists(LEVELS, min_size=1, max_size=4),
    st.sampled_from([[], ["#"]]),
)
TOPICS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=5).map("/".join)


@pytest.mark.parametrize(
    ("pattern", "topic", "fits"),
    [
        ("a/b", "a/b", True),
        ("a/b", "a", False),
        ("a/b", "a/b/c", False),
        ("a/+", "a/b", True),
        ("a/+", "a", False),
        ("+/+", "a/b", True),
        ("#", "a/b/c", True),
        ("a/#", "a", True),
        ("a/#", "a/b/c", True),
        ("a/#", "b", False),
        ("+/b/#", "a/b/c", True),
        ("a", "ab", False),
        ("Größe/+", "Größe/1", True),
    ],
)
def test_filters_match_as_in_mqtt(pattern, topic, fits):
    message_topics.check_filter(pattern)
    message_topics.check_topic(topic)
    assert message_topics.matches(pattern, topic) is fits


@pytest.mark.parametrize(
    "text",
    [
        *("", "/", "a//b", "/a", "a/", "a/+", "#", "a/b#", "$SYS/a"),
        *("a\0b", "a\nb", "a\x7f", "a\ud800", "x" * 257, "ü" * 129, "a/" * 16 + "a"),
    ],
)
def test_what_is_no_topic_is_refused(text):
    with pytest.raises(BadMessageTopicError):
        message_topics.check_topic(text)


@pytest.mark.parametrize("text", ["", "a/#/b", "a#", "+a", "a/b+/c", "##", "a\0", "#/", "a//+", "$x/#"])
def test_what_is_no_filter_is_refused(text):
    with pytest.raises(BadMessageTopicError):
        message_topics.check_filter(text)


@given(FILTERS, FILTERS, TOPICS)
def test_a_covered_filter_matches_nothing_beyond(wide, narrow, topic):
    if message_topics.covered(narrow, (wide,)) and message_topics.matches(narrow, topic):
        assert message_topics.matches(wide, topic)


@pytest.mark.parametrize(
    ("narrow", "wide", "is_covered"), [("a/b", "a/#", True), ("a/#", "a/+", False), ("#", "+", False)]
)
def test_covering(narrow, wide, is_covered):
    assert message_topics.covered(narrow, (wide,)) is is_covered


@pytest.mark.parametrize("text", ["a/\uffff", "\ufffe/a", "\ufdd0", "\ufdef", "a\U0010ffff"])
def test_what_brokers_take_for_no_character_is_in_no_topic(text):
    with pytest.raises(BadMessageTopicError, match="no character"):
        message_topics.check_topic(text)
    assert message_topics.check_topic("a/\ufdcf\ufdf0\ufffd")
