"""The key-value store's own process, asked by a guest that has taken over its worker, and by a disk that fails."""

import os
import resource
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from agent.host.ipc import framing, keyvalue_api
from agent.host.ipc.keyvalue_api import OWN, RegisterUser, Request
from agent.host.ipc.write_quota import QuotaPage, day
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
        self.pages = {}  # of the day's bytes, by instance: that of its workers, and that of the supervisor's

    def admit(self, instance, *, schema=0, before=0, storage=1 << 30, daily=1 << 40, **more):
        """A worker of an instance."""
        ours, theirs = framing.socket_pair()
        if instance not in self.pages:
            self.pages[instance] = tuple(framing.sealed_memfd("written", 4096) for _ in range(2))
        about = RegisterUser(
            instance=instance,
            schema=schema,
            before=before,
            storage_bytes=storage,
            daily_written_bytes=daily,
            place=1,
            **more,
        )
        framing.send_packet(self.sock, msgspec.json.encode(about), (theirs.fileno(), *self.pages[instance]))
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
        for page in self.pages.values():
            framing.close_all(page)

    def bytes_today(self, instance):
        """What it has counted."""
        with closing(QuotaPage(self.pages[instance][1])) as page:
            return page.sum(day())

    def wrote(self):
        """What the kernel has counted."""
        lines = Path(f"/proc/{self.process.pid}/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("wchar:")))


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


def damage(path, at=0, size=4096):
    """Overwrite a part of a database that nobody has open."""
    with path.open("r+b") as file:
        file.seek(at)
        file.write(b"\xff" * size)


def many(worker, count, size=16):
    """Set so many pairs."""
    for number in range(count):
        assert worker.ask("set", b"%06d" % number, b"x" * size).problem == ""


def test_a_damaged_database_is_set_aside_and_named_once_and_the_instance_goes_on(store, tmp_path):
    first = store.admit("hurt")
    many(first, 10)
    first.sock.close()
    assert store.admit("other").ask("get", b"a").problem == ""
    path = tmp_path / "hurt" / "0.db"
    damage(path)
    worker = store.admit("hurt")
    reply = worker.ask("get", b"000001")
    assert (reply.problem, reply.value) == ("", None)
    assert "its key-value pairs were damaged" in reply.note
    assert "hurt/0.damaged has the old ones" in reply.note
    assert worker.ask("set", b"a", b"anew").note == ""
    assert path.with_suffix(".damaged").read_bytes()[:4] == b"\xff" * 4
    assert store.end() == 0
    assert pairs_of(path) == {b"a": b"anew"}
    assert b"pairs of hurt" in store.process.stderr.read()


def test_damage_that_a_request_meets_is_no_dead_end(store, tmp_path):
    first = store.admit("hurt")
    many(first, 200, 1000)
    first.sock.close()
    assert store.admit("other").ask("get", b"a").problem == ""
    path = tmp_path / "hurt" / "0.db"
    with closing(sqlite3.connect(path)) as db:  # a page of the index, which nothing reads at the start
        root = db.execute("SELECT rootpage FROM sqlite_schema WHERE type = 'index'").fetchone()[0]
    damage(path, 4096 * (root - 1))
    worker = store.admit("hurt")
    met = worker.ask("get", b"000001")
    assert "malformed" in met.problem
    assert "its key-value pairs were damaged" in met.note
    assert worker.ask("set", b"a", b"anew").problem == ""
    assert worker.ask("get", b"a").value == b"anew"


@pytest.mark.parametrize("open_still", [True, False], ids=["in use", "closed"])
def test_another_schema_begins_empty_where_the_pairs_before_are_damaged(store, tmp_path, open_still):
    first = store.admit("hurt", schema=1, before=1)
    many(first, 500, 1000)  # more than is kept in memory
    first.sock.close()
    assert store.admit("other").ask("get", b"a").problem == ""
    users = [store.admit("hurt", schema=1, before=1)] if open_still else []
    assert all(each.ask("exists", b"none").problem == "" for each in users)
    damage(tmp_path / "hurt" / "1.db", 4096 * 20 if open_still else 0)
    worker = store.admit("hurt", schema=2, before=1, fresh=True)
    reply = worker.ask("set", b"a", b"anew")
    assert (reply.problem, "damaged" in reply.note) == ("", True)
    assert worker.ask("get", b"a").value == b"anew"


def test_what_small_writes_spread_over_a_large_database_wear_is_counted(store):
    other, before = store.admit("other"), 0
    for step in range(4):
        worker = store.admit("spread", daily=1 << 30)
        if not step:
            many(worker, 1500, 500)
        for number in range(step, 1500, 30):
            assert worker.ask("set", b"%06d" % number, b"y").problem == ""
        worker.sock.close()
        assert other.ask("get", b"a").problem == "", "by now the store has seen the end of the worker, and committed"
        if not step:
            before = store.wrote() - store.bytes_today("spread")
    wrote = store.wrote() - before
    assert wrote > 150 * 4096
    assert store.bytes_today("spread") >= wrote * 0.95, "but for what a database takes to be opened"


def test_listing_by_number_reads_each_key_once(tmp_path):
    with closing(Pairs(tmp_path / "0.db")) as pairs:
        for number in range(10_000):
            pairs.set(OWN, b"%06d" % number, b"", 1 << 30)
        steps = []
        pairs._db.set_progress_handler(lambda: steps.append(1), 1000)  # by thousands of the engine's steps
        found, more = [], True
        while more:
            keys, more = pairs.keys(OWN, None, len(found))
            found += keys
        pairs._db.set_progress_handler(None, 0)
        assert found == [b"%06d" % number for number in range(10_000)]
        assert len(steps) < 200, "steps grow with the keys, not with their square"
        assert pairs.keys(OWN, None, 9_990)[0] == found[9_990:], "any number is a page, too"


def test_an_escaped_guest_that_has_files_too_resets_no_count(store):
    worker = store.admit("resets", daily=60_000)
    many(worker, 20, 2000)
    with closing(QuotaPage(store.pages["resets"][0])) as shared:
        for place in range(256):
            shared.put(place, 0, 0)
    assert worker.ask("set", b"a", b"x" * 20_000).problem == ""
    assert "no more until 00:00 UTC" in worker.ask("set", b"b", b"").problem


UNDONE = "the store failed, and this may be undone: the device's log says why"
DURABLE = {"default": ("durable",)}


def test_a_write_of_a_durable_bucket_is_on_the_disk_when_it_is_answered(store, tmp_path):
    worker = store.admit("sure", daily=200_000, buckets=DURABLE)  # so little that no commit is due soon
    for op, key, value, number in (
        ("set", b"a", b"one", 0),
        ("increment", b"n", b"", 5),
        ("set", b"b", b"gone", 0),
        ("delete", b"b", b"", 0),
    ):
        assert worker.ask(op, key, value, number).problem == ""
    store.process.kill()
    store.process.wait()
    assert pairs_of(tmp_path / "sure" / "0.db") == {b"a": b"one", b"n": b"5"}


def test_a_write_of_another_bucket_waits_and_goes_with_the_next_durable_one(store, tmp_path):
    worker = store.admit("both", daily=200_000, buckets={"ledger": ("durable",)})
    assert worker.ask("set", b"a", b"early").problem == ""
    store.process.kill()
    store.process.wait()
    assert pairs_of(tmp_path / "both" / "0.db") == {}
    again = Store(tmp_path)
    try:
        worker = again.admit("both", daily=200_000, buckets={"ledger": ("durable",)})
        assert worker.ask("set", b"a", b"early").problem == ""
        assert worker.ask("set", b"a", b"booked", bucket="ledger").problem == ""
        again.process.kill()
        again.process.wait()
    finally:
        again.close()
    with closing(Pairs(tmp_path / "both" / "0.db")) as pairs:
        assert pairs.get(OWN, b"a")[0] == b"early"
        assert pairs.get("ledger", b"a")[0] == b"booked"


def test_a_durable_write_that_the_disk_refuses_is_not_called_done(store):
    worker, pid = store.admit("full", buckets=DURABLE), store.process.pid
    assert worker.ask("set", b"a", b"one").problem == ""
    room = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (48 * KIB, room[1]))
    assert "the store failed, and this may be undone" in worker.ask("set", b"b", b"x" * 60_000).problem
    resource.prlimit(pid, resource.RLIMIT_FSIZE, room)
    assert worker.ask("get", b"b").value is None
    assert worker.ask("set", b"b", b"two").problem == ""
    assert worker.ask("get", b"a").value == b"one"


