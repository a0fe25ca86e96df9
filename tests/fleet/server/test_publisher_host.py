"""Snapshot and timestamp on a host of their own: a server without their keys shows what that host verified."""

import asyncio
import contextlib
import shutil
import threading
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from tuf.api.metadata import Metadata

from fleet.admin import signing_host
from fleet.admin.signing_host import PublisherError, SigningHost, make_keys
from fleet.client import AnswerError, Client, ProblemError
from fleet.protocol import codes, operator_api
from fleet.protocol.trust_api import NONE, OnlineRequest, OnlineView
from fleet.server.api import trust
from fleet.server.config import ServerPaths
from fleet.server.service import ServeError, Server
from fleet.server.tuf_repository import OnlineKeys, TufRepository
from signing import events, keys, repository
from signing.events import Document, Event
from signing.rotation import RoleKeys


class Host:
    """A publisher host, and the fleet whose snapshot and timestamp it signs."""

    def __init__(self, fleet):
        self.fleet, self.place = fleet, fleet.directory / "publisher"
        operator = fleet.home / "operator"
        token = (operator / "token").read_text().strip()
        self.client = Client(url=fleet.made.url, ca=operator / "ca.pem", token=token)
        self.root = (operator / "trust" / "1.root.json").read_bytes()
        self.ahead = timedelta()

    def publisher(self):
        clock = lambda: datetime.now(UTC) + self.ahead  # noqa: E731
        return SigningHost(self.place, root=self.root, client=self.client, clock=clock)

    async def step(self, *, wait_s=0):
        return await asyncio.to_thread(self.publisher().step, wait_s=wait_s)

    async def moved(self):
        """Root names this host's keys; the server's own are deleted."""
        made = make_keys(self.place / "keys")
        event = self.signed({role: RoleKeys((key,)) for role, key in made.items()})
        sent = asyncio.create_task(self.fleet.operator.http.post("/v1/signing-events", content=event.encode()))
        await until_signed(self)
        reply = await sent
        assert reply.is_success, reply.text
        for role in made:
            (ServerPaths(self.fleet.home).keys / f"{role}.pem").unlink()
        return self

    def signed(self, roles):
        files = self.files()
        event = events.propose(files, roles=roles, now=datetime.now(UTC))
        return events.sign(files, event, keys.load(self.fleet.home / "operator/keys/root.pem"))

    def files(self):
        return {path.name: path.read_bytes() for path in ServerPaths(self.fleet.home).repository.glob("*.json")}

    async def view(self):
        return await self.fleet.operator.get(OnlineView, "/v1/online")


@pytest.fixture
def story(new_fleet, monkeypatch):
    monkeypatch.setattr(trust, "PATIENCE_S", 60.0)

    @contextlib.asynccontextmanager
    async def run():
        async with new_fleet("embedded") as fleet:
            yield await Host(fleet).moved()

    return run


@pytest.mark.asyncio
async def test_publishing_and_rollouts_go_on_with_the_keys_elsewhere(story):
    async with story() as host:
        fleet = host.fleet
        view = await host.view()
        assert (view.elsewhere, view.waiting) == (True, "")
        # it goes on as a process would: asks, waits, signs
        ending = threading.Event()
        running = asyncio.create_task(asyncio.to_thread(host.publisher().run, stop=ending.is_set))
        device = await fleet.device("gate")
        done = await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0")))
        assert done.state is codes.RolloutState.SUCCEEDED
        assert device.items["hello"].target.endswith("1.0.0.wasm")
        ending.set()
        await fleet.operator.publish("1.0.1")  # wakes it for the last time
        await running
        # a server that restarts needs none of their keys, and knows what it had shown
        await fleet.stop()
        await fleet.start()
        assert (await host.view()).timestamp == view.timestamp + 2
        assert not await host.step(), "there is nothing to sign"
        host.ahead = repository.LIFE["timestamp"] * 0.6
        fleet.server._online._clock = lambda: datetime.now(UTC) + host.ahead
        assert await host.step(), "the timestamp is renewed in time"


@pytest.mark.asyncio
async def test_a_publisher_host_whose_timestamp_is_damaged_takes_the_servers(story):
    async with story() as host:
        (host.place / "repository" / "timestamp.json").write_bytes(b"")
        assert not await host.step(), "there is nothing to sign"
        await asyncio.gather(host.fleet.operator.publish("1.0.0"), until_signed(host))


@pytest.mark.asyncio
async def test_a_server_without_keys_that_lost_its_timestamp_refuses_every_start(story):
    async with story() as host:
        await host.fleet.stop()
        (ServerPaths(host.fleet.home).repository / "timestamp.json").write_bytes(b"")
        for _ in range(2):
            with pytest.raises(ServeError, match="damaged timestamp: restore"):
                await Server(host.fleet.home).start()


