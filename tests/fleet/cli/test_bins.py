"""`fleet sign bins`: a namespace past a thousand targets moves over with one command, and goes on as before."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fleet.protocol import operator_api
from fleet.protocol.manifest import Http, Manifest
from fleet.protocol.names import TargetName
from signing import hash_bins, keys, repository
from signing.errors import FetchNotFound
from signing.updater import MemoryState, Updater
from signing.verifier import published

DEMO = Path(__file__).resolve().parents[3] / "components" / "demo"
MANY = 1100


@pytest.fixture
def large(desk, home):
    """A namespace in which a thousand releases came together."""
    from tuf.api.metadata import Metadata, TargetFile, Targets

    number, role = repository.latest(desk.files, "main")
    file = Metadata[Targets].from_bytes(role)
    for minor in range(MANY):
        name = TargetName("main", "sensor", f"1.{minor}.0")
        manifest = Manifest(name="sensor", version=name.version, trigger=Http())
        custom = {"custom": {"manifest": json.loads(json.dumps(_plain(manifest)))}}
        file.signed.targets[name.path] = TargetFile(7, {"sha256": f"{minor:064x}"}, name.path, custom)
    file.signed.version = number + 1
    file.sign(keys.load(home / "operator/keys/main.pem"))
    desk.accept("main", file.to_bytes())
    desk.routes["GET", "/v1/devices"] = operator_api.Devices()
    desk.routes["GET", "/v1/withdrawal"] = operator_api.WithdrawalView(target="components/main/hello/2.0.0.wasm")
    return desk


def _plain(manifest):
    import msgspec

    return msgspec.to_builtins(manifest)


def test_a_large_namespace_moves_over_and_goes_on_as_before(fleet, large, tmp_path):
    fetched: list[str] = []

    def fetch(name: str, _max_bytes: int) -> bytes:
        fetched.append(name)
        if name not in large.files:
            raise FetchNotFound(name)
        return large.files[name]

    device = Updater(pinned_root=large.files["1.root.json"], fetch=fetch, states=MemoryState())
    device.refresh(datetime.now(UTC))
    assert published(device.find(path := "components/main/sensor/1.7.0.wasm"), path)
    whole = len(repository.latest(large.files, "main")[1])

    moved = fleet("sign", "bins", "--bits", "6", "--yes")
    assert moved.exit_code == 0, moved.output
    assert "64 hash bins hold only what was published before" in moved.stderr
    assert len(hash_bins.releases(large.files, "main")) == MANY
    assert fleet("sign", "bins", "--yes").exit_code == 4, "it has bins already"

    # The device of before follows, and fetches a small part.
    fetched.clear()
    device.refresh(datetime.now(UTC))
    assert published(device.find(path := "components/main/sensor/1.7.0.wasm"), path)
    part = [name for name in fetched if ".bins-" in name]
    assert len(part) == 1
    assert len(large.files[part[0]]) < whole / 20

    # Publishing goes on with the same commands, and touches one bin.
    file = shutil.copy(DEMO / "v1.wasm", tmp_path / "hello.wasm")
    before = repository.newest(large.files)
    done = fleet("publish", file, "--version", "2.0.0")
    assert done.exit_code == 0, done.output
    after = repository.newest(large.files)
    changed = {role for role in after if after[role] != before.get(role)} - {"snapshot"}
    assert changed == {hash_bins.holder(large.files, "main", "components/main/hello/2.0.0.wasm")}
    assert "published already" in fleet("publish", file, "--version", "2.0.0").stdout
    device.refresh(datetime.now(UTC))
    assert published(device.find(path := "components/main/hello/2.0.0.wasm"), path)

    # So does taking back, renewing, and giving the namespace another key.
    assert fleet("withdraw", "hello@2.0.0", "--yes").exit_code == 0
    assert fleet("withdraw", "hello@9.0.0", "--yes").exit_code == 4
    again = fleet("publish", file, "--version", "2.0.0")
    assert again.exit_code == 2
    assert "was revoked" in again.stderr
    rotated = fleet("keys", "rotate", "main", "--yes")
    assert rotated.exit_code == 0, rotated.output
    assert fleet("publish", file, "--version", "2.1.0").exit_code == 0
    renewed = fleet("sign", "renew", "main", "--yes")
    assert renewed.exit_code == 0, renewed.output
    assert len(hash_bins.releases(large.files, "main")) == MANY + 1


def test_somebody_who_publishes_into_the_same_bin_in_between_loses_nothing(fleet, desk, tmp_path):
    assert fleet("sign", "bins", "--bits", "1", "--yes").exit_code == 0
    file = shutil.copy(DEMO / "v1.wasm", tmp_path / "hello.wasm")

    def somebody() -> None:
        desk.before_role = lambda: None
        assert fleet("publish", file, "--name", "other", "--version", "1.0.0").exit_code == 0
        assert fleet("publish", file, "--name", "third", "--version", "1.0.0").exit_code == 0

    desk.before_role = somebody
    done = fleet("publish", file, "--version", "1.0.0")
    assert done.exit_code == 0, done.output
    assert {each.name.name for each in hash_bins.releases(desk.files, "main")} == {"hello", "other", "third"}
