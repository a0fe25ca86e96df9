"""`--where`: only the chosen devices of a group get a version, and the others keep what the group had before."""

from datetime import UTC, datetime

import msgspec
import pytest

from fleet.protocol import operator_api
from fleet.protocol.codes import InstanceState, Outcome, RolloutState
from fleet.protocol.messages import DeviceResources, Health, InstanceHealth
from fleet.protocol.topics import Up

EDGE = ("--group", "edge")


async def newest(operator, number: int):
    """Return a rollout."""
    return await operator.get(operator_api.RolloutView, f"/v1/rollouts/{number}")


async def label(fleet, device, **labels):
    """Label a device."""
    await fleet.command("label", device.id, *(f"{key}={value}" for key, value in labels.items()))


async def two_sites(fleet):
    """Return a device in berlin and one in paris, both on 1.0.0."""
    berlin, paris = await fleet.device("berlin"), await fleet.device("paris")
    await label(fleet, berlin, site="berlin")
    await label(fleet, paris, site="paris")
    await fleet.operator.publish("1.0.0")
    assert (await fleet.command("deploy", "hello@1.0.0", *EDGE)).code == 0
    await fleet.operator.publish("2.0.0")
    return berlin, paris


def version(device):
    """Return the version that a device was assigned newest."""
    item = device.items.get("hello")
    return "" if item is None else item.target.rpartition("/")[2].removesuffix(".wasm")


@pytest.mark.asyncio
async def test_only_the_chosen_devices_get_it(new_fleet):
    async with new_fleet() as fleet:
        berlin, paris = await two_sites(fleet)
        done = await fleet.command("deploy", "hello@2.0.0", *EDGE, "--where", "site in (berlin, oslo) and online")
        assert done.code == 0, done.stderr
        view = await newest(fleet.operator, 2)
        assert (view.state, view.where) == (RolloutState.SUCCEEDED, "site in (berlin, oslo) and online")
        outcomes = {each.device: (each.outcome, each.reason) for each in view.devices}
        assert outcomes[paris.id] == (Outcome.NOT_AFFECTED, "--where leaves it out")
        assert outcomes[berlin.id][0] is Outcome.SUCCEEDED
        assert (version(berlin), version(paris)) == ("2.0.0", "1.0.0")
        shown = await fleet.command("device", paris.id, "--effective")
        assert ("main/hello@1.0.0" in shown.stdout, "2.0.0" in shown.stdout) == (True, False), shown.stdout
        assert "site in (berlin, oslo) and online" in (await fleet.command("rollout", "2")).stdout


@pytest.mark.asyncio
async def test_the_rest_follows_by_the_same_deploy_without_where(new_fleet):
    async with new_fleet() as fleet:
        berlin, paris = await two_sites(fleet)
        assert (await fleet.command("deploy", "hello@2.0.0", *EDGE, "--where", "site=berlin")).code == 0
        again = await fleet.command("deploy", "hello@2.0.0", *EDGE, "--where", "site=berlin")
        assert (again.code, "nothing would change" in again.stderr) == (5, True), again
        done = await fleet.command("deploy", "hello@2.0.0", *EDGE)
        assert done.code == 0, done.stderr
        assert (version(berlin), version(paris)) == ("2.0.0", "2.0.0")


@pytest.mark.asyncio
async def test_an_undo_reaches_whom_the_rollout_reached(new_fleet):
    async with new_fleet() as fleet:
        berlin, paris = await two_sites(fleet)
        assert (await fleet.command("deploy", "hello@2.0.0", *EDGE, "--where", "site=berlin")).code == 0
        before = len(paris.accepted)
        undone = await fleet.command("undo")
        assert undone.code == 0, undone.stderr
        assert (version(berlin), version(paris), len(paris.accepted)) == ("1.0.0", "1.0.0", before)


