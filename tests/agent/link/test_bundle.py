"""Offline bundles: untrusted files, verified as if they had been downloaded."""

import asyncio
import errno
import hashlib
import io
import json
import os
import tarfile
import threading
from datetime import timedelta

import msgspec
import pytest

from agent import disk
from agent.config import Policy
from agent.disk import Write
from agent.link import bundle
from agent.link.bundle import BundleError, BundleSource, BundleVerdict
from agent.link.https import FetchError
from agent.update.receiver import BundleArrived
from fleet.protocol import names as bundle_layout
from fleet.protocol.codes import RejectCode
from signing.errors import Rejected
from tests.agent.desired_case import DEVICE, NOW, Case
from tests.fleet.disk import Medium

HEAD = {"bundle.json": b'{"v":1}'}
MINE = f"desired/{DEVICE}.json"


def tar(files):
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as file:
        for name, data in files.items():
            member = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            if isinstance(data, bytes):
                member.size = len(data)
            file.addfile(member, io.BytesIO(data) if isinstance(data, bytes) else None)
    made.seek(0)
    return made


class Stick:
    """Device without a network, to which a bundle is applied."""

    def __init__(self, tmp_path, *, allowed=True):
        self.case = Case(tmp_path, policy=Policy(bundles=allowed))
        self.directory = tmp_path / "bundle"
        self.offline = BundleSource(self.case.server, self.directory)
        self.case.start(self.offline)

    def files(self, envelope):
        return {**HEAD, MINE: envelope, **{f"tuf/{name}": data for name, data in self.case.server.files.items()}}

    async def put_in(self, files):
        bundle.stage(tar(files), self.directory, device=DEVICE)
        self.case.server.reachable = False
        await self.case.work(BundleArrived())
        return msgspec.json.decode((self.directory / "outcome.json").read_bytes(), type=BundleVerdict)


@pytest.fixture
def stick(tmp_path):
    return Stick(tmp_path)


@pytest.mark.asyncio
async def test_a_bundle_is_accepted_without_a_network_and_reported_as_such(stick):
    outcome = await stick.put_in(stick.files(stick.case.server.assignment(3)))
    assert outcome == BundleVerdict(version=3)
    assert stick.case.deployer.versions == [3]
    assert stick.case.store.counter("accepted") == 3
    [report] = stick.case.store.history()
    assert "came in a bundle: it is not proved to be current" in report.message
    # It is verified once: the next start of the agent does not find it again.
    await stick.case.work(BundleArrived())
    assert stick.case.deployer.versions == [3]


@pytest.mark.asyncio
async def test_bundles_are_refused_unless_the_owner_allows_them(tmp_path):
    stick = Stick(tmp_path, allowed=False)
    outcome = await stick.put_in(stick.files(stick.case.server.assignment(3)))
    assert outcome.code == RejectCode.FREEZE
    assert "[policy] bundles" in outcome.message
    assert stick.case.deployer.versions == []
    assert stick.case.store.counter("accepted") == 0


def flipped(stick):
    files = stick.files(stick.case.server.assignment(6))
    files["tuf/timestamp.json"] = files["tuf/timestamp.json"].replace(b'"version":1', b'"version":2')
    return files


def without(stick):
    files = stick.files(stick.case.server.assignment(6))
    return {name: data for name, data in files.items() if "snapshot" not in name}


def rolled_back(stick):
    """Combine yesterday's metadata with today's assignment."""
    files = stick.files(stick.case.server.assignment(6))
    stick.case.server.publish(b"bytes")
    stick.case.trust.refresh()
    return files


def slept(stick, monkeypatch, **after):
    """Advance the device's clock while the bundle stays the same."""
    later = NOW + timedelta(**after)
    monkeypatch.setattr(stick.case.trust, "now", lambda: later)


