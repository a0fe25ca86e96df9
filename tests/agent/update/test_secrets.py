"""Secrets on a device: fetched and stored sealed, opened for workers, and rolled back."""

import contextlib
import sqlite3
from pathlib import Path

import msgspec
import pytest

from agent.identity import enrolment
from agent.update import restore
from agent.update.store import Store
from fleet.protocol.codes import RejectCode

PASSWORD = "correct horse battery staple"
NEWER = "a password of today"


def with_secret(kit, version, *refs, **more):
    return msgspec.structs.replace(kit.publish(version, **more), secrets=refs)


def given(kit, instance="web"):
    """Return the secrets given to the running generation."""
    return kit.host.entrusted[instance, kit.host.running[instance].generation]


@contextlib.asynccontextmanager
async def a_device(kit):
    await kit.boot()
    yield
    await kit.pull_plug()


def files(directory: Path):
    return [path for path in directory.rglob("*") if path.is_file()]


def everything_at_rest(kit):
    """Yield everything on the device's disk, including the database and its WAL."""
    with sqlite3.connect(kit.places.database) as database:
        dump = "\n".join(database.iterdump()).encode()
    return dump + b"".join(path.read_bytes() for path in files(kit.places.state))


@pytest.mark.asyncio
async def test_a_component_gets_its_secret_which_is_only_sealed_on_disk(kit):
    async with a_device(kit):
        await kit.run(kit.assignment(1, with_secret(kit, "1.0.0", kit.seal(PASSWORD))))
        assert given(kit) == {"key": PASSWORD}
        assert PASSWORD.encode() not in everything_at_rest(kit)
        assert PASSWORD not in str(kit.reports())
        (box,) = kit.places.secrets.iterdir()
        assert box.stat().st_mode & 0o777 == 0o600


@pytest.mark.asyncio
async def test_a_rotated_secret_is_swapped_and_the_old_box_removed(kit):
    async with a_device(kit):
        await kit.run(kit.assignment(1, with_secret(kit, "1.0.0", kit.seal(PASSWORD))))
        await kit.run(kit.assignment(2, with_secret(kit, "1.0.0", kit.seal(NEWER, version=2))))
        assert given(kit) == {"key": NEWER}
        assert kit.chain()[-1] == "committed"
        assert len(files(kit.places.secrets)) == 2
        kit.sealed.evict(each.item for each in kit.deployer.state.committed.values())
        assert len(files(kit.places.secrets)) == 1
        assert kit.store.facts().secrets == {"web/key": 2}


@pytest.mark.asyncio
async def test_a_component_that_does_worse_with_the_new_secret_is_rolled_back(kit):
    async with a_device(kit):
        await kit.run(kit.assignment(1, with_secret(kit, "1.0.0", kit.seal(PASSWORD))))
        kit.host.faults["components/acme/web/1.0.1.wasm"] = 3
        await kit.run(kit.assignment(2, with_secret(kit, "1.0.1", kit.seal(NEWER, version=2))))
        assert kit.chain()[-1] == "rolled-back"
        assert given(kit) == {"key": PASSWORD}
        assert kit.store.facts().secrets == {"web/key": 1}, "what was not committed is not remembered"


@pytest.mark.asyncio
async def test_a_rollback_after_a_host_crash_restores_the_old_secret(kit):
    # The host dies during probation, together with the warm generation: the old box is opened again.
    async with a_device(kit):
        await kit.run(kit.assignment(1, with_secret(kit, "1.0.0", kit.seal(PASSWORD))))
        item = with_secret(kit, "1.0.1", kit.seal(NEWER, version=2), probation_ms=60_000)
        await kit.deployer.desire(kit.assignment(2, item))
        await kit.until(lambda: kit.chain()[-1] == "probation", "probation")
        kit.host.kill()
        kit.host.refuse[item.target] = RejectCode.START_FAILED
        kit.host.start()
        await kit.settled()
        assert kit.chain()[-1] == "rolled-back"
        assert given(kit) == {"key": PASSWORD}


@pytest.mark.asyncio
async def test_a_boot_without_agent_and_network_restores_the_secret(kit):
    async with a_device(kit):
        await kit.run(kit.assignment(1, with_secret(kit, "1.0.0", kit.seal(PASSWORD))))
        await kit.pull_plug()
        kit.server.boxes.clear()
        kit.server.fetched.clear()
        await kit.boot()
        await kit.until(lambda: kit.host.running, "restored")
        assert given(kit) == {"key": PASSWORD}
        assert not kit.server.fetched


