"""`fleet sign`: people at several machines sign one change; what expires is noticed and renewed."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner

from fleet.cli.main import main
from signing import events, repository, rotation

DEMO = Path(__file__).resolve().parents[3] / "components" / "demo"


@pytest.fixture
def size() -> str:
    return "solo"


@pytest.fixture
def work(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def machine(desk, home, tmp_path):
    """Another person's machine: the same fleet and server, a keyring of its own."""

    def make(name: str):
        place = tmp_path / name
        shutil.copytree(home / "operator", place / "operator")
        shutil.rmtree(place / "operator/keys")
        (place / "operator/keys").mkdir()

        def run(*words: object, stdin: str | None = None):
            result = CliRunner().invoke(main, ["--home", str(place), *map(str, words)], input=stdin)
            assert "Traceback" not in result.output
            return result

        assert run("keys", "new", name).exit_code == 0
        return run

    return make


@pytest.fixture
def team(fleet, machine, work):
    """Alice's and Bob's machines; this one (`fleet`) knows their public keys."""
    people = {}
    for name in ("alice", "bob"):
        people[name] = machine(name)
        (work / f"{name}.pub").write_text(people[name]("keys", "show", name).stdout)
        assert fleet("keys", "import", name, f"{name}.pub").exit_code == 0
    return people


def test_three_people_take_over_root_each_at_a_machine_of_their_own(fleet, team, desk, work):
    proposed = fleet(
        *("keys", "rotate", "root", "--to", "root", "--to", "alice", "--to", "bob", "--threshold", "2"),
        *("--out", "event.json", "--yes"),
    )
    assert proposed.exit_code == 0, proposed.output
    assert "root: needs 2 of 3, was 1" in proposed.stderr
    assert "1 of the keys of new root" in proposed.stdout
    assert repository.latest(desk.files, "root")[0] == 1

    # Too early: it says what is missing, and publishes nothing.
    assert fleet("sign", "publish", "event.json").exit_code == 4
    # Alice and Bob get copies by mail, read what they sign, and sign apart.
    shutil.copy("event.json", "alice.json")
    shutil.copy("event.json", "bob.json")
    seen = team["alice"]("sign", "approve", "alice.json", stdin="y\n")
    assert seen.exit_code == 0, seen.output
    assert "may sign from now on" in seen.stderr
    assert "Sign this with alice?" in seen.stderr
    assert team["bob"]("sign", "approve", "bob.json", "--yes").exit_code == 0

    # of two copies that only together have enough signatures, none is called enough
    assert "alice.json together" not in fleet("sign", "diff", "alice.json").stdout
    said = fleet("sign", "diff", "alice.json", "bob.json").stdout
    assert "alice.json and bob.json together have enough signatures: 'fleet sign publish alice.json bob.json'" in said

    done = fleet("sign", "publish", "alice.json", "bob.json")
    assert done.exit_code == 0, done.output
    assert repository.latest(desk.files, "root")[0] == 2
    assert rotation.keys_of(desk.files, "root").threshold == 2
    # From now on one person alone changes nothing.
    alone = fleet("keys", "rotate", "timestamp", "--yes")
    assert alone.exit_code == 0
    assert "root lacks 1 of the keys of root" in alone.stdout
    assert (work / "fleet-root-3.signing.json").exists()


def test_an_event_replaces_only_a_copy_of_itself(fleet, team, work):
    words = ("keys", "rotate", "root", "--to", "root", "--to", "alice", "--to", "bob", "--threshold", "2", "--yes")
    assert fleet(*words, "--out", "event.json").exit_code == 0
    for who in ("alice", "bob"):
        assert team[who]("sign", "approve", "event.json", "--yes").exit_code == 0
    assert fleet("sign", "publish", "event.json").exit_code == 0
    kept = work / "fleet-root-3.signing.json"
    kept.write_text("a letter that happens to have this name")
    said = fleet("keys", "rotate", "timestamp", "--yes").stdout
    assert "fleet-root-3-2.signing.json" in said
    assert kept.read_text().startswith("a letter")
    assert team["alice"]("sign", "approve", "fleet-root-3-2.signing.json", "--yes").exit_code == 0
    assert events.decode((work / "fleet-root-3-2.signing.json").read_bytes())


