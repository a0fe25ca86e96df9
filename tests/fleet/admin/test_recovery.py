"""A server made anew: what counts of what is left, and what a thief's copy is worth. No process."""

import errno
import io
import os
import shutil
import stat
import tarfile
from datetime import UTC, datetime, timedelta

import pytest

from fleet import ca
from fleet.admin import bootstrap, recovery
from fleet.admin.recovery import BackupError, Known, RebuildError
from fleet.server.config import ServerConfig, ServerPaths
from fleet.store.store import Store
from signing import events, keys, repository
from signing.errors import FetchNotFound, Rejected
from signing.keyring import Keyring
from signing.updater import MemoryState, Updater

PASSPHRASE = b"correct horse"
NOW = datetime.now(UTC)
KEY = "ab" * 32


class Place:
    """An operator's home with the server on it, and what a device has seen of it."""

    def __init__(self, directory):
        self.path = directory / "home"
        bootstrap.init(self.path, fleet="acme", size="solo", passphrase=PASSPHRASE, broker="mqtts://127.0.0.1:8883")
        self.home = ServerPaths(self.path)
        self.first = self.files()["1.root.json"]
        self.states = MemoryState()

    def files(self):
        return {path.name: path.read_bytes() for path in self.home.repository.glob("*.json")}

    def look(self, files, *, now=NOW):
        """A device with its memory looks at a repository."""

        def fetch(name, _max_bytes):
            if name not in files:
                raise FetchNotFound(name)
            return files[name]

        Updater(pinned_root=self.first, fetch=fetch, states=self.states, production=True).refresh(now)

    def publish(self, count=1):
        main = keys.load(self.home.operator / "keys/main.pem", passphrase=PASSPHRASE)
        for _ in range(count):
            files = self.files()
            version, role = repository.latest(files, "main")
            files[f"{version + 1}.main.json"] = repository.renew(role, signer=main, now=NOW)
            self.write(files)

    def write(self, files):
        online = {role: keys.load(self.home.keys / f"{role}.pem") for role in ("snapshot", "timestamp")}
        files |= repository.online(
            files, snapshot_signer=online["snapshot"], timestamp_signer=online["timestamp"], now=NOW
        )
        for name, data in files.items():
            (self.home.repository / name).write_bytes(data)

    def sign(self, event):
        files, _ = recovery.begun(self.path)
        ring = Keyring(self.home.operator / "keys")
        for name in ("root", "targets"):
            event = events.sign(files, event, ring.open(ring.get(name), lambda _: PASSPHRASE))
        return event

    def root(self):
        return ca.open_root(self.home.ca_root, self.home.operator / "ca.pem", PASSPHRASE)

    def rebuilt(self, *, kept=None, config=None, devices=None):
        event, gaps = recovery.begin(self.path, kept=kept, config=config, now=NOW)
        made = recovery.finish(self.path, self.sign(event), self.root(), devices=devices or {}, now=NOW)
        return made, gaps


@pytest.fixture
def place(tmp_path, monkeypatch):
    for module, name in ((keys, "PKCS12_ROUNDS"), (ca, "_ROUNDS")):
        monkeypatch.setattr(module, name, 1000)  # opening keys is not what is tested here
    return Place(tmp_path)


def test_a_backup_holds_no_key_and_is_the_owners_alone(place, tmp_path):
    assert recovery.backup(place.path, tmp_path / "b.tar") > 0
    assert stat.S_IMODE((tmp_path / "b.tar").stat().st_mode) == 0o600
    with tarfile.open(tmp_path / "b.tar") as tar:
        names = tar.getnames()
    assert {"server.toml", "fleet.db", "ca/ca.pem", "repository/timestamp.json"} <= set(names)
    assert not [name for name in names if name.endswith((".key", ".p12")) or name.startswith(("keys/", "tls/"))]
    data = (tmp_path / "b.tar").read_bytes()
    for secret in (b"PRIVATE", (place.home.operator / "token").read_bytes().strip()):
        assert secret not in data


def test_a_backup_that_a_full_disk_ends_leaves_nothing_behind(place, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(recovery, "move_into_place", full)
    with pytest.raises(BackupError, match=r"b\.tar: No space left on device$"):
        recovery.backup(place.path, tmp_path / "out" / "b.tar")
    assert list((tmp_path / "out").iterdir()) == []


def tar(*members):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as file:
        for name, kind in members:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            file.addfile(member)
    return made.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"no tar at all" * 100,
        tar(("../outside", tarfile.REGTYPE)),
        tar(("repository/../../outside", tarfile.REGTYPE)),
        tar(("repository/.hidden", tarfile.REGTYPE)),
        tar(("fleet.db", tarfile.SYMTYPE)),
        tar(("server.toml", tarfile.REGTYPE)),
    ],
)
def test_a_file_that_is_no_backup_changes_nothing(place, tmp_path, data):
    (tmp_path / "b.tar").write_bytes(data)
    place.home.server.rename(tmp_path / "old")
    with pytest.raises(RebuildError, match="backup"):
        recovery.begin(place.path, kept=tmp_path / "b.tar", config=None, now=NOW)
    assert sorted(path.name for path in place.path.iterdir()) == ["operator"]


