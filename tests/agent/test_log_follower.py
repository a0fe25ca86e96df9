"""`fleet logs` on the device: authorisation, the owner's policy, the time limit, and the entry in the history."""

import asyncio
from datetime import timedelta
from types import SimpleNamespace

import msgspec
import pytest

from agent import commands
from agent.commands import Commands, LogFollower, Senders
from agent.host.ipc import host_api
from agent.update.problems import Problems
from agent.update.state import DeviceContext
from agent.update.store import Database, Store
from fleet.protocol.assignment import COMMAND_TYPE, CheckIn, Command, Diagnose, FollowLogs
from fleet.protocol.messages import LogAnswer, LogChunk
from signing import director, dsse
from signing.verifier import accept_command
from tests.agent.desired_case import Sink
from tests.eventually import eventually_async
from tests.simulator.repository import DEVICE, Device, Repository, signer

CONTEXT = DeviceContext(device="crane-0a1b2c3d", boot_id="b", places=None, mac_key=b"", clock=lambda: 0.0)
LINES = ("info starting", "error no connection", "host: it trapped", "critical on fire", "debug 42")


class Host:
    """Host that returns a sequence of log states, then the last one forever."""

    def __init__(self, *answers):
        self.answers = list(answers)

    async def ask(self, kind, answer, *, instance):
        assert (kind, answer) == (host_api.Logs, host_api.Lines)
        assert instance == "hello"
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Server:
    """Server that receives chunks, and ends following after some of them."""

    def __init__(self, more=1):
        self.chunks, self.more = [], more

    def request(self, method, path, *, max_bytes, body, headers):
        assert (method, path) == ("POST", "/v1/logs")
        self.chunks.append(msgspec.json.decode(body, type=LogChunk))
        return msgspec.json.encode(LogAnswer(more=len(self.chunks) < self.more))


async def followed(policy, host, server, monkeypatch, tmp_path):
    """Follow a log until it ends; return the entries in the device's history."""
    monkeypatch.setattr(commands, "LOOK_S", 0.001)
    db = Database(Store(tmp_path / "store.db"))
    follower = LogFollower(device=CONTEXT, host=host, https=server, policy=policy, db=db, sink=Sink())
    running = asyncio.ensure_future(follower.run())
    follower.follow("hello", minutes=5, command=7)
    await eventually_async(lambda: not follower.following, "nothing is followed any more")
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    history = [report.message for report in await db(Store.history)]
    db.close()
    return history


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("policy", "lines", "left_out"),
    [
        ("all", LINES, 0),
        ("errors", ("error no connection", "host: it trapped", "critical on fire"), 2),
    ],
)
async def test_the_owners_policy_limits_the_log_lines_sent(policy, lines, left_out, monkeypatch, tmp_path):
    server = Server()
    history = await followed(policy, Host(host_api.Lines(id=1, lines=LINES, count=5)), server, monkeypatch, tmp_path)
    (chunk,) = server.chunks
    assert (chunk.lines, chunk.left_out, chunk.command) == (lines, left_out, 7)
    assert "goes to the fleet for 5 minutes: command 7" in history[0]


@pytest.mark.asyncio
async def test_with_logs_off_the_request_is_refused_and_no_line_is_sent(monkeypatch, tmp_path):
    server = Server()
    history = await followed("off", Host(host_api.Lines(id=1, lines=LINES, count=5)), server, monkeypatch, tmp_path)
    (chunk,) = server.chunks
    assert chunk.lines == ()
    assert "allows no logs to leave" in chunk.refused
    assert "refused by [policy] logs" in history[0]


@pytest.mark.asyncio
async def test_only_new_lines_are_sent_and_lost_ones_are_counted(monkeypatch, tmp_path):
    server = Server(more=3)
    host = Host(
        host_api.Lines(id=1, lines=("a", "b"), count=2),
        host_api.Lines(id=2, lines=("b", "c"), count=3),
        host_api.Lines(id=3, lines=("y", "z"), count=99),
    )
    await followed("all", host, server, monkeypatch, tmp_path)
    assert [chunk.lines for chunk in server.chunks] == [("a", "b"), ("c",), ("y", "z")]
    assert [chunk.left_out for chunk in server.chunks] == [0, 0, 94]


@pytest.mark.asyncio
async def test_line_numbers_restart_with_the_host(monkeypatch, tmp_path):
    server = Server(more=2)
    host = Host(host_api.Lines(id=1, lines=("a", "b"), count=2), host_api.Lines(id=2, lines=("fresh",), count=1))
    await followed("all", host, server, monkeypatch, tmp_path)
    assert [chunk.lines for chunk in server.chunks] == [("a", "b"), ("fresh",)]


@pytest.mark.asyncio
async def test_forged_log_requests_are_refused_and_counted(tmp_path):
    repo = Repository()
    device = Device(repo)
    device.run(repo.assign(repo.publish()))
    asked, changed = [], []

    def judge(envelope):
        command, device.state = accept_command(
            device.trusted, envelope, fleet=repo.fleet, device=DEVICE, state=device.state, now=repo.now
        )
        return command

    sink = Sink()
    sink.changed = lambda: changed.append(True)
    db = Database(Store(tmp_path / "store.db"))
    problems = Problems(db)

    class Trust:
        def command(self, envelope):
            return judge(envelope)

    class Follower:
        def follow(self, instance, *, minutes, command):
            asked.append((instance, command))

    class Archives:
        def send(self, *, recipient, command):
            asked.append((recipient, command))

        async def note(self, text):
            asked.append(text)

    commands = Commands(
        trust=Trust(),
        db=db,
        host=None,
        receiver=SimpleNamespace(check_in=lambda: asked.append("check-in")),
        senders=Senders(Follower(), Archives()),
        problems=problems,
        sink=sink,
    )

    def order(verb, sequence=1, **more):
        fields = {"fleet": repo.fleet, "device": DEVICE, "issued": repo.now, "expires": repo.now + timedelta(minutes=5)}
        return Command(**(fields | {"sequence": sequence, "verb": verb} | more))

    logs = FollowLogs(instance="hello")
    good = director.sign_command(order(logs), repo.keys["director"])
    for envelope in (
        director.sign_command(order(logs), signer()),
        director.sign_command(order(logs, device="winch-99887766"), repo.keys["director"]),
        b'{"verb": "follow-logs", "instance": "hello"}',
        b"",
    ):
        await commands.carry_out(envelope)
    assert asked == []
    assert commands.refused == len(changed) == 4
    assert "4 commands were refused" in problems.text("commands")
    await commands.carry_out(good)
    await commands.carry_out(good)  # the broker replays it
    assert asked == [("hello", 1)]
    assert commands.refused == 5
    await commands.carry_out(director.sign_command(order(CheckIn(), 2), repo.keys["director"]))
    assert asked[-1] == "check-in"
    await commands.carry_out(director.sign_command(order(Diagnose(recipient="key"), 3), repo.keys["director"]))
    assert asked[-1] == ("key", 3)

    # The director of a later version is no attacker: the history says what this agent lacks.
    later = msgspec.json.decode(msgspec.json.encode(order(CheckIn(), 4))) | {"verb": {"verb": "self-test", "depth": 3}}
    await commands.carry_out(dsse.sign(COMMAND_TYPE, msgspec.json.encode(later), [repo.keys["director"]]))
    assert "command 4 is 'self-test', which is not known to this agent" in asked[-1]
    assert commands.refused == 5
    db.close()