@pytest.mark.asyncio
async def test_while_the_publisher_host_is_down_publishing_waits_and_says_so(story, monkeypatch):
    async with story() as host:
        fleet = host.fleet
        monkeypatch.setattr(trust, "PATIENCE_S", 0.1)
        late = keys.load(fleet.home / "operator/keys/main.pem")
        role = repository.renew(repository.latest(host.files(), "main")[1], signer=late, now=datetime.now(UTC))
        problem = await fleet.operator.problem("POST", "/v1/roles/main", role)
        assert (problem.status, problem.type) == (503, "publisher-away")
        assert "fleet publisher run" in problem.action
        status = await fleet.operator.get(operator_api.Status, "/v1/status")
        assert any("waits for the publisher host" in each for each in status.problems)
        assert "2.main.json" not in host.files(), "devices and operators see nothing of it"
        assert (await fleet.operator.http.get("/v1/tuf/2.main.json")).status_code == 404
        # it is kept, over a restart too, and published when the host is back; who asks again is told that it is there
        await fleet.stop()
        await fleet.start()
        assert await host.step()
        assert host.files()["2.main.json"] == role
        assert (await fleet.operator.http.post("/v1/roles/main", content=role)).is_success
        status = await fleet.operator.get(operator_api.Status, "/v1/status")
        assert not any("publisher host" in each for each in status.problems)
        fleet.server._online._clock = lambda: datetime.now(UTC) + repository.LIFE["timestamp"] * 0.9
        assert any("silent" in each for each in fleet.server._online.problems())


@pytest.mark.asyncio
async def test_a_stolen_server_with_its_director_can_have_nothing_signed_that_publishers_did_not_sign(story, tmp_path):
    """The thief has the server: its files, its director's key, and whatever he makes the publisher host see."""

    async with story() as host:
        fleet, server = host.fleet, host.fleet.server._repository
        await asyncio.gather(fleet.operator.publish("1.0.0"), until_signed(host))
        before = host.files()
        thief, files = keys.generate(tmp_path / "thief.pem"), host.files()

        # What he signs himself, what a publisher signed over an older state, and half of a change of keys.
        own = repository.renew(repository.latest(files, "main")[1], signer=thief, now=datetime.now(UTC))
        main = keys.load(fleet.home / "operator/keys/main.pem")
        skipped = repository.renew(
            repository.renew(files["2.main.json"], signer=main, now=datetime.now(UTC)),
            signer=main,
            now=datetime.now(UTC),
        )
        taken_back = repository.renew(
            repository.renew(files["1.main.json"], signer=main, now=datetime.now(UTC)),
            signer=main,
            now=datetime.now(UTC),
        )
        director = keys.load(ServerPaths(fleet.home).keys / "director.pem")
        by_director = repository.renew(files["2.main.json"], signer=director, now=datetime.now(UTC))
        for data in (own, skipped, taken_back, by_director):
            server._waiting = Event("test", (Document("main", data),)).encode()
            with pytest.raises(PublisherError, match=r"nothing was signed|was published|refuse"):
                await host.step()
        server._waiting = b""
        assert host.files() == before
        own_files = {path.name for path in (host.place / "repository").glob("*.main.json")}
        assert own_files == {"1.main.json", "2.main.json"}

        # A snapshot and timestamp of his own making are nobody's.
        forged = Metadata.from_bytes(before["timestamp.json"])
        forged.signed.version += 1
        forged.sign(thief)
        problem = await fleet.operator.problem("POST", "/v1/online", body(forged.to_bytes()))
        assert (problem.status, problem.type) == (422, "unsigned")

        # And the host does not follow a server that is set back: its own memory counts.
        for name in host.files().keys() - {"1.root.json", "2.root.json", "1.targets.json", "1.main.json"}:
            (ServerPaths(fleet.home).repository / name).unlink()
        (ServerPaths(fleet.home).repository / "timestamp.json").write_bytes(b"{}")
        server._files["timestamp.json"] = forged.to_bytes()
        with pytest.raises(PublisherError, match="do not verify"):
            await host.step()


def test_a_host_goes_on_after_an_answer_that_it_cannot_understand(tmp_path, monkeypatch):
    asked = []

    class Gateway:
        def online(self, *, wait_s):
            asked.append(wait_s)
            raise AnswerError("the server answered 200", "which is no answer of a wasmfleet server", "look there")

    monkeypatch.setattr(signing_host, "AWAY_S", 0.0)
    SigningHost(tmp_path, root=b"", client=Gateway()).run(stop=lambda: len(asked) == 3)


async def until_signed(host):
    """Answered by the server as soon as something waits for the host."""
    assert await host.step(wait_s=int(trust.PATIENCE_S))