def test_devices_follow_a_server_that_was_made_anew_and_what_was_stolen_counts_for_nothing(place, tmp_path):
    place.look(place.files())
    recovery.backup(place.path, tmp_path / "b.tar")
    place.publish(3)  # after the backup; this operator's machine has seen it
    place.look(place.files())
    cache(place)
    stolen = place.files()
    place.home.server.rename(tmp_path / "loot")
    made, gaps = place.rebuilt(kept=tmp_path / "b.tar")
    assert (made.lost, gaps) == ((), [])
    files = place.files()
    assert "4.main.json" in files, "what only this machine had seen is there, the backup had less"
    assert repository.latest(files, "snapshot")[0] > repository.latest(stolen, "snapshot")[0], "no name is used twice"
    place.look(files)
    # The thief goes on signing with what he has; the device has gone beyond that root.
    thief = {role: keys.load(tmp_path / f"loot/keys/{role}.pem") for role in ("snapshot", "timestamp")}
    own = dict(files)
    own["timestamp.json"] = stolen["timestamp.json"]
    own |= repository.online(
        {name: data for name, data in own.items() if "snapshot" not in name},
        snapshot_signer=thief["snapshot"],
        timestamp_signer=thief["timestamp"],
        now=NOW,
    )
    with pytest.raises(Rejected) as verdict:
        place.look(own)
    assert verdict.value.code == "unsigned"
    assert not (place.path / "server.new").exists()


def cache(place):
    """What the operator's machine keeps of the repository when it looks at it."""
    directory = place.home.operator / "trust" / "cache"
    directory.mkdir(parents=True)
    files = place.files()
    for role in ("root", "targets", "main", "snapshot"):
        (directory / f"{role}.json").write_bytes(repository.latest(files, role)[1])
    (directory / "timestamp.json").write_bytes(files["timestamp.json"])


def test_nobody_comes_in_with_an_old_token_and_revoked_devices_stay_out(place, tmp_path):
    with_store(place, lambda store: add(store, "gate-01234567", KEY))
    recovery.backup(place.path, tmp_path / "b.tar")
    old = (place.home.operator / "token").read_text()
    place.home.server.rename(tmp_path / "loot")
    devices = {
        "gate-01234567": Known(key=KEY, groups=("edge",), revoked=True),  # shut out after the backup
        "lift-01234567": Known(key="cd" * 32, groups=("edge", "north")),  # enrolled after it
        "door-01234567": Known(key="ef" * 32, revoked=True),
    }
    made, _ = place.rebuilt(kept=tmp_path / "b.tar", devices=devices)
    assert made.admitted == ("lift-01234567",)
    new = (place.home.operator / "token").read_text()
    assert new != old
    assert stat.S_IMODE((place.home.operator / "token").stat().st_mode) == 0o600

    def look(store):
        assert store.access.operator(old.strip()) is None
        assert store.access.operator(new.strip()) == ("admin", "admin")
        assert store.access.token("unspent") is None
        rows = {row.id: row for row in store.devices.all()}
        assert rows.keys() == {"gate-01234567", "lift-01234567"}
        assert rows["gate-01234567"].revoked
        assert rows["lift-01234567"].key_sha256 == "cd" * 32
        assert [group.name for group in store.devices.groups_of(rows["lift-01234567"])] == ["edge", "north"]

    with_store(place, look)


def add(store, device, key):
    store.devices.add(
        device=device, name="gate", machine="", sealing_key="", key_sha256=key, group="edge", now=NOW.timestamp()
    )
    store.access.add_token("unspent", group="", root_sha256="", expires=2e9, by="admin", now=NOW.timestamp())


def with_store(place, act):
    store = Store.open(place.home.database, fleet="acme")
    try:
        act(store)
    finally:
        store.close()


def test_without_a_backup_the_metadata_of_this_machine_and_its_memory_are_enough(place, tmp_path):
    place.look(place.files())
    cache(place)
    config = ServerConfig.load(place.home.config)
    shutil.rmtree(place.home.server)
    made, _ = place.rebuilt(config=config, devices={"gate-01234567": Known(key=KEY)})
    assert (made.devices, made.admitted) == (1, ("gate-01234567",))
    place.look(place.files())