@pytest.mark.asyncio
async def test_an_expired_bundle_is_refused_unless_the_owner_allows_late_bundles(tmp_path, monkeypatch):
    stick = Stick(tmp_path)
    files = stick.files(stick.case.server.assignment(3, expires=NOW + timedelta(days=30)))
    slept(stick, monkeypatch, days=16)  # past timestamp (2 days) and snapshot (14)
    assert (await stick.put_in(files)).code == RejectCode.EXPIRED
    assert stick.case.deployer.versions == []

    stick.case.trust._late = True
    assert await stick.put_in(files) == BundleVerdict(version=3)
    assert stick.case.deployer.versions == [3]
    assert "came in a bundle whose metadata ended on" in stick.case.store.history()[-1].message
    # A restarted agent still finds the files of the accepted assignment.
    stick.case.trust._refreshed = False
    item = stick.case.server.publish(b"bytes").item  # only in the network, which is unavailable
    with pytest.raises(Rejected) as verdict:
        stick.case.trust.resolve(item)
    assert verdict.value.code is RejectCode.UNKNOWN_TARGET


LATE = [
    ("past the assignment's own end", {"expires": NOW + timedelta(days=10)}, {"days": 11}, RejectCode.EXPIRED),
    ("past what people signed", {"expires": NOW + timedelta(days=999)}, {"days": 366}, RejectCode.EXPIRED),
    ("older than what was accepted", {"version": 1}, {"days": 3}, RejectCode.ROLLBACK),
]


@pytest.mark.asyncio
@pytest.mark.parametrize(("what", "fields", "after", "code"), LATE, ids=[row[0] for row in LATE])
async def test_a_late_bundle_is_verified_like_others_except_for_its_timestamp(
    tmp_path, monkeypatch, what, fields, after, code
):
    stick = Stick(tmp_path)
    stick.case.trust._late = True
    await stick.case.judge(stick.case.server.assignment(2))
    version = fields.pop("version", 3)
    files = stick.files(stick.case.server.assignment(version, **{"expires": NOW + timedelta(days=30)} | fields))
    slept(stick, monkeypatch, **after)
    assert (await stick.put_in(files)).code == code, what
    assert stick.case.store.counter("accepted") == 2


@pytest.mark.asyncio
async def test_expired_metadata_from_the_network_is_refused_even_with_late_bundles(tmp_path, monkeypatch):
    stick = Stick(tmp_path)
    stick.case.trust._late = True
    slept(stick, monkeypatch, days=3)
    await stick.case.judge(stick.case.server.assignment(3))
    assert stick.case.deployer.versions == []
    assert stick.case.codes() == [RejectCode.EXPIRED]


ATTACKS = [
    ("an older assignment", lambda s: s.files(s.case.server.assignment(4)), RejectCode.ROLLBACK),
    ("another device's", lambda s: s.files(s.case.server.assignment(6, device="lift-0a1b2c3d")), "wrong-device"),
    ("another fleet's", lambda s: s.files(s.case.server.assignment(6, fleet="pirates")), RejectCode.WRONG_FLEET),
    ("one that a publisher signed", lambda s: s.files(s.case.server.assignment(6, signer="main")), "unsigned"),
    (
        "one past its date",
        lambda s: s.files(
            s.case.server.assignment(6, issued=NOW - timedelta(hours=2), expires=NOW - timedelta(hours=1))
        ),
        RejectCode.EXPIRED,
    ),
    ("metadata with a bad signature", flipped, RejectCode.UNSIGNED),
    ("metadata of yesterday", rolled_back, RejectCode.ROLLBACK),
]


@pytest.mark.asyncio
@pytest.mark.parametrize(("what", "attack", "code"), ATTACKS, ids=[row[0] for row in ATTACKS])
async def test_a_bundle_is_verified_like_downloads(stick, what, attack, code):
    await stick.case.judge(stick.case.server.assignment(5))
    before = list(stick.case.deployer.versions)
    assert (await stick.put_in(attack(stick))).code == code, what
    assert stick.case.deployer.versions[len(before) :] in ([], [5]), "nothing of the bundle is acted on"
    assert stick.case.store.counter("accepted") == 5


@pytest.mark.asyncio
async def test_a_bundle_that_vanishes_while_it_is_read_does_not_end_the_agent(stick):
    (stick.directory / "desired").mkdir(parents=True)
    (stick.directory / MINE).symlink_to("gone")  # listed, and not there when it is opened
    await stick.case.work(BundleArrived())
    assert stick.case.codes() == []


