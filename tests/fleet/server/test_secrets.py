"""Secrets on the server: sealed, kept as boxes, given to the device that each is for; the value is nowhere."""

import asyncio
import base64
import contextlib
import hashlib
import logging
import sqlite3

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from fleet.protocol import operator_api
from fleet.protocol.codes import Phase
from fleet.protocol.manifest import SecretKey
from fleet.protocol.trust_api import Box, SealingKeys, SecretReply, SecretRequest, Secrets, SecretScope
from signing import sealing
from signing.device_statements import DeviceSigner
from signing.errors import Rejected
from signing.sealing import Purpose

PASSWORD = "correct horse battery staple"
NEWER = "a password of today"
NEEDS = {"secrets": {"db-password": SecretKey(), "proxy": SecretKey(required=False)}}


async def joined(fleet, name, *, group="edge", connected=True):
    """A device with a sealing key that it proves to be its own, as an agent enrols."""
    key, sealing_key = ec.generate_private_key(ec.SECP256R1()), X25519PrivateKey.generate()
    public = sealing.public_key(sealing_key)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    proof = sealing.prove(DeviceSigner(pem), fleet="test", sealing_key=public).decode()
    device = await fleet.enrol(name, group=group, key=key, sealing_key=public, proof=proof)
    device.sealing_key = sealing_key
    if connected:
        await device.connect()
        await fleet.online(device)
    return device


async def give(fleet, name="db-password", *, value=PASSWORD, group="edge", **more):
    wish = SecretRequest(**({"instance": "hello", "group": group, "value": value} | more))
    return await fleet.operator.send(SecretReply, "PUT", f"/v1/secrets/{name}", wish)


async def fetched(device, ref):
    """A box as the device's listener gives it."""
    with device.http() as http:
        return await asyncio.to_thread(http.get, f"/v1/secrets/{ref.sha256}")


async def opened(device, instance="hello"):
    """Return what the newest assignment gives an instance, opened with the device's own key."""
    item = next(item for item in device.accepted[-1].items if item.instance == instance)
    values = {}
    for ref in item.secrets:
        reply = await fetched(device, ref)
        assert reply.is_success
        assert hashlib.sha256(reply.content).hexdigest() == ref.sha256
        purpose = Purpose(fleet="test", device=device.id, instance=instance, name=ref.name, version=ref.version)
        values[ref.name] = sealing.open_box(reply.content, key=device.sealing_key, purpose=purpose)
    return values


def refs(device):
    return (
        {ref.name: ref.version for item in device.accepted[-1].items for ref in item.secrets} if device.accepted else {}
    )


@pytest.mark.asyncio
async def test_each_device_is_given_a_box_that_it_alone_can_fetch_and_open(new_fleet):
    async with new_fleet() as fleet:
        one, two = await joined(fleet, "one"), await joined(fleet, "two")
        said = await give(fleet)
        assert (said.instance, said.version, set(said.devices)) == ("hello", 1, {one.id, two.id})
        await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0", **NEEDS)))
        for device in (one, two):
            assert await opened(device) == {"db-password": PASSWORD}
        # a device asks for its sibling's box, with its own good certificate
        theirs = two.accepted[-1].items[0].secrets[0]
        assert (await fetched(one, theirs)).status_code == 404
        # and if it had it from elsewhere, it could not open it
        box = (await fetched(two, theirs)).content
        purpose = Purpose(fleet="test", device=one.id, instance="hello", name="db-password", version=1)
        with pytest.raises(Rejected):
            sealing.open_box(box, key=one.sealing_key, purpose=purpose)


