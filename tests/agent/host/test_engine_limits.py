"""Limits kept by the engine: tables and core instances."""

import msgspec
import pytest
import support
from support import Limits

from agent.config import Policy
from agent.host.ipc import framing, host_api
from fleet.protocol import manifest

GROWS = """
    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
      (if (i32.eq (table.grow $many (ref.null func) (i32.const 600)) (i32.const -1)) (then (unreachable)))
      (i32.const 64))
    (table $many 100 funcref)
"""
HANDLE = '    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32) (i32.const 64))\n'


def hello():
    text = support.wasm("hello").decode().partition("\n")[2]
    assert HANDLE in text
    return text


def grows_its_table():
    """Each request adds six hundred elements to a table, and traps where it does not get them."""
    return hello().replace(HANDLE, GROWS)


def of_many_modules(count):
    """It instantiates `count` core modules that do nothing, beside its own."""
    many = "\n".join(f"  (core instance $n{number} (instantiate $nothing))" for number in range(count))
    return hello().replace("(component\n", f"(component\n  (core module $nothing)\n{many}\n", 1)


def test_a_table_grows_to_its_limit_and_no_further(host, neighbour):
    port = support.free_port()
    limits = Limits(table_elements=1300)
    assert isinstance(
        host.start(grows_its_table(), support.a_run("bad", 1, port=port, limits=limits)), host_api.Started
    )
    # 700, 1300, and then a fresh one, since a trap ends the old.
    assert [support.http(port)[0] for _ in range(5)] == [200, 200, 500, 200, 200]
    health = host.health("bad")
    assert (health.calls, health.restarts) == ({"ok": 4, "guest-trap": 1}, 0)


@pytest.mark.parametrize(
    ("guest", "limits", "words"),
    [
        (grows_its_table(), Limits(table_elements=99), "table"),
        (of_many_modules(8), Limits(core_instances=8), "instance"),
        (of_many_modules(200), Limits(), "instance"),
    ],
    ids=["table", "instances", "instances beyond any limit"],
)
def test_what_asks_for_more_at_its_start_is_refused_and_says_of_what(host, neighbour, guest, limits, words):
    reply = host.start(guest, support.a_run("bad", 1, port=support.free_port(), limits=limits))
    assert (type(reply), reply.code) == (host_api.Failed, "start-failed"), reply
    assert words in reply.message


def test_what_stays_within_starts(host):
    limits = Limits(core_instances=9, table_elements=100)
    reply = host.start(of_many_modules(8), support.a_run("good", 1, port=support.free_port(), limits=limits))
    assert isinstance(reply, host_api.Started), reply


def test_the_devices_owner_bounds_both():
    policy = Policy(table_elements=500, core_instances=4)
    narrowed = policy.limit(Limits())
    assert (narrowed.table_elements, narrowed.core_instances) == (500, 4)
    assert policy.limit(Limits(table_elements=7)).table_elements == 7


@pytest.mark.parametrize("name", Limits.__struct_fields__)
def test_a_signed_limit_below_nothing_is_refused_where_it_is_read(name):
    """The engine takes a number below 0 for no limit, and the smaller of it and the owner's is that."""
    made = support.a_run("bad", 1).manifest.plain()
    made["limits"][name] = -1
    with pytest.raises(manifest.BadManifestError, match=rf"limits\.{name}\b"):
        manifest.convert(made)
    if name not in manifest.MAY_BE_NONE:
        made["limits"][name] = 0
        with pytest.raises(manifest.BadManifestError, match="at least 1"):
            manifest.convert(made)


def test_the_host_takes_no_such_limit_from_its_agent_either(host):
    plain = msgspec.to_builtins(support.a_run("bad", 1))
    plain["limits"]["memory_bytes"] = -1
    with host.connect() as sock:
        framing.send_packet(sock, msgspec.json.encode({"type": "start", "id": 1, "run": plain}))
        reply = host_api.receive_from_host(sock)
    assert isinstance(reply, host_api.Failed)
    assert "memory_bytes" in reply.message
    assert host.ask(host_api.Status).instances == ()
