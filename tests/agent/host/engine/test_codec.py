"""Codec of exchanges with a guest: leaks no memory in the worker."""

import gc
import re
from pathlib import Path

import support
from echo_guest import ECHO
from support import Grants, Limits

from agent.host.engine import guest as guests
from agent.host.engine.runtime import Engine

BODY = bytes(range(256)) * 800
CALLS = 20


def data_bytes():
    """Private memory of this process."""
    return 1024 * int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_large_bodies_leave_nothing_behind_though_nobody_collects(tmp_path):
    (tmp_path / "echo.cwasm").write_bytes(support.compiled(ECHO))
    image = Engine().load(str(tmp_path / "echo.cwasm"))
    limits = Limits(request_bytes=1 << 20)
    guest = guests.start(image, limits=limits, grants=Grants(), config={}, log=print, data="")

    def exchange():
        assert guest.handle(b"POST", b"/", b"host: board\r\n", BODY, None)[2] == BODY

    gc.disable()
    try:
        exchange()
        before = data_bytes()
        for _ in range(CALLS):
            exchange()
        grown = data_bytes() - before
    finally:
        gc.enable()
    # a byte of a body is a value of 32 bytes on its way into the guest
    assert grown < 3 * 32 * len(BODY)
