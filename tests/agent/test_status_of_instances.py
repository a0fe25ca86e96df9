"""`fleet-agent status` says what runs by the host, and not only what is recorded."""

import contextlib
import json
import os
import signal
from pathlib import Path

import pytest

from agent.host.ipc import host_api
from fleet.protocol.codes import InstanceState
from tests.agent.running_device import RunningDevice
from tests.eventually import eventually


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    with RunningDevice(tmp_path_factory.mktemp("device"), "web") as made:
        made.host = made.start_host()
        assert made.agent("restore").returncode == 0
        made.comes_to_answer()
        yield made


def told(device):
    status, why = device.agent("status"), device.agent("why", "--json")
    assert (status.returncode, why.returncode) == (0, 0), status.stderr + why.stderr
    return status.stdout, json.loads(why.stdout)["problems"]


def workers(pid):
    """Processes below one that have no children: workers, and helpers."""
    found, todo = [], [pid]
    while todo:
        below = [
            int(child)
            for task in Path(f"/proc/{todo.pop()}/task").glob("*/children")
            for child in task.read_text().split()
        ]
        todo += below
        found += [each for each in below if b"worker" in Path(f"/proc/{each}/cmdline").read_bytes()]
    return found


def test_an_instance_that_answers_runs(device):
    status, problems = told(device)
    assert "web: runs main/hello@1.0.0" in status
    assert problems == []


@pytest.mark.nightly
def test_an_instance_in_quarantine_does_not_run(device):
    def quarantined():
        for pid in workers(device.host.pid):
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                os.kill(pid, signal.SIGKILL)
        return device.ask_host(host_api.Status).instances[0].state is InstanceState.QUARANTINED

    eventually(quarantined, "the host gives it up", pause_s=0.5)
    status, (problem,) = told(device)
    assert "web: does not run; main/hello@1.0.0 is committed" in status
    assert problem.startswith("web does not run: it crashed again and again")
    device.ask_host(host_api.Restart, instance="web")
    device.comes_to_answer()


def test_an_instance_that_the_host_was_not_asked_to_start_does_not_run(device):
    device.ask_host_to_stop("web")
    status, (problem,) = told(device)
    assert "web: does not run; main/hello@1.0.0 is committed" in status
    assert problem.startswith("web does not run: the host was not asked to start it")
    assert device.agent("restore").returncode == 0


def test_without_a_host_nothing_answers(device):
    device.host.terminate()
    assert device.host.wait(60) == 0
    status, problems = told(device)
    assert problems == ["the host does not run, so no instance answers"]
    assert "the host does not run, so no instance answers" in status
