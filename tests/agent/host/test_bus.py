"""Messages between instances of a device, over the real host and its sandboxed workers."""

import os
import signal
import threading

import pytest

from agent.host.ipc import host_api
from fleet.protocol.manifest import Grants, Http, Limits, OnMessage
from tests import odd_components
from tests.agent.host import host_processes, support
from tests.eventually import eventually

SENDS = Grants(interfaces=("wasi:messaging",), publish_local=("plant/#",))
TAKES = Grants(interfaces=("wasi:messaging", "wasi:logging"), subscribe=("plant/#",))
ALL = OnMessage(topics=("plant/#",))
SOURCE = (support.GUESTS / "receives.wat").read_text()
PATIENT = SOURCE[SOURCE.index("(component") :].replace("(loop $ever (br $ever))", "")
"""The next version of the same component: it does not loop."""


@pytest.fixture
def web(host):
    port = support.free_port()
    reply = host.start("publishes", support.a_run("web", 1, port=port, grants=SENDS))
    assert isinstance(reply, host_api.Started), reply
    return port


def post(port, topic, body=b"21.5", method="POST"):
    head = f"{method} /{topic} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    status, _, answer = support.http(port, head.encode() + body)
    return status, answer.decode()


def receives(host, name="log", number=1, *, guest="receives", trigger=ALL, grants=TAKES, **rest):
    reply = host.start(guest, support.a_run(name, number, trigger=trigger, grants=grants, **rest))
    assert isinstance(reply, host_api.Started), reply
    return reply


def got(host, name="log", count=1):
    """What it has logged, once there is as much: topic and content of each message."""

    def look():
        found = [line.removeprefix("info ") for line in host.lines_of(name) if line.startswith("info ")]
        return found if len(found) >= count else None

    return eventually(look, f"{name} gets {count} messages")


def queue(host, name="log"):
    return host.health(name).messages


def test_a_message_reaches_every_instance_that_subscribes_and_no_other(host, web):
    receives(host, "all")
    receives(host, "some", trigger=OnMessage(topics=("plant/+/temperature", "alarms/#")))
    receives(host, "none", trigger=OnMessage(topics=("plant/boiler",)))
    assert post(web, "plant/boiler/temperature") == (200, "")
    assert post(web, "plant/boiler/pressure", b"3") == (200, "")
    assert post(web, "plant/boiler", b"on") == (200, "")
    assert got(host, "all", 3) == [
        "plant/boiler/temperature: 21.5",
        "plant/boiler/pressure: 3",
        "plant/boiler: on",
    ]
    assert got(host, "some") == ["plant/boiler/temperature: 21.5"]
    assert got(host, "none") == ["plant/boiler: on"]
    assert eventually(lambda: (now := queue(host, "all")).delivered == 3 and now, "all are handled").waiting == 0


def test_what_is_granted_to_the_operator_goes_there_too_and_nothing_else_does(host):
    grants = Grants(interfaces=("wasi:messaging",), publish=("plant/total",), publish_local=("plant/#",))
    port = support.free_port()
    assert isinstance(host.start("publishes", support.a_run("web", 1, port=port, grants=grants)), host_api.Started)
    receives(host)
    assert post(port, "plant/raw", b"1") == (200, "")
    answers = []
    asking = threading.Thread(target=lambda: answers.append(post(port, "plant/total", b"2")), daemon=True)
    asking.start()
    found = host.ask(host_api.TakeMessages, session="", done=0, wait_s=30)
    assert [(each.topic, each.data) for each in found.messages] == [("plant/total", b"2")]
    host.ask(host_api.TakeMessages, session=found.session, done=found.messages[0].number, wait_s=0)
    asking.join(60)
    assert answers == [(200, "")]
    assert got(host, count=2) == ["plant/raw: 1", "plant/total: 2"]


@pytest.mark.parametrize(
    ("topic", "word"),
    [
        ("other/x", "no topic of grants.publish matches 'other/x'"),
        ("plant/+/x", "wildcard"),
        ("$share/log/plant/+", "no $ at first"),
        ("plant/" + "x" * 4096, "at most 256 bytes"),
    ],
)
def test_no_message_goes_where_its_sender_may_not_send(host, web, topic, word):
    receives(host)
    status, said = post(web, topic)
    assert status == 502
    assert word in said
    assert host.health("web").denials == 1
    assert queue(host).delivered == 0


