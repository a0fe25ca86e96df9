"""Figures of a device for Prometheus: on the agent's socket, in a file, and with whatever components say."""

import asyncio
import contextlib
import json
import re
import shutil
import socket
import stat
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.parser import text_string_to_metric_families as plain_families

from agent.report import metrics
from fleet.protocol.codes import InstanceState
from fleet.protocol.messages import Health, InstanceHealth, LocalFigures, ReadingsHealth
from fleet.protocol.metrics import BOUNDS, Metric
from tests.agent.running_device import RunningDevice
from tests.eventually import eventually

ROOT = Path(__file__).parents[3]
OBSERVABILITY = ROOT / "deploy" / "observability"
PROMTOOL = shutil.which("promtool")


class Link:
    def __init__(self, connected):
        self.connected = connected


def a_health(*instances, **more):
    return Health(
        device="crane-0a1b2c3d",
        boot_id="b",
        at=datetime(2026, 5, 1, tzinfo=UTC),
        instances=instances,
        readings=ReadingsHealth(waiting=3, waiting_bytes=500, oldest_s=60, dropped=1),
        **more,
    )


def an_instance(name, *own, **rest):
    return InstanceHealth(
        instance=name,
        target=f"components/main/{name}/1.0.0.wasm",
        generation=1,
        state=InstanceState.RUNNING,
        calls={"ok": 5, "guest-trap": 1},
        local=LocalFigures(durations=(1, 0, 4, 0, 0, 0, 0, 1), durations_us=1_250_000, swaps=2, swap_ms=1500),
        metrics=own,
        **rest,
    )


EVERYTHING = a_health(
    an_instance(
        "web",
        Metric(name="read_errors", kind="counter", labels={"bus": "rs485"}, value=4.0, count=4),
        Metric(name="tank_litres", kind="gauge", value=812.5, count=1, total=812.5),
        Metric(name="read_seconds", kind="histogram", value=0.3, count=2, buckets=(0,) * 6 + (2,) + (0,) * 16),
        memory_bytes=4096,
    ),
    an_instance("other"),
)


def text(health, *, openmetrics=True, fleet=True, host=True):
    found = metrics.families(health, metrics.Connections(Link(fleet), Link(host)))
    return metrics.text(found, openmetrics=openmetrics)


def parsed(said, parser=text_string_to_metric_families):
    """The figures, by name of the sample and labels."""
    return {(each.name, *sorted(each.labels.items())): each.value for family in parser(said) for each in family.samples}


@pytest.mark.parametrize("openmetrics", [True, False])
def test_figures_of_the_device_its_instances_and_their_components(openmetrics):
    parser = text_string_to_metric_families if openmetrics else plain_families
    found = parsed(text(EVERYTHING, openmetrics=openmetrics), parser)
    web = ("instance_name", "web")
    assert found["wasmfleet_agent_up",] == found["wasmfleet_host_up",] == found["wasmfleet_fleet_connected",] == 1
    assert found["wasmfleet_instance_calls_total", web, ("outcome", "guest-trap")] == 1
    assert found["wasmfleet_instance_memory_bytes", web] == 4096
    assert found["wasmfleet_instance_swap_seconds_total", web] == 1.5
    assert found["wasmfleet_instance_call_duration_seconds_count", web] == 6
    assert found["wasmfleet_instance_call_duration_seconds_sum", web] == 1.25
    assert found["wasmfleet_instance_call_duration_seconds_bucket", web, ("le", "0.01")] == 5
    assert found["wasmfleet_readings_waiting",] == 3
    assert found["wasmfleet_readings_oldest_seconds",] == 60
    info = ("component", "main/web"), web, ("state", "running"), ("version", "1.0.0")
    assert found["wasmfleet_instance_info", *info] == 1
    assert found["wasmfleet_component_read_errors_total", ("bus", "rs485"), web] == 4
    assert found["wasmfleet_component_tank_litres", web] == 812.5
    assert found["wasmfleet_component_read_seconds_bucket", web, ("le", "0.05")] == 0
    assert found["wasmfleet_component_read_seconds_bucket", web, ("le", "0.1")] == 2
    assert found["wasmfleet_component_read_seconds_count", web] == 2


def test_what_components_say_is_escaped_and_of_one_kind_each():
    hostile = 'a"} 1\nwasmfleet_agent_up 0 \\'
    health = a_health(
        an_instance("a", Metric(name="n", kind="counter", labels={"v": 'q"\\'}, value=1.0)),
        an_instance("b", Metric(name="n", kind="gauge", value=1.0)),
        an_instance(
            "c",
            Metric(name="m", kind="gauge", labels={"v": hostile}),
            Metric(name="x y", kind="gauge"),
            Metric(name="h", kind="histogram", buckets=(1,)),
        ),
    )
    found = parsed(text(health))
    assert found["wasmfleet_component_n_total", ("instance_name", "a"), ("v", 'q"\\')] == 1
    assert found["wasmfleet_agent_up",] == 1
    assert found["wasmfleet_component_series_left_out", ("instance_name", "b")] == 1
    assert found["wasmfleet_component_series_left_out", ("instance_name", "c")] == 2
    assert not {each for each in found if each[0].startswith("wasmfleet_component_m")}


