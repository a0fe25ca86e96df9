"""dev, solo and production on the board's side: its owner says what it demands, signed root says what the fleet is."""

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
    """`fleet sign move solo`: new keys for root and targets, and the size, signed by the old root and the new keys."""
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


class Board(Case):
    """A board that enrolled in a development fleet; its owner may have made it one for production since."""

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
async def test_a_board_of_the_first_day_becomes_one_for_production_with_its_fleet(tmp_path):
    board = Board(tmp_path, production=False)
    await board.judge(board.server.assignment(1))
    assert board.deployer.versions == [1]

    # Its owner demands production: nothing of the development fleet is taken any more, and what runs goes on.
    board.restart(production=True)
    await board.judge(board.server.assignment(2))
    assert board.deployer.versions == [1]
    assert board.codes() == [RejectCode.DEVELOPMENT]
    assert not identity.load(board.places).production

    # The fleet moves: the same board follows the roots, and remembers that it did.
    move(board.server, tmp_path)
    await board.judge(board.server.assignment(3))
    assert board.deployer.versions == [1, 3]
    assert identity.load(board.places).production
    board.restart(production=True)
    await board.judge(board.server.assignment(4))
    assert board.deployer.versions == [1, 3, 4]


@pytest.mark.asyncio
async def test_a_board_in_production_that_slept_through_the_move_refuses_the_old_root_and_takes_the_new(tmp_path):
    board = Board(tmp_path, production=True)
    with pytest.raises(Rejected) as verdict:
        board.trust.refresh()
    assert verdict.value.code is RejectCode.DEVELOPMENT
    old = dict(board.server.files)
    move(board.server, tmp_path)
    await board.judge(board.server.assignment(1))
    assert board.deployer.versions == [1]
    # and who shows it the old root again is found out
    board.server.files = old
    with pytest.raises(Rejected) as verdict:
        board.trust.refresh()
    assert verdict.value.code is RejectCode.ROLLBACK


@pytest.mark.asyncio
async def test_a_board_that_demands_nothing_follows_too_and_remembers(tmp_path):
    board = Board(tmp_path, production=False)
    assert not board.trust.refresh().became_production
    move(board.server, tmp_path)
    assert board.trust.refresh().became_production
    assert not board.trust.refresh().became_production, "once"
    await board.judge(board.server.assignment(1))
    assert identity.load(board.places).production
