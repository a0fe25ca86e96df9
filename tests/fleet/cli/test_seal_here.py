"""`fleet secret set --seal-here`: whom this machine seals for is not for the server to say."""

import base64
import json

import pytest

from fleet.protocol.trust_api import DeviceKey, SealingKeys, SecretReply
from signing import sealing
from signing.sealing import Purpose
from tests.signing.sealing_device import KEY, Device

VALUE = "correct horse battery staple"
KEYS, SET = ("GET", "/v1/secrets/db-password/keys"), ("PUT", "/v1/secrets/db-password")
WORDS = ("secret", "set", "db-password", "--group", "edge-eu", "--instance", "report", "--seal-here")


class ShownDevice(Device):
    """A device's two keys, as a server may show them under any name."""

    def shown(self, *, fleet="fleet"):
        proof = self.prove(fleet=fleet).decode()
        return DeviceKey(device=self.id, proof=proof, certificate_pem=self.certificate.decode())


@pytest.fixture
def device():
    return ShownDevice()


@pytest.fixture
def seal(fleet, desk):
    """`fleet secret set --seal-here` against a server that shows these keys."""

    def run(*devices, of="fleet"):
        desk.routes[KEYS] = SealingKeys(fleet=of, name="db-password", instance="report", version=1, devices=devices)
        reply = SecretReply(name="db-password", instance="report", version=1, devices=tuple(b.device for b in devices))
        desk.routes[SET] = reply
        return fleet(*WORDS, stdin=VALUE + "\n")

    return run


def test_it_leaves_this_machine_only_in_boxes_that_the_device_opens(seal, desk, device):
    done = seal(device.shown())
    assert done.exit_code == 0, done.output
    assert "the server has not seen it" in done.stdout
    assert not [path for _, path, body in desk.seen if VALUE.encode() in body]
    (box,) = desk.sent(SET[1])["boxes"]
    assert box["device"] == device.id
    purpose = Purpose(fleet="fleet", device=device.id, instance="report", name="db-password", version=1)
    assert sealing.open_box(base64.b64decode(box["box"]), key=KEY, purpose=purpose) == VALUE


def remembered(home):
    return json.loads((home / "operator/trust/devices.json").read_text())


def test_another_device_key_than_first_seen_gets_no_box(seal, desk, device, home):
    assert seal(device.shown()).exit_code == 0
    before = remembered(home)
    desk.seen.clear()
    # The id ends in the beginning of the key's fingerprint: a thief who found a key with the same beginning.
    twin = ShownDevice()
    memory = json.dumps(before).replace(device.id, twin.id)
    (home / "operator/trust/devices.json").write_text(memory)
    refused = seal(twin.shown())
    assert refused.exit_code == 4
    assert f"the server shows another key for {twin.id}" in refused.stderr
    assert "nothing was sealed" in refused.stderr
    assert f"fleet audit verify {twin.id} --forget" in refused.stderr
    assert "PUT" not in [method for method, _, _ in desk.seen]
    assert json.dumps(remembered(home)) == memory, "what was first seen stays"


def test_keys_that_an_older_version_saw_first_are_remembered_under_the_present_name(seal, device, home):
    assert seal(device.shown()).exit_code == 0
    memory = remembered(home)
    memory["boards"] = memory.pop("devices")
    twin = ShownDevice()
    older, newer = home / "operator/trust/boards.json", home / "operator/trust/devices.json"
    newer.unlink()
    older.write_text(json.dumps(memory).replace(device.id, twin.id))
    assert seal(twin.shown()).exit_code == 4, "the key is another than the older file says"
    older.write_text(json.dumps(memory))
    assert seal(device.shown()).exit_code == 0
    assert remembered(home)["devices"] == memory["boards"]
    assert not older.exists()


def test_a_sealing_key_that_the_device_key_did_not_sign_gets_no_box(seal, desk, device, home):
    proof = ShownDevice().shown()
    for certificate in (device.shown().certificate_pem, proof.certificate_pem):
        refused = seal(DeviceKey(device=device.id, proof=proof.proof, certificate_pem=certificate))
        assert refused.exit_code == 4
        assert f"cannot seal for {device.id}: its sealing key is not proved" in refused.stderr
    refused = seal(device.shown(fleet="airport"))
    assert refused.exit_code == 4
    assert "PUT" not in [method for method, _, _ in desk.seen]
    assert not (home / "operator/trust/devices.json").exists(), "nothing of a liar is remembered"


def test_one_liar_among_honest_devices_is_left_out_by_name_and_stops_nobody(seal, desk, device, home):
    liar = ShownDevice()
    for order in ((device.shown(), liar.shown(fleet="airport")), (liar.shown(fleet="airport"), device.shown())):
        desk.seen.clear()
        done = seal(*order)
        assert done.exit_code == 0, done.output
        assert f"{liar.id} is left out, its sealing key is not proved" in done.stderr
        assert [box["device"] for box in desk.sent(SET[1])["boxes"]] == [device.id]
        assert liar.id not in remembered(home)["devices"], "nothing of a liar is remembered"


def test_another_key_than_first_seen_still_stops_all(seal, desk, device, home):
    """No device can bring that about: the server shows it."""

    twin, other = ShownDevice(), ShownDevice()
    assert seal(device.shown()).exit_code == 0
    memory = json.dumps(remembered(home)).replace(device.id, twin.id)
    (home / "operator/trust/devices.json").write_text(memory)
    desk.seen.clear()
    assert seal(other.shown(), twin.shown()).exit_code == 4
    assert "PUT" not in [method for method, _, _ in desk.seen]


def test_a_server_of_another_fleet_and_one_without_devices_get_nothing(seal, desk, device):
    refused = seal(device.shown(), of="airport")
    assert refused.exit_code == 4
    assert "this machine belongs to 'fleet'" in refused.stderr
    refused = seal()
    assert refused.exit_code == 2
    assert "cannot seal the secret; no device is there yet" in refused.stderr
    assert "PUT" not in [method for method, _, _ in desk.seen]
