"""Pure parts of the host: routes, HTTP framing, figures, users, memory plans."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import support

from agent.host.engine.runtime import FULL, NONE, SIZED, memory_plan
from agent.host.http import connection
from agent.host.http.parser import RequestParser
from agent.host.http.routing import RouteTable
from agent.host.ipc import stats_page
from agent.host.supervisor import resources
from agent.host.supervisor.resources import Cgroups
from fleet.protocol import bounds
from fleet.protocol.bounds import MIB
from fleet.protocol.codes import CallOutcome, InstanceState
from fleet.protocol.messages import InstanceHealth


@pytest.mark.parametrize(
    ("host", "target", "instance", "passed_on", "prefix"),
    [
        (b"board", b"/meter/read?n=1", "meter", b"/read?n=1", b"/meter"),
        (b"board", b"/meter", "meter", b"/", b"/meter"),
        (b"board", b"/meter?n=1", "meter", b"/?n=1", b"/meter"),
        (b"board", b"http://board:8080/meter/x", "meter", b"/x", b"/meter"),
        (b"meter.board:8080", b"/read", "meter", b"/read", b""),
        (b"METER.board", b"/web/x", "meter", b"/web/x", b""),
        (b"127.0.0.1:8080", b"/web/", "web", b"/", b"/web"),
    ],
)
def test_a_request_finds_its_instance_by_host_or_by_path(host, target, instance, passed_on, prefix):
    routes = RouteTable()
    routes.up = {"meter": True, "web": True, "127": True}
    route = routes.find(host, target)
    assert (route.instance, route.target, route.prefix, route.status) == (instance, passed_on, prefix, 0)


@pytest.mark.parametrize("target", [b"/", b"/nobody/", b"*", b"", b"/%2e%2e/meter", b"//meter/"])
def test_a_request_for_an_unknown_instance_lists_the_known_ones(target):
    routes = RouteTable()
    routes.up = {"meter": True}
    route = routes.find(b"board", target)
    assert (route.status, "/meter/" in route.why) == (404, True)


def test_an_instance_that_does_not_answer_is_a_503():
    routes = RouteTable()
    routes.up = {"meter": False}
    assert routes.find(b"board", b"/meter/").status == 503


class Requests:
    """What a parser reads: method, target, body and whether the connection stays, of each request."""

    def __init__(self):
        self.seen, self.fields, self._body = [], [], b""

    def head(self, head):
        self._head, self._body = head, b""
        self.fields.append(head.fields)

    def body(self, data):
        self._body += data

    def end(self, _trailers, *, keep_alive):
        self.seen.append((self._head.method, self._head.target, self._body, keep_alive))

    def refused(self, status):
        self.seen.append(status)


def test_requests_come_whole_however_they_are_cut():
    whole = (
        b"POST /a?b HTTP/1.1\r\nHost: x\r\nX-A: 1\r\ncontent-length: 5\r\n\r\nhello"
        b"GET /c HTTP/1.1\r\nhost: x\r\n\r\n"
        b"POST /d HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    )
    for size in (1, 2, 7, 50, len(whole)):
        requests = Requests()
        parser = RequestParser(requests)
        for at in range(0, len(whole), size):
            parser.feed(whole[at : at + size])
        assert requests.seen == [
            (b"POST", b"/a?b", b"hello", True),
            (b"GET", b"/c", b"", True),
            (b"POST", b"/d", b"abc", True),
        ]
        assert connection.lines(requests.fields[0]) == b"host: x\r\nx-a: 1\r\ncontent-length: 5\r\n"


def test_an_offer_to_upgrade_is_answered_in_http_and_the_connection_stays_http():
    requests = Requests()
    offer = b"PUT / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 3\r\n\r\nabc"
    RequestParser(requests).feed(offer + b"GET /next HTTP/1.1\r\nhost: x\r\n\r\n")
    assert requests.seen == [(b"PUT", b"/", b"abc", True), (b"GET", b"/next", b"", True)]


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (199, b""),
        (600, b""),
        (200, b"no colon\r\n"),
        (200, b"a: 1\r\n\r\nHTTP/1.1 200 OK\r\n"),
        (200, b"a: 1\nb: 2\r\n"),
        (200, b"a b: 1\r\n"),
        (200, b": 1\r\n"),
        (200, b"a: \0\r\n"),
        (200, b"a: " + b"x" * 70_000),
    ],
)
def test_a_guest_cannot_break_out_of_its_head(status, fields):
    with pytest.raises(connection.BadAnswerError):
        connection.guest_fields(status, fields, 0, 10)


def test_framing_is_the_hosts_own_business():
    kept = connection.guest_fields(
        200, b"content-length: 99\r\nTransfer-Encoding: chunked\r\nx-a: 1\r\nconnection: close\r\n", 0, 10
    )
    assert kept == b"x-a: 1\r\n"
    answer = connection.answer(204, b"", b"ignored", head=False, keep_alive=True)
    assert b"content-length" not in answer
    assert answer.endswith(b"\r\n\r\n")
    assert connection.answer(200, b"", b"body", head=True, keep_alive=True).endswith(b"content-length: 4\r\n\r\n")


def test_figures_are_read_where_they_are_written():
    fd = stats_page.create_page("test")
    writer, reader = stats_page.StatsPage(fd), stats_page.StatsPage(fd)
    for us in range(1, 1001):
        writer.begin(1, us)
        writer.end(CallOutcome.OK, us, error=us > 990)
    writer.end(CallOutcome.CLIENT_GONE)
    writer.begin(77, 1001)
    figures = reader.read()
    assert reader.number() == 1001
    assert figures.calls == {"ok": 1000, "client-gone": 1}
    assert (figures.errors, figures.began_ns, len(figures.latencies_us)) == (10, 77, 512)
    assert figures.percentile_us(0.99) >= figures.percentile_us(0.5) > 488
    assert stats_page.CallStats().percentile_us(0.99) == 0
    writer.rest()
    assert (reader.number(), reader.began_ns()) == (0, 0)
    # A worker cannot pull the page from under its reader.
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)
    os.close(fd)


def test_whatever_workers_write_into_their_pages_fits_into_a_message():
    """A message with a larger number would be refused, and with it the figures of all instances."""
    fd = stats_page.create_page("test")
    os.pwrite(fd, b"\xff" * stats_page.SIZE, 0)
    total = stats_page.CallStats()
    for _ in range(1000):
        total = total.plus(stats_page.StatsPage(fd).read())
    health = InstanceHealth(
        instance="web",
        target="",
        generation=1,
        state=InstanceState.RUNNING,
        calls=total.calls,
        errors=total.errors,
        denials=total.denials,
        dropped_lines=total.dropped_lines,
        outgoing=total.outgoing,
        cpu_ms=total.cpu_ns // 1_000_000,
        p99_us=total.percentile_us(0.99),
        latencies=total.spread(),
    )
    assert msgspec.json.decode(msgspec.json.encode(health), type=InstanceHealth) == health
    assert health.errors == bounds.NUMBER_MAX
    os.close(fd)


def test_a_user_belongs_to_one_instance_for_good(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "can_assign_users", lambda: True)
    given = resources.UidAllocator(tmp_path / "uids.json")
    first, second = given.allocate("a"), given.allocate("b")
    assert len({first, second, given.allocate("a")}) == 2
    assert min(first, second) >= resources.FIRST
    again = resources.UidAllocator(tmp_path / "uids.json")
    assert (again.allocate("a"), again.allocate("b")) == (first, second)
    assert again.allocate("c") not in {first, second}
    (tmp_path / "uids.json").write_text("torn")
    assert resources.UidAllocator(tmp_path / "uids.json").allocate("z") == first
    monkeypatch.setattr(resources, "can_assign_users", lambda: False)
    assert again.allocate("a") is None


def test_hosts_beside_each_other_give_away_users_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(resources, "can_assign_users", lambda: True)
    assert abs(resources.first_of(Path("/srv/one")) - resources.first_of(Path("/srv/other"))) >= resources.COUNT
    one = resources.UidAllocator(tmp_path / "uids.json").allocate("web")
    assert one == resources.first_of(tmp_path)
    # The packaged place has the first range, which no other has.
    assert resources.first_of(Path("/var/lib/wasmfleet-host")) == resources.FIRST
    firsts = [resources.first_of(tmp_path / str(number)) for number in range(1000)]
    assert resources.FIRST not in firsts
    assert all(resources.FIRST < first < first + resources.COUNT < 1 << 31 for first in firsts)
    # What was given before hosts had ranges of their own stays as it is.
    (tmp_path / "uids.json").write_text(f'{{"old": {resources.FIRST + 3}}}')
    again = resources.UidAllocator(tmp_path / "uids.json")
    assert (again.allocate("old"), again.allocate("new")) == (resources.FIRST + 3, one)


@pytest.mark.parametrize(
    ("bits", "plan"),
    [(46, FULL), (43, FULL), (38, SIZED), (37, SIZED), (34, NONE), (0, NONE)],
)
def test_the_memory_plan_follows_the_address_space(bits, plan):
    assert memory_plan(1 << bits if bits else 0) == plan


@pytest.mark.parametrize("plan", ["FULL", "SIZED", "NONE"])
def test_every_memory_plan_runs_a_guest_and_catches_it_beyond_its_memory(plan, tmp_path):
    code = f"""
