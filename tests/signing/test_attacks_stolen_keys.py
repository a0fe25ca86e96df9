"""Attacks with stolen keys, and the code with which the device refuses each.

Each story starts with an honest repository with a published component and a device that runs it. Then something hostile
happens, and the device refuses an assignment with exactly the expected code.
"""

from datetime import timedelta
from typing import Any

import pytest
from tuf.api.metadata import Key, Metadata, Snapshot, Targets, Timestamp

from fleet.protocol.codes import RejectCode
from signing.errors import Rejected
from tests.simulator.attack import NETWORK, Scene, Story, refuses, stories
from tests.simulator.repository import (
    Device,
    promise_role,
    promise_snapshot,
)

STORIES, attack = stories()


# -- director, timestamp and snapshot keys together: the whole server -------------------------------------------------


@attack("the server shows an old namespace role under new online roles", RejectCode.ROLLBACK)
def _(scene: Scene) -> bytes:
    safe = scene.repo.publish("1.1.0")
    scene.device.run(scene.repo.assign(safe))

    def backwards(snapshot: Snapshot) -> None:
        promise_role(snapshot, "main", scene.repo.files["2.main.json"], 2)

    scene.repo.rewrite("snapshot", backwards)
    _promise(scene)
    return scene.assign()


@attack("the server withdraws a role that this device has never fetched", RejectCode.ROLLBACK)
def _(scene: Scene) -> bytes:
    old = scene.repo.files["1.other.json"]
    scene.repo.publish("1.0.0", space="other")
    scene.device.refresh()
    scene.repo.rewrite("snapshot", lambda snapshot: promise_role(snapshot, "other", old, 1))
    _promise(scene)
    return scene.assign()


@attack("the server withdraws a snapshot that this device could not fetch", RejectCode.ROLLBACK)
def _(scene: Scene) -> bytes:
    old = scene.repo.files["2.snapshot.json"]
    scene.repo.publish("1.1.0")
    del scene.repo.files["3.snapshot.json"]
    with pytest.raises(Rejected):
        scene.device.refresh()
    scene.repo.rewrite("timestamp", lambda new: promise_snapshot(new, old, 2))
    return scene.assign()


@attack("freeze: a namespace role is never renewed", RejectCode.EXPIRED)
def _(scene: Scene) -> bytes:
    scene.repo.rewrite("main", lambda role: setattr(role, "expires", scene.repo.now + timedelta(hours=1)))
    scene.repo.online()
    scene.repo.now += timedelta(hours=2)
    return scene.assign()


@attack("freeze: the snapshot is never renewed, under timestamps that are", RejectCode.EXPIRED)
def _(scene: Scene) -> bytes:
    scene.repo.now += timedelta(days=15)
    scene.repo.rewrite("timestamp", lambda new: setattr(new, "expires", scene.repo.now + timedelta(days=1)))
    return scene.assign()


@attack("freeze: top-level targets are never renewed", RejectCode.EXPIRED)
def _(scene: Scene) -> bytes:
    scene.repo.rewrite("targets", lambda role: setattr(role, "expires", scene.repo.now + timedelta(hours=1)))
    scene.repo.now += timedelta(hours=2)
    scene.repo.online()
    return scene.assign()


@attack("freeze: the next root is withheld until the last one expires", RejectCode.EXPIRED)
def _(scene: Scene) -> bytes:
    scene.repo.now = scene.repo.signed("root").expires + timedelta(seconds=1)
    scene.repo.rewrite("main", lambda role: setattr(role, "expires", scene.repo.now + timedelta(days=1)))
    scene.repo.rewrite("targets", lambda role: setattr(role, "expires", scene.repo.now + timedelta(days=1)))
    scene.repo.online()
    return scene.assign()


@attack("the server shows older top-level targets under new online roles", RejectCode.ROLLBACK)
def _(scene: Scene) -> bytes:
    old = scene.repo.files["1.targets.json"]
    scene.repo.rewrite("targets", lambda role: None)
    scene.repo.online()
    scene.device.refresh()
    scene.repo.rewrite("snapshot", lambda snapshot: promise_role(snapshot, "targets", old, 1))
    _promise(scene)
    return scene.assign()


@attack("the server drops a role from the snapshot", RejectCode.ROLLBACK)
def _(scene: Scene) -> bytes:
    scene.repo.rewrite("snapshot", lambda snapshot: snapshot.meta.pop("other.json"))
    _promise(scene)
    return scene.assign()


@attack("the server shows an older snapshot under a new timestamp", RejectCode.ROLLBACK)
def _(scene: Scene) -> bytes:
    scene.repo.publish("1.1.0")
    scene.device.refresh()
    scene.repo.rewrite("timestamp", lambda new: promise_snapshot(new, scene.repo.files["2.snapshot.json"], 2))
    return scene.assign()


