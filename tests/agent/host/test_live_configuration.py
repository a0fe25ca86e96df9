"""Configuration that reaches an instance while it runs: `Configure` over the real host and its sandboxed workers."""

import socket

import pytest

from agent.host.ipc import host_api
from fleet.protocol.manifest import Grants
from tests.agent.host import support

CONFIG = Grants(interfaces=("wasi:config",))


def configure(host, generation=1, *, instance="web", **config):
    return host.ask(host_api.Configure, instance=instance, generation=generation, config=config)


def started(host, port, generation=1, *, guest="config", grants=CONFIG, **rest):
    run = support.a_run("web", generation, port=port, grants=grants, config={"greeting": "hello"}, **rest)
    reply = host.start(guest, run)
    assert isinstance(reply, host_api.Started), reply


@pytest.mark.parametrize("share", [False, True])
def test_a_component_reads_the_new_value_on_the_same_connection_and_was_not_restarted(host, share):
    port = support.free_port()
    started(host, port, share_worker=share)
    before = host.health("web")
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        assert support.http(port, sock=client)[2] == b"hello"
        assert isinstance(configure(host, greeting="good morning", other="x"), host_api.Done)
        assert support.http(port, sock=client)[2] == b"good morning"
        assert isinstance(configure(host), host_api.Done)
        assert support.http(port, sock=client)[0] == 404, "a key that is gone is gone"
        assert isinstance(configure(host, greeting="bye"), host_api.Done)
        assert support.http(port, sock=client)[2] == b"bye"
    after = host.health("web")
    assert (after.generation, after.restarts, after.workers) == (before.generation, before.restarts, before.workers)


def test_workers_that_start_later_have_it_too(host):
    port = support.free_port()
    started(host, port)
    assert isinstance(configure(host, greeting="good morning"), host_api.Done)
    host.ask(host_api.Restart, instance="web")
    assert support.http(port)[2] == b"good morning"


def test_nothing_changes_where_it_cannot_be_taken(host):
    port = support.free_port()
    for generation, instance in ((1, "nobody"), (2, "web")):
        assert configure(host, generation, instance=instance, greeting="x").code == "host-gone"
    started(host, port)
    assert configure(host, 2, greeting="x").code == "host-gone"
    started(host, port, 2)
    assert configure(host, 2, greeting="x").code == "host-gone", "the generation before may come back with its own"
    assert support.http(port)[2] == b"hello"
    host.ask(host_api.Commit, instance="web", generation=2)
    assert isinstance(configure(host, 2, greeting="x"), host_api.Done)


def test_a_component_that_reads_its_environment_needs_a_restart(host):
    port = support.free_port()
    started(host, port, guest="environment", grants=Grants(interfaces=("wasi:cli/environment",)))
    reply = configure(host, greeting="good morning")
    assert (reply.code, "stays as it was at its start" in reply.message) == ("start-failed", True)
    assert b"hello" in support.http(port)[2]
    host.ask(host_api.Restart, instance="web")
    assert b"hello" in support.http(port)[2], "it is refused as a whole"