@pytest.mark.asyncio
async def test_a_rotated_secret_is_assigned_at_once_and_only_the_version_grows(new_fleet):
    async with new_fleet() as fleet:
        device = await joined(fleet, "one")
        problem = await fleet.operator.problem(
            "PUT", "/v1/secrets/db-password", SecretRequest(instance="hello", group="edge", value=NEWER, rotate=True)
        )
        assert problem.type == "unknown-secret"
        await give(fleet)
        await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0", **NEEDS)))
        before = device.accepted[-1].version
        assert (await give(fleet, value=NEWER, rotate=True)).version == 2
        await device.until(lambda each: refs(each) == {"db-password": 2})
        assert device.accepted[-1].version > before
        assert await opened(device) == {"db-password": NEWER}
        # removed and set again, the numbers go on: a device would refuse an older one
        await fleet.operator.send(
            operator_api.RolloutView,
            "POST",
            "/v1/removals",
            operator_api.RemovalRequest(instance="hello", group="edge"),
        )
        await device.until(lambda each: not each.accepted[-1].items)
        scope = SecretScope(instance="hello", group="edge")
        await fleet.operator.send(Secrets, "POST", "/v1/secrets/db-password/remove", scope)
        assert (await give(fleet)).version == 3


@pytest.mark.asyncio
async def test_a_secret_is_removed_together_with_its_entry_in_the_audit_log_or_not_at_all(new_fleet, monkeypatch):
    async with new_fleet() as fleet:
        await joined(fleet, "a", connected=False)
        await give(fleet)
        scope = SecretScope(instance="hello", group="edge")

        def full(**_entry):
            raise sqlite3.OperationalError("database or disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(fleet.server._store.access, "audit", full)
            problem = await fleet.operator.problem("POST", "/v1/secrets/db-password/remove", scope)
        assert problem.status == 500
        assert (await fleet.operator.get(Secrets, "/v1/secrets")).secrets
        await fleet.operator.send(Secrets, "POST", "/v1/secrets/db-password/remove", scope)
        assert not (await fleet.operator.get(Secrets, "/v1/secrets")).secrets


@pytest.mark.asyncio
async def test_the_value_is_nowhere(new_fleet, caplog):
    async with new_fleet() as fleet:
        caplog.set_level(logging.DEBUG)
        device = await joined(fleet, "one")
        await give(fleet)
        await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0", **NEEDS)))
        assert await opened(device) == {"db-password": PASSWORD}
        fleet.server._store.backup(fleet.directory / "backup.db")
        asked = ["/v1/secrets", "/v1/audit", "/v1/devices", f"/v1/devices/{device.id}", "/metrics", "/v1/rollouts"]
        asked += [f"/v1/devices/{device.id}/{what}" for what in ("timeline", "reports", "desired")]
        asked += ["/v1/secrets/db-password/keys?group=edge&instance=hello", "/openapi.json"]
        for path in asked:
            reply = await fleet.operator.http.get(path)
            assert reply.is_success, path
            assert PASSWORD not in reply.text, path
        # what was refused is not repeated either
        for wish in ({"version": PASSWORD}, {"value": 1}, {"value": PASSWORD, "colour": PASSWORD[::-1]}):
            refused = await fleet.operator.http.put("/v1/secrets/db-password", json={"instance": "hello"} | wish)
            assert refused.status_code == 400
            assert PASSWORD not in refused.text
        assert PASSWORD not in repr(SecretRequest(value=PASSWORD))
        for envelope in device.envelopes:
            assert PASSWORD.encode() not in envelope
        assert device.envelopes
    assert PASSWORD not in caplog.text


@pytest.mark.asyncio
async def test_a_thief_of_everything_that_lies_on_the_server_finds_boxes(new_fleet, tmp_path):
    # database and its log, backup, the broker's persistence, repository, journal: every byte that the server wrote
    async with new_fleet() as fleet:
        await joined(fleet, "one")
        await give(fleet)
        fleet.server._store.backup(fleet.directory / "backup.db")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.suffix == ".db" for path in files)
    for path in files:
        data = path.read_bytes()
        for form in (PASSWORD.encode(), base64.b64encode(PASSWORD.encode()), PASSWORD.encode().hex().encode()):
            assert form not in data, path
    for database in (path for path in files if path.name in {"fleet.db", "backup.db"}):
        with contextlib.closing(sqlite3.connect(database)) as opened_database:
            assert "boxes" in (dump := "\n".join(opened_database.iterdump()))
            assert PASSWORD.encode().hex() not in dump.lower()


