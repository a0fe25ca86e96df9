"""Attacks without stolen keys or with the director's key, and the code with which the device refuses each.

Each story starts with an honest repository with a published component and a device that runs it. Then something hostile
happens, and the device refuses an assignment with exactly the expected code.
"""

import json
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from tuf.api.metadata import Root

from fleet.protocol.assignment import ASSIGNMENT_TYPE, FRESH_TYPE, SecretRef
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import ConfigKey, SecretKey
from signing import director, dsse
from signing.errors import Rejected, SigningError
from signing.state import VERSION_MAX
from tests.simulator.attack import CLOCKS, NETWORK, Scene, Story, by_director, refuses, stories
from tests.simulator.repository import (
    START,
    Device,
    Repository,
    signer,
    tampered,
)

STORIES, attack = stories()


# -- a hostile broker or network: no key at all -----------------------------------------------------------------------


@attack("forged assignment", RejectCode.UNSIGNED)
def _(scene: Scene) -> bytes:
    # Signed, but by a key without a delegation.
    return director.sign_assignment(scene.repo.assignment(scene.item), signer())


@attack("assignment with the signature of another one", RejectCode.UNSIGNED)
def _(scene: Scene) -> bytes:
    mine, other = json.loads(scene.assign()), json.loads(scene.envelope)
    return json.dumps(mine | {"signatures": other["signatures"]}).encode()


@attack("assignment with no signature", RejectCode.UNSIGNED)
def _(scene: Scene) -> bytes:
    return json.dumps(json.loads(scene.assign()) | {"signatures": []}).encode()


@attack("older assignment replayed", RejectCode.ROLLBACK)
def _(scene: Scene) -> bytes:
    scene.device.run(scene.assign())
    return scene.envelope


@attack("equal version, different assignment", RejectCode.EQUIVOCATION)
def _(scene: Scene) -> bytes:
    return scene.assign(version=1, keep_data=("hello",))


@attack("another device's assignment", RejectCode.WRONG_DEVICE)
def _(scene: Scene) -> bytes:
    return scene.assign(device="winch-99887766")


@attack("another fleet's assignment", RejectCode.WRONG_FLEET)
def _(scene: Scene) -> bytes:
    return scene.assign(fleet="airport")


@attack("expired assignment", RejectCode.EXPIRED)
def _(scene: Scene) -> bytes:
    envelope = scene.assign(expires=scene.repo.now + timedelta(hours=1))
    scene.repo.now += timedelta(hours=2)
    return envelope


@attack("payload type confusion: a freshness statement as an assignment", RejectCode.UNSIGNED)
def _(scene: Scene) -> bytes:
    payload = msgspec.json.encode(scene.repo.assignment(scene.item))
    return dsse.sign(FRESH_TYPE, payload, [scene.repo.keys["director"]])


@attack("payload type confusion: the type changed after signing", RejectCode.UNSIGNED)
def _(scene: Scene) -> bytes:
    payload = msgspec.json.encode(scene.repo.assignment(scene.item))
    envelope = json.loads(dsse.sign(FRESH_TYPE, payload, [scene.repo.keys["director"]]))
    return json.dumps(envelope | {"payloadType": ASSIGNMENT_TYPE}).encode()


@attack("endless envelope", RejectCode.TOO_LARGE)
def _(scene: Scene) -> bytes:
    return scene.assign()[:-1] + b" " * dsse.MAX_BYTES + b"}"


