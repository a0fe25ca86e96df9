"""`fleet device ID --diagnose`: an archive about a device out of reach, with no secret of it, for who asked alone."""

import base64
import json
import stat
import tarfile
import tomllib
from urllib.parse import quote, quote_plus

import pytest
import wasmtime

from fleet.demo.environment import free_ports
from fleet.protocol import bounds
from tests.e2e.secret_reader import FIRST, GUEST, TOML, answers
from tests.e2e.stage import GROUP, HELLO
from tests.eventually import eventually_async

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SUMMARY = {
    *("policy.txt", "status.txt", "status.json", "device.json", "check.json", "host.json", "configuration.json"),
    "log/agent.log",
}
PASSWORD = "pr0xy p@ss/word-4711"
SERVICE_TOKEN = "ghp_0123456789abcdefXYZ"
TOKEN = "wf1.eyJub3QiOiJhIHJlYWwgdG9rZW4sIGJ1dCBsb25nIn0"
SEEDED = {
    "https_proxy": f"http://user:{quote(PASSWORD, safe='')}@127.0.0.1:1",
    "no_proxy": "*",
    "MY_SERVICE_TOKEN": SERVICE_TOKEN,
}


def forms(secret):
    """A secret as it is, and in each form in which a log, an address or a document may have it."""
    for shift in range(3):
        text = base64.b64encode(bytes(shift) + secret).rstrip(b"=")
        yield text[4:-2]
        yield base64.urlsafe_b64encode(bytes(shift) + secret).rstrip(b"=")[4:-2]
    yield from (secret, secret.hex().encode(), quote(secret).encode(), quote_plus(secret).encode())


def unpacked(path):
    with tarfile.open(path) as archive:
        return {each.name.removeprefix("diagnose/"): archive.extractfile(each).read() for each in archive}


class Scene:
    """A device whose environment, log, keys and component have secrets."""

    def __init__(self, stage, directory):
        self.stage, self.directory = stage, directory
        self.device = None

    async def begin(self):
        """Give a component its secret, and let a careless library write every secret into the agent's log."""
        self.device = await self.stage.scene.add_device("berlin", GROUP)
        component, (port,) = self.directory / "reader.wasm", free_ports(1)
        component.write_bytes(wasmtime.wat2wasm(GUEST.read_text()))
        component.with_suffix(".toml").write_text(TOML.format(version="1.0.0", probation="100ms"))
        where = ("--group", GROUP, "--instance", HELLO)
        await self.ok("secret", "set", "db-password", *where, stdin=FIRST.encode())
        await self.ok("push", str(component), "--as", HELLO, "--group", GROUP, "--port", str(port))
        await answers(port, FIRST)
        await self.stage.stop(self.device.agent)
        with (self.state / "log" / "agent.log").open("ab") as log:
            for secret in self.secrets():
                log.write(b"a library says %s\n" % secret)
                for form in (base64.b64encode(b"user:" + secret), quote(secret).encode(), secret.hex().encode()):
                    log.write(b"a library says %s\n" % form)
            log.write(b"and no harm in it\n")

    @property
    def state(self):
        return self.stage.state(self.device)

    @property
    def toml(self):
        return self.state.parent / "agent.toml"

    def secrets(self):
        for name in ("device.key", "sealing.key", "mac.key"):
            key = (self.state / "identity" / name).read_bytes()
            yield from (line for line in key.splitlines() if not line.startswith(b"---"))
        yield from (each.encode() for each in (PASSWORD, SERVICE_TOKEN, TOKEN, FIRST))

    async def ok(self, *arguments, stdin=None):
        code, output, errors = await self.stage.fleet(*arguments, stdin=stdin)
        assert code == 0, output + errors
        return output + errors

    async def start(self, policy):
        """Start the agent under a policy of the owner's."""
        before = tomllib.loads(self.toml.read_text())
        self.toml.write_text(f'name = "{before["name"]}"\nhealth_s = 5.0\n{policy}\n')
        environment = self.stage.scene.processes._environment
        environment.update(SEEDED)
        try:
            self.device = await self.stage.start_agent(self.device)
        finally:
            for name in SEEDED:
                del environment[name]
        await self.stage.until("the device is online", self.online)

    def online(self):
        row = self.stage.scene.client.device(self.device.device).row
        return row if row.online and "diagnose" in row.versions.commands else None

    async def asked(self, *arguments):
        return await self.stage.fleet("device", self.device.device, "--diagnose", *arguments)

    def history(self):
        entries = self.stage.scene.client.timeline(self.device.device, limit=100).entries
        return [each.text for each in entries if each.kind == "report"]


