"""Verifier in an honest fleet: fetched files, remembered versions, recovery, time, commands and fleet sizes."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tuf.api.metadata import Targets

from fleet.protocol.assignment import COMMAND_TYPE, CheckIn, Command, Fresh, LaterVerb
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants
from signing import director, dsse
from signing.errors import Rejected
from signing.state import VerifierState
from signing.trusted_metadata import TrustedMetadata
from signing.updater import DirectoryCache
from signing.verifier import Challenge, accept_assignment, accept_command, accept_freshness
from tests.signing.verdicts import code_of
from tests.simulator.repository import DEVICE, FLEET, START, Device, Repository, signer


def fresh(repo: Repository, envelope: bytes, **fields: Any) -> bytes:
    defaults: dict[str, Any] = {
        "fleet": FLEET,
        "device": DEVICE,
        "nonce": "n-1",
        "assignment_sha256": director.payload_sha256(envelope),
        "issued": repo.now,
        "expires": repo.now + timedelta(minutes=5),
    }
    return director.sign_fresh(Fresh(**(defaults | fields)), repo.keys["director"])


def command(repo: Repository, sequence: int, **fields: Any) -> bytes:
    defaults: dict[str, Any] = {
        "fleet": FLEET,
        "device": DEVICE,
        "sequence": sequence,
        "issued": repo.now,
        "expires": repo.now + timedelta(minutes=5),
        "verb": CheckIn(),
    }
    return director.sign_command(Command(**(defaults | fields)), repo.keys["director"])


# -- fetched files ----------------------------------------------------------------------------------------------------


def test_a_refresh_without_changes_fetches_two_small_files() -> None:
    repo = Repository()
    item = repo.publish()
    device = Device(repo)
    device.run(repo.assign(item))
    assert repo.fetched == ["2.root.json", "timestamp.json", "2.snapshot.json", "1.targets.json", "2.main.json"]

    repo.fetched.clear()
    device.run(repo.assign(item))

    assert repo.fetched == ["2.root.json", "timestamp.json"]


def test_only_the_queried_namespaces_are_fetched() -> None:
    repo = Repository(("main", "other", "third"))
    item = repo.publish(space="other")
    Device(repo).run(repo.assign(item))
    assert [name for name in repo.fetched if "main" in name or "third" in name] == []


def test_a_committed_item_is_not_searched_again() -> None:
    repo = Repository()
    item = repo.publish()
    device = Device(repo)
    [committed] = device.run(repo.assign(item))
    repo.publish("2.0.0")
    repo.fetched.clear()

    # The namespace's new role is missing on the server: running components stay accepted.
    del repo.files["3.main.json"]
    later = msgspec.structs.replace(item, attempt=3, rollout="r-2")
    [again] = device.run(repo.assign(later), committed=committed)

    assert again.item == later
    assert again.release == committed.release


def test_an_expired_foreign_namespace_does_not_block_a_fix() -> None:
    repo = Repository(("main", "other"))
    foreign = repo.publish("1.0.0", name="stale", space="other")
    device = Device(repo)
    [committed] = device.run(repo.assign(foreign))

    # A year later, `other` has expired, `main` and the top-level roles were renewed, and a fix is pushed.
    repo.now += timedelta(days=364)
    for role in ("targets", "main"):
        repo.rewrite(role, lambda signed: setattr(signed, "expires", repo.now + timedelta(days=30)))
    repo.now += timedelta(days=2)
    fix = repo.publish("1.0.1", name="fix")
    accepted = device.accept(repo.assign(foreign, fix))

    assert [item.instance for item in accepted.assignment.items] == ["stale", "fix"]
    assert device.resolve(fix).release.name.version == "1.0.1"
    assert device.resolve(foreign, committed=committed).release == committed.release
    with pytest.raises(Rejected) as verdict:
        device.resolve(foreign)
    assert code_of(verdict) is RejectCode.EXPIRED


def test_a_committed_item_is_stopped_by_a_revocation_a_lower_ceiling_and_the_devices_policy() -> None:
    clocks = Grants(interfaces=("wasi:clocks",))
    repo = Repository()
    item = repo.publish(grants=clocks)
    device = Device(repo)
    [committed] = device.run(repo.assign(item))

    with pytest.raises(Rejected) as verdict:
        device.run(repo.assign(item), committed=committed, local=Grants())
    assert code_of(verdict) is RejectCode.GRANT_DENIED

    def lower(top: Targets) -> None:
        assert top.delegations is not None
        top.delegations.roles["main"].unrecognized_fields["ceiling"] = {"interfaces": ["wasi:random"]}

    repo.rewrite("targets", lower)
    repo.online()
    with pytest.raises(Rejected) as verdict:
        device.run(repo.assign(item), committed=committed)
    assert code_of(verdict) is RejectCode.GRANT_DENIED

    repo.revoke("1.0.0")
    with pytest.raises(Rejected) as verdict:
        device.run(repo.assign(item), committed=committed)
    assert code_of(verdict) is RejectCode.REVOKED


def test_wrong_arch_is_refused_by_the_device_it_does_not_fit() -> None:
    repo = Repository()
    item = repo.publish(arch=("riscv64",))
    device = Device(repo)
    assert device.run(repo.assign(item), arch="riscv64")
    with pytest.raises(Rejected) as verdict:
        device.run(repo.assign(item), arch="aarch64")
    assert code_of(verdict) is RejectCode.WRONG_ARCH


def test_an_operator_can_narrow_grants() -> None:
    repo = Repository()
    item = repo.publish(grants=Grants(interfaces=("wasi:clocks", "wasi:random")))
    narrowed = msgspec.structs.replace(item, grants=Grants(interfaces=("wasi:random",)))
    [resolved] = Device(repo).run(repo.assign(narrowed))
    assert resolved.grants == narrowed.grants


# -- state, and power cuts --------------------------------------------------------------------------------------------


def test_an_equal_assignment_is_accepted_again() -> None:
    repo = Repository()
    envelope = repo.assign(repo.publish())
    device = Device(repo)
    assert device.accept(envelope).sha256 == device.accept(envelope).sha256 == director.payload_sha256(envelope)


def test_state_is_a_plain_value_that_survives_storing() -> None:
    repo = Repository()
    device = Device(repo)
    device.run(repo.assign(repo.publish()))
    assert VerifierState.decode(device.state.encode()) == device.state


@pytest.mark.parametrize(
    "name", ["timestamp.json", "snapshot.json", "targets.json", "main.json", "root.json", "root_history/2.root.json"]
)
@pytest.mark.parametrize("damage", ["torn", "empty", "planted"])
def test_a_damaged_cache_only_costs_a_download(tmp_path: Path, name: str, damage: str) -> None:
    repo = Repository()
    repo.rotate("snapshot")
    item = repo.publish()
    Device(repo, cache=DirectoryCache(tmp_path)).run(repo.assign(item))
    file = tmp_path / name
    whole = file.read_bytes()
    planted = Repository().files["timestamp.json"]
    file.write_bytes({"torn": whole[: len(whole) // 2], "empty": b"", "planted": planted}[damage])

    [resolved] = Device(repo, cache=DirectoryCache(tmp_path)).run(repo.assign(item))

    assert resolved.item == item
    assert file.read_bytes() == whole


def test_a_cache_prevents_rollback_when_the_state_is_lost() -> None:
    repo = Repository()
    device = Device(repo)
    device.refresh()
    old = repo.files["timestamp.json"]
    repo.publish()
    device.refresh()

    device.state = VerifierState()
    repo.files["timestamp.json"] = old

    with pytest.raises(Rejected) as verdict:
        device.refresh()
    assert code_of(verdict) is RejectCode.ROLLBACK


def test_versions_seen_before_a_failure_are_remembered() -> None:
    repo = Repository()
    device = Device(repo)
    device.refresh()
    repo.publish()
    lost = repo.files.pop("2.snapshot.json")
    with pytest.raises(Rejected):
        device.refresh()

    assert device.state.roles["timestamp"].version == 2
    repo.files["2.snapshot.json"] = lost
    device.refresh()


# -- recovery ---------------------------------------------------------------------------------------------------------


def test_recovery_from_a_fast_forward_by_rotating_the_stolen_keys() -> None:
    # An attacker with the online keys raised the versions to a billion, so that honest ones looked like rollbacks.
    repo = Repository()
    item = repo.publish()
    device = Device(repo)
    honest = dict(repo.files)
    repo.rewrite("snapshot", lambda signed: setattr(signed, "version", 10**9))
    repo.files["timestamp.json"] = honest["timestamp.json"]
    repo.online()
    repo.rewrite("timestamp", lambda signed: setattr(signed, "version", 10**9))
    device.refresh()

    repo.files = honest
    with pytest.raises(Rejected) as verdict:
        device.refresh()
    assert code_of(verdict) is RejectCode.ROLLBACK

    repo.rotate("timestamp")
    repo.rotate("snapshot")
    repo.online()
    assert device.run(repo.assign(item))


def test_recovery_from_a_fast_forward_by_the_director() -> None:
    repo = Repository()
    item = repo.publish()
    device = Device(repo)
    device.accept(repo.assign(item, version=2**52))
    with pytest.raises(Rejected):
        device.accept(repo.assign(item))

    repo.rotate_delegation("director")

    assert device.accept(repo.assign(item)).assignment.version == 3


@pytest.mark.parametrize("role", ["root", "targets", "snapshot", "timestamp"])
def test_every_top_level_key_can_be_rotated(role: str) -> None:
    repo = Repository()
    item = repo.publish()
    device = Device(repo)
    device.run(repo.assign(item))
    repo.rotate(role)
    repo.online()
    assert device.run(repo.assign(item))
    assert Device(repo).run(repo.assign(item)), "a device that slept through the rotation"


def test_a_namespaces_key_can_be_rotated() -> None:
    repo = Repository()
    item = repo.publish()
    device = Device(repo)
    device.run(repo.assign(item))
    repo.rotate_delegation("main")
    assert device.run(repo.assign(item, repo.publish("2.0.0", name="new")))


def test_a_role_signed_by_its_new_key_may_keep_its_version() -> None:
    # A remembered version belongs to the key that signed it.
    repo = Repository()
    device = Device(repo)
    device.refresh()
    repo.rotate("targets")
    del repo.files["2.targets.json"]
    repo.rewrite("targets", lambda signed: None, bump=False)
    repo.online()
    device.refresh()
    assert device.state.roles["targets"].version == 1


# -- time -------------------------------------------------------------------------------------------------------------


def test_a_clock_set_back_does_not_make_expired_metadata_valid() -> None:
    repo = Repository()
    device = Device(repo)
    repo.now = START + timedelta(days=1)
    device.accept(repo.assign(repo.publish()))
    assert device.state.floor == START + timedelta(days=1)

    old = repo.files["timestamp.json"]
    repo.now = START + timedelta(days=4)
    repo.online()
    device.accept(repo.assign(repo.publish("1.0.1")))
    repo.files["timestamp.json"] = old
    repo.now = START - timedelta(days=3650)

    with pytest.raises(Rejected):
        device.refresh()
    assert device.state.floor == START + timedelta(days=4)


def test_no_document_raises_the_floor_beyond_the_expiry_of_its_roles() -> None:
    # A director with a wrong time cannot make every honest document look expired.
    repo = Repository()
    item = repo.publish()
    device = Device(repo)
    far = START + timedelta(days=4000)
    device.accept(repo.assign(item, issued=far, expires=far + timedelta(days=1)))
    assert device.state.floor == START + timedelta(days=2), "the timestamp's expiry"


def test_a_device_without_a_clock_learns_the_time_from_a_freshness_statement() -> None:
    repo = Repository()
    envelope = repo.assign(repo.publish())
    device = Device(repo)
    sha256 = device.accept(envelope).sha256
    repo.now += timedelta(days=1)
    statement, state = accept_freshness(
        device.trusted,
        fresh(repo, envelope),
        fleet=FLEET,
        device=DEVICE,
        challenge=Challenge(nonce="n-1", sha256=sha256),
        state=device.state,
        now=START,
    )
    assert state.time(START) == repo.now == statement.issued


def test_metadata_expired_at_the_freshness_statements_time_is_refused() -> None:
    # At the clock's time, a frozen repository looks valid; the director's statement is dated a week later.
    repo = Repository()
    envelope = repo.assign(repo.publish())
    device = Device(repo)
    device.refresh()
    with pytest.raises(Rejected) as verdict:
        accept_assignment(
            device.trusted,
            envelope,
            fleet=FLEET,
            device=DEVICE,
            state=device.state,
            now=START + timedelta(days=7, hours=-1),
        )
    assert code_of(verdict) is RejectCode.EXPIRED


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"nonce": "n-0"}, RejectCode.REPLAY),
        ({"assignment_sha256": "00" * 32}, RejectCode.FREEZE),
        ({"device": "winch-99887766"}, RejectCode.WRONG_DEVICE),
        ({"fleet": "airport"}, RejectCode.WRONG_FLEET),
        ({"issued": START - timedelta(hours=2), "expires": START - timedelta(hours=1)}, RejectCode.EXPIRED),
    ],
)
def test_a_freshness_statement_for_another_time_or_device_is_refused(fields: dict[str, Any], code: RejectCode) -> None:
    repo = Repository()
    envelope = repo.assign(repo.publish())
    device = Device(repo)
    sha256 = device.accept(envelope).sha256
    with pytest.raises(Rejected) as verdict:
        accept_freshness(
            device.trusted,
            fresh(repo, envelope, **fields),
            fleet=FLEET,
            device=DEVICE,
            challenge=Challenge(nonce="n-1", sha256=sha256),
            state=device.state,
            now=repo.now,
        )
    assert code_of(verdict) is code


# -- commands ---------------------------------------------------------------------------------------------------------


def test_a_command_is_accepted_once() -> None:
    repo = Repository()
    device = Device(repo)
    device.refresh()
    order, state = accept_command(
        device.trusted, command(repo, 5), fleet=FLEET, device=DEVICE, state=device.state, now=repo.now
    )
    assert order.verb == CheckIn()
    for sequence in (5, 4):
        with pytest.raises(Rejected) as verdict:
            accept_command(
                device.trusted, command(repo, sequence), fleet=FLEET, device=DEVICE, state=state, now=repo.now
            )
        assert code_of(verdict) is RejectCode.REPLAY


def test_a_command_of_a_later_vocabulary_is_named_and_accepted_once() -> None:
    repo = Repository()
    device = Device(repo)
    device.refresh()

    def later(sequence: int, verb: object) -> bytes:
        fields = {"fleet": FLEET, "device": DEVICE, "sequence": sequence, "verb": verb}
        times = {"issued": repo.now, "expires": repo.now + timedelta(minutes=5)}
        return dsse.sign(COMMAND_TYPE, msgspec.json.encode({"v": 1, **fields, **times}), [repo.keys["director"]])

    envelope = later(5, {"verb": "self-test", "depth": 3})
    order, state = accept_command(
        device.trusted, envelope, fleet=FLEET, device=DEVICE, state=device.state, now=repo.now
    )
    assert order.verb == LaterVerb(verb="self-test")
    for again, code in (
        (envelope, RejectCode.REPLAY),
        (later(6, {"verb": "restart", "instance": 7}), RejectCode.MALFORMED),
        (later(6, {"verb": "x" * 257}), RejectCode.MALFORMED),
        (later(6, {}), RejectCode.MALFORMED),
    ):
        with pytest.raises(Rejected) as verdict:
            accept_command(device.trusted, again, fleet=FLEET, device=DEVICE, state=state, now=repo.now)
        assert code_of(verdict) is code


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"expires": START + timedelta(days=1)}, RejectCode.MALFORMED),
        ({"device": "winch-99887766"}, RejectCode.WRONG_DEVICE),
        ({"issued": START - timedelta(minutes=9), "expires": START - timedelta(minutes=4)}, RejectCode.EXPIRED),
    ],
)
def test_a_command_for_another_time_or_device_is_refused(fields: dict[str, Any], code: RejectCode) -> None:
    repo = Repository()
    device = Device(repo)
    device.refresh()
    with pytest.raises(Rejected) as verdict:
        accept_command(
            device.trusted, command(repo, 1, **fields), fleet=FLEET, device=DEVICE, state=device.state, now=repo.now
        )
    assert code_of(verdict) is code


def test_an_assignment_is_not_accepted_as_a_command() -> None:
    repo = Repository()
    device = Device(repo)
    device.refresh()
    envelope = repo.assign(repo.publish())
    with pytest.raises(Rejected) as verdict:
        accept_command(device.trusted, envelope, fleet=FLEET, device=DEVICE, state=device.state, now=repo.now)
    assert code_of(verdict) is RejectCode.UNSIGNED


def test_a_device_without_a_network_keeps_verifying_the_directors_documents() -> None:
    repo = Repository()
    device = Device(repo)
    device.refresh()
    lost = repo.files.pop("timestamp.json")
    with pytest.raises(Rejected):
        device.refresh()

    _, device.state = accept_command(
        device.trusted, command(repo, 1), fleet=FLEET, device=DEVICE, state=device.state, now=repo.now
    )

    # Root changes: roles trusted before may have been replaced, so none is trusted until a refresh succeeds.
    repo.rotate("timestamp")
    with pytest.raises(Rejected):
        device.refresh()
    with pytest.raises(Rejected) as verdict:
        accept_command(device.trusted, command(repo, 2), fleet=FLEET, device=DEVICE, state=device.state, now=repo.now)
    assert code_of(verdict) is RejectCode.UNREACHABLE

    repo.files["timestamp.json"] = lost
    repo.online()
    device.refresh()
    accept_command(device.trusted, command(repo, 2), fleet=FLEET, device=DEVICE, state=device.state, now=repo.now)


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_a_device_in_production_refuses_a_repository_made_for_development() -> None:
    repo = Repository(dev=True)
    Device(repo).refresh()
    with pytest.raises(Rejected) as verdict:
        Device(repo, production=True).refresh()
    assert code_of(verdict) is RejectCode.DEVELOPMENT
    Device(Repository(), production=True).refresh()


def test_nothing_is_accepted_before_a_refresh() -> None:
    repo = Repository()
    item = repo.publish()
    device = Device(repo)
    unfinished = TrustedMetadata(pinned_root=repo.pinned, state=VerifierState(), now=START)
    for trusted in (lambda: device.trusted, lambda: unfinished):
        with pytest.raises(Rejected) as verdict:
            accept_assignment(
                trusted(), repo.assign(item), fleet=FLEET, device=DEVICE, state=VerifierState(), now=START
            )
        assert code_of(verdict) is RejectCode.UNREACHABLE
    with pytest.raises(Rejected):
        device.resolve(item)
    with pytest.raises(Rejected):
        unfinished.find(item.target)


def test_a_repository_of_another_fleet_is_refused() -> None:
    repo = Repository(fleet="airport")
    device = Device(repo)
    device.refresh()
    envelope = director.sign_assignment(repo.assignment(repo.publish(), fleet=FLEET), repo.keys["director"])
    with pytest.raises(Rejected) as verdict:
        accept_assignment(device.trusted, envelope, fleet=FLEET, device=DEVICE, state=device.state, now=repo.now)
    assert code_of(verdict) is RejectCode.WRONG_FLEET


def test_the_tests_signer_makes_a_new_key_each_time() -> None:
    assert signer().public_key != signer().public_key
