"""A limit that ends a guest is named by its field in `component.toml`: to the client, in log, status and report."""

import pytest
import support
from support import Grants, Limits

from agent.host.engine import image_file, memory_in_use
from agent.host.engine.runtime import memory_plan, reservable_bytes
from agent.host.ipc import host_api
from tests.eventually import eventually

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


def native(code, *, more=""):
    """A guest whose handler runs this; `more` of its core module."""
    handle = (
        f'    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32) {code} (i32.const 64))\n'
    )
    return "(component\n" + HELLO.partition("\n")[2].replace(HANDLE, handle + more, 1)


def beside(module, copies=1):
    """A guest that instantiates a module beside its own, so many times."""
    each = "".join(f"(core instance $c{number} (instantiate $m))" for number in range(copies))
    return HELLO.replace("(component", f"(component {module} {each}", 1)


HANDLE = '    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32) (i32.const 64))\n'
CLOCK = Grants(interfaces=("wasi:io", "wasi:clocks"))
TABLE = "    (table $many 1 funcref)\n"
GROWS = "(if (i32.eq (table.grow $many (ref.null func) (i32.const {})) (i32.const -1)) (then (unreachable)))"
STEP_BY_STEP = (
    "(loop $more (br_if $more (i32.ne (table.grow $many (ref.null func) (i32.const 99)) (i32.const -1)))) (unreachable)"
)
POST = b"POST /bad/ HTTP/1.1\r\nhost: x\r\ncontent-length: 2000\r\n\r\n" + bytes(2000)
OF_A_CALL = {
    "a table at once": (native(GROWS.format(200_000), more=TABLE), Limits(), "(limits.table_elements)"),
    "a table by steps": (native(STEP_BY_STEP, more=TABLE), Limits(table_elements=5000), "at most 5000 elements"),
    "time of its own": ("spin", Limits(call_ms=50), "(limits.call)"),
    "a wait": ("sleep", Limits(idle_ms=100), "(limits.idle)"),
    "all of its time": ("sleep", Limits(idle_ms=5000, total_ms=200), "(limits.total)"),
    "instructions": ("spin", Limits(fuel=10_000), "(limits.fuel)"),
    "its answer": ("large-answer", Limits(response_bytes=1000), "(limits.response)"),
    "a request": ("hello", Limits(request_bytes=1000), "(limits.request)"),
    "its log": ("flood", Limits(log_lines_per_minute=5), "(limits.log_lines_per_minute)"),
}


@pytest.mark.parametrize(
    "share", [pytest.param(False, id="own worker"), pytest.param(True, id="shared worker", marks=pytest.mark.nightly)]
)
@pytest.mark.parametrize("case", OF_A_CALL)
def test_a_limit_that_a_call_meets_is_named_in_its_log(host, neighbour, case, share):
    guest, limits, words = OF_A_CALL[case]
    grants = Grants(interfaces=("wasi:logging/logging",)) if guest == "flood" else CLOCK
    run = support.a_run("bad", 1, grants=grants, limits=limits, share_worker=share)
    reply = host.start(guest, run, fuel=bool(limits.fuel))
    assert isinstance(reply, host_api.Started), reply
    assert bool(host.health("bad").shared_worker) == share
    request = POST if case == "a request" else b"GET /bad/ HTTP/1.1\r\nhost: x\r\n\r\n"
    support.http(host.port, request)
    if case == "its log":
        eventually(lambda: support.http(host.port, request) and words in "\n".join(host.lines_of("bad")), "dropped")
    eventually(lambda: words in "\n".join(host.lines_of("bad")), f"the log names {words}")


MODULE_OF_TABLES = "(core module $m " + "(table 1 funcref)" * 5 + ")"
OF_A_START = {
    "memory": (beside("(core module $m (memory 1000))"), Limits(), "limits.memory, which is 16MiB"),
    "a table": (
        beside("(core module $m (table 5000 funcref))"),
        Limits(table_elements=4999),
        "(limits.table_elements)",
    ),
    "a table of the most": ("huge-table", Limits(), "(limits.table_elements)"),
    "instances": (beside("(core module $m)", 8), Limits(core_instances=8), "(limits.core_instances)"),
    "instances of the most": (beside("(core module $m)", 200), Limits(), "(limits.core_instances)"),
    "tables of one module": (beside(MODULE_OF_TABLES), Limits(core_instances=4), "(limits.core_instances)"),
    "memories of the most": (beside("(core module $m (memory 1))", 40), Limits(core_instances=30), "core_instances)"),
    "memories of one module": (
        beside("(core module $m " + "(memory 1)" * 40 + ")"),
        Limits(),
        "(limits.core_instances)",
    ),
    "time": ("spin-in-start", Limits(start_ms=100), "(limits.start)"),
}


@pytest.mark.parametrize("case", OF_A_START)
def test_a_limit_that_a_start_meets_is_named_in_its_refusal(host, case):
    guest, limits, words = OF_A_START[case]
    refused = host.start(guest, support.a_run("bad", 1, limits=limits))
    assert (type(refused), refused.code) == (host_api.Failed, "start-failed")
    assert words in refused.message


def test_a_module_may_have_several_tables_and_memories(host):
    guest = beside("(core module $m " + "(table 1 funcref)" * 5 + "(table 1 externref) (memory 1) (memory 1))")
    assert isinstance(host.start(guest, support.a_run("many", 1)), host_api.Started)
    assert support.http(host.port, "GET /many/ HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200


def test_a_trap_of_a_guest_that_grows_no_table_names_no_limit_of_tables(host):
    host.start(native("(unreachable)", more=TABLE), support.a_run("bad", 1))
    body = support.http(host.port, "GET /bad/ HTTP/1.1\r\nhost: x\r\n\r\n")[2]
    assert b"unreachable" in body
    assert b"limits" not in body


@pytest.mark.parametrize("content", [b"", b"\x7fELF", bytes(100), b"\x7fELF" + b"\xff" * 200])
def test_a_file_that_is_no_image_grows_no_tables(tmp_path, content):
    path = tmp_path / "image"
    path.write_bytes(content)
    assert not image_file.grows_tables(str(path))
    assert not image_file.grows_tables(str(tmp_path / "none"))
