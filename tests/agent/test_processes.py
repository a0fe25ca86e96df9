"""`fleet-host processes` on a device whose agent and host run."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.agent.running_device import ROOT, RunningDevice
from tests.eventually import eventually

COUNTED = ("agent", "supervisor", "router", "zygote", "worker")


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    with RunningDevice(tmp_path_factory.mktemp("device"), "web") as made:
        made.start_host()
        made.start_agent()
        made.comes_to_answer()
        yield made


def processes(*arguments, **more):
    command = [sys.executable, "-m", "agent.host.cli", "processes", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=60, **more)


def listing(device):
    done = processes("--runtime", str(device.runtime), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def listed(device):
    return listing(device)


def test_threads_are_those_of_the_kernel(device):
    """The agent may start another one meanwhile: what is listed between two equal answers of the kernel counts."""
    agent = device._processes[1].pid

    def threads():
        status = Path(f"/proc/{agent}/status").read_text()
        return int(status.partition("\nThreads:\t")[2].split()[0])

    def listed_as_they_are():
        before = threads()
        counted = next(each["threads"] for each in listing(device) if each["pid"] == agent)
        return before == counted == threads()

    eventually(listed_as_they_are, "as many threads as the kernel says")


def test_each_process_is_named_by_what_it_is(device, listed):
    assert set(COUNTED) <= {each["process"] for each in listed}
    host, agent = (process.pid for process in device._processes)
    assert [each["pid"] for each in listed if each["process"] == "supervisor"] == [host]
    assert [each["pid"] for each in listed if each["process"] == "agent"] == [agent]
    assert [each["instance"] for each in listed if each["process"] == "worker"] == ["web"]
    assert not any(each.get("instance") for each in listed if each["process"] != "worker")


def test_figures_are_those_of_the_kernel(listed):
    by_process = {each["process"]: each for each in listed}
    agent = by_process["agent"]
    assert agent["files"] > 3
    assert 0 < agent["private_bytes"] <= agent["proportional_bytes"] <= agent["resident_bytes"]
    assert agent["private_bytes"] + agent["shared_bytes"] == agent["resident_bytes"]
    for name in COUNTED:
        began = datetime.fromisoformat(by_process[name]["started"])
        assert timedelta() <= datetime.now(UTC) - began < timedelta(hours=1), name


@pytest.mark.skipif(os.geteuid() != 0, reason="memory of sandboxed processes is for root to read")
def test_root_reads_the_memory_of_every_process(listed):
    for each in listed:
        assert each["private_bytes"] > 0, each
        assert each["files"] > 0, each


def test_a_table_for_people(device):
    done = processes("--runtime", str(device.runtime))
    heads, *rows, sums = [line for line in done.stdout.splitlines() if not line.startswith("run as root")]
    assert heads.split()[:4] == ["PID", "PROCESS", "INSTANCE", "PRIVATE"]
    assert {row.split()[1] for row in rows} >= set(COUNTED)
    assert sums.split()[0] == "all"
    assert ("run as root" in done.stdout) == (os.geteuid() != 0)


def test_a_relative_runtime_directory_is_the_same(device):
    relative = os.path.relpath(device.runtime, ROOT)
    done = processes("--runtime", relative, "--json")
    assert {each["pid"] for each in json.loads(done.stdout)} >= {process.pid for process in device._processes}


def test_where_nothing_runs_it_says_so(tmp_path):
    done = processes("--runtime", str(tmp_path), "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout) == []
    assert f"neither agent nor host runs with {tmp_path}" in done.stderr
    assert processes("--runtime", str(tmp_path)).stdout == ""
