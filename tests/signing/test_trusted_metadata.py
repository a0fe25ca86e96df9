"""TrustedMetadata on its own: files of any kind and in any order, without a network or a cache."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tuf.api.metadata import MetaFile, Root, Snapshot, Targets

from fleet.protocol import bounds
from fleet.protocol.codes import RejectCode
from signing import metadata
from signing.errors import Rejected
from signing.state import VerifierState
from signing.trusted_metadata import Found, TrustedMetadata
from tests.signing.verdicts import code_of
from tests.simulator.repository import START, Repository, promise_role, promise_snapshot, signer
from tests.simulator.script import check_grown, record, request_next

HELLO = "components/main/hello/1.0.0.wasm"


def begin(repo: Repository, **options: Any) -> TrustedMetadata:
    defaults: dict[str, Any] = {"pinned_root": repo.pinned, "state": VerifierState(), "now": repo.now}
    return TrustedMetadata(**(defaults | options))


def test_an_update_requests_files_in_order_and_then_those_of_queries() -> None:
    repo = Repository()
    repo.publish()
    trusted = begin(repo)
    pairs, refusal = record(repo, trusted, [HELLO])
    assert refusal is None
    names = [pair.request.name for pair in pairs]
    assert names == ["2.root.json", "timestamp.json", "2.snapshot.json", "1.targets.json", "2.main.json"]
    assert [pair.request.may_be_missing for pair in pairs] == [True, False, False, False, False]
    found = trusted.find(HELLO)
    assert isinstance(found, Found)
    assert found.target is not None
    assert trusted.find("components/main/none/1.0.0.wasm") is None


def test_accepting_a_file_that_was_not_requested_raises_value_error() -> None:
    repo = Repository()
    trusted, other = begin(repo), begin(repo)
    first = trusted.next()
    assert first is not None
    trusted.accept(first, None)
    with pytest.raises(ValueError, match=r"2\.root\.json was not requested"):
        trusted.accept(first, None)
    second = trusted.next()
    assert second is not None
    with pytest.raises(ValueError, match=r"timestamp\.json was not requested"):
        other.accept(second, repo.files["timestamp.json"])


def test_a_file_beyond_its_limit_is_refused_and_requested_again() -> None:
    repo = Repository()
    trusted = begin(repo)
    request = trusted.next()
    assert request is not None
    with pytest.raises(Rejected) as verdict:
        trusted.accept(request, b" " * (bounds.ROOT_MAX_BYTES + 1))
    assert code_of(verdict) is RejectCode.TOO_LARGE
    assert trusted.next() == request


@pytest.mark.parametrize("cut", range(6))
def test_roles_are_readable_only_once_all_are_trusted(cut: int) -> None:
    repo = Repository()
    repo.publish()
    pairs, _ = record(repo, begin(repo), [HELLO])
    trusted = begin(repo)
    for pair in pairs[:cut]:
        request_next(trusted, [HELLO])
        trusted.accept(*pair)
    complete = cut >= 4
    questions: list[Callable[[], object]] = [
        lambda: trusted.root,
        lambda: trusted.targets,
        trusted.expiries,
        trusted.files,
        lambda: trusted.find(HELLO),
    ]
    for question in questions:
        if complete:
            assert question() is not None
            continue
        with pytest.raises(Rejected) as verdict:
            question()
        assert code_of(verdict) is RejectCode.UNREACHABLE


def test_unchanged_signatures_are_verified_once(monkeypatch: pytest.MonkeyPatch) -> None:
    repo = Repository()
    repo.publish()
    verified: list[str] = []
    verify = metadata.verify_metadata

    def counted(delegator: Any, role: str, file: Any) -> None:
        verified.append(role)
        verify(delegator, role, file)

    monkeypatch.setattr(metadata, "verify_metadata", counted)
    first = begin(repo)
    record(repo, first, [HELLO])
    assert verified == ["root", "timestamp", "snapshot", "targets", "main"]
    verified.clear()
    record(repo, begin(repo, state=first.state, reuse=first), [HELLO])
    assert verified == ["root"], "the pinned one"


def test_a_reused_role_is_refused_after_its_keys_life_was_shortened() -> None:
    repo = Repository()
    repo.publish()
    first = begin(repo)
    record(repo, first, [HELLO])

    def shorten(top: Targets) -> None:
        assert top.delegations is not None
        ends = {repo.keys["main"].public_key.keyid: (START + timedelta(days=1)).isoformat()}
        top.delegations.roles["main"].unrecognized_fields[metadata.KEY_ENDS] = ends

    repo.rewrite("targets", shorten)
    repo.online()
    for reuse in (None, first):
        _, refusal = record(repo, begin(repo, state=first.state, reuse=reuse), [HELLO])
        assert refusal is not None
        assert refusal.code is RejectCode.UNSIGNED


def test_a_reused_role_is_refused_after_its_key_was_replaced() -> None:
    repo = Repository()
    repo.publish()
    first = begin(repo)
    record(repo, first, [HELLO])

    def replace(top: Targets) -> None:
        top.revoke_key(repo.keys["main"].public_key.keyid, "main")
        top.add_key(signer().public_key, "main")

    repo.rewrite("targets", replace)
    repo.online()
    for reuse in (None, first):
        _, refusal = record(repo, begin(repo, state=first.state, reuse=reuse), [HELLO])
        assert refusal is not None
        assert refusal.code is RejectCode.UNSIGNED


def test_a_cached_timestamp_raises_the_known_versions() -> None:
    repo = Repository()
    repo.publish()
    trusted = begin(repo)
    record(repo, trusted, [])
    assert trusted.state.meta["snapshot.json"] == 2
    repo.rewrite("timestamp", lambda new: setattr(new, "snapshot_meta", MetaFile(1)))
    later = begin(repo, state=trusted.state)
    first = later.next()
    assert first is not None
    later.accept(first, None)
    second = later.next()
    assert second is not None
    assert not later.learn(second, repo.files["timestamp.json"])
    assert later.state.roles["timestamp"].version == 3
    assert later.state.meta["snapshot.json"] == 2


def test_a_cached_snapshot_raises_the_known_role_versions() -> None:
    repo = Repository()
    old = repo.files["1.snapshot.json"]
    repo.publish()
    known = begin(repo)
    first = known.next()
    assert first is not None
    known.accept(first, None)
    online = known.state.with_meta({"main.json": 2, "snapshot.json": 2})
    trusted = begin(repo, state=online)
    for answer in (None, repo.files["timestamp.json"]):
        request = trusted.next()
        assert request is not None
        trusted.accept(request, answer)
    request = trusted.next()
    assert request is not None
    assert not trusted.learn(request, old)
    assert trusted.state.meta["main.json"] == 2
    assert trusted.state.meta["targets.json"] == 1


# -- no sequence of files lowers a version ----------------------------------------------------------------------------

ROLES = ("root", "timestamp", "snapshot", "targets", "main", "other")


def all_that_was_ever_signed() -> tuple[Repository, dict[str, list[bytes]]]:
    """Make files of a repository whose online and publishers' keys were stolen: older, newer, contradictory."""
    repo = Repository(("main", "other"))
    pool: dict[str, list[bytes]] = {role: [] for role in ROLES}

    def keep() -> None:
        for role in ROLES:
            files = [data for name, data in repo.files.items() if name == f"{role}.json" or f".{role}." in name]
            pool[role] += [data for data in files if data not in pool[role]]

    def promise() -> None:
        version = repo.signed("snapshot").version
        data = repo.files[f"{version}.snapshot.json"]
        repo.rewrite("timestamp", lambda new: promise_snapshot(new, data, version))

    def more(signed: Any) -> None:
        signed.unrecognized_fields["more"] = "x"

    keep()
    repo.publish()
    keep()
    repo.publish("1.1.0", space="other")
    keep()
    honest = dict(repo.files)
    hostile: list[Callable[[Snapshot], None]] = [
        lambda new: promise_role(new, "main", honest["1.main.json"], 1),
        lambda new: promise_role(new, "other", honest["1.other.json"], 1),
        lambda new: new.meta.update({"snapshot.json": MetaFile(1)}),
        lambda new: new.meta.update({"main.json": MetaFile(1), "other.json": MetaFile(2)}),
    ]
    for change in hostile:
        for bump in (True, False):
            repo.files = dict(honest)
            repo.rewrite("snapshot", change, bump=bump)
            promise()
            keep()
    for role in ("timestamp", "snapshot", "targets", "main"):
        repo.files = dict(honest)
        repo.rewrite(role, more, bump=False)
        keep()
        if role != "timestamp":
            repo.online()
            keep()
    repo.files = dict(honest)
    repo.rewrite("timestamp", lambda new: setattr(new, "snapshot_meta", MetaFile(1)))
    keep()
    repo.files = dict(honest)
    repo.rewrite("root", lambda root: None)
    keep()
    repo.files = dict(honest)
    repo.rotate("timestamp")
    repo.online()
    keep()

    def swap(root: Root) -> None:
        root.expires = START - timedelta(days=1)

    repo.rewrite("root", swap)
    keep()
    return repo, pool


REPO, POOL = all_that_was_ever_signed()


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_no_sequence_of_files_lowers_a_version_under_the_same_keys(data: st.DataObject) -> None:
    state, reuse = VerifierState(), None
    for _ in range(data.draw(st.integers(1, 4), label="refreshes")):
        trusted = begin(REPO, state=state, reuse=reuse)
        try:
            while (request := request_next(trusted, [HELLO, HELLO.replace("main", "other")])) is not None:
                role = request.cache_name.removesuffix(".json").rpartition(".")[2].rpartition("/")[2]
                files = st.sampled_from(POOL[role])
                before = trusted.state
                cached = data.draw(st.none() | files | st.sampled_from(POOL["timestamp"]), label=f"cached {role}")
                try:
                    if cached is not None and trusted.learn(request, cached):
                        continue
                finally:
                    check_grown(before, trusted.state)
                before = trusted.state
                answers = st.none() | files if request.may_be_missing else files
                try:
                    trusted.accept(request, data.draw(answers, label=role))
                finally:
                    check_grown(before, trusted.state)
            reuse = trusted
        except Rejected:
            pass
        state = VerifierState.decode(trusted.state.encode())
