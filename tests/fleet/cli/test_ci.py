"""docs/ci.md, run as it stands: against a real server, several pipelines at once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleet.demo.environment import free_ports

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "components" / "demo"


def script(kind: str) -> str:
    """The blocks of one kind, one after the other."""
    blocks = re.findall(rf"^```sh {kind}\n(.*?)^```$", (ROOT / "docs/ci.md").read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    return "\n".join(blocks)


class Machine:
    """A place with `fleet` on its PATH."""

    def __init__(self, place: Path, **environment: str) -> None:
        self.place = place
        place.mkdir(exist_ok=True)
        tools = place.parent / "bin"
        tools.mkdir(exist_ok=True)
        (tools / "fleet").write_text(f'#!/bin/sh\nexec "{sys.executable}" -P -m fleet.cli.main "$@"\n')
        (tools / "fleet").chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("FLEET_", "WASMFLEET_"))}
        path = f"{tools}:{os.environ['PATH']}"
        self.environment = {**kept, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}

    def start(self, text: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", "-euc", text],
            cwd=self.place,
            env=self.environment | more,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, text: str, *, stdin: str = "", **more: str) -> str:
        with self.start(text, **more) as process:
            output, errors = process.communicate(stdin, timeout=60)
        assert process.returncode == 0, errors
        return output


@pytest.fixture
def person(tmp_path: Path) -> Iterator[Machine]:
    """A person's machine, with the fleet's server on it."""
    home = tmp_path / "home"
    machine = Machine(tmp_path / "person", WASMFLEET_HOME=str(home))
    operators, devices, mqtt = free_ports(3)
    machine.run(
        f"fleet init --dev --broker embedded --operators-port {operators} --devices-port {devices} --mqtt-port {mqtt}"
    )
    machine.environment["FLEET_URL"] = f"https://127.0.0.1:{operators}"
    with machine.start("exec fleet serve") as server:
        assert server.stdout is not None
        try:
            while "broker" not in server.stdout.readline():
                assert server.poll() is None
            yield machine
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=30)


def pipeline(person: Machine, place: Path, token: str, component: str) -> Machine:
    """A checkout with the committed directory, and the two secrets in the environment."""
    machine = Machine(
        place, FLEET_TOKEN=token, FLEET_SIGNING_KEY=(person.place / "build.ci.pem").read_text(), COMPONENT=component
    )
    shutil.copytree(person.place / ".wasmfleet", place / ".wasmfleet")
    shutil.copy(DEMO / "v1.wasm", place / component)
    return machine


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_pipeline_of_the_documentation_also_several_at_once(person: Machine, tmp_path: Path) -> None:
    said = person.run(script("setup"), stdin="y\n")
    token = json.loads(said[said.index("{") :])["token"]

    # Nothing that is to be committed is secret.
    committed = b"".join(path.read_bytes() for path in (person.place / ".wasmfleet").rglob("*") if path.is_file())
    assert b"PRIVATE" not in committed
    assert token.encode() not in committed

    names = ("hello", "gauge", "valve", "meter")
    machines = [pipeline(person, tmp_path / name, token, f"{name}.wasm") for name in names]
    running = [machine.start(script("pipeline"), VERSION="1.0.0") for machine in machines]
    for process in running:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    rows = json.loads(person.run("fleet keys list --json"))["keys"]
    assert {row["name"]: row["signs"] for row in rows}["build"] == ["edge"]
    published = json.loads(
        person.run(
            "curl --silent --fail --cacert .wasmfleet/operator/ca.pem "
            '--header "Authorization: Bearer $(cat "$WASMFLEET_HOME/operator/token")" "$FLEET_URL/v1/components"'
        )
    )
    assert {row["target"] for row in published["components"]} == {
        f"components/edge/{name}/1.0.0.wasm" for name in names
    }
    # A pipeline that runs twice changes nothing, and says so with the same exit code.
    assert "edge/hello@1.0.0" in machines[0].run(script("pipeline"), VERSION="1.0.0")
    person.run(script("cron"))


def test_the_rest_of_the_page_names_commands_that_exist(tmp_path: Path) -> None:
    assert script("deploy").startswith("fleet deploy ")
    for name in re.findall(r"`fleet ((?:keys|sign) [a-z]+|withdraw)", (ROOT / "docs/ci.md").read_text()):
        Machine(tmp_path / "any").run(f"fleet {name} --help")
