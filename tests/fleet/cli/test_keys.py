"""`fleet keys`: made encrypted, listed with what they may sign, rotated and revoked by what the devices verify."""

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata

from signing import keys, repository, rotation
from signing.errors import FetchNotFound, Rejected
from signing.keyring import Keyring, recovery_key
from signing.updater import MemoryState, Updater
from signing.verifier import published

DEMO = Path(__file__).resolve().parents[3] / "components" / "demo"
SECRET = "correct horse"


@pytest.fixture
def size() -> str:
    return "solo"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Commands write events and pipelines' keys where they are called."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


class Device:
    """A production device's verifier that lives through the whole story, from the root of its enrolment."""

    def __init__(self, desk) -> None:
        self.desk, self.states = desk, MemoryState()
        root = desk.files["1.root.json"]
        self.updater = Updater(pinned_root=root, fetch=self.fetch, states=self.states, production=True)

    def fetch(self, name: str, _max_bytes: int) -> bytes:
        if name not in self.desk.files:
            raise FetchNotFound(name)
        return self.desk.files[name]

    def sees(self, path: str):
        self.updater.refresh(datetime.now(UTC))
        return published(self.updater.find(path), path)


def hello(directory: Path, name: str = "hello.wasm") -> Path:
    return Path(shutil.copy(DEMO / "v1.wasm", directory / name))


def listed(fleet) -> dict[str, str]:
    return {row["name"]: ", ".join(row["signs"]) for row in json.loads(fleet("keys", "list", "--json").stdout)["keys"]}


def test_a_fleets_keys_are_listed_with_what_they_sign(fleet, desk):
    rows = listed(fleet)
    assert rows["root"] == "root"
    assert rows["main"] == "main"
    text = fleet("keys", "list").stdout
    assert "NAME" in text
    assert "director" in text  # a key that is on the server, without a name here


def test_a_key_is_made_encrypted_and_shown_to_others(fleet, desk, home, elsewhere):
    made = fleet("keys", "new", "alice")
    assert made.exit_code == 0, made.output
    path = home / "operator/keys/alice.pem"
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(keys.EncryptedError):
        keys.load(path)
    # She mails her public key; Bob knows it by a name from then on.
    (elsewhere / "alice.pub").write_text(fleet("keys", "show", "alice").stdout)
    (home / "operator/keys/alice.json").unlink()
    assert fleet("keys", "import", "alice-from-sales", "alice.pub").exit_code == 0
    assert listed(fleet)["alice-from-sales"] == ""
    again = fleet("keys", "import", "twice", "alice.pub")
    assert again.exit_code == 2
    assert "already known as alice-from-sales" in again.stderr


def test_without_a_passphrase_and_a_terminal_no_key_is_made(fleet, desk, home, monkeypatch):
    monkeypatch.delenv("WASMFLEET_KEY_PASSPHRASE")
    result = fleet("keys", "new", "alice")
    assert result.exit_code == 2
    assert "WASMFLEET_KEY_PASSPHRASE" in result.stderr
    assert not (home / "operator/keys/alice.pem").exists()


def test_a_private_key_is_imported_and_encrypted_anew(fleet, desk, home, elsewhere):
    mine = keys.generate(elsewhere / "old", passphrase=None)
    assert fleet("keys", "import", "mine", "old").exit_code == 0
    again = keys.load(home / "operator/keys/mine.pem", passphrase=SECRET.encode())
    assert again.public_key == mine.public_key


def test_a_printed_recovery_key_is_typed_in_again(fleet, desk, home):
    signer, text = recovery_key()
    typo = text[:-1] + ("A" if text[-1] != "A" else "B")
    assert "mistyped" in fleet("keys", "import", "paper", "--recovery", stdin=typo).stderr
    assert fleet("keys", "import", "paper", "--recovery", stdin=text.lower()).exit_code == 0
    assert Keyring(home / "operator/keys").get("paper").key == signer.public_key


@pytest.mark.parametrize("role", ["main", "targets", "root"])
def test_a_role_gets_another_key_and_devices_follow(role, fleet, desk, elsewhere):
    device = Device(desk)
    assert fleet("publish", hello(elsewhere), "--version", "1.0.0").exit_code == 0
    device.sees("components/main/hello/1.0.0.wasm")
    before = rotation.keys_of(desk.files, role)

    done = fleet("keys", "rotate", role, "--yes")
    assert done.exit_code == 0, done.output
    assert f"{role}-2 (" in done.stderr
    assert "may sign from now on" in done.stderr

    after = rotation.keys_of(desk.files, role)
    paper = Keyring(desk.home / "operator/keys").get("recovery").key
    kept = {key.keyid for key in before.keys} & {key.keyid for key in after.keys}
    assert kept == ({paper.keyid} if role == "root" else set())
    assert fleet("publish", hello(elsewhere), "--version", "1.1.0").exit_code == 0
    assert device.sees("components/main/hello/1.1.0.wasm")
    assert listed(fleet)[f"{role}-2"] == role
    assert listed(fleet)[role] == ""


