"""Interface to systemd: notifications, watchdog, and fields in the journal."""

import asyncio
import logging
import os
import select
import socket
import sys
from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from agent import systemd
from agent.host.supervisor import supervisor
from agent.service import Watchdog
from agent.update import state as reports
from agent.update.state import DeploymentState
from agent.update.store import Database, Store
from fleet.protocol.codes import Phase, RejectCode
from fleet.protocol.messages import Report


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """Receive notifications as systemd does."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.bind(str(tmp_path / "notify"))
    sock.settimeout(10)
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    yield sock
    sock.close()


def told(manager):
    return dict(line.split("=", 1) for line in manager.recv(4096).decode().splitlines())


def nothing_more(manager):
    assert not select.select([manager], [], [], 0)[0]


def test_without_systemd_nothing_is_sent(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    assert not systemd.notify(READY="1")
    assert systemd.watchdog_s() is None


def test_a_status_is_always_a_single_line(manager):
    assert systemd.notify(READY="1", STATUS="connected\nWATCHDOG=trigger")
    assert told(manager) == {"READY": "1", "STATUS": "connected WATCHDOG=trigger"}


@pytest.mark.parametrize(("number", "said"), [(0, "0 instances"), (1, "1 instance"), (3000, "3000 instances")])
def test_a_status_uses_singular_and_plural(number, said):
    assert systemd.instances(number) == said


def test_the_watchdog_is_notified_three_times_within_its_timeout(monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "120000000")
    assert systemd.watchdog_s() == 40
    # meant for this process, not for its children
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    assert systemd.watchdog_s() is None


@pytest.mark.asyncio
async def test_a_blocked_agent_does_not_notify_the_watchdog(manager, monkeypatch, tmp_path):
    monkeypatch.setenv("WATCHDOG_USEC", "3000")

    db, stands_still, go_on = Database(Store(tmp_path / "store.db")), asyncio.Event(), asyncio.Event()
    turns = iter(range(1, 1000))

    async def work(call, *arguments):
        if next(turns) == 2:
            stands_still.set()
            await go_on.wait()
        await db(call, *arguments)

    state, presence = DeploymentState(committed={"web": None}), SimpleNamespace(connected=True)
    dog = asyncio.ensure_future(Watchdog(db=work, state=state, presence=presence).run())
    async with asyncio.timeout(20):
        await stands_still.wait()
        assert told(manager) == {"WATCHDOG": "1", "STATUS": "connected; 1 instance"}
        nothing_more(manager)
        go_on.set()
        assert await asyncio.to_thread(told, manager) == {"WATCHDOG": "1", "STATUS": "connected; 1 instance"}
    dog.cancel()
    db.close()


@pytest.mark.asyncio
async def test_the_host_sends_its_status_with_each_watchdog_notification(manager, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "3000")
    numbers = iter(range(1000))

    dog = asyncio.ensure_future(supervisor._pet_watchdog(lambda: f"{next(numbers)} instances"))
    for number in range(2):
        said = await asyncio.to_thread(told, manager)
        assert said == {"WATCHDOG": "1", "STATUS": f"{number} instances"}
    dog.cancel()


@pytest.fixture
def journal(monkeypatch):
    """Replace systemd-python's handler by a recorder of the fields for journald."""
    sent = []

    class JournalHandler(logging.Handler):
        def __init__(self, **always):
            super().__init__()
            self.always = always

        def emit(self, record):
            names = {name: value for name, value in vars(record).items() if name.isupper()}
            sent.append({"MESSAGE": self.format(record), **self.always, **names})

    monkeypatch.setitem(sys.modules, "systemd", SimpleNamespace(journal=SimpleNamespace(JournalHandler=JournalHandler)))
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    root = logging.getLogger()
    before = root.handlers[:], root.level
    root.handlers.clear()
    systemd.log_to_journal(logging.INFO, device="crane-0a1b2c3d", fleet="harbour")
    yield sent
    root.handlers[:], root.level = before


def test_reports_are_in_the_journal_with_searchable_fields(journal):
    report = Report(
        device="crane-0a1b2c3d",
        boot_id="b",
        sequence=0,
        at=datetime(2026, 5, 1, tzinfo=UTC),
        assignment=7,
        instance="hello",
        target="components/main/hello/3.0.0.wasm",
        rollout="r-1",
        phase=Phase.ROLLED_BACK,
        code=RejectCode.TRAPPED,
        message="unreachable\nsecond line",
    )
    reports.log_report(report)
    assert journal == [
        {
            "MESSAGE": f"hello: rolled-back components/main/hello/3.0.0.wasm: {RejectCode.TRAPPED}: unreachable",
            "SYSLOG_IDENTIFIER": "fleet-agent",
            "WASMFLEET_DEVICE": "crane-0a1b2c3d",
            "WASMFLEET_FLEET": "harbour",
            "WASMFLEET_INSTANCE": "hello",
            "WASMFLEET_TARGET": "components/main/hello/3.0.0.wasm",
            "WASMFLEET_PHASE": "rolled-back",
            "WASMFLEET_CODE": str(RejectCode.TRAPPED),
            "WASMFLEET_ROLLOUT": "r-1",
            "WASMFLEET_ASSIGNMENT": "7",
        }
    ]


def test_a_refused_assignment_is_named_in_the_journal(journal):
    reports.log_report(
        Report(
            device="crane-0a1b2c3d",
            boot_id="b",
            sequence=0,
            at=datetime(2026, 5, 1, tzinfo=UTC),
            assignment=8,
            phase=Phase.FAILED,
            code=RejectCode.EXPIRED,
            message="the timestamp ended",
        )
    )
    assert journal[0]["MESSAGE"] == "assignment 8: failed: expired: the timestamp ended"
    assert "WASMFLEET_INSTANCE" not in journal[0]
