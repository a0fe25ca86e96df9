"""Sealed boxes open only for their device, instance, name and version; devices prove their sealing keys."""

import base64

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from hypothesis import given
from hypothesis import strategies as st

from fleet.protocol import bounds, names
from fleet.protocol.codes import RejectCode
from signing import sealing
from signing.errors import Rejected, SigningError
from signing.sealing import ArchivePurpose, Purpose
from tests.signing.sealing_device import KEY, OURS, Device

FOR = Purpose(fleet="harbour", device="crane-0a1b2c3d", instance="hello", name="db-password", version=2)
VALUE = "correct horse battery staple"
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=4, max_size=900)


def code_of(box: bytes, *, key: X25519PrivateKey = KEY, purpose: Purpose = FOR) -> RejectCode:
    with pytest.raises(Rejected) as verdict:
        sealing.open_box(box, key=key, purpose=purpose)
    assert VALUE not in str(verdict.value)
    return verdict.value.code


@given(value=TEXT)
def test_a_sealed_value_is_opened(value):
    box = sealing.seal(value, recipient=OURS, purpose=FOR)
    assert len(box) <= bounds.SECRET_BOX_MAX_BYTES
    assert value.encode() not in box
    assert sealing.open_box(box, key=KEY, purpose=FOR) == value


def test_the_longest_value_fits_into_a_box():
    longest = "x" * bounds.SECRET_VALUE_MAX_BYTES
    box = sealing.seal(longest, recipient=OURS, purpose=FOR)
    assert len(box) <= bounds.SECRET_BOX_MAX_BYTES
    assert sealing.open_box(box, key=KEY, purpose=FOR) == longest


def test_a_box_with_any_changed_byte_does_not_open():
    box = sealing.seal(VALUE, recipient=OURS, purpose=FOR)
    for place in range(len(box)):
        changed = bytearray(box)
        changed[place] ^= 1
        wanted = RejectCode.UNSUPPORTED_VERSION if place == 0 else RejectCode.SECRET_UNOPENED
        assert code_of(bytes(changed)) is wanted, place


@given(cut=st.integers(0, 304))
def test_a_torn_box_does_not_open(cut):
    box = sealing.seal(VALUE, recipient=OURS, purpose=FOR)
    assert code_of(box[:cut]) in {RejectCode.SECRET_UNOPENED, RejectCode.UNSUPPORTED_VERSION}


@pytest.mark.parametrize(
    ("what", "other"),
    [
        ("another fleet's", {"fleet": "airport"}),
        ("another device's", {"device": "winch-99887766"}),
        ("another instance's", {"instance": "sibling"}),
        ("another secret's", {"name": "db-user"}),
        ("an older version's", {"version": 1}),
        ("a newer version's", {"version": 3}),
    ],
)
def test_a_box_sealed_for_another_purpose_does_not_open(what, other):
    # Sealed to this device's key, as a server can do: the purpose does not match the assignment's.
    box = sealing.seal(VALUE, recipient=OURS, purpose=msgspec.structs.replace(FOR, **other))
    assert code_of(box) is RejectCode.SECRET_UNOPENED, what


def test_fields_cannot_be_shifted_into_one_another():
    one = msgspec.structs.replace(FOR, instance="hello-db", name="password")
    other = msgspec.structs.replace(FOR, instance="hello", name="db-password")
    assert code_of(sealing.seal(VALUE, recipient=OURS, purpose=one), purpose=other) is RejectCode.SECRET_UNOPENED


def test_another_devices_box_does_not_open_here():
    box = sealing.seal(VALUE, recipient=sealing.public_key(X25519PrivateKey.generate()), purpose=FOR)
    assert code_of(box) is RejectCode.SECRET_UNOPENED


def test_a_later_format_and_an_oversized_box_have_different_codes():
    box = sealing.seal(VALUE, recipient=OURS, purpose=FOR)
    assert code_of(b"\2" + box[1:]) is RejectCode.UNSUPPORTED_VERSION
    assert code_of(box + bytes(bounds.SECRET_BOX_MAX_BYTES)) is RejectCode.TOO_LARGE
    assert code_of(b"") is RejectCode.UNSUPPORTED_VERSION


def test_two_boxes_of_the_same_value_differ():
    one, two = (sealing.seal(VALUE, recipient=OURS, purpose=FOR) for _ in range(2))
    assert one[1:33] != two[1:33]
    assert one[33:] != two[33:]


