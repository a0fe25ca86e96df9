"""A limit that ends a guest is named by its field in `component.toml`: to the client, in log, status and report."""

import pytest
import support
from support import Limits

from agent.host.engine import memory_in_use
from agent.host.engine.runtime import memory_plan, reservable_bytes
from agent.host.ipc import host_api

MODULE = '(core module $m (memory 1) (table 1 funcref) (func (export "f")))'
HELLO = support.wasm("hello").decode().partition("\n")[2].strip()


@pytest.mark.skipif(not memory_plan(reservable_bytes()).reservation_bytes, reason="memories are not reserved here")
@pytest.mark.parametrize("megabytes", [4, 16])
def test_a_guest_that_traps_for_want_of_memory_names_the_limit(host, neighbour, megabytes):
    """Its allocator is told -1 by the engine, and traps like any failed assertion; its symbols are stripped."""
    port = support.free_port()
    limits = Limits(memory_bytes=megabytes << 20)
    assert isinstance(host.start("hoard", support.a_run("bad", 1, port=port, limits=limits)), host_api.Started)
    words = f"KiB of the {megabytes}MiB that limits.memory allows: wasm trap: wasm `unreachable`"
    assert words in support.http(port)[2].decode()
    trapped = host.event(lambda event: isinstance(event, host_api.Trapped))
    assert words in trapped.message.splitlines()[0]
    assert any(words in line for line in trapped.log)
    assert any(words in line for line in host.ask(host_api.Logs, instance="bad").lines)


def test_a_trap_of_a_guest_that_has_memory_left_names_no_limit(host):
    port = support.free_port()
    host.start("trap", support.a_run("bad", 1, port=port))
    assert b"limits" not in support.http(port)[2]
    assert "limits" not in host.event(lambda event: isinstance(event, host_api.Trapped)).message


def test_too_many_core_instances_name_the_limit(host):
    copies = "".join(f"(core instance $c{number} (instantiate $m))" for number in range(8))
    guest = HELLO.replace("(component", f"(component {MODULE} {copies}", 1)
    refused = host.start(guest, support.a_run("bad", 1, limits=Limits(core_instances=4)))
    assert (type(refused), refused.code) == (host_api.Failed, "start-failed")
    assert "more than 4 core instances, memories or tables (limits.core_instances)" in refused.message
    assert isinstance(host.start(guest, support.a_run("bad", 1, limits=Limits(core_instances=9))), host_api.Started)


def test_a_map_that_cannot_be_read_names_nothing(tmp_path, monkeypatch):
    memory = memory_in_use.MemoryInUse(1, 1 << 60)
    assert memory.almost_all() == 0
    monkeypatch.setattr(memory_in_use.os, "open", lambda *_: (_ for _ in ()).throw(OSError))
    memory_in_use.watch(1, 1)
    assert memory_in_use.watched == []
