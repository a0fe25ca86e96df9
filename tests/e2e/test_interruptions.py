"""Processes killed at the worst moments: every promise still holds afterwards."""

import asyncio
import os
import re
import signal
from pathlib import Path

import pytest

from fleet.demo.scenario import fixture
from fleet.protocol.codes import Phase, RolloutState
from tests.e2e.stage import alive, descendants
from tests.eventually import eventually_async

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def current(stage, device):
    """The device as it is now; processes may have been started again."""
    return next(each for each in stage.scene.devices if each.device == device.device)


def test_an_agent_that_restarts_touches_no_instance(stage, device):
    async def story():
        here = current(stage, device)
        lanes = set(descendants(here.host.process.pid))
        await stage.kill(here.agent)
        assert await stage.version(here) == "1"
        await stage.start_agent(here)
        await stage.until("the agent is back", lambda: stage.scene.client.devices().devices[0].online or None)
        return lanes, set(descendants(here.host.process.pid))

    before, after = stage.do(story())
    assert before == after


def test_a_host_that_restarts_while_the_agent_is_down_answers_again(stage, device):
    # no agent, no network, no server needed: `fleet-agent restore` reads the committed run-set
    async def story():
        here = current(stage, device)
        await stage.stop(here.agent)
        orphans = descendants(here.host.process.pid)
        await stage.kill(here.host)
        here = await stage.start_host(here)
        await stage.answers(here, "1")
        here = await stage.start_agent(here)
        return orphans

    orphans = stage.do(story())
    assert not [pid for pid in orphans if alive(pid)]


def test_a_host_that_dies_under_a_running_agent_is_given_back_what_ran(stage, device):
    # nobody but the agent that was there all the time: it sees another session of the host, and restores
    async def story():
        here = current(stage, device)
        agent = here.agent.process.pid
        await stage.kill(here.host)
        here = await stage.start_host(here, restore=False)
        await stage.answers(here, "1")
        return agent, current(stage, device).agent.process.pid

    before, after = stage.do(story())
    assert before == after
    assert alive(after)


def test_an_agent_killed_in_mid_download_resumes_where_it_was(stage, device, tmp_path):
    # The server is stopped in the middle of the bytes, the agent is killed, both come back
    big = tmp_path / "big.wasm"
    big.write_bytes(padded("v2.wasm", 48 * 1024 * 1024))
    toml = tmp_path / "big.toml"
    toml.write_text(component_toml("v2.toml", version="2.0.48"))

    async def story():
        here = current(stage, device)
        server = stage.scene._server
        artifacts = stage.state(here) / "artifacts"
        began = await stage.latest(here)
        code, output, errors = await stage.push(big, "--detach")
        assert code == 0, output + errors
        part = await appears(artifacts, at_least=1024 * 1024)
        server.process.send_signal(signal.SIGSTOP)
        await stage.kill(here.agent)
        kept = part.stat().st_size if part.exists() else 0
        server.process.send_signal(signal.SIGCONT)
        assert await stage.version(here) == "1"
        here = await stage.start_agent(here)
        await stage.answers(here, "2")
        await stage.reported(here, phase=Phase.COMMITTED, after=began)
        return kept

    kept = stage.do(story())
    assert kept > 0, "the download was over before it could be interrupted"


def test_a_host_killed_in_mid_swap_leaves_the_old_or_the_new(stage, device):
    async def story():
        here = current(stage, device)
        before = await stage.version(here)
        began = await stage.latest(here)
        push = asyncio.create_task(stage.push("v1.wasm" if before == "2" else "v2.wasm"))
        await stage.reported(here, phase=Phase.SWAPPING, after=began)
        await stage.kill(here.host)
        here = await stage.start_host(here)
        code, output, errors = await push
        return before, await stage.version(here), code, output + errors

    before, after, code, said = stage.do(story())
    wanted = "1" if before == "2" else "2"
    assert after == (wanted if code == 0 else before), said


def test_a_server_that_restarts_in_mid_rollout_goes_on_with_it(stage, device):
    # the device is frozen, so that the rollout cannot be over before the server has been killed
    async def story():
        here = current(stage, device)
        before = await stage.version(here)
        here.agent.process.send_signal(signal.SIGSTOP)
        code, output, errors = await stage.push("v1.wasm" if before == "2" else "v2.wasm", "--detach")
        assert code == 0, output + errors
        await stage.restart_server()
        rollout = await stage.newest_rollout()
        here.agent.process.send_signal(signal.SIGCONT)
        await stage.until(
            "the rollout succeeds",
            lambda: stage.scene.client.rollout(rollout.id).state is RolloutState.SUCCEEDED or None,
        )
        return before, rollout.state, await stage.version(here)

    before, state, after = stage.do(story())
    assert state is RolloutState.RUNNING
    assert {before, after} == {"1", "2"}


def test_a_broker_that_dies_is_started_again_and_devices_come_back(stage, device):
    async def story():
        here = current(stage, device)
        before = await stage.version(here)
        server = stage.scene._server
        broker = next(pid for pid in descendants(server.process.pid) if is_broker(pid))
        os.kill(broker, signal.SIGKILL)
        await stage.pushed("v1.wasm" if before == "2" else "v2.wasm")
        return before, await stage.version(here)

    before, after = stage.do(story())
    assert {before, after} == {"1", "2"}


def is_broker(pid: int) -> bool:
    """Mosquitto, or the embedded broker's process."""
    line = Path(f"/proc/{pid}/cmdline").read_bytes()
    return b"mosquitto" in line or b"embedded" in line


async def appears(directory, *, at_least):
    """Wait for a partial download of a size."""

    def found():
        parts = directory.glob("*.part") if directory.exists() else ()
        return next((part for part in parts if part.stat().st_size >= at_least), None)

    return await eventually_async(found, "a partial download", pause_s=0.002)


def padded(name: str, size: int) -> bytes:
    """A component with a custom section that makes it large."""
    data = fixture(name).read_bytes()
    payload = b"\x07padding" + bytes(size)
    return data + b"\x00" + leb128(len(payload)) + payload


def leb128(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def component_toml(name: str, *, version: str) -> str:
    """One of the demo's manifests with another version."""
    text = fixture(name).read_text()
    return re.sub(r'^version = ".*"', f'version = "{version}"', text, count=1, flags=re.MULTILINE)