@pytest.mark.asyncio
async def test_a_device_that_joins_later_lacks_it_and_is_listed_with_what_to_do(new_fleet):
    async with new_fleet() as fleet:
        one = await joined(fleet, "one")
        await give(fleet)
        await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0", **NEEDS)))
        late = await joined(fleet, "late")
        (row,) = (await fleet.operator.get(Secrets, "/v1/secrets")).secrets
        assert (row.instance, row.name, row.version) == ("hello", "db-password", 1)
        assert [(each.device, each.sealed) for each in row.devices] == [(one.id, "server")]
        assert row.lacking == (late.id,)
        assert not late.accepted, "it is not told to run what it could not start"
        await give(fleet, group="", device=late.id)
        await late.until(lambda each: refs(each) == {"db-password": 2})
        assert await opened(late) == {"db-password": PASSWORD}
        assert refs(one) == {"db-password": 1}, "the others are not touched"
        assert (await fleet.operator.get(Secrets, "/v1/secrets")).secrets[0].lacking == ()


@pytest.mark.asyncio
async def test_a_device_without_the_secret_of_the_next_version_keeps_the_one_before(new_fleet):
    async with new_fleet() as fleet:
        one, two = await joined(fleet, "one"), await joined(fleet, "two")
        old = await fleet.operator.publish("1.0.0")
        await fleet.operator.decided(await fleet.operator.deploy(old))
        new = await fleet.operator.publish("2.0.0", **NEEDS)
        refused = await fleet.operator.problem(
            "POST", "/v1/rollouts", operator_api.RolloutRequest(instance="hello", target=new, group="edge")
        )
        assert refused.type == "missing-secret"
        assert "fleet secret set db-password --group edge --instance hello" in refused.action
        await give(fleet, group="", device=one.id, ahead=True)
        wish = operator_api.RolloutRequest(instance="hello", target=new, group="edge")
        flight = await fleet.operator.send(operator_api.Preflight, "POST", "/v1/preflight", wish)
        assert [each.device for each in flight.excluded] == [two.id]
        assert "lacks the secret db-password" in flight.excluded[0].reason
        done = await fleet.operator.decided(await fleet.operator.deploy(new))
        assert done.state == "succeeded"
        assert one.accepted[-1].items[0].target == new
        fleet.server._director.reconcile(two.id, renew=True)
        await two.until(lambda each: len(each.accepted) > 1)
        assert two.accepted[-1].items[0].target == old, "it goes on with what it had"


@pytest.mark.asyncio
async def test_what_is_asked_wrongly_is_refused_in_one_sentence(new_fleet):
    async with new_fleet() as fleet:
        device = await joined(fleet, "one")
        await give(fleet)
        await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0", **NEEDS)))
        good = {"instance": "hello", "group": "edge", "value": PASSWORD}
        sealed_wrongly = [(device.id, "AAAA", 2), (device.id, "!", 2), ("x-00000000", "AQ==", 2)]
        sealed_wrongly += [(device.id, "AQ==", 9)]
        wrong = [
            {"value": "", "boxes": (Box(device=name, box=box),), "version": version}
            for name, box, version in sealed_wrongly
        ]
        for name, wish, kind in [
            ("db-passwrd", {}, "unknown-secret"),
            ("db password", {}, "bad-name"),
            ("db-password", {"group": "nowhere"}, "unknown-group"),
            ("db-password", {"group": ""}, "bad-request"),
            ("db-password", {"group": "", "device": "nobody-00000000"}, "unknown-device"),
            ("db-password", {"value": ""}, "bad-request"),
            ("db-password", {"value": "abc"}, "bad-secret"),
            ("db-password", {"value": "x" * 5000}, "bad-secret"),
            ("other", {"instance": ""}, "which-instance"),
            ("db-password", {"instance": "Not A Name"}, "bad-name"),
            (
                "db-password",
                {"value": "", "boxes": (Box(device=device.id, box="AAAA"),), "version": 2},
                "unsupported",
            ),
            *zip(["db-password"] * 4, wrong, ["unsupported", "bad-request", "bad-request", "conflict"], strict=True),
        ]:
            problem = await fleet.operator.problem("PUT", f"/v1/secrets/{name}", SecretRequest(**(good | wish)))
            assert problem.type.startswith(kind), (wish, problem)
            assert "\n" not in problem.title + problem.detail + problem.action
        needed = await fleet.operator.problem(
            "POST", "/v1/secrets/db-password/remove", SecretScope(instance="hello", group="edge")
        )
        assert needed.type == "needed"
        assert refs(device) == {"db-password": 1}, "nothing was changed"
        # the instance need not be said where one alone declares it
        assert (await give(fleet, instance="")).instance == "hello"


