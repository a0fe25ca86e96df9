"""Hash bins: a large namespace is split, devices follow and fetch little, and no release is lost."""

from datetime import timedelta

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Targets

from fleet.protocol.assignment import Item
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants, Http, Manifest
from fleet.protocol.names import TargetName
from signing import events, hash_bins, repository, rotation
from signing.errors import ConflictError, Rejected, RepositoryError
from signing.events import Document, Event
from signing.rotation import Namespace, RoleKeys
from tests.simulator.repository import FLEET, Device, Repository, signer

BITS = 4


def split(repo: Repository) -> Event:
    event = events.propose_bins(repo.files, "main", now=repo.now, bits=BITS)
    return events.sign(repo.files, event, repo.keys["main"])


def publish(repo: Repository, event: Event) -> None:
    repo.files |= events.apply(repo.files, event)
    repo.online()


def add(repo: Repository, version: str, **manifest: object) -> tuple[Event, Item]:
    """Add a release to its bin, as `fleet publish` does."""
    name = TargetName("main", "hello", version)
    role = hash_bins.holder(repo.files, "main", name.path)
    made = Manifest(name="hello", version=version, trigger=Http(), **manifest)  # type: ignore[arg-type]
    data = repository.add_target(
        repository.latest(repo.files, role)[1],
        name=name,
        length=5,
        sha256="ab" * 32,
        manifest=made,
        signer=repo.keys["main"],
        now=repo.now,
    )
    item = Item(instance="hello", target=name.path, length=5, sha256="ab" * 32, manifest_sha256=made.digest())
    return Event(FLEET, (Document(role, data),)), item


@pytest.fixture
def repo() -> Repository:
    made = Repository(ceilings={"main": Grants(interfaces=("wasi:clocks",))})
    for minor in range(20):
        made.publish(f"1.{minor}.0")
    return made


def test_devices_follow_a_namespace_into_its_bins_and_fetch_a_single_bin(repo: Repository) -> None:
    device = Device(repo)
    item = repo.publish("1.99.0")
    device.run(repo.assign(item))
    before = [str(each.name) for each in hash_bins.releases(repo.files, "main")]
    publish(repo, split(repo))
    assert sorted(map(str, (each.name for each in hash_bins.releases(repo.files, "main")))) == sorted(before)

    repo.fetched.clear()
    assert device.run(repo.assign(item))
    assert sum(".bins-" in name for name in repo.fetched) == 1
    # A further release changes only a single small role.
    event, item = add(repo, "2.0.0")
    head = repository.latest(repo.files, "main")
    publish(repo, event)
    assert device.run(repo.assign(item))
    assert repository.latest(repo.files, "main") == head
    assert Device(repo).run(repo.assign(item)), "and a device that comes fresh"


def test_a_release_in_a_bin_is_revoked_for_good(repo: Repository) -> None:
    item = repo.publish("3.0.0")
    publish(repo, split(repo))
    device = Device(repo)
    device.run(repo.assign(item))
    head = repository.latest(repo.files, "main")[1]
    taken = Metadata[Targets].from_bytes(head)
    taken.signed.unrecognized_fields["revoked"] = [item.target]
    taken.signed.version += 1
    taken.sign(repo.keys["main"])
    publish(repo, Event(FLEET, (Document("main", taken.to_bytes()),)))
    with pytest.raises(Rejected) as verdict:
        device.run(repo.assign(item))
    assert verdict.value.code is RejectCode.REVOKED
    assert item.target not in {each.name.path for each in hash_bins.releases(repo.files, "main")}
    again = repository.renew(head, signer=repo.keys["main"], now=repo.now + timedelta(days=1))
    again = rotation.cosign(_bumped(again), repo.keys["main"])
    with pytest.raises(RepositoryError, match="withdraws the revocation"):
        events.apply(repo.files, Event(FLEET, (Document("main", again),)))


def _bumped(data: bytes) -> bytes:
    file = Metadata[Targets].from_bytes(data)
    file.signed.version += 1
    file.signatures = {}
    return file.to_bytes()


def resigned(data: bytes, who: CryptoSigner, change: object = None) -> bytes:
    file = Metadata[Targets].from_bytes(data)
    if callable(change):
        change(file.signed)
    file.sign(who)
    return file.to_bytes()


def _lose_one(role: Targets) -> None:
    if role.targets:
        role.targets.pop(min(role.targets))


