"""Publishing: immutable releases, namespaces and ceilings, concurrent publishers."""

import hashlib
from datetime import timedelta
from typing import Any

import pytest
from tuf.api.metadata import Metadata, Targets

from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants, Http, Manifest
from fleet.protocol.names import TargetName
from signing import policy, repository
from signing.errors import ConflictError, Rejected, RepositoryError
from tests.simulator.repository import FLEET, START, TOP_LEVEL, Device, Repository, signer


def add(repo: Repository, version: str, *, bits: bytes = b"wasm", key: str = "main", **fields: Any) -> bytes:
    """Return the next version of `main` with hello@version, not yet published."""
    manifest = Manifest(name="hello", version=version, trigger=Http(), **fields)
    return repository.add_target(
        repository.latest(repo.files, "main")[1],
        name=TargetName("main", "hello", version),
        length=len(bits),
        sha256=hashlib.sha256(bits).hexdigest(),
        manifest=manifest,
        signer=repo.keys[key],
        now=repo.now,
    )


def test_publishing_the_same_again_changes_nothing() -> None:
    repo = Repository()
    repo.files["2.main.json"] = role = add(repo, "1.0.0")
    assert add(repo, "1.0.0") is role
    assert repository.check_role(repo.files, "main", role) == 2


@pytest.mark.parametrize(
    ("change", "what"), [({"bits": b"other"}, "other bytes"), ({"description": "other"}, "another manifest")]
)
def test_a_version_never_changes(change: dict[str, Any], what: str) -> None:
    repo = Repository()
    repo.files["2.main.json"] = add(repo, "1.0.0")
    with pytest.raises(RepositoryError, match=what):
        add(repo, "1.0.0", **change)


def test_of_two_publishers_at_once_the_second_signs_again() -> None:
    repo = Repository()
    first, second = add(repo, "1.0.0"), add(repo, "2.0.0")
    assert repository.check_role(repo.files, "main", first) == 2
    repo.files["2.main.json"] = first

    with pytest.raises(ConflictError):
        repository.check_role(repo.files, "main", second)

    again = add(repo, "2.0.0")
    assert repository.check_role(repo.files, "main", again) == 3
    assert [str(each.name) for each in repository.releases(again)] == ["main/hello@1.0.0", "main/hello@2.0.0"]


def test_a_role_signed_by_an_undelegated_key_is_refused() -> None:
    repo = Repository()
    with pytest.raises(Rejected) as verdict:
        repository.check_role(repo.files, "main", add(repo, "1.0.0", key="director"))
    assert verdict.value.code is RejectCode.UNSIGNED


def test_more_than_the_ceiling_is_refused_at_publishing() -> None:
    repo = Repository(ceilings={"main": Grants(interfaces=("wasi:clocks",))})
    fits = add(repo, "1.0.0", grants=Grants(interfaces=("wasi:clocks/wall-clock",)))
    assert repository.check_role(repo.files, "main", fits) == 2
    beyond = add(repo, "1.0.0", grants=Grants(interfaces=("wasi:sockets",)))
    with pytest.raises(Rejected, match="wasi:sockets") as verdict:
        repository.check_role(repo.files, "main", beyond)
    assert verdict.value.code is RejectCode.GRANT_DENIED


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda role: role.targets.clear(), id="a release taken away"),
        pytest.param(lambda role: role.unrecognized_fields.clear(), id="a revocation taken back"),
        pytest.param(
            lambda role: role.targets.update({"components/main/hello/1.0.0.wasm": _other(role)}), id="bytes swapped"
        ),
    ],
)
def test_published_releases_and_revocations_cannot_be_withdrawn(change: Any) -> None:
    repo = Repository()
    repo.publish("1.0.0")
    repo.publish("1.1.0")
    repo.revoke("1.1.0")
    repo.rewrite("main", change)
    number, data = repository.latest(repo.files, "main")
    del repo.files[f"{number}.main.json"]
    with pytest.raises(RepositoryError):
        repository.check_role(repo.files, "main", data)


def _other(role: Targets) -> Any:
    return role.targets["components/main/hello/1.1.0.wasm"]


@pytest.mark.parametrize("name", ["director", "targets", "root", "nobody"])
def test_only_namespaces_can_be_uploaded(name: str) -> None:
    repo = Repository()
    with pytest.raises(RepositoryError, match="no namespace"):
        repository.check_role(repo.files, name, add(repo, "1.0.0"))


