"""Each process of the host is killed in each phase of a swap: one version answers afterwards, and nothing is left over.

The phases are the messages by which the supervisor leads a swap, in their order; `phases/sitecustomize.py` does it.
"""

import os
from pathlib import Path

import pytest
import support
from host_processes import children, ended, lanes_of

from agent.host.ipc import host_api

PHASES = ("Setup", "SaveState", "LoadState", "Serve", "AddChannel", "ServeChannel", "DrainChannel")
HERE = Path(__file__).parent


def start(directory):
    path = os.pathsep.join([str(HERE / "phases"), str(support.ROOT)])
    host = support.Host(directory, env={"PYTHONPATH": path, "WASMFLEET_TEST_KILL": str(directory / "plan")})
    host.directory = directory
    return host


@pytest.fixture(scope="module")
def deadly(tmp_path_factory):
    """A host that all tests share which leave it alive."""
    host = start(tmp_path_factory.mktemp("deadly"))
    host.shared = True
    yield host
    host.close()


def swap(host, name, phase, victim):
    """Swap an instance with memory, and have the victim killed in that phase; the host's answer."""
    assert isinstance(host.start("remembers", support.a_run(name, 1)), host_api.Started)
    assert answer(host, name) == 1
    (host.directory / "plan").write_text(f"{name} {phase} {victim}")
    return host.start("remembers", support.a_run(name, 2))


def answer(host, name):
    """What it answers, once it does: who is asked by a process that is being killed may be told so."""
    status = 0
    while status != 200:
        status, _, body = support.http(host.port, f"GET /{name}/ HTTP/1.1\r\nhost: x\r\n\r\n")
        assert status in {200, 502, 503}, body
    return int(body)


@pytest.mark.parametrize("victim", ["old", "new", "zygote", "router"])
@pytest.mark.parametrize("phase", PHASES)
def test_whichever_process_is_killed_one_of_both_versions_answers(deadly, phase, victim):
    name = f"{phase}-{victim}".lower()
    reply = swap(deadly, name, phase, victim)
    assert not (deadly.directory / "plan").exists(), "the phase was reached"
    assert isinstance(reply, host_api.Started | host_api.Failed), reply
    generation = 2 if isinstance(reply, host_api.Started) else 1
    assert answer(deadly, name) >= 1
    health = deadly.health(name)
    assert health.generation == generation
    if victim == "router":
        assert health.restarts == 0, "workers end with their router, which is no crash of theirs"
        changes = [event for event in deadly.events if isinstance(event, host_api.Changed) and event.instance == name]
        assert len(changes) <= 4, "the next ones wait for the next router"
    # It can be swapped as ever, and nothing is left of it when it is stopped.
    assert isinstance(deadly.start("hello", support.a_run(name, 3)), host_api.Started)
    assert isinstance(deadly.ask(host_api.Commit, instance=name, generation=3), host_api.Done)
    assert isinstance(deadly.ask(host_api.Stop, instance=name), host_api.Done)
    assert lanes_of(deadly) == []


@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_host_takes_all_processes_along_and_the_next_one_starts(tmp_path, phase):
    host = start(tmp_path)
    pids = []
    try:
        assert isinstance(host.start("hello", support.a_run("other", 1)), host_api.Started)
        pids = [os.pidfd_open(pid) for pid in children(host.process.pid)]
        with pytest.raises(host_api.IpcError):
            swap(host, "web", phase, "host")
        host.process.wait(60)
        assert ended(pids, 60)
    finally:
        for pid in pids:
            os.close(pid)
        host.close()
    again = start(tmp_path)
    try:
        for name, generation in (("web", 1), ("other", 1)):
            assert isinstance(again.start("remembers", support.a_run(name, generation)), host_api.Started)
            assert answer(again, name) == 1
            assert again.health(name).restarts == 0
    finally:
        again.close()
