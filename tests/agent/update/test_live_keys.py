"""Configuration keys with `restart = false`: their change reaches the generation that runs, and begins no update."""

from datetime import UTC, datetime

import msgspec
import pytest

from agent.host.ipc import host_api
from agent.update.effects import EffectRunner
from agent.update.state import Committed, reaches_running
from fleet.protocol.manifest import ConfigKey

KEYS = {
    "level": ConfigKey(default="info", restart=False, enum=("info", "debug", "warn")),
    "refuse": ConfigKey(default="", restart=False),
    "port": ConfigKey(default="1"),
}


def item_of(kit, *, rollout="", **config):
    """Publish 1.0.0 with these keys; return its item with a configuration."""
    item = kit.publish("1.0.0", rollout=rollout)
    kit.manifests[item.target] = msgspec.structs.replace(kit.manifests[item.target], config=KEYS)
    return msgspec.structs.replace(item, manifest_sha256=kit.manifests[item.target].digest(), config=config)


def ran(kit):
    """Return the generation that runs and its configuration."""
    run = kit.host.running["web"]
    return run.generation, run.config


SEEN = {"level": "info", "refuse": "", "port": "1"}


@pytest.mark.asyncio
async def test_a_live_key_reaches_the_generation_that_runs_and_is_reported_as_committed(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, item_of(kit)))
        generation, before = ran(kit)
        assert before == SEEN
        chain, reports = kit.chain(), len(kit.reports())
        wanted = item_of(kit, rollout="r2", level="debug")
        await kit.run(kit.assignment(2, wanted))
        await kit.settled()
        assert ran(kit) == (generation, SEEN | {"level": "debug"})
        assert kit.chain() == [*chain, "committed"], "no update was begun"
        last = kit.reports()[reports]
        assert (last.instance, last.rollout, last.assignment, last.generation) == ("web", "r2", 2, generation)
        (committed,) = kit.committed()
        assert (committed.item, committed.assignment, committed.generation) == (wanted, 2, generation)
        await kit.run(kit.assignment(3, item_of(kit)))
        assert ran(kit) == (generation, SEEN), "a key that is taken away has its default again"


@pytest.mark.asyncio
async def test_what_a_live_key_was_set_to_is_there_after_a_power_cut(kit):
    await kit.boot()
    await kit.run(kit.assignment(1, item_of(kit)))
    await kit.run(kit.assignment(2, item_of(kit, level="debug")))
    await kit.pull_plug()
    await kit.boot()
    await kit.until(lambda: "web" in kit.host.running)
    assert ran(kit)[1] == SEEN | {"level": "debug"}
    await kit.pull_plug()


@pytest.mark.asyncio
async def test_a_live_key_that_is_undone_while_the_host_is_asked_does_not_stay(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, item_of(kit)))
        generation, _ = ran(kit)
        kit.host.hold_on = {host_api.Configure}
        await kit.deployer.desire(kit.assignment(2, item_of(kit, level="debug")))
        await kit.until(lambda: kit.host.held)
        await kit.deployer.desire(kit.assignment(3, item_of(kit)))
        await kit.handled()
        kit.host.hold_on = set()
        kit.host.release()
        await kit.settled()
        assert ran(kit) == (generation, SEEN)
        (committed,) = kit.committed()
        assert (committed.item.config, committed.generation) == ({}, generation)


@pytest.mark.asyncio
@pytest.mark.parametrize("config", [{"port": "2"}, {"level": "debug", "port": "2"}, {"refuse": "yes"}])
async def test_another_key_or_a_host_that_cannot_makes_an_update(kit, config):
    async with kit.running():
        await kit.run(kit.assignment(1, item_of(kit)))
        generation, _ = ran(kit)
        await kit.run(kit.assignment(2, item_of(kit, **config)))
        await kit.settled()
        assert ran(kit) == (generation + 1, SEEN | config)
        assert kit.chain()[-3:] == ["swapping", "probation", "committed"]


@pytest.mark.asyncio
async def test_a_host_of_before_makes_an_update(kit):
    kit.host.protocol = host_api.CONFIGURES - 1
    async with kit.running():
        await kit.run(kit.assignment(1, item_of(kit)))
        generation, _ = ran(kit)
        await kit.run(kit.assignment(2, item_of(kit, level="debug")))
        await kit.settled()
        assert ran(kit) == (generation + 1, SEEN | {"level": "debug"})


@pytest.mark.asyncio
async def test_an_internal_error_makes_an_update_and_is_in_the_journal(kit, monkeypatch, caplog):
    async def broken(*_):
        raise ValueError("a fault of our own")

    async with kit.running():
        await kit.run(kit.assignment(1, item_of(kit)))
        generation, _ = ran(kit)
        monkeypatch.setattr(EffectRunner, "configure", broken)
        await kit.run(kit.assignment(2, item_of(kit, level="debug")))
        await kit.settled()
        assert ran(kit) == (generation + 1, SEEN | {"level": "debug"})
    assert "web: configure failed with an internal error" in caplog.text
    assert "a fault of our own" in caplog.text


@pytest.mark.parametrize(
    ("more", "reaches"),
    [
        ({"config": {"level": "debug"}}, True),
        ({"config": {}}, False),
        ({"config": {"level": "loud"}}, False),  # not of its key: refused by an update
        ({"config": {"unknown": "x"}}, False),
        ({"config": {"level": "debug"}, "port": 80}, False),
        ({"config": {"level": "debug"}, "attempt": 1}, False),
        ({"config": {"level": "debug"}, "atomic": "set"}, False),
        ({"config": {"level": "debug"}, "manifest_sha256": "other"}, False),
        ({"config": {"level": "debug"}, "rollout": "r9"}, True),
    ],
)
def test_only_live_keys_of_the_same_item_reach_it(kit, more, reaches):
    item = item_of(kit)
    have = Committed(item=item, manifest=kit.manifests[item.target], generation=1, assignment=1, at=datetime.now(UTC))
    assert reaches_running(have, msgspec.structs.replace(item, **more)) is reaches