import sys
from agent.host.engine.guest import Guest
from agent.host.engine.runtime import Engine
from agent.host.engine.runtime import GuestError
from agent.host.worker.zygote import self_test
from agent.host.engine.runtime import {plan}
from fleet.protocol.manifest import Grants, Limits
engine = Engine(plan={plan})
assert self_test(engine)
open(sys.argv[2], "wb").write(engine.compile(open(sys.argv[1]).read()))
guest = Guest(engine.load(sys.argv[2]), limits=Limits(), grants=Grants(), config={{}}, log=print)
try:
    guest.handle(b"GET", b"/", b"", b"")
except GuestError as error:
    print(error)
"""
    path = support.GUESTS / "answer-1gib.wat"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path), str(tmp_path / "image")],
        cwd=support.ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=_one_gib if plan == "NONE" else None,
    )
    assert "out of bounds" in done.stdout, done.stderr


def _one_gib():
    resource.setrlimit(resource.RLIMIT_AS, (1024 * MIB, 1024 * MIB))


def test_the_fast_codec_and_the_stock_one_say_the_same():
    code = """
from agent.host.engine.guest import use_stock_codec
from agent.host.engine.runtime import Engine
from agent.host.worker.zygote import self_test
engine = Engine()
assert self_test(engine)
use_stock_codec(engine)
assert self_test(engine)
print("same")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=support.ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "same\n", done.stderr


