"""Signing events: mailed, described, signed by several people, published together or not at all."""

from datetime import timedelta

import msgspec
import pytest
from securesystemslib.signer import CryptoSigner

from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants
from signing import event_diff, events, repository, rotation
from signing.errors import ConflictError, Rejected, RepositoryError
from signing.events import Document, Event
from signing.rotation import Namespace, RoleKeys, Size
from tests.simulator.repository import FLEET, Device, Repository, signer


def keys(*signers: CryptoSigner, threshold: int = 1) -> RoleKeys:
    return RoleKeys(tuple(each.public_key for each in signers), threshold)


def publish(repo: Repository, event: Event) -> None:
    repo.files |= events.apply(repo.files, event)
    repo.online()


def team_event(repo: Repository, *people: CryptoSigner) -> Event:
    draft = rotation.propose_root(repo.files, size=Size.TEAM, roles={"root": keys(*people, threshold=2)}, now=repo.now)
    return Event(FLEET, (Document("root", draft),), note="three people from now on")


def new_publisher(repo: Repository, who: CryptoSigner, *, ends: timedelta | None = None) -> Event:
    """Propose another publisher for main, whose role is signed again in the same event."""
    life = {} if ends is None else {who.public_key.keyid: repo.now + ends}
    draft = rotation.propose_targets(
        repo.files, namespaces={"main": Namespace(keys(who), Grants(), life)}, now=repo.now
    )
    role = repository.latest(repo.files, "main")[1]
    again = repository.renew(role, signer=who, now=repo.now, ends=None if ends is None else repo.now + ends)
    return Event(FLEET, (Document("targets", draft), Document("main", again)))


def test_an_event_is_mailed_around_signed_apart_and_merged() -> None:
    repo = Repository()
    device = Device(repo)
    people = (signer(), signer(), signer())
    proposed = team_event(repo, *people).encode()

    # Three people get the file; two sign their own copies, one of which an editor has reformatted.
    mine = events.sign(repo.files, events.decode(proposed), repo.keys["root"])
    first = events.sign(repo.files, events.decode(proposed), people[0])
    second = events.sign(repo.files, events.decode(msgspec.json.format(proposed, indent=7)), people[2])
    whole = events.merge(mine, events.decode(first.encode()), events.decode(second.encode()))

    assert [(each.whose, each.count) for each in events.missing(repo.files, first)] == [("root", 1), ("new root", 1)]
    assert events.missing(repo.files, whole) == []
    publish(repo, whole)
    device.refresh()
    assert repository.latest(repo.files, "root")[0] == 2
    # Sending the event twice is harmless.
    assert events.apply(repo.files, whole) == {}


def test_an_event_is_described_in_words_before_people_sign_it() -> None:
    repo = Repository(ceilings={"main": Grants(interfaces=("wasi:clocks",))})
    repo.publish("1.0.0", grants=Grants(interfaces=("wasi:clocks",)))
    new = signer()
    draft = rotation.propose_targets(
        repo.files,
        namespaces={"main": Namespace(keys(new), Grants(interfaces=("wasi:clocks", "wasi:http")))},
        now=repo.now,
    )
    text = "\n".join(
        event_diff.describe(repo.files, Event(FLEET, (Document("targets", draft),)), called=lambda _: "Alice")
    )
    assert "the namespace main: Alice may sign from now on" in text
    assert "the namespace main: newly allows wasi:http" in text
    assert "targets, version 2" in text

    text = "\n".join(event_diff.describe(repo.files, team_event(repo, signer(), signer(), signer())))
    assert "size changes from solo to team" in text
    assert "root: needs 2 of 3, was 1" in text
    assert "may no longer sign" in text


def test_a_release_is_described_with_its_new_grants() -> None:
    repo = Repository()
    repo.publish("1.0.0", grants=Grants(interfaces=("wasi:clocks",)))
    before = dict(repo.files)
    repo.publish("1.1.0", grants=Grants(interfaces=("wasi:clocks", "wasi:http"), outbound=("https://x.example:443",)))
    repo.revoke("1.0.0")
    role = repository.latest(repo.files, "main")[1]
    text = "\n".join(event_diff.describe(before, Event(FLEET, (Document("main", role),))))
    assert "new grants  wasi:http, https://x.example:443" in text
    assert "components/main/hello/1.0.0.wasm is revoked" in text


