"""Store of the device: durable writes, numbers that never fall, and refused foreign directories."""

import dataclasses
import os
import sqlite3
from contextlib import closing
from datetime import UTC, datetime

import msgspec
import pytest

from agent.update import restore
from agent.update import store as agent_store
from agent.update.machine import State
from agent.update.state import Change, Committed, FailedItem, Transition
from agent.update.store import HISTORY_ROWS, LOST_GENERATIONS, UNACKED_ROWS_MAX, DamagedStoreError, Store, StoreError
from fleet.protocol import wire
from fleet.protocol.assignment import Item
from fleet.protocol.codes import Phase, RejectCode
from fleet.protocol.manifest import Http, Manifest
from fleet.protocol.messages import Report
from signing.state import Remembered, VerifierState

NOW = datetime(2026, 5, 1, tzinfo=UTC)
ITEM = Item(instance="web", target="components/a/web/1.0.0.wasm", length=1, sha256="0" * 64, manifest_sha256="1" * 64)
MANIFEST = Manifest(name="web", version="1.0.0", trigger=Http())
COMMITTED = Committed(item=ITEM, manifest=MANIFEST, generation=3, assignment=1, at=NOW)


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "store.db")
    yield made
    made.close()


def report(instance="web", **more):
    return Report(device="b-01234567", boot_id="x", sequence=0, at=NOW, assignment=1, instance=instance, **more)


def test_writes_are_on_the_medium_when_a_method_returns(store):
    mode = store._db.execute("PRAGMA journal_mode").fetchone()[0]
    synchronous = store._db.execute("PRAGMA synchronous").fetchone()[0]
    assert (mode, synchronous) == ("wal", 2)


def test_a_step_is_one_transaction(store, monkeypatch):
    change = Change(instance="web", assignment=1, state=State(phase=Phase.COMMITTED), item=ITEM)
    monkeypatch.setattr(store, "_post", lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("disk I/O error")))
    with pytest.raises(StoreError, match="disk I/O"):
        store.apply(Transition(change=change, committed=COMMITTED, report=report()))
    assert store.changes() == ()
    assert store.committed() == ()


def test_sequences_never_fall_even_when_all_reports_are_gone(store, tmp_path):
    sequences = [store.save(report=report()) for _ in range(HISTORY_ROWS + 10)]
    assert sequences == list(range(1, HISTORY_ROWS + 11))
    assert store.acknowledge(sequences[-1])
    assert len(store.history()) == HISTORY_ROWS
    store._db.execute("DELETE FROM outbox")
    store.close()
    again = Store(tmp_path / "store.db")
    assert again.save(report=report()) == sequences[-1] + 1
    again.close()


def test_reports_wait_until_they_are_acknowledged(store):
    for _ in range(3):
        store.save(report=report())
    assert [sequence for sequence, _ in store.unacked()] == [1, 2, 3]
    assert store.acknowledge(2)
    assert not store.acknowledge(2), "hearing it twice changes nothing"
    ((sequence, body),) = store.unacked()
    assert wire.decode(Report, body).sequence == sequence == 3


def test_only_the_newest_progress_is_kept(store):
    for percent in (10, 20, 30):
        store.save(report=report(progress=percent))
    store.save(report=report("other", progress=5))
    assert [wire.decode(Report, body).progress for _, body in store.unacked()] == [30, 5]
    store.save(report=report(phase="compiling"))
    assert len(store.unacked()) == 2


def test_a_device_that_is_offline_for_months_does_not_fill_its_disk(store, monkeypatch):
    monkeypatch.setattr("agent.update.store.UNACKED_ROWS_MAX", 20)
    for _ in range(50):
        store.save(report=report())
    waiting = [sequence for sequence, _ in store.unacked(limit=UNACKED_ROWS_MAX)]
    assert waiting == list(range(31, 51))