@pytest.mark.asyncio
async def test_who_joins_later_is_judged_too_and_runs_what_its_like_run(new_fleet):
    async with new_fleet() as fleet:
        await two_sites(fleet)
        assert (await fleet.command("deploy", "hello@2.0.0", *EDGE, "--where", "not site=paris")).code == 0
        late = await fleet.device("late", group="lab")
        await label(fleet, late, site="paris")
        await fleet.command("group", "edge", "--add", late.id)
        await late.until(lambda device: device.items)
        assert version(late) == "1.0.0"
        other = await fleet.device("other", group="lab")
        await label(fleet, other, site="oslo")
        await fleet.command("group", "edge", "--add", other.id)
        await other.until(lambda device: device.items)
        assert version(other) == "2.0.0"


@pytest.mark.asyncio
async def test_a_selector_that_takes_nobody_is_refused_and_a_bad_one_names_its_column(new_fleet):
    async with new_fleet() as fleet:
        await two_sites(fleet)
        nobody = await fleet.command("deploy", "hello@2.0.0", *EDGE, "--where", "site=oslo")
        assert (nobody.code, "--where leaves it out" in nobody.stderr) == (5, True), nobody
        bad = await fleet.command("deploy", "hello@2.0.0", *EDGE, "--where", "site in berlin")
        assert (bad.code, "column 9: expected '(' and values" in " ".join(bad.stderr.split())) == (2, True), bad
        request = operator_api.RolloutRequest(instance="hello", target="x", group="edge", where="memory>=lots")
        refused = await fleet.operator.problem("POST", "/v1/rollouts", request)
        assert (refused.status, "where: column 9: expected a size" in refused.title) == (400, True), refused


@pytest.mark.asyncio
async def test_devices_are_listed_by_the_same_grammar(new_fleet):
    async with new_fleet() as fleet:
        berlin, paris = await two_sites(fleet)
        away = await fleet.enrol("away")

        async def listed(where):
            done = await fleet.command("devices", "--where", where)
            assert done.code == 0, done.stderr
            return {each.id for each in (berlin, paris, away) if each.id in done.stdout}

        assert await listed("site=berlin") == {berlin.id}
        assert await listed("not online") == {away.id}
        assert await listed("group=edge and not site") == {away.id}
        assert await listed(f"id={paris.id} or online and site!=paris") == {paris.id, berlin.id}
        resources = DeviceResources(memory_total_bytes=512 << 20, cpus=4, disk_total_bytes=8 << 30)
        item = berlin.items["hello"]
        runs = InstanceHealth(instance="hello", target=item.target, generation=1, state=InstanceState.RUNNING)
        health = Health(device=berlin.id, boot_id="boot", at=datetime.now(UTC), resources=resources, instances=(runs,))
        berlin.publish(Up.HEALTH, health)
        bell = fleet.server._conductor._watch
        await bell.until(lambda: fleet.server._store.devices.get(berlin.id).health, timeout_s=60)
        assert await listed("memory>=512MiB and cpus>2 and disk<1TB and healthy") == {berlin.id}
        assert await listed("runs in (hello@1.0.0) and runs=main/hello and not memory>512MiB") == {berlin.id}
        assert await listed("memory>512MiB or runs=hello@2.0.0") == set()
        unwell = msgspec.structs.replace(health, problems=("the disk is full",))
        berlin.publish(Up.HEALTH, unwell)
        await bell.until(lambda: b"full" in fleet.server._store.devices.get(berlin.id).health, timeout_s=60)
        assert await listed("memory and not healthy") == {berlin.id}
        assert "No such device" in (await fleet.command("devices", "--where", "site=oslo")).stdout


@pytest.mark.asyncio
async def test_a_dry_run_draws_from_the_chosen_alone(new_fleet):
    async with new_fleet() as fleet:
        berlin, paris = await two_sites(fleet)
        done = await fleet.command("deploy", "hello@2.0.0", *EDGE, "--where", "site=berlin", "--dry-run")
        assert done.code == 0, done.stderr
        assert berlin.id in done.stdout
        assert f"{paris.id}: --where leaves it out" in " ".join(done.stdout.split())
        assert (await fleet.operator.get(operator_api.Rollouts, "/v1/rollouts")).rollouts[0].number == 1