def test_a_namespace_with_new_keys_must_be_signed_again_in_the_same_event() -> None:
    repo = Repository()
    item = repo.publish()
    who = signer()
    event = events.sign(repo.files, new_publisher(repo, who), repo.keys["targets"])
    with pytest.raises(RepositoryError, match="main must be signed again"):
        events.apply(repo.files, Event(FLEET, event.documents[:1]))
    publish(repo, event)
    assert Device(repo).run(repo.assign(item))


def test_the_second_of_two_concurrent_events_must_be_proposed_again() -> None:
    repo = Repository()
    first = events.sign(repo.files, new_publisher(repo, signer()), repo.keys["targets"])
    second = events.sign(repo.files, new_publisher(repo, signer()), repo.keys["targets"])
    publish(repo, first)
    with pytest.raises(ConflictError):
        events.apply(repo.files, second)


def test_a_key_that_may_sign_none_of_the_documents_is_refused() -> None:
    repo = Repository()
    with pytest.raises(RepositoryError, match="may sign none of the event's documents"):
        events.sign(repo.files, team_event(repo, signer(), signer(), signer()), signer())


@pytest.mark.parametrize(
    ("junk", "sentence"),
    [
        (b"", "not a signing event"),
        (b"{}", "not a signing event"),
        (b'{"kind":"other","fleet":"x","documents":[]}', "another version"),
        (b'{"kind":"wasmfleet-signing-event-1","fleet":"x","documents":[]}', "1 to 1100"),
        (
            b'{"kind":"wasmfleet-signing-event-1","fleet":"x","documents":[{"role":"root","metadata":{}}]}',
            "not TUF metadata",
        ),
        (b"[" * 100_000, "not a signing event"),
    ],
)
def test_a_file_that_is_not_an_event_is_refused_with_one_sentence(junk: bytes, sentence: str) -> None:
    with pytest.raises(RepositoryError, match=sentence):
        events.decode(junk)


# -- keys that end


def test_a_key_with_an_end_signs_nothing_valid_after_it() -> None:
    repo = Repository()
    build = signer()
    publish(repo, events.sign(repo.files, new_publisher(repo, build, ends=timedelta(days=180)), repo.keys["targets"]))
    repo.keys["main"] = build
    number, role = repository.latest(repo.files, "main")

    # Roles that expire with the key are accepted; those that expire later are refused everywhere.
    fine = repository.renew(role, signer=build, now=repo.now, ends=repo.now + timedelta(days=180))
    assert repository.check_role(repo.files, "main", fine) == number + 1
    item = repo.publish()  # the simulator's publisher takes the whole year
    with pytest.raises(Rejected) as verdict:
        Device(repo).run(repo.assign(item))
    assert verdict.value.code is RejectCode.UNSIGNED


def test_a_stolen_expired_key_cannot_be_used_with_a_false_date() -> None:
    repo = Repository()
    build = signer()
    life = timedelta(days=30)
    publish(repo, events.sign(repo.files, new_publisher(repo, build, ends=life), repo.keys["targets"]))
    stolen_on, ended = repo.now, repo.now + life
    repo.now = ended + timedelta(days=1)
    repo.online()
    number, role = repository.latest(repo.files, "main")
    # Dated back to when the key was valid: the role has expired by now.
    old = repository.renew(role, signer=build, now=stolen_on, ends=ended)
    repo.files[f"{number + 1}.main.json"] = old
    repo.online()
    device = Device(repo)
    device.refresh()
    with pytest.raises(Rejected) as verdict:
        device.lookup("components/main/hello/1.0.0.wasm")
    assert verdict.value.code is RejectCode.EXPIRED


@pytest.mark.parametrize("change", ["ends", "ceiling"])
def test_a_new_key_end_or_ceiling_is_described(change: str) -> None:
    repo = Repository()
    keyid = repo.keys["main"].public_key.keyid
    space = Namespace(
        rotation.namespace_of(repo.files, "main").signers, Grants(), {keyid: repo.now + timedelta(days=9)}
    )
    draft = rotation.propose_targets(repo.files, namespaces={"main": space}, now=repo.now)
    text = "\n".join(event_diff.describe(repo.files, Event(FLEET, (Document("targets", draft),))))
    assert {"ends": "after 2030-01-10", "ceiling": "at most nothing"}[change] in text
