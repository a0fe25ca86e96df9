"""Grants of sockets as the egress judges them: addresses, names, and the addresses that names were found to have."""

import pytest

from agent.host import egress
from agent.host.ipc.helper_api import (
    ConnectRequest,
    LookupRequest,
    RefusedError,
    check_lookup,
    check_socket,
    reachable,
)
from fleet.protocol.manifest import Grants

PUBLIC, OTHER, PRIVATE = "93.184.216.34", "93.184.216.35", "10.1.0.5"
DENIED, PROHIBITED = "HTTP-request-denied", "destination-IP-prohibited"


def grants(*outbound):
    return Grants(outbound=outbound)


@pytest.mark.parametrize(
    ("outbound", "address", "port", "name", "said"),
    [
        ("tcp://10.1.0.5:502", PRIVATE, 502, "", False),
        ("tcp://10.1.0.5:502", PRIVATE, 503, "", DENIED),
        ("udp://10.1.0.5:502", PRIVATE, 502, "", DENIED),
        ("tcp://db.example:1", PUBLIC, 1, "", DENIED),
        ("tcp://db.example:1", PUBLIC, 1, "db.example", True),
        ("tcp://db.example:1", PUBLIC, 2, "db.example", DENIED),
        ("tcp://db.example:1", PUBLIC, 1, "other.example", DENIED),
        ("tcp://db.example:1", PRIVATE, 1, "db.example", PROHIBITED),
        ("tcp://*:1", PUBLIC, 1, "", False),
        ("tcp://*:1", PRIVATE, 1, "", DENIED),
        ("tcp://*:1", "::ffff:10.1.0.5", 1, "", DENIED),
        ("tcp://*:1", "64:ff9b::a01:5", 1, "", DENIED),
        ("tcp://169.254.0.0/16:80", "169.254.169.254", 80, "", DENIED),
        ("tcp://localhost:1", "127.0.0.1", 1, "", False),
        ("tcp://localhost:1", "::1", 1, "", False),
        ("tcp://localhost:1", PRIVATE, 1, "localhost", PROHIBITED),
        ("tcp://*:1", "not an address", 1, "", DENIED),
        ("tcp://*:1", "127.1", 1, "", DENIED),
        ("tcp://*:1", "::1%1", 1, "", DENIED),
        ("tcp://*:1", "::ffff:10.1.0.5%1", 1, "", DENIED),
        ("tcp://*:1", "fe80::1%eth0", 1, "", DENIED),
        ("tcp://[fe80::1]:1", "fe80::1%eth0", 1, "", DENIED),
    ],
)
def test_an_address_is_judged_by_what_names_it_or_its_name(outbound, address, port, name, said):
    if isinstance(said, bool):
        assert check_socket(grants(outbound), "tcp", address, port, name) is said
    else:
        with pytest.raises(RefusedError) as caught:
            check_socket(grants(outbound), "tcp", address, port, name)
        assert caught.value.error == said


def test_a_name_is_looked_up_only_where_a_socket_may_lead_to_it():
    assert check_lookup(grants("udp://Meter.local:1"), "METER.local.") == "meter.local"
    assert check_lookup(grants("tcp://*.example.com:1"), "db.example.com") == "db.example.com"
    for outbound, name in (("https://meter.local", "meter.local"), ("tcp://meter.local:1", "other.local")):
        with pytest.raises(RefusedError, match=r"grants\.outbound has no socket to it"):
            check_lookup(grants(outbound), name)


def test_of_a_name_only_addresses_are_told_that_a_socket_may_lead_to():
    assert reachable(grants("tcp://db.example:1"), "db.example", [PRIVATE, PUBLIC]) == [PUBLIC]
    assert reachable(grants("tcp://db.example:1", "udp://10.0.0.0/8:9"), "db.example", [PRIVATE]) == [PRIVATE]
    with pytest.raises(RefusedError, match="a private address"):
        reachable(grants("tcp://db.example:1", "http://10.0.0.0/8:1"), "db.example", [PRIVATE])


@pytest.mark.asyncio
async def test_a_connection_goes_to_an_address_that_its_name_was_found_to_have(monkeypatch):
    """A server behind a name may give other addresses each time: each that was told is remembered."""
    answers = iter([[PUBLIC], [OTHER], [OTHER]])
    asked, connected = [], []

    async def resolver(host, _port):
        asked.append(host)
        return next(answers)

    async def first(_host, addresses, port, _timeout_s):
        connected.append((*addresses, port))

    monkeypatch.setattr(egress, "_first", first)
    granted, names = grants("tcp://db.example:1"), egress.Names(resolver)
    for _ in range(2):
        await egress.look_up(granted, LookupRequest(1, "db.example", 1000), names)
    for address in (PUBLIC, OTHER):
        await egress.open_socket(granted, ConnectRequest(2, "tcp", f"{address}:1", 1000, name="db.example"), names)
    assert connected == [(PUBLIC, 1), (OTHER, 1)]
    assert asked == ["db.example"] * 2
    with pytest.raises(RefusedError, match=r"is no address of db\.example"):
        await egress.open_socket(granted, ConnectRequest(3, "tcp", "93.184.216.99:1", 1000, name="db.example"), names)