@pytest.fixture(scope="module")
def scene(stage, tmp_path_factory):
    made = Scene(stage, tmp_path_factory.mktemp("scene"))
    stage.do(made.begin())
    return made


def no_secret_in(scene, members):
    found = {
        (name, form)
        for name, data in members.items()
        for secret in scene.secrets()
        for form in forms(secret)
        if form in data
    }
    assert found == set()
    assert not any(b"PRIVATE KEY" in data for data in members.values())


def test_an_operator_has_an_archive_without_any_secret(stage, scene, tmp_path):
    file = tmp_path / "berlin.tar.gz"

    async def story():
        await scene.start("")  # the default
        code, output, errors = await scene.asked("-o", str(file))
        assert code == 0, output + errors
        assert f"{scene.device.device} makes the archive" in errors
        assert str(file) in output
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        members = unpacked(file)
        assert members.keys() == SUMMARY
        assert sum(map(len, members.values())) <= bounds.ARCHIVE_MEMBERS_MAX_BYTES
        no_secret_in(scene, members)
        assert b"and no harm in it" in members["log/agent.log"]
        assert b"no line of an instance" in members["policy.txt"]
        assert f"{HELLO}: runs".encode() in members["status.txt"]
        # Both histories have it: the server's of operators' acts, and the device's own, signed.
        audit = await stage.scene.ask(lambda client: client.audit(limit=20).entries)
        assert {(each.act, each.subject) for each in audit} >= {
            (action, scene.device.device) for action in ("command", "diagnose")
        }
        await stage.until(
            "the device's history has it",
            lambda: any("asked for an archive" in each for each in scene.history()) or None,
        )
        assert "sha256" in next(each for each in scene.history() if "asked for an archive" in each)

        # A file is never replaced by surprise, and the device is not asked for what cannot be written.
        before = file.read_bytes()
        code, _, errors = await scene.asked("-o", str(file))
        assert (code, "--force" in errors, file.read_bytes()) == (2, True, before)
        code, output, errors = await scene.asked("-o", str(file), "--force", "--json")
        assert code == 0, output + errors
        said = json.loads(output)
        assert (said["file"], said["bytes"], errors) == (str(file), file.stat().st_size, "")
        assert any(said["sealed_sha256"] in each for each in scene.history())

    stage.do(story())


@pytest.mark.nightly
def test_the_owner_may_allow_all_or_nothing(stage, scene, tmp_path):
    async def story():
        await stage.stop(scene.device.agent)
        await scene.start('[policy]\ndiagnose = "all"\nlogs = "all"')
        file = tmp_path / "all.tar.gz"
        code, output, errors = await scene.asked("-o", str(file))
        assert code == 0, output + errors
        members = unpacked(file)
        assert members.keys() == SUMMARY - {"policy.txt"} | {"files.txt", "kernel.txt", f"log/instances/{HELLO}.log"}
        no_secret_in(scene, members)
        assert b"redacted" in members[f"log/instances/{HELLO}.log"]

        await stage.stop(scene.device.agent)
        await scene.start('[policy]\ndiagnose = "off"')
        code, _, errors = await scene.asked("-o", str(tmp_path / "off.tar.gz"))
        assert code == 4
        assert "the device's owner lets no archive leave it: [policy] diagnose" in errors
        assert not (tmp_path / "off.tar.gz").exists()
        await stage.until(
            "the device's history has it",
            lambda: any("refused by [policy] diagnose" in each for each in scene.history()) or None,
        )
        await stage.stop(scene.device.agent)

        async def offline():
            return not (await stage.scene.ask(lambda client: client.device(scene.device.device))).row.online

        await eventually_async(offline, "the device is offline")
        code, _, errors = await scene.asked("-o", str(tmp_path / "off.tar.gz"))
        assert code == 1
        assert f"{scene.device.device} is offline" in errors

    stage.do(story())
