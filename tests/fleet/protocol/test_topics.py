"""One schema builds and parses every topic."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleet.protocol import names, topics
from fleet.protocol.topics import BadTopicError, Down, Topic, Up

devices = st.from_regex(r"[a-z0-9-]{1,54}-[0-9a-f]{8}", fullmatch=True)
channels = st.sampled_from([*Down, *Up])


@given(devices, channels)
def test_what_is_built_parses_back(device, channel):
    topic = Topic(device, channel)
    assert Topic.parse(str(topic)) == topic


def test_the_words_on_the_wire():
    device = "kitchen-00000000"
    shard = names.shard(device)
    assert str(Topic(device, Down.DESIRED)) == f"fleet/v1/{shard}/kitchen-00000000/down/desired"
    assert topics.device_subscriptions(device) == (f"fleet/v1/{shard}/{device}/down/+", "fleet/v1/all/poke")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fleet/v1/all/poke",
        "fleet/v1/00/kitchen-00000000/down/desired",  # another shard's
        "fleet/v2/b2/kitchen-00000000/down/desired",
        "fleet/v1/b2/kitchen-00000000/up/desired",  # a device may not say what the server says
        "fleet/v1/b2/kitchen-00000000/sideways/state",
        "fleet/v1/b2/../up/state",
        "fleet/v1/b2/+/up/state",
        "fleet/v1/b2/kitchen-00000000/up/state/more",
    ],
)
def test_foreign_topics_are_refused(text):
    with pytest.raises(BadTopicError):
        Topic.parse(text)


@given(st.text(max_size=300))
def test_any_text_is_a_topic_or_refused(text):
    with contextlib.suppress(BadTopicError):
        assert str(Topic.parse(text)) == text


def test_a_server_process_takes_its_shards():
    assert topics.server_subscriptions(("0a", "0b")) == ("fleet/v1/0a/+/up/+", "fleet/v1/0b/+/up/+")