@pytest.mark.parametrize("length", [4, 100, 254])
def test_the_length_of_a_box_hides_the_length_of_the_value(length):
    assert len(sealing.seal("x" * length, recipient=OURS, purpose=FOR)) == 1 + 32 + 16 + 256


@pytest.mark.parametrize("value", ["", "abc", "with\0nul", "x" * 4097, "\ud800lone"])
def test_an_unusable_value_is_refused(value):
    with pytest.raises(SigningError, match="secret"):
        sealing.seal(value, recipient=OURS, purpose=FOR)


# The identity and two points of small order: with these, anyone could compute the key.
@pytest.mark.parametrize("point", [bytes(32), bytes([1, *bytes(31)]), b"short", bytes(33)])
def test_an_invalid_sealing_key_is_refused(point):
    with pytest.raises(SigningError, match="sealing key is not an X25519 key"):
        sealing.seal(VALUE, recipient=base64.b64encode(point).decode(), purpose=FOR)
    forged = bytes([1]) + point[:32].ljust(32, b"\0") + bytes(272)
    assert code_of(forged) is RejectCode.SECRET_UNOPENED


# -- archives


ASKED = ArchivePurpose(device="crane-0a1b2c3d", command=7)


@pytest.mark.parametrize("archive", [b"", b"x", bytes(bounds.ARCHIVE_MEMBERS_MAX_BYTES)], ids=len)
def test_an_archive_opens_for_who_asked_alone(archive):
    sealed = sealing.seal_archive(archive, recipient=OURS, purpose=ASKED)
    assert len(sealed) == len(archive) + 1 + 32 + 16
    assert sealing.open_archive(sealed, key=KEY, purpose=ASKED) == archive
    elsewhere = [
        (sealing.archive_key(), ASKED, sealed),
        (KEY, ArchivePurpose(device=ASKED.device, command=8), sealed),
        (KEY, ArchivePurpose(device="gate-99887766", command=7), sealed),
        (KEY, ASKED, sealed[:-1] + bytes([sealed[-1] ^ 1])),
        (KEY, ASKED, sealed[:40]),
        (KEY, ASKED, b""),
    ]
    for key, purpose, data in elsewhere:
        with pytest.raises(SigningError, match="archive"):
            sealing.open_archive(data, key=key, purpose=purpose)


def test_an_archive_is_no_box_of_a_secret():
    sealed = sealing.seal_archive(bytes(256), recipient=OURS, purpose=ASKED)
    assert code_of(sealed) is RejectCode.SECRET_UNOPENED


# -- proof of the sealing key


def refusal(proof: bytes, shown: Device, device: str) -> RejectCode:
    with pytest.raises(Rejected) as verdict:
        sealing.proved(proof, certificate=shown.certificate, fleet="harbour", device=device)
    return verdict.value.code


def test_a_device_proves_that_a_sealing_key_is_its_own():
    device = Device()
    proof = device.prove()
    key, fingerprint = sealing.proved(proof, certificate=device.certificate, fleet="harbour", device=device.id)
    assert key == OURS
    assert fingerprint.startswith(names.fingerprint_of(device.id))


def test_a_server_cannot_substitute_its_own_sealing_key():
    device, server = Device(), Device()
    # the server's own sealing key, signed by the server's own key under the device's name
    assert refusal(server.prove(), server, device.id) is RejectCode.WRONG_DEVICE
    # the server's own sealing key with the device's certificate
    assert refusal(server.prove(), device, device.id) is RejectCode.UNSIGNED
    # the device's proof for another fleet
    assert refusal(device.prove(fleet="airport"), device, device.id) is RejectCode.WRONG_FLEET
    # a report that the device signed with the same key
    assert refusal(device.signer.sign(b'{"v":1}'), device, device.id) is RejectCode.UNSIGNED
    assert refusal(device.prove(sealing_key="AAAA"), device, device.id) is RejectCode.MALFORMED


def test_only_an_x25519_key_is_read_from_the_sealing_key_file():
    pem = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    assert sealing.public_key(sealing.load(pem)) == OURS
    for wrong in (b"", Device().key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())):
        with pytest.raises(SigningError, match="sealing key"):
            sealing.load(wrong)
