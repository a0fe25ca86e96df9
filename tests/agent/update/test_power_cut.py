"""Power can go at any instant: cut it *here*, and expect *this* to run at once after the boot, *this* chain of reported
phases from then on, and *this* in the end. Never neither, never a torn one, and the report is right."""

import pytest

V1, V2 = "components/acme/web/1.0.0.wasm", "components/acme/web/2.0.0.wasm"
ALL = ["fetching", "compiling", "swapping", "probation", "committed"]

# phase being written, before or after it reached the disk, what answers after the boot, what is reported from then on
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

    # The plug is pulled while the update to 2.0.0 writes this phase.
    kit.store.cut = ("web", phase, when)
    await kit.deployer.desire(kit.assignment(2, first := second))
    await kit.until(lambda: kit.store.dead)
    told = len(kit.reports())
    await kit.pull_plug()

    # Power is back. What is committed is restored before anything else happens; the old or the new one answers.
    kit.boots += 1
    kit.host.start()
    await restored(kit)
    assert kit.host.targets() == {"web": answers}

    # The agent takes up what it finds, and is told the same assignment again.
    await kit.start_agent()
    await kit.run(kit.assignment(2, first))
    assert kit.host.targets() == {"web": V2}
    assert [report.phase.value for report in kit.reports()[told:]] == chain
    assert [each.item.target for each in kit.store.committed()] == [V2]
    assert kit.store.counter("committed") == 2
    await kit.pull_plug()


async def restored(kit):
    """What `fleet-agent restore` does at the start of the host's unit."""
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
    # A reissued assignment does not try it again; a raised attempt does.
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
async def test_a_board_that_dies_whenever_it_swaps_ends_with_the_old_version(kit):
    """A component that takes the whole board down with it is not tried for ever."""

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
