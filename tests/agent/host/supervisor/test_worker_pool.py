"""Zygotes that end and are replaced; slots of shared workers, and their control group."""

import asyncio
import os
import select
import signal
from types import SimpleNamespace

import pytest
import support

from agent.host.supervisor import worker_pool
from agent.host.supervisor.resources import Cgroups, UidAllocator
from agent.host.supervisor.worker_pool import WorkerPool, WorkerSpec, ZygotePool
from fleet.protocol.manifest import Limits


@pytest.mark.asyncio
async def test_a_zygote_that_has_just_ended_is_replaced_at_the_next_request():
    pool = ZygotePool()
    try:
        first = await pool.fork("main", "a", fuel=False)
        (zygote,) = pool._zygotes.values()
        zygote.process.send_signal(signal.SIGKILL)
        zygote.process.wait()  # and the loop, which this keeps, has not heard of it
        assert zygote.alive
        second = await pool.fork("main", "b", fuel=False)
        assert second.pid not in {0, first.pid}
        assert first.ended.done(), "what it had forked has ended with it"
    finally:
        pool.close()


@pytest.mark.asyncio
async def test_a_zygote_is_there_for_the_first_namespace_that_asks():
    pool = ZygotePool()
    try:
        pool.prepare()
        prepared = pool._spare.process
        await pool.fork("main", "with fuel", fuel=True)
        await pool.fork("main", "shared", fuel=False, shared=True)
        await pool.fork("main", "first", fuel=False)
        await pool.fork("other", "stranger", fuel=False)
        had = {(key.namespace, key.fuel, key.shared): zygote for key, zygote in pool._zygotes.items()}
        assert [key for key, zygote in had.items() if zygote.process is prepared] == [("main", False, False)]
        assert had["main", False, False].namespace == "main"
        assert len({zygote.process.pid for zygote in had.values()}) == 4, "namespaces share no zygote"
    finally:
        pool.close()


@pytest.mark.asyncio
async def test_a_prepared_zygote_that_has_ended_is_replaced():
    pool = ZygotePool()
    try:
        pool.prepare()
        pool._spare.process.kill()
        pool._spare.process.wait()
        assert (await pool.fork("main", "first", fuel=False)).pid
    finally:
        pool.close()


@pytest.mark.asyncio
async def test_a_prepared_zygote_that_nobody_needs_ends_after_a_while(monkeypatch):
    pool, now_s = ZygotePool(), 1000.0
    monkeypatch.setattr(worker_pool, "time", SimpleNamespace(monotonic=lambda: now_s))
    try:
        pool.prepare()
        prepared = pool._spare.process
        pool.retire_idle()
        now_s += worker_pool._IDLE_S
        pool.retire_idle()
        assert prepared.poll() is None
        now_s += 1
        pool.retire_idle()
        assert prepared.poll() is not None
        assert (await pool.fork("main", "first", fuel=False)).pid
    finally:
        pool.close()


@pytest.mark.asyncio
async def test_the_process_of_a_cancelled_fork_is_killed():
    pool = ZygotePool()
    try:
        await pool.fork("main", "first", fuel=False)
        (zygote,) = pool._zygotes.values()
        zygote.process.send_signal(signal.SIGSTOP)
        task = asyncio.ensure_future(pool.fork("main", "late", fuel=False))
        await asyncio.sleep(0)  # one step: it asks
        process = zygote._forks[0].process
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        zygote.process.send_signal(signal.SIGCONT)
        assert await process.ended == -signal.SIGKILL
        assert process.describe_end() == "the request for it was cancelled"
    finally:
        pool.close()


@pytest.mark.asyncio
async def test_a_fork_that_is_answered_while_its_caller_is_cancelled_is_ended():
    pool = ZygotePool()
    try:
        await pool.fork("main", "first", fuel=False)
        (zygote,) = pool._zygotes.values()
        task = asyncio.ensure_future(pool.fork("main", "late", fuel=False))
        await asyncio.sleep(0)  # one step: it asks
        process = zygote._forks[0].process
        select.select([zygote._sock], [], [])  # the loop has no turn, so that both happen in one
        zygote._readable()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await process.ended == -signal.SIGKILL
    finally:
        pool.close()


@pytest.mark.asyncio
async def test_a_zygote_that_ends_closes_cancelled_forks():
    pool = ZygotePool()
    try:
        await pool.fork("main", "first", fuel=False)
        (zygote,) = pool._zygotes.values()
        zygote.process.send_signal(signal.SIGSTOP)
        tasks = [asyncio.ensure_future(pool.fork("main", f"late {number}", fuel=False)) for number in range(5)]
        await asyncio.sleep(0)  # one step of each: it asks
        sockets = [fork.process._control._sock for fork in zygote._forks]
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(each, asyncio.CancelledError) for each in await asyncio.gather(*tasks, return_exceptions=True)
        )
    finally:
        pool.close()
    assert [sock.fileno() for sock in sockets] == [-1] * 5


class Groups(Cgroups):
    """Control groups as the pool uses them."""

    def __init__(self):
        self.available = False
        self.members = {}
        self.dismissed = []

    def admit(self, instance, pid, *, workers, worker_bytes):
        self.members.setdefault(instance, set()).add(pid)
        return True

    def dismiss(self, instance):
        self.dismissed.append(instance)


class Exits:
    """Keeps which workers have ended."""

    def __init__(self):
        self.ended = []

    def worker_message(self, _worker, _message):
        pass

    def worker_exited(self, worker, _uptime_s):
        self.ended.append(worker)


@pytest.fixture
def groups():
    return Groups()


@pytest.fixture
def image():
    fd = support.sealed(support.compiled("hello"))
    yield fd
    os.close(fd)


def spec(image, instance, *, may_share):
    return WorkerSpec(
        instance=instance,
        name=f"{instance}/1",
        namespace="main",
        fuel=False,
        limits=Limits(),
        image_fd=image,
        image_sha256="hello",
        may_share=may_share,
    )


@pytest.mark.asyncio
async def test_instances_that_share_have_slots_of_one_process_and_the_last_one_ends_it(groups, image, tmp_path):
    pool, exits = WorkerPool(ZygotePool(), groups, UidAllocator(tmp_path / "uids.json")), Exits()
    try:
        a, b = [await pool.acquire(spec(image, name, may_share=True), exits) for name in "ab"]
        alone = await pool.acquire(spec(image, "c", may_share=False), exits)
        assert a.process is b.process is not alone.process
        assert (a.process.slots, alone.process.slots) == ([a, b], [alone])
        assert (a.shared_name, alone.shared_name) == ("main-1", "")
        # Every process is in a group: shared ones in that of their namespace, which no instance can be called.
        assert groups.members == {"+main": {a.pid}, "c": {alone.pid}}
        a.end("it was replaced")
        assert (a.alive, b.alive, a.process.slots) == (False, True, [b])
        assert groups.dismissed == []
        b.end("it was replaced")
        await b.process.ended
        assert not b.alive
        assert groups.dismissed == ["+main"], "the group of shared workers goes with them"
        alone.end("it was replaced")
        await alone.process.ended
        assert alone.describe_end() == "it was replaced"
    finally:
        pool.close()
