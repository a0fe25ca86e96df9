"""Key rotation: devices that were off meanwhile follow without enrolling again."""

from typing import Any

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, Root, Targets

from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants
from signing import events, repository, rotation
from signing.errors import ConflictError, Rejected, RepositoryError
from signing.rotation import Namespace, RoleKeys, Size
from tests.simulator.repository import Device, Repository, signer


def keys(*signers: CryptoSigner, threshold: int = 1) -> RoleKeys:
    return RoleKeys(tuple(each.public_key for each in signers), threshold)


def publish_root(repo: Repository, draft: bytes, *signers: CryptoSigner) -> None:
    for each in signers:
        draft = rotation.cosign(draft, each)
    repo.files[f"{rotation.check(repo.files, 'root', draft)}.root.json"] = draft


def publish_targets(repo: Repository, draft: bytes, *signers: CryptoSigner) -> None:
    for each in signers:
        draft = rotation.cosign(draft, each)
    repo.files[f"{rotation.check(repo.files, 'targets', draft)}.targets.json"] = draft


def renew(repo: Repository, space: str, *signers: CryptoSigner) -> None:
    number, role = repository.latest(repo.files, space)
    first, *others = signers
    role = repository.renew(role, signer=first, now=repo.now)
    for each in others:
        role = rotation.cosign(role, each)
    assert rotation.check(repo.files, space, role) == number + 1
    repo.files[f"{number + 1}.{space}.json"] = role


def test_from_dev_to_solo_to_team_without_enrolling_a_device_again() -> None:
    repo = Repository(dev=True)
    item = repo.publish()
    awake, asleep = Device(repo), Device(repo)
    awake.run(repo.assign(item))
    asleep.refresh()

    # To solo: new offline keys, as the old ones were not encrypted; top-level targets and namespace are signed again.
    solo_root, solo_targets, publisher = signer(), signer(), signer()
    draft = rotation.propose_root(
        repo.files, size=Size.SOLO, roles={"root": keys(solo_root), "targets": keys(solo_targets)}, now=repo.now
    )
    publish_root(repo, draft, repo.keys["root"], solo_root)
    draft = rotation.propose_targets(repo.files, namespaces={"main": Namespace(keys(publisher))}, now=repo.now)
    publish_targets(repo, draft, solo_targets)
    renew(repo, "main", publisher)
    repo.online()
    assert awake.run(repo.assign(item))
    assert Device(repo, production=True).run(repo.assign(item)), "a device in production accepts it now"

    # To team: root signed by two of three people, the namespace by two of two.
    people, second = (signer(), signer(), signer()), signer()
    draft = rotation.propose_root(repo.files, size=Size.TEAM, roles={"root": keys(*people, threshold=2)}, now=repo.now)
    publish_root(repo, draft, solo_root, *people[:2])
    both = Namespace(keys(publisher, second, threshold=2), Grants())
    draft = rotation.propose_targets(repo.files, namespaces={"main": both}, now=repo.now)
    publish_targets(repo, draft, solo_targets)
    renew(repo, "main", publisher, second)
    repo.online()

    assert awake.run(repo.assign(item))
    assert asleep.run(repo.assign(item)), "a device that slept through all of it"


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_each_top_level_role_can_get_a_new_key(role: str) -> None:
    repo = Repository()
    item = repo.publish()
    device = Device(repo)
    device.run(repo.assign(item))
    new = signer()
    draft = rotation.propose_root(repo.files, roles={role: keys(new)}, now=repo.now)
    publish_root(repo, draft, repo.keys["root"], *([new] if role == "root" else []))
    repo.keys[role] = new
    if role == "targets":
        publish_targets(repo, rotation.propose_targets(repo.files, now=repo.now), new)
    repo.online()

    assert device.run(repo.assign(item))


def test_after_the_directors_rotation_the_old_key_is_refused() -> None:
    repo = Repository()
    item = repo.publish()
    device = Device(repo)
    stolen, new = repo.assign(item), signer()
    publish_targets(repo, rotation.propose_targets(repo.files, director=keys(new), now=repo.now), repo.keys["targets"])
    repo.online()
    with pytest.raises(Rejected) as verdict:
        device.accept(stolen)
    assert verdict.value.code is RejectCode.UNSIGNED
    repo.keys["director"] = new
    assert device.accept(repo.assign(item))


def test_a_namespace_is_added_and_removed() -> None:
    repo = Repository()
    device = Device(repo)
    repo.keys["extra"] = signer()
    draft = rotation.propose_targets(
        repo.files, namespaces={"extra": Namespace(keys(repo.keys["extra"]))}, now=repo.now
    )
    publish_targets(repo, draft, repo.keys["targets"])
    repo.online()
    device.refresh()
    first = repository.new_role(signer=repo.keys["extra"], now=repo.now)
    assert repository.check_role(repo.files, "extra", first) == 1
    repo.files["1.extra.json"] = first
    item = repo.publish(space="extra")
    assert repository.namespaces(repo.files) == ("main", "extra")
    assert device.run(repo.assign(item))

    publish_targets(repo, rotation.propose_targets(repo.files, remove=("extra",), now=repo.now), repo.keys["targets"])
    repo.online()
    with pytest.raises(Rejected) as verdict:
        device.run(repo.assign(item))
    assert verdict.value.code is RejectCode.UNKNOWN_TARGET