@pytest.mark.asyncio
async def test_a_bundle_without_metadata_is_refused_at_once(stick):
    assert (await stick.put_in(without(stick))).code
    assert stick.case.deployer.versions == []


def link(name):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
    return member


BAD = [
    ("nothing", {}, "not a bundle"),
    ("no head", {MINE: b"{}"}, "not a bundle"),
    ("a later layout", {"bundle.json": b'{"v":2}', MINE: b"{}"}, "upgrade"),
    ("nothing for this device", {**HEAD, "desired/lift-0a1b2c3d.json": b"{}"}, "nothing for"),
    ("a way out", {**HEAD, "../../etc/cron.d/x": b"x"}, "unexpected file"),
    ("a way out behind a good name", {**HEAD, "tuf/../../x.json": b"x"}, "unexpected file"),
    ("an absolute name", {**HEAD, "/etc/x": b"x"}, "unexpected file"),
    ("a symbolic link", {**HEAD, "tuf/timestamp.json": link("tuf/timestamp.json")}, "unexpected file"),
    ("too large a head", {"bundle.json": b" " * 2000}, "at most"),
]


@pytest.mark.parametrize(("what", "files", "words"), BAD, ids=[row[0] for row in BAD])
def test_a_file_that_is_not_a_bundle_changes_nothing(tmp_path, what, files, words):
    directory = tmp_path / "state" / "bundle"
    directory.mkdir(parents=True)
    (directory / "kept").touch()
    with pytest.raises(BundleError, match=words):
        bundle.stage(tar(files), directory, device=DEVICE)
    assert (directory / "kept").exists(), what
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]


def test_a_bundle_is_on_the_medium_and_so_are_its_names(stick, tmp_path, monkeypatch):
    whole = tar(stick.files(stick.case.server.assignment(3)))
    medium = Medium(monkeypatch, tree=tmp_path / "new")
    bundle.stage(whole, tmp_path / "new", device=DEVICE)
    assert (medium.torn, medium.at_risk, medium.unsynced) == ([], [], [])


@pytest.mark.parametrize("data", [b"", b"x" * 2000, json.dumps(HEAD, default=str).encode()])
def test_data_that_is_not_a_tar_is_refused(tmp_path, data):
    with pytest.raises(BundleError):
        bundle.stage(io.BytesIO(data), tmp_path / "bundle", device=DEVICE)


def test_a_torn_bundle(stick, tmp_path):
    whole = tar(stick.files(stick.case.server.assignment(3))).getvalue()
    for size in range(0, len(whole) - 10_240, 1500):
        with pytest.raises(BundleError):
            bundle.stage(io.BytesIO(whole[:size]), tmp_path / "torn", device=DEVICE)


def test_a_component_in_the_bundle_is_hashed_and_not_downloaded(stick, tmp_path):
    data = b"a component"
    sha256 = hashlib.sha256(data).hexdigest()
    kept, into = stick.directory / "artifacts" / sha256, tmp_path / "artifacts" / f"{sha256}.wasm"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"something else")
    with pytest.raises(FetchError) as error:
        stick.offline.download(f"/v1/artifacts/{sha256}", into, length=len(data), sha256=sha256)
    assert error.value.code is RejectCode.HASH_MISMATCH
    assert not into.exists()
    kept.write_bytes(data)
    stick.offline.download(f"/v1/artifacts/{sha256}", into, length=len(data), sha256=sha256)
    assert into.read_bytes() == data
    assert not kept.exists(), "it lies on the disk once"


def test_wake_notifies_a_running_agent_and_detects_a_missing_one(tmp_path):
    path = tmp_path / "wake"
    assert not bundle.wake(path)
    descriptor = bundle.listen(path)
    assert bundle.wake(path)
    assert os.read(descriptor, 10) == b"b"
    os.close(descriptor)
    assert not bundle.wake(path)


@pytest.mark.parametrize("name", ["timestamp.json", "1.root.json", "12.main.json", "3.main.bins-0f.json"])
def test_every_file_of_a_repository_may_be_in_a_bundle(name):
    assert bundle_layout.max_bytes(bundle_layout.metadata(name))


