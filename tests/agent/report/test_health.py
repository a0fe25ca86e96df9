"""Health of a device whose host does not run."""

from types import SimpleNamespace

import pytest

from agent.config import Paths
from agent.host.ipc import host_api
from agent.link.host_client import HostClient
from agent.report.uplink import HealthSources, Uplink
from agent.update.problems import Problems
from agent.update.state import DeploymentState, DeviceContext
from agent.update.store import Database, Store


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
