"""Sockets for datagrams in the egress: how many one instance may have, whatever its worker keeps to."""

import contextlib
import socket

import pytest

from agent.host.datagrams import OF_INSTANCE, Relays
from agent.host.ipc.helper_api import RefusedError


def connected():
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.connect(("127.0.0.1", 9))
    return sock


@pytest.mark.asyncio
async def test_an_instance_that_opens_all_it_can_leaves_room_for_others():
    relays = Relays()
    with contextlib.ExitStack() as stack:
        for _ in range(OF_INSTANCE):
            stack.enter_context(relays.start(connected(), "greedy"))
        with pytest.raises(RefusedError, match="of this instance are open"):
            relays.start(connected(), "greedy")
        stack.enter_context(relays.start(connected(), "other"))