@attack("deep JSON in an envelope", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    return b'{"payloadType":"x","payload":"","signatures":[],"deep":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@attack("bytes that are not an envelope", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    return b"\x00\xff" * 100


@attack("one key's signature given twice", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    envelope = json.loads(scene.assign())
    return json.dumps(envelope | {"signatures": envelope["signatures"] * 2}).encode()


@attack("timestamp rolled back", RejectCode.ROLLBACK)
def _(scene: Scene) -> bytes:
    old = scene.repo.files["timestamp.json"]
    scene.repo.publish("1.1.0")
    scene.device.refresh()
    scene.repo.files["timestamp.json"] = old
    return scene.assign()


@attack("timestamp rolled back, and the cache torn by a power cut", RejectCode.ROLLBACK)
def _(scene: Scene) -> bytes:
    old = scene.repo.files["timestamp.json"]
    scene.repo.publish("1.1.0")
    scene.device.refresh()
    scene.device = Device(scene.repo, state=scene.device.state)  # a new cache, the same state
    scene.repo.files["timestamp.json"] = old
    return scene.assign()


@attack("timestamp rolled back to an earlier one over the same snapshot", RejectCode.ROLLBACK)
def _(scene: Scene) -> bytes:
    old = scene.repo.files["timestamp.json"]
    scene.repo.online()
    scene.device.refresh()
    scene.repo.files["timestamp.json"] = old
    return scene.assign()


@attack("freeze: the timestamp is never renewed", RejectCode.EXPIRED)
def _(scene: Scene) -> bytes:
    scene.repo.now += timedelta(days=3)
    return scene.assign()


@attack("freeze: an old but valid repository is shown", RejectCode.FREEZE)
def _(scene: Scene) -> bytes:
    old = dict(scene.repo.files)
    scene.repo.publish("1.1.0")
    scene.repo.files = old
    return scene.assign(snapshot=3)


@attack("mix and match: a snapshot that the timestamp did not promise", RejectCode.HASH_MISMATCH)
def _(scene: Scene) -> bytes:
    scene.repo.publish("1.1.0")
    scene.repo.files["3.snapshot.json"] = scene.repo.files["2.snapshot.json"]
    return scene.assign()


@attack("mix and match: a namespace role that the snapshot did not promise", RejectCode.HASH_MISMATCH)
def _(scene: Scene) -> bytes:
    new = scene.repo.publish("1.1.0")
    scene.repo.files["3.main.json"] = scene.repo.files["2.main.json"]
    return scene.repo.assign(new)


@attack("metadata tampered with", RejectCode.UNSIGNED)
def _(scene: Scene) -> bytes:
    data = scene.repo.files["timestamp.json"]
    scene.repo.files["timestamp.json"] = tampered(data, ["signed", "version"], 9)
    return scene.assign()


@attack("metadata that has no canonical form", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    data = scene.repo.files["timestamp.json"]
    scene.repo.files["timestamp.json"] = tampered(data, ["signed", "more"], 1.5)
    return scene.assign()


@attack("metadata of another type", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    scene.repo.files["timestamp.json"] = scene.repo.files["1.targets.json"]
    return scene.assign()


@attack("endless metadata", RejectCode.TOO_LARGE)
def _(scene: Scene) -> bytes:
    scene.repo.files["timestamp.json"] += b" " * 100_000
    return scene.assign()


@attack("deep JSON in metadata", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    scene.repo.files["timestamp.json"] = b"[" * 8000 + b"]" * 8000
    return scene.assign()


@attack("a root signed by unknown keys", RejectCode.UNSIGNED)
def _(scene: Scene) -> bytes:
    scene.repo.files["2.root.json"] = Repository().files["1.root.json"]
    return scene.assign()


@attack("a root that skips a version", RejectCode.ROLLBACK)
def _(scene: Scene) -> bytes:
    scene.repo.rewrite("root", lambda root: setattr(root, "version", 7))
    scene.repo.files["2.root.json"] = scene.repo.files.pop("7.root.json")
    return scene.assign()


@attack("a root that its own keys did not sign", RejectCode.UNSIGNED)
def _(scene: Scene) -> bytes:
    thief, old = signer(), scene.repo.keys["root"].public_key

    def usurp(root: Root) -> None:
        root.revoke_key(old.keyid, "root")
        root.add_key(thief.public_key, "root")

    scene.repo.rewrite("root", usurp)
    return scene.assign()


@attack("a later root withheld after it was seen", RejectCode.ROLLBACK)
def _(scene: Scene) -> bytes:
    scene.repo.rotate("timestamp")
    scene.repo.online()
    scene.device.refresh()
    scene.device = Device(scene.repo, state=scene.device.state)
    del scene.repo.files["2.root.json"]
    return scene.assign()


@attack("metadata withheld", RejectCode.NOT_FOUND)
def _(scene: Scene) -> bytes:
    del scene.repo.files["timestamp.json"]
    return scene.assign()


# -- a stolen director key: may assign, but not publish ---------------------------------------------------------------


@attack("arbitrary code: an unpublished target", RejectCode.UNKNOWN_TARGET)
def _(scene: Scene) -> bytes:
    return scene.altered(target="components/main/evil/1.0.0.wasm")


@attack("arbitrary code: other bytes under a published name", RejectCode.TARGET_MISMATCH)
def _(scene: Scene) -> bytes:
    return scene.altered(sha256="ab" * 32)


@attack("a wrong length", RejectCode.TARGET_MISMATCH)
def _(scene: Scene) -> bytes:
    return scene.altered(length=scene.item.length + 1)


@attack("another manifest", RejectCode.TARGET_MISMATCH)
def _(scene: Scene) -> bytes:
    return scene.altered(manifest_sha256="cd" * 32)


@attack("a path outside every namespace", RejectCode.UNKNOWN_TARGET)
def _(scene: Scene) -> bytes:
    return scene.altered(target="components/main/a/b/../../../1.0.0.wasm")


@attack("grants beyond the manifest", RejectCode.GRANT_DENIED)
def _(scene: Scene) -> bytes:
    return scene.altered(grants=NETWORK)


@attack("configuration that the manifest does not declare", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    return scene.altered(config={"url": "https://evil.example"})


@attack("a value that the manifest does not allow", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    item = scene.repo.publish("1.1.0", grants=CLOCKS, config={"retries": ConfigKey(type="integer", min=1)})
    return scene.repo.assign(msgspec.structs.replace(item, config={"retries": "0"}))


@attack("a secret that the manifest does not declare", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    return scene.altered(secrets=(SecretRef(name="db-password", sha256="0" * 64, version=1),))


@attack("a component without the secret that it needs", RejectCode.SECRET_MISSING)
def _(scene: Scene) -> bytes:
    return scene.repo.assign(scene.repo.publish("1.1.0", grants=CLOCKS, secrets={"key": SecretKey()}))


@attack("an older version of a secret than was committed", RejectCode.ROLLBACK)
def _(scene: Scene) -> bytes:
    # the password was rotated because it had leaked; an attacker with the director's key wants the old one back
    item = scene.repo.publish("1.1.0", grants=CLOCKS, secrets={"key": SecretKey()})
    scene.device.state = scene.device.state.with_secrets("hello", {"key": 2})
    old = SecretRef(name="key", sha256="0" * 64, version=1)
    return scene.repo.assign(msgspec.structs.replace(item, secrets=(old,)))


@attack("a secret named twice", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    item = scene.repo.publish("1.1.0", grants=CLOCKS, secrets={"key": SecretKey()})
    twice = (SecretRef(name="key", sha256="0" * 64, version=2), SecretRef(name="key", sha256="1" * 64, version=1))
    return scene.repo.assign(msgspec.structs.replace(item, secrets=twice))


@attack("a secret whose box has a path for a hash", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    item = scene.repo.publish("1.1.0", grants=CLOCKS, secrets={"key": SecretKey()})
    ref = SecretRef(name="key", sha256="../../identity/device.key", version=1)
    return scene.repo.assign(msgspec.structs.replace(item, secrets=(ref,)))


@attack("an instance listed twice", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    return by_director(scene, scene.item, scene.item)


@attack("an instance whose name is a path", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    return by_director(scene, msgspec.structs.replace(scene.item, instance="../../etc"))


@attack("data kept under a name that is a path", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    return by_director(scene, scene.item, keep_data=("..",))


@attack("an invalid port", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    return by_director(scene, msgspec.structs.replace(scene.item, port=70_000))


@attack("more instances than a device runs", RejectCode.TOO_LARGE)
def _(scene: Scene) -> bytes:
    return by_director(scene, *(msgspec.structs.replace(scene.item, instance=f"i{n}") for n in range(65)))


@attack("an empty list without stop_all", RejectCode.EMPTY)
def _(scene: Scene) -> bytes:
    return by_director(scene)


@attack("a version beyond the largest one", RejectCode.MALFORMED)
def _(scene: Scene) -> bytes:
    return scene.assign(version=VERSION_MAX + 1)


@attack("an unknown schema version", RejectCode.UNSUPPORTED_VERSION)
def _(scene: Scene) -> bytes:
    return scene.assign(v=2)


@attack("below the security epoch", RejectCode.SECURITY_EPOCH)
def _(scene: Scene) -> bytes:
    safe = scene.repo.publish("2.0.0", security_epoch=1)
    scene.device.run(scene.repo.assign(safe))
    scene.device.commit("main/hello", 1)
    return scene.assign()


@attack("a revoked release", RejectCode.REVOKED)
def _(scene: Scene) -> bytes:
    scene.repo.revoke("1.0.0")
    return scene.assign()


@pytest.mark.parametrize(("code", "story"), [row[1:] for row in STORIES], ids=[row[0] for row in STORIES])
def test_the_device_refuses(code: RejectCode, story: Story) -> None:
    refuses(code, story)


@pytest.mark.parametrize("at", range(0, 400, 7))
def test_no_damaged_envelope_is_accepted_as_another(at: int) -> None:
    scene = Scene()
    envelope = scene.assign()
    damaged = bytearray(envelope)
    damaged[at % len(envelope)] ^= 0x01

    # Refused, or the damage hit bytes that are neither signed nor read: never another error or another meaning.
    try:
        accepted = scene.device.accept(bytes(damaged))
    except Rejected:
        return
    assert accepted.sha256 == director.payload_sha256(envelope)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"stop_all": True, "device": "no device id"},
        {"stop_all": True, "expires": START},
        {"stop_all": True, "issued": START.replace(tzinfo=None)},
        {"stop_all": True, "keep_data": ("x" * 63,) * 9000},
    ],
)
def test_the_director_does_not_sign_an_unacceptable_assignment(fields: dict[str, Any]) -> None:
    repo = Repository()
    with pytest.raises(SigningError):
        repo.assign(**fields)
