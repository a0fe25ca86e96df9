"""Replies of a worker match their requests, also between supervisor and worker of different versions."""

import asyncio
import contextlib
import json
import os

import msgspec
import pytest
import support
from support import Grants, Limits

from agent.host.ipc import framing, stats_page, worker_api
from agent.host.supervisor.worker_handle import WorkerProcess, WorkerRefusedError
from agent.host.supervisor.worker_pool import ZygotePool

LIMIT_S = 60.0


@contextlib.asynccontextmanager
async def played():
    """Yield the supervisor's handle of a worker, the socket on which it is played by hand, and what was heard."""
    heard = []
    ours, theirs = framing.socket_pair()
    process = WorkerProcess("web/1", ours)
    worker = process.only_slot("web/1", Heard(heard))
    theirs.setblocking(False)
    try:
        yield worker, Played(theirs), heard
    finally:
        theirs.close()
        process.has_ended(0)
        worker.close()


class Heard:
    """Keeps what a worker reports."""

    def __init__(self, messages):
        self.messages = messages

    def worker_message(self, _worker, message):
        self.messages.append(message)

    def worker_exited(self, _worker, _uptime_s):
        pass


class Played:
    """One end of a control socket, used by hand."""

    def __init__(self, sock):
        self.sock = sock

    async def packet(self):
        """The next packet: its JSON and descriptors."""
        while True:
            try:
                data, fds = framing.receive_packet(self.sock)
            except BlockingIOError:
                event = asyncio.Event()
                asyncio.get_running_loop().add_reader(self.sock, event.set)
                await event.wait()
                asyncio.get_running_loop().remove_reader(self.sock)
            else:
                return json.loads(data), fds

    async def packets(self, count):
        return [(await self.packet())[0] for _ in range(count)]

    def say(self, type_, *fds, **fields):
        framing.send_packet(self.sock, json.dumps({"type": type_, **fields}).encode(), fds)


async def begun(*asks):
    tasks = [asyncio.ensure_future(ask) for ask in asks]
    await asyncio.sleep(0)  # one step of each: it sends
    return tasks


def check(worker, number=1):
    return worker.request(worker_api.Check(id=number), reply=worker_api.Checked, timeout_s=LIMIT_S)


def probe(worker):
    return worker.request(worker_api.Probe(id=1), reply=worker_api.Probed, timeout_s=LIMIT_S)


@pytest.mark.asyncio
async def test_two_who_ask_the_same_have_each_their_own_answer():
    async with played() as (worker, peer, _heard):
        tasks = await begun(check(worker, 1), check(worker, 2))
        first, second = await peer.packets(2)
        peer.say("checked", id=second["id"], problem="the second's")
        peer.say("checked", id=first["id"], problem="the first's")
        assert [answer.problem for answer in await asyncio.gather(*tasks)] == ["the first's", "the second's"]


@pytest.mark.asyncio
async def test_a_late_answer_is_not_taken_for_another():
    async with played() as (worker, peer, heard):
        (given_up,) = await begun(check(worker, 1))
        (late,) = await peer.packets(1)
        given_up.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await given_up
        (task,) = await begun(check(worker, 2))
        (current,) = await peer.packets(1)
        peer.say("checked", id=late["id"], problem="of a question that nobody asks any more")
        peer.say("checked", id=current["id"])
        assert (await task).problem is None
        assert [type(message) for message in heard] == [worker_api.Checked]


@pytest.mark.asyncio
async def test_an_answer_of_another_type_than_was_asked_for_is_none():
    """A worker in which a guest speaks may say anything under any id."""

    async with played() as (worker, peer, heard):
        (task,) = await begun(check(worker))
        (asked,) = await peer.packets(1)
        peer.say("ran", id=asked["id"])
        peer.say("refused", id=asked["id"], code="internal", message="no")
        peer.say("checked", id=1 << 40)
        peer.say("checked", id=asked["id"], problem="as asked")
        assert (await task).problem == "as asked"
        assert [type(message) for message in heard] == [worker_api.Ran, worker_api.Refused, worker_api.Checked]


