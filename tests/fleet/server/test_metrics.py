"""Figures for Prometheus: their format, what they count, who may read them, and what is built on them."""

import asyncio
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import msgspec
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from fleet.protocol.codes import AlertKind, InstanceState
from fleet.protocol.trust_api import OperatorReply, OperatorRequest, Role
from fleet.server.api import metrics as metrics_module
from fleet.server.api.metrics import AGENTS_MAX, INSTANCES_MAX, OTHER, Latencies

ROOT = Path(__file__).parents[3]
OBSERVABILITY = ROOT / "deploy" / "observability"
OPENMETRICS = {"accept": "application/openmetrics-text; version=1.0.0"}
ACCESS = {"/metrics": 200, "/v1/status": 403, "/v1/devices": 403, "/v1/audit": 403, "/v1/operators": 403}


async def scraped(operator):
    """The figures, by name of the sample and labels."""
    answer = await operator.http.get("/metrics", headers=OPENMETRICS)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    families = list(text_string_to_metric_families(answer.text))
    return {(each.name, *sorted(each.labels.items())): each.value for family in families for each in family.samples}


@pytest.mark.asyncio
async def test_figures_follow_what_happens_in_the_fleet(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        await fleet.device("a")
        await operator.decided(await operator.deploy(await operator.publish("1.0.0")))
        await fleet.enrol("away")
        found = await scraped(operator)
        assert found["wasmfleet_devices",] == 2
        assert found["wasmfleet_devices_online",] == 1
        assert found["wasmfleet_devices_ahead",] == 0
        assert found["wasmfleet_rollouts", ("state", "succeeded")] == 1
        assert found["wasmfleet_broker_connected",] == 1
        assert found["wasmfleet_messages_total", ("kind", "report")] > 0
        ends = {key[1][1] for key in found if key[0] == "wasmfleet_certificate_expiry_timestamp_seconds"}
        assert ends == {"root", "issuing", "server"}
        assert {"root", "targets", "snapshot", "timestamp"} <= {
            key[1][1] for key in found if key[0] == "wasmfleet_role_expiry_timestamp_seconds"
        }
        assert found["wasmfleet_http_request_duration_seconds_count", ("code", "200"), ("listener", "operators")] > 0
        assert found["process_cpu_seconds_total",] > 0
        assert {key[1][1] for key in found if key[0] == "wasmfleet_device_alerts"} == {str(kind) for kind in AlertKind}
        assert (await operator.http.get("/metrics")).headers["content-type"].startswith("text/plain")


@pytest.mark.asyncio
async def test_a_scraper_reads_the_figures_and_nothing_else(new_fleet):
    async with new_fleet() as fleet:
        operator = fleet.operator
        answer = await operator.http.put(
            "/v1/operators/prometheus", content=msgspec.json.encode(OperatorRequest(role=Role.SCRAPER))
        )
        token = msgspec.json.decode(answer.content, type=OperatorReply).token
        headers = {"authorization": f"Bearer {token}"}
        got = {path: (await operator.http.get(path, headers=headers)).status_code for path in ACCESS}
        assert got == ACCESS
        assert (await operator.http.post("/v1/freeze", headers=headers, json={"reason": "x"})).status_code == 403
        assert (await operator.http.get("/metrics", headers={"authorization": "Bearer none"})).status_code == 401


def test_the_number_of_figures_does_not_grow_with_a_fleet():
    many = Counter({(f"main/c{number}", "1.0.0", str(InstanceState.RUNNING)): 1 + number % 7 for number in range(5000)})
    shown = metrics_module._most(many, INSTANCES_MAX)
    assert len(shown) == INSTANCES_MAX + 1
    assert shown[-1][0] == (OTHER, OTHER, OTHER)
    assert sum(number for _, number in shown) == many.total()
    assert metrics_module._most(Counter(), AGENTS_MAX) == []


@pytest.mark.asyncio
async def test_an_answer_is_counted_once_with_its_status_and_until_its_head():
    times = iter([10.0, 10.25])
    registry = metrics_module.prometheus_client.CollectorRegistry()
    latencies = Latencies(registry, lambda: next(times))

    async def application(scope, receive, send):
        await send({"type": "http.response.start", "status": 418})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    sent = []

    async def send(message):
        sent.append(message["type"])

    await latencies.of(application, "devices")({"type": "http"}, None, send)
    assert sent == ["http.response.start", "http.response.body"]
    labels = {"listener": "devices", "code": "418"}
    assert registry.get_sample_value("wasmfleet_http_request_duration_seconds_sum", labels) == 0.25
    assert registry.get_sample_value("wasmfleet_http_request_duration_seconds_count", labels) == 1


def used_names():
    """Names of figures that alerts and panels ask for."""
    dashboard = json.loads((OBSERVABILITY / "dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += re.findall(
        r"expr: (?:>\n)?(.*?)\n +(?:for|labels):", (OBSERVABILITY / "alerts.yml").read_text(), re.DOTALL
    )
    return {name for each in asked for name in re.findall(r"\b(?:wasmfleet|process)_\w+", each)}


@pytest.mark.asyncio
async def test_alerts_and_panels_ask_for_figures_that_exist(new_fleet):
    async with new_fleet() as fleet:
        await fleet.enrol("a")
        text = (await fleet.operator.http.get("/metrics", headers=OPENMETRICS)).text
    names = set(re.findall(r"^# TYPE (\w+)", text, re.MULTILINE)) | set(re.findall(r"^(\w+)", text, re.MULTILINE))
    names |= {f"{family}_total" for family in re.findall(r"^# TYPE (\w+) counter", text, re.MULTILINE)}
    used = used_names()
    assert len(used) > 15
    assert used <= names
    page = (ROOT / "docs" / "monitoring.md").read_text().partition("## Figures\n")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `(\w+)`", page, re.MULTILINE))
    ours = re.findall(r"^# TYPE (wasmfleet_\w+) (\w+)", text, re.MULTILINE)
    ending = {"info": "_info", "counter": "_total"}
    assert documented == {name + ending.get(kind, "") for name, kind in ours}


PROMTOOL = shutil.which("promtool")


@pytest.mark.skipif(PROMTOOL is None, reason="promtool, of Debian's package prometheus, is not installed")
@pytest.mark.asyncio
async def test_promtool_finds_nothing_to_complain_of(new_fleet):
    async with new_fleet() as fleet:
        await fleet.enrol("a")
        text = (await fleet.operator.http.get("/metrics")).content
    for arguments, data in [
        (["check", "metrics"], text),
        (["check", "rules", "alerts.yml"], b""),
        (["test", "rules", "alerts_test.yml"], b""),
        (["check", "config", "--syntax-only", "prometheus.yml"], b""),
    ]:
        done = await asyncio.to_thread(
            subprocess.run, [PROMTOOL, *arguments], cwd=OBSERVABILITY, input=data, capture_output=True, check=False
        )
        assert done.returncode == 0, (arguments, done.stdout, done.stderr)
