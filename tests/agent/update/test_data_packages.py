"""Data packages on a device: instances follow them, and they follow the instances back; power cuts in each phase."""

import hashlib

import msgspec
import pytest

from agent.config import Disk, Settings
from agent.host.ipc import host_api
from agent.update import packages
from agent.update.state import Violation, item_key
from fleet.protocol.assignment import Item
from fleet.protocol.codes import Phase, RejectCode
from fleet.protocol.manifest import Data, DataUse, Manifest

READER = "components/acme/web/1.0.0.wasm"


def data_of(version):
    return f"weights of {version}".encode()


def package(kit, version, *, name="m", rollout="", attempt=0, data=None):
    """Publish a version of a data package; return its item."""
    data = data_of(version) if data is None else data
    target, sha256 = f"components/acme/{name}/{version}.wasm", hashlib.sha256(data).hexdigest()
    kit.server.artifacts[sha256] = data
    kit.manifests[target] = Manifest(name=name, version=version, trigger=Data())
    return Item(
        instance=name,
        target=target,
        length=len(data),
        sha256=sha256,
        manifest_sha256=kit.manifests[target].digest(),
        rollout=rollout,
        attempt=attempt,
    )


def reader(kit, version="1.0.0", *, instance="web", wants="*", **more):
    item = kit.publish(version, instance=instance, **more)
    uses = {"m": DataUse(path="/data/m", version=wants)}
    kit.manifests[item.target] = msgspec.structs.replace(kit.manifests[item.target], data=uses)
    return msgspec.structs.replace(item, manifest_sha256=kit.manifests[item.target].digest())


def content(kit, instance="web"):
    """Return what an instance has mounted at its path."""
    (mount,) = kit.host.running[instance].packages
    assert mount.path == "/data/m"
    with open(mount.file, "rb") as file:  # noqa: PTH123
        return file.read()


def outcomes(kit, instance="m"):
    return [report.phase for report in kit.reports() if report.instance == instance]


@pytest.mark.asyncio
async def test_an_instance_starts_with_the_package_and_is_swapped_when_a_newer_version_comes(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, package(kit, "1.0.0"), reader(kit)))
        assert content(kit) == data_of("1.0.0")
        generation = kit.host.running["web"].generation
        await kit.run(kit.assignment(3, package(kit, "2.0.0", rollout="r9"), reader(kit)))
        assert content(kit) == data_of("2.0.0")
        assert kit.host.running["web"].generation > generation
        assert outcomes(kit)[-1] is Phase.COMMITTED
        # The package's rollout is told of by the package alone.
        assert {report.rollout for report in kit.reports() if report.instance == "web"} == {""}
        assert [report.rollout for report in kit.reports() if report.instance == "m"][-1] == "r9"
        assert {each.item.target for each in kit.store.committed()} == {READER, "components/acme/m/2.0.0.wasm"}


async def with_version_1(kit, **how):
    await kit.run(kit.assignment(1, package(kit, "1.0.0")))
    await kit.run(kit.assignment(2, package(kit, "1.0.0"), reader(kit, **how)))
    assert content(kit) == data_of("1.0.0")


@pytest.mark.asyncio
async def test_an_instance_that_does_worse_with_new_data_goes_back_and_so_does_the_package(kit):
    async with kit.running():
        await with_version_1(kit)
        kit.host.faults[READER] = 5
        await kit.run(kit.assignment(3, package(kit, "2.0.0"), reader(kit)))
        assert content(kit) == data_of("1.0.0")
        assert outcomes(kit)[-1] is Phase.ROLLED_BACK
        last = [report for report in kit.reports() if report.instance == "m"][-1]
        assert "web went back to its former data" in last.message
        assert last.code is RejectCode.TRAPPED
        assert kit.deployer.state.committed["m"].item.target.endswith("/1.0.0.wasm")
        # It is tried again only when somebody asks for it.
        await kit.run(kit.assignment(4, package(kit, "2.0.0"), reader(kit)))
        assert content(kit) == data_of("1.0.0")
        kit.host.faults.clear()
        await kit.run(kit.assignment(5, package(kit, "2.0.0", attempt=1), reader(kit)))
        assert content(kit) == data_of("2.0.0")