def test_a_target_outside_the_namespace_is_refused() -> None:
    repo = Repository(("main", "other"))
    repo.publish("1.0.0")
    repo.rewrite(
        "main",
        lambda role: role.targets.update({"components/other/hello/1.0.0.wasm": next(iter(role.targets.values()))}),
    )
    number, data = repository.latest(repo.files, "main")
    del repo.files[f"{number}.main.json"]
    with pytest.raises(RepositoryError, match="not in the namespace"):
        repository.check_role(repo.files, "main", data)


@pytest.mark.parametrize("name", ["root", "director", "Main", "a/b", ""])
def test_a_namespace_needs_a_name_of_its_own(name: str) -> None:
    keys = {role: signer() for role in (*TOP_LEVEL, "director")}
    with pytest.raises(RepositoryError):
        repository.create(fleet=FLEET, namespaces={name: signer()}, now=START, **keys)


def test_a_threshold_counts_keys_not_key_ids() -> None:
    repo = Repository()
    key = signer().public_key
    with pytest.raises(RepositoryError, match="different keys"):
        repository.delegate(repo.signed("targets"), "twice", [key, key], threshold=2)


def test_online_roles_change_only_as_needed() -> None:
    repo = Repository()
    online = {"snapshot_signer": repo.keys["snapshot"], "timestamp_signer": repo.keys["timestamp"]}
    assert list(repository.online(repo.files, now=repo.now, **online)) == ["timestamp.json"]

    repo.files["2.main.json"] = add(repo, "1.0.0")
    assert list(repository.online(repo.files, now=repo.now, **online)) == ["2.snapshot.json", "timestamp.json"]

    assert not repository.online_due(repo.files, repo.now)
    assert repository.online_due(repo.files, repo.now + timedelta(hours=25))
    late = repository.online(repo.files, now=repo.now + timedelta(days=8), **online)
    assert list(late) == ["2.snapshot.json", "timestamp.json"]


def test_a_publisher_signs_what_was_verified_from_root() -> None:
    repo = Repository()
    repo.publish("1.0.0")
    device = Device(repo)
    device.refresh()
    assert device.updater.role("main").data == repo.files["2.main.json"]
    assert str(device.lookup("components/main/hello/1.0.0.wasm").name) == "main/hello@1.0.0"


def test_a_renewal_changes_nothing_but_the_expiry() -> None:
    repo = Repository()
    repo.publish("1.0.0")
    _, old = repository.latest(repo.files, "main")
    new = repository.renew(old, signer=repo.keys["main"], now=repo.now + timedelta(days=100))
    before, after = (Metadata[Targets].from_bytes(data).signed for data in (old, new))
    assert (after.version, after.targets) == (before.version + 1, before.targets)
    assert after.expires - before.expires == timedelta(days=100)


def test_a_manifest_must_fit_and_have_the_targets_name() -> None:
    repo = Repository()
    with pytest.raises(RepositoryError, match="has more than 4096 bytes"):
        add(repo, "1.0.0", description="x" * 5000)
    with pytest.raises(RepositoryError, match="manifest of"):
        repository.add_target(
            repository.latest(repo.files, "main")[1],
            name=TargetName("main", "hello", "2.0.0"),
            length=1,
            sha256="ab" * 32,
            manifest=Manifest(name="hello", version="1.0.0", trigger=Http()),
            signer=repo.keys["main"],
            now=repo.now,
        )


def test_a_revoked_version_cannot_come_back() -> None:
    repo = Repository()
    repo.publish("1.0.0")
    repo.revoke("1.0.0")
    assert repository.releases(repository.latest(repo.files, "main")[1]) == ()
    with pytest.raises(RepositoryError, match="revoked"):
        add(repo, "1.0.0")


def test_a_release_is_described_for_people_with_its_new_grants() -> None:
    repo = Repository()
    repo.publish("1.0.0", grants=Grants(interfaces=("wasi:clocks",)))
    repo.publish("2.0.0", grants=Grants(interfaces=("wasi:clocks",), outbound=("https://api:443",)), security_epoch=1)
    before, after = repository.releases(repository.latest(repo.files, "main")[1])
    text = policy.describe(after, before=before)
    assert "new grants  https://api:443\n" in text
    assert "cannot go back" in text
    assert "newly" not in policy.describe(before, before=before)