def test_excerpts_of_a_device_that_is_offline_for_months_do_not_fill_its_disk(store, monkeypatch):
    monkeypatch.setattr("agent.update.store.UNSENT_EXCERPTS_BYTES_MAX", 10_000)
    line = "x" * 998
    for number in range(20):
        store.save(report=report(phase="rolled-back", message=str(number), log=(line,)))
    kept = [wire.decode(Report, body) for _, body in store.unacked()]
    assert [each.message for each in kept] == [str(number) for number in range(20)]
    with_excerpt = [each for each in kept if each.log]
    assert with_excerpt == kept[: len(with_excerpt)]  # what was signed and named by the next report never changes
    assert 5 < len(with_excerpt) <= 10
    store.acknowledge(kept[-1].sequence)
    store.save(report=report(log=(line,)))
    assert wire.decode(Report, store.unacked()[0][1]).log == (line,)


def test_failures_are_remembered_within_bounds(store, monkeypatch):
    monkeypatch.setattr("agent.update.store.FAILED_ROWS_MAX", 5)
    for number in range(9):
        at = NOW.replace(minute=number)
        failure = FailedItem(
            instance="web", key=str(number), attempt=0, target="t", code=RejectCode.TRAPPED, message="", at=at
        )
        forgotten = store.apply(Transition(failure=failure)).forgotten
        assert forgotten == (None if number < 5 else ("web", str(number - 5), 0))
    assert [each.key for each in store.failed()] == ["4", "5", "6", "7", "8"]


def test_a_change_of_another_version_of_the_agent_rolls_back(store):
    change = Change(instance="web", assignment=1, state=State(phase=Phase.STAGED), item=ITEM)
    data = change.encode().replace(b'"staged"', b'"levitating"').replace(b'"removal"', b'"something_new":1,"removal"')
    store._db.execute("INSERT INTO changes VALUES ('web', ?)", (data,))
    (found,) = store.changes()
    assert found.phase is Phase.ROLLING_BACK


def test_facts_and_the_accepted_assignment_survive(store, tmp_path):
    facts = VerifierState().with_committed("a/web", 4)
    store.accept(b"envelope", 7, facts)
    store.close()
    again = Store(tmp_path / "store.db", read_only=True)
    assert (again.envelope(), again.facts(), again.counter("accepted")) == (b"envelope", facts, 7)
    again.close()


def test_a_state_directory_of_a_newer_agent_is_left_alone(tmp_path):
    store = Store(tmp_path / "store.db")
    store._db.execute("PRAGMA user_version=99")
    store.close()
    with pytest.raises(StoreError, match="install the newer agent"):
        Store(tmp_path / "store.db")


def test_a_file_that_is_not_a_database_is_reported(tmp_path):
    (tmp_path / "store.db").write_bytes(b"not a database at all, but long enough" * 10)
    with pytest.raises(StoreError, match=r"cannot open .*store\.db"):
        Store(tmp_path / "store.db")


@pytest.mark.parametrize("row", [b"", b"{", b"\xff", b'{"root":"1"}', b"[" * 100_000])
def test_a_row_of_the_verifier_that_is_damaged_is_an_error_of_the_store(store, row):
    store._db.execute("REPLACE INTO meta VALUES ('facts', ?)", (row,))
    with pytest.raises(StoreError, match=r"store\.db is damaged"):
        store.facts()
    with pytest.raises(StoreError, match=r"store\.db is damaged"):
        store.save(report=report())
    assert store.history() == ()


@pytest.mark.parametrize("table", ["committed", "changes", "outbox", "meta"])
def test_a_database_with_any_damaged_page_is_moved_aside_at_the_start(store, tmp_path, table):
    path = tmp_path / "store.db"
    store.save(committed=COMMITTED, report=report())
    (page,) = store._db.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()
    (size,) = store._db.execute("PRAGMA page_size").fetchone()
    store.close()
    with path.open("r+b") as file:
        file.seek((page - 1) * size)
        file.write(b"\0" * size)
    Store(path).close()  # which reads none of that page
    anew = Store.renewed(path)
    assert anew.committed() == ()
    anew.close()
    assert (tmp_path / "store.db.damaged").exists()


