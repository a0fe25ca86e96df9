"""Counts that a change must not raise unseen: modules at start, memory of a worker, what a request costs.

None of them is a time. `COUNTS` holds what was measured; a count more than a tenth away from it fails, also below: then
record the new one here, and say in the commit what changed it. A few counts depend on the order in which two processes
get the processor; for these a range is recorded, and its ends have the same tenth. How often a process waits is for the
scheduler to say, and counted in `make nightly` alone.
"""

import contextlib
import math
import mmap
import os
import platform
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import support
from channel_worker import ChannelWorker, Zygote
from counted.sitecustomize import COUNTERS, SLOTS
from host_processes import children

from agent.host.ipc import framing, host_api, worker_api
from fleet.protocol.manifest import Limits
from tests.eventually import eventually

REQUESTS = 20
BATCHES = 10
"""At most, until the cheapest is as recorded: on a busy machine calls take so long that the supervisor hears of it."""
COUNTED = Path(__file__).with_name("counted")
MANY = 100_000
GUESTS = {
    "native": ("hello", Limits(requests_per_instance=MANY)),
    "fresh": ("probe", Limits(requests_per_instance=1)),
    "reused": ("probe", Limits(requests_per_instance=MANY)),
}

COUNTS = {
    "modules": {"agent": 392, "supervisor": 251, "worker": 221},
    "private kB": {"native": 4400, "wasi:http": 5600},
    "calls of Python": {"native": 65, "fresh": 165, "reused": 0},
    "crossings": {"native": 3, "fresh": 29.3, "reused": 0},
    # Without waiting: the router gets a guest's two frames in one piece or in two.
    "system calls of the router": {"native": 4, "fresh": (4, 5), "reused": (4, 5)},
    # Of a fresh one, four give memory back: the guest's, and the adapter's with its shims for streams and for clocks.
    "system calls of the worker": {"native": 4, "fresh": 9, "reused": 3},
    # The scheduler says whether something has come when a process would wait, and who waits for a lock.
    "calls of the router to wait": {"native": (0, 3), "fresh": (0, 4), "reused": (0, 4)},
    "calls of the worker to wait": {"native": (0, 1), "fresh": (0, 8), "reused": (0, 8)},
    "context switches of the router": {"native": (0, 3), "fresh": (0, 4), "reused": (0, 4)},
    "context switches of the worker": {"native": (0, 3), "fresh": (0, 8), "reused": (0, 8)},
}
WAITING = {"epoll_wait", "epoll_pwait", "futex", "poll", "ppoll", "getpid"}


def wrong(kind, name, count):
    """Say how a count differs from what is recorded, if it does; (least, most) stands for a range."""
    recorded = COUNTS[kind][name]
    least, most = recorded if isinstance(recorded, tuple) else (recorded, recorded)
    return "" if least * 0.9 <= count <= most * 1.1 else f"{kind}, {name}: {count:g}, recorded are {recorded}"


def check(kind, found):
    """Compare counts with those recorded."""
    assert not [text for name, count in found.items() if (text := wrong(kind, name, count))]


# Modules that a process has loaded when it begins. Router and egress are forks of the supervisor, workers of a zygote.

PROGRAMS = {
    "agent": "agent.cli, agent.service",
    "supervisor": "agent.host.cli",
    "worker": "agent.host.worker.zygote",
}
OPTIONAL = ("pkcs11", "asn1crypto", "systemd")  # libraries load these if they are there
NEVER = {
    "agent": {"importlib.metadata", "zipfile", "tarfile", "difflib", "httpx", "wasmtime"},
    "supervisor": {"importlib.metadata", "email", "pickle", "difflib", "http.client", "cryptography", "wasmtime"},
    "worker": {
        "importlib.metadata",
        "importlib.resources",
        "email",
        "zipfile",
        "gzip",
        "asyncio",
        "ssl",
        "http.client",
    },
}
LISTED = """
import sys
for name in {optional}:
    sys.modules[name] = None
before = set(sys.modules)
import {modules}
print(*sorted(name for name in set(sys.modules) - before))
"""


def modules(program):
    code = LISTED.format(optional=OPTIONAL, modules=PROGRAMS[program])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=support.ROOT)
    return set(done.stdout.split())


@pytest.mark.parametrize("program", PROGRAMS)
def test_modules_at_start(program):
    found = modules(program)
    assert not found & NEVER[program], "import it where it is used"
    check("modules", {program: len(found)})


# Memory that a fresh worker does not share.


class Measured(ChannelWorker):
    """Worker that says how much private memory it had when it said that it was ready."""

    def receive(self, kind):
        message, fds = worker_api.receive_from_worker(self.control)
        if fds:
            rollup = os.pread(fds[0], 4096, 0)
            self.private_kb = int(rollup.partition(b"Private_Dirty:")[2].split()[0])
            framing.close_all(fds)
        if isinstance(message, kind):
            return message
        return super().receive(kind)


@pytest.fixture
def zygote(tmp_path, monkeypatch):
    """A zygote whose bytecode another has written: who compiles modules keeps more memory, also in its forks."""
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(tmp_path))
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    compiles = Zygote()
    ChannelWorker(compiles, "probe", serve=False).close()
    compiles.close()
    made = Zygote()
    yield made
    made.close()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="recorded on x86-64")
def test_private_memory_of_a_fresh_worker(zygote):
    found = {}
    for name, guest in (("native", "hello"), ("wasi:http", "probe")):
        worker = Measured(zygote, guest, serve=False)
        found[name] = worker.private_kb
        worker.close()
    check("private kB", found)


