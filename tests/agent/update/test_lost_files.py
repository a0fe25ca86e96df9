"""Committed instances whose files on this device were lost or damaged: fetched, compiled and started again."""

import asyncio
import contextlib
import sqlite3
import threading
from types import SimpleNamespace

import pytest

from agent.link.https import FetchError
from agent.update import restore
from agent.update.state import Violation, item_key
from fleet.protocol.codes import RejectCode

V1, V2 = "components/acme/web/1.0.0.wasm", "components/acme/web/2.0.0.wasm"

DAY_S = 86400


def lose(path):
    path.unlink()


def damage(path):
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


async def harmed(kit, harm):
    """Deploy 1.0.0, cut the power, and harm the artifact and the image."""
    await kit.boot()
    await kit.run(kit.assignment(1, kit.publish("1.0.0")))
    await kit.pull_plug()
    for path in [*kit.places.artifacts.glob("*.wasm"), *kit.places.images.glob("*.cwasm")]:
        harm(path)
    kit.server.fetched.clear()


@pytest.mark.parametrize("harm", [lose, damage])
@pytest.mark.asyncio
async def test_an_instance_without_artifact_and_image_heals_by_itself(kit, harm):
    await harmed(kit, harm)
    await kit.boot()
    await kit.until(lambda: kit.host.targets() == {"web": V1})
    await kit.until(lambda: kit.problems.texts() == [])
    assert len(kit.server.fetched) == 1
    assert kit.chain() == ["fetching", "compiling", "swapping", "probation", "committed"], "no change was begun"
    await kit.pull_plug()


@pytest.mark.asyncio
async def test_a_version_on_probation_that_no_record_knows_is_taken_back(kit):
    """As after the loss of the database: the run set has only what is committed."""
    await kit.boot()
    await kit.run(kit.assignment(1, kit.publish("1.0.0")))
    await kit.deployer.desire(kit.assignment(2, kit.publish("2.0.0", probation_ms=10 * 60 * 1000)))
    await kit.until(lambda: kit.chain()[-1] == "probation")
    await kit.stop_agent()
    with contextlib.closing(sqlite3.connect(kit.places.database)) as db, db:
        db.execute("DELETE FROM changes")
    assert kit.host.targets() == {"web": V2}
    await kit.start_agent()
    await kit.until(lambda: kit.host.targets() == {"web": V1})
    assert kit.host.running["web"].generation == kit.committed()[0].generation
    await kit.pull_plug()


async def harmed_out_of_reach(kit, monkeypatch):
    """Lose the files, and boot where the server can be reached at the fourth try."""
    monkeypatch.setattr("agent.update.restore.MEND_FIRST_S", 0.01)
    await harmed(kit, lose)
    kit.server.trouble = [FetchError(RejectCode.UNREACHABLE, "no route") for _ in range(3)]
    await kit.boot()


@pytest.mark.asyncio
async def test_an_instance_heals_once_the_server_can_be_reached(kit, monkeypatch):
    await harmed_out_of_reach(kit, monkeypatch)
    await kit.until(kit.link.ready.is_set, "others are not held up")
    await kit.until(lambda: kit.host.targets() == {"web": V1})
    assert len(kit.server.fetched) == 4
    await kit.pull_plug()


@pytest.mark.asyncio
async def test_an_instance_that_was_removed_meanwhile_is_not_started_again(kit, monkeypatch):
    await harmed_out_of_reach(kit, monkeypatch)
    await kit.until(lambda: kit.problems.texts() != [])
    await kit.run(kit.assignment(2))
    await kit.until(lambda: kit.problems.texts() == [])
    assert kit.host.targets() == {}
    assert kit.store.committed() == ()
    await kit.pull_plug()


def hold_mending(kit, monkeypatch, instance):
    """Hold the start of a mended instance; return the event that it begins and the event that releases it."""
    begun, let, start = asyncio.Event(), asyncio.Event(), restore.start

    async def held(link, item, *arguments):
        if item.instance == instance and link.ready.is_set():
            begun.set()
            await let.wait()
        return await start(link, item, *arguments)

    monkeypatch.setattr(restore, "start", held)
    return begun, let


async def two_harmed(kit):
    """Deploy a and b, cut the power, and lose their files."""
    await kit.boot()
    items = [kit.publish("1.0.0", instance=instance) for instance in ("a", "b")]
    await kit.run(kit.assignment(1, *items))
    await kit.pull_plug()
    for path in [*kit.places.artifacts.glob("*.wasm"), *kit.places.images.glob("*.cwasm")]:
        path.unlink()
    return items


@pytest.mark.asyncio
async def test_an_instance_that_was_stopped_while_another_starts_is_not_started_again(kit, monkeypatch):
    _, b = await two_harmed(kit)
    begun, let = hold_mending(kit, monkeypatch, "a")
    await kit.boot()
    await begun.wait()
    revoked = {"key": item_key(b), "target": b.target, "code": RejectCode.REVOKED, "message": "revoked"}
    await kit.deployer.hold([Violation(instance="b", **revoked)])
    await kit.settled()
    let.set()
    await kit.until(lambda: kit.problems.texts() == [])
    assert kit.host.targets() == {"a": V1}
    await kit.pull_plug()