def test_a_component_that_is_none_is_refused_by_the_compiler():
    def compiled(data):
        return subprocess.run(
            [sys.executable, "-m", "agent.host.compiler"],
            cwd=support.ROOT,
            input=data,
            capture_output=True,
            check=False,
        )

    for data, status in ((b"", 2), (b"random bytes", 2), (b"\0asm\x01\0\0\0", 3), (b"\0asm\x0d\0\x01\0garbage", 3)):
        done = compiled(data)
        assert (done.returncode, done.stdout) == (status, b"")
        assert done.stderr.count(b"\n") == 1


def a_cgroup(path, controllers="cpu memory pids"):
    path.mkdir()
    (path / "cgroup.controllers").write_text(controllers)
    (path / "cgroup.subtree_control").write_text("")
    (path / "cgroup.procs").write_text("")
    return path


def test_an_instance_gets_a_share_where_the_host_has_control_groups(tmp_path):
    root = a_cgroup(tmp_path / "fleet-host.service")
    groups = Cgroups(root, pid=100)
    assert groups.available
    # The supervisor left first: a group with members cannot have limited children.
    assert (root / "supervisor" / "cgroup.procs").read_text() == "100"
    assert (root / "cgroup.subtree_control").read_text() == "+memory +pids"
    assert groups.admit("web", 200, workers=2, worker_bytes=1000)
    share = root / "i-web"
    assert [(share / name).read_text() for name in ("memory.max", "pids.max", "cgroup.procs")] == ["2000", "64", "200"]


def test_without_the_memory_controller_or_the_right_to_it_nothing_is_done(tmp_path):
    assert not Cgroups(a_cgroup(tmp_path / "a", controllers="cpu pids"), pid=100).available
    assert not Cgroups(tmp_path / "nothing", pid=100).available
    shared = a_cgroup(tmp_path / "shared")
    (shared / "cgroup.subtree_control").unlink()
    (shared / "cgroup.subtree_control").mkdir()  # writing it fails, as where others live in the group
    groups = Cgroups(shared, pid=100)
    assert not groups.available
    assert (shared / "cgroup.procs").read_text() == "100", "it went back to where it was"
    assert not groups.admit("web", 200, workers=1, worker_bytes=1)