@pytest.mark.parametrize("kept", [True, False])
def test_secrets_are_counted_on_above_what_devices_may_remember(place, tmp_path, kept):
    """What the thief, or the honest server after the backup, has given them is more than this database knows."""

    def rotate(store):
        version = store.boxes.next_version("hello", "key")
        store.boxes.put(instance="hello", name="key", version=version, boxes=(), by="admin", now=NOW.timestamp())
        return version

    with_store(place, lambda store: [rotate(store), rotate(store)])
    recovery.backup(place.path, tmp_path / "b.tar")
    with_store(place, lambda store: [rotate(store) for _ in range(100)])
    place.look(place.files())
    cache(place)
    config = ServerConfig.load(place.home.config)
    place.home.server.rename(tmp_path / "loot")
    place.rebuilt(**({"kept": tmp_path / "b.tar"} if kept else {"config": config}))

    def look(store):
        first = rotate(store)
        assert first > 102
        assert rotate(store) == first + 1
        assert store.boxes.next_version("another", "key") > 102
        assert store.boxes.next_version("hello", "other") > 102

    with_store(place, look)


def test_a_metadata_heap_is_believed_as_far_as_people_signed_it(place, tmp_path):
    files = place.files()
    thief = keys.generate(tmp_path / "thief.pem")
    forged = {"9.main.json": repository.renew(files["1.main.json"], signer=thief, now=NOW)}
    forged |= {"2.root.json": b"{}", "7.targets.json": files["1.main.json"]}
    found = recovery.salvage_metadata(place.first, [forged, files])
    assert {"1.root.json", "1.targets.json", "1.main.json"} <= found.keys()
    assert not found.keys() & forged.keys()
    with pytest.raises(Exception, match="was found"):
        recovery.salvage_metadata(place.first, [forged])


def test_versions_that_a_thief_drove_up_are_not_carried_on(place, tmp_path):
    from tuf.api.metadata import Metadata

    files = place.files()
    for name, role in (("1.snapshot.json", "snapshot"), ("timestamp.json", "timestamp")):
        file = Metadata.from_bytes(files.pop(name))
        file.signed.version = 2**53
        file.sign(keys.load(place.home.keys / f"{role}.pem"))
        files[name if role == "timestamp" else f"{2**53}.snapshot.json"] = file.to_bytes()
    found = recovery.salvage_metadata(place.first, [files])
    assert not [name for name in found if "snapshot" in name or "timestamp" in name]


def test_what_is_not_there_or_not_signed_makes_no_server(place, tmp_path):
    with pytest.raises(RebuildError, match="move it away"):
        recovery.begin(place.path, kept=None, config=None, now=NOW)
    with pytest.raises(RebuildError, match="no rebuild was started"):
        recovery.begun(place.path)
    recovery.backup(place.path, tmp_path / "b.tar")
    place.home.server.rename(tmp_path / "loot")
    event, _ = recovery.begin(place.path, kept=tmp_path / "b.tar", config=None, now=NOW)
    with pytest.raises(RebuildError):
        recovery.finish(place.path, event, place.root(), devices={}, now=NOW)
    assert not place.home.server.exists()
    # beginning again makes other keys: an event of before does not fit them
    again, _ = recovery.begin(place.path, kept=tmp_path / "b.tar", config=None, now=NOW + timedelta(seconds=1))
    with pytest.raises(RebuildError, match="does not name the new keys"):
        recovery.finish(place.path, place.sign(event), place.root(), devices={}, now=NOW)
    assert recovery.finish(place.path, place.sign(again), place.root(), devices={}, now=NOW).devices == 0
    place.home.ca_root.unlink()
    place.home.server.rename(tmp_path / "again")
    with pytest.raises(RebuildError, match="root of the fleet's CA"):
        recovery.begin(place.path, kept=tmp_path / "b.tar", config=None, now=NOW)


def test_a_database_that_is_damaged_makes_no_backup(place, tmp_path):
    place.home.database.write_bytes(b"nonsense" * 1000)
    with pytest.raises(BackupError, match="restore it"):
        recovery.backup(place.path, tmp_path / "b.tar")
    assert not (tmp_path / "b.tar").exists()


def test_a_server_that_was_made_anew_from_an_old_backup_believes_the_clock(place, tmp_path):
    kept = tmp_path / "fleet.tar"
    store = Store.open(place.home.database, fleet="acme")
    store.set_witness((NOW - timedelta(days=400)).timestamp())
    store.close()
    recovery.backup(place.path, kept)
    shutil.rmtree(place.home.server)
    place.rebuilt(kept=kept)
    store = Store.open(place.home.database, fleet="acme")
    assert store.witness(before=NOW.timestamp()) == NOW.timestamp()
    store.close()


def test_a_database_that_is_missing_makes_no_backup_and_no_empty_one(place, tmp_path):
    place.home.database.unlink()
    with pytest.raises(BackupError, match="is missing"):
        recovery.backup(place.path, tmp_path / "fleet.tar")
    assert not place.home.database.exists()