def test_figures_are_documented():
    page = (ROOT / "docs" / "monitoring.md").read_text()
    section = page.partition("## Figures of a device")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `(\w+)`", section, re.MULTILINE))
    everything = a_health(*EVERYTHING.instances, an_instance("x", Metric(name="tank_litres", kind="counter")))
    named = set(re.findall(r"^# TYPE (wasmfleet_\w+) ", text(everything, openmetrics=False), re.MULTILINE))
    assert documented == {name for name in named if not re.match(r"wasmfleet_component_(read|tank)", name)}


@pytest.mark.skipif(PROMTOOL is None, reason="promtool, of Debian's package prometheus, is not installed")
def test_promtool_finds_nothing_to_complain_of():
    said = text(EVERYTHING, openmetrics=False).encode()
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=said, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def ask(path, line="GET /metrics HTTP/1.1", *, more=b""):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(60)
        sock.connect(str(path))
        sock.sendall(f"{line}\r\nHost: device\r\nAccept: application/openmetrics-text\r\n\r\n".encode() + more)
        head, _, body = sock.makefile("rb").read().partition(b"\r\n\r\n")
    return int(head.split()[1]), head, body.decode()


def test_the_agent_answers_on_its_socket_and_the_command_writes_a_file(tmp_path):
    with RunningDevice(tmp_path, "web") as device:
        file, path = tmp_path / "wasmfleet.prom", device.places.metrics_socket
        done = device.agent("metrics", "--textfile", str(file))
        assert done.returncode == 1
        assert "does not answer" in done.stderr
        assert parsed(file.read_text(), plain_families) == {("wasmfleet_agent_up",): 0}
        device.start_host()
        device.start_agent()
        device.comes_to_answer()
        calls = ("wasmfleet_instance_calls_total", ("instance_name", "web"), ("outcome", "ok"))
        eventually(lambda: parsed(ask(path)[2]).get(calls, 0) >= 1, "the call is counted")
        found = parsed(ask(path)[2])
        assert (found["wasmfleet_host_up",], found["wasmfleet_fleet_connected",]) == (1, 0)
        assert found["wasmfleet_instance_call_duration_seconds_count", ("instance_name", "web")] >= 1
        assert device.agent("metrics", "--textfile", str(file)).returncode == 0
        assert parsed(file.read_text(), plain_families)["wasmfleet_agent_up",] == 1
        assert stat.S_IMODE(file.stat().st_mode) == 0o644


@pytest_asyncio.fixture
async def served(tmp_path):
    """The path of a socket that answers, in the place of one that was left behind; and how often health was asked."""
    path, asked = tmp_path / "metrics.sock", []
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))

    async def health():
        asked.append(1)
        return EVERYTHING

    part = metrics.MetricsSocket(path, health, metrics.Connections(Link(connected=True), Link(connected=True)))
    task = asyncio.create_task(part.run())
    await asyncio.to_thread(eventually, lambda: answers(path), "the socket is there")
    yield path, asked
    task.cancel()
    await asyncio.wait([task])
    assert not path.exists()


def answers(path):
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.connect(str(path))
        return True
    return False


@pytest.mark.asyncio
async def test_the_socket_answers_one_question_and_refuses_others(served):
    path, asked = served
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    for line, expected in [
        ("GET /metrics HTTP/1.1", 200),
        ("GET /metrics?x=1 HTTP/1.1", 200),
        ("POST /metrics HTTP/1.1", 405),
        ("GET /other HTTP/1.1", 404),
        ("GET /" + "x" * 10_000, 400),
        ("", 404),
    ]:
        status, head, body = await asyncio.to_thread(ask, path, line)
        assert status == expected
        assert (b"application/openmetrics-text" in head) == (status == 200) == bool(body)
    assert await asyncio.to_thread(metrics.fetch, path) == text(EVERYTHING, openmetrics=False)
    assert len(asked) <= 3


@pytest.mark.asyncio
async def test_clients_that_say_nothing_keep_nobody_out_for_long(served):
    path, _ = served
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(str(path))
        assert (await asyncio.to_thread(ask, path))[0] == 503
    await asyncio.to_thread(eventually, lambda: ask(path)[0] == 200, "there is room again")


def test_the_bounds_are_the_same_for_every_histogram():
    assert len(BOUNDS) == 22
    assert (BOUNDS[0], BOUNDS[-1]) == (0.001, 10_000)
    assert list(BOUNDS) == sorted(BOUNDS)


def used_names():
    """Names of figures that alerts and panels of devices ask for."""
    dashboard = json.loads((OBSERVABILITY / "dashboard-device.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += re.findall(r"expr: (.*)", (OBSERVABILITY / "alerts-device.yml").read_text())
    return {name for each in asked for name in re.findall(r"\bwasmfleet_\w+", each)}


def test_alerts_and_panels_ask_for_figures_that_exist():
    used = used_names()
    assert len(used) > 15
    assert used <= {name for name, *_ in parsed(text(EVERYTHING))}


@pytest.mark.skipif(PROMTOOL is None, reason="promtool, of Debian's package prometheus, is not installed")
@pytest.mark.parametrize("arguments", ["check rules alerts-device.yml", "test rules alerts-device_test.yml"])
def test_promtool_agrees_with_the_alerts(arguments):
    done = subprocess.run(
        [PROMTOOL, *arguments.split()], cwd=OBSERVABILITY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
