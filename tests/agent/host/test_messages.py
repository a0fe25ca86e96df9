"""wasi:messaging over the real host and its sandboxed workers: granted, denied, and guests that storm."""

import threading

import pytest

from agent.host.ipc import host_api, message_api
from fleet.protocol import bounds
from fleet.protocol.manifest import Grants, Limits
from tests.agent.host import support

PUBLISHES = Grants(interfaces=("wasi:messaging",), publish=("plant/#",))


@pytest.fixture
def web(host):
    """A component that publishes what it is sent, and the port that it answers on."""

    def start(*, grants=PUBLISHES, **rest):
        port = support.free_port()
        reply = host.start("publishes", support.a_run("web", 1, port=port, grants=grants, **rest))
        assert isinstance(reply, host_api.Started), reply
        return port

    return start


def post(port, topic, body=b"21.5", method="POST"):
    head = f"{method} /{topic} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    status, _, answer = support.http(port, head.encode() + body)
    return status, answer.decode()


class Later:
    """Work in a thread, whose result is awaited."""

    def __init__(self, work, *arguments):
        self._result = None
        self._thread = threading.Thread(target=self._run, args=(work, arguments), daemon=True)
        self._thread.start()

    def _run(self, work, arguments):
        self._result = work(*arguments)

    def is_running(self):
        return self._thread.is_alive()

    def result(self):
        self._thread.join(60)
        assert not self._thread.is_alive()
        return self._result


def take(host, before=None, refused=None, wait_s=30):
    """Ask for messages as the agent does, once those of `before` are kept."""
    done = 0 if before is None or not before.messages else before.messages[-1].number
    session = "" if before is None else before.session
    reply = host.ask(host_api.TakeMessages, session=session, done=done, refused=refused or {}, wait_s=wait_s)
    assert isinstance(reply, host_api.Messages), reply
    return reply


def test_a_message_is_acknowledged_once_the_agent_keeps_it(host, web):
    port = web()
    sent = Later(post, port, "plant/boiler")
    found = take(host)
    (message,) = found.messages
    assert (message.instance, message.topic, message.data) == ("web", "plant/boiler", b"21.5")
    assert (message.content_type, message.metadata) == ("text/plain", (("unit", "C"),))
    assert take(host).messages == found.messages, "an agent that was started again gets it again"
    assert take(host, found, wait_s=0).messages == ()
    assert sent.result() == (200, "")
    second = Later(post, port, "plant/boiler", b"22")
    after = take(host, found)
    assert [each.data for each in after.messages] == [b"22"]
    assert after.messages[0].number > message.number
    take(host, after, wait_s=0)
    assert second.result() == (200, "")


def test_the_component_hears_why_the_device_does_not_keep_it(host, web):
    port = web()
    sent = Later(post, port, "plant/boiler")
    found = take(host)
    why = "the device keeps at most 1 KiB of messages"
    take(host, found, {found.messages[0].number: why}, wait_s=0)
    assert sent.result() == (503, why)


def test_without_an_agent_it_times_out_within_the_limit_on_waiting(host, web):
    port = web(limits=Limits(idle_ms=500))
    assert post(port, "plant/boiler") == (500, "")
    take(host, take(host, wait_s=0), wait_s=0)
    assert host.health("web").restarts == 0
    assert "trapped" not in host.health("web").calls


@pytest.mark.parametrize(
    ("topic", "word"),
    [
        ("other/boiler", "no topic of grants.publish matches 'other/boiler'"),
        ("plants", "no topic of grants.publish matches 'plants'"),
        ("plant/+", "wildcard"),
        ("plant//x", "none empty"),
        ("plant/" + "x" * 300, "at most 256 bytes"),
        ("plant/" + "x/" * 20 + "y", "1 to 16 levels"),
        ("$SYS/x", "no $ at first"),
    ],
)
def test_a_topic_that_is_not_granted_or_none_at_all_is_denied_counted_and_named_once(host, web, topic, word):
    port = web()
    for _ in range(3):
        status, said = post(port, topic)
        assert status == 502
        assert word in said
    assert host.health("web").denials == 3
    lines = [line for line in host.lines_of("web") if "wasi:messaging/producer.send is denied" in line]
    assert len(lines) == 1


def test_without_topics_every_message_is_denied_and_without_the_grant_nothing_starts(host, web):
    port = web(grants=Grants(interfaces=("wasi:messaging",)))
    assert post(port, "plant/boiler")[0] == 502
    reply = host.start("publishes", support.a_run("other", 1, grants=Grants(publish=("plant/#",))))
    assert isinstance(reply, host_api.Failed)
    assert "wasi:messaging/types@0.2.0-draft" in reply.message


def test_a_message_that_is_too_large_is_refused(host, web):
    port = web()
    status, said = post(port, "plant/x", b"x" * (bounds.MESSAGE_MAX_BYTES + 1))
    assert (status, said) == (503, "the message has 16385 bytes, at most 16384 are taken")
    status, said = post(port, "plant/x", b"x" * 200_000)
    assert status == 503
    sent = Later(post, port, "plant/x", b"x" * bounds.MESSAGE_MAX_BYTES)
    found = take(host)
    assert len(found.messages[0].data) == bounds.MESSAGE_MAX_BYTES
    take(host, found, wait_s=0)
    assert sent.result() == (200, "")


def test_messages_that_are_made_and_never_sent_take_each_others_place(host, web):
    port = web()
    for _ in range(5):
        status, said = post(port, "plant/x", method="MOVE")
        assert (status, said) == (503, "more than 32 messages were made before this one was sent")


def test_a_storm_of_messages_is_cut_off_and_harms_no_neighbour(host, web):
    port, quiet = web(), support.free_port()
    run = support.a_run("quiet", 1, port=quiet, grants=PUBLISHES)
    assert isinstance(host.start("publishes", run), host_api.Started)
    storm = Later(post, port, "plant/storm", b"x", "LOCK")
    asked = Later(post, quiet, "plant/quiet")
    counts = {"web": 0, "quiet": 0}
    found = None
    while storm.is_running():
        found = take(host, found, wait_s=1)
        for each in found.messages:
            counts[each.instance] += 1
    assert storm.result() == (503, "600 messages a minute are allowed")
    assert asked.result() == (200, "")
    assert counts["quiet"] == 1
    assert message_api.MESSAGES_A_MINUTE <= counts["web"] < 2 * message_api.MESSAGES_A_MINUTE
