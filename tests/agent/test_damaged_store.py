"""Damaged store.db of a device whose component runs: the agent rebuilds it by itself, and the component goes on."""

import os
import re
import sqlite3
import time

import pytest

from agent.host.ipc import host_api
from agent.update.machine import State
from agent.update.state import Change, FailedItem, Transition, Violation
from agent.update.store import Store
from fleet.protocol.codes import Phase, RejectCode
from fleet.protocol.messages import Report
from tests.agent.running_device import RunningDevice, committed_demo
from tests.eventually import eventually


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    with RunningDevice(tmp_path_factory.mktemp("device"), "web") as made:
        made.start_host()
        restored = made.agent("restore")
        assert restored.returncode == 0, restored.stderr
        fill(made)
        yield made


def fill(device):
    """Give each table a row, so that each has something to lose."""
    committed, _ = committed_demo("other")
    item, at = committed.item, committed.at
    store = Store(device.places.database)
    failure = FailedItem(instance="other", key="k", attempt=0, target="t", code=RejectCode.TRAPPED, message="m", at=at)
    report = Report(device="d-01234567", boot_id="b", sequence=0, at=at, assignment=1, instance="other")
    store.apply(Transition(failure=failure, report=report))
    store.apply(Transition(change=Change(instance="other", assignment=1, state=State(phase=Phase.FETCHING), item=item)))
    store.set_doubts([Violation(instance="web", key="k", target="t", code=RejectCode.REVOKED, message="m")])
    store.set_problems(["a problem"])
    store.close()


def tables(device):
    with sqlite3.connect(device.places.database) as db:
        rows = db.execute("SELECT name, rootpage FROM sqlite_schema WHERE type = 'table'").fetchall()
        return dict(rows), db.execute("PRAGMA page_size").fetchone()[0]


def harm(device, table, what):
    """Leave something else of a table's page, as a worn card does."""
    pages, size = tables(device)
    with device.places.database.open("r+b") as file:
        file.seek((pages[table] - 1) * size)
        file.write(what(size))


TABLES = ("meta", "counters", "committed", "changes", "failed", "outbox", "sqlite_sequence")
PAGES = {"zeros": bytes, "noise": os.urandom}


def facts_of(device):
    """What the host says of the instance: nobody touched it as long as these stay."""
    health = device.ask_host(host_api.Status).instances[0]
    return device.ask_host().session, health.instance, health.generation, health.since, health.restarts


def rebuilds(device):
    """Start and stop the agent on a damaged store; it says so, and what runs stays as it is."""
    before, said = facts_of(device), len(device.said("agent"))
    (device.state / "store.db.damaged").unlink(missing_ok=True)
    process = device.start_agent()
    new = device.said("agent")[said:]
    assert "Traceback" not in new
    assert "took over 1 instances" in new
    assert (device.state / "store.db.damaged").exists()
    status = device.agent("status")
    assert status.returncode == 0, status.stderr
    assert "store.db was damaged and is rebuilt" in status.stdout
    assert "web: runs main/hello@1.0.0" in status.stdout
    process.terminate()
    process.wait(60)
    assert facts_of(device) == before
    assert device.answers() == 200


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("damage", PAGES)
def test_a_damaged_page_of_any_table(device, table, damage):
    fill(device)
    harm(device, table, PAGES[damage])
    rebuilds(device)


FIRST_PAGE = {
    "unsupported file format": (47, b"\xff"),
    "attempt to write a readonly database": (18, b"\xff"),
    "a schema of the future": (60, b"\x7f"),
    "a schema that is no UTF-8": (4032, b"\xff" * 64),
    "no such column": (3392, b"\xff" * 64),
    "not a database": (0, bytes(100)),
}
"""Damages of the first page for which SQLite has errors of its own: offset and bytes."""


@pytest.mark.parametrize("error", FIRST_PAGE)
def test_a_first_page_that_sqlite_reads_as_something_else(device, error):
    fill(device)
    offset, damage = FIRST_PAGE[error]
    with device.places.database.open("r+b") as file:
        file.seek(offset)
        file.write(damage)
    rebuilds(device)


ROWS = {
    "facts": "UPDATE meta SET value = ? WHERE name = 'facts'",
    "doubts": "UPDATE meta SET value = ? WHERE name = 'doubts'",
    "problems": "UPDATE meta SET value = ? WHERE name = 'problems'",
    "committed": "UPDATE committed SET body = ?",
    "changes": "UPDATE changes SET body = ?",
    "failed": "UPDATE failed SET body = ?",
    "outbox": "UPDATE outbox SET body = ?",
}


@pytest.mark.parametrize("row", ROWS)
def test_a_damaged_row_of_a_whole_page(device, row):
    """Pages have no checksums: SQLite cannot see that the bytes of a row have changed."""
    fill(device)
    with sqlite3.connect(device.places.database) as db:
        db.execute(ROWS[row], (b'{"insta\0\0\0\0',))
    db.close()
    rebuilds(device)


def test_a_database_that_is_damaged_while_the_agent_runs(device):
    """The agent ends with a sentence, and its next start rebuilds the database."""
    fill(device)
    said = len(device.said("agent"))
    process = device.start_agent(env={"WATCHDOG_USEC": "300000"})
    with sqlite3.connect(device.places.database) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        harm(device, "counters", os.urandom)
        db.execute("REPLACE INTO meta VALUES ('x', 'y')")  # the agent reads its pages again
    db.close()
    assert process.wait(60) == 1
    new = device.said("agent")[said:]
    assert "Traceback" not in new
    assert "its next start rebuilds it" in new
    rebuilds(device)


JUDGED = re.compile("what runs stays|neither committed nor being changed")


def test_a_database_that_is_lost_with_its_second_record_stops_nothing(device):
    """What runs stays until the fleet says what should: the agent knows of nothing that should not run."""
    fill(device)
    runset, before = device.places.runset.read_bytes(), facts_of(device)
    harm(device, "committed", bytes)
    device.places.runset.write_bytes(b"{}")
    for _ in range(2):  # nor does the next start, which finds a whole database
        said = len(device.said("agent"))
        process = device.start_agent()
        eventually(lambda at=said: JUDGED.search(device.said("agent")[at:]), "the host is looked at")
        process.terminate()
        process.wait(60)
        assert facts_of(device) == before
        assert device.answers() == 200
    device.places.database.unlink()
    device.places.runset.write_bytes(runset)
    rebuilt = device.start_agent()
    rebuilt.terminate()
    rebuilt.wait(60)
    assert "web: runs main/hello@1.0.0" in device.agent("status").stdout


def test_reports_and_generations_go_on_beyond_those_that_were_lost(device):
    """The server drops reports whose sequence it has, and the host a start whose generation it runs."""
    store = Store(device.places.database)
    before = store.save(report=Report(device="d", boot_id="b", sequence=0, at=committed_demo()[0].at, assignment=1))
    store.set_counter("generation", 7)  # given to changes that were never committed
    store.close()
    # A new store counts on from the clock's seconds, and a device makes fewer reports than one a second.
    eventually(lambda: time.time() > before, "the clock is past the report")
    harm(device, "outbox", bytes)
    rebuilds(device)
    store = Store(device.places.database)
    after = store.save(report=Report(device="d", boot_id="b", sequence=0, at=committed_demo()[0].at, assignment=1))
    assert after > before
    assert store.counter("generation") > 7
    store.close()
