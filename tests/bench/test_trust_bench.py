"""Cost of verification: a device's refresh, flat and with hash bins; a signed report at the server.

Run with `make bench`. Times are CPU times, printed as ratios; no assertion depends on a clock.
"""

import hashlib
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from securesystemslib.signer import SSlibKey

from fleet.protocol import bounds, wire
from fleet.protocol.assignment import Item
from fleet.protocol.codes import Phase
from fleet.protocol.messages import Report
from signing import events, hash_bins, repository
from signing.device_statements import DeviceSigner, DeviceVerifier
from signing.errors import Rejected
from tests.simulator.repository import Device, Repository

SIZES = (10, 100, 1_000, 5_000, 10_000, 100_000)
BUDGET_US = 100
CALLS = 2_000


@pytest.fixture
def verified(monkeypatch) -> list[str]:
    """Record the key id of each verified signature."""
    seen: list[str] = []
    verify = SSlibKey.verify_signature

    def counted(key: SSlibKey, signature: object, data: bytes) -> None:
        seen.append(key.keyid)
        verify(key, signature, data)  # type: ignore[arg-type]

    monkeypatch.setattr(SSlibKey, "verify_signature", counted)
    return seen


def fill(repo: Repository, role: str, paths: list[str], like: str) -> None:
    """Add many targets with the same manifest to a role."""

    def add(signed: object) -> None:
        known = signed.targets[like]  # type: ignore[attr-defined]
        signed.targets.update(dict.fromkeys(paths, known))  # type: ignore[attr-defined]

    repo.rewrite(role, add, key="main")
    repo.online()


def flat(targets: int) -> tuple[Repository, Item]:
    repo = Repository()
    item = repo.publish("1.0.0", name="hello")
    fill(repo, "main", [f"components/main/filler-{n}/1.0.0.wasm" for n in range(targets - 1)], item.target)
    return repo, item


def binned(targets: int) -> tuple[Repository, Item]:
    """Make a namespace of 256 bins; only the bin that the device fetches is filled with the targets that hash to it."""
    repo = Repository()
    item = repo.publish("1.0.0", name="hello")
    event = events.sign(repo.files, events.propose_bins(repo.files, "main", now=repo.now), repo.keys["main"])
    repo.files |= events.apply(repo.files, event)
    found = hash_bins.delegation(repo.signed("main"))
    assert found is not None
    role = found.get_role_for_target(item.target)
    paths = (f"components/main/filler-{n}/1.0.0.wasm" for n in range(targets - 1))
    first = hashlib.sha256(item.target.encode()).digest()[0]
    fill(repo, role, [p for p in paths if hashlib.sha256(p.encode()).digest()[0] == first], item.target)
    return repo, item


@pytest.mark.bench
def test_refresh_and_assignment_by_number_of_targets(verified: list[str]) -> None:
    print(
        "\n| targets | layout | fetched | signatures verified | CPU, first | nothing new: fetched | signatures | CPU |"
    )
    print("|---|---|---|---|---|---|---|---|")
    unit = 0.0
    refused: list[int] = []
    for targets in SIZES:
        for layout, make in (("one file", flat), ("256 bins", binned)):
            repo, item = make(targets)
            device, envelope = Device(repo), repo.assign(item)
            cells = []
            for _ in range(2):
                repo.fetched.clear()
                verified.clear()
                started = time.process_time()
                try:
                    device.run(envelope)
                except Rejected as error:
                    size = len(repository.latest(repo.files, "main")[1])
                    cells = [f"refused ({error.code}): {size >> 20} MiB in one file"]
                    refused.append(size)
                    break
                spent = time.process_time() - started
                unit = unit or spent
                size = sum(len(repo.files[name]) for name in repo.fetched if name in repo.files)
                cells += [f"{size / 1024:.1f} KiB", str(len(verified)), f"{spent / unit:.1f} x"]
            print(f"| {targets:,} | {layout} | {' | '.join(cells)} |")
    assert min(refused) > bounds.TARGETS_MAX_BYTES
    print(f"(1 x = {1000 * unit:.1f} ms of CPU here)")


def spent_us(call: Callable[[], object]) -> float:
    """Measure the CPU time of a call in microseconds."""
    started = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - started) / CALLS * 1e6


@pytest.mark.bench
def test_a_signed_report_at_the_servers_ingest() -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "crane-0a1b2c3d")])
    now = datetime.now(UTC)
    unsigned = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now + timedelta(days=1))
    certificate = unsigned.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
    report = Report(
        device="crane-0a1b2c3d",
        boot_id="boot",
        sequence=1,
        at=now,
        assignment=1,
        instance="hello",
        target="components/main/hello/1.0.0.wasm",
        phase=Phase.COMMITTED,
    )
    said = wire.encode(report)
    data = DeviceSigner(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())).sign(said)
    ear = DeviceVerifier(certificate)
    assert wire.decode(Report, ear.verify(data)) == report

    verify, decode = spent_us(lambda: ear.verify(data)), spent_us(lambda: wire.decode(Report, said))
    bare = ec.ECDSA(hashes.SHA256())
    signature = key.sign(said, bare)
    floor = spent_us(lambda: key.public_key().verify(signature, said, bare))
    print(
        f"\none report: verified {verify:.0f} us, decoded {decode:.0f} us of CPU: "
        f"{(verify + decode) / BUDGET_US:.2f} x the budget of {BUDGET_US} us; "
        f"{verify / floor:.2f} x the bare P-256 verification ({floor:.0f} us)"
    )