def test_an_instance_gets_nothing_that_its_grants_do_not_cover(host, web):
    receives(host, "less", grants=Grants(interfaces=TAKES.interfaces, subscribe=("plant/open/+",)))
    receives(host, "none", grants=Grants(interfaces=TAKES.interfaces))
    receives(host, "all")
    for topic in ("plant/shut", "plant/open/x"):
        assert post(web, topic) == (200, "")
    assert got(host, "all", 2) == ["plant/shut: 21.5", "plant/open/x: 21.5"]
    assert got(host, "less") == ["plant/open/x: 21.5"]
    assert queue(host, "none").delivered == queue(host, "none").waiting == 0


def test_a_component_without_the_handler_does_not_start(host):
    run = support.a_run("web", 1, trigger=Http(), more_triggers=(ALL,), port=support.free_port(), grants=TAKES)
    reply = host.start("hello", run)
    assert (reply.code, "it exports no wasi:messaging/incoming-handler" in reply.message) == ("start-failed", True)


def test_a_message_that_no_run_handles_is_a_dead_letter_and_those_behind_it_are_handled(host, web):
    poisons = {
        "traps": (b"T", "wasm `unreachable` instruction executed"),
        "loops": (b"L", "it used up its time for one call"),
        "fails": (b"E", "its message handler failed: other: not now"),
        "no-text": (b"\xff\xfe", ""),
    }
    for name, (body, _why) in poisons.items():
        receives(host, name, trigger=OnMessage(topics=(f"plant/{name}",)), limits=Limits(call_ms=50))
        assert post(web, f"plant/{name}", body) == (200, "")
        assert post(web, f"plant/{name}", b"1") == (200, "")
    faults = {}
    while faults.keys() != poisons.keys():
        fault = host.event(lambda event: isinstance(event, host_api.Trapped) and event.instance not in faults)
        faults[fault.instance] = fault.message
    for name, (_body, why) in poisons.items():
        figures = eventually(lambda name=name: (now := queue(host, name)).delivered and now, "the one behind it")
        assert why in faults[name]
        assert (figures.dead_letters, figures.failed, figures.delivered, figures.waiting) == (1, 5, 1, 0)
        assert f"plant/{name}: 1" in got(host, name)
        (line,) = [line for line in host.lines_of(name) if "dead letter" in line]
        assert f"a message on plant/{name} from web is a dead letter: it was handed over 5 times" in line
        assert why in line


def test_requests_and_messages_of_a_guest_of_wasi_http_share_its_instance(host, web):
    inner = SOURCE[SOURCE.index("(component") + len("(component") : SOURCE.rindex(")")]
    guest = odd_components.server(inner.replace("$types", "$of-messages").replace("$handle", "$take"))
    port = support.free_port()
    receives(host, guest=guest, trigger=Http(), more_triggers=(ALL,), port=port)
    assert post(web, "plant/x", b"1") == (200, "")
    support.http(port)
    assert post(web, "plant/x", b"T") == (200, "")
    support.http(port)
    assert post(web, "plant/x", b"2") == (200, "")
    eventually(lambda: queue(host).delivered == 2, "both are handled")
    assert [line for line in got(host) if line != "plant/x: T"] == ["plant/x: 1", "plant/x: 2"]
    assert (queue(host).dead_letters, host.health("log").restarts, host.health("log").workers) == (1, 0, 1)


def test_content_may_be_any_bytes(host, web):
    receives(host)
    assert post(web, "plant/x", b"B" + bytes(range(256)) * 60) == (200, "")
    assert post(web, "plant/x", b"") == (200, "")
    eventually(lambda: queue(host).delivered == 2, "both are handled")
    assert queue(host).failed == 0


def test_a_queue_without_room_holds_its_senders_up_and_nobody_else(host, web):
    limits = Limits(queue_messages=1, call_ms=2_000)
    receives(host, limits=limits)
    receives(host, "other", trigger=OnMessage(topics=("plant/other",)))
    port = support.free_port()
    slow = support.a_run("slow", 1, port=port, grants=SENDS, limits=Limits(idle_ms=500))
    assert isinstance(host.start("publishes", slow), host_api.Started)
    assert post(web, "plant/x", b"L") == (200, "")
    assert post(port, "plant/x", b"1") == (500, ""), "it times out"
    assert post(port, "plant/other", b"2")[0] == 500, "which goes to both"
    assert queue(host, "other").delivered == 0
    receives(host, number=2, guest=PATIENT, limits=limits)
    assert post(web, "plant/other", b"3") == (200, "")
    eventually(lambda: "plant/other: 3" in got(host, "other"), "it reaches the other")