@pytest.mark.root
def test_a_state_directory_of_another_owner_is_refused(tmp_path):
    os.chown(tmp_path, 12345, 12345)
    pid = os.fork()
    if pid == 0:
        os.setuid(23456)
        try:
            Store(tmp_path / "store.db")
        except StoreError as error:
            os._exit(0 if "belongs to another user" in str(error) or "cannot open" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_components_run_despite_a_damaged_database(store, tmp_path):
    """Committed items are also in the run set, with the device's MAC."""
    key, runset = b"k" * 32, tmp_path / "runset.json"
    store.save(committed=COMMITTED)
    facts = VerifierState(assignment=Remembered(7, "2" * 64, "keys"), command=Remembered(5, "3" * 64, "keys"))
    restore.write_runset(runset, store.committed(), facts.with_committed("a/web", 4), key)
    store.close()
    for suffix in ("-wal", "-shm"):
        (tmp_path / f"store.db{suffix}").unlink(missing_ok=True)
    (tmp_path / "store.db").write_bytes(b"rotten" * 1000)
    assert restore.committed(tmp_path / "store.db", runset, key) == (COMMITTED,)
    # A new store takes over the run set, so that running instances are recognised.
    (tmp_path / "store.db").unlink()
    assert restore.committed(tmp_path / "store.db", runset, key) == (COMMITTED,)
    anew = Store(tmp_path / "store.db")
    assert restore.take_over(anew, runset, key) == 1
    assert anew.committed() == (COMMITTED,)
    assert anew.facts() == facts.with_committed("a/web", 4), "nothing older is accepted than at the last commit"
    change = Change(instance="web", assignment=1, state=State(phase=Phase.SWAPPING), item=ITEM)
    stored = anew.apply(Transition(change=change, new_generation=True)).step.change
    assert stored.generation == COMMITTED.generation + LOST_GENERATIONS + 1, "none that was given before"
    assert anew.changes() == (stored,)
    assert restore.take_over(anew, runset, key) == 0, "once"
    anew.close()
    (tmp_path / "store.db").write_bytes(b"rotten" * 1000)
    # But not a run set written without the key.
    runset.write_bytes(runset.read_bytes().replace(b"1.0.0.wasm", b"6.6.6.wasm"))
    with pytest.raises(restore.RunsetError, match="MAC"):
        restore.committed(tmp_path / "store.db", runset, key)


def test_a_commit_raises_epochs_and_secrets_in_its_own_transaction(store, monkeypatch):
    before = VerifierState().with_committed("a/web", 4).with_secrets("web", {"key": 7}).with_root(3, "keys")
    store.save(facts=before)
    step = Transition(committed=COMMITTED, epochs={"a/web": 3, "a/new": 2}, secrets={"key": 6, "other": 1})
    with monkeypatch.context() as disk:
        disk.setattr(store, "_post", lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("disk I/O error")))
        with pytest.raises(StoreError, match="disk I/O"):
            store.apply(dataclasses.replace(step, report=report()))
    assert (store.facts(), store.committed()) == (before, ())
    store.apply(step)
    after = store.facts()
    assert after.epochs == {"a/web": 4, "a/new": 2}, "none falls"
    assert after.secrets == {"web/key": 7, "web/other": 1}
    assert after.root == 3, "and the rest stays"


def test_a_restarted_committed_item_gets_an_unused_generation(store):
    first = store.apply(Transition(committed=COMMITTED, new_generation=True)).step.committed
    again = store.apply(Transition(committed=first, new_generation=True)).step.committed
    assert (first.generation, again.generation) == (1, 2)
    assert store.committed() == (again,)