@pytest.mark.parametrize(
    ("role", "words"),
    [("timestmap", "did you mean timestamp?"), ("mian", "did you mean main?"), ("xyz", "there are root")],
)
def test_a_slip_in_a_roles_name_makes_no_namespace(role, words, fleet, desk):
    before = dict(desk.files)
    result = fleet("keys", "rotate", role, "--yes")
    assert result.exit_code == 4
    assert words in result.stderr
    assert "--new-namespace" in result.stderr
    assert desk.files == before


def test_a_namespace_is_made_on_demand_and_once(fleet, desk):
    assert fleet("keys", "rotate", "sensors", "--new-namespace", "--yes").exit_code == 0
    assert "sensors" in repository.namespaces(desk.files)
    again = fleet("keys", "rotate", "sensors", "--new-namespace", "--yes")
    assert again.exit_code == 2
    assert "sensors exists" in again.stderr


def test_who_says_no_has_changed_nothing(fleet, desk, home):
    before = dict(desk.files)
    result = fleet("keys", "rotate", "main", stdin="n\n")
    assert result.exit_code == 130
    assert desk.files == before
    assert not (home / "operator/keys/main-2.pem").exists()
    assert "main-2" not in listed(fleet)


def test_an_online_key_is_made_on_the_server(fleet, desk, home):
    assert fleet("keys", "rotate", "director", "--yes").exit_code == 0
    new = keys.load(home / "server/keys/director-2.pem")
    assert [key.keyid for key in rotation.keys_of(desk.files, "director").keys] == [new.public_key.keyid]
    (home / "server").rename(home / "away")
    result = fleet("keys", "rotate", "director", "--yes")
    assert result.exit_code == 2
    assert "on the server's machine" in result.stderr


def test_a_second_publisher_comes_and_is_revoked(fleet, desk, elsewhere):
    fleet("keys", "new", "bob")
    assert fleet("keys", "rotate", "main", "--to", "main", "--to", "bob", "--yes").exit_code == 0
    assert listed(fleet)["bob"] == "main"
    done = fleet("keys", "revoke", "bob", "--yes")
    assert done.exit_code == 0, done.output
    assert "may no longer sign" in done.stderr
    assert listed(fleet)["bob"] == ""
    # The last one cannot go without another in its place.
    refused = fleet("keys", "revoke", "main", "--yes")
    assert refused.exit_code == 4
    assert "fleet keys rotate main" in refused.stderr


# -- pipelines


def pipeline(home: Path, elsewhere: Path, monkeypatch, namespace: str) -> None:
    """This machine becomes the pipeline's: no keyring, its key in the environment."""
    monkeypatch.setenv("FLEET_SIGNING_KEY", (elsewhere / "build.ci.pem").read_text())
    shutil.rmtree(home / "operator/keys")
    config = home / "operator/config.toml"
    config.write_text(config.read_text().replace('"main"', f'"{namespace}"'))


def test_a_pipeline_publishes_in_its_namespace_below_its_ceiling(fleet, desk, home, elsewhere, monkeypatch):
    device = Device(desk)
    made = fleet(
        *("keys", "new", "build", "--ci", "--namespace", "edge", "--expires", "90d"),
        *("--ceiling", "wasi:clocks", "--yes"),
    )
    assert made.exit_code == 0, made.output
    assert "the namespace edge is new" in made.stderr
    assert "may reach at most wasi:clocks" in made.stderr
    assert "signs nothing that is valid after" in made.stderr
    assert (elsewhere / "build.ci.pem").stat().st_mode & 0o777 == 0o600
    pipeline(home, elsewhere, monkeypatch, "edge")

    assert fleet("publish", hello(elsewhere), "--version", "1.0.0").exit_code == 0
    assert device.sees("components/edge/hello/1.0.0.wasm")
    role = Metadata.from_bytes(device.updater.role("edge").data)
    life = role.signed.expires - datetime.now(UTC)
    assert life.days <= 90, "nothing that the key signs outlives it"

    # Beyond its ceiling it gets nowhere, and top-level roles are not for it.
    shutil.copy(DEMO / "ticker.wasm", elsewhere / "ticker.wasm")
    (elsewhere / "component.toml").write_text(
        'name = "ticker"\nversion = "1.0.0"\ntrigger = { type = "schedule", every = "2s" }\n'
        '[grants]\ninterfaces = ["wasi:logging"]\n'
    )
    refused = fleet("publish", elsewhere / "ticker.wasm")
    assert refused.exit_code == 4, refused.output
    assert "namespace ceiling does not allow wasi:logging" in refused.stderr
    refused = fleet("keys", "rotate", "targets", "--yes")
    assert refused.exit_code == 2
    assert "none of the keys of targets is yours" in refused.stderr


