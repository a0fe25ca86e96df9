"""Documents, files and messages of programs before 0.2.0 are read under the words of today.

The recordings in this folder are of the last version that said `share_lane`, `lanes` and `shared_lane`, and stay
unchanged.
"""

import contextlib
import json
import sqlite3
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from agent.host.ipc import framing, host_api, worker_api
from agent.update.restore import read_runset
from agent.update.state import item_key
from agent.update.store import Store as DeviceStore
from fleet.cli import base
from fleet.protocol import wire
from fleet.protocol.assignment import Assignment, Item
from fleet.protocol.messages import Health
from fleet.protocol.operator_api import RolloutRequest
from fleet.rollout.model import Value
from fleet.server.director import _asked
from fleet.store.store import Store as ServerStore
from signing import dsse
from tests.simulator.repository import Device, Repository

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def earlier():
    return json.loads((HERE / "device.json").read_text())


def restored(name, path):
    """A database as the earlier program left it."""
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript((HERE / name).read_text())
    path.chmod(0o600)
    return path


def device(earlier):
    """A device that sees the metadata of the earlier repository."""
    repo = Repository(fleet=earlier["fleet"])
    repo.files = {name: text.encode() for name, text in earlier["metadata"].items()}
    repo.pinned = earlier["root"].encode()
    return Device(repo, device=earlier["device"])


# -- the device


def test_a_signed_assignment_verifies_and_its_bytes_stay_what_they_were(earlier):
    envelope = earlier["envelope"].encode()
    assert b"share_worker" not in dsse.parse(envelope).payload
    accepted = device(earlier).accept(envelope)
    shared, alone = accepted.assignment.items
    assert (shared.instance, shared.share_worker, alone.share_worker) == ("hello", True, False)
    assert alone.config == {"share_lane": "a key of the component"}
    assert accepted.sha256 == earlier["payload_sha256"]


def test_a_signed_assignment_asks_for_what_the_same_one_asks_for_today(earlier):
    then = wire.decode(Assignment, dsse.parse(earlier["envelope"].encode()).payload)
    now = wire.decode(Assignment, wire.encode(then))
    assert then == now
    assert all(one.same_as(other) for one, other in zip(then.items, now.items, strict=True))
    assert not then.items[0].same_as(msgspec.structs.replace(then.items[0], share_worker=False))


def test_the_director_names_a_shared_worker_for_earlier_agents_too():
    repo = Repository()
    shared, alone = msgspec.structs.replace(repo.publish(), share_worker=True), repo.publish(name="alone")
    first, second = json.loads(dsse.parse(repo.assign(shared, alone)).payload)["items"]
    assert (first["share_worker"], first["share_lane"]) == (True, True)
    assert second["share_worker"] is False
    assert "share_lane" not in second


def test_a_remembered_failure_is_known_again(earlier, tmp_path):
    item = msgspec.json.decode(earlier["failed_item"], type=Item)
    assert item.share_worker
    store = DeviceStore(restored("agent.sql", tmp_path / "agent.db"))
    assert item_key(item) == earlier["item_key"] == store.failed()[0].key
    store.close()


def test_a_device_keeps_what_it_runs_and_what_it_changes(earlier, tmp_path):
    store = DeviceStore(restored("agent.sql", tmp_path / "agent.db"))
    running = {each.item.instance: each for each in store.committed()}
    assert {name: each.item.share_worker for name, each in running.items()} == {"hello": True, "alone": False}
    assert [change.item.share_worker for change in store.changes() if change.item] == [True]
    wanted = wire.decode(Assignment, dsse.parse(store.envelope()).payload)
    assert all(item.same_as(running[item.instance].item) for item in wanted.items), "nothing is swapped anew"
    store.close()


def test_the_mac_of_a_run_set_holds(earlier, tmp_path):
    (tmp_path / "runset.json").write_text(earlier["runset"])
    found = read_runset(tmp_path / "runset.json", bytes.fromhex(earlier["runset_key"]))
    assert [each.item.share_worker for each in found] == [True, False]


