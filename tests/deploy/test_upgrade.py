"""Upgrade of a device from a package made before modules moved: its components keep running.

An upgrade replaces files under a running host. A host from before the move starts its helpers by module paths that no
longer exist, so this upgrade restarts it, and its components are restored from the run set.
"""

import asyncio
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fleet.demo.environment import AGENT, HOST, Child, DemoDevice, free_ports
from fleet.protocol.codes import Outcome
from fleet.protocol.messages import InstanceHealth
from tests.deploy import before_the_move
from tests.e2e.stage import GROUP, Stage, descendants

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is missing: apt-get install dpkg"),
]


class Packages(NamedTuple):
    """The device's package before and after the move."""

    old: Path
    new: Path


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    place = tmp_path_factory.mktemp("packages")
    old = before_the_move.tree_before(place)
    return Packages(before_the_move.package(old, place / "old"), before_the_move.package(ROOT, place / "new"))


def version(deb: Path) -> str:
    return subprocess.run(
        ["dpkg-deb", "--field", str(deb), "Version"], capture_output=True, text=True, check=True
    ).stdout.strip()


# -- the package


STAND_INS = ("systemd-sysusers", "systemd-tmpfiles", "py3compile", "deb-systemd-helper", "systemctl", "userdel")


class Configured(NamedTuple):
    """Actions of a postinst on units, and its output."""

    invoked: list[str]
    said: str


def in_place(script: str, tmp_path: Path) -> str:
    """Return a script that finds what is installed below a directory."""
    for place, there in (("/run/systemd/system", "systemd"), ("/run/wasmfleet-", "before-"), ("/usr/lib/", "lib/")):
        script = script.replace(place, str(tmp_path / there) + place[len(place.rstrip("/")) :])
    return script


