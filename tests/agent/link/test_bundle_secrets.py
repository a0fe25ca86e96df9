"""Secrets in a bundle: the device takes its own boxes, and verifies them like downloaded ones."""

import contextlib
import io
import tarfile

import msgspec
import pytest

from agent.link import bundle
from agent.link.bundle import BundleSource
from agent.link.https import FetchError
from fleet.protocol import names as layout
from fleet.protocol.codes import RejectCode
from signing import director, keys

DEVICE = "device-01234567"
PASSWORD = "correct horse battery staple"
NEWER = "a password of today"


class Away:
    """Unavailable network."""

    def request(self, _method, path, *, max_bytes, body=None, headers=None):
        raise FetchError(RejectCode.UNREACHABLE, f"no route to {path}")

    def download(self, path, _into, *, length, sha256, progress, cancelled):
        raise FetchError(RejectCode.UNREACHABLE, f"no route to {path}")


class Stick:
    """Bundle with an assignment and its files, and with files of another device."""

    def __init__(self, kit, tmp_path):
        self.kit, self.directory = kit, kit.places.state / "bundle"
        self.director = keys.generate(tmp_path / "director.pem")
        self.others = kit.seal(PASSWORD, device="other-76543210").sha256

    def put_in(self, assignment, boxes):
        """Stage the bundle, and make the network unavailable."""
        envelope = director.sign_assignment(assignment, self.director)
        files = {"bundle.json": b'{"v":1}', layout.desired(DEVICE): envelope}
        files |= {layout.artifact(name): data for name, data in self.kit.server.artifacts.items()}
        files |= {layout.secret(name): data for name, data in boxes.items()}
        made = io.BytesIO()
        with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        made.seek(0)
        bundle.stage(made, self.directory, device=DEVICE)
        self.kit.carrier._https = BundleSource(Away(), self.directory)

    def boxes(self):
        """Return every box on the server."""
        return {path.rpartition("/")[2]: data for path, data in self.kit.server.boxes.items()}


@pytest.fixture
def stick(kit, tmp_path):
    return Stick(kit, tmp_path)


def with_secret(kit, version, ref):
    return msgspec.structs.replace(kit.publish(version), secrets=(ref,))


def given(kit):
    return kit.host.entrusted["web", kit.host.running["web"].generation]


@contextlib.asynccontextmanager
async def a_device(kit):
    await kit.boot()
    await kit.run(kit.assignment(1, with_secret(kit, "1.0.0", kit.seal(PASSWORD))))
    assert given(kit) == {"key": PASSWORD}
    yield
    await kit.pull_plug()


@pytest.mark.asyncio
async def test_a_rotated_secret_is_delivered_in_a_bundle(kit, stick):
    async with a_device(kit):
        newer = kit.seal(NEWER, version=2)
        assignment = kit.assignment(2, with_secret(kit, "1.0.1", newer))
        stick.put_in(assignment, stick.boxes())
        laid_out = {path.name for path in (stick.directory / "secrets").iterdir()}
        assert laid_out == {newer.sha256}, "nothing of other devices, and nothing that the assignment does not name"
        await kit.run(assignment)
        assert kit.chain()[-1] == "committed"
        assert given(kit) == {"key": NEWER}
        assert kit.store.facts().secrets == {"web/key": 2}
        for path in (each for each in kit.places.state.rglob("*") if each.is_file()):
            assert NEWER.encode() not in path.read_bytes(), path


def changed(stick, ref):
    box = stick.boxes()[ref.sha256]
    return stick.boxes() | {ref.sha256: box[:-1] + bytes([box[-1] ^ 1])}


def exchanged(stick, ref):
    """Put another device's box under this device's name."""
    return stick.boxes() | {ref.sha256: stick.boxes()[stick.others]}


def left_out(stick, ref):
    return {name: data for name, data in stick.boxes().items() if name != ref.sha256}


@pytest.mark.parametrize(
    ("attack", "code"),
    [(changed, RejectCode.HASH_MISMATCH), (exchanged, RejectCode.HASH_MISMATCH), (left_out, None)],
)
@pytest.mark.asyncio
async def test_a_bad_box_in_a_bundle_is_refused_and_the_component_keeps_running(kit, stick, attack, code):
    async with a_device(kit):
        before = kit.host.running["web"].generation
        newer = kit.seal(NEWER, version=2)
        assignment = kit.assignment(2, with_secret(kit, "1.0.1", newer))
        stick.put_in(assignment, attack(stick, newer))
        await kit.deployer.desire(assignment)
        if code is None:  # a group's bundle has no boxes: the device waits for the network
            await kit.until(lambda: RejectCode.UNREACHABLE in [each.code for each in kit.reports()], "a try")
        else:
            await kit.settled()
            assert (kit.reports()[-1].phase, kit.reports()[-1].code) == ("failed", code)
        assert kit.host.running["web"].generation == before
        assert given(kit) == {"key": PASSWORD}