def test_the_host_understands_an_earlier_agent_and_the_agent_an_earlier_host(earlier):
    ours, theirs = framing.socket_pair()
    with ours, theirs:
        for packet in earlier["to_the_host"]:
            framing.send_packet(theirs, packet.encode())
        start, _ = host_api.receive_request(ours)
        secrets, _ = host_api.receive_request(ours)
        assert isinstance(start, host_api.Start)
        assert start.run.share_worker
        assert isinstance(secrets, host_api.PutSecrets)
        (packet,) = earlier["from_the_host"]
        framing.send_packet(ours, packet.encode())
        stats = host_api.receive_from_host(theirs)
        assert isinstance(stats, host_api.HostStats)
        assert (stats.instances[0].workers, stats.instances[0].shared_worker) == (2, "main-1")


EARLIER_TAGS = [
    ({"type": "open", "images": ["i"], "limits": {}, "seats": 7}, worker_api.OpenShared),
    ({"type": "seat"}, worker_api.AddSlot),
]


@pytest.mark.parametrize(("packet", "kind"), EARLIER_TAGS)
def test_a_worker_understands_an_earlier_supervisor(packet, kind):
    ours, theirs = framing.socket_pair()
    with ours, theirs:
        framing.send_packet(theirs, json.dumps(packet).encode())
        message, _ = worker_api.receive_to_worker(ours)
        assert isinstance(message, kind)
        assert getattr(message, "slots", 7) == 7


# -- the server


def test_the_server_reads_the_health_of_an_earlier_device(earlier):
    (instance,) = wire.decode(Health, earlier["health"].encode()).instances
    assert (instance.workers, instance.shared_worker) == (2, "main-1")
    assert not {b"lanes", b"shared_lane"} & set(msgspec.json.decode(wire.encode(instance), type=dict[str, msgspec.Raw]))


def test_values_of_the_server_say_what_they_said(earlier, tmp_path):
    store = ServerStore.open(restored("server.sql", tmp_path / "fleet.db"), fleet=earlier["fleet"])
    shared = Value(
        "components/main/hello/1.0.0.wasm",
        (("share_lane", "a key of the component"),),
        port=8081,
        share_worker=True,
    )
    own = Value("components/main/hello/1.0.0.wasm")
    assert [row.value for row in store.rollouts.settled(group="edge")] == [own]
    assert [row.value for row in store.rollouts.settled(device=earlier["device"])] == [shared]
    first, second = store.rollouts.get("r-1"), store.rollouts.get("r-2")
    assert (first.value, first.before, second.value, second.before) == (own, shared, shared, None)
    store.close()
    with contextlib.closing(sqlite3.connect(tmp_path / "fleet.db")) as db:
        (history,) = db.execute("SELECT value FROM settled_history").fetchone()
    assert msgspec.json.decode(history, type=Value) == shared


def test_no_device_is_given_a_new_assignment_for_a_word(earlier, tmp_path):
    store = ServerStore.open(restored("server.sql", tmp_path / "fleet.db"), fleet=earlier["fleet"])
    row = store.delivery.assignment(earlier["device"])
    assert row.envelope == earlier["envelope"].encode()
    assert row.wanted == _asked(wire.decode(Assignment, dsse.parse(row.envelope).payload))
    store.close()


# -- the command line


@pytest.mark.parametrize(
    ("arguments", "means"),
    [
        (["--share-lane"], True),
        (["--own-lane"], False),
        (["--share-worker"], True),
        (["--own-worker"], False),
        (["--own-lane", "--share-worker"], True),
        ([], None),
    ],
)
def test_an_earlier_option_means_what_it_meant(arguments, means):
    said = []

    @base.command("try")
    @base.share_worker_option
    def try_(_options, *, share_worker):
        """Try."""
        said.append(share_worker)

    result = CliRunner().invoke(try_, arguments, catch_exceptions=False)
    assert (result.exit_code, said) == (0, [means])
    assert "lane" not in CliRunner().invoke(try_, ["--help"]).output


def test_a_client_and_a_server_of_neighbouring_versions_understand_each_other():
    for said in (True, False, None):
        asked = msgspec.json.encode({"instance": "web", "share_lane": said})
        assert msgspec.json.decode(asked, type=RolloutRequest).share_worker is said
    # an earlier server refuses names that it does not know
    assert msgspec.json.decode(msgspec.json.encode(RolloutRequest(instance="web"))) == {"instance": "web"}
