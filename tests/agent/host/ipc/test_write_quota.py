"""Daily write quota of an instance: shared by all its workers, however often they are replaced."""

import contextlib
import os
import subprocess
import sys

import pytest
import support

from agent.host.ipc import write_quota
from agent.host.ipc.write_quota import QuotaLedger, QuotaPage, QuotaStore

KIB = 1024
LANES = """
import os, signal, sys
from agent.host.ipc import write_quota
from agent.host.ipc.write_quota import QuotaPage, WriteMeter, open_counter
from agent.host.sandbox import kernel

page, path = int(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


write_quota.day = lambda: 20_000


class Lane:
    '''A process that does what it is told by a line, and answers by one.'''

    def __init__(self, place):
        told, self.tell = os.pipe()
        self.heard, says = os.pipe()
        if os.fork() == 0:
            kernel.signal_at_parents_death(signal.SIGKILL)
            file = os.open(f"{path}-{place}", os.O_WRONLY | os.O_CREAT)
            share = WriteMeter(open_counter(), most=256 * 1024, tally=QuotaPage(page), place=place)
            while order := os.read(told, 100).decode():
                try:
                    if order == "tomorrow":
                        write_quota.day = lambda: 20_001
                    else:
                        os.write(file, bytes(int(order) * 1024))
                    said = "no more" if share.look() else "fine"
                except OSError as error:
                    share.look()
                    said = error.strerror
                os.write(says, said.encode().ljust(40))
            os._exit(0)

    def do(self, order):
        os.write(self.tell, order.encode())
        return os.read(self.heard, 40).decode().strip()


first, second = Lane(1), Lane(2)
print(first.do("128"), second.do("64"), first.do("32"), sep=", ")
print(second.do("32"))  # all together: 256 KiB
print(first.do("0"), first.do("1"), second.do("1"), sep=", ")
print(first.do("tomorrow"), first.do("64"), second.do("tomorrow"), second.do("64"), sep=", ")
"""


@pytest.fixture(autouse=True)
def _one_day(monkeypatch):
    """Midnight does not come in the middle of a test."""
    monkeypatch.setattr("time.time", lambda: 1_800_000_000.0)


@pytest.fixture
def account(tmp_path):
    return QuotaLedger("keeper", QuotaStore(tmp_path / "written.json"))


def test_two_workers_have_one_share_between_them(tmp_path):
    fd = os.memfd_create("written")
    os.ftruncate(fd, 4096)
    done = subprocess.run(
        [sys.executable, "-c", LANES, str(fd), str(tmp_path / "file")],
        cwd=support.ROOT,
        pass_fds=[fd],
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(fd)
    assert done.stdout.splitlines() == [
        "fine, fine, fine",
        "no more",
        "no more, File too large, File too large",
        "fine, fine, fine, fine",
    ], done.stderr


def test_what_a_worker_wrote_stays_counted_when_it_has_ended(account, tmp_path):
    first, second = account.take(), account.take()
    page = QuotaPage(account.fd)
    page.put(first, 100 * KIB, write_quota.day())
    page.put(second, 10 * KIB, write_quota.day())
    account.give_back(first)
    assert account.bytes_today() == 110 * KIB
    # Its place goes to another, and counts from nothing there.
    places = [account.take() for _ in range(254)]
    assert first in places
    page.put(first, 1 * KIB, write_quota.day())
    assert account.bytes_today() == 111 * KIB
    for place in [second, *places]:
        account.give_back(place)
    assert account.fd == -1, "with the last worker the page goes"
    # What comes later goes on from there, in this host and in the next.
    account.take()
    assert QuotaPage(account.fd).sum(write_quota.day()) == 111 * KIB


def test_the_next_host_goes_on_from_what_was_kept(tmp_path):
    daily = QuotaStore(tmp_path / "written.json")
    before = QuotaLedger("keeper", daily)
    place = before.take()
    QuotaPage(before.fd).put(place, 5 * KIB, write_quota.day())
    assert before.bytes_today() == 5 * KIB
    daily.save()
    again = QuotaLedger("keeper", QuotaStore(tmp_path / "written.json"))
    again.take()
    assert (again.bytes_today(), QuotaPage(again.fd).sum(write_quota.day())) == (5 * KIB, 5 * KIB)


def test_what_was_written_yesterday_counts_no_more(account):
    place = account.take()
    page = QuotaPage(account.fd)
    page.put(place, 9 * KIB, write_quota.day() - 1)
    page.put(0, 7 * KIB, write_quota.day() - 1)
    assert account.bytes_today() == 0


def test_a_page_full_of_nonsense_adds_up_to_a_number_that_can_be_kept(account):
    account.take()
    page = QuotaPage(account.fd)
    for place in range(1, 256):
        page._map[place * 16 : place * 16 + 8] = b"\xff" * 8
        page._map[place * 16 + 8 : place * 16 + 16] = write_quota.day().to_bytes(8, sys.byteorder)
    assert account.bytes_today() < 1 << 62


def test_a_count_that_a_worker_resets_is_put_right(account):
    place = account.take()
    with contextlib.closing(QuotaPage(account.fd)) as page:
        page.put(place, 40 * KIB, write_quota.day())
        assert account.bytes_today() == 40 * KIB
        for each in range(256):
            page.put(each, 0, 0)
        assert account.bytes_today() == 40 * KIB
        assert page.sum(write_quota.day()) == 40 * KIB, "its other workers count from there"
        page.put(place, 2 * KIB, write_quota.day())
        assert account.bytes_today() == 42 * KIB
    account.give_back(place)
    assert account.bytes_today() == 42 * KIB
