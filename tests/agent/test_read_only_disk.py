"""Device whose disk has become read-only, as a worn card does: diagnosis works, and says what is wrong."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.agent.read_only_places import read_only, unshare
from tests.agent.running_device import RunningDevice
from tests.eventually import eventually

pytestmark = pytest.mark.skipif(not unshare(), reason="no mount namespaces for this user")


def contents(directory):
    """What the files hold, but for the log, which an agent that runs goes on writing."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.parent.name != "log")
    return {path: path.read_bytes() for path in files}


@pytest.fixture
def device(tmp_path):
    with RunningDevice(tmp_path, "web") as made:
        yield made


def reads(device):
    """Run the commands that only read, with the agent's state on a read-only file system."""
    device.prefix = read_only(device.state)
    before = contents(device.state)
    status = device.agent("status")
    assert status.returncode == 0, status.stderr
    why = device.agent("why", "--json")
    assert why.returncode == 0, why.stderr
    assert contents(device.state) == before
    return status.stdout, json.loads(why.stdout)


@pytest.mark.parametrize("end", ["stopped", "killed"])
def test_status_and_why_of_a_device_whose_agent_has_ended(device, end):
    process = device.start_agent()
    (process.terminate if end == "stopped" else process.kill)()
    process.wait(60)
    assert (device.state / "store.db-wal").exists() == (end == "killed")
    status, why = reads(device)
    assert "web: runs main/hello@1.0.0" in status
    assert why["running"][0]["instance"] == "web"
    assert f"{device.state} is on a read-only file system" in status


def test_status_and_why_beside_an_agent_that_runs(device):
    device.start_agent()
    status, why = reads(device)
    assert "web: runs main/hello@1.0.0" in status
    assert why["unsent_reports"] == 1


def test_status_of_a_device_that_has_no_database_yet(device):
    device.places.database.unlink()
    status, _ = reads(device)
    assert "no instance is committed" in status


def test_check_names_the_disk(device):
    device.prefix = read_only(device.state)
    results = {each["name"]: each for each in json.loads(device.agent("check", "--json").stdout)}
    assert not results["disk"]["ok"]
    assert f"{device.state} is on a read-only file system" in results["disk"]["text"]


def test_components_start_from_a_read_only_disk(device):
    """Whoever has run once can run again: nothing of a start needs a write."""
    device.start_host()
    assert device.agent("restore").returncode == 0
    device.ask_host_to_stop("web")
    device.prefix = read_only(device.state)
    restored = device.agent("restore")
    assert (restored.returncode, restored.stdout) == (0, "web: runs\n"), restored.stderr
    assert device.answers() == 200


def test_components_start_after_a_boot_with_a_read_only_card(device):
    """Neither the agent nor the host can write anywhere but to memory; what ran runs again, and answers."""
    host = device.start_host()
    assert device.agent("restore").returncode == 0
    device.comes_to_answer()
    host.terminate()
    assert host.wait(60) == 0
    before = contents(device.directory / "host")
    device.prefix = read_only(device.state, device.directory / "host")
    host = device.start_host()
    assert "is on a read-only file system" in device.said("host")
    restored = device.agent("restore")
    assert (restored.returncode, restored.stdout) == (0, "web: runs\n"), restored.stderr
    device.comes_to_answer()
    os.kill(worker_of(device), signal.SIGKILL)
    eventually(lambda: device.answers() == 200, "a worker that has ended is replaced")
    assert "Traceback" not in device.said("host")
    assert contents(device.directory / "host") == before


def worker_of(device):
    """The process that runs the component."""
    host = device._processes[-1].pid
    (zygote,) = [each for each in children(host) if b"worker.zygote" in command(each) and children(each)]
    return children(zygote)[0]


def children(pid):
    return [int(each) for task in Path(f"/proc/{pid}/task").glob("*/children") for each in task.read_text().split()]


def command(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes()