@pytest.mark.asyncio
async def test_what_an_operator_sealed_the_server_passes_on_and_cannot_read(new_fleet):
    async with new_fleet() as fleet:
        device = await joined(fleet, "one")
        keys = await fleet.operator.get(SealingKeys, "/v1/secrets/db-password/keys", group="edge", instance="hello")
        (shown,) = keys.devices
        key, _ = sealing.proved(
            shown.proof.encode(), certificate=shown.certificate_pem.encode(), fleet="test", device=device.id
        )
        purpose = Purpose(
            fleet=keys.fleet, device=device.id, instance="hello", name="db-password", version=keys.version
        )
        box = base64.b64encode(sealing.seal(PASSWORD, recipient=key, purpose=purpose)).decode()
        said = await give(fleet, value="", boxes=(Box(device=device.id, box=box),), version=keys.version)
        assert said.devices == (device.id,)
        await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0", **NEEDS)))
        assert await opened(device) == {"db-password": PASSWORD}
        assert (await fleet.operator.get(Secrets, "/v1/secrets")).secrets[0].devices[0].sealed == "operator"


@pytest.mark.asyncio
async def test_a_device_cannot_talk_itself_into_a_group_that_is_given_secrets(new_fleet):
    # A group by labels: operators set them, and nothing that a device says of itself is one.
    async with new_fleet() as fleet:
        good, liar = await joined(fleet, "good", group=""), await joined(fleet, "site-berlin", group="")
        wish = operator_api.GroupRequest(selector={"site": "berlin"})
        await fleet.operator.send(operator_api.GroupRow, "PUT", "/v1/groups/vault", wish)
        labels = operator_api.LabelsRequest(labels={"site": "berlin"})
        await fleet.operator.send(operator_api.DeviceDetail, "PUT", f"/v1/devices/{good.id}/labels", labels)
        said = await give(fleet, group="vault")
        assert said.devices == (good.id,)
        assert liar.id not in said.devices


@pytest.mark.asyncio
async def test_a_device_that_is_shut_out_has_no_box_left(new_fleet):
    async with new_fleet() as fleet:
        device = await joined(fleet, "one")
        await give(fleet)
        await fleet.operator.send(operator_api.DeviceDetail, "POST", f"/v1/devices/{device.id}/revoke")
        assert (await fleet.operator.get(Secrets, "/v1/secrets")).secrets == ()


@pytest.mark.asyncio
async def test_a_device_that_went_back_to_the_former_secret_holds_up_no_rollout(new_fleet, behaviours):
    async with new_fleet() as fleet:
        device = await joined(fleet, "one")
        await give(fleet)
        done = await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0", **NEEDS)))
        device.behaviour = behaviours["trapping"]
        await give(fleet, value=NEWER)
        await device.until(lambda each: refs(each) == {"db-password": 2})
        await device.until(lambda each: each.acked >= each.sequence)
        view = await fleet.operator.get(operator_api.RolloutView, f"/v1/rollouts/{done.id}")
        assert view.state == "succeeded"
        detail = await fleet.operator.get(operator_api.DeviceDetail, f"/v1/devices/{device.id}")
        assert [entry.phase for entry in detail.failed] == [Phase.ROLLED_BACK]


@pytest.mark.asyncio
async def test_only_an_operator_may_give_secrets(new_fleet):
    async with new_fleet() as fleet:
        await joined(fleet, "one")
        fleet.server._store.access.add_operator("eve", "eve-token", role="viewer", now=1.0)
        fleet.operator.http.headers["authorization"] = "Bearer eve-token"
        wish = SecretRequest(instance="hello", group="edge", value=PASSWORD)
        assert (await fleet.operator.problem("PUT", "/v1/secrets/db-password", wish)).status == 403
        body = msgspec.json.encode(await fleet.operator.get(Secrets, "/v1/secrets"))
        assert PASSWORD.encode() not in body
