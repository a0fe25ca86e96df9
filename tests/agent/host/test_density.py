"""Density: three thousand idle instances on a host, in a gibibyte (`make test-density`)."""

import os
import resource
from pathlib import Path

import pytest
import support
from host_processes import children

from agent.host.ipc import host_api

COUNT = int(os.environ.get("WASMFLEET_DENSITY_INSTANCES", "3000"))
GIB = 1 << 30

pytestmark = [pytest.mark.density, pytest.mark.timeout(1800)]


def pss_bytes(host):
    """The memory of the host and all that it started, shared pages divided among those who share them."""
    total = 0
    for pid in [host.process.pid, *children(host.process.pid)]:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        total += 1024 * sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
    return total


def everything(host, kind, entries):
    """All entries of an answer that comes in pages."""
    found, more = [], True
    while more:
        answer = host.ask(kind, after=found[-1].instance if found else "")
        found += entries(answer)
        more = answer.more
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="lanes are not dumpable: only root may read what they take")
def test_three_thousand_idle_instances_fit_in_a_gibibyte(tmp_path):
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 5 * COUNT, "a host needs about four descriptors for each"
    host = support.Host(tmp_path)
    try:
        names = [f"i{number:04}" for number in range(COUNT)]
        image = support.sealed(support.compiled("hello"))
        for name in names:
            reply = host.ask(host_api.Start, image, run=support.a_run(name, 1, share_worker=True))
            assert isinstance(reply, host_api.Started), reply
        health = everything(host, host_api.Status, lambda answer: answer.instances)
        assert [one.instance for one in health] == names
        assert {one.state for one in health} == {"running"}
        took = pss_bytes(host)
        processes = len(children(host.process.pid)) + 1
        print(f"\n  {COUNT} instances: {took / 1e6:.0f} MB in {processes} processes, {took / COUNT / 1e3:.0f} KB each")
        assert took < GIB

        # They are idle, and not asleep: whoever is called answers.
        for name in names[:: COUNT // 30]:
            assert support.http(host.port, f"GET /{name}/ HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200

        for name in names:
            assert isinstance(host.ask(host_api.Stop, instance=name), host_api.Done)
        assert host.ask(host_api.Hello).running == ()
        left = [command for command in children(host.process.pid).values() if b"--shared" in command]
        while len(left) > 1:  # the zygote stays for a while; its workers end
            left = [command for command in children(host.process.pid).values() if b"--shared" in command]
    finally:
        host.close()
