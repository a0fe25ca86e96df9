"""`fleet ca offline`: the root of a development fleet's CA leaves its server, and no device is enrolled again."""

import asyncio

import pytest
from click.testing import CliRunner
from cryptography import x509

from fleet import ca
from fleet.ca import CaError, private_pem
from fleet.cli.main import main
from fleet.protocol.trust_api import CaView
from fleet.server.config import ServerPaths
from tests.fleet.server.device_requests import ask

PASSPHRASE = "correct horse"


async def command(fleet, *words):
    """`fleet ...` on this home, beside the server that runs."""
    done = await asyncio.to_thread(CliRunner().invoke, main, ["--home", str(fleet.home), *words])
    assert "Traceback" not in done.output
    return done


@pytest.fixture
def passphrase(monkeypatch):
    monkeypatch.setenv("WASMFLEET_KEY_PASSPHRASE", PASSPHRASE)
    monkeypatch.setattr(ca, "_ROUNDS", 1000)  # opening keys is not what is tested here


@pytest.mark.usefixtures("passphrase")
@pytest.mark.asyncio
async def test_the_root_is_taken_off_a_server_that_runs_and_its_devices_notice_nothing(new_fleet):
    async with new_fleet("embedded") as fleet:
        place = ServerPaths(fleet.home)
        device = await fleet.device("gate")
        key = private_pem(fleet.server._ca._key).splitlines()[1]
        assert (await command(fleet, "ca", "renew", "--yes")).exit_code == 2, "there is no issuing CA yet"

        done = await command(fleet, "ca", "offline", "--yes")
        assert done.exit_code == 0, done.output
        assert f"is now encrypted in {place.ca_root}" in done.stdout
        assert not (place.ca / "ca.key").exists()
        for path in (each for each in fleet.home.rglob("*") if each.is_file()):
            assert key not in path.read_bytes(), path
        root = ca.open_root(place.ca_root, place.operator / "ca.pem", PASSPHRASE.encode())
        with pytest.raises(CaError, match="passphrase is wrong"):
            ca.open_root(place.ca_root, place.operator / "ca.pem", b"wrong horse")

        # What the root had issued counts until it ends; what is issued now hangs below the issuing CA.
        assert (await ask(device)).status_code == 200
        view = await fleet.operator.get(CaView, "/v1/ca")
        assert not view.root_on_server
        other = await fleet.device("lift")
        assert other.enrolled.ca_pem == device.enrolled.ca_pem
        leaf = x509.load_pem_x509_certificate(other.enrolled.certificate_pem.encode())
        assert leaf.issuer.rfc4514_string() == view.issuers[0].name != root.certificate.subject.rfc4514_string()
        assert (await command(fleet, "ca", "status")).exit_code == 0
        assert (await command(fleet, "ca", "renew", "--yes")).exit_code == 0

        # Once is enough, and a server that starts again has nothing to look for.
        again = await command(fleet, "ca", "offline", "--yes")
        assert again.exit_code == 2
        assert "cannot take the root of the CA off the server" in again.stderr
        await fleet.stop()
        await fleet.start()
        assert (await ask(device)).status_code == 200


@pytest.mark.usefixtures("passphrase")
@pytest.mark.asyncio
async def test_who_says_no_or_has_another_root_here_has_changed_nothing(new_fleet):
    async with new_fleet("embedded") as fleet:
        place = ServerPaths(fleet.home)
        before = (place.ca / "ca.key").read_bytes()
        refused = await command(fleet, "ca", "offline")  # nobody answers the question
        assert refused.exit_code != 0
        assert not place.ca_root.exists()
        place.ca_root.write_bytes(b"another fleet's")
        refused = await command(fleet, "ca", "offline", "--yes")
        assert refused.exit_code == 2
        assert "a key is never overwritten" in refused.stderr
        assert place.ca_root.read_bytes() == b"another fleet's"
        assert (place.ca / "ca.key").read_bytes() == before
        assert (await fleet.operator.get(CaView, "/v1/ca")).root_on_server
