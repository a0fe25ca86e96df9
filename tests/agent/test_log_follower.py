"""`fleet logs` on the board: for who may ask, as far as its owner allows, for minutes, and told in its history."""

import asyncio
from datetime import timedelta

import msgspec
import pytest

from agent import commands
from agent.commands import Commands, LogFollower
from agent.host.ipc import host_api
from fleet.protocol.assignment import CheckIn, Command, FollowLogs
from fleet.protocol.messages import LogAnswer, LogChunk
from signing import director
from signing.verifier import accept_command
from tests.simulator.repository import BOARD, Board, Repository, signer

LINES = ("info starting", "error no connection", "host: it trapped", "critical on fire", "debug 42")


class Host:
    """What the host says of an instance's log, once after another; then it stays as it is."""

    def __init__(self, *answers):
        self.answers = list(answers)

    async def ask(self, kind, answer, *, instance):
        assert (kind, answer) == (host_api.Logs, host_api.Lines)
        assert instance == "hello"
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


class Server:
    """Takes chunks, and says from when on nobody reads."""

    def __init__(self, more=1):
        self.chunks, self.more = [], more

    def request(self, method, path, *, max_bytes, body, headers):
        assert (method, path) == ("POST", "/v1/logs")
        self.chunks.append(msgspec.json.decode(body, type=LogChunk))
        return msgspec.json.encode(LogAnswer(more=len(self.chunks) < self.more))


async def followed(policy, host, server, monkeypatch):
    """Follow until it ends; what the board wrote into its own history."""
    monkeypatch.setattr(commands, "LOOK_S", 0.001)
    history = []

    async def told(text):
        history.append(text)

    tasks = []
    follower = LogFollower(
        link=host,
        https=server,
        policy=policy,
        spawn=lambda work: tasks.append(asyncio.ensure_future(work)),
        told=told,
    )
    follower.follow("hello", minutes=5, command=7)
    async with asyncio.timeout(60):
        await asyncio.gather(*tasks)
    return history


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("policy", "lines", "left_out"),
    [
        ("all", LINES, 0),
        ("errors", ("error no connection", "host: it trapped", "critical on fire"), 2),
    ],
)
async def test_the_boards_owner_decides_what_leaves(policy, lines, left_out, monkeypatch):
    server = Server()
    history = await followed(policy, Host(host_api.Lines(id=1, lines=LINES, count=5)), server, monkeypatch)
    (chunk,) = server.chunks
    assert (chunk.lines, chunk.left_out, chunk.command) == (lines, left_out, 7)
    assert "goes to the fleet for 5 minutes: command 7" in history[0]


@pytest.mark.asyncio
async def test_an_owner_who_lets_nothing_out_says_so_and_no_line_leaves(monkeypatch):
    server = Server()
    history = await followed("off", Host(host_api.Lines(id=1, lines=LINES, count=5)), server, monkeypatch)
    (chunk,) = server.chunks
    assert chunk.lines == ()
    assert "lets no log leave" in chunk.refused
    assert "refused, by [policy] logs" in history[0]


@pytest.mark.asyncio
async def test_only_what_is_new_is_sent_and_what_was_missed_is_counted(monkeypatch):
    server = Server(more=3)
    host = Host(
        host_api.Lines(id=1, lines=("a", "b"), count=2),
        host_api.Lines(id=2, lines=("b", "c"), count=3),
        host_api.Lines(id=3, lines=("y", "z"), count=99),
    )
    await followed("all", host, server, monkeypatch)
    assert [chunk.lines for chunk in server.chunks] == [("a", "b"), ("c",), ("y", "z")]
    assert [chunk.left_out for chunk in server.chunks] == [0, 0, 94]


@pytest.mark.asyncio
async def test_a_host_that_was_restarted_counts_anew(monkeypatch):
    server = Server(more=2)
    host = Host(host_api.Lines(id=1, lines=("a", "b"), count=2), host_api.Lines(id=2, lines=("fresh",), count=1))
    await followed("all", host, server, monkeypatch)
    assert [chunk.lines for chunk in server.chunks] == [("a", "b"), ("fresh",)]


@pytest.mark.asyncio
async def test_a_hostile_broker_asks_for_logs_and_is_counted():
    repo = Repository()
    board = Board(repo)
    board.run(repo.assign(repo.publish()))
    asked, refused = [], []

    async def judge(envelope):
        command, board.state = accept_command(
            board.trusted, envelope, fleet=repo.fleet, device=BOARD, state=board.state, now=repo.now
        )
        return command

    commands = Commands(
        judge=judge,
        check_in=lambda: asked.append("check-in"),
        restart=None,
        follow=lambda verb, sequence: asked.append((verb.instance, sequence)),
        on_refused=lambda: refused.append(True),
    )

    def order(verb, sequence=1, **more):
        fields = {"fleet": repo.fleet, "device": BOARD, "issued": repo.now, "expires": repo.now + timedelta(minutes=5)}
        return Command(**(fields | {"sequence": sequence, "verb": verb} | more))

    logs = FollowLogs(instance="hello")
    good = director.sign_command(order(logs), repo.keys["director"])
    for envelope in (
        director.sign_command(order(logs), signer()),
        director.sign_command(order(logs, device="winch-99887766"), repo.keys["director"]),
        b'{"verb": "follow-logs", "instance": "hello"}',
        b"",
    ):
        await commands.obey(envelope)
    assert asked == []
    assert commands.refused == len(refused) == 4
    assert "4 commands were refused" in commands.problem
    await commands.obey(good)
    await commands.obey(good)  # the broker plays it again
    assert asked == [("hello", 1)]
    assert commands.refused == 5
    await commands.obey(director.sign_command(order(CheckIn(), 2), repo.keys["director"]))
    assert asked[-1] == "check-in"