@pytest.mark.asyncio
async def test_an_instance_that_was_replaced_while_another_starts_does_not_go_back(kit, monkeypatch):
    a, _ = await two_harmed(kit)
    begun, let = hold_mending(kit, monkeypatch, "a")
    await kit.boot()
    await begun.wait()
    await kit.run(kit.assignment(2, a, kit.publish("2.0.0", instance="b")))
    let.set()
    await kit.until(lambda: kit.problems.texts() == [])
    assert kit.host.targets() == {"a": V1, "b": V2}
    await kit.pull_plug()


@pytest.mark.asyncio
async def test_an_instance_that_is_being_changed_while_another_starts_is_left_to_the_change(kit, monkeypatch):
    a, _ = await two_harmed(kit)
    begun, let = hold_mending(kit, monkeypatch, "a")
    await kit.boot()
    await begun.wait()
    mended, start = [], restore.start

    async def noted(link, item, *arguments):
        mended.append(item.instance)
        return await start(link, item, *arguments)

    monkeypatch.setattr(restore, "start", noted)
    fetched, rests = threading.Event(), asyncio.Event()
    download = kit.server.download

    def held(*arguments, **more):
        fetched.wait(60)
        return download(*arguments, **more)

    monkeypatch.setattr(kit.server, "download", held)
    # nothing else tells when a round of mending has ended
    monkeypatch.setattr(kit.restorer, "_sink", SimpleNamespace(changed=rests.set))
    await kit.deployer.desire(kit.assignment(2, a, kit.publish("2.0.0", instance="b")))
    await kit.until(lambda: "b" in kit.deployer.state.active)
    let.set()
    await rests.wait()
    assert mended == []
    fetched.set()
    await kit.until(lambda: kit.host.targets() == {"a": V1, "b": V2})
    await kit.pull_plug()


class Days:
    """Clock that pauses move on to the end of some days, where it stands; lists when the server was asked."""

    def __init__(self, kit, days):
        self.kit, self.now, self.end = kit, 0.0, days * DAY_S
        self.over = asyncio.Event()
        self.asked = []
        kit.mending = {"pauses": restore.Pauses(lambda: self.now, self.sleep)}
        kit.server.fetched = self

    def append(self, _sha256):
        self.asked.append(self.now)

    async def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds if self.now < self.end else 0
        if self.now >= self.end:
            self.over.set()
            await asyncio.Event().wait()
        await asyncio.sleep(0)

    def on(self, day):
        return sum(1 for each in self.asked if each // DAY_S == day)


@pytest.mark.asyncio
async def test_an_artifact_that_is_damaged_on_the_server_is_fetched_once_a_day(kit):
    await harmed(kit, lose)
    kit.server.artifacts = dict.fromkeys(kit.server.artifacts, b"damaged")
    days = Days(kit, 7)
    await kit.boot()
    await days.over.wait()
    assert days.on(0) < 20
    assert [days.on(day) for day in range(2, 7)] == [1, 1, 1, 1, 1]
    assert len(kit.problems.texts()) == 1
    await kit.pull_plug()


@pytest.mark.asyncio
async def test_a_new_host_does_not_hurry_what_only_a_person_can_mend(kit):
    await harmed(kit, lose)
    kit.server.artifacts = dict.fromkeys(kit.server.artifacts, b"damaged")
    days = Days(kit, 3)
    await kit.boot()
    await days.over.wait()
    asked = len(days.asked)
    days.over.clear()
    kit.host.kill()
    kit.host.start()
    await days.over.wait()
    assert len(days.asked) <= asked + 1, "the try that was due"
    asked = len(days.asked)
    days.over.clear()
    kit.host.kill()
    kit.host.start()
    await days.over.wait()
    assert len(days.asked) == asked
    await kit.pull_plug()


@pytest.mark.asyncio
async def test_a_server_out_of_reach_is_asked_every_quarter_of_an_hour(kit):
    await harmed(kit, lose)
    kit.server.trouble = [FetchError(RejectCode.UNREACHABLE, "no route") for _ in range(1000)]
    days = Days(kit, 4)
    await kit.boot()
    await days.over.wait()
    assert [days.on(day) for day in range(1, 4)] == [96, 96, 96]
    await kit.pull_plug()


@pytest.mark.asyncio
async def test_only_one_compiler_runs_at_a_time(kit):
    at_once = []

    class SlowImages(kit.images_kind):
        running = 0

        async def _run(self, arguments, data, seconds):
            self.running += 1
            at_once.append(self.running)
            for _ in range(50):  # turns, in which another one could begin
                await asyncio.sleep(0)
            try:
                return await super()._run(arguments, data, seconds)
            finally:
                self.running -= 1

    kit.images_kind = SlowImages
    await kit.boot()
    item = kit.publish("1.0.0")
    await kit.run(kit.assignment(1, item))
    artifact = kit.places.artifacts / f"{item.sha256}.wasm"
    makes = (kit.images.make(artifact, sha256=item.sha256, manifest_sha256=each * 64) for each in "abc")
    await asyncio.gather(*makes)
    assert len(at_once) > 3
    assert max(at_once) == 1
    await kit.pull_plug()
