"""Enrolled device on disk, for tests of the whole agent."""

from datetime import UTC, datetime

import msgspec
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from agent.config import Paths, Settings
from agent.identity.identity import Identity
from agent.service import Enrolled
from agent.update.store import Store
from fleet.ca import CertificateAuthority
from fleet.protocol.messages import Report
from signing import repository
from signing.keys import generate

DEVICE = "crane-0a1b2c3d"
NOW = datetime.now(UTC).replace(microsecond=0)


def enrolled(directory, *, broker=1):
    """Make an enrolled device on disk with an unacknowledged report; return it with its open store.

    No server listens at its server's address; `broker` is the loopback port of its broker.
    """
    places = Paths(directory / "state", directory / "run")
    (places.identity).mkdir(parents=True)
    places.runtime.mkdir()
    names = ("root", "targets", "snapshot", "timestamp", "director", "main")
    keys = {name: generate(directory / f"{name}.pem") for name in names}
    main = keys.pop("main")
    files = repository.create(fleet="f", namespaces={"main": main}, now=NOW, dev=True, ceilings=None, **keys)
    ca = CertificateAuthority.create(directory, fleet="f", now=NOW)
    key, plain = ec.generate_private_key(ec.SECP256R1()), (Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    who = Identity(
        device=DEVICE,
        fleet="f",
        group="",
        devices_url="https://127.0.0.1:1",
        mqtt=(f"mqtt://127.0.0.1:{broker}",),
        production=False,
        floor=NOW,
    )
    for name, content in {
        "enrolled.json": msgspec.json.encode(who),
        "root.json": files["1.root.json"],
        "ca.pem": ca.pem.encode(),
        "device.key": key.private_bytes(*plain),
        "device.pem": ca.device(key.public_key(), DEVICE, now=NOW).pem.encode(),
        "sealing.key": X25519PrivateKey.generate().private_bytes(*plain),
        "mac.key": b"k" * 32,
    }.items():
        (places.identity / name).write_bytes(content)
        (places.identity / name).chmod(0o600)
    store = Store(places.database)
    store.save(report=Report(device=DEVICE, boot_id="b", sequence=0, at=NOW, assignment=0))
    device = Enrolled(identity=who, root=files["1.root.json"], mac_key=b"k" * 32, places=places, settings=Settings())
    return device, store
