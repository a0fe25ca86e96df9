"""`fleet-host check` on hardware: what the owner's policy names, and the host's service keeps closed."""

import os
import subprocess
import sys

import pytest
import support

from agent.host import hardware_check

PRINTS = """#!/bin/sh
cat <<'EOF'
{said}
EOF
"""


@pytest.fixture
def check(tmp_path):
    """Run the check with a policy, where systemd says this of the service."""

    def run(policy, *, unit="LoadState=loaded\nDevicePolicy=closed"):
        config = tmp_path / "agent.toml"
        config.write_text(policy)
        systemctl = tmp_path / "bin" / "systemctl"
        systemctl.parent.mkdir(exist_ok=True)
        systemctl.write_text(PRINTS.format(said=unit))
        systemctl.chmod(0o755)
        done = subprocess.run(
            [sys.executable, "-m", "agent.host.cli", "check", "--config", config],
            cwd=support.ROOT,
            env={**os.environ, "PATH": f"{systemctl.parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.partition("\nhardware")[2]

    return run


def test_without_hardware_in_the_policy_nothing_is_said(check):
    assert check("[policy]\nlogs = 'off'\n") == ""


def test_a_node_that_is_missing_is_named(check):
    assert "policy.gpio names /dev/gpiochip4711, and this device has no such node" in check(
        '[policy]\ngpio = ["gpiochip4711:1"]\n'
    )


def test_a_policy_that_cannot_be_read_is_named(check):
    assert "cannot read the policy: 'gpio' is no GPIO line" in check('[policy]\ngpio = ["gpio"]\n')


@pytest.mark.parametrize(
    ("allow", "closed"),
    [
        ("", [0, 1]),
        ("DeviceAllow={dev}/gpiochip0 rw", [1]),
        ("DeviceAllow={dev}/gpiochip0 rw\nDeviceAllow={dev}/gpiochip1 r", [1]),
        ("DeviceAllow={dev}/gpiochip0 rwm\nDeviceAllow={dev}/gpiochip1 rw", []),
    ],
)
def test_what_the_service_keeps_closed_is_named_with_the_drop_in_that_opens_it(
    check, tmp_path, monkeypatch, allow, closed
):
    check("", unit=f"LoadState=loaded\nDevicePolicy=closed\n{allow.format(dev=tmp_path)}")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    for chip in (0, 1):
        (tmp_path / f"gpiochip{chip}").touch()
    (tmp_path / "agent.toml").write_text('[policy]\ngpio = ["gpiochip0:1", "gpiochip1:2-3", "gpiochip0:4"]\n')
    said = hardware_check.report(tmp_path / "agent.toml", tmp_path)
    named = [f"policy.gpio names {tmp_path}/gpiochip{chip}, which fleet-host.service keeps closed" for chip in closed]
    assert [line.removeprefix("hardware     ") for line in said if "keeps closed" in line] == named
    assert [line for line in said if line.startswith("DeviceAllow=")] == [
        f"DeviceAllow={tmp_path}/gpiochip{chip} rw" for chip in closed
    ]
    assert any("/etc/systemd/system/fleet-host.service.d/hardware.conf" in line for line in said) == bool(closed)
    assert any("is open to the host" in line for line in said) == (not closed)


def test_a_host_without_a_service_is_judged_by_what_its_user_may_open(check, tmp_path, monkeypatch):
    check("", unit="LoadState=not-found\nDevicePolicy=auto")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "gpiochip0").touch()
    (tmp_path / "agent.toml").write_text('[policy]\ngpio = ["gpiochip0:1"]\n')
    assert hardware_check.report(tmp_path / "agent.toml", tmp_path) == [
        f"hardware     {tmp_path}/gpiochip0 is open to the host"
    ]
