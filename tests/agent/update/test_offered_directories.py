"""Directories of the device: a release gets those that its owner names, and is refused with any other."""

import pytest

from agent.config import Policy, Settings
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants

WANTS = Grants(directories={"/maps": "maps"})


@pytest.mark.asyncio
async def test_a_directory_that_the_owner_does_not_name_is_refused_in_words_and_the_version_before_runs_on(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        await kit.run(kit.assignment(2, kit.publish("2.0.0", grants=WANTS)))
        last = kit.reports()[-1]
        assert (last.phase, last.code) == ("failed", RejectCode.GRANT_DENIED)
        assert last.message == "this device's own policy does not allow directory maps"
        assert kit.host.targets() == {"web": "components/acme/web/1.0.0.wasm"}


@pytest.mark.asyncio
async def test_a_directory_that_the_owner_names_comes_with_its_path(kit):
    kit.settings = Settings(policy=Policy(directories={"maps": "/srv/maps", "books": "/srv/books"}))
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0", grants=WANTS)))
        assert kit.host.running["web"].directories == {"/maps": "/srv/maps"}
