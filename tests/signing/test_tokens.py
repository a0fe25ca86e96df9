"""Keys in an ssh-agent and on a PKCS#11 token (SoftHSM), whose signatures devices verify."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from securesystemslib.signer import Signer

from signing import events, keyring, keys, repository, rotation
from signing.errors import KeyFileError, RepositoryError
from signing.events import Document, Event
from signing.keyring import Keyring
from signing.rotation import Namespace, RoleKeys
from tests.simulator.repository import FLEET, Device, Repository

SOFTHSM = Path("/usr/lib/softhsm/libsofthsm2.so")
PIN = "123456"


def publishes(signer: Signer) -> None:
    """Make the key the publisher of main, and check that a device accepts what it signs."""
    repo = Repository()
    space = Namespace(RoleKeys((signer.public_key,)))
    draft = rotation.propose_targets(repo.files, namespaces={"main": space}, now=repo.now)
    role = repository.renew(repository.latest(repo.files, "main")[1], signer=signer, now=repo.now)
    event = Event(FLEET, (Document("targets", draft), Document("main", role)))
    repo.files |= events.apply(repo.files, events.sign(repo.files, event, repo.keys["targets"]))
    repo.keys["main"] = signer  # type: ignore[assignment]
    item = repo.publish()
    assert Device(repo).run(repo.assign(item))


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    program = shutil.which("ssh-agent")
    if program is None or shutil.which("ssh-add") is None:
        pytest.skip("ssh-agent is not installed")
    path = tmp_path / "agent.sock"
    with subprocess.Popen([program, "-D", "-a", str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the agent prints its socket once it listens
        monkeypatch.setenv("SSH_AUTH_SOCK", str(path))
        yield path
        process.terminate()


def in_agent(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    file = tmp_path / "id"
    file.touch(mode=0o600)
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    subprocess.run(["ssh-add", "-q", str(file)], check=True, env=os.environ, capture_output=True)
    file.unlink()


def test_a_key_in_an_ssh_agent_publishes(tmp_path: Path, agent: Path) -> None:
    in_agent(tmp_path)
    (comment, key), *_ = keys.identities().items()
    ring = Keyring(tmp_path)
    entry = ring.add("alice", key, where="ssh-agent:")
    assert comment
    publishes(ring.open(entry, lambda _what: None))


def test_an_ssh_agent_without_the_key_is_reported(tmp_path: Path, agent: Path) -> None:
    in_agent(tmp_path)
    key = next(iter(keys.identities().values()))
    subprocess.run(["ssh-add", "-q", "-D"], check=True, capture_output=True)
    with pytest.raises(KeyFileError, match="ssh-add -l"):
        keys.SSHAgentSigner(key).sign(b"data")
    with pytest.raises(RepositoryError, match="ssh-add -l"):
        publishes(keys.SSHAgentSigner(key))


def test_a_missing_ssh_agent_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    with pytest.raises(KeyFileError, match="SSH_AUTH_SOCK is not set"):
        keys.identities()
    monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "gone"))
    with pytest.raises(KeyFileError, match="does not answer"):
        keys.identities()


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    pkcs11 = pytest.importorskip("pkcs11")
    if not SOFTHSM.exists() or shutil.which("softhsm2-util") is None:
        pytest.skip("softhsm2 is not installed")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "softhsm2.conf").write_text(f"directories.tokendir = {tmp_path / 'tokens'}\n")
    monkeypatch.setenv("SOFTHSM2_CONF", str(tmp_path / "softhsm2.conf"))
    monkeypatch.setenv("PYKCS11LIB", str(SOFTHSM))
    label = re.sub(r"\W", "", tmp_path.name)[-20:]
    subprocess.run(
        ["softhsm2-util", "--init-token", "--free", "--label", label, "--pin", PIN, "--so-pin", PIN],
        check=True,
        capture_output=True,
    )
    library = pkcs11.lib(str(SOFTHSM))
    library.reinitialize()
    from pkcs11.util.ec import encode_named_curve_parameters

    with library.get_token(token_label=label).open(user_pin=PIN, rw=True) as session:
        parameters = session.create_domain_parameters(
            pkcs11.KeyType.EC, {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}, local=True
        )
        parameters.generate_keypair(store=True, label="release", id=b"\x02")
    return label


def test_a_key_on_a_pkcs11_token_publishes(tmp_path: Path, token: str) -> None:
    uri, key = keyring.import_token(label=token, number=2, ask=lambda _what: PIN.encode())
    ring = Keyring(tmp_path)
    entry = ring.add("vault", key, where=uri)
    assert PIN not in (tmp_path / "vault.json").read_text()
    publishes(ring.open(entry, lambda _what: PIN.encode()))


def test_a_wrong_pin_or_a_missing_key_is_reported_with_one_sentence(tmp_path: Path, token: str) -> None:
    uri, key = keyring.import_token(label=token, number=2, ask=lambda _what: PIN.encode())
    entry = Keyring(tmp_path).add("vault", key, where=uri)
    with pytest.raises(KeyFileError, match="the token with vault does not sign"):
        Keyring(tmp_path).open(entry, lambda _what: b"000000").sign(b"data")
    with pytest.raises(KeyFileError, match="no key 9 on a PKCS#11 token"):
        keyring.import_token(label=token, number=9, ask=lambda _what: PIN.encode())