@pytest.mark.asyncio
async def test_a_boot_with_a_lost_database_restores_the_secret(kit):
    async with a_device(kit):
        await kit.run(kit.assignment(1, with_secret(kit, "1.0.0", kit.seal(PASSWORD))))
        assert PASSWORD.encode() not in kit.places.runset.read_bytes()
        await kit.pull_plug()
        for name in ("store.db", "store.db-wal", "store.db-shm"):
            (kit.places.state / name).unlink(missing_ok=True)
        store = Store(kit.places.database)
        assert restore.take_over(store, kit.places.runset, b"k" * 32) == 1
        store.close()
        await kit.boot()
        await kit.until(lambda: kit.host.running, "restored")
        assert given(kit) == {"key": PASSWORD}


@pytest.mark.asyncio
async def test_a_box_changed_on_disk_is_reported_and_fetched_again(kit):
    async with a_device(kit):
        item = with_secret(kit, "1.0.0", kit.seal(PASSWORD))
        await kit.run(kit.assignment(1, item))
        (box,) = kit.places.secrets.iterdir()
        box.write_bytes(box.read_bytes()[:-1] + b"\0")
        await kit.pull_plug()
        boxes, kit.server.boxes = kit.server.boxes, {}
        await kit.boot()
        await kit.until(kit.link.ready.is_set, "an attempt to restore")
        assert "key is not on this device's disk" in kit.problems.text("restore web")
        assert kit.host.running == {}
        # The server has the box again when the host comes back.
        kit.server.boxes = boxes
        kit.host.kill()
        kit.host.start()
        await kit.until(lambda: kit.host.running, "restored")
        await kit.until(kit.link.ready.is_set, "everything is restored")
        assert given(kit) == {"key": PASSWORD}
        assert kit.problems.texts() == []


def server_swaps_two_devices_boxes(kit):
    # Sealed to this device's key for another device's id: the best that a server can do by sealing itself.
    return kit.seal(PASSWORD, device="other-76543210")


def server_gives_a_siblings_secret(kit):
    return kit.seal(PASSWORD, instance="sibling")


def server_replays_an_old_version_under_a_new_number(kit):
    old = kit.seal(PASSWORD, version=1)
    return msgspec.structs.replace(old, version=2)


def server_gives_another_secret_under_this_name(kit):
    other = kit.seal(PASSWORD, name="other")
    return msgspec.structs.replace(other, name="key")


def network_changes_the_box(kit):
    ref = kit.seal(PASSWORD)
    path = f"/v1/secrets/{ref.sha256}"
    box = kit.server.boxes[path]
    kit.server.boxes[path] = box[:-1] + bytes([box[-1] ^ 1])
    return ref


def network_shows_an_older_box(kit):
    old, new = kit.seal(PASSWORD, version=1), kit.seal(NEWER, version=2)
    kit.server.boxes[f"/v1/secrets/{new.sha256}"] = kit.server.boxes[f"/v1/secrets/{old.sha256}"]
    return new


def server_sends_an_endless_box(kit):
    ref = kit.seal(PASSWORD)
    kit.server.boxes[f"/v1/secrets/{ref.sha256}"] += bytes(1 << 20)
    return ref


def server_has_no_box(kit):
    ref = kit.seal(PASSWORD)
    kit.server.boxes.clear()
    return ref


@pytest.mark.parametrize(
    ("attack", "code"),
    [
        (server_swaps_two_devices_boxes, RejectCode.SECRET_UNOPENED),
        (server_gives_a_siblings_secret, RejectCode.SECRET_UNOPENED),
        (server_replays_an_old_version_under_a_new_number, RejectCode.SECRET_UNOPENED),
        (server_gives_another_secret_under_this_name, RejectCode.SECRET_UNOPENED),
        (network_changes_the_box, RejectCode.HASH_MISMATCH),
        (network_shows_an_older_box, RejectCode.HASH_MISMATCH),
        (server_sends_an_endless_box, RejectCode.TOO_LARGE),
        (server_has_no_box, RejectCode.NOT_FOUND),
    ],
)
@pytest.mark.asyncio
async def test_a_box_for_another_purpose_is_refused_before_any_change(kit, attack, code):
    async with a_device(kit):
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        before = kit.host.running["web"].generation
        await kit.run(kit.assignment(2, with_secret(kit, "1.0.1", attack(kit))))
        report = kit.reports()[-1]
        assert (report.phase, report.code) == ("failed", code)
        assert "key" in report.message
        assert PASSWORD not in report.message
        assert kit.host.running["web"].generation == before
        assert not kit.host.entrusted


@pytest.mark.asyncio
async def test_discarding_an_identity_removes_all_boxes(kit):
    async with a_device(kit):
        await kit.run(kit.assignment(1, with_secret(kit, "1.0.0", kit.seal(PASSWORD))))
        assert files(kit.places.secrets)
    enrolment.discard_identity(kit.places.state)
    assert not kit.places.secrets.exists()
