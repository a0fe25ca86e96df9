"""Whole host with little address space, simulated by a limit on every process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import support
from host_processes import children, lanes_of
from support import Grants, Limits

from agent.host.ipc import host_api
from fleet.protocol.bounds import MIB

GIB = 1024 * MIB
SPACES = {"39 bits": (256 * GIB, "67108864+65536"), "1 GiB": (GIB, "0+65536")}
SEATS = 12


@pytest.fixture(params=SPACES)
def small(request, tmp_path):
    """A host of which no process has more address space, and how its components are compiled there."""
    space_bytes, plan = SPACES[request.param]
    limit = ["prlimit", f"--as={space_bytes}"]
    host = support.Host(tmp_path, prefix=limit)
    command = [*limit, sys.executable, "-m", "agent.host.compiler"]

    images = {}

    def image(guest):
        if guest not in images:
            done = subprocess.run(
                command, cwd=support.ROOT, input=support.wasm(guest), capture_output=True, timeout=120, check=False
            )
            assert done.returncode == 0, done.stderr
            images[guest] = done.stdout
        return images[guest]

    def start(guest, run):
        fd = support.sealed(image(guest))
        try:
            return host.ask(host_api.Start, fd, run=run)
        finally:
            os.close(fd)

    said = subprocess.run([*command, "--describe"], cwd=support.ROOT, capture_output=True, text=True, check=True).stdout
    assert f'"{plan}"' in said, "the plan for memories follows the address space"
    yield host, start
    host.close()


def asked(host, instance):
    return support.http(host.port, f"GET /{instance}/ HTTP/1.1\r\nhost: board\r\n\r\n")[0]


def test_a_host_with_little_address_space_answers_contains_and_swaps(small):
    host, start = small
    assert host.ask(host_api.Hello).engine
    assert isinstance(start("v1", support.a_run("web", 1, limits=Limits(concurrency=2))), host_api.Started)
    grants = Grants(interfaces=("wasi:http/outgoing-handler",), outbound=("http://127.0.0.1:1",))
    reply = start("probe", support.a_run("probe", 1, grants=grants))
    assert isinstance(reply, host_api.Started), reply
    assert (asked(host, "web"), asked(host, "probe")) == (200, 200)
    # The new version traps after twenty calls, as often as it is asked: each of them ends that call alone.
    assert isinstance(start("v3", support.a_run("web", 2)), host_api.Started)
    statuses = [asked(host, "web") for _ in range(45)]
    assert set(statuses) == {200, 500}
    assert host.ask(host_api.Revert, instance="web", generation=2).generation == 1
    assert asked(host, "web") == 200
    # Nothing was ended by the engine giving up: no worker, no zygote, no router.
    assert [(one.instance, one.restarts) for one in host.ask(host_api.Status).instances] == [("probe", 0), ("web", 0)]
    assert "abort" not in (host.runtime.parent / "host.log").read_text().lower()


def test_instances_that_share_a_worker_fit_into_little_address_space(small):
    host, start = small
    for number in range(SEATS):
        limits = Limits(memory_bytes=4 * MIB)
        reply = start("v1", support.a_run(f"seat-{number}", 1, limits=limits, share_worker=True))
        assert isinstance(reply, host_api.Started), reply
    for number in range(SEATS):
        assert asked(host, f"seat-{number}") == 200
    figures = host.ask(host_api.Status).instances
    assert {one.restarts for one in figures} == {0}
    assert len({one.shared_worker for one in figures}) < SEATS
    assert lanes_of(host)
    for pid in children(host.process.pid):
        assert "Max address space         unlimited" not in Path(f"/proc/{pid}/limits").read_text()
