"""The key-value store's own process, asked by a guest that has taken over its worker, and by a disk that fails."""

import os
import resource
import subprocess
import sys
from contextlib import closing

import msgspec
import pytest

from agent.host.ipc import framing, keyvalue_api
from agent.host.ipc.keyvalue_api import OWN, RegisterUser, Request
from agent.host.keyvalue import Pairs

KIB = 1024
PROGRAM = """
import os, socket, sys
from agent.host.keyvalue import Store
Store(socket.socket(fileno=int(sys.argv[1])), sys.argv[2]).run()
"""


class Worker:
    """A worker as the store sees it: an end of a socket, on which anything may be sent."""

    def __init__(self, sock):
        self.sock = sock
        self._number = 0

    def ask(self, op, key=b"", value=b"", number=0, bucket=OWN):
        """The reply to a request; None where the store has gone."""
        self._number += 1
        try:
            self.sock.send(keyvalue_api.encode(Request(self._number, op, bucket, key, value, number)))
            data = self.sock.recv(framing.PACKET_MAX_BYTES)
        except OSError:
            return None
        return keyvalue_api.reply.decode(data) if data else None


class Store:
    """The process, and the supervisor's end of its socket."""

    def __init__(self, directory):
        self.directory = directory
        self.sock, theirs = framing.socket_pair()
        command = [sys.executable, "-c", PROGRAM, str(theirs.fileno()), str(directory)]
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE)
        theirs.close()
        self._pages = {}

    def admit(self, instance, *, schema=0, before=0, storage=1 << 30, daily=1 << 40, fresh=False, again=False):
        """A worker of an instance."""
        ours, theirs = framing.socket_pair()
        page = self._pages.setdefault(instance, framing.sealed_memfd("written", 4096))
        about = RegisterUser(
            instance=instance,
            schema=schema,
            before=before,
            storage_bytes=storage,
            daily_written_bytes=daily,
            place=1,
            fresh=fresh,
            again=again,
        )
        framing.send_packet(self.sock, msgspec.json.encode(about), (theirs.fileno(), page))
        theirs.close()
        ours.settimeout(20)
        return Worker(ours)

    def heard(self, words):
        """Wait for a line of its log with these words."""
        for line in self.process.stderr:
            if words in line:
                return
        raise AssertionError("the store ended")

    def end(self):
        """End it as the supervisor does; its exit code."""
        self.sock.close()
        return self.process.wait(20)

    def close(self):
        """Let nothing of it be left."""
        self.sock.close()
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()
        for page in self._pages.values():
            os.close(page)


def pairs_of(path):
    """The pairs in a database."""
    with closing(Pairs(path)) as pairs:
        return {key: pairs.get(OWN, key)[0] for key in pairs.keys(OWN, None, 0)[0]}


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("number", [2**63, 2**64 - 1])
@pytest.mark.parametrize("op", ["list", "skip", "increment", "swap"])
def test_numbers_beyond_64_bits_are_refused_and_the_store_serves_on(store, op, number):
    escaped, other = store.admit("escaped"), store.admit("other")
    assert other.ask("set", b"a", b"kept").problem == ""
    reply = escaped.ask(op, b"k", b"v", number)
    assert reply is not None, "the store has ended"
    assert other.ask("get", b"a").value == b"kept"


@pytest.mark.parametrize("bucket", ["", "other", "b" * 100 * KIB])
def test_there_is_no_other_bucket_whose_name_takes_room_that_nobody_counts(store, bucket):
    escaped = store.admit("escaped", storage=4 * KIB)
    assert escaped.ask("set", b"", b"", bucket=bucket).problem == "there is no such bucket"
    assert escaped.ask("list", bucket=bucket).problem == "there is no such bucket"


def test_writes_go_on_after_a_commit_that_the_disk_refused(store, tmp_path):
    worker, pid = store.admit("full", storage=100_000), store.process.pid
    assert worker.ask("get", b"a").problem == ""
    room = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (32 * KIB, room[1]))
    assert worker.ask("set", b"a", b"x" * 60_000).problem == ""
    store.heard(b"cannot commit")
    resource.prlimit(pid, resource.RLIMIT_FSIZE, room)
    assert worker.ask("get", b"a").value is None, "SQLite has undone what it could not write"
    assert worker.ask("set", b"b", b"y" * 60_000).problem == "", "what is undone takes no room"
    assert store.end() == 0
    assert pairs_of(tmp_path / "full" / "0.db") == {b"b": b"y" * 60_000}


@pytest.mark.parametrize("ended", [True, False], ids=["its worker has ended", "its worker ends later"])
def test_another_schema_begins_with_the_pairs_as_they_are_now_not_as_an_aborted_attempt_left_them(store, ended):
    before = store.admit("twice", schema=1, before=1)
    before.ask("set", b"a", b"first")
    aborted = store.admit("twice", schema=2, before=1, fresh=True)
    assert aborted.ask("set", b"a", b"changed").problem == ""
    if ended:
        aborted.sock.close()
    before.ask("set", b"a", b"second")
    again = store.admit("twice", schema=2, before=1, fresh=True)
    assert again.ask("get", b"a").value == b"second"
    again.ask("set", b"a", b"third")
    for more in ({}, {"fresh": True, "again": True}):
        later = store.admit("twice", schema=2, before=1, **more)
        assert later.sock.recv(framing.PACKET_MAX_BYTES) if more else True
        assert later.ask("get", b"a").value == b"third", "later workers find what the first wrote"
    assert before.ask("get", b"a").value == b"second"


def test_pairs_that_could_not_be_opened_at_first_are_closed_with_their_last_worker(store, tmp_path):
    path = tmp_path / "late" / "0.db"
    path.mkdir(parents=True)
    late, other = store.admit("late"), store.admit("other")
    assert late.ask("get", b"a").problem == "the store cannot be opened"
    path.rmdir()
    assert late.ask("set", b"a", b"one").problem == ""
    late.sock.close()
    assert other.ask("get", b"a").problem == "", "by now the store has seen the end of the worker"
    assert pairs_of(path) == {b"a": b"one"}


def test_a_swap_fails_where_the_pair_was_lost_with_the_process_and_written_anew(store, tmp_path):
    seen = store.admit("swaps", daily=20_000)  # so little that a commit is not due soon
    seen.ask("set", b"a", b"lost")
    version = seen.ask("look", b"a").number
    store.process.kill()
    store.process.wait()
    again = Store(tmp_path)
    try:
        seen, other = again.admit("swaps"), again.admit("swaps")
        assert seen.ask("get", b"a").value is None
        other.ask("set", b"a", b"anew")
        assert seen.ask("swap", b"a", b"over it", version).number == 0
        assert seen.ask("get", b"a").value == b"anew"
    finally:
        again.close()


def test_pairs_that_cannot_be_opened_are_named_once_not_for_each_request(store, tmp_path):
    (tmp_path / "broken" / "0.db").mkdir(parents=True)
    worker = store.admit("broken")
    for _ in range(20):
        assert worker.ask("get", b"a").problem == "the store cannot be opened"
    assert store.end() == 0
    assert store.process.stderr.read().count(b"cannot open the pairs of broken") == 1
