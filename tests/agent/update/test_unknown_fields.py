"""Records of a newer agent that an older one writes back, after a downgrade: what only the newer one knows is kept."""

import json
import sqlite3
from contextlib import closing

import msgspec
import pytest

from agent.update import restore
from agent.update.store import Store
from fleet.protocol import wire
from signing.state import Remembered, VerifierState

NEWER = {"from_the_future": {"a": [1]}}


class Inner(msgspec.Struct, frozen=True):
    known: int = 0


class Outer(msgspec.Struct, frozen=True):
    inner: Inner = Inner()
    goes_on: Inner = Inner()
    known: int = 0


@pytest.mark.parametrize(
    ("before", "after", "written"),
    [
        ({"new": 1}, Outer(known=2), {"new": 1}),
        ({"inner": {"known": 3, "new": 1}}, Outer(inner=Inner(3)), {"inner": {"known": 3, "new": 1}}),
        ({"inner": {"known": 3, "new": 1}}, Outer(inner=Inner(4)), {"inner": {"known": 4}}),
        ({"goes_on": {"known": 3, "new": 1}}, Outer(goes_on=Inner(4)), {"goes_on": {"known": 4, "new": 1}}),
        ({"inner": "of another type"}, Outer(), {}),
        ({"inner": {"known": "of another type"}}, Outer(), {}),
        ([], Outer(known=1), {}),
    ],
)
def test_fields_that_only_a_newer_version_knows(before, after, written):
    found = json.loads(wire.keeping(json.dumps(before).encode(), after, goes_on=("goes_on",)))
    assert found == json.loads(msgspec.json.encode(after)) | written


def test_a_record_that_is_damaged_is_replaced():
    assert json.loads(wire.keeping(b"\xff{", Outer(known=1)))["known"] == 1


def bodies(store_file, table):
    with closing(sqlite3.connect(store_file)) as db:
        column = "value" if table == "meta" else "body"
        where = "WHERE name = 'facts'" if table == "meta" else ""
        return [json.loads(body) for (body,) in db.execute(f"SELECT {column} FROM {table} {where}")]


def of_the_future(store_file, table):
    """Let a newer agent have written the rows of a table."""
    column = "value" if table == "meta" else "body"
    with closing(sqlite3.connect(store_file)) as db, db:
        name = "name" if table == "meta" else "instance"
        for key, body in db.execute(f"SELECT {name}, {column} FROM {table}").fetchall():
            if table != "meta" or key == "facts":
                changed = json.dumps(json.loads(body) | NEWER).encode()
                db.execute(f"UPDATE {table} SET {column} = ? WHERE {name} = ?", (changed, key))


@pytest.mark.asyncio
async def test_a_change_that_a_newer_agent_began_is_carried_on(kit):
    """The older agent takes over while the host starts the new version."""
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        begun = len(kit.host.requests)
        kit.host.hang_on.add(restore.host_api.Start)
        await kit.deployer.desire(kit.assignment(2, kit.publish("2.0.0")))
        await kit.until(lambda: any(isinstance(each, restore.host_api.Start) for each in kit.host.requests[begun:]))
        assert bodies(kit.places.database, "changes")[0]["state"]["phase"] == "swapping"
        await kit.stop_agent()
        for table in ("changes", "committed", "meta"):
            of_the_future(kit.places.database, table)
        kit.host.hang_on.clear()
        kit.host.hold_on.add(restore.host_api.Status)
        await kit.start_agent()
        await kit.until(lambda: kit.host.held)
        assert bodies(kit.places.database, "changes")[0]["from_the_future"] == {"a": [1]}
        kit.host.hold_on.clear()
        kit.host.release()
        await kit.settled()
        assert kit.host.targets() == {"web": "components/acme/web/2.0.0.wasm"}
        assert bodies(kit.places.database, "meta")[0]["from_the_future"] == {"a": [1]}
        # the item that was replaced was what the newer agent knew something of
        assert "from_the_future" not in bodies(kit.places.database, "committed")[0]


def test_what_the_verifier_remembers_and_the_run_set(tmp_path):
    path, runset = tmp_path / "store.db", tmp_path / "runset.json"
    with closing(Store.renewed(path)) as store:
        store.save(facts=VerifierState(assignment=Remembered(1, "1" * 64, "k")))
        restore.write_runset(runset, (), store.facts(), b"k")
    of_the_future(path, "meta")
    plain = json.loads(runset.read_bytes()) | NEWER
    plain["facts"] |= NEWER
    plain["mac"] = restore._mac(wire.canonical(plain), b"k")
    runset.write_bytes(wire.canonical(plain))
    with closing(Store.renewed(path)) as store:
        store.accept(b"{}", 2, VerifierState(assignment=Remembered(2, "2" * 64, "k")))
        restore.write_runset(runset, (), store.facts(), b"k")
        assert store.facts().assignment.version == 2
    assert bodies(path, "meta")[0]["from_the_future"] == {"a": [1]}
    written = json.loads(runset.read_bytes())
    assert written["from_the_future"] == written["facts"]["from_the_future"] == {"a": [1]}
    assert restore.read_runset(runset, b"k") == ()


def test_a_downgrade_is_named(tmp_path, caplog):
    path = tmp_path / "store.db"
    Store.renewed(path, version="0.10.0").close()
    with closing(Store.renewed(path, version="0.9.0")) as store:
        assert "version 0.9.0, is older than the last one here, 0.10.0" in store.downgraded
        assert store.downgraded in caplog.text
    with closing(Store.renewed(path, version="0.9.0")) as store:
        assert not store.downgraded