def configure(deb: Path, tmp_path: Path, *arguments: str) -> Configured:
    """Run a package's postinst with stand-ins for the programs that it calls."""
    subprocess.run(["dpkg-deb", "--control", str(deb), str(tmp_path / "control")], check=True)
    commands, log, running = tmp_path / "bin", tmp_path / "invoked", tmp_path / "systemd"
    commands.mkdir()
    running.mkdir()
    log.touch()
    for name in STAND_INS:
        (commands / name).write_text("#!/bin/sh\nexit 0\n")
    (commands / "deb-systemd-invoke").write_text(f'#!/bin/sh\necho "$@" >>{log}\n')
    for each in commands.iterdir():
        each.chmod(0o755)
    # as on a device with systemd, whether or not this machine has it
    script = in_place((tmp_path / "control/postinst").read_text(), tmp_path)
    environment = {"PATH": f"{commands}:/usr/sbin:/usr/bin:/sbin:/bin"}
    done = subprocess.run(
        ["sh", "-s", "configure", *arguments],
        input=script,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Configured(log.read_text().splitlines(), done.stdout)


@pytest.mark.parametrize(
    ("upgraded_from", "restarts"),
    [("0.1.0", True), ("0.1.7", True), ("0.2.0~rc1", False), ("0.2.0", False), ("0.10.0", False), (None, False)],
)
def test_only_an_upgrade_from_before_the_move_restarts_the_host(
    packages: Packages, tmp_path: Path, upgraded_from: str | None, restarts: bool
) -> None:
    done, said = configure(packages.new, tmp_path, *([upgraded_from] if upgraded_from else []))
    assert ("try-restart fleet-host.service" in done) == restarts
    assert ("try-restart fleet-agent.service" in done) == (upgraded_from is not None)
    if restarts:
        host, agent = (done.index(f"try-restart fleet-{name}.service") for name in ("host", "agent"))
        assert host < agent, "the new agent meets the new host"
    assert ("restarting fleet-host once" in said) == restarts
    assert ("until 'systemctl restart fleet-host'" in said) == (upgraded_from is not None and not restarts)


def test_the_versions_of_both_packages_lead_to_the_restart(packages: Packages, tmp_path: Path) -> None:
    assert "try-restart fleet-host.service" in configure(packages.new, tmp_path, version(packages.old)).invoked


@pytest.mark.parametrize(("replaced_by", "restarts"), [("wasmtime-51.0.0", True), ("wasmtime-50.0.1", False)])
def test_an_upgrade_to_another_engine_restarts_the_host(
    packages: Packages, tmp_path: Path, replaced_by: str, restarts: bool
) -> None:
    site = tmp_path / "lib/wasmfleet/agent/lib/python3.13/site-packages"
    (site / "wasmtime-50.0.1.dist-info").mkdir(parents=True)
    subprocess.run(["dpkg-deb", "--control", str(packages.new), str(tmp_path / "before")], check=True)
    preinst = in_place((tmp_path / "before/preinst").read_text(), tmp_path)
    subprocess.run(["sh", "-s", "upgrade", "0.2.0", "0.2.1"], input=preinst, text=True, check=True)
    (site / "wasmtime-50.0.1.dist-info").rename(site / f"{replaced_by}.dist-info")
    done, said = configure(packages.new, tmp_path, "0.2.0")
    assert ("try-restart fleet-host.service" in done) == restarts
    assert ("fleet-host once: wasmtime-50.0.1 was replaced" in said) == restarts
    assert "try-restart fleet-agent.service" in done
    assert not list(tmp_path.glob("before-*"))


# -- the device


class Device:
    """A device whose programs are those of a package, unpacked into a root of its own."""

    def __init__(self, stage: Stage, directory: Path, runtime: Path) -> None:
        self._stage, self._root = stage, directory / "root"
        self._state, self._runtime = directory / "state", runtime
        self._port = free_ports(1)[0]
        self._site = Path()
        for each in (self._root, self._state / "agent", self._state / "host"):
            each.mkdir(parents=True, mode=0o700)
        (self._state / "agent.toml").touch()

    def install(self, deb: Path) -> None:
        """Install the package's files; running processes continue."""
        self._site = before_the_move.unpack(deb, self._root)

    def _line(self, program: str, *arguments: str) -> list[str]:
        python = (sys.executable, "-P", "-m", program, *arguments)
        return ["/usr/bin/env", f"PYTHONPATH={self._site}", *python]

    def _agent(self, *arguments: str) -> list[str]:
        places = ("--state", str(self._state / "agent"), "--runtime", str(self._runtime))
        return self._line(AGENT, *arguments, *places, "--config", str(self._state / "agent.toml"))

    async def start_host(self) -> Child:
        """Start the host and restore the committed instances, as the units do."""
        places = ("--runtime", str(self._runtime), "--state", str(self._state / "host"))
        ingress = ("--ingress", f"127.0.0.1:{self._port}")
        host = await self._stage.scene.processes.start("host", self._line(HOST, "run", *places, *ingress))
        if (self._state / "agent/identity/enrolled.json").exists():
            await self._run("restore")
        return host

    async def start_agent(self) -> Child:
        """Start the agent."""
        return await self._stage.scene.processes.start("agent", self._agent("run"))

    async def enrol(self) -> None:
        """Join the fleet."""
        token = await self._stage.scene.command("enroll-token", "--group", GROUP, "--quiet")
        await self._run("enroll", stdin=token.encode())

    async def _run(self, command: str, *, stdin: bytes | None = None) -> None:
        code, _, errors = await self._stage.scene.processes.run(self._agent(command), stdin=stdin)
        assert code == 0, errors

    def in_the_fleet(self, host: Child, agent: Child) -> DemoDevice:
        """Return the device as the fleet knows it, once it is online."""
        rows = self._stage.scene.client.devices().devices
        assert len(rows) == 1
        return DemoDevice(name="device", device=rows[0].id, group=GROUP, port=self._port, agent=agent, host=host)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with Stage(tmp_path / "fleet") as made:
        yield made


@pytest.fixture
def runtime() -> Iterator[Path]:
    # paths of sockets are at most 108 bytes long
    with tempfile.TemporaryDirectory(prefix="wf-") as place:
        yield Path(place)


def sharing(stage: Stage, *, after: int = 0) -> InstanceHealth | None:
    """Return what the device's health says of its instance, once that is a later generation in a shared worker."""
    (row,) = stage.scene.client.devices().devices
    return next((each for each in row.instances if each.shared_worker and each.generation > after), None)


def unproven(stage: Stage) -> str | None:
    """Return why the newest rollout does not go on, once the device of an earlier version is named unproven."""
    newest = stage.scene.client.rollouts(limit=1).rollouts[0]
    (device,) = stage.scene.client.rollout(newest.id).devices
    return newest.reason or "no reason yet" if device.outcome is Outcome.UNPROVEN else None


def zygotes(host: Child) -> set[str]:
    """Return the module of each zygote below a host."""
    lines = [Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in descendants(host.process.pid)]
    return {word.decode() for line in lines for word in line if word.endswith(b"zygote")}


def test_a_component_outlives_the_upgrade_and_is_updated_after_it(
    packages: Packages, stage: Stage, tmp_path: Path, runtime: Path
) -> None:
    device = Device(stage, tmp_path / "device", runtime)
    device.install(packages.old)

    async def before() -> DemoDevice:
        host = await device.start_host()
        await device.enrol()
        agent = await device.start_agent()
        await stage.until(
            "the device is online", lambda: any(row.online for row in stage.scene.client.devices().devices) or None
        )
        made = await asyncio.to_thread(device.in_the_fleet, host, agent)
        # an agent that knows shared workers by another name, and says them by another name
        # and that cannot sign what it runs: the rollout waits for a proof that it cannot give
        code, _, errors = await stage.push("v1.wasm", "--share-worker")
        assert (code, "unproven" in errors) == (1, True), errors
        await stage.answers(made, "1")
        await stage.until("the server names it unproven", lambda: unproven(stage))
        return made

    made = stage.do(before())
    shared = stage.do(stage.until("the old host lets it share a worker", lambda: sharing(stage)))
    assert zygotes(made.host) == {"agent.host.zygote"}

    async def upgrade() -> DemoDevice:
        # files are replaced while everything runs, and requests are still answered
        device.install(packages.new)
        await stage.answers(made, "1")
        # postinst: first the host, then the agent
        await stage.stop(made.host)
        host = await device.start_host()
        await stage.answers(made, "1")
        assert zygotes(host) == {"agent.host.worker.zygote"}
        await stage.stop(made.agent)
        return await asyncio.to_thread(device.in_the_fleet, host, await device.start_agent())

    upgraded = stage.do(upgrade())
    stage.do(stage.answers(upgraded, "1"))
    # the new agent continues where the old one stopped
    stage.do(stage.pushed("v2.wasm", "--share-worker"))
    stage.do(stage.answers(upgraded, "2"))
    stage.do(stage.until("so does the new one", lambda: sharing(stage, after=shared.generation)))