# What a worker of a version without ids in most messages says, request by request.
OLD_ANSWERS = [
    (worker_api.Setup(instance="web", grants=Grants(), limits=Limits()), "ready", {"kinds": [], "layers": {}}),
    (
        worker_api.Setup(instance="web", grants=Grants(), limits=Limits()),
        "refused",
        {"code": "internal", "message": "m"},
    ),
    (worker_api.OpenShared(images=(), limits=Limits(), slots=1), "opened", {"layers": {}}),
    (worker_api.OpenShared(images=(), limits=Limits(), slots=1), "refused", {"code": "internal", "message": "m"}),
    (worker_api.Check(), "checked", {"id": ..., "problem": None}),
    (worker_api.Task(scheduled_ms=1), "ran", {"id": ..., "problem": None}),
    (worker_api.Probe(), "probed", {"id": ...}),
    (worker_api.Configure(config={}), "configured", {"id": ..., "problem": None}),
    (worker_api.SaveState(), "state-saved", {"length": 3, "problem": None}),
    (worker_api.LoadState(length=3), "state-loaded", {"problem": None}),
]
ANSWER_OF = {
    worker_api.Setup: worker_api.Ready,
    worker_api.OpenShared: worker_api.Opened,
    worker_api.Check: worker_api.Checked,
    worker_api.Task: worker_api.Ran,
    worker_api.Deliver: worker_api.Delivered,
    worker_api.Probe: worker_api.Probed,
    worker_api.Configure: worker_api.Configured,
    worker_api.SaveState: worker_api.StateSaved,
    worker_api.LoadState: worker_api.StateLoaded,
}


def test_every_request_and_every_reply_has_an_id_that_may_be_missing():
    for kind in (*worker_api.Request.__args__, *worker_api.Reply.__args__):
        assert next(field for field in msgspec.structs.fields(kind) if field.name == "id").default == 0, kind
    assert set(ANSWER_OF) == set(worker_api.Request.__args__)


@pytest.mark.parametrize(("request_", "said", "fields"), OLD_ANSWERS)
@pytest.mark.asyncio
async def test_a_worker_that_echoes_no_ids_is_understood_by_the_type_of_its_answers(request_, said, fields):
    async with played() as (worker, peer, _heard):
        kind = ANSWER_OF[type(request_)]
        other = check(worker) if kind is not worker_api.Checked else probe(worker)
        (waits,) = await begun(other)
        tasks = await begun(*(worker.request(request_, reply=kind, timeout_s=LIMIT_S) for _ in range(2)))
        _, *asked = await peer.packets(3)
        for one in asked:
            assert one["id"] > 0
            peer.say(said, **{name: one["id"] if value is ... else value for name, value in fields.items()})
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            reply = answer.refusal if isinstance(answer, WorkerRefusedError) else answer
            assert msgspec.to_builtins(reply)["type"] == said
        assert not waits.done()
        waits.cancel()


# An old supervisor, played by hand before real workers of a real zygote.


@contextlib.contextmanager
def image_of(guest):
    fd = support.sealed(support.compiled(guest))
    page_fd = stats_page.create_page("web")
    try:
        yield fd, page_fd
    finally:
        os.close(fd)
        os.close(page_fd)


def without_id(message):
    """A request as a supervisor from before the ids sent it."""
    found = msgspec.to_builtins(message)
    del found["id"]
    return found.pop("type"), found


@contextlib.asynccontextmanager
async def with_a_real_worker(*, shared=False):
    pool = ZygotePool()
    try:
        process = await pool.fork("main", "web/1", fuel=False, shared=shared)
        yield process.only_slot("web/1", Heard([]))
    finally:
        pool.close()


def by_hand(worker):
    """The control socket of a worker, taken from its handle: what is spoken on it is not of this version."""
    asyncio.get_running_loop().remove_reader(worker.control._sock)
    return Played(worker.control._sock)


class OldSupervisor:
    """Speaks as a supervisor from before the ids, to a worker with this guest."""

    def __init__(self, worker):
        self.peer = by_hand(worker)

    async def set_up(self, guest):
        with image_of(guest) as fds:
            type_, fields = without_id(worker_api.Setup(instance="web", grants=Grants(), limits=Limits()))
            ready = await self.ask(type_, *fds, **fields)
        assert (ready["type"], ready["id"]) == ("ready", 0)

    async def ask(self, type_, *fds, **fields):
        self.peer.say(type_, *fds, **fields)
        answer, received = await self.peer.packet()
        for fd in received:
            os.close(fd)
        return answer


