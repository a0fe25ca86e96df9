"""State files of the host: replaced durably, so that a power cut loses no rename."""

import os
import stat

import pytest

from agent.host.ipc.write_quota import QuotaStore
from agent.host.supervisor.resources import CrashCounter, HostResources, UidAllocator


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
    monkeypatch.setattr("agent.host.supervisor.resources.can_assign_users", lambda: True)
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


def test_what_a_power_cut_left_half_is_removed_at_the_start_and_no_guests_file(tmp_path):
    left, of_a_guest = tmp_path / ".new-00000000-x", tmp_path / "data/web/.new-00000000-x"
    of_a_guest.parent.mkdir(parents=True)
    for path in (left, of_a_guest):
        path.write_text("half")
    HostResources.open(state=tmp_path, sockets=tmp_path / "in", address="127.0.0.1")
    assert (left.exists(), of_a_guest.exists()) == (False, True)


def test_crashes_that_an_older_version_counted_move_to_the_present_name(tmp_path):
    def count():
        resources = HostResources.open(state=tmp_path, sockets=tmp_path / "in", address="127.0.0.1")
        return resources.crashes.count("web", "target")

    CrashCounter(tmp_path / "deaths.json").remember("web", "target", 3)
    assert count() == 3
    assert [path.name for path in tmp_path.glob("*.json")] == ["crashes.json"]
    CrashCounter(tmp_path / "deaths.json").remember("web", "target", 1)
    assert count() == 3, "the newer file counts"
