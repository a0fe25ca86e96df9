"""A host whose processes may open no more files: what there is goes on, and what is new is refused in words.

Descriptors are given or taken one by one, and each time a start is tried: so each step of it fails once.
"""

import asyncio
import contextlib
import errno
import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import support
from host_processes import children, lanes_of

from agent.host.ipc import framing, host_api
from agent.host.supervisor.agent_server import AgentServer
from fleet.protocol.codes import InstanceState
from fleet.protocol.manifest import Grants
from tests.eventually import eventually

STEPS = 80
"""Limits that are tried: more than one instance takes descriptors."""

COMM_MAX = 15
MOST = 64
TAKEN_BY_A_WORKER = 5
"""Descriptors of the router: a channel, two pages, one of them mapped, and the listener of an instance."""

OUTBOUND = Grants(interfaces=("wasi:http/outgoing-handler",), outbound=("http://127.0.0.1:80",))
KINDS = {
    "own": ("hello", {}),
    "shared": ("hello", {"share_worker": True}),
    "port": ("hello", {"port": support.free_port}),
    "outbound": ("probe", {"grants": OUTBOUND}),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A host of its own, with an instance of each kind that all tests share."""
    with support.shared_host(tmp_path_factory.mktemp("small")) as host:
        for kind in KINDS:
            assert isinstance(start(host, kind, f"first-{kind}", 1), host_api.Started)
        yield host


def start(host, kind, name, generation):
    guest, how = KINDS[kind]
    made = {key: value() if callable(value) else value for key, value in how.items()}
    return host.start(guest, support.a_run(name, generation, **made))


def name_of(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text(encoding="ascii").strip()
    return ""


@contextlib.contextmanager
def at_most(pid, files):
    """Let a process open no descriptor of this number or above, as long as the block runs."""
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (files, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


def open_files(pid):
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def attempt(host, kind):
    """Start a further instance, and stop it again."""
    reply = start(host, kind, "new", 1)
    if isinstance(reply, host_api.Started):
        assert isinstance(host.ask(host_api.Stop, instance="new"), host_api.Done)
    return reply


class Witness:
    """Client who was there before, and sees that everybody else still is."""

    def __init__(self, host):
        self._host = host
        self._sock = socket.create_connection(("127.0.0.1", host.port), timeout=60)
        answers(self._sock)
        self._before = set(children(host.process.pid))

    def look(self, reply):
        answers(self._sock)
        assert self._before <= set(children(self._host.process.pid)), f"somebody ended for {reply}"

    def close(self):
        self._sock.close()


def answers(client):
    for kind in ("own", "shared"):
        request = f"GET /first-{kind}/ HTTP/1.1\r\nhost: x\r\n\r\n"
        assert support.http(None, request, sock=client)[0] == 200


def check_words(refused, where):
    assert refused
    for reply in refused:
        assert reply.code == "internal"  # no verdict on the component
        assert framing.no_descriptors(where) in reply.message


@pytest.mark.parametrize(
    "kind", ["own", "shared", *(pytest.param(kind, marks=pytest.mark.nightly) for kind in ("port", "outbound"))]
)
def test_a_host_without_a_descriptor_left_refuses_a_start_in_words(small, kind):
    pid, refused, succeeded = small.process.pid, [], 0
    with contextlib.closing(Witness(small)) as witness:
        for files in range(first := open_files(pid), first + STEPS):
            with at_most(pid, files):
                reply = attempt(small, kind)
                witness.look(reply)
            if isinstance(reply, host_api.Failed):
                refused.append(reply)
            elif (succeeded := succeeded + 1) == 2:
                break
    assert succeeded == 2
    check_words(refused, "the host")


@pytest.mark.nightly
@pytest.mark.parametrize("swap", ["overlap", "replace"])
def test_a_swap_without_a_descriptor_left_loses_no_state(small, swap):
    pid, seen, generation, swapped = small.process.pid, 0, 1, 0
    assert isinstance(small.start("remembers", support.a_run("keeps", generation, swap=swap)), host_api.Started)
    with socket.create_connection(("127.0.0.1", small.port), timeout=60) as client:
        for files in range(first := open_files(pid), first + STEPS):
            with at_most(pid, files):
                reply = small.start("remembers", support.a_run("keeps", generation + 1, swap=swap))
                status, _, body = support.http(None, "GET /keeps/ HTTP/1.1\r\nhost: x\r\n\r\n", sock=client)
            seen += 1
            assert (status, int(body)) == (200, seen)
            if isinstance(reply, host_api.Failed):
                assert "no more files may be open in the host" in reply.message or "Too many" in reply.message
                continue
            generation += 1
            assert isinstance(small.ask(host_api.Commit, instance="keeps", generation=generation), host_api.Done)
            if (swapped := swapped + 1) == 2:
                break
    assert swapped == 2
    assert isinstance(small.ask(host_api.Stop, instance="keeps"), host_api.Done)


def test_a_worker_that_ends_without_a_descriptor_for_another_is_replaced_when_there_is_one(small):
    """A lack of descriptors is no crash of the component's, and lasts as long as it lasts."""
    with socket.create_connection(("127.0.0.1", small.port), timeout=60) as client:
        answers(client)
        (pid,) = (pid for pid in lanes_of(small) if name_of(pid) == "worker:first-own"[:COMM_MAX])
        with at_most(small.process.pid, 3):
            os.kill(pid, signal.SIGKILL)
            eventually(lambda: "no more files may be open" in str(small.lines_of("first-own")), "a start was refused")
        eventually(lambda: small.health("first-own").state == InstanceState.RUNNING, "it runs again")
        assert small.health("first-own").restarts == 1
        answers(client)


PINNED = """
import resource, sys
from pathlib import Path
from agent.host.supervisor.pinned_modules import PinnedModules

def pin(directory):
    made = PinnedModules()
    try:
        made.pin(Path(sys.argv[1], directory))
    except OSError as error:
        print(error.strerror)
    count = len(made._descriptors)  # nothing public counts them
    made.close()
    return count

files = pin("ample")
resource.setrlimit(resource.RLIMIT_NOFILE, (2 * files - 20, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
print(pin("tight"))
"""


def test_a_host_keeps_no_modules_open_where_they_would_take_more_than_half_of_its_descriptors(tmp_path):
    """A package upgrade under it is rarer than an instance more."""
    command = [sys.executable, "-c", PINNED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == f"{os.strerror(errno.EMFILE)}\n0\n"


class Full(socket.socket):
    """Listening socket of a process that may open no more files."""

    asked = 0

    def __init__(self):
        super().__init__()
        self.was_asked = asyncio.Event()

    def accept(self):
        self.asked += 1
        self.was_asked.set()
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.asyncio
async def test_a_host_without_a_descriptor_for_a_client_does_not_ask_for_one_again_and_again():
    with Full() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server = AgentServer(listener, None, asyncio.Queue(), agent_group=None)
        server.start()
        with socket.create_connection(listener.getsockname()):
            await listener.was_asked.wait()
            for _ in range(200):
                await asyncio.sleep(0)
        server.stop_accepting()
        server.close()
        assert listener.asked == 1


@pytest.fixture(scope="module")
def tight(tmp_path_factory):
    """A host that was started with a limit, which its router has too; nobody else may lower that of a router."""
    prefix = ["prlimit", f"--nofile={MOST}:{MOST}"]
    with support.shared_host(tmp_path_factory.mktemp("tight"), prefix=prefix) as host:
        for kind in ("own", "shared"):
            assert isinstance(start(host, kind, f"first-{kind}", 1), host_api.Started)
        yield host


@pytest.mark.parametrize("kind", ["own", "shared"])
def test_a_router_without_a_descriptor_left_refuses_a_worker_in_words(tight, kind):
    """Clients take its descriptors, one more each time; a worker needs up to five."""
    refused = []
    with contextlib.closing(Witness(tight)) as witness, contextlib.ExitStack() as clients:
        for number in range(MOST):
            if len(refused) == TAKEN_BY_A_WORKER:
                break
            answers(clients.enter_context(socket.create_connection(("127.0.0.1", tight.port), timeout=60)))
            if number >= MOST // 2:
                reply = attempt(tight, kind)
                witness.look(reply)
                if isinstance(reply, host_api.Failed):
                    refused.append(reply)
                else:
                    assert not refused
    check_words(refused, "the router")
    assert len(refused) == TAKEN_BY_A_WORKER
    eventually(lambda: isinstance(attempt(tight, kind), host_api.Started), "the router has noticed that clients went")
