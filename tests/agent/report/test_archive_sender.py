"""Archives on the device: the owner's policy, what fails, and what leaves the device, with real processes.

`tests/e2e/test_diagnose.py` has the whole way.
"""

import asyncio
import contextlib

import msgspec
import pytest

from agent.config import Policy, Settings
from agent.link.https import FetchError
from agent.report import archive_sender
from agent.report.archive_sender import ArchiveSender
from agent.update.state import DeviceContext
from agent.update.store import Database, Store
from fleet.protocol import bounds
from fleet.protocol.codes import RejectCode
from fleet.protocol.messages import ArchiveNote, ArchiveTaken
from signing import sealing
from signing.sealing import ArchivePurpose
from tests.agent.desired_case import Sink
from tests.agent.enrolled_device import enrolled

KEY = sealing.archive_key()


class Server:
    """Server that takes notes and archives, and fails at first if told to."""

    def __init__(self):
        self.notes, self.archives, self.failures, self.closed = [], [], [], 0

    def request(self, method, path, *, max_bytes, body, headers, within_s=None):
        if self.failures:
            raise self.failures.pop(0)
        if method == "POST":
            self.notes.append(msgspec.json.decode(body, type=ArchiveNote))
        else:
            assert int(headers["Content-Length"]) <= bounds.ARCHIVE_MAX_BYTES
            self.archives.append((path, body.read()))
        return msgspec.json.encode(ArchiveTaken())

    def close(self):
        self.closed += 1


@contextlib.asynccontextmanager
async def sender(tmp_path, policy, server):
    who, store = enrolled(tmp_path)
    db = Database(store)
    device = DeviceContext(device=who.identity.device, boot_id="b", places=who.places, mac_key=b"", clock=lambda: 0.0)
    made = ArchiveSender(device=device, https=server, settings=Settings(policy=policy), db=db, sink=Sink())
    running = asyncio.ensure_future(made.run())
    try:
        yield made, db
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        db.close()


async def history(db):
    return [report.message for report in await db(Store.history)]


def ask(command=7, key=KEY):
    return archive_sender._Asked(sealing.public_key(key), command)


@pytest.mark.asyncio
async def test_nothing_leaves_the_device_where_its_owner_says_so(tmp_path):
    server = Server()
    async with sender(tmp_path, Policy(diagnose="off"), server) as (made, db):
        await made._answer(ask())
        (note,) = server.notes
        assert (note.command, note.failed) == (7, False)
        assert "[policy] diagnose" in note.refused
        assert "refused by [policy] diagnose" in (await history(db))[-1]
        assert server.archives == []


@pytest.mark.asyncio
async def test_an_archive_is_sealed_sent_and_put_into_the_history(tmp_path, monkeypatch):
    server = Server()
    async with sender(tmp_path, Policy(), server) as (made, db):
        await made._answer(ask())
        assert server.notes == [ArchiveNote(command=7)]
        ((path, content),) = server.archives
        assert path == "/v1/diagnose?command=7"
        archive = sealing.open_archive(content, key=KEY, purpose=ArchivePurpose(device="crane-0a1b2c3d", command=7))
        assert archive.startswith(b"\x1f\x8b")
        assert f"{len(content)} bytes go to the fleet ([policy] diagnose = summary), sealed" in (await history(db))[-1]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("program", "words"),
    [("/bin/false", "ended with 1: no reason"), ("/bin/true", "it has 0 bytes"), ("/nowhere", "No such file")],
)
async def test_what_fails_is_said_to_the_operator_and_in_the_history(tmp_path, monkeypatch, program, words):
    monkeypatch.setattr(archive_sender.sys, "executable", program)
    server = Server()
    async with sender(tmp_path, Policy(), server) as (made, db):
        await made._answer(ask())
        assert [each.failed for each in server.notes] == [False, True]
        assert words in server.notes[1].refused
        assert words in (await history(db))[-1]


@pytest.mark.asyncio
async def test_archives_are_limited_and_a_server_that_is_away_ends_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(archive_sender.sys, "executable", "/bin/false")
    server = Server()
    async with sender(tmp_path, Policy(), server) as (made, db):
        server.failures = [FetchError(RejectCode.UNREACHABLE, "the network is away")]
        await made._answer(ask(1))
        for command in range(2, archive_sender.ARCHIVES_PER_HOUR + 2):
            await made._answer(ask(command))
        assert "at most 6 archives an hour" in server.notes[-1].refused
        assert "at most 6 an hour" in (await history(db))[-1]


@pytest.mark.asyncio
async def test_a_newer_command_ends_what_an_older_one_began(tmp_path, monkeypatch):
    server, begun, done = Server(), asyncio.Event(), asyncio.Event()

    async with sender(tmp_path, Policy(), server) as (made, _):
        commands = []

        async def answer(asked):
            commands.append(asked.command)
            if asked.command == 1:
                begun.set()
                await asyncio.Event().wait()
            done.set()

        monkeypatch.setattr(made, "_answer", answer)
        made.send(recipient="key", command=1)
        await begun.wait()
        made.send(recipient="key", command=2)
        await done.wait()
        made.send(recipient="key", command=3)
        done.clear()
        await done.wait()
        assert commands == [1, 2, 3]
