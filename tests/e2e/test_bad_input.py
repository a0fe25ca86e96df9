"""Mistakes in input: a single line says what failed, why and what to do, and nothing running is affected.

The rows that need no fleet are tested beside the commands (tests/fleet/cli, tests/agent); these need a real one.
"""

import contextlib
import os
import shutil
import socket
from pathlib import Path

import pytest

from fleet.demo.environment import AGENT, HOST, free_ports, module
from fleet.demo.scenario import fixture
from fleet.protocol.codes import Outcome, RejectCode
from tests.e2e.stage import GROUP

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def one_line(result: tuple[int, str, str], code: int, *words: str) -> None:
    """A mistake is said in one line, with these words and this exit code."""
    exit_code, _, errors = result
    assert "Traceback" not in errors
    assert len(errors.strip().splitlines()) == 1, errors
    assert exit_code == code, errors
    for word in words:
        assert word in errors


def copied(directory: Path, source: str, name: str = "hello", **words: str) -> Path:
    """A demo component under a name of its own, with its manifest changed word by word."""
    directory.mkdir(exist_ok=True)
    file = directory / f"{name}.wasm"
    shutil.copy(fixture(f"{source}.wasm"), file)
    text = fixture(f"{source}.toml").read_text()
    for old, new in words.items():
        text = text.replace(f"{old} =", f"{new} =")
    file.with_suffix(".toml").write_text(text)
    return file


FILES = {
    "empty": (b"", "empty"),
    "random": (b"\x93\x1f" * 512, "not WebAssembly"),
    "core-module": (b"\0asm\1\0\0\0", "core module"),
    "truncated": (None, "damaged component"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_is_no_component(kind, stage, device, tmp_path):
    data, words = FILES[kind]
    file = tmp_path / "broken.wasm"
    file.write_bytes(fixture("v1.wasm").read_bytes()[:-100] if data is None else data)
    one_line(stage.do(stage.push(file)), 2, "broken.wasm", words)
    assert stage.do(stage.version(device)) == "1"


def test_the_same_version_with_other_bytes(stage, device, tmp_path):
    file = copied(tmp_path / "other", "v1")
    shutil.copy(fixture("v2.wasm"), file)
    one_line(stage.do(stage.push(file)), 2, "hello@1.0.0 exists with other bytes", "publish a new version")
    assert stage.do(stage.version(device)) == "1"


def test_an_unknown_group_and_the_name_that_was_meant(stage, device):
    one_line(stage.do(stage.push("v1.wasm", group="edge-ue")), 4, "no group 'edge-ue'", f"did you mean {GROUP}")


def test_a_manifest_with_an_unknown_field(stage, device, tmp_path):
    file = copied(tmp_path, "v1", description="colour")
    one_line(stage.do(stage.push(file)), 2, "hello.toml", "colour")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--waves", "0"), "wave"),
        (("--soak", "-1"), "--soak"),
        (("--timeout", "0"), "--timeout"),
        (("--port", "70000"), "--port"),
    ],
)
def test_options_that_cannot_be_meant_publish_nothing(stage, device, tmp_path, arguments, word):
    file = copied(tmp_path, "v2", name="unheard-of")
    file.with_suffix(".toml").unlink()
    one_line(stage.do(stage.fleet("push", str(file), "--group", GROUP, *arguments)), 2, word)
    names = [row.name for row in stage.scene.client.components().components]
    assert "unheard-of" not in names


def test_an_unreachable_server(stage, device):
    config = stage.scene.home / "operator" / "config.toml"
    good = config.read_text()
    config.write_text(good.replace(stage.scene.client.url, f"https://127.0.0.1:{free_ports(1)[0]}"))
    try:
        one_line(stage.do(stage.fleet("devices")), 3, "cannot reach the server", "fleet serve")
    finally:
        config.write_text(good)


def test_a_token_is_good_once_and_for_a_device_without_an_identity(stage, device, tmp_path):
    async def story():
        token = (await stage.scene.command("enroll-token", "--group", GROUP, "--quiet")).encode()

        config = tmp_path / "agent.toml"
        config.touch()

        async def enroll(name: str) -> tuple[int, str, str]:
            words = ("enroll", "--state", str(tmp_path / name), "--config", str(config))
            return await stage.scene.processes.run(module(AGENT, *words), stdin=token)

        first = await enroll("first")
        assert first[0] == 0, first
        return await enroll("second"), await enroll("first")

    used, twice = stage.do(story())
    one_line(used, 1, "this token was used by", "fleet enroll-token")
    one_line(twice, 1, "already enrolled", "--force")


def test_a_second_agent_with_the_same_identity(stage, device):
    # on the same state directory: the first keeps its place at the broker
    command = next(each for each in stage.scene.devices if each.device == device.device).agent.command
    one_line(stage.do(stage.scene.processes.run(command)), 1, "another agent runs on", "--state")
    assert stage.do(stage.version(device)) == "1"


def test_a_shared_port_in_use(stage, device, tmp_path):
    command = module(
        HOST, "run", "--runtime", str(tmp_path / "r"), "--state", str(tmp_path / "s"), "--ingress",
        f"127.0.0.1:{device.port}",
    )  # fmt: skip
    one_line(stage.do(stage.scene.processes.run(command)), 1, f"127.0.0.1:{device.port}", "in use", "--ingress")


def test_a_port_of_its_own_that_somebody_has(stage, device):
    # the device says so with its code, and the instance keeps answering where it did
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        began = stage.do(stage.latest(device))
        stage.do(stage.pushed("v1.wasm", "--port", str(taken.getsockname()[1]), "--detach"))
        entry = stage.do(stage.reported(device, code=RejectCode.PORT_IN_USE, after=began))
        newest = stage.do(stage.newest_rollout())
        (entered,) = (each for each in newest.devices if each.device == device.device)
        assert entered.outcome is Outcome.DEFERRED  # it may be free later, and says nothing about the version
        stage.do(stage.scene.ask(lambda client: client.abort(newest.id, keep=False)))
    assert entry.message
    assert entry.action
    assert stage.do(stage.version(device)) == "1"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_state_directory_that_may_not_be_written(stage, device, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    command = module(HOST, "run", "--runtime", str(tmp_path / "r"), "--state", str(closed), "--ingress", "none")
    one_line(stage.do(stage.scene.processes.run(command)), 1, str(closed), "is not writable")
