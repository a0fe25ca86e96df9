"""Production mode of a device, and a fleet that moves from development to production."""

import msgspec
import pytest

from agent.identity import identity
from fleet.protocol.codes import RejectCode
from signing import events, repository
from signing.errors import Rejected
from signing.keys import generate
from signing.rotation import RoleKeys, Size
from tests.agent.desired_case import NOW, Case


def move(server, directory):
    """Do as `fleet sign move solo`: new keys for root and targets, new size, signed by the old and new root keys."""
    new = {role: generate(directory / f"{role}-2.pem") for role in ("root", "targets")}
    roles = {role: RoleKeys((key.public_key,)) for role, key in new.items()}
    event = events.propose(server.files, size=Size.SOLO, roles=roles, now=NOW)
    for key in (server.keys["root"], *new.values()):
        event = events.sign(server.files, event, key)
    server.files |= events.apply(server.files, event)
    server.keys |= new
    server.files |= repository.online(
        server.files, snapshot_signer=server.keys["snapshot"], timestamp_signer=server.keys["timestamp"], now=NOW
    )


class Device(Case):
    """Device that enrolled in a development fleet; its owner may have enabled production mode since."""

    def __init__(self, tmp_path, *, production):
        super().__init__(tmp_path)
        self.places = tmp_path / "identity"
        self.places.mkdir()
        (self.places / "enrolled.json").write_bytes(msgspec.json.encode(self.identity))
        self.restart(production=production)

    def restart(self, *, production):
        self.start(
            self.server,
            identity=identity.load(self.places),
            production=production,
            home=self.places,
        )


@pytest.mark.asyncio
async def test_a_device_moves_to_production_with_its_fleet(tmp_path):
    device = Device(tmp_path, production=False)
    await device.judge(device.server.assignment(1))
    assert device.deployer.versions == [1]

    # With production mode enabled, nothing from the development fleet is accepted; running components keep running.
    device.restart(production=True)
    await device.judge(device.server.assignment(2))
    assert device.deployer.versions == [1]
    assert device.codes() == [RejectCode.DEVELOPMENT]
    assert not identity.load(device.places).production

    # The fleet moves: the same device follows the roots, and remembers the move.
    move(device.server, tmp_path)
    await device.judge(device.server.assignment(3))
    assert device.deployer.versions == [1, 3]
    assert identity.load(device.places).production
    device.restart(production=True)
    await device.judge(device.server.assignment(4))
    assert device.deployer.versions == [1, 3, 4]


@pytest.mark.asyncio
async def test_a_production_device_that_was_off_during_the_move_accepts_only_the_new_root(tmp_path):
    device = Device(tmp_path, production=True)
    with pytest.raises(Rejected) as verdict:
        device.trust.refresh()
    assert verdict.value.code is RejectCode.DEVELOPMENT
    old = dict(device.server.files)
    move(device.server, tmp_path)
    await device.judge(device.server.assignment(1))
    assert device.deployer.versions == [1]
    # and an attacker who shows the old root again is detected
    device.server.files = old
    with pytest.raises(Rejected) as verdict:
        device.trust.refresh()
    assert verdict.value.code is RejectCode.ROLLBACK


@pytest.mark.asyncio
async def test_a_device_without_production_mode_follows_the_move_too(tmp_path):
    device = Device(tmp_path, production=False)
    assert not device.trust.refresh().became_production
    move(device.server, tmp_path)
    assert device.trust.refresh().became_production
    assert not device.trust.refresh().became_production, "once"
    await device.judge(device.server.assignment(1))
    assert identity.load(device.places).production
