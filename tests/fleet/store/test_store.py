"""The server's memory: what it refuses to open, what it never forgets, and what it keeps apart."""

import gc
import os
import sqlite3
import stat
from datetime import UTC, datetime

import pytest
import sqlite_utils
from msgspec.structs import replace

from fleet.protocol.codes import Outcome, RolloutState
from fleet.protocol.messages import Health, Hello, State, Versions
from fleet.rollout import advance
from fleet.rollout.decide import Gate, Rollout
from fleet.rollout.members import Amount, parse_waves
from fleet.rollout.model import Member, Value, wants
from fleet.store import sqlite
from fleet.store.rollouts import NewRollout
from fleet.store.rows import AssignmentRow, ReportRow, RolloutPlan
from fleet.store.sqlite import (
    DamagedError,
    Database,
    OtherFleetError,
    OtherOwnerError,
    OtherVersionError,
    RolledBackError,
)
from fleet.store.store import Store

A, B = "a-00000001", "b-00000002"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "fleet.db"


@pytest.fixture
def store(path):
    store = Store.open(path, fleet="test")
    for device in (A, B):
        assert store.devices.add(
            device=device, name=device[0], machine="", sealing_key="", key_sha256=device, group="edge", now=1.0
        )
    yield store
    store.close()


# Opening


def test_what_was_committed_is_there_when_it_is_opened_again(path, store):
    store.close()
    again = Store.open(path, fleet="test")
    assert [row.id for row in again.devices.all()] == [A, B]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again.close()


def test_a_database_of_a_newer_program_is_refused(path, store):
    store.close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(OtherVersionError, match=r"newer wasmfleet .* upgrade"):
        Store.open(path, fleet="test")


def test_a_database_of_another_fleet_is_refused(path, store):
    store.close()
    with pytest.raises(OtherFleetError, match="holds the fleet 'test'"):
        Store.open(path, fleet="other")


def test_something_that_is_no_database_is_refused(path):
    path.write_bytes(b"not a database, but long enough to be looked at" * 100)
    with pytest.raises(DamagedError, match="restore it"):
        Store.open(path, fleet="test")