@attack("the server shows an earlier snapshot with the same roles under a new timestamp", RejectCode.ROLLBACK)
def _(scene: Scene) -> bytes:
    scene.repo.rewrite("snapshot", lambda snapshot: None)
    _promise(scene)
    scene.device.refresh()
    scene.repo.rewrite("timestamp", lambda new: promise_snapshot(new, scene.repo.files["2.snapshot.json"], 2))
    return scene.assign()


@attack("the server signs two snapshots of one version", RejectCode.EQUIVOCATION)
def _(scene: Scene) -> bytes:
    scene.repo.rewrite("snapshot", lambda new: new.unrecognized_fields.update(more="x"), bump=False)
    _promise(scene)
    return scene.assign()


@attack("a publisher and the server show two namespace roles of one version", RejectCode.EQUIVOCATION)
def _(scene: Scene) -> bytes:
    scene.repo.rewrite("main", lambda role: role.unrecognized_fields.update(more="x"), bump=False)
    scene.repo.online()
    return scene.assign()


@attack("the server signs two timestamps of one version", RejectCode.EQUIVOCATION)
def _(scene: Scene) -> bytes:
    scene.device = Device(scene.repo, state=scene.device.state)  # the trusted file is lost from the cache
    scene.repo.rewrite("timestamp", lambda new: new.unrecognized_fields.update(more="x"), bump=False)
    return scene.assign()


@attack("the server signs a namespace role itself", RejectCode.UNSIGNED)
def _(scene: Scene) -> bytes:
    scene.repo.rewrite("main", lambda role: None, key="snapshot")
    scene.repo.online()
    return scene.assign()


@attack("the server promises endless metadata", RejectCode.TOO_LARGE)
def _(scene: Scene) -> bytes:
    def endless(timestamp: Timestamp) -> None:
        timestamp.snapshot_meta.version += 1
        timestamp.snapshot_meta.length = 10**12

    scene.repo.rewrite("timestamp", endless)
    return scene.assign()


def _promise(scene: Scene) -> None:
    """Sign a timestamp over the newest snapshot, whatever its content."""
    version = scene.repo.signed("snapshot").version
    data = scene.repo.files[f"{version}.snapshot.json"]
    scene.repo.rewrite("timestamp", lambda new: promise_snapshot(new, data, version))


# -- a stolen publisher's key: its own namespace, below its ceiling ---------------------------------------------------


@attack("a publisher asks for more than its namespace's ceiling", RejectCode.GRANT_DENIED)
def _(scene: Scene) -> bytes:
    return scene.repo.assign(scene.repo.publish("2.0.0", grants=NETWORK))


@attack("a publisher signs into another namespace", RejectCode.UNKNOWN_TARGET)
def _(scene: Scene) -> bytes:
    foreign = "components/other/hello/1.0.0.wasm"

    def plant(role: Targets) -> None:
        role.targets[foreign] = role.targets[scene.item.target]

    scene.repo.rewrite("main", plant)
    scene.repo.online()
    return scene.altered(target=foreign)


@attack("a publisher puts another manifest's name on a target", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    foreign = "components/main/other/1.0.0.wasm"

    def plant(role: Targets) -> None:
        role.targets[foreign] = role.targets[scene.item.target]

    scene.repo.rewrite("main", plant)
    scene.repo.online()
    return scene.altered(target=foreign)


# -- removed signers, and a single key under two ids ------------------------------------------------------------------


@attack("a director whose key was rotated away", RejectCode.UNSIGNED)
def _(scene: Scene) -> bytes:
    envelope = scene.assign()
    scene.repo.rotate_delegation("director")
    return envelope


@attack("a publisher whose key was rotated away", RejectCode.UNSIGNED)
def _(scene: Scene) -> bytes:
    old = scene.repo.keys["main"]
    scene.repo.rotate_delegation("main")
    scene.repo.keys["stolen"] = old
    scene.repo.rewrite("main", lambda role: None, key="stolen")
    scene.repo.online()
    return scene.assign()


@attack("one key under two ids for a threshold of two", RejectCode.UNSIGNED)
def _(scene: Scene) -> bytes:
    thief = scene.repo.keys["main"]

    def double(top: Targets) -> None:
        assert top.delegations is not None
        public = thief.public_key
        upper = public.keyval["public"].upper()
        top.add_key(Key.from_dict("twin", public.to_dict() | {"keyval": {"public": upper}}), "main")
        top.delegations.roles["main"].threshold = 2

    scene.repo.rewrite("targets", double)

    role: Metadata[Any] = Metadata(scene.repo.signed("main"))
    role.signed.version += 1
    signature = role.sign(thief)
    role.signatures["twin"] = type(signature)("twin", signature.signature)
    scene.repo.files[f"{role.signed.version}.main.json"] = role.to_bytes()
    scene.repo.online()
    return scene.assign()


@pytest.mark.parametrize(("code", "story"), [row[1:] for row in STORIES], ids=[row[0] for row in STORIES])
def test_the_device_refuses(code: RejectCode, story: Story) -> None:
    refuses(code, story)
