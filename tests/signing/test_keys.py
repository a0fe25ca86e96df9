"""Key files: private to their owner, never overwritten, expensive to guess."""

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from securesystemslib.signer import CryptoSigner

from signing import keys
from signing.errors import KeyFileError
from signing.keyring import Keyring
from tests.fleet.disk import Medium

SECRET = b"correct horse"


@pytest.mark.parametrize(
    ("passphrase", "form"), [(None, keys.Format.PKCS12), (SECRET, keys.Format.PKCS12), (SECRET, keys.Format.OPENSSH)]
)
def test_a_key_is_read_back_from_its_file(tmp_path: Path, passphrase: bytes | None, form: keys.Format) -> None:
    if form is keys.Format.OPENSSH:
        pytest.importorskip("bcrypt")
    path = tmp_path / "key"
    made = keys.generate(path, passphrase=passphrase, form=form)
    assert path.stat().st_mode & 0o777 == 0o600
    assert keys.load(path, passphrase=passphrase).public_key == made.public_key


@pytest.mark.parametrize(
    ("given", "sentence"), [(None, "is encrypted: give its passphrase"), (b"wrong horse", "the passphrase is wrong")]
)
def test_an_encrypted_key_asks_for_its_passphrase(tmp_path: Path, given: bytes | None, sentence: str) -> None:
    keys.generate(tmp_path / "key", passphrase=SECRET)
    with pytest.raises(KeyFileError, match=sentence):
        keys.load(tmp_path / "key", passphrase=given)


def test_an_encrypted_key_is_expensive_to_guess(tmp_path: Path) -> None:
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("openssl is not installed")
    keys.generate(tmp_path / "key", passphrase=SECRET)
    command = [openssl, "pkcs12", "-info", "-noout", "-in", str(tmp_path / "key"), "-passin", f"pass:{SECRET.decode()}"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "PBKDF2, Iteration 600000" in said or "PBKDF2, AES-256-CBC, Iteration 600000" in said, said


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    keys.generate(tmp_path / "key")
    before = (tmp_path / "key").read_bytes()
    with pytest.raises(KeyFileError, match="never overwritten"):
        keys.generate(tmp_path / "key")
    assert (tmp_path / "key").read_bytes() == before


def test_a_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    keys.generate(tmp_path / "key")
    (tmp_path / "key").chmod(0o640)
    with pytest.raises(KeyFileError, match="chmod 600"):
        keys.load(tmp_path / "key")


def test_a_short_passphrase_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="too short"):
        keys.generate(tmp_path / "key", passphrase=b"1234")
    assert not (tmp_path / "key").exists()


@pytest.mark.parametrize(
    "junk", [b"", b"hello", b"\x30\x82\x00", b"-----BEGIN PRIVATE KEY-----\nAAAA\n", b"x" * 100_000]
)
def test_a_file_that_is_not_a_key_is_refused_with_one_sentence(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    path.write_bytes(junk)
    for passphrase in (None, SECRET):
        with pytest.raises(KeyFileError, match="key"):
            keys.load(path, passphrase=passphrase)


def test_a_key_that_is_not_ed25519_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.touch(mode=0o600)
    other = generate_private_key(SECP256R1())
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(KeyFileError, match="Ed25519"):
        keys.load(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="No such file"):
        keys.load(tmp_path / "none")


def test_a_card_is_on_the_medium_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring, key = Keyring(tmp_path), CryptoSigner.generate_ed25519().public_key
    medium = Medium(monkeypatch, tree=tmp_path)
    for where in ("", "ssh-agent:"):
        ring.add("alice", key, where=where)
        assert (medium.torn, medium.at_risk, medium.unsynced) == ([], [], [])
    assert ring.get("alice").where == "ssh-agent:"
    with pytest.raises(KeyFileError, match="choose another name"):
        ring.add("alice", CryptoSigner.generate_ed25519().public_key)
