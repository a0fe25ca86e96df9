"""Signing events: mailed around, signed by several, read in words before, published together or not at all."""

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
from tests.simulator.repository import FLEET, Board, Repository, signer


def keys(*signers: CryptoSigner, threshold: int = 1) -> RoleKeys:
    return RoleKeys(tuple(each.public_key for each in signers), threshold)


def publish(repo: Repository, event: Event) -> None:
    repo.files |= events.apply(repo.files, event)
    repo.online()


def team_event(repo: Repository, *people: CryptoSigner) -> Event:
    draft = rotation.propose_root(repo.files, size=Size.TEAM, roles={"root": keys(*people, threshold=2)}, now=repo.now)
    return Event(FLEET, (Document("root", draft),), note="three people from now on")


def new_publisher(repo: Repository, who: CryptoSigner, *, ends: timedelta | None = None) -> Event:
    """Another publisher for main, whose role is signed again in the same event."""
    life = {} if ends is None else {who.public_key.keyid: repo.now + ends}
    draft = rotation.propose_targets(
        repo.files, namespaces={"main": Namespace(keys(who), Grants(), life)}, now=repo.now
    )
    role = repository.latest(repo.files, "main")[1]
    again = repository.renew(role, signer=who, now=repo.now, ends=None if ends is None else repo.now + ends)
    return Event(FLEET, (Document("targets", draft), Document("main", again)))


def test_an_event_is_mailed_around_signed_apart_and_merged() -> None:
    repo = Repository()
    board = Board(repo)
    people = (signer(), signer(), signer())
    proposed = team_event(repo, *people).encode()

    # Three people get the file; two sign their own copies of it, one of which an editor laid out anew.
    mine = events.sign(repo.files, events.decode(proposed), repo.keys["root"])
    first = events.sign(repo.files, events.decode(proposed), people[0])
    second = events.sign(repo.files, events.decode(msgspec.json.format(proposed, indent=7)), people[2])
    whole = events.merge(mine, events.decode(first.encode()), events.decode(second.encode()))

    assert [(each.whose, each.count) for each in events.missing(repo.files, first)] == [("root", 1), ("new root", 1)]
    assert events.missing(repo.files, whole) == []
    publish(repo, whole)
    board.refresh()
    assert repository.latest(repo.files, "root")[0] == 2
    # Sending it twice does no harm.
    assert events.apply(repo.files, whole) == {}


def test_what_several_people_sign_is_said_in_words_before() -> None:
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
    assert "may not sign any more" in text


def test_a_release_is_described_with_the_grants_that_it_newly_wants() -> None:
    repo = Repository()
    repo.publish("1.0.0", grants=Grants(interfaces=("wasi:clocks",)))
    before = dict(repo.files)
    repo.publish("1.1.0", grants=Grants(interfaces=("wasi:clocks", "wasi:http"), outbound=("https://x.example:443",)))
    repo.revoke("1.0.0")
    role = repository.latest(repo.files, "main")[1]
    text = "\n".join(event_diff.describe(before, Event(FLEET, (Document("main", role),))))
    assert "newly wants wasi:http, https://x.example:443" in text
    assert "components/main/hello/1.0.0.wasm is revoked" in text


def test_a_namespace_with_other_keys_is_signed_again_in_the_same_event_or_not_at_all() -> None:
    repo = Repository()
    item = repo.publish()
    who = signer()
    event = events.sign(repo.files, new_publisher(repo, who), repo.keys["targets"])
    with pytest.raises(RepositoryError, match="main must be signed again"):
        events.apply(repo.files, Event(FLEET, event.documents[:1]))
    publish(repo, event)
    assert Board(repo).run(repo.assign(item))


def test_of_two_events_at_once_the_second_is_proposed_anew() -> None:
    repo = Repository()
    first = events.sign(repo.files, new_publisher(repo, signer()), repo.keys["targets"])
    second = events.sign(repo.files, new_publisher(repo, signer()), repo.keys["targets"])
    publish(repo, first)
    with pytest.raises(ConflictError):
        events.apply(repo.files, second)


def test_a_key_that_signs_nothing_of_it_is_told_so() -> None:
    repo = Repository()
    with pytest.raises(RepositoryError, match="signs nothing"):
        events.sign(repo.files, team_event(repo, signer(), signer(), signer()), signer())


@pytest.mark.parametrize(
    ("junk", "sentence"),
    [
        (b"", "no signing event"),
        (b"{}", "no signing event"),
        (b'{"kind":"other","fleet":"x","documents":[]}', "another version"),
        (b'{"kind":"wasmfleet-signing-event-1","fleet":"x","documents":[]}', "1 to 1100"),
        (
            b'{"kind":"wasmfleet-signing-event-1","fleet":"x","documents":[{"role":"root","metadata":{}}]}',
            "not TUF metadata",
        ),
        (b"[" * 100_000, "no signing event"),
    ],
)
def test_what_is_no_event_is_refused_in_one_sentence(junk: bytes, sentence: str) -> None:
    with pytest.raises(RepositoryError, match=sentence):
        events.decode(junk)


# -- keys that end


def test_a_key_that_ends_publishes_until_then_and_nothing_lives_longer() -> None:
    repo = Repository()
    build = signer()
    publish(repo, events.sign(repo.files, new_publisher(repo, build, ends=timedelta(days=180)), repo.keys["targets"]))
    repo.keys["main"] = build
    number, role = repository.latest(repo.files, "main")

    # What it signs for as long as its life is fine; what it signs for longer counts for nothing, wherever it is shown.
    fine = repository.renew(role, signer=build, now=repo.now, ends=repo.now + timedelta(days=180))
    assert repository.check_role(repo.files, "main", fine) == number + 1
    item = repo.publish()  # the simulator's publisher takes the whole year
    with pytest.raises(Rejected) as verdict:
        Board(repo).run(repo.assign(item))
    assert verdict.value.code is RejectCode.UNSIGNED


def test_a_thief_of_an_ended_key_gains_nothing_by_a_false_date() -> None:
    repo = Repository()
    build = signer()
    life = timedelta(days=30)
    publish(repo, events.sign(repo.files, new_publisher(repo, build, ends=life), repo.keys["targets"]))
    stolen_on, ended = repo.now, repo.now + life
    repo.now = ended + timedelta(days=1)
    repo.online()
    number, role = repository.latest(repo.files, "main")
    # Dated back to when the key was good: what it may say has expired by now.
    old = repository.renew(role, signer=build, now=stolen_on, ends=ended)
    repo.files[f"{number + 1}.main.json"] = old
    repo.online()
    board = Board(repo)
    board.refresh()
    with pytest.raises(Rejected) as verdict:
        board.lookup("components/main/hello/1.0.0.wasm")
    assert verdict.value.code is RejectCode.EXPIRED


@pytest.mark.parametrize("change", ["ends", "ceiling"])
def test_a_change_of_a_keys_life_or_of_a_ceiling_is_seen_in_the_words(change: str) -> None:
    repo = Repository()
    keyid = repo.keys["main"].public_key.keyid
    space = Namespace(
        rotation.namespace_of(repo.files, "main").signers, Grants(), {keyid: repo.now + timedelta(days=9)}
    )
    draft = rotation.propose_targets(repo.files, namespaces={"main": space}, now=repo.now)
    text = "\n".join(event_diff.describe(repo.files, Event(FLEET, (Document("targets", draft),))))
    assert {"ends": "beyond 2030-01-10", "ceiling": "at the most nothing"}[change] in text
