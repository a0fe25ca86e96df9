"""wasmfleet:metrics over the real host and its sandboxed workers: counted, denied, and guests that storm."""

import pytest

from agent.host.interfaces import metrics
from agent.host.ipc import host_api
from fleet.protocol.manifest import Grants, Limits
from fleet.protocol.metrics import BOUNDS, SERIES_MAX
from tests import odd_components
from tests.agent.host import support

MEASURES = Grants(interfaces=("wasmfleet:metrics",))


@pytest.fixture
def web(host):
    """A component that counts what it is told to, and the port that it answers on."""

    def start(number=1, port=None, **rest):
        port = port or support.free_port()
        reply = host.start("measures", support.a_run("web", number, port=port, **{"grants": MEASURES, **rest}))
        assert isinstance(reply, host_api.Started), reply
        return port

    return start


def ask(port, path, method="GET", body=b""):
    head = f"{method} /{path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
    return support.http(port, head.encode() + body)[0]


def figures(host, instance="web"):
    found = host.health(instance).metrics
    return {(each.name, *each.labels.values()): each for each in found or ()}


def test_counters_gauges_and_histograms_are_in_health(host, web):
    port = web()
    for path, method, body in [
        ("read_errors?a", "GET", b""),
        ("read_errors_total?a", "GET", b"12"),
        ("read_errors?b", "GET", b""),
        ("litres", "POST", b"x" * 30),
        ("litres", "POST", b"x" * 10),
        ("size", "PUT", b""),
        ("size", "PUT", b"x" * 20),
    ]:
        assert ask(port, path, method, body) == 200
    found = figures(host)
    assert set(found) == {("read_errors", "a"), ("read_errors", "b"), ("litres",), ("size",)}
    assert (found["read_errors", "a"].kind, found["read_errors", "a"].value) == ("counter", 4)
    assert (found["read_errors", "b"].value, found["read_errors", "b"].labels) == (1, {"v": "b"})
    litres = found["litres",]
    assert (litres.kind, litres.value, litres.total, litres.count) == ("gauge", 10, 40, 2)
    size = found["size",]
    assert (size.kind, size.value, size.count) == ("histogram", 20, 2)
    assert [bound for bound, count in zip(BOUNDS, size.buckets, strict=False) if count] == [0.001, 20]


def test_figures_outlive_a_trap_and_a_worker_and_begin_anew_with_a_version(host, web):
    port = web(limits=Limits(concurrency=1))
    assert ask(port, "seen") == 200
    assert ask(port, "seen", "OPTIONS") == 500
    assert ask(port, "seen") == 200
    assert isinstance(host.ask(host_api.Restart, instance="web"), host_api.Done)
    assert ask(port, "seen") == 200
    assert figures(host)["seen",].value == 3
    web(2, port)
    assert figures(host) == {}
    assert ask(port, "seen") == 200
    assert figures(host)["seen",].value == 1


@pytest.mark.parametrize(
    ("path", "method", "said"),
    [
        ("1st", "GET", "'1st' is no name of a metric"),
        ("__x", "GET", "'__x' is no name of a metric"),
        ("x_bucket", "GET", "'x_bucket' ends with _bucket"),
        ("x_total", "POST", "'x_total' ends with _total"),
        ("x", "DELETE", "'x': nan is no number from 0 to 1e+15"),
        ("x", "MOVE", "has more than 64 characters"),
        ("x", "COPY", "60000 labels, at most 8 are taken"),
        ("x?" + "y" * 240, "GET", "x and its labels have more than 240 bytes"),
    ],
)
def test_what_is_no_figure_is_denied_counted_and_named_once(host, web, path, method, said):
    port = web()
    for _ in range(3):
        assert ask(port, path, method) == 200
    assert figures(host) == {}
    assert host.health("web").denials == 3
    lines = [line for line in host.lines_of("web") if "wasmfleet:metrics/metrics." in line]
    assert len(lines) == 1
    assert "is denied" in lines[0]
    assert said in lines[0]


def test_a_name_has_one_kind_and_an_instance_so_many_series(host, web):
    port = web()
    for number in range(SERIES_MAX + 10):
        assert ask(port, f"seen?{number}") == 200
    assert ask(port, "seen", "POST") == 200
    assert ask(port, "seen?5") == 200
    found = figures(host)
    assert len(found) == SERIES_MAX
    assert found["seen", "5"].value == 2
    assert host.health("web").denials == 11
    assert any("seen is a counter" in line for line in host.lines_of("web"))
    assert any("64 names with different labels are there" in line for line in host.lines_of("web"))


def test_without_the_grant_nothing_starts(host):
    reply = host.start("measures", support.a_run("web", 1, grants=Grants()))
    assert isinstance(reply, host_api.Failed)
    assert "wasmfleet:metrics/metrics@0.1.0" in reply.message


def test_a_storm_ends_with_its_call_and_harms_no_neighbour(host, web):
    port, quiet = web(limits=Limits(call_ms=200)), support.free_port()
    run = support.a_run("quiet", 1, port=quiet, grants=MEASURES)
    assert isinstance(host.start("measures", run), host_api.Started)
    assert ask(port, "seen", "LOCK") == 504
    assert ask(quiet, "seen") == 200
    assert 0 < figures(host)["seen",].value <= metrics.CALLS_A_MINUTE
    assert figures(host, "quiet")["seen",].value == 1


def test_instances_in_one_worker_have_figures_of_their_own(host, web):
    ports = [web(share_worker=True)]
    ports.append(support.free_port())
    run = support.a_run("beside", 1, port=ports[1], grants=MEASURES, share_worker=True)
    assert isinstance(host.start("measures", run), host_api.Started)
    for port in (*ports, ports[1]):
        assert ask(port, "seen") == 200
    assert host.health("web").shared_worker == host.health("beside").shared_worker != ""
    assert (figures(host)["seen",].value, figures(host, "beside")["seen",].value) == (1, 2)


BORN = """
  (import "wasmfleet:metrics/metrics@0.1.0" (instance $metrics (export "counter-add"
    (func (param "name" string) (param "labels" (list (tuple string string))) (param "value" f64)))))
  (core module $words (memory (export "memory") 1) (data (i32.const 16) "born"))
  (core instance $words (instantiate $words))
  (core func $add (canon lower (func $metrics "counter-add") (memory (core memory $words "memory"))))
  (core module $starts
    (import "" "add" (func $add (param i32 i32 i32 i32 f64)))
    (func $start (call $add (i32.const 16) (i32.const 4) (i32.const 32) (i32.const 0) (f64.const 1)))
    (start $start))
  (core instance $started (instantiate $starts (with "" (instance (export "add" (func $add))))))
"""


def test_a_guest_of_wasi_http_counts_over_all_its_instances(host):
    port = support.free_port()
    reply = host.start(odd_components.server(BORN), support.a_run("web", 1, port=port, grants=MEASURES))
    assert isinstance(reply, host_api.Started), reply
    before = figures(host)["born",].value
    for _ in range(3):
        support.http(port)
    assert figures(host)["born",].value >= before + 2
