"""Names of the directories that a device's owner offers: reported with what its host serves, and no path."""

from types import SimpleNamespace

import pytest

from agent.report.uplink import HealthSources, Uplink
from fleet.component import served, wasi
from fleet.protocol.manifest import Grants


@pytest.mark.asyncio
async def test_the_fleet_learns_the_names_of_offered_directories_and_judges_a_push_by_them():
    host = SimpleNamespace(welcome=SimpleNamespace(version="1", engine="50", interfaces=(*wasi.SERVED, *wasi.CALLED)))
    sources = HealthSources(host, None, None, directories=["books", "maps"])
    uplink = Uplink(device=None, mqtt=None, db=None, signer=None, sources=sources, health_s=1)
    reported = uplink.versions().interfaces
    assert [each for each in reported if "directory/" in each] == [
        "wasmfleet:directory/books@1",
        "wasmfleet:directory/maps@1",
    ]
    assert served.not_offered(Grants(directories={"/maps": "maps"}), reported) == ""
    assert "no directory other" in served.not_offered(Grants(directories={"/maps": "other"}), reported)
    host.welcome.interfaces = ()
    assert uplink.versions().interfaces == (), "of an earlier host nothing is known"
