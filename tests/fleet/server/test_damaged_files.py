"""A server's home after a power cut: every file in turn is empty, full of zeros or cut off, and the server is started.

Two outcomes are right: what can be made anew is, and the server works; or one line names the file and says what to do.
"""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from fleet.admin.bootstrap import init
from fleet.demo.environment import free_ports
from fleet.protocol import operator_api
from fleet.server.config import ServerPaths
from fleet.server.service import ServeError, Server
from tests.fleet.server.conftest import PASSPHRASE, Operator

DAMAGES = {
    "empty": lambda data: b"",
    "zeros": lambda data: b"\0" * len(data),
    "cut off": lambda data: data[: len(data) // 2],
}
LOST = {
    "server.toml", "fleet.db", "ca/ca.pem", "ca/ca.key", "ca/issuing.pem", "ca/issuing.key", "keys/director.pem",
    "keys/snapshot.pem", "keys/timestamp.pem", "repository/1.main.json", "repository/1.root.json",
    "repository/1.targets.json",
}  # fmt: skip
"""Files that nobody can make anew; every other one the server makes anew."""


def files(home):
    server = ServerPaths(home).server
    return {str(path.relative_to(server)) for path in server.rglob("*") if path.is_file() and path.stat().st_size}


@pytest.fixture(scope="module")
def homes(tmp_path_factory):
    """A development fleet and one for production, whose servers have made all of their files."""
    made = {}
    for size in ("dev", "solo"):
        home = tmp_path_factory.mktemp(size) / "home"
        ports = dict(zip(("operators_port", "devices_port", "mqtt_port"), free_ports(3), strict=True))
        passphrase = None if size == "dev" else PASSPHRASE
        init(home, fleet="test", size=size, passphrase=passphrase, broker="mosquitto", **ports)
        made[size] = home
    return made


async def outcome(home):
    """The refusal of a start; empty when the server works for operators and its broker."""
    server = Server(home)
    try:
        ready = await server.start()
    except ServeError as error:
        return str(error)
    operator = Operator(home, ready.operators_url)
    try:
        await server._bus.wait_connected()
        server.keep_up()
        status = await operator.get(operator_api.Status, "/v1/status")
        assert status.problems == ()
        assert (await operator.http.get("/v1/tuf/timestamp.json")).is_success
    finally:
        await operator.http.aclose()
        await server.stop()
    return ""


@pytest.mark.asyncio
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("size", ["dev", "solo"])
async def test_every_file_of_a_server_in_turn(homes, tmp_path, size, damage):
    assert await outcome(homes[size]) == ""
    found = files(homes[size])
    assert {"tls/server.pem", "tls/mqtt.key", "broker/data/mosquitto.db"} < found
    wrong = {}
    for name in sorted(found - {"lock"}):
        home = tmp_path / name.replace("/", "-")
        shutil.copytree(homes[size], home)
        path = ServerPaths(home).server / name
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
        said = await outcome(home)
        refused_well = str(path) in said and "fleet server" in said and "\n" not in said
        if not (refused_well if name in LOST else said == ""):
            wrong[name] = said
        shutil.rmtree(home)
    assert not wrong


def test_fleet_serve_says_in_one_line_which_file_is_lost(homes, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(homes["dev"], home)
    key = ServerPaths(home).keys / "director.pem"
    key.write_bytes(b"")
    command = (sys.executable, "-m", "fleet.cli.main", "--home", str(home), "serve")
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {key} is not a private key")
    assert "fleet server rebuild --backup" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.asyncio
async def test_a_timestamp_that_is_made_anew_is_above_every_one_that_devices_have_seen(new_fleet):
    async with new_fleet() as fleet:
        device = await fleet.device("a")
        await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0")))
        await fleet.stop()
        for path in ServerPaths(fleet.home).repository.glob("*.snapshot.json"):
            path.write_bytes(b"\0" * 9)
        (ServerPaths(fleet.home).repository / "timestamp.json").write_bytes(b"")
        await fleet.start()
        target = await fleet.operator.publish("2.0.0")
        await fleet.operator.decided(await fleet.operator.deploy(target))
        assert device.items["hello"].target == target


@pytest.mark.asyncio
@pytest.mark.parametrize("lost", ["both damaged", "timestamp removed", "snapshot removed"])
async def test_a_start_that_fails_forgets_no_version_that_devices_have_seen(homes, tmp_path, lost):
    home = tmp_path / "home"
    shutil.copytree(homes["dev"], home)
    paths = ServerPaths(home)
    timestamp, key = paths.repository / "timestamp.json", paths.keys / "director.pem"
    snapshots = sorted(paths.repository.glob("*.snapshot.json"))
    seen = json.loads(timestamp.read_bytes())["signed"]
    for path in {
        "both damaged": [timestamp, *snapshots], "timestamp removed": [timestamp], "snapshot removed": snapshots
    }[lost]:  # fmt: skip
        path.write_bytes(b"")
        if "removed" in lost:
            path.unlink()
    whole = key.read_bytes()
    key.write_bytes(b"")
    assert str(key) in await outcome(home)
    key.write_bytes(whole)
    assert await outcome(home) == ""
    signed = json.loads(timestamp.read_bytes())["signed"]
    before, now = (each["meta"]["snapshot.json"]["version"] for each in (seen, signed))
    assert now == before if lost == "timestamp removed" else now > before
    # above a lost timestamp, a server counts from the minutes since 1970
    assert signed["version"] > (seen["version"] if lost == "snapshot removed" else 29_000_000)


@pytest.mark.asyncio
async def test_a_broker_that_lost_its_database_gets_every_assignment_again(new_fleet, broker):
    if broker == "embedded":
        pytest.skip("it stores nothing")
    async with new_fleet(broker) as fleet:
        device = await fleet.device("a")
        await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0")))
        await device.disconnect(politely=True)
        await fleet.stop()
        database = ServerPaths(fleet.home).broker / "data" / "mosquitto.db"
        database.write_bytes(b"\0" * database.stat().st_size)
        seen = len(device.envelopes)
        await fleet.start()
        await device.connect()
        await device.until(lambda device: len(device.envelopes) > seen)
        assert database.with_name("mosquitto.db.damaged").exists()


@pytest.mark.asyncio
async def test_a_broker_that_dies_and_cannot_read_its_database_comes_back(new_fleet, broker):
    if broker == "embedded":
        pytest.skip("it stores nothing")
    async with new_fleet(broker) as fleet:
        await fleet.stop()
        await fleet.start()
        device = await fleet.device("a")
        database = ServerPaths(fleet.home).broker / "data" / "mosquitto.db"
        database.write_bytes(b"\0" * database.stat().st_size)
        os.kill(fleet.server.broker_pid, signal.SIGKILL)
        await fleet.operator.decided(await fleet.operator.deploy(await fleet.operator.publish("1.0.0")))
        assert device.items["hello"].target.endswith("1.0.0.wasm")
        assert database.with_name("mosquitto.db.damaged").exists()


@pytest.mark.asyncio
async def test_files_that_were_being_written_when_the_power_went_are_removed(homes, tmp_path):
    home = tmp_path / "home"
    shutil.copytree(homes["dev"], home)
    left = [directory / ".new-a1b2c3" for directory in (ServerPaths(home).server, ServerPaths(home).keys)]
    for path in left:
        path.write_bytes(b"half a ke")
    assert await outcome(home) == ""
    assert not [path for path in left if path.exists()]


@pytest.mark.asyncio
@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_artifact_is_not_served_and_the_same_file_replaces_it(new_fleet, damage):
    async with new_fleet() as fleet:
        operator, artifact = fleet.operator, b"hello 1.0.0"
        await operator.publish("1.0.0")
        sha256 = hashlib.sha256(artifact).hexdigest()
        path = ServerPaths(fleet.home).artifacts / sha256
        assert (await operator.http.get(f"/v1/artifacts/{sha256}")).content == artifact
        path.write_bytes(DAMAGES[damage](artifact))
        device = await fleet.device("a")
        with device.http() as http:
            assert (await asyncio.to_thread(http.get, f"/v1/artifacts/{sha256}")).status_code == 404
        assert (await operator.http.head(f"/v1/artifacts/{sha256}")).status_code == 404
        (problem,) = (await operator.get(operator_api.Status, "/v1/status")).problems
        assert f"the artifact {sha256[:16]} is damaged" in problem
        assert (await operator.http.put(f"/v1/artifacts/{sha256}", content=artifact)).is_success
        assert (await operator.http.get(f"/v1/artifacts/{sha256}")).content == artifact
        assert (await operator.get(operator_api.Status, "/v1/status")).problems == ()
