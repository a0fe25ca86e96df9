"""Root and targets change under a running server and connected devices: no restart, no device enrolled again."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from fleet.protocol import codes
from fleet.server.config import ServerPaths
from signing import events, keys, repository, rotation
from signing.events import Document, Event
from signing.rotation import Namespace, RoleKeys


def repository_files(home: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in ServerPaths(home).repository.iterdir()}


def propose(home: Path, role: str, path: Path) -> Event:
    """Another key for an online role, signed by root or targets."""
    files, now = repository_files(home), datetime.now(UTC)
    new = RoleKeys((keys.generate(path).public_key,))
    owner = "targets" if role == "director" else "root"
    if role == "director":
        draft = rotation.propose_targets(files, director=new, now=now)
    else:
        draft = rotation.propose_root(files, roles={role: new}, now=now)
    event = Event("test", (Document(owner, draft),))
    return events.sign(files, event, keys.load(home / "operator" / "keys" / f"{owner}.pem"))


@pytest.mark.parametrize("role", ["director", "snapshot", "timestamp"])
@pytest.mark.asyncio
async def test_an_online_key_is_replaced_under_a_connected_device(new_fleet, role: str) -> None:
    async with new_fleet("embedded") as fleet:
        device = await fleet.device("gate")
        await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0")))
        told = len(device.accepted)

        # A root that names a key which the server does not have is refused, before it shuts the devices out.
        elsewhere = propose(fleet.home, role, fleet.directory / "elsewhere.pem")
        problem = await fleet.operator.problem("POST", "/v1/signing-events", elsewhere.encode())
        assert problem.status == 422
        assert f"fleet keys rotate {role}" in problem.title

        event = propose(fleet.home, role, ServerPaths(fleet.home).keys / f"{role}-2.pem")
        reply = await fleet.operator.http.post("/v1/signing-events", content=event.encode())
        assert reply.status_code == 201, reply.text
        if role == "director":
            # what the old key signed counts for nothing: the server signs every assignment anew by itself
            await device.until(lambda each: len(each.accepted) > told)
        else:
            (ServerPaths(fleet.home).keys / f"{role}.pem").unlink()
        view = await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("2.0.0")))
        assert view.state is codes.RolloutState.SUCCEEDED
        # and it comes up again with what it has now
        await fleet.stop()
        await fleet.start()


@pytest.mark.asyncio
async def test_a_namespace_is_added_and_begun_later_by_its_publisher(new_fleet) -> None:
    async with new_fleet("embedded") as fleet:
        files, now = repository_files(fleet.home), datetime.now(UTC)
        publisher = keys.generate(fleet.directory / "publisher.pem")
        space = Namespace(RoleKeys((publisher.public_key,)))
        draft = rotation.propose_targets(files, namespaces={"extra": space}, now=now)
        targets = keys.load(fleet.home / "operator" / "keys" / "targets.pem")
        event = events.sign(files, Event("test", (Document("targets", draft),)), targets)
        assert (await fleet.operator.http.post("/v1/signing-events", content=event.encode())).is_success
        # until then nothing waits for it: what is there is served, published and signed as before
        assert (await fleet.operator.http.get("/v1/status")).is_success
        await fleet.operator.publish("1.0.0")
        first = repository.new_role(signer=publisher, now=now)
        assert (await fleet.operator.http.post("/v1/roles/extra", content=first)).is_success


@pytest.mark.asyncio
async def test_a_namespace_moves_into_hash_bins_under_a_connected_device(new_fleet) -> None:
    async with new_fleet("embedded") as fleet:
        await fleet.device("gate")
        first = await fleet.operator.publish("1.0.0")
        key = keys.load(fleet.home / "operator" / "keys" / "main.pem")
        files = repository_files(fleet.home)
        event = events.sign(files, events.propose_bins(files, "main", now=datetime.now(UTC), bits=4), key)
        reply = await fleet.operator.http.post("/v1/signing-events", content=event.encode())
        assert reply.status_code == 201, reply.text
        view = await fleet.operator.decided(await fleet.operator.deploy(first))
        assert view.state is codes.RolloutState.SUCCEEDED
        # and the server reads its bins when it comes up again
        await fleet.stop()
        await fleet.start()
        assert fleet.server._repository.release(first) is not None
        late = repository.renew(repository.latest(files, "main")[1], signer=key, now=datetime.now(UTC))
        problem = await fleet.operator.problem("POST", "/v1/roles/main", late)
        assert problem.status == 409


@pytest.mark.asyncio
async def test_what_is_not_signed_by_enough_changes_nothing(new_fleet) -> None:
    async with new_fleet("embedded") as fleet:
        files = repository_files(fleet.home)
        draft = rotation.propose_root(files, now=datetime.now(UTC))
        problem = await fleet.operator.problem(
            "POST", "/v1/signing-events", Event("test", (Document("root", draft),)).encode()
        )
        assert (problem.status, problem.type) == (422, "unsigned")
        assert (await fleet.operator.problem("POST", "/v1/signing-events", b"{}")).status == 422
        assert repository_files(fleet.home).keys() == files.keys()


@pytest.mark.asyncio
async def test_of_two_people_at_once_the_second_is_told_so(new_fleet) -> None:
    async with new_fleet("embedded") as fleet:
        first = propose(fleet.home, "timestamp", ServerPaths(fleet.home).keys / "timestamp-2.pem")
        second = propose(fleet.home, "timestamp", ServerPaths(fleet.home).keys / "timestamp-3.pem")
        for _ in range(2):  # sending the same again does no harm
            assert (await fleet.operator.http.post("/v1/signing-events", content=first.encode())).is_success
        problem = await fleet.operator.problem("POST", "/v1/signing-events", second.encode())
        assert (problem.status, problem.type) == (409, "conflict")
        assert repository.latest(repository_files(fleet.home), "root")[0] == 2
