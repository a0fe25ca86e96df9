"""Readings on the disk: what is acknowledged to a component is there after anything that may happen to a device."""

import errno
import os
from datetime import UTC, datetime, timedelta

import pytest

from agent import disk
from agent.disk import Point, Write
from agent.report.spool import Bounds, Draft, Spool

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
KIB = 1024


def draft(number, instance="meter", size=10, session="s"):
    return Draft(instance=instance, topic="a/b", data=bytes([number % 256]) * size, session=session, number=number)


def everything(spool, after=0):
    found = []
    while more := spool.read(found[-1].position if found else after, most=50, most_bytes=64 * KIB):
        found += more
    return found


@pytest.fixture
def opened(tmp_path):
    def open_again(**limits):
        return Spool.open(tmp_path / "readings", Bounds(**limits))

    return open_again


def test_readings_have_positions_of_the_device_and_sequences_of_their_instances(opened):
    spool = opened()
    assert spool.append([draft(1), draft(2, "pump"), draft(3)], now=NOW) == (3, "")
    found = [(each.position, each.instance, each.sequence) for each in everything(opened())]
    assert found == [(1, "meter", 1), (2, "pump", 1), (3, "meter", 2)]
    assert spool.waiting == 3


def test_sequences_and_epoch_outlive_restarts_and_every_reading(opened):
    spool = opened()
    spool.append([draft(1), draft(2, "pump")], now=NOW)
    spool.acknowledge(2)
    again = opened()
    again.append([draft(3)], now=NOW)
    again.acknowledge(3)
    last = opened()
    last.append([draft(4, "pump")], now=NOW)
    assert last.epoch == spool.epoch
    assert [(each.position, each.sequence) for each in everything(last, 3)] == [(4, 2)]


def test_what_the_host_brings_again_is_kept_once(opened):
    opened().append([draft(1), draft(2)], now=NOW)
    spool = opened()
    assert spool.append([draft(1), draft(2), draft(3)], now=NOW) == (3, "")
    assert [each.data[0] for each in everything(spool)] == [1, 2, 3]
    assert spool.append([draft(1, session="another")], now=NOW) == (1, "")  # of a host that was started again
    assert spool.waiting == 4


@pytest.mark.parametrize("lost", range(1, 60, 7))
def test_a_torn_end_costs_no_reading_before_it_and_none_after_it(opened, tmp_path, lost):
    opened().append([draft(1), draft(2)], now=NOW)
    (segment,) = (tmp_path / "readings").iterdir()
    segment.write_bytes(segment.read_bytes()[:-lost])
    spool = opened()
    spool.append([draft(3)], now=NOW)
    assert [each.data[0] for each in everything(opened())] == [1, 3]
    assert [each.position for each in everything(spool)] == [1, 2]


def test_zeros_at_the_end_are_no_readings(opened, tmp_path):
    opened().append([draft(1)], now=NOW)
    (segment,) = (tmp_path / "readings").iterdir()
    segment.write_bytes(segment.read_bytes() + bytes(500))
    assert [each.position for each in everything(opened())] == [1]


def test_a_flipped_bit_is_found(opened, tmp_path):
    opened().append([draft(1, size=500)], now=NOW)
    (segment,) = (tmp_path / "readings").iterdir()
    data = bytearray(segment.read_bytes())
    data[-100] ^= 1
    segment.write_bytes(data)
    assert everything(opened()) == []


def test_the_oldest_go_when_there_is_no_more_room(opened):
    spool = opened(max_bytes=64 * KIB)
    for number in range(1, 101):
        assert spool.append([draft(number, size=2 * KIB)], now=NOW) == (1, "")
    found = [each.position for each in everything(spool)]
    assert found == list(range(found[0], 101))
    assert spool.dropped == found[0] - 1
    assert spool.size <= 64 * KIB
    assert spool.waiting == len(found)
    spool.append([draft(101)], now=NOW)
    assert opened().dropped >= 1


def test_or_the_new_ones_are_refused_if_the_owner_wants_it(opened):
    spool = opened(max_bytes=64 * KIB, full="refuse")
    kept = 0
    while (answer := spool.append([draft(kept + 1, size=2 * KIB), draft(kept + 2, size=2 * KIB)], now=NOW)) == (2, ""):
        kept += 2
    assert answer[1] == "the device keeps at most 64 KiB of messages"
    kept += answer[0]
    assert [each.position for each in everything(opened(full="refuse"))] == list(range(1, kept + 1))
    spool.acknowledge(kept)
    assert spool.append([draft(kept + 9)], now=NOW) == (1, "")
    assert spool.dropped == 0


def test_what_is_too_old_goes(opened):
    spool = opened(keep=timedelta(days=7))
    spool.append([draft(1), draft(2)], now=NOW - timedelta(days=8))
    assert spool.expire(NOW) == 2
    assert (spool.waiting, spool.dropped, everything(spool)) == (0, 2, [])
    spool.append([draft(3)], now=NOW)
    assert spool.expire(NOW) == 0
    assert [(each.position, each.sequence) for each in everything(opened())] == [(3, 3)]


def test_the_simulated_week_of_a_device_without_network(opened):
    """A reading each minute for a week, with a start of the agent each day."""
    number, per_day = 0, 1440
    for day in range(7):
        spool = opened()
        for _ in range(per_day // 60):
            group = [draft(number + each, size=12) for each in range(1, 61)]
            number += 60
            assert spool.append(group, now=NOW + timedelta(days=day)) == (60, "")
    spool = opened()
    assert spool.waiting == 7 * per_day
    assert spool.oldest() == NOW
    found = everything(spool)
    assert [each.sequence for each in found] == list(range(1, 7 * per_day + 1))
    spool.acknowledge(found[-1].position)
    assert spool.waiting == 0


def test_a_server_that_has_less_than_before_gets_what_is_still_there(opened):
    spool = opened()
    spool.append([draft(1), draft(2)], now=NOW)
    spool.acknowledge(2)
    spool.rewind(1)
    assert [each.position for each in everything(spool, spool.acknowledged)] == [2]
    spool.rewind(99)
    assert spool.waiting == 0


def test_acknowledged_segments_go_and_no_others(opened, tmp_path):
    for number in (1, 2, 3):
        spool = opened()
        spool.append([draft(number)], now=NOW)
    spool.acknowledge(2)
    assert len(list((tmp_path / "readings").iterdir())) == 1
    assert [each.position for each in everything(opened())] == [3]


def test_a_group_that_the_disk_did_not_take_is_not_acknowledged_and_harms_no_other(opened, monkeypatch):
    spool = opened()
    spool.append([draft(1)], now=NOW)

    def full(what, point, path, data):
        if (what, point) == (Write.READINGS, Point.MIDDLE):  # written in part, and the rest has no room
            os.truncate(path, path.stat().st_size - len(data) // 2)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(disk, "reached", full)
    with pytest.raises(OSError, match="No space"):
        spool.append([draft(2), draft(3)], now=NOW)
    monkeypatch.undo()
    spool.append([draft(2), draft(3), draft(4)], now=NOW)
    assert [each.data[0] for each in everything(opened())] == [1, 2, 3, 4]
    assert [each.sequence for each in everything(spool)] == [1, 2, 3, 4]


def test_a_full_disk_drops_the_oldest_or_refuses(opened, monkeypatch):
    spool = opened(reserve_bytes=1 << 62)
    assert spool.append([draft(1)], now=NOW) == (0, "the device's disk is full")