@pytest.mark.asyncio
async def test_one_instance_that_fails_takes_the_others_back_with_it(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, package(kit, "1.0.0")))
        both = [reader(kit), reader(kit, "2.0.0", instance="other")]
        await kit.run(kit.assignment(2, package(kit, "1.0.0"), *both))
        kit.host.faults["components/acme/web/2.0.0.wasm"] = 5
        await kit.run(kit.assignment(3, package(kit, "2.0.0"), *both))
        assert [content(kit, each) for each in ("web", "other")] == [data_of("1.0.0")] * 2
        assert outcomes(kit)[-1] is Phase.ROLLED_BACK


@pytest.mark.asyncio
async def test_an_instance_without_a_version_that_fits_waits_in_words_and_starts_once_it_is_there(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, package(kit, "1.0.0")))
        await kit.run(kit.assignment(2, package(kit, "1.0.0"), reader(kit, wants=">=2")))
        assert kit.host.targets() == {}
        (failure,) = kit.store.failed()
        assert failure.code is RejectCode.DATA_MISSING
        assert failure.message.startswith("web waits for data m >=2")
        await kit.run(kit.assignment(3, package(kit, "2.0.0"), reader(kit, wants=">=2")))
        assert content(kit) == data_of("2.0.0")


@pytest.mark.asyncio
async def test_a_version_outside_its_range_leaves_an_instance_as_it_is(kit):
    async with kit.running():
        await with_version_1(kit, wants="<2")
        generation = kit.host.running["web"].generation
        await kit.run(kit.assignment(3, package(kit, "2.0.0"), reader(kit, wants="<2")))
        assert outcomes(kit)[-1] is Phase.COMMITTED
        assert content(kit) == data_of("1.0.0")
        assert kit.host.running["web"].generation == generation


@pytest.mark.asyncio
async def test_a_newer_version_that_comes_during_a_switch_takes_its_place(kit):
    async with kit.running():
        await with_version_1(kit, probation_ms=300)
        await kit.deployer.desire(kit.assignment(3, package(kit, "2.0.0"), reader(kit, probation_ms=300)))
        await kit.until(lambda: kit.chain("web")[-1:] == ["probation"])
        await kit.run(kit.assignment(4, package(kit, "3.0.0"), reader(kit, probation_ms=300)))
        assert content(kit) == data_of("3.0.0")
        assert kit.deployer.state.committed["m"].item.target.endswith("/3.0.0.wasm")


@pytest.mark.asyncio
async def test_the_deployed_version_before_is_kept_for_the_way_back_and_older_ones_are_removed(kit):
    async with kit.running():
        await with_version_1(kit)
        for number in (2, 3):
            await kit.run(kit.assignment(1 + number, package(kit, f"{number}.0.0"), reader(kit)))
        keep = packages.in_use(kit.deployer.state)
        packages.make_room(kit.places.packages, keep, most_bytes=1 << 20)
        left = sorted(path.read_bytes() for path in kit.places.packages.glob("*.data"))
        assert left == [data_of("2.0.0"), data_of("3.0.0")]
        fetched = len(kit.server.fetched)
        await kit.run(kit.assignment(5, package(kit, "2.0.0"), reader(kit)))
        assert (content(kit), len(kit.server.fetched)) == (data_of("2.0.0"), fetched)


