import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import support

from agent.host import ipc


@pytest.fixture(scope="session")
def _shared(tmp_path_factory):
    """One host for all tests that do not end it."""
    shared = support.Host(tmp_path_factory.mktemp("host"))
    shared.shared = True
    yield shared
    shared.close()


@pytest.fixture
def host(_shared):
    """A running host without instances; what the test started is stopped afterwards."""
    yield _shared
    for one in _shared.ask(ipc.Status).instances:
        _shared.ask(ipc.Stop, instance=one.instance)
    _shared.events.clear()


@pytest.fixture(autouse=True)
def _no_host_is_left():
    """A test that fails halfway leaves no host behind either."""
    before = list(support.STARTED)
    yield
    for left in [host for host in support.STARTED if host not in before and not host.shared]:
        left.close()
