"""Host and agents of other versions: what it cannot read is answered, and nothing that runs is touched."""

import json

import support

from agent.host.ipc import host_api


def exchange(host, message):
    host.sock.send(json.dumps(message).encode())
    reply = host_api.receive_from_host(host.sock)
    assert reply.id == message["id"]
    return reply


def test_a_request_of_a_newer_agent_is_answered(host):
    host.start("hello", support.a_run("web", 1))
    reply = exchange(host, {"type": "levitate", "id": 1_000_001})
    assert (type(reply), reply.code) == (host_api.Failed, "internal")
    assert "restart fleet-host" in reply.message
    # fields that it does not know are left aside
    reply = exchange(host, {"type": "hello", "id": 1_000_002, "protocol": 4, "from_the_future": {"a": 1}})
    assert reply.protocol == host_api.PROTOCOL
    # but no limit: it could not enforce it
    run = json.loads(host_api.encode(host_api.Start(id=1_000_003, run=support.a_run("web", 2))))
    run["run"]["limits"]["from_the_future"] = 1
    reply = exchange(host, run)
    assert (type(reply), reply.code) == (host_api.Failed, "internal")
    assert "from_the_future" in reply.message
    assert host.health("web").generation == 1
    assert support.http(host.port, "GET /web/ HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200
