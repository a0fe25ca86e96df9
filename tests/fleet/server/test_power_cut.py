"""What the server has acknowledged is on the medium: a power cut afterwards brings no older file back."""

import hashlib
import sqlite3
from datetime import UTC, datetime, timedelta

import pytest

from fleet import ca
from fleet.admin.bootstrap import init
from fleet.admin.recovery import backup
from fleet.ca import CertificateAuthority
from fleet.server import listener
from fleet.server.api.publishing import Artifacts
from fleet.server.clock import ServerClock
from fleet.server.config import ServerPaths
from fleet.server.listener import Certificates
from fleet.server.tuf_repository import OnlineKeys, TufRepository
from tests.fleet.disk import Medium

NOW = datetime(2030, 1, 2, tzinfo=UTC)


@pytest.fixture(scope="module")
def solo(tmp_path_factory):
    home = tmp_path_factory.mktemp("power") / "home"
    init(home, fleet="test", size="solo", passphrase=b"correct horse", operators_port=1, now=NOW)
    return ServerPaths(home)


@pytest.fixture
def medium(monkeypatch, request, tmp_path):
    tree = request.getfixturevalue("solo").server if "solo" in request.fixturenames else tmp_path
    return Medium(monkeypatch, tree)


def assert_survives(medium):
    assert (medium.torn, medium.at_risk, medium.unsynced) == ([], [], [])


def test_a_fleet_that_was_made(medium, tmp_path):
    init(tmp_path / "home", fleet="test", size="dev", passphrase=None, operators_port=1, now=NOW)
    assert_survives(medium)


def test_metadata_that_was_signed_anew(solo, medium):
    repository = TufRepository(solo.repository, OnlineKeys(solo.keys))
    before = repository.file("timestamp.json")
    repository.sign_online(now=NOW + timedelta(days=1))
    assert repository.file("timestamp.json") != before
    assert_survives(medium)


def test_an_issuing_ca_that_was_installed(solo, medium):
    root = ca.open_root(solo.ca_root, solo.ca / "ca.pem", b"correct horse")
    made = ca.install(solo.ca, ca.sign(root, ca.request(solo.ca, ("localhost",)), now=NOW), now=NOW)
    assert CertificateAuthority.load(solo.ca).issuer == made
    assert_survives(medium)


def test_certificates_of_the_listeners(solo, medium):
    issuing = CertificateAuthority.load(solo.ca)
    Certificates(solo, issuing, "localhost", ServerClock(lambda: NOW + timedelta(minutes=1)))
    assert (solo.tls / "server.pem").exists()
    assert_survives(medium)


@pytest.mark.asyncio
async def test_an_artifact_that_was_uploaded(medium, tmp_path):
    async def chunks():
        yield b"artifact"

    await Artifacts(tmp_path).store(hashlib.sha256(b"artifact").hexdigest(), chunks())
    assert_survives(medium)


def test_a_backup(solo, medium, tmp_path):
    backup(solo.root, tmp_path / "backup.tar")
    assert sqlite3.connect(solo.database).execute("PRAGMA quick_check").fetchone() == ("ok",)
    assert_survives(medium)


# Pairs of files that must match ---------------------------------------------------------------------------------------


class PowerCutError(Exception):
    """The power is gone."""


def cut_at(monkeypatch, module, name, file):
    """From the first write to a file on nothing is written."""
    real = getattr(module, name)

    def write(*args, **kwargs):
        if any(getattr(each, "name", "") == file for each in args):
            raise PowerCutError
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, write)


@pytest.mark.parametrize(
    ("function", "file"),
    [("atomic_write", "issuing.pem"), ("move_into_place", "issuing.key")],
)
def test_an_issuing_ca_whose_installation_was_cut_short(solo, monkeypatch, function, file):
    root = ca.open_root(solo.ca_root, solo.ca / "ca.pem", b"correct horse")
    old = CertificateAuthority.load(solo.ca).issuer
    signed = ca.sign(root, ca.request(solo.ca, ("localhost",)), now=NOW)
    with monkeypatch.context() as power:
        cut_at(power, ca, function, file)
        with pytest.raises(PowerCutError):
            ca.install(solo.ca, signed, now=NOW)
    now = CertificateAuthority.load(solo.ca)
    assert (now.issuer == old) == (file == "issuing.pem")
    now.server(["localhost"], now=NOW)


def test_a_certificate_of_a_listener_whose_renewal_was_cut_short(solo, monkeypatch):
    issuing = CertificateAuthority.load(solo.ca)
    Certificates(solo, issuing, "localhost", ServerClock(lambda: NOW + timedelta(minutes=1)))
    later = NOW + timedelta(days=80)
    with monkeypatch.context() as power:
        cut_at(power, listener, "atomic_write", "server.pem")
        with pytest.raises(PowerCutError):
            Certificates(solo, issuing, "localhost", ServerClock(lambda: later))
    Certificates(solo, issuing, "localhost", ServerClock(lambda: later)).context(devices=False)
