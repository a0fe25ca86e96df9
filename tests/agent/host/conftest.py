import socket
import sys
import threading
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import support
from peers import Peer

from agent.host.ipc import host_api


@pytest.fixture(scope="session")
def _shared(tmp_path_factory):
    """Host for all tests that do not end it."""
    hosts = []

    def shared():
        if not hosts:
            hosts.append(support.Host(tmp_path_factory.mktemp("host")))
            hosts[0].shared = True
        return hosts[0]

    yield shared
    for host in hosts:
        host.close()


@pytest.fixture
def peer():
    """Start a server on loopback: `peer(behave)`."""
    made = []

    def make(behave):
        made.append(Peer(behave))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def host(_shared, request):
    """A running host without instances; what the test started is stopped afterwards."""
    support.TESTS.append(request.node.nodeid)
    shared = _shared()
    yield shared
    for one in shared.ask(host_api.Status).instances:
        shared.ask(host_api.Stop, instance=one.instance)
    shared.events.clear()


@pytest.fixture(autouse=True)
def _no_host_is_left():
    """A test that fails halfway leaves no host behind either."""
    before = list(support.STARTED)
    yield
    for left in [host for host in support.STARTED if host not in before and not host.shared]:
        left.close()


@pytest.fixture
def neighbour(host):
    """A good instance beside the bad one: every call of it is answered, before, during and after what the test does."""
    port = support.free_port()
    host.start("hello", support.a_run("neighbour", 1, port=port))
    before = host.health("neighbour")
    answers, asked, stop = [], threading.Event(), threading.Event()

    def ask():
        with socket.create_connection(("127.0.0.1", port), timeout=30) as kept:
            while not stop.wait(0.01):
                try:
                    answers.append(support.http(port, sock=kept)[0])
                except OSError as error:
                    answers.append(repr(error))
                    return
                finally:
                    asked.set()

    client = threading.Thread(target=ask)
    client.start()
    assert asked.wait(30)
    yield port
    stop.set()
    client.join()
    assert support.http(port)[0] == 200
    assert answers
    assert set(answers) == {200}
    after = host.health("neighbour")
    assert (after.since, after.restarts, after.errors) == (before.since, 0, 0)