PLANT = {"plant": ("shared",)}


def test_instances_of_a_namespace_that_declare_a_bucket_share_it_and_nobody_else_does(store):
    one, two = (store.admit(name, namespace="acme", buckets=PLANT) for name in ("one", "two"))
    stranger = store.admit("stranger", namespace="other", buckets=PLANT)
    private = store.admit("private", namespace="acme", buckets={"plant": ()})
    silent = store.admit("silent", namespace="acme")
    assert one.ask("set", b"a", b"both", bucket="plant").problem == ""
    assert two.ask("get", b"a", bucket="plant").value == b"both"
    assert two.ask("increment", b"n", number=1, bucket="plant").number == 1
    assert one.ask("increment", b"n", number=1, bucket="plant").number == 2
    for each in (stranger, private):
        assert each.ask("get", b"a", bucket="plant").value is None
        assert each.ask("set", b"a", b"its own", bucket="plant").problem == ""
    assert silent.ask("get", b"a", bucket="plant").problem == "there is no such bucket"
    assert one.ask("get", b"a").value is None, "its own bucket is another"
    assert one.ask("get", b"a", bucket="plant").value == b"both"
    one.sock.close()
    assert two.ask("get", b"a", bucket="plant").value == b"both"


def test_a_shared_bucket_counts_the_bytes_of_who_writes_and_each_ones_limit_of_storage(store):
    large = store.admit("large", namespace="acme", buckets=PLANT)
    small = store.admit("small", namespace="acme", buckets=PLANT, storage=10_000)
    assert large.ask("set", b"a", b"x" * 20_000, bucket="plant").problem == ""
    assert "10000 are allowed" in small.ask("set", b"b", b"x", bucket="plant").problem
    assert store.bytes_today("large") >= 20_000
    assert store.bytes_today("small") == 0


