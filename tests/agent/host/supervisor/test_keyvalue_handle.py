"""Workers that the key-value store has no descriptor for are refused, and leave nothing behind."""

import errno
import os
from pathlib import Path

import pytest

from agent.host.ipc import framing
from agent.host.ipc.keyvalue_api import RegisterUser
from agent.host.supervisor import keyvalue_handle
from agent.host.supervisor.keyvalue_handle import KeyValueHandle

ABOUT = RegisterUser(
    instance="a", schema=0, before=0, storage_bytes=1 << 20, daily_written_bytes=1 << 20, place=1, fresh=True
)


def descriptors():
    return len(list(Path("/proc/self/fd").iterdir()))


def no_room(*_):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.asyncio
@pytest.mark.parametrize("step", ["a copy of the quota page", "the message to the process"])
async def test_a_worker_without_a_descriptor_is_refused(tmp_path, monkeypatch, step):
    handle = KeyValueHandle(tmp_path)
    there, process = framing.socket_pair()
    page = framing.sealed_memfd("written", 4096)
    with there, process:
        handle._sock = there
        if step.startswith("a copy"):
            monkeypatch.setattr(keyvalue_handle.os, "dup", no_room)
        else:
            monkeypatch.setattr(handle, "_tell", no_room)
        before = descriptors()
        with pytest.raises(OSError, match="Too many open files"):
            handle.admit(ABOUT, page)
        assert descriptors() == before
        assert not handle._is_needed()
    os.close(page)