def body(timestamp, snapshot=None):
    return msgspec.json.encode(
        OnlineRequest(timestamp=msgspec.Raw(timestamp), snapshot=NONE if snapshot is None else msgspec.Raw(snapshot))
    )


@pytest.mark.asyncio
async def test_the_server_takes_only_what_shows_exactly_what_was_published(story):
    async with story() as host:
        fleet = host.fleet
        holder = TufRepository(host.place / "repository", OnlineKeys(host.place / "keys"), signs_online=True)
        snapshot, stamp = (holder._signer(role) for role in ("snapshot", "timestamp"))
        files = host.files()
        number = repository.latest(files, "snapshot")[0]

        def made(change_snapshot=lambda signed: None, change_timestamp=lambda signed: None):
            """A next snapshot and timestamp by the real keys, changed at will."""
            bare = {name: data for name, data in files.items() if name != "timestamp.json"}
            fresh = repository.online(
                bare | {"timestamp.json": files["timestamp.json"]},
                snapshot_signer=snapshot,
                timestamp_signer=stamp,
                now=datetime.now(UTC) + timedelta(days=8),  # so late that a new snapshot is due
            )
            shot = Metadata.from_bytes(fresh[f"{number + 1}.snapshot.json"])
            shot.signed.expires = repository.until(datetime.now(UTC), "snapshot")
            change_snapshot(shot.signed)
            shot.sign(snapshot)
            head = Metadata.from_bytes(fresh["timestamp.json"])
            head.signed.expires = repository.until(datetime.now(UTC), "timestamp")
            data = shot.to_bytes()
            from tests.simulator.repository import promise_snapshot

            promise_snapshot(head.signed, data, shot.signed.version)
            change_timestamp(head.signed)
            head.sign(stamp)
            return head.to_bytes(), data

        def leave_out(signed):
            del signed.meta["main.json"]

        def outlive(signed):
            signed.expires += timedelta(days=30)

        def stay(signed):
            signed.version -= 1

        for bad in (made(leave_out), made(outlive), made(lambda _: None, outlive), made(lambda _: None, stay)):
            problem = await fleet.operator.problem("POST", "/v1/online", body(*bad))
            assert problem.status in {409, 422}, problem
        assert host.files() == files
        head, shot = made()
        # a viewer's token is enough: what is brought counts by its signatures
        reply = await fleet.operator.http.put("/v1/operators/publisher", content=b'{"role":"viewer"}')
        viewer = Client(url=fleet.made.url, ca=fleet.home / "operator/ca.pem", token=reply.json()["token"])
        request = OnlineRequest(timestamp=msgspec.Raw(head), snapshot=msgspec.Raw(shot))
        assert (await asyncio.to_thread(viewer.countersign, request)).snapshot == number + 1
        with pytest.raises(ProblemError, match="is not an admin"):
            await asyncio.to_thread(viewer.discard_waiting)


@pytest.mark.asyncio
async def test_keys_that_nobody_has_are_forgotten_by_an_admins_word(story, monkeypatch, tmp_path):
    async with story() as host:
        monkeypatch.setattr(trust, "PATIENCE_S", 0.1)
        nobody = {role: RoleKeys((keys.generate(tmp_path / role).public_key,)) for role in ("snapshot", "timestamp")}
        event = host.signed(nobody)
        problem = await host.fleet.operator.problem("POST", "/v1/signing-events", event.encode())
        assert problem.type == "publisher-away"
        with pytest.raises(PublisherError, match=r"is not on this server|does not name"):
            await host.step()
        assert (await host.fleet.operator.send(OnlineView, "POST", "/v1/online/discard")).waiting == ""
        assert (await host.fleet.operator.problem("POST", "/v1/online/discard")).status == 409
        shutil.rmtree(host.place / "repository")  # a host that lost its memory begins from the pinned root again
        assert not await host.step()


@pytest.mark.asyncio
async def test_an_event_that_was_published_when_the_power_went_waits_no_more(story, monkeypatch):
    """The power goes between the publication of what waited and the removal of `waiting.json`."""
    async with story() as host:
        fleet = host.fleet
        monkeypatch.setattr(trust, "PATIENCE_S", 0.1)
        key = keys.load(fleet.home / "operator/keys/main.pem")
        role = repository.renew(repository.latest(host.files(), "main")[1], signer=key, now=datetime.now(UTC))
        assert (await fleet.operator.problem("POST", "/v1/roles/main", role)).type == "publisher-away"
        waiting = ServerPaths(fleet.home).repository / "waiting.json"
        left = waiting.read_bytes()
        assert await host.step()
        await fleet.stop()
        waiting.write_bytes(left)
        await fleet.start()
        assert (await host.view()).waiting == ""
        assert not waiting.exists()
        status = await fleet.operator.get(operator_api.Status, "/v1/status")
        assert not any("publisher host" in each for each in status.problems)
