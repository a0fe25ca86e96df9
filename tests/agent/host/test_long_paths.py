"""Runtime directory so long that an instance's socket below it is no address of a Unix socket."""

import pytest
import support
from containers import PREFIXES
from support import Grants

from agent.host.ipc import host_api

LONGEST = 107  # characters of an address, unix(7)
NAME = "x" * 63


@pytest.fixture
def directory(tmp_path):
    """A directory in which `run/host.sock` just fits."""
    parent = tmp_path / ("d" * (LONGEST - len(str(tmp_path / "run" / "host.sock")) - 1))
    parent.mkdir()
    return parent


@pytest.mark.parametrize(
    "prefix",
    [
        pytest.param((), id="with namespaces"),
        pytest.param(PREFIXES["docker"], marks=pytest.mark.root, id="without namespaces"),
    ],
)
def test_an_instance_with_a_long_name_answers_and_is_reached(directory, prefix):
    for guest in ("v1", "probe"):
        support.compiled(guest)
    host = support.Host(directory, prefix=prefix)
    try:
        assert len(str(host.runtime / "in" / NAME)) > LONGEST
        started = host.start("v1", support.a_run(NAME, 1))
        assert isinstance(started, host_api.Started), started
        assert support.http(host.port, f"GET /{NAME}/ HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200
        grants = Grants(interfaces=("wasi:http/outgoing-handler",), instances=(NAME,))
        assert isinstance(host.start("probe", support.a_run("probe", 1, grants=grants)), host_api.Started)
        request = f"GET /probe/get?{NAME}.internal/ HTTP/1.1\r\nhost: board\r\n\r\n"
        assert b"v1" in support.http(host.port, request)[2]
    finally:
        host.close()
