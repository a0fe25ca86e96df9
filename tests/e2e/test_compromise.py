"""Commands of docs/compromise.md, run against real processes after a simulated compromise."""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import ssl
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from fleet.demo.environment import Environment, free_ports
from fleet.demo.scenario import fixture
from fleet.protocol.assignment import Assignment
from fleet.server.broker import broker
from fleet.server.config import ServerPaths
from signing import director, dsse, keys
from signing.state import VERSION_MAX
from tests.e2e.hostile import envelope, say
from tests.e2e.stage import GROUP, HELLO, Stage
from tests.eventually import NeverError, eventually_async

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.skipif(broker.find() is None, reason="a fleet for production wants mosquitto"),
]
PAGE = (Path(__file__).resolve().parents[2] / "docs/compromise.md").read_text()
BLOCKS = dict(re.findall(r"^```sh ([a-z-]+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))
PASSPHRASE = "correct horse"


class SoloScene(Environment):
    """A fleet for production, of one operator."""

    async def make_fleet(self, *, broker: str = "mosquitto") -> None:
        operators, devices, mqtt = free_ports(3)
        ports = ["--operators-port", str(operators), "--devices-port", str(devices), "--mqtt-port", str(mqtt)]
        await self.command("init", "--solo", "--fleet", "acme", "--broker", broker, *ports)


class SoloStage(Stage):
    """The same with the commands of the page."""

    def __init__(self, directory):
        self.ran = set()
        super().__init__(directory)

    async def _make(self) -> Environment:
        scene = SoloScene(self._directory)
        await scene.make_fleet()
        await scene.serve()
        return scene

    @property
    def place(self) -> ServerPaths:
        return ServerPaths(self.scene.home)

    async def page(self, kind: str, **variables: object) -> str:
        """Run a block of the page as it stands; it must succeed."""
        self.ran.add(kind)
        told = "".join(f"export {name}='{value}'\n" for name, value in variables.items())
        tools = self._directory / "bin"
        tools.mkdir(exist_ok=True)
        (tools / "fleet").write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m fleet.cli.main "$@"\n')
        (tools / "fleet").chmod(0o755)
        text = f'set -eu\nexport PATH="{tools}:$PATH"\n{told}{BLOCKS[kind]}'
        code, output, errors = await self.scene.processes.run(["bash", "-c", text])
        assert code == 0, f"{kind}: {output}{errors}"
        return output

    async def stop_server(self) -> None:
        server, self.scene._server = self.scene._server, None
        assert server is not None
        await self.stop(server)

    async def back(self, device, *, versions_above: int = 0):
        """Wait until a device is online and has told what it has accepted."""

        def there():
            row = next(row for row in self.scene.client.devices().devices if row.id == device.device)
            return row if row.online and row.accepted >= versions_above else None

        return await self.until(f"{device.name} is back", there)

    async def ahead_now(self) -> str:
        """The sentence of `fleet status` that names devices ahead of the server; empty for none."""
        status = await self.scene.ask(lambda client: client.status())
        return next((each for each in status.problems if "newer assignments than this server" in each), "")

    async def ahead(self, device) -> None:
        """Wait until `fleet status` names a device as ahead."""

        async def named() -> bool:
            return device.device in await self.ahead_now()

        await eventually_async(named, f"{device.name} is named as ahead", within_s=120)

    async def renewed(self, device, before: str) -> None:
        """Wait until a device has another certificate; it is told to ask now, and not within minutes."""
        path = self.state(device) / "identity/device.pem"
        async with asyncio.timeout(120):
            while path.read_text() == before:
                device.agent.process.send_signal(signal.SIGHUP)
                with contextlib.suppress(NeverError):  # a signal that came too early for the agent is given again
                    await eventually_async(lambda: path.read_text() != before, "another certificate", within_s=1)

    async def ran_on(self, device) -> list[str]:
        """The versions that a device proves to have committed, in order; a page's own audit must hold."""
        _, output, _ = await self.fleet("audit", "verify", "--json")
        found = next(each for each in json.loads(output)["devices"] if each["device"] == device.device)
        ran = (each["target"] for each in found["ran"] if each["phase"] == "committed" and each["target"])
        return [target.rpartition("@")[2] for target in ran]

    async def eventually_ran(self, device, *versions: str) -> None:
        """Wait until the proof ends with these versions; reports may still be on their way."""

        async def ran() -> bool:
            return (await self.ran_on(device))[-len(versions) :] == list(versions)

        await eventually_async(ran, f"the proof ends with {versions}", within_s=300)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WASMFLEET_KEY_PASSPHRASE", PASSPHRASE)
        with SoloStage(tmp_path_factory.mktemp("acme")) as made:
            yield made


@pytest.fixture(scope="module")
def device(stage):
    """A device of the group that runs v1, asked often; the operator has seen it."""
    made = stage.do(stage.scene.add_device("berlin", GROUP))
    stage.do(stage.pushed("v1.wasm", "--version", "1.0.0"))
    code, output, errors = stage.do(stage.fleet("publish", str(fixture("v2.wasm")), "--version", "2.0.0"))
    assert code == 0, output + errors
    code, output, errors = stage.do(stage.fleet("audit", "verify"))
    assert code == 0, output + errors
    return made


def test_a_publishers_key_was_stolen(stage, device, tmp_path):
    async def story():
        # The thief has the key, its passphrase and an operator's token: he publishes, and makes it run.
        shutil.copytree(stage.place.operator, tmp_path / "thief/operator")
        bad = ["--home", str(tmp_path / "thief"), "push", str(fixture("v2.wasm")), "--version", "6.6.6"]
        code, output, errors = await stage.fleet(*bad, "--as", HELLO, "--group", GROUP, "--waves", "100%")
        assert code == 0, output + errors
        await stage.answers(device, "2")

        await stage.page("publisher", STOLEN="hello@6.6.6", GOOD="hello@1.0.0", INSTANCE=HELLO, GROUP=GROUP)
        await stage.answers(device, "1")
        code, _, errors = await stage.fleet(*bad[:-1], "6.6.7", "--as", HELLO, "--group", GROUP)
        assert code == 2, "the key counts for nothing"
        assert "not trusted with the namespace" in errors
        await stage.eventually_ran(device, "6.6.6", "1.0.0")

    # what was published in this story carries the component's own name
    stage.do(story())


def test_the_directors_key_was_stolen(stage, device):
    async def story():
        stolen = keys.load(stage.place.keys / "director.pem")
        honest = msgspec.json.decode(dsse.parse(envelope(stage, device)).payload, type=Assignment)
        release = stage.published("2.0.0")
        item = msgspec.structs.replace(
            honest.items[0],
            target=release.target,
            sha256=release.sha256,
            length=release.length,
            manifest_sha256=await manifest_of(stage, release.target),
        )
        now = datetime.now(UTC)
        forged = msgspec.structs.replace(
            honest, version=VERSION_MAX, items=(item,), issued=now, expires=now + timedelta(days=1)
        )
        # Published code, but nobody's rollout; and no honest version can be higher.
        await say(stage, device, director.sign_assignment(forged, stolen))
        await stage.answers(device, "2")
        await stage.eventually_ran(device, "2.0.0")  # beyond probation: else it only goes back

        await stage.page("director")
        await stage.answers(device, "1")
        await stage.eventually_ran(device, "2.0.0", "1.0.0")
        row = await stage.until("the device counts as before", lambda: low(stage, device))
        assert row.accepted < 1000
        # and what the thief signs now is nobody's word
        seen = await stage.latest(device)
        await say(stage, device, director.sign_assignment(forged, stolen))
        await stage.reported(device, code="unsigned", after=seen)
        assert await stage.version(device) == "1"

    stage.do(story())


def low(stage, device):
    row = next(row for row in stage.scene.client.devices().devices if row.id == device.device)
    return row if 0 < row.accepted < 1000 else None


async def manifest_of(stage, target):
    from signing import hash_bins, repository

    files = {path.name: path.read_bytes() for path in stage.place.repository.glob("*.json")}
    assert repository.namespaces(files) == ("main",)
    return next(each.manifest_sha256 for each in hash_bins.releases(files, "main") if each.name.path == target)


def test_the_broker_was_stolen(stage, device, tmp_path):
    async def story():
        shutil.copytree(stage.place.tls, tmp_path / "loot")
        before = stage.state(device).joinpath("identity/device.pem").read_text()
        await stage.stop_server()
        await stage.page("broker-down")
        await stage.scene.serve()
        await stage.page("broker-up")
        await stage.renewed(device, before)
        await stage.back(device)
        # The thief comes as the server itself, with the key that was stolen, and is not let in.
        host, _, port = stage.scene.client.status().mqtt[0].rpartition("/")[2].rpartition(":")
        context = ssl.create_default_context(cafile=str(stage.place.ca / "ca.pem"))
        context.load_cert_chain(tmp_path / "loot/mqtt.pem", tmp_path / "loot/mqtt.key")
        assert await stage_refuses(host, int(port), context)
        await stage.pushed("v2.wasm", "--version", "2.0.0")
        await stage.answers(device, "2")
        await stage.pushed("v1.wasm", "--version", "1.0.0")
        await stage.answers(device, "1")

    stage.do(story())


async def stage_refuses(host, port, context):
    try:
        reader, writer = await asyncio.open_connection(host, port, ssl=context)
        writer.write(b"\x10\x0f\x00\x04MQTT\x04\x02\x00\x3c\x00\x03abc")
        await writer.drain()
        answered = await reader.read(1)
        writer.close()
    except (ssl.SSLError, ConnectionError):
        return True
    return answered == b""


def test_the_whole_server_was_stolen(stage, device, tmp_path):
    async def story():
        await stage.page("backup", BACKUP=tmp_path / "fleet.tar")
        held = (tmp_path / "fleet.tar").read_bytes()
        assert b"PRIVATE" not in held
        # The thief owns the server and makes the device run another release; then the machine is switched off.
        await stage.pushed("v2.wasm", "--version", "2.0.0")
        await stage.answers(device, "2")
        await stage.stop_server()
        stage.place.server.rename(tmp_path / "evidence")
        serial = stage.state(device).joinpath("identity/enrolled.json").read_text()
        before = stage.state(device).joinpath("identity/device.pem").read_text()

        await stage.page("server", BACKUP=tmp_path / "fleet.tar")
        await stage.scene.serve()
        await stage.renewed(device, before)
        await stage.ahead(device)
        await stage.page("server-up")
        # What the thief had it run stays until the operator decides.
        assert await stage.version(device) == "2"
        await stage.page("impose")
        await stage.answers(device, "1")
        assert await stage.ahead_now() == ""
        # The backup knows nothing of v2, and the server that knew it is gone: the device proves it.
        await stage.eventually_ran(device, "2.0.0", "1.0.0")
        assert stage.state(device).joinpath("identity/enrolled.json").read_text() == serial, "nobody enrolled again"
        code, output, _ = await stage.fleet("operators", "list", "--json")
        assert [each["name"] for each in json.loads(output)["operators"]] == ["admin"], code
        await stage.pushed("v2.wasm", "--version", "2.0.0")
        await stage.answers(device, "2")
        await stage.pushed("v1.wasm", "--version", "1.0.0")

    stage.do(story())


def test_the_whole_server_was_stolen_and_there_is_no_backup(stage, device, tmp_path):
    async def story():
        _, _, devices = stage.scene.client.status().devices_url.rpartition(":")
        _, _, mqtt = stage.scene.client.status().mqtt[0].rpartition(":")
        code, output, errors = await stage.fleet("audit", "verify")
        assert code == 0, output + errors
        await stage.stop_server()
        await stage.stop(device.agent)
        stage.scene.devices.remove(device)
        stage.place.server.rename(tmp_path / "evidence")

        await stage.page("bare", DEVICES_PORT=devices, MQTT_PORT=mqtt)
        await stage.scene.serve()
        await stage.page(
            "bare-up", FILE=fixture("v2.wasm"), VERSION="2.0.0", GOOD="hello@2.0.0", INSTANCE=HELLO, GROUP=GROUP
        )
        assert await stage.version(device) == "1", "it goes on with what it runs"
        stage.scene.devices.append(device)
        again = await stage.start_agent(device)
        await stage.ahead(again)
        assert await stage.version(again) == "1"
        await stage.page("impose")
        await stage.answers(again, "2")
        await stage.eventually_ran(again, "2.0.0")
        await stage.page("bare-proof")

    stage.do(story())


def test_every_block_of_the_page_was_run(stage, device):
    """Last in this file: what the page says and nobody ran is a promise without proof."""
    if len(stage.ran) < 3:
        pytest.skip("only some of this file's tests were asked for")
    assert stage.ran == BLOCKS.keys()