@pytest.mark.asyncio
async def test_a_package_beyond_the_quota_is_refused_and_nothing_in_use_goes_for_it(kit):
    kit.settings = Settings(disk=Disk(data_bytes=40))
    async with kit.running():
        await with_version_1(kit)
        await kit.run(kit.assignment(3, package(kit, "2.0.0", data=b"x" * 30), reader(kit)))
        last = [report for report in kit.reports() if report.instance == "m"][-1]
        assert last.code is RejectCode.NO_SPACE
        assert "disk.data_bytes" in last.message
        assert content(kit) == data_of("1.0.0")


@pytest.mark.asyncio
async def test_a_package_in_place_of_an_instance_is_refused(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0", instance="m")))
        await kit.run(kit.assignment(2, package(kit, "2.0.0")))
        assert kit.host.targets() == {"m": READER}
        assert [report.code for report in kit.reports()][-1] is RejectCode.TARGET_MISMATCH


@pytest.mark.asyncio
async def test_a_host_of_before_that_mounts_none_refuses_in_words(kit):
    kit.host.protocol = host_api.MOUNTS_DATA - 1
    async with kit.running():
        await kit.run(kit.assignment(1, package(kit, "1.0.0")))
        await kit.run(kit.assignment(2, package(kit, "1.0.0"), reader(kit)))
        assert kit.host.targets() == {}
        assert "restart fleet-host" in kit.reports()[-1].message


@pytest.mark.asyncio
async def test_after_a_boot_an_instance_runs_with_its_data_and_a_lost_file_is_fetched_again(kit):
    async with kit.running():
        await with_version_1(kit)
        for path in kit.places.packages.glob("*.data"):
            path.unlink()
        await kit.pull_plug()
        await kit.boot()
        await kit.until(lambda: "web" in kit.host.running)
        assert content(kit) == data_of("1.0.0")


@pytest.mark.asyncio
async def test_nothing_starts_with_data_that_was_revoked(kit):
    async with kit.running():
        await with_version_1(kit)
        item = kit.deployer.state.committed["m"].item
        revoked = Violation(
            instance="m", key=item_key(item), target=item.target, code=RejectCode.REVOKED, message="revoked"
        )
        await kit.deployer.hold([revoked])
        await kit.settled()
        assert "m" not in kit.deployer.state.committed
        assert content(kit) == data_of("1.0.0"), "what runs goes on"
        await kit.run(kit.assignment(3, package(kit, "1.0.0"), reader(kit, "2.0.0")))
        assert kit.host.targets() == {"web": READER}
        # A version in its place is what it is swapped to, although the instance itself did not change.
        await kit.run(kit.assignment(4, package(kit, "1.0.1"), reader(kit)))
        assert content(kit) == data_of("1.0.1")


@pytest.mark.parametrize("instance", ["m", "web"])
@pytest.mark.parametrize("moment", [pytest.param("before", marks=pytest.mark.nightly), "after"])
@pytest.mark.parametrize(
    "phase", ["fetching", "verifying", "compiling", "staged", "swapping", "probation", "committed", "rolling-back"]
)
@pytest.mark.parametrize("good", [True, False])
@pytest.mark.asyncio
async def test_a_power_cut_in_any_phase_leaves_the_new_data_or_the_old(kit, instance, moment, phase, good):
    async with kit.running():
        await with_version_1(kit)
        if not good:
            kit.host.faults[READER] = 5
        wanted = kit.assignment(3, package(kit, "2.0.0"), reader(kit))
        kit.store.cut = (instance, phase, moment)
        await kit.deployer.desire(wanted)
        await kit.until(lambda: kit.store.dead or kit.deployer.is_idle)
        await kit.pull_plug()
        await kit.boot()
        await kit.until(kit.link.ready.is_set)
        await kit.run(wanted)
        version = "2.0.0" if good else "1.0.0"
        assert content(kit) == data_of(version)
        assert kit.deployer.state.committed["m"].item.target.endswith(f"/{version}.wasm")
        (bound,) = kit.deployer.state.committed["web"].data
        assert bound.sha256 == hashlib.sha256(data_of(version)).hexdigest()
