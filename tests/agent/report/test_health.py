"""Health of a device: without its host, and as the server gets it."""

from types import SimpleNamespace

import pytest
from msgspec import UNSET

from agent.config import Paths
from agent.host.ipc import host_api
from agent.link.host_client import HostClient
from agent.report.uplink import HealthSources, Uplink, for_server
from agent.update.problems import Problems
from agent.update.state import DeploymentState, DeviceContext
from agent.update.store import Database, Store
from fleet.protocol import wire
from fleet.protocol.codes import InstanceState
from fleet.protocol.messages import InstanceHealth, LocalFigures
from fleet.protocol.metrics import Metric


async def problems(places):
    """Return the problems in the device's health."""
    db = Database(Store(places.database))
    problems = Problems(db)
    problems.set("somebody", "another")
    uplink = Uplink(
        device=DeviceContext(device="crane-0a1b2c3d", boot_id="b", places=places, mac_key=b"", clock=lambda: 0.0),
        mqtt=SimpleNamespace(publish=lambda *_: True),
        db=db,
        sources=HealthSources(HostClient(places.host_socket), DeploymentState(), problems),
        signer=None,
        health_s=3600,
    )
    try:
        return (await uplink.health()).problems
    finally:
        db.close()


@pytest.mark.asyncio
async def test_health_first_reports_why_the_host_does_not_start(tmp_path):
    places = Paths(state=tmp_path, runtime=tmp_path / "run")
    assert await problems(places) == ("the host does not run, so no instance answers", "another")
    places.runtime.mkdir()
    (places.runtime / host_api.WHY_NOT).write_text("seccomp is missing around components,\nas a root service\n")
    assert (await problems(places))[0] == (
        "the host does not run, so no instance answers; it did not start: "
        "seccomp is missing around components, as a root service"
    )


def instance(name, metrics=UNSET, **rest):
    return InstanceHealth(
        instance=name, target=f"main/{name}/1.0.0", generation=1, state=InstanceState.RUNNING, metrics=metrics, **rest
    )


def test_the_server_gets_bounded_figures_of_components_and_none_that_stay_here():
    many = tuple(Metric(name=f"n{number:02}", kind="counter", labels={"v": "x" * 200}) for number in range(64))
    one = (Metric(name="size", kind="histogram", value=3.0, count=1, buckets=(1,) * 23),)
    sent = for_server(
        (instance("a", many), instance("b", one, local=LocalFigures(swaps=3)), instance("c", ()), instance("d"))
    )
    by = {each.instance: each for each in sent}
    assert by["b"].metrics == (Metric(name="size", kind="histogram", value=3.0, count=1),)
    assert by["b"].local is by["c"].metrics is by["d"].metrics is UNSET
    assert 10 < len(by["a"].metrics) < 64
    assert by["a"].metrics == many[: len(by["a"].metrics)]
    whole = tuple(instance(f"i{number}", many) for number in range(64))
    assert sum(len(wire.encode(each)) - len(wire.encode(instance(each.instance))) for each in for_server(whole)) < 9000
