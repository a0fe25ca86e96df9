"""Files in which the host remembers crashes, quotas and users are replaced so that a power cut loses no rename."""

import os
import stat

import pytest

from agent.host.ipc.write_quota import QuotaStore
from agent.host.supervisor.resources import CrashCounter, UidAllocator


def crash(path):
    CrashCounter(path).remember("web", "target", 3)


def quota(path):
    store = QuotaStore(path)
    store.add("web", 5)
    store.save()


def uid(path):
    UidAllocator(path).allocate("web")


@pytest.mark.parametrize("write", [crash, quota, uid])
def test_a_file_is_on_the_medium_and_so_is_its_name(write, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    synced = []
    fsync = os.fsync

    def recorded(fd):
        synced.append((stat.S_ISDIR(os.fstat(fd).st_mode), (tmp_path / "kept.json").exists()))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", recorded)
    write(tmp_path / "kept.json")
    # The content before it has the name, and the directory once it has.
    assert synced == [(False, False), (True, True)]
    assert [path.name for path in tmp_path.iterdir()] == ["kept.json"]
