"""Committed instances whose files on this device were lost or damaged: fetched, compiled and started again."""

import pytest

from agent.link.https import FetchError
from fleet.protocol.codes import RejectCode

V1, V2 = "components/acme/web/1.0.0.wasm", "components/acme/web/2.0.0.wasm"


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
async def test_an_instance_heals_once_the_server_can_be_reached(kit, monkeypatch):
    monkeypatch.setattr("agent.update.restore.MEND_FIRST_S", 0.01)
    await harmed(kit, lose)
    kit.server.trouble = [FetchError(RejectCode.UNREACHABLE, "no route") for _ in range(3)]
    await kit.boot()
    await kit.until(kit.link.ready.is_set, "others are not held up")
    await kit.until(lambda: kit.host.targets() == {"web": V1})
    assert len(kit.server.fetched) == 4
    await kit.pull_plug()


@pytest.mark.asyncio
async def test_an_instance_that_was_removed_meanwhile_is_not_started_again(kit, monkeypatch):
    monkeypatch.setattr("agent.update.restore.MEND_FIRST_S", 0.01)
    await harmed(kit, lose)
    kit.server.trouble = [FetchError(RejectCode.UNREACHABLE, "no route") for _ in range(3)]
    await kit.boot()
    await kit.until(lambda: kit.problems.texts() != [])
    await kit.run(kit.assignment(2))
    await kit.until(lambda: kit.problems.texts() == [])
    assert kit.host.targets() == {}
    assert kit.store.committed() == ()
    await kit.pull_plug()