@pytest.mark.asyncio
async def test_a_supervisor_that_gives_no_ids_is_answered_without():
    """The numbers it did give come back, and all else has the id 0, for which it has no name."""

    async with with_a_real_worker() as worker:
        old = OldSupervisor(worker)
        await old.set_up("remembers")
        assert await old.ask("check", id=7) == {"type": "checked", "id": 7, "problem": None}
        assert await old.ask("probe", id=8) == {"type": "probed", "id": 8}
        state = os.memfd_create("state")
        os.ftruncate(state, 4096)
        saved = await old.ask("save-state", state)
        assert saved == {"type": "state-saved", "length": saved["length"], "problem": None, "id": 0}
        old.peer.say("resume")
        loaded = await old.ask("load-state", state, length=saved["length"])
        assert loaded == {"type": "state-loaded", "problem": None, "id": 0}
        os.close(state)


@pytest.mark.asyncio
async def test_a_worker_outlives_requests_for_what_its_guest_does_not_export():
    async with with_a_real_worker() as worker:
        with image_of("hello") as fds:
            setup = worker_api.Setup(instance="web", grants=Grants(), limits=Limits())
            await worker.request(setup, *fds, reply=worker_api.Ready, timeout_s=LIMIT_S)
        task = worker_api.Task(scheduled_ms=1)
        ran = await worker.request(task, reply=worker_api.Ran, timeout_s=LIMIT_S)
        assert ran.problem == "it exports no wasmfleet:schedule/task"
        room = os.memfd_create("state")
        os.ftruncate(room, 4096)
        for message, reply in (
            (worker_api.SaveState(), worker_api.StateSaved),
            (worker_api.LoadState(length=7), worker_api.StateLoaded),
        ):
            answer = await worker.request(message, room, reply=reply, timeout_s=LIMIT_S)
            assert answer.problem == "it exports no wasmfleet:state/state"
        os.close(room)
        assert (await check(worker)).problem is None
        assert await probe(worker)


@pytest.mark.asyncio
async def test_a_supervisor_that_gives_no_ids_has_tasks_run():
    async with with_a_real_worker() as worker:
        old = OldSupervisor(worker)
        await old.set_up("task")
        assert await old.ask("task", id=9, scheduled_ms=1) == {"type": "ran", "id": 9, "problem": None}


@pytest.mark.asyncio
async def test_a_supervisor_that_gives_no_ids_opens_shared_workers_and_hears_refusals():
    async with with_a_real_worker(shared=True) as worker:
        peer = by_hand(worker)
        with image_of("hello") as (image, page_fd):
            type_, fields = without_id(worker_api.EarlierOpenShared(images=("i",), limits=Limits(), slots=2))
            peer.say(type_, image, **fields)
            opened, received = await peer.packet()
            assert (opened["type"], opened["id"]) == ("opened", 0)
            ours, theirs = framing.socket_pair()
            ours.setblocking(False)
            with ours, theirs:
                peer.say("seat", theirs.fileno())
                slot = Played(ours)
                # no guest has so little memory
                limits = Limits(memory_bytes=1)
                type_, fields = without_id(worker_api.Setup(instance="a", grants=Grants(), limits=limits, image="i"))
                slot.say(type_, page_fd, **fields)
                refused, _ = await slot.packet()
                assert (refused["type"], refused["id"]) == ("refused", 0)
        for fd in received:
            os.close(fd)


@pytest.mark.asyncio
async def test_a_real_worker_answers_everybody_who_asks_at_once():
    async with with_a_real_worker() as worker:
        with image_of("hello") as fds:
            setup = worker_api.Setup(instance="web", grants=Grants(), limits=Limits())
            assert isinstance(
                await worker.request(setup, *fds, reply=worker_api.Ready, timeout_s=LIMIT_S), worker_api.Ready
            )
        tasks = await begun(*(check(worker, number) for number in range(1, 6)), *(probe(worker) for _ in range(5)))
        answers = await asyncio.gather(*tasks)
        assert [type(answer) for answer in answers] == [worker_api.Checked] * 5 + [worker_api.Probed] * 5
