"""Power cuts at any instant.

Each row names where power is cut, the version that runs right after the boot, the phases reported from then on, and the
final version. Either the old or the new version runs, and the report is right.
"""

import pytest

V1, V2 = "components/acme/web/1.0.0.wasm", "components/acme/web/2.0.0.wasm"
ALL = ["fetching", "compiling", "swapping", "probation", "committed"]

# phase being written, before or after it is on disk, version after the boot, phases reported from then on
ROWS = [
    ("fetching", "before", V1, ALL),
    ("fetching", "after", V1, ["compiling", "swapping", "probation", "committed"]),
    ("verifying", "before", V1, ["compiling", "swapping", "probation", "committed"]),
    ("verifying", "after", V1, ALL),
    ("compiling", "before", V1, ALL),
    ("compiling", "after", V1, ALL),
    ("staged", "before", V1, ALL),
    ("staged", "after", V1, ALL),
    ("swapping", "before", V1, ALL),
    ("swapping", "after", V1, ["probation", "committed"]),
    ("probation", "before", V1, ["probation", "committed"]),
    ("probation", "after", V1, ["swapping", "probation", "committed"]),
    ("committed", "before", V1, ["swapping", "probation", "committed"]),
    ("committed", "after", V2, []),
]


@pytest.mark.parametrize(("phase", "when", "answers", "chain"), ROWS)
@pytest.mark.asyncio
async def test_power_is_cut_in_an_update(kit, phase, when, answers, chain):
    await kit.boot()
    first, second = kit.publish("1.0.0"), kit.publish("2.0.0")
    await kit.run(kit.assignment(1, first))
    assert kit.host.targets() == {"web": V1}

    # Power is cut while the update to 2.0.0 writes this phase.
    kit.store.cut = ("web", phase, when)
    await kit.deployer.desire(kit.assignment(2, first := second))
    await kit.until(lambda: kit.store.dead)
    told = len(kit.reports())
    await kit.pull_plug()

    # Power is back. The committed item is restored first; the old or the new version answers.
    kit.boots += 1
    kit.host.start()
    await restored(kit)
    assert kit.host.targets() == {"web": answers}

    # The agent resumes the stored change, and receives the same assignment again.
    await kit.start_agent()
    await kit.run(kit.assignment(2, first))
    assert kit.host.targets() == {"web": V2}
    assert [report.phase.value for report in kit.reports()[told:]] == chain
    assert [each.item.target for each in kit.store.committed()] == [V2]
    assert kit.store.counter("committed") == 2
    await kit.pull_plug()


async def restored(kit):
    """Do what `fleet-agent restore` does at the start of the host's unit."""
    from agent.link.host_client import HostClient
    from agent.update import restore

    link = HostClient(kit.places.host_socket)
    welcome = await restore.wait_for_host(link, 5)
    items = restore.committed(kit.places.database, kit.places.runset, b"k" * 32)
    places, policy = kit.places, kit.settings.policy
    done = await restore.restore(link, welcome, items, kit.images, places.artifacts, policy, kit.sealed)
    assert all(not each.problem for each in done)
    link.close()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("phase", ["rolling-back", "rolled-back"])
@pytest.mark.asyncio
async def test_power_is_cut_in_a_rollback(kit, phase, when):
    await kit.boot()
    good, bad = kit.publish("1.0.0"), kit.publish("2.0.0")
    await kit.run(kit.assignment(1, good))

    kit.host.faults[V2] = 3
    kit.store.cut = ("web", phase, when)
    await kit.deployer.desire(kit.assignment(2, bad))
    await kit.until(lambda: kit.store.dead)
    await kit.pull_plug()

    await kit.boot()
    await kit.until(kit.link.ready.is_set, "everything committed was restored")
    await kit.run(kit.assignment(2, bad))
    assert kit.host.targets() == {"web": V1}
    assert kit.chain()[-1] == "rolled-back"
    last = kit.reports()[-1]
    assert (last.code, last.running) == ("trapped", V1)
    # A reissued assignment does not retry it; a raised attempt does.
    await kit.run(kit.assignment(3, bad))
    assert kit.host.targets() == {"web": V1}
    kit.host.faults.clear()
    await kit.run(kit.assignment(4, kit.publish("2.0.0", attempt=1)))
    assert kit.host.targets() == {"web": V2}
    await kit.pull_plug()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("phase", ["swapping", "committed"])
@pytest.mark.asyncio
async def test_power_is_cut_in_a_removal(kit, phase, when):
    await kit.boot()
    await kit.run(kit.assignment(1, kit.publish("1.0.0")))
    kit.store.cut = ("web", phase, when)
    await kit.deployer.desire(kit.assignment(2))
    await kit.until(lambda: kit.store.dead)
    await kit.pull_plug()

    await kit.boot()
    await kit.run(kit.assignment(2))
    assert kit.host.targets() == {}
    assert kit.store.committed() == ()
    assert kit.chain()[-1] == "committed"
    assert kit.reports()[-1].running == ""
    await kit.pull_plug()


@pytest.mark.asyncio
async def test_a_version_that_crashes_the_device_at_each_swap_is_given_up(kit):
    """A component that crashes the whole device is not retried forever."""

    await kit.boot()
    await kit.run(kit.assignment(1, kit.publish("1.0.0")))
    deadly = kit.publish("2.0.0", probation_ms=60_000)
    await kit.deployer.desire(kit.assignment(2, deadly))
    boots = 0
    while True:
        await kit.until(lambda: kit.deployer.is_idle or V2 in kit.host.targets().values())
        if kit.deployer.is_idle:
            break
        boots += 1
        assert boots < 10, "it never ends"
        await kit.pull_plug()
        await kit.boot()
        await kit.deployer.desire(kit.assignment(2, deadly))
    assert kit.host.targets() == {"web": V1}
    last = kit.reports()[-1]
    assert (last.phase, last.code) == ("rolled-back", "interrupted")
    await kit.pull_plug()