# Python and crossings between Python and WebAssembly.


@pytest.fixture
def counters(tmp_path, monkeypatch):
    """Calls of Python and crossings of a worker, by its pid."""
    path = tmp_path / "counts"
    path.write_bytes(bytes(COUNTERS.size * SLOTS))
    monkeypatch.setenv("PYTHONCOUNTS", str(path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(COUNTED), *filter(None, [os.environ.get("PYTHONPATH")])]))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as page:
        yield lambda pid: COUNTERS.unpack_from(page, pid % SLOTS * COUNTERS.size)


def test_python_and_crossings_of_a_request(counters):
    zygote = Zygote()
    calls, crossings = {}, {}
    try:
        for name, (guest, limits) in GUESTS.items():
            worker = ChannelWorker(zygote, guest, limits=limits)
            worker.answer(worker.send("/"))
            worker.answer(worker.send("/"))
            calls[name] = crossings[name] = math.inf
            for _ in range(BATCHES):  # the cheapest, as below: a machine under load has the worker look more often
                before = counters(worker.pid)
                for _ in range(REQUESTS):
                    worker.answer(worker.send("/"))
                found = zip(before, counters(worker.pid), strict=True)
                cost = [(then - had) / REQUESTS for had, then in found]
                calls[name], crossings[name] = min(calls[name], cost[0]), min(crossings[name], cost[1])
                if not (wrong("calls of Python", name, calls[name]) or wrong("crossings", name, crossings[name])):
                    break
            worker.close()
    finally:
        zygote.close()
    check("calls of Python", calls)
    check("crossings", crossings)


# System calls and context switches of router and worker, for a client that asks one thing at a time.

ROLES = ("router", "worker")


def ask(sock, instance, times):
    for _ in range(times):
        assert support.http(None, f"GET /{instance}/ HTTP/1.1\r\nhost: x\r\n\r\n", sock=sock)[0] == 200


def named(host):
    """Pids by name: of the router, and of each instance's worker; empty while one is just being replaced."""
    pids = {}
    for pid in children(host.process.pid):
        with contextlib.suppress(OSError):
            name = Path(f"/proc/{pid}/comm").read_text().strip().removeprefix("worker:")
            if pids.setdefault(name, pid) != pid and name in GUESTS:
                return {}
    return {name: pids[name] for name in ("router", *GUESTS)} if {"router", *GUESTS} <= set(pids) else {}


def check_requests(host, sock, kind, count):
    """Ask each instance in batches until the cheapest costs router and worker what is recorded.

    `count`: begins to count for a process, and returns a function that says how much it was.
    """
    for name in GUESTS:
        cheapest, differs = [math.inf] * len(ROLES), []
        for _ in range(BATCHES):
            pids = eventually(lambda: named(host), "the router and each worker have a name")
            counts = [count(pids[who]) for who in ("router", name)]
            ask(sock, name, REQUESTS)
            if named(host) == pids:  # else a worker was replaced
                cheapest = [min(least, each() / REQUESTS) for least, each in zip(cheapest, counts, strict=True)]
                differs = [wrong(kind.format(role), name, each) for role, each in zip(ROLES, cheapest, strict=True)]
                if not any(differs):
                    break
        else:
            raise AssertionError(differs)


def started(directory, **how):
    """A host with an instance of each kind, each asked before, and a connection to it."""
    host = support.Host(directory, **how)
    try:
        for name, (guest, limits) in GUESTS.items():
            assert isinstance(host.start(guest, support.a_run(name, 1, limits=limits)), host_api.Started)
        sock = socket.create_connection(("127.0.0.1", host.port), timeout=30)
        for name in GUESTS:
            ask(sock, name, 3)
    except BaseException:
        host.close()
        raise
    return host, sock


def traced(path):
    """The system calls of a thread: time and name of each."""
    lines = (re.match(r"([\d.]+) (\w+)\(", line) for line in path.read_text(errors="replace").splitlines())
    return [(float(line[1]), line[2]) for line in lines if line]


def may_trace():
    try:
        return (
            subprocess.run(["strace", "-f", "-o", "/dev/null", "true"], capture_output=True, check=False).returncode
            == 0
        )
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not may_trace(), reason="strace is not there, or may not trace here")
@pytest.mark.parametrize(
    "kind", ["system calls of the {}", pytest.param("calls of the {} to wait", marks=pytest.mark.nightly)]
)
def test_system_calls_of_a_request(tmp_path, kind):
    waits = "wait" in kind

    def count(pid):
        threads, began_s = [each.name for each in Path(f"/proc/{pid}/task").iterdir()], time.time()

        def counted():
            calls = [each for thread in threads for each in traced(tmp_path / f"trace.{thread}")]
            return sum(at_s >= began_s and (call in WAITING) == waits for at_s, call in calls)

        return counted

    trace = ("strace", "-D", "-ff", "-qq", "-ttt", "-s", "0", "-o", str(tmp_path / "trace"))
    host, sock = started(tmp_path, prefix=trace)
    try:
        check_requests(host, sock, kind, count)
    finally:
        host.close()


def switches(pid):
    """Times that a process's threads have waited."""
    texts = [(task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int(re.search(r"^voluntary_ctxt_switches:\t(\d+)", text, re.MULTILINE)[1]) for text in texts)


@pytest.mark.nightly
def test_context_switches_of_a_request(tmp_path):
    def count(pid):
        before = switches(pid)
        return lambda: switches(pid) - before

    host, sock = started(tmp_path)
    try:
        check_requests(host, sock, "context switches of the {}", count)
    finally:
        host.close()