def test_a_namespace_that_wants_two_publishes_with_two(fleet, team, desk, work):
    words = ("keys", "rotate", "main", "--to", "main", "--to", "alice", "--threshold", "2")
    begun = fleet(*words, "--yes", "--out", "event.json")
    assert begun.exit_code == 0, begun.output
    assert team["alice"]("sign", "approve", "event.json", "--yes").exit_code == 0
    assert fleet("sign", "publish", "event.json").exit_code == 0

    file = shutil.copy(DEMO / "v1.wasm", work / "hello.wasm")
    alone = fleet("publish", file, "--version", "1.0.0")
    assert alone.exit_code == 1
    event = "fleet-main-3.signing.json"
    assert event in alone.stderr
    seen = team["alice"]("sign", "approve", event, "--yes")
    assert "main/hello@1.0.0" in seen.stderr
    assert "may reach   nothing" in seen.stderr
    assert team["alice"]("sign", "publish", event).exit_code == 0
    assert [str(each.name) for each in repository.releases(repository.latest(desk.files, "main")[1])] == [
        "main/hello@1.0.0"
    ]


def test_what_has_no_part_in_it_signs_nothing(fleet, team, work):
    fleet("keys", "rotate", "main", "--to", "bob", "--yes", "--out", "event.json")
    before = Path("event.json").read_bytes()
    refused = team["alice"]("sign", "approve", "event.json", "--yes")
    assert refused.exit_code == 4
    assert "no key here counts for this event" in refused.stderr
    assert Path("event.json").read_bytes() == before
    assert fleet("sign", "diff", "event.json").exit_code == 1
    # Who reads and says no leaves it as it was, too.
    assert team["bob"]("sign", "approve", "event.json", stdin="n\n").exit_code == 130
    assert Path("event.json").read_bytes() == before


def test_a_mail_that_is_no_event_or_of_another_fleet_is_one_line(fleet, team, desk, work):
    Path("mail.json").write_text("Dear Alice,")
    refused = fleet("sign", "approve", "mail.json")
    assert refused.exit_code == 2
    assert "cannot read the signing event mail.json; this is not a signing event" in refused.stderr
    fleet("keys", "rotate", "main", "--to", "bob", "--yes", "--out", "event.json")
    text = Path("event.json").read_text()
    Path("event.json").write_text(text.replace('"fleet": "fleet"', '"fleet": "other"', 1))
    assert "belongs to the fleet 'other'" in fleet("sign", "approve", "event.json").stderr


def test_a_note_from_outside_cannot_paint_the_terminal(fleet, desk, work):
    fleet("keys", "new", "bob")
    fleet("keys", "rotate", "main", "--to", "bob", "--yes", "--out", "event.json")
    event = json.loads(Path("event.json").read_text())
    event["note"] = "harmless\x1b[2Jreally"
    Path("event.json").write_text(json.dumps(event))
    assert "\x1b" not in fleet("sign", "diff", "event.json").stderr


def test_a_cron_job_notices_what_expires_and_renewal_ends_it(fleet, desk, monkeypatch):
    fine = fleet("sign", "status", "--fail-within", "30d")
    assert fine.exit_code == 0, fine.output
    assert "1 of 1" in fine.stdout
    late = fleet("sign", "status", "--fail-within", "400d", "--json")
    assert late.exit_code == 1
    assert json.loads(late.stdout)["late"] == ["targets", "main"]
    assert "fleet sign renew targets main" in late.stderr

    assert "Nothing expires" in fleet("sign", "renew").stdout
    done = fleet("sign", "renew", "--within", "400d", "--yes")
    assert done.exit_code == 0, done.output
    assert "valid until" in done.stderr
    assert [repository.latest(desk.files, role)[0] for role in ("root", "targets", "main")] == [1, 2, 2]
    assert fleet("sign", "renew", "director").exit_code == 4


def test_what_has_expired_already_is_renewed_all_the_same(fleet, desk, home):
    # A year went by in which nobody signed: the targets of the day before yesterday, as the server would show them.
    past = datetime.now(UTC) - timedelta(days=366)
    from signing import keyring

    ring = keyring.Keyring(home / "operator/keys")
    event = events.propose(desk.files, renew=("targets",), now=past)
    signer = ring.open(ring.get("targets"), lambda _what: b"correct horse")
    desk.accept_event(events.sign(desk.files, event, signer).encode())

    refused = fleet("publish", shutil.copy(DEMO / "v1.wasm", home.parent / "hello.wasm"), "--version", "1.0.0")
    assert refused.exit_code == 4
    assert "expired" in refused.stderr
    late = fleet("sign", "status")
    assert late.exit_code == 1
    assert "looks the same" in late.stderr
    assert "expired 24 h ago" in late.stdout or "expired 1 d ago" in late.stdout
    assert fleet("sign", "renew", "targets", "--yes").exit_code == 0
    assert fleet("publish", home.parent / "hello.wasm", "--version", "1.0.0").exit_code == 0