class HeldVerdict:
    """Verification of a bundle on the database thread, paused once it has read the bundle's metadata."""

    def __init__(self, stick):
        self._envelope, self.begun, self.go_on = stick.case.store.envelope, threading.Event(), threading.Event()
        stick.case.store.envelope = self.envelope  # the last step of the verification before its result is stored
        self.outcome = None
        self.thread = threading.Thread(target=self._judge, args=(stick,))

    def envelope(self):
        self.begun.set()
        assert self.go_on.wait(60)
        return self._envelope()

    def _judge(self, stick):
        with asyncio.Runner() as runner:  # on a thread of its own
            self.outcome = runner.run(stick.put_in(stick.files(stick.case.server.assignment(3))))

    def __enter__(self):
        self.thread.start()
        assert self.begun.wait(60)
        return self

    def __exit__(self, *_):
        self.go_on.set()
        self.thread.join()


class Network:
    """Server with artifacts, boxes and metadata."""

    def __init__(self, kit, case):
        self.server, self.download, self.files = kit.server, kit.server.download, case.server.files

    def request(self, method, path, *, max_bytes, body=None, headers=None):
        if path.startswith("/v1/secrets/"):
            return self.server.request(method, path, max_bytes=max_bytes)
        return self.files[path.rpartition("/")[2]] if path.startswith("/v1/tuf/") else path.encode()


@pytest.mark.asyncio
async def test_other_fetches_use_the_network_while_a_bundle_is_verified(kit, tmp_path):
    (tmp_path / "stick").mkdir()
    stick = Stick(tmp_path / "stick")
    stick.offline._https = Network(kit, stick.case)
    ref = kit.seal("correct horse battery staple")

    async def install():
        await kit.boot()
        kit.carrier._https = stick.offline
        await kit.run(kit.assignment(1, msgspec.structs.replace(kit.publish("1.0.0"), secrets=(ref,))))
        await kit.pull_plug()

    with HeldVerdict(stick) as verdict:
        stick.case.server.files["timestamp.json"] = b"newer than the bundle's"
        fetched = {
            path: stick.offline.request("GET", path, max_bytes=100_000)
            for path in ("/v1/desired?nonce=1", "/v1/tuf/timestamp.json")
        }
        await install()
        assert verdict.outcome is None, "the bundle is judged still"
    assert fetched == {
        "/v1/desired?nonce=1": b"/v1/desired?nonce=1",
        "/v1/tuf/timestamp.json": b"newer than the bundle's",
    }
    assert kit.chain()[-1] == "committed", "a secret that is not in the bundle comes from the network"
    assert verdict.outcome == BundleVerdict(version=3)


@pytest.mark.asyncio
async def test_a_bundle_is_verified_with_only_its_own_files(stick):
    files = stick.files(stick.case.server.assignment(3))
    snapshot = next(name for name in files if name.endswith(".snapshot.json"))
    asked = []
    request = stick.case.server.request

    def note(method, path, **more):
        asked.append(path)
        return request(method, path, **more)

    stick.case.server.request = note
    torn = {name: data for name, data in files.items() if name != snapshot}
    assert (await stick.put_in(torn)).code == RejectCode.NOT_FOUND
    assert await stick.put_in(files) == BundleVerdict(version=3)
    assert asked == []


def test_data_of_a_bundle_comes_to_another_file_system(tmp_path, monkeypatch):
    """Packaged agents keep data packages in a directory that is a mount of its own: a file cannot be moved there."""
    data = b"weights"
    sha256 = hashlib.sha256(data).hexdigest()
    kept = tmp_path / "bundle" / "artifacts" / sha256
    kept.parent.mkdir(parents=True)
    kept.write_bytes(data)

    def elsewhere(_what, source, _target):
        raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))

    moved = disk.move
    monkeypatch.setattr(
        disk, "move", lambda what, *paths: (elsewhere if what is Write.BUNDLE_ARTIFACT else moved)(what, *paths)
    )
    source = BundleSource(None, tmp_path / "bundle")
    source.download(f"/v1/artifacts/{sha256}", tmp_path / "packages" / "m", length=len(data), sha256=sha256)
    assert (tmp_path / "packages" / "m").read_bytes() == data