def test_rows_of_a_newer_agent_are_no_damage(tmp_path):
    """A downgrade is named, and nothing is set aside: the newer agent can read it all."""
    path = tmp_path / "store.db"
    newer = Store.renewed(path, version="0.10.0")
    newer.save(committed=COMMITTED, report=report())
    row = msgspec.json.encode(COMMITTED).replace(b'"manifest":{', b'"manifest":{"from_the_future":1,')
    newer._db.execute("REPLACE INTO committed VALUES ('web', ?)", (row,))
    newer._db.execute("UPDATE outbox SET body = CAST(replace(body, '\"idle\"', '\"levitating\"') AS BLOB)")
    newer.close()
    with pytest.raises(
        StoreError, match=r"last used by version 0\.10\.0 of the agent, and this one, 0\.9\.2"
    ) as raised:
        Store.renewed(path, version="0.9.2")
    assert not isinstance(raised.value, DamagedStoreError)
    assert not (tmp_path / "store.db.damaged").exists()
    again = Store(path)
    assert again._db.execute("SELECT count(*) FROM committed").fetchone() == (1,)
    assert again.history() == (), "a report that only the newer agent can read is sent, but not shown"
    assert len(again.unacked()) == 1
    again.close()


def test_a_database_of_a_newer_agent_that_this_one_can_read_is_used(tmp_path):
    Store.renewed(tmp_path / "store.db", version="0.10.0").close()
    Store.renewed(tmp_path / "store.db", version="0.9.2").close()
    Store.renewed(tmp_path / "store.db", version="").close()
    with sqlite3.connect(tmp_path / "store.db") as db:
        assert db.execute("SELECT value FROM meta WHERE name = 'agent_version'").fetchone() == (b"0.9.2",)


PATTERNS = {
    "zeros": lambda found: bytes(len(found)),
    "ones": lambda found: b"\xff" * len(found),
    "flipped": lambda found: bytes(each ^ 0xFF for each in found),
}
RANGES = [
    *((at, at + length) for length in (1, 4) for at in range(0, 100, length)),
    *((at, at + 128) for at in range(0, 4096, 128)),
    *((0, 100), (0, 4096), (100, 4096), (2048, 4096)),
]
"""Ranges of the first page: each byte and each number of the header, and each part of the schema behind it."""


@pytest.mark.parametrize(
    "pattern", ["ones", *(pytest.param(each, marks=pytest.mark.nightly) for each in ("zeros", "flipped"))]
)
def test_whatever_the_first_page_holds_the_store_is_whole_or_set_aside(tmp_path, pattern):
    path = tmp_path / "store.db"
    with closing(Store.renewed(path, version="0.2.0")) as store:
        store.set_counter("accepted", 7)
    good = path.read_bytes()
    harm, rebuilt = PATTERNS[pattern], 0
    for start, end in RANGES:
        for each in tmp_path.iterdir():
            each.unlink()
        path.write_bytes(good[:start] + harm(good[start:end]) + good[end:])
        with closing(Store.renewed(path, version="0.2.0")) as store:
            kept = store.counter("accepted") == 7
            assert kept != bool(store.replaced), (start, end)
            assert (tmp_path / "store.db.damaged").exists() != kept, (start, end)
            store.set_counter("accepted", 8)
            rebuilt += not kept
    assert rebuilt > 30


def test_a_database_that_another_process_locks_is_not_set_aside(tmp_path, monkeypatch):
    path = tmp_path / "store.db"
    Store.renewed(path, version="0.2.0").close()
    monkeypatch.setattr(agent_store, "BUSY_S", 0.01)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("PRAGMA locking_mode=EXCLUSIVE")
        other.execute("BEGIN EXCLUSIVE")
        other.execute("REPLACE INTO counters VALUES ('x', 1)")
        with pytest.raises(StoreError, match="locked"):
            Store.renewed(path, version="0.2.0")
    assert not (tmp_path / "store.db.damaged").exists()
