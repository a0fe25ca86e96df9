"""A box opens for one board, one instance, one name and one version, and for nothing else; and whose key it is sealed
to is the board's own word."""

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
from signing.sealing import Purpose
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
def test_what_is_sealed_is_opened(value):
    box = sealing.seal(value, recipient=OURS, purpose=FOR)
    assert len(box) <= bounds.SECRET_BOX_MAX_BYTES
    assert value.encode() not in box
    assert sealing.open_box(box, key=KEY, purpose=FOR) == value


def test_the_longest_value_fits_into_a_box():
    longest = "x" * bounds.SECRET_VALUE_MAX_BYTES
    box = sealing.seal(longest, recipient=OURS, purpose=FOR)
    assert len(box) <= bounds.SECRET_BOX_MAX_BYTES
    assert sealing.open_box(box, key=KEY, purpose=FOR) == longest


def test_every_changed_byte_is_noticed():
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
        ("another board's", {"device": "winch-99887766"}),
        ("another instance's", {"instance": "sibling"}),
        ("another secret's", {"name": "db-user"}),
        ("an older version's", {"version": 1}),
        ("a newer version's", {"version": 3}),
    ],
)
def test_a_box_that_was_sealed_for_something_else_does_not_open(what, other):
    # Sealed to this very board's key, as a server can do: what it is for does not match what the assignment says.
    box = sealing.seal(VALUE, recipient=OURS, purpose=msgspec.structs.replace(FOR, **other))
    assert code_of(box) is RejectCode.SECRET_UNOPENED, what


def test_fields_cannot_be_shifted_into_one_another():
    one = msgspec.structs.replace(FOR, instance="hello-db", name="password")
    other = msgspec.structs.replace(FOR, instance="hello", name="db-password")
    assert code_of(sealing.seal(VALUE, recipient=OURS, purpose=one), purpose=other) is RejectCode.SECRET_UNOPENED


def test_another_boards_box_does_not_open_here():
    box = sealing.seal(VALUE, recipient=sealing.public_key(X25519PrivateKey.generate()), purpose=FOR)
    assert code_of(box) is RejectCode.SECRET_UNOPENED


def test_a_box_of_a_later_format_and_an_endless_one_are_told_apart():
    box = sealing.seal(VALUE, recipient=OURS, purpose=FOR)
    assert code_of(b"\2" + box[1:]) is RejectCode.UNSUPPORTED_VERSION
    assert code_of(box + bytes(bounds.SECRET_BOX_MAX_BYTES)) is RejectCode.TOO_LARGE
    assert code_of(b"") is RejectCode.UNSUPPORTED_VERSION


def test_two_boxes_of_one_value_have_nothing_in_common():
    one, two = (sealing.seal(VALUE, recipient=OURS, purpose=FOR) for _ in range(2))
    assert one[1:33] != two[1:33]
    assert one[33:] != two[33:]


@pytest.mark.parametrize("length", [4, 100, 254])
def test_a_box_does_not_tell_how_long_a_password_is(length):
    assert len(sealing.seal("x" * length, recipient=OURS, purpose=FOR)) == 1 + 32 + 16 + 256


@pytest.mark.parametrize("value", ["", "abc", "with\0nul", "x" * 4097, "\ud800lone"])
def test_a_value_that_no_guest_can_be_given_is_refused(value):
    with pytest.raises(SigningError, match="secret"):
        sealing.seal(value, recipient=OURS, purpose=FOR)


# The identity and two points of small order: with these anybody could compute the key.
@pytest.mark.parametrize("point", [bytes(32), bytes([1, *bytes(31)]), b"short", bytes(33)])
def test_a_sealing_key_that_is_none_is_refused(point):
    with pytest.raises(SigningError, match="sealing key is no X25519 key"):
        sealing.seal(VALUE, recipient=base64.b64encode(point).decode(), purpose=FOR)
    forged = bytes([1]) + point[:32].ljust(32, b"\0") + bytes(272)
    assert code_of(forged) is RejectCode.SECRET_UNOPENED


# -- whose key it is


def refusal(proof: bytes, shown: Device, device: str) -> RejectCode:
    with pytest.raises(Rejected) as verdict:
        sealing.proved(proof, certificate=shown.certificate, fleet="harbour", device=device)
    return verdict.value.code


def test_a_board_proves_that_a_sealing_key_is_its_own():
    board = Device()
    proof = board.prove()
    key, fingerprint = sealing.proved(proof, certificate=board.certificate, fleet="harbour", device=board.id)
    assert key == OURS
    assert fingerprint.startswith(names.fingerprint_of(board.id))


def test_a_server_cannot_show_a_sealing_key_of_its_own_instead():
    board, server = Device(), Device()
    # its own key, signed by its own device key, under the board's name
    assert refusal(server.prove(), server, board.id) is RejectCode.WRONG_DEVICE
    # its own key beside the board's certificate
    assert refusal(server.prove(), board, board.id) is RejectCode.UNSIGNED
    # the board's proof of another fleet
    assert refusal(board.prove(fleet="airport"), board, board.id) is RejectCode.WRONG_FLEET
    # a report of the board's, which it signed with the same key
    assert refusal(board.voice.sign(b'{"v":1}'), board, board.id) is RejectCode.UNSIGNED
    assert refusal(board.prove(sealing_key="AAAA"), board, board.id) is RejectCode.MALFORMED


def test_the_key_is_read_from_its_file_and_nothing_else():
    pem = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    assert sealing.public_key(sealing.load(pem)) == OURS
    for wrong in (b"", Device().key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())):
        with pytest.raises(SigningError, match="sealing key"):
            sealing.load(wrong)