def test_a_queue_that_drops_the_oldest_holds_nobody_up(host, web):
    trigger = OnMessage(topics=("plant/#",), full="drop-oldest")
    receives(host, trigger=trigger, limits=Limits(queue_messages=3, call_ms=2_000))
    assert post(web, "plant/x", b"L") == (200, "")
    for number in range(6):
        assert post(web, "plant/x", b"%d" % number) == (200, "")
    assert (queue(host).dropped, queue(host).waiting) == (4, 3)
    receives(host, number=2, guest=PATIENT, trigger=trigger)
    assert eventually(lambda: (found := got(host)) and found[-1] == "plant/x: 5" and found, "the newest")[-2:] == [
        "plant/x: 4",
        "plant/x: 5",
    ]
    assert any("messages for it were dropped" in line for line in host.lines_of("log"))


def test_a_swap_of_the_receiver_loses_none_and_keeps_their_order(host, web):
    receives(host, limits=Limits(call_ms=300))
    assert post(web, "plant/x", b"L") == (200, "")
    posted = []

    def post_all():
        posted.extend(post(web, "plant/x", b"%d" % number) for number in range(40))

    sending = threading.Thread(target=post_all, daemon=True)
    sending.start()
    assert receives(host, number=2, guest=PATIENT).replaced == 1
    assert receives(host, number=3, guest=PATIENT, swap="replace").replaced == 2
    sending.join(60)
    assert posted == [(200, "")] * 40
    eventually(lambda: queue(host).waiting == 0, "all are handled")
    numbers = [line.removeprefix("plant/x: ") for line in got(host)]
    first_seen = list(dict.fromkeys(numbers))
    assert first_seen == ["L", *map(str, range(40))]
    assert queue(host).dead_letters == queue(host).dropped == 0


def test_a_message_is_handed_over_again_after_its_worker_was_killed(host, web):
    receives(host, limits=Limits(call_ms=60_000, total_ms=60_000))
    before = set(host_processes.lanes_of(host))
    receives(host, "victim", limits=Limits(call_ms=60_000, total_ms=60_000), trigger=OnMessage(topics=("plant/v",)))
    (victim,) = set(host_processes.lanes_of(host)) - before
    assert post(web, "plant/v", b"L") == (200, "")
    got(host, "victim")
    os.kill(victim, signal.SIGKILL)
    assert got(host, "victim", 2)[:2] == ["plant/v: L"] * 2
    assert queue(host, "victim").failed == 1
    assert queue(host, "victim").waiting == 1


@pytest.mark.nightly
def test_a_storm_is_cut_off_and_the_receiver_goes_on(host):
    port = support.free_port()
    storms = support.a_run("web", 1, port=port, grants=SENDS, limits=Limits(call_ms=60_000, total_ms=60_000))
    assert isinstance(host.start("publishes", storms), host_api.Started)
    receives(host, limits=Limits(log_lines_per_minute=1))
    status, said = post(port, "plant/storm", b"x", "LOCK")
    assert (status, said) == (503, "6000 messages a minute are allowed")
    assert "trapped" not in host.health("log").calls
    assert host.health("web").restarts == host.health("log").restarts == 0


def test_after_the_supervisor_was_killed_messages_flow_again(tmp_path):
    def begin():
        host = support.Host(tmp_path)
        port = support.free_port()
        assert isinstance(host.start("publishes", support.a_run("web", 1, port=port, grants=SENDS)), host_api.Started)
        receives(host, limits=Limits(call_ms=60_000, total_ms=60_000))
        return host, port

    host, port = begin()
    try:
        assert post(port, "plant/x", b"L") == (200, "")
        got(host)
        os.kill(host.process.pid, signal.SIGKILL)
        host.process.wait(60)
    finally:
        host.close()
    host, port = begin()
    try:
        assert post(port, "plant/x", b"1") == (200, "")
        eventually(lambda: queue(host).delivered == 1, "it is handled")
    finally:
        host.close()
