"""Systemd units: exposure, settings, and consistency with the package."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

UNITS = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))

# The exposure that `systemd-analyze security` may find, 0 (closed) to 10 (open).
CEILINGS = {
    "fleet-agent.service": 2.0,
    "fleet-restore.service": 1.0,
    "fleet-enroll.service": 3.5,
    "fleet-compiler@.service": 1.0,
    "fleet-server.service": 2.0,
    "fleet-publisher.service": 2.0,
    # building sandboxes for components needs root, namespaces and control groups
    "fleet-host.service": 4.7,
}


def settings(unit: str) -> list[tuple[str, str]]:
    text = (UNITS / unit).read_text().replace("\\\n", "")
    return [tuple(line.split("=", 1)) for line in text.splitlines() if re.match(r"[A-Za-z]+=", line)]  # type: ignore[misc]


def value(unit: str, key: str) -> list[str]:
    return [found for name, found in settings(unit) if name == key]


@pytest.mark.parametrize("service", SERVICES, ids=lambda path: path.name)
def test_the_exposure_of_a_service_is_below_its_ceiling(service: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is missing: apt-get install systemd")
    command = [analyze, "security", "--offline=true", "--no-pager", f"./{service.name}"]
    done = subprocess.run(command, cwd=UNITS, capture_output=True, text=True, check=False)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= CEILINGS[service.name], done.stdout


def test_every_service_has_a_ceiling() -> None:
    assert {path.name for path in SERVICES} == set(CEILINGS)


def test_the_agent_outlives_the_host() -> None:
    # a host that a bad component crashes again and again must not end the agent
    for key in ("Requires", "BindsTo", "PartOf", "Requisite"):
        assert not value("fleet-agent.service", key)
    assert "fleet-host.service" in " ".join(value("fleet-agent.service", "Wants"))


def test_a_stop_of_the_agent_is_a_signal_to_the_agent_alone() -> None:
    # the agent ends its compiler itself, and a compiler that is ended looks like one that failed
    assert value("fleet-agent.service", "KillMode") == ["mixed"]


@pytest.mark.parametrize("unit", sorted(UNITS.glob("fleet-*")), ids=lambda path: path.name)
def test_a_missing_or_failed_unit_stops_no_other(unit: Path) -> None:
    for key in ("Requires", "Requisite", "BindsTo", "PartOf", "Conflicts", "PropagatesStopTo"):
        assert not value(unit.name, key), "what is ordered is not thereby required"


def test_a_control_group_is_delegated_to_the_host() -> None:
    assert value("fleet-host.service", "Delegate") == ["cpu memory pids"]
    assert value("fleet-host.service", "OOMPolicy") == ["continue"], "a component out of memory does not end the host"


STATE_MODES = {
    "fleet-host.service": "0711",
    "fleet-compiler@.service": None,
}  # sandboxes reach their data through the first


@pytest.mark.parametrize("service", SERVICES, ids=lambda path: path.name)
def test_the_state_of_a_service_is_private(service: Path) -> None:
    mode = STATE_MODES.get(service.name, "0700")
    assert value(service.name, "StateDirectoryMode") == ([mode] if mode else [])
    assert len(value(service.name, "StateDirectory")) == int(mode is not None)
    # and the rest of the file system is read-only
    assert value(service.name, "ProtectSystem") == ["strict"]
    assert value(service.name, "UMask") == ["0022" if service.name == "fleet-host.service" else "0077"]


def test_only_the_agent_may_access_the_socket_directory() -> None:
    assert value("fleet-host.service", "RuntimeDirectoryMode") == ["0750"]
    assert value("fleet-host.service", "Group") == value("fleet-agent.service", "Group")
    assert re.search(
        r"^d +/run/wasmfleet +0750 root wasmfleet", (UNITS / "wasmfleet-agent.tmpfiles.conf").read_text(), re.MULTILINE
    )


@pytest.mark.parametrize("name", ["agent", "host"])
def test_readiness_is_notified_and_hanging_services_are_killed(name: str) -> None:
    assert value(f"fleet-{name}.service", "Type") == ["notify"]
    (patience_s,) = value(f"fleet-{name}.service", "WatchdogSec")
    assert 30 <= int(patience_s) <= 300
    assert value(f"fleet-{name}.service", "Restart") == ["always"]


def test_an_agent_that_its_owner_stops_stays_stopped() -> None:
    # PathExists= holds as long as the file exists, and would start the agent again at once
    assert not value("fleet-agent.path", "PathExists")
    assert value("fleet-agent.path", "PathChanged") == value("fleet-agent.service", "ConditionPathExists")


def test_the_host_restores_at_every_start_without_the_agent() -> None:
    assert value("fleet-host.service", "Wants") == ["fleet-restore.service"]
    assert value("fleet-restore.service", "PrivateNetwork") == ["yes"]
    assert "fleet-agent.service" not in " ".join(value("fleet-host.service", "After"))


def test_the_host_does_not_start_without_the_baseline_layers_and_is_not_restarted() -> None:
    (command,) = value("fleet-host.service", "ExecStart")
    assert command.split("--minimum ")[1].split()[0] == "baseline", "some devices lack Landlock and control groups"
    assert value("fleet-host.service", "RestartPreventExitStatus") == ["78"]


def test_only_services_that_map_machine_code_have_executable_memory() -> None:
    denied = {service.name for service in SERVICES if value(service.name, "MemoryDenyWriteExecute") == ["yes"]}
    assert denied == {f"fleet-{each}.service" for each in ("agent", "enroll", "publisher", "restore", "server")}


@pytest.mark.parametrize("service", SERVICES, ids=lambda path: path.name)
def test_failing_services_are_restarted_forever(service: Path) -> None:
    if value(service.name, "Restart") == ["always"]:
        assert value(service.name, "StartLimitIntervalSec") == ["0"]
        assert value(service.name, "RestartMaxDelaySec"), "restarts must slow down"


@pytest.mark.parametrize("unit", sorted(UNITS.glob("fleet-*")), ids=lambda path: path.name)
def test_a_unit_explains_itself_to_the_devices_owner(unit: Path) -> None:
    text = unit.read_text()
    assert text.startswith("# "), "the first line says what the unit is for"
    assert value(unit.name, "Description")
    assert all(len(line) <= 200 for line in text.splitlines())