def test_a_database_of_another_user_is_refused(path, store, monkeypatch):
    store.close()
    monkeypatch.setattr(sqlite.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(OtherOwnerError, match="belongs to the user"):
        Store.open(path, fleet="test")


def test_a_migration_that_fails_leaves_nothing_behind(path, monkeypatch):
    def broken(db):
        db.execute("CREATE TABLE half (x)")
        raise RuntimeError("power cut")

    monkeypatch.setattr(sqlite, "MIGRATIONS", [*sqlite.MIGRATIONS, broken])
    with pytest.raises(RuntimeError):
        Store.open(path, fleet="test")
    monkeypatch.undo()
    store = Store.open(path, fleet="test")
    assert store.devices.all() == []
    with sqlite3.connect(path) as db:
        assert not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'half'").fetchall()
    store.close()


@pytest.mark.parametrize("number", range(1, len(sqlite.MIGRATIONS) + 1))
def test_a_migration_that_is_interrupted_runs_again_from_its_beginning(path, monkeypatch, number):
    *before, migrate = sqlite.MIGRATIONS[:number]

    def interrupted(db):
        migrate(db)
        raise RuntimeError("power cut")

    # as in sqlite-utils before 4, which Debian has: it commits first
    monkeypatch.setattr(sqlite_utils.Database, "executescript", lambda db, sql: db.conn.executescript(sql))
    monkeypatch.setattr(sqlite, "MIGRATIONS", [*before, interrupted])
    with pytest.raises(RuntimeError, match="power cut"):
        Store.open(path, fleet="test")
    monkeypatch.undo()
    with sqlite3.connect(path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (number - 1,)
    store = Store.open(path, fleet="test")
    assert store.devices.all() == []
    store.close()


@pytest.mark.parametrize("version", [2, 3, 4])
def test_a_rollout_of_an_older_database_keeps_its_devices(path, monkeypatch, version):
    monkeypatch.setattr(sqlite, "MIGRATIONS", sqlite.MIGRATIONS[:version])
    Database.open(path, fleet="test").close()
    monkeypatch.undo()
    with sqlite3.connect(path) as db:
        db.execute(
            'INSERT INTO rollouts (id, "group", device, instance, value, before, state, waves, sizes, failures, soak_s,'
            " timeout_s, by, created_at) VALUES ('r1', 'edge', '', 'hello', '{\"target\":\"v1\"}', 'null', 'running',"
            " '100%', '[1]', 0, 0, 60, 'admin', 1)"
        )
        db.execute(
            "INSERT INTO boards (rollout, device, wave, outcome, offered_at, attempt, phase, code, message, running,"
            " exercised, retrying, previous) VALUES (1, ?, 1, 'waiting', 2, 0, '', '', '', '', 1, 0, 'v0')",
            (A,),
        )
    store = Store.open(path, fleet="test")
    member, extra = store.rollouts.member(1, A)
    assert (member.device, member.outcome, extra.offered_at, extra.previous) == (A, Outcome.WAITING, 2.0, "v0")
    assert [(row.id, offered.wave) for row, offered in store.rollouts.overlays(A)] == [("r1", 1)]
    row = store.rollouts.get("r1")
    assert (row.plan.limits.failures, row.plan.limits.timeout_s, len(row.model.gates)) == (Amount(0), 60, 1)
    store.close()


@pytest.mark.parametrize(
    ("state", "outcome", "offered", "now"),
    [
        ("halted", "failed", 2, ("reverted", "failed")),
        ("halted", "refused", 2, ("reverted", "failed")),
        ("halted", "skipped", None, ("reverted", "not-affected")),
        ("halted", "skipped", 2, ("reverted", "reverted")),
        ("aborted", "succeeded", 2, ("aborted", "succeeded")),
        ("superseded", "skipped", 2, ("superseded", "superseded")),
        ("succeeded", "waiting", 2, ("succeeded", "waiting")),
        ("paused", "in-progress", 2, ("paused", "in-progress")),
    ],
)
def test_outcomes_and_states_of_earlier_rollouts_become_the_present_words(
    path, monkeypatch, state, outcome, offered, now
):
    monkeypatch.setattr(sqlite, "MIGRATIONS", sqlite.MIGRATIONS[:5])
    Database.open(path, fleet="test").close()
    monkeypatch.undo()
    with sqlite3.connect(path) as db:
        db.execute(
            'INSERT INTO rollouts (id, "group", device, instance, value, before, state, waves, sizes, failures, soak_s,'
            " timeout_s, by, created_at, wave) VALUES ('r1', 'edge', '', 'hello', '{\"target\":\"v1\"}', 'null', ?,"
            " '1, 5%, 100%', '[1, 1, 4]', 2, 30, 60, 'admin', 1, 2)",
            (state,),
        )
        db.execute(
            "INSERT INTO rollout_devices (rollout, device, wave, outcome, offered_at, attempt, phase, code, message,"
            " running, exercised, retrying) VALUES (1, ?, 1, ?, ?, 3, '', 'trapped', 'why', '', 1, 0)",
            (A, outcome, offered),
        )
    store = Store.open(path, fleet="test")
    row = store.rollouts.get("r1")
    member, _ = store.rollouts.member(1, A)
    assert (row.state, member.outcome) == now
    assert (row.model.state, row.progress.wave, [gate.soak_s for gate in row.progress.gates]) == (now[0], 2, [30] * 3)
    assert [str(stage) for stage in row.plan.stages] == ["1", "5%", "100%"]
    assert (member.attempt, member.code) == (3, "trapped")
    store.close()


# Devices


def test_a_second_device_with_the_same_key_or_id_is_not_taken_in(store):
    same_key = store.devices.add(
        device="c-00000003", name="c", machine="", sealing_key="", key_sha256=A, group="", now=2.0
    )
    assert not same_key
    assert [row.id for row in store.devices.all()] == [A, B]


def test_hello_and_health_overwrite_and_the_accepted_version_never_falls(store):
    hello = Hello(
        device=A, nonce="n", boot_id="boot", accepted=7, deployed=7, committed=6, versions=Versions(agent="2")
    )
    store.devices.hear_hello(hello, 5.0)
    health = Health(device=A, boot_id="boot", at=datetime.now(UTC), accepted=3, committed=7)
    store.devices.hear_health([(health, b"{}")], 6.0)
    row = store.devices.get(A)
    assert (row.online, row.accepted, row.committed, row.seen_at) == (True, 7, 7, 6.0)


def test_coming_and_going_is_news_once(store):
    assert store.devices.hear_state(State(device=A, online=True), 1.0)
    assert not store.devices.hear_state(State(device=A, online=True), 2.0)
    assert store.devices.hear_state(State(device=A, online=False), 3.0)
    assert not store.devices.hear_state(State(device="z-00000009", online=True), 3.0)


def test_a_group_is_listed_or_chosen_by_labels(store):
    store.devices.ensure_group("sensors", now=1.0)
    store.devices.change_group("sensors", priority=3, selector={"kind": "sensor"})
    assert store.devices.members(store.devices.group("sensors")) == []
    store.devices.set_labels(B, {"kind": "sensor", "floor": "2"})
    assert store.devices.members(store.devices.group("sensors")) == [B]
    assert [group.name for group in store.devices.groups_of(store.devices.get(B))] == ["edge", "sensors"]
    store.devices.revoke(B)
    assert store.devices.members(store.devices.group("sensors")) == []
    assert store.devices.members(store.devices.group("edge")) == [A]


# Access


def test_a_token_is_good_once_and_lies_there_only_as_a_hash(store, path):
    store.access.add_token("secret", group="edge", root_sha256="00", expires=9.0, by="admin", now=1.0)
    assert store.access.token("other") is None
    assert store.access.token("secret").used_at is None
    assert store.access.use_token("secret", device=A, now=2.0)
    assert not store.access.use_token("secret", device=B, now=3.0)
    assert store.access.token("secret").device == A
    store.close()
    assert all("'secret'" not in line for line in sqlite3.connect(path).iterdump())


def test_the_audit_log_can_only_grow(store, path):
    store.access.audit(actor="admin", act="deploy", subject="r1", now=1.0)
    store.close()
    with sqlite3.connect(path) as db:
        for statement in ("DELETE FROM audit", "UPDATE audit SET actor = 'nobody'"):
            with pytest.raises(sqlite3.IntegrityError, match="append-only"):
                db.execute(statement)


# Rollouts and delivery


def begin(store, *, instance="hello", value=None, group="edge", where=""):
    new = NewRollout(
        id=f"r{instance}{value}", group=group, device="", instance=instance, value=Value(value or "v1"), before=None,
        waves="1, 100%", plan=RolloutPlan(stages=parse_waves("1, 100%"), where=where), by="admin",
        progress=Rollout(RolloutState.RUNNING, (Gate(), Gate())), members=(Member(A, 1), Member(B, 2)),
    )  # fmt: skip
    return store.rollouts.create(new, now=1.0)


def offer(store, row, device, *, now):
    member, _ = store.rollouts.member(row.number, device)
    store.rollouts.set_members(row.number, [advance.offered(member, 7.0)], now=now)


def in_force(store, device):
    return [row.value.target for row, member in store.rollouts.overlays(device) if wants(row.state, member)]


def test_only_devices_that_were_offered_it_are_overlaid(store):
    row = begin(store)
    assert in_force(store, A) == []
    offer(store, row, A, now=2.0)
    assert (in_force(store, A), in_force(store, B)) == (["v1"], [])
    store.rollouts.save(row.number, replace(row.model, state=RolloutState.REVERTED), reason="", now=3.0)
    assert in_force(store, A) == []
    assert store.rollouts.get(row.id).ended_at == 3.0


def test_a_superseded_rollout_stays_in_force_while_its_successor_is_open(store):
    first = begin(store, value="v1")
    offer(store, first, A, now=2.0)
    second = begin(store, value="v2")
    store.rollouts.save(first.number, replace(first.model, state=RolloutState.SUPERSEDED), reason="", now=3.0)
    store.rollouts.set_superseded_by(first.number, second.number)
    assert in_force(store, A) == ["v1"]
    offer(store, second, A, now=4.0)
    assert in_force(store, A) == ["v1", "v2"]
    store.rollouts.save(second.number, replace(second.model, state=RolloutState.REVERTED), reason="", now=5.0)
    assert in_force(store, A) == []


def test_a_device_is_busy_in_the_queue_of_a_value_that_stands_beside_the_settled_one(store):
    scope = {"group": "edge", "device": "", "instance": "hello"}
    first = begin(store, value="v1")
    offer(store, first, A, now=2.0)
    store.rollouts.save(first.number, replace(first.model, state=RolloutState.SUCCEEDED), reason="", now=3.0)
    store.rollouts.settle(**scope, value=first.value, rollout=first.id, now=3.0)
    assert store.rollouts.busy([]) == {A}
    second = begin(store, value="v2", where="site=paris")
    left_out = Member(A, 0, outcome=Outcome.NOT_AFFECTED, cancelled=True)
    store.rollouts.set_members(second.number, [left_out], now=4.0)
    store.rollouts.save(second.number, replace(second.model, state=RolloutState.SUCCEEDED), reason="", now=5.0)
    store.rollouts.settle(**scope, value=second.value, rollout=second.id, now=5.0)
    assert first.number in [row.number for row in store.rollouts.queues()]
    assert store.rollouts.busy([]) == {A}
    store.rollouts.settle(**scope, value=Value("v3"), rollout="r3", now=6.0)
    assert store.rollouts.busy([]) == frozenset(), "nobody was left out of the third"


def test_each_change_of_a_rollout_raises_its_revision(store):
    row = begin(store)
    offer(store, row, A, now=2.0)
    member, _ = store.rollouts.member(row.number, A)
    store.rollouts.hear(row.number, member, log=("line",), timings_ms={"x": 1}, now=2.0)
    assert store.rollouts.get(row.id).revision == 2, "a batch of reports raises it once"
    store.rollouts.moved(row.number)
    store.rollouts.save(row.number, row.model, reason="why", now=3.0)
    after = store.rollouts.get(row.id)
    assert (after.revision, after.reason, after.ended_at) == (4, "why", None)
    assert store.rollouts.member(row.number, A)[1].log == ("line",)


def test_times_for_people_are_kept_from_the_first_moment(store):
    row = begin(store)
    offer(store, row, A, now=2.0)
    member, _ = store.rollouts.member(row.number, A)
    done = replace(member, outcome=Outcome.SUCCEEDED, began_at=8.0, ended_at=9.0)
    store.rollouts.set_members(row.number, [done], now=5.0)
    store.rollouts.set_members(row.number, [replace(done, code="")], now=6.0)
    extra = store.rollouts.member(row.number, A)[1]
    assert (extra.offered_at, extra.acked_at, extra.ended_at) == (2.0, 5.0, 5.0)
    store.rollouts.set_members(row.number, [replace(done, ended_at=None)], now=7.0)
    assert store.rollouts.member(row.number, A)[1].ended_at is None


def test_a_value_is_found_behind_any_number_of_those_that_are_left_out(store):
    scope = {"group": "edge", "device": "", "instance": "hello"}
    for number in range(151):
        store.rollouts.settle(**scope, value=Value(f"v{number}"), rollout=f"r{number}", now=float(number))
    without = {f"r{number}" for number in range(1, 151)}
    assert [each.rollout for each in store.rollouts.settled_history(**scope, without=without)] == ["r0"]


def test_settled_values_come_and_go_with_their_history(store):
    scope = {"group": "edge", "device": "", "instance": "hello"}
    for number in (1, 2):
        store.rollouts.settle(**scope, value=Value(f"v{number}"), rollout=f"r{number}", now=float(number))
    assert store.rollouts.settled_value(**scope) == Value("v2")
    store.rollouts.settle(**scope, value=None, rollout="", now=3.0)
    assert store.rollouts.settled_value(**scope) is None


def report(sequence, *, device=A, boot="boot"):
    return ReportRow(device=device, boot_id=boot, sequence=sequence, at=1.0, rollout="", raw=b"{}")


def acknowledge(store, *, again):
    return store.delivery.acknowledge(A, store.delivery.acked([A])[A], again=again)


def test_reports_are_acknowledged_up_to_the_first_gap(store):
    for sequence in (1, 2, 4):
        assert store.delivery.add_report(report(sequence))
    assert acknowledge(store, again=None) == 2
    assert store.delivery.add_report(report(3))
    assert acknowledge(store, again=None) == 4


def test_a_report_that_comes_again_is_known_and_shows_that_the_gap_below_it_is_for_good(store):
    # the database was restored from a backup: the device has forgotten what was acknowledged before
    assert store.delivery.add_report(report(50))
    assert acknowledge(store, again=None) == 0
    assert not store.delivery.add_report(report(50))
    assert acknowledge(store, again=50) == 50


def test_reports_of_strangers_are_not_kept(store):
    assert not store.delivery.add_report(report(1, device="z-00000009"))


def test_only_the_newest_assignments_are_kept(store):
    for version in range(1, 31):
        store.delivery.add_assignment(
            AssignmentRow(
                device=A, version=version, sha256="", issued=0.0, expires=100.0 + version, wanted="", envelope=b"x"
            )
        )
    assert store.delivery.assignment(A).version == 30
    assert store.delivery.expiring(130.5) == [A]
    assert store.delivery.expiring(129.5) == []
    assert store.delivery.behind() == [A]
    with pytest.raises(sqlite3.IntegrityError):
        store.delivery.add_assignment(
            AssignmentRow(device=A, version=30, sha256="", issued=0.0, expires=1.0, wanted="", envelope=b"y")
        )


def test_nothing_of_a_transaction_that_fails_is_kept(store):
    def interrupted():
        with store.atomic():
            store.devices.set_labels(A, {"x": "y"})
            with store.atomic():
                store.delivery.set_attempt(A, "hello", 3)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert store.devices.get(A).labels == {}
    assert store.delivery.attempts(A) == {}


def test_a_part_of_a_transaction_that_fails_is_undone_alone(store):
    def fails():
        with store.savepoint():
            store.devices.set_labels(A, {"second": "2"})
            store.devices.touch([A], 2**63)

    with store.atomic():
        with store.savepoint():
            store.devices.set_labels(A, {"first": "1"})
        with pytest.raises(OverflowError):
            fails()
        with store.savepoint(), store.atomic():
            store.devices.set_labels(B, {"third": "3"})
    assert [row.labels for row in store.devices.all()] == [{"first": "1"}, {"third": "3"}]


def test_a_transaction_that_sqlite_gave_up_is_told_from_a_part_that_failed(store):
    def given_up():
        with store.atomic():
            store.devices.set_labels(A, {"first": "1"})
            with store.savepoint():
                store._db.run("INSERT OR ROLLBACK INTO devices SELECT * FROM devices")  # as a full disk may do

    with pytest.raises(RolledBackError):
        given_up()
    assert store.devices.get(A).labels == {}
    with store.atomic():
        store.devices.set_labels(A, {"next": "1"})
    assert store.devices.get(A).labels == {"next": "1"}


def test_a_backup_is_a_whole_store(store, tmp_path):
    store.backup(tmp_path / "copy.db")
    copy = Store.open(tmp_path / "copy.db", fleet="test")
    assert [row.id for row in copy.devices.all()] == [A, B]
    copy.close()


def test_a_backup_is_one_file_with_its_mark_in_it(store, tmp_path):
    """The file is carried away alone: what stands in a log beside it would be lost."""
    gc.disable()
    try:
        store.backup(tmp_path / "copy.db")
        assert [each.name for each in tmp_path.glob("copy.db*")] == ["copy.db"]
    finally:
        gc.enable()
    copy = Store.open(tmp_path / "copy.db", fleet="test")
    assert copy.restored_at(now=7.0) == 7.0
    copy.close()


def test_old_reports_are_deleted_a_few_at_a_time_and_the_database_is_free_in_between(store, tmp_path):
    for number in range(1, 1201):
        at = 10.0 if number <= 1100 else 1000.0
        store.delivery.add_report(ReportRow(device=A, boot_id="b", sequence=number, at=at, rollout="", raw=b"{}"))
    store.devices.note(A, "online", "came online", now=10.0)
    steps = []
    for deleted in store.delivery.forgetting(before=100.0):
        steps.append(deleted)
        store.devices.note(A, "online", "others write meanwhile", now=1000.0)
    assert steps == [500, 500, 100, 1]
    assert len(store.delivery.reports(A, 2000)) == 100
    assert store.delivery.forget(before=100.0) == 0


def test_what_decides_over_devices_takes_as_many_queries_for_a_hundred_as_for_one(store):
    names = [f"c-{number:08x}" for number in range(100)]
    for name in names:
        store.devices.add(device=name, name="c", machine="", sealing_key="", key_sha256=name, group="edge", now=1.0)
    row = begin(store)
    member, _ = store.rollouts.member(row.number, A)
    store.rollouts.add_members(row.number, [replace(member, device=name) for name in names])
    store.rollouts.settle(group="edge", device="", instance="other", value=Value("v0"), rollout="", now=1.0)
    store.rollouts.settle(group="", device=names[7], instance="hello", value=Value("v9"), rollout="", now=1.0)
    store.rollouts.set_own_key(names[3], "hello", "room", "cellar")
    store.delivery.set_attempt(names[4], "hello", 2)

    def asked(devices):
        seen = []
        store._db._db.conn.set_trace_callback(seen.append)
        found = store.facts(store.devices.some(devices))
        store._db._db.conn.set_trace_callback(None)
        return found, len(seen)

    one, few = asked([A])
    found, many = asked(names)
    assert (set(one), set(found), many) == ({A}, set(names), few)
    first = found[names[0]]
    assert [group.name for group in first.groups] == ["edge"]
    assert [each.value.target for each in first.settled["edge"]] == ["v0"]
    assert [(each.number, member.device) for each, member in first.in_force] == [(row.number, names[0])]
    assert (first.settled[""], first.own, first.attempts, first.boxes, first.newest) == ([], {}, {}, {}, None)
    assert [each.value.target for each in found[names[7]].settled[""]] == ["v9"]
    assert found[names[3]].own == {"hello": {"room": "cellar"}}
    assert found[names[4]].attempts == {"hello": 2}
