"""Host in a container: works with the isolation layers that can be had there, and says which are missing and why."""

import os
import subprocess
import sys

import pytest
import support
from containers import FOUND, PREFIXES
from support import Grants, Limits

from agent.host.ipc import host_api

pytestmark = [pytest.mark.root]
LACKS = set(os.environ.get("WASMFLEET_TEST_LACKS", "").split())
FILES = Grants(interfaces=("wasi:filesystem", "wasi:io", "wasi:clocks", "wasi:cli"))


@pytest.fixture(params=PREFIXES)
def situation(request):
    return request.param


@pytest.fixture
def host(situation, tmp_path):
    for guest in ("v1", "writes", "probe"):
        support.compiled(guest)
    made = support.Host(tmp_path, prefix=PREFIXES[situation])
    yield made
    made.close()


def asked(host, path):
    status, _, body = support.http(host.port, f"GET {path} HTTP/1.1\r\nhost: board\r\n\r\n")
    return status, body


def log_of(host):
    return (host.runtime.parent / "host.log").read_text()


def test_components_answer_write_and_reach_each_other(host, situation):
    way, layers = FOUND[situation]
    welcome = host.ask(host_api.Hello)
    assert welcome.runs_as == way
    assert {layer for layer, there in welcome.containment.items() if there} - {"cgroup"} == layers - LACKS
    limits = Limits(storage_bytes=1 << 20)
    asks = Grants(interfaces=("wasi:http/outgoing-handler",), instances=("web",))
    for guest, run in (
        ("v1", support.a_run("web", 1)),
        ("writes", support.a_run("keeper", 1, grants=FILES, limits=limits)),
        ("probe", support.a_run("probe", 1, grants=asks)),
        ("v1", support.a_run("shared", 1, share_worker=True)),
    ):
        started = host.start(guest, run)
        assert isinstance(started, host_api.Started), started
    assert asked(host, "/web/")[0] == 200
    assert asked(host, "/shared/")[0] == 200
    assert [asked(host, "/keeper/")[0] for _ in range(2)] == [200, 200]
    assert sum(path.stat().st_size for path in (host.state / "data" / "keeper").rglob("log")) == 2 * 65536
    assert b"v1" in asked(host, "/probe/get?web.internal/")[1]
    # a second generation, the first taken back, and the end of an instance
    assert isinstance(host.start("v1", support.a_run("web", 2)), host_api.Started)
    assert host.ask(host_api.Revert, instance="web", generation=2).generation == 1
    assert asked(host, "/web/")[0] == 200
    assert isinstance(host.ask(host_api.Stop, instance="keeper"), host_api.Done)
    assert {each.restarts for each in host.ask(host_api.Status).instances} == {0}
    assert "ended" not in log_of(host), "router and egress go on"


def test_check_names_the_layers_that_are_missing_together_and_what_they_need(situation):
    _, layers = FOUND[situation]
    done = subprocess.run(
        [*PREFIXES[situation], sys.executable, "-m", "agent.host.cli", "check"],
        cwd=support.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ("network and mount: CAP_SYS_ADMIN, or user namespaces" in done.stdout) == ("mount" not in layers)
    assert ("user: root with users of its own" in done.stdout) == ("user" not in layers)


def test_a_host_that_requires_what_cannot_be_had_refuses_in_one_sentence(situation, tmp_path):
    _, layers = FOUND[situation]
    if "mount" in layers:
        pytest.skip("everything can be had there")
    done = subprocess.run(
        [
            *(*PREFIXES[situation], sys.executable, "-m", "agent.host.cli", "run", "--minimum", "baseline"),
            *("--runtime", str(tmp_path / "run"), "--state", str(tmp_path / "state"), "--ingress", "none"),
        ],
        cwd=support.ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 78
    assert done.stderr.count("\n") == 1
    assert "network and mount: CAP_SYS_ADMIN, or user namespaces" in done.stderr