@pytest.mark.parametrize("bucket", ["plant", "../hurt", "+acme", "default/..", ""])
def test_an_escaped_guest_reaches_no_bucket_that_is_not_granted(store, tmp_path, bucket):
    store.admit("one", namespace="acme", buckets=PLANT).ask("set", b"a", b"secret", bucket="plant")
    escaped = store.admit("escaped", namespace="acme", buckets={"mine": ("shared",)})
    assert escaped.ask("get", b"a", bucket=bucket).problem == "there is no such bucket"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["+acme", "escaped", "one"]


@pytest.mark.parametrize("first_writes", [True, False])
def test_a_durable_write_is_not_called_done_where_its_database_is_set_aside_before_the_commit(
    store, tmp_path, first_writes
):
    first = store.admit("hurt")
    many(first, 500, 1000)
    first.sock.close()
    assert store.admit("other").ask("get", b"a").problem == ""
    admitted = [store.admit("hurt", buckets=DURABLE) for _ in range(2)]
    assert [each.ask("exists", b"none").problem for each in admitted] == ["", ""]
    writes, reads = admitted if first_writes else reversed(admitted)
    os.kill(store.process.pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(store.process.pid, os.WUNTRACED)[1]), "so that it finds both requests at once"
    damage(tmp_path / "hurt" / "0.db", 4096 * 20, 4096 * 30)
    writes.sock.send(keyvalue_api.encode(Request(7, "set", OWN, b"zzz", b"lost")))
    reads.sock.send(keyvalue_api.encode(Request(8, "get", OWN, b"%06d" % 100)))
    os.kill(store.process.pid, signal.SIGCONT)
    met = keyvalue_api.reply.decode(reads.sock.recv(framing.PACKET_MAX_BYTES))
    said = keyvalue_api.reply.decode(writes.sock.recv(framing.PACKET_MAX_BYTES))
    assert "malformed" in met.problem
    # Whichever came first: the write before went with the old database, one behind is in the new.
    kept = reads.ask("get", b"zzz").value
    assert (said.problem, kept) in [(UNDONE, None), ("", b"lost")]
    assert writes.ask("set", b"zzz", b"anew").problem == ""
    assert reads.ask("get", b"zzz").value == b"anew"


def test_what_a_worker_wrote_to_a_shared_bucket_counts_as_its_own_also_when_it_ends_first(store):
    writes, other = (store.admit(name, namespace="acme", buckets=PLANT) for name in ("writes", "other"))
    assert other.ask("get", b"a", bucket="plant").problem == ""
    for number in range(40):
        assert writes.ask("set", b"%d" % number, b"x" * 4000, bucket="plant").problem == ""
    writes.sock.close()
    assert other.ask("get", b"1", bucket="plant").value == b"x" * 4000
    assert store.bytes_today("other") == 0
    assert store.bytes_today("writes") > 40 * 4000