def test_a_namespace_without_a_first_role_does_not_block_other_changes() -> None:
    repo = Repository()
    repo.publish()
    publisher = signer()

    def roles(**change: Any) -> list[str]:
        event = events.propose(repo.files, now=repo.now, **change)
        return [each.role for each in event.documents]

    extra = {"extra": Namespace(keys(publisher), Grants())}
    assert roles(namespaces=extra) == ["targets"], "there is nothing yet that its publisher could sign anew"
    event = events.propose(repo.files, namespaces=extra, now=repo.now)
    repo.files.update(events.apply(repo.files, events.sign(repo.files, event, repo.keys["targets"])))
    assert "extra" not in repository.newest(repo.files)
    assert roles(renew=("targets",)) == ["targets"]
    assert roles(renew=("targets", "main", "extra")) == ["targets", "main"]
    # From its first role on, it is renewed like any other.
    repo.files["1.extra.json"] = repository.new_role(signer=publisher, now=repo.now)
    assert roles(renew=("targets", "extra")) == ["targets", "extra"]


def test_a_draft_lists_the_missing_signatures() -> None:
    repo = Repository()
    people = (signer(), signer(), signer())
    draft = rotation.propose_root(repo.files, size=Size.TEAM, roles={"root": keys(*people, threshold=2)}, now=repo.now)
    assert rotation.missing(repo.files, draft) == {"root": 1, "new root": 2}
    draft = rotation.cosign(rotation.cosign(draft, people[0]), people[0])
    assert rotation.missing(repo.files, draft) == {"root": 1, "new root": 1}
    draft = rotation.cosign(draft, repo.keys["root"])
    with pytest.raises(Rejected) as verdict:
        rotation.check_root(repo.files, draft)
    assert verdict.value.code is RejectCode.UNSIGNED
    draft = rotation.cosign(draft, people[2])
    assert rotation.missing(repo.files, draft) == {}
    assert rotation.check_root(repo.files, draft) == 2


def test_a_removed_person_does_not_count_towards_the_next_root() -> None:
    repo = Repository()
    people = [signer() for _ in range(4)]
    draft = rotation.propose_root(
        repo.files, size=Size.TEAM, roles={"root": keys(*people[:3], threshold=2)}, now=repo.now
    )
    publish_root(repo, draft, repo.keys["root"], *people[:2])
    draft = rotation.propose_root(repo.files, roles={"root": keys(*people[1:], threshold=2)}, now=repo.now)
    publish_root(repo, draft, people[1], people[2])
    draft = rotation.propose_root(repo.files, now=repo.now)
    with pytest.raises(Rejected):
        publish_root(repo, draft, people[0], people[1])
    publish_root(repo, draft, people[3], people[1])
    Device(repo).refresh()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"size": Size.SOLO}, "were not encrypted"),
        (
            {"size": Size.TEAM, "roles": {"targets": keys(signer()), "root": keys(signer())}},
            "at least 2 of at least 3 keys",
        ),
        ({"roles": {"director": keys(signer())}}, "does not delegate"),
    ],
)
def test_a_root_with_too_few_keys_for_its_size_is_refused(options: dict[str, Any], sentence: str) -> None:
    repo = Repository(dev=True)
    with pytest.raises(RepositoryError, match=sentence):
        rotation.propose_root(repo.files, now=repo.now, **options)


def test_a_key_listed_twice_is_refused() -> None:
    twin = signer()
    with pytest.raises(RepositoryError, match="twice"):
        keys(twin, twin, threshold=2)
    with pytest.raises(RepositoryError, match="cannot come from"):
        keys(twin, threshold=2)


def test_the_second_of_two_concurrent_changes_must_be_proposed_again() -> None:
    repo = Repository()
    first = rotation.propose_root(repo.files, now=repo.now)
    second = rotation.propose_root(repo.files, roles={"timestamp": keys(signer())}, now=repo.now)
    publish_root(repo, first, repo.keys["root"])
    with pytest.raises(ConflictError):
        publish_root(repo, second, repo.keys["root"])


def _rename(root: Root) -> None:
    root.unrecognized_fields["wasmfleet"]["fleet"] = "airport"


def _reach(top: Targets) -> None:
    assert top.delegations is not None
    assert top.delegations.roles is not None
    top.delegations.roles["main"].paths = ["components/*/*/*"]


def _without_director(top: Targets) -> None:
    assert top.delegations is not None
    assert top.delegations.roles is not None
    del top.delegations.roles["director"]


@pytest.mark.parametrize(
    ("role", "change", "sentence"),
    [
        ("root", _rename, "another fleet"),
        ("root", lambda root: setattr(root, "consistent_snapshot", False), "consistent"),
        ("targets", _reach, "not limited to the paths of its own namespace"),
        ("targets", _without_director, "the director's"),
    ],
)
def test_a_fully_signed_change_that_breaks_the_layout_is_refused(role: str, change: Any, sentence: str) -> None:
    repo = Repository()
    signed = repo.signed(role)
    signed.version += 1
    change(signed)
    draft = rotation.cosign(Metadata(signed).to_bytes(), repo.keys[role])
    check = rotation.check_root if role == "root" else rotation.check_targets
    with pytest.raises(RepositoryError, match=sentence):
        check(repo.files, draft)


def test_a_file_that_is_not_metadata_is_not_signed() -> None:
    with pytest.raises(RepositoryError, match="neither"):
        rotation.cosign(b"{}", signer())