def _reach_beyond(role: Targets) -> None:
    role.targets["components/other/hello/1.0.0.wasm"] = next(iter(role.targets.values()), None)


def _others_keys(role: Targets) -> None:
    assert role.delegations is not None
    assert role.delegations.succinct_roles is not None
    key = signer().public_key
    role.delegations.keys[key.keyid] = key
    role.delegations.succinct_roles.keyids.append(key.keyid)


@pytest.mark.parametrize(
    ("where", "change", "sentence"),
    [
        ("bin", _lose_one, "changed or missing"),
        ("bin", _reach_beyond, "does not belong"),
        ("head", _others_keys, "its own keys"),
    ],
)
def test_a_forged_split_is_refused(where: str, change: object, sentence: str, repo: Repository) -> None:
    event = split(repo)
    full = next(n for n, each in enumerate(event.documents) if n and Metadata.from_bytes(each.data).signed.targets)
    number = 0 if where == "head" else full
    changed = list(event.documents)
    changed[number] = Document(changed[number].role, resigned(changed[number].data, repo.keys["main"], change))
    with pytest.raises(RepositoryError, match=sentence):
        events.apply(repo.files, Event(FLEET, tuple(changed)))


def test_an_incomplete_split_is_refused(repo: Repository) -> None:
    event = split(repo)
    with pytest.raises(RepositoryError, match="is missing"):
        events.apply(repo.files, Event(FLEET, event.documents[:-1]))
    publish(repo, event)
    with pytest.raises(RepositoryError, match="already in bins"):
        split(repo)


def test_two_publishers_conflict_only_within_the_same_bin(repo: Repository) -> None:
    publish(repo, split(repo))
    first, _ = add(repo, "4.0.0")
    same = next(
        other
        for minor in range(1, 200)
        if (other := add(repo, f"4.{minor}.0")[0]).documents[0].role == first.documents[0].role
    )
    other = next(
        each
        for minor in range(1, 200)
        if (each := add(repo, f"5.{minor}.0")[0]).documents[0].role != first.documents[0].role
    )
    publish(repo, first)
    publish(repo, other)
    with pytest.raises(ConflictError):
        events.apply(repo.files, same)


def test_ceiling_and_version_are_checked_in_bins_too(repo: Repository) -> None:
    publish(repo, split(repo))
    beyond, _ = add(repo, "6.0.0", grants=Grants(interfaces=("wasi:http",)))
    with pytest.raises(Rejected) as verdict:
        events.apply(repo.files, beyond)
    assert verdict.value.code is RejectCode.GRANT_DENIED
    stranger, _ = add(repo, "6.0.1")
    forged = resigned(_unsigned(stranger.documents[0].data), signer())
    with pytest.raises(Rejected) as verdict:
        events.apply(repo.files, Event(FLEET, (Document(stranger.documents[0].role, forged),)))
    assert verdict.value.code is RejectCode.UNSIGNED


def _unsigned(data: bytes) -> bytes:
    file = Metadata[Targets].from_bytes(data)
    file.signatures = {}
    return file.to_bytes()


def test_new_keys_of_a_namespace_apply_to_its_bins(repo: Repository) -> None:
    item = repo.publish("7.0.0")
    publish(repo, split(repo))
    device = Device(repo)
    device.run(repo.assign(item))
    old, new = repo.keys["main"], signer()
    space = Namespace(RoleKeys((new.public_key,)), Grants(interfaces=("wasi:clocks",)))
    event = events.propose(repo.files, namespaces={"main": space}, now=repo.now)
    assert len(event.documents) == 2 + 2**BITS
    event = events.sign(repo.files, events.sign(repo.files, event, repo.keys["targets"]), new)
    publish(repo, event)
    assert device.run(repo.assign(item))
    # The old key is refused in a bin, too.
    repo.keys["main"] = old
    late, _ = add(repo, "7.0.1")
    with pytest.raises(Rejected) as verdict:
        events.apply(repo.files, late)
    assert verdict.value.code is RejectCode.UNSIGNED


def test_bins_are_renewed_with_their_namespace(repo: Repository) -> None:
    publish(repo, split(repo))
    repo.now += timedelta(days=300)
    event = events.propose(repo.files, renew=("main",), now=repo.now)
    publish(repo, events.sign(repo.files, event, repo.keys["main"]))
    index = repository.newest(repo.files)
    assert {version for role, version in index.items() if hash_bins.is_bin(role)} == {2}