def test_a_namespace_without_a_ceiling_gets_no_pipeline(fleet, desk, elsewhere):
    refused = fleet("keys", "new", "build", "--ci", "--yes")
    assert refused.exit_code == 2
    assert "has no ceiling" in refused.stderr
    assert list(elsewhere.iterdir()) == []


def test_a_revoked_pipeline_publishes_nothing_more(fleet, desk, home, elsewhere, monkeypatch):
    words = ("--ci", "--ceiling", "wasi:clocks", "--yes")
    assert fleet("keys", "new", "build", *words).exit_code == 0
    shutil.copytree(home / "operator/keys", elsewhere / "keys-of-people")
    pipeline(home, elsewhere, monkeypatch, "main")
    assert fleet("publish", hello(elsewhere), "--version", "1.0.0").exit_code == 0
    device = Device(desk)
    assert device.sees("components/main/hello/1.0.0.wasm")

    monkeypatch.delenv("FLEET_SIGNING_KEY")
    shutil.copytree(elsewhere / "keys-of-people", home / "operator/keys")
    assert fleet("keys", "revoke", "build", "--yes").exit_code == 0
    assert device.sees("components/main/hello/1.0.0.wasm"), "what it published stays, signed again by a person"

    monkeypatch.setenv("FLEET_SIGNING_KEY", (elsewhere / "build.ci.pem").read_text())
    refused = fleet("publish", hello(elsewhere), "--version", "1.1.0")
    assert refused.exit_code == 2
    assert "not trusted with the namespace main" in refused.stderr


class At:
    """A clock that stands."""

    def __init__(self, at: datetime) -> None:
        self.at = at

    def now(self, _zone: object) -> datetime:
        return self.at


def test_a_pipelines_key_that_ended_is_followed_by_another(fleet, desk, home, elsewhere, monkeypatch):
    words = ("--ci", "--namespace", "edge", "--ceiling", "wasi:clocks", "--yes")
    assert fleet("keys", "new", "old", *words, "--expires", "30d").exit_code == 0
    monkeypatch.setenv("FLEET_SIGNING_KEY", (elsewhere / "old.ci.pem").read_text())
    config = home / "operator/config.toml"
    config.write_text(config.read_text().replace('"main"', '"edge"'))
    assert fleet("publish", hello(elsewhere), "--version", "1.0.0").exit_code == 0
    # A month later.
    desk.now = datetime.now(UTC) + timedelta(days=31)
    for module in ("keys", "publish", "trust_store"):
        monkeypatch.setattr(f"fleet.cli.{module}.datetime", At(desk.now))
    desk.sign_online()
    refused = fleet("publish", hello(elsewhere), "--version", "1.1.0")
    assert refused.exit_code == 2
    assert "ended on" in refused.stderr

    made = fleet("keys", "new", "next", *words)
    assert made.exit_code == 0, made.output
    assert "may no longer sign" in made.stderr
    monkeypatch.setenv("FLEET_SIGNING_KEY", (elsewhere / "next.ci.pem").read_text())
    done = fleet("publish", hello(elsewhere), "--version", "1.1.0")
    assert done.exit_code == 0, done.output


def test_a_program_that_cannot_be_asked_must_say_yes(fleet, desk):
    before = dict(desk.files)
    refused = fleet("keys", "rotate", "main", "--json")
    assert refused.exit_code == 2
    assert "add --yes" in refused.stderr
    assert desk.files == before
    assert json.loads(fleet("keys", "rotate", "main", "--json", "--yes").stdout)["published"] is True


def test_a_stolen_pipeline_key_with_a_longer_life_of_its_own_is_refused(fleet, desk, elsewhere):
    assert fleet("keys", "new", "build", "--ci", "--ceiling", "wasi:clocks", "--yes").exit_code == 0
    thief = keys.load(elsewhere / "build.ci.pem")
    role = repository.latest(desk.files, "main")[1]
    with pytest.raises(Rejected, match="unsigned"):
        desk.accept("main", repository.renew(role, signer=thief, now=datetime.now(UTC)))
