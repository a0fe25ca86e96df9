"""End of a change: conditions for the commit, and the report to the server."""

import asyncio

import pytest

from agent.host.ipc import host_api
from agent.update import effects
from fleet.protocol.codes import RejectCode
from signing.errors import Rejected

V1, V2, V3 = (f"components/acme/web/{n}.0.0.wasm" for n in "123")


@pytest.mark.parametrize(
    ("answers", "end"),
    [
        ([], ("committed", None)),
        ([False, True, True], ("committed", None)),  # a first failure at the end: the next check decides
        ([False, False], ("rolled-back", RejectCode.HEALTH_FAILED)),
        ([None, True], ("committed", None)),  # no worker was running
        ([None, False, False], ("rolled-back", RejectCode.HEALTH_FAILED)),
        (None, ("committed", None)),  # by an older host, which does not count checks
    ],
)
@pytest.mark.asyncio
async def test_the_health_check_runs_once_more_before_the_commit(kit, monkeypatch, answers, end):
    async with kit.running():
        monkeypatch.setattr(effects, "WATCH_S", 0.01)
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        if answers is not None:
            kit.host.answers[V2] = list(answers)
        await kit.run(kit.assignment(2, kit.publish("2.0.0", check=True)))
        last = kit.reports()[-1]
        assert (last.phase, last.code) == end
        assert kit.host.answers.get(V2, []) == [], "whatever it had to say was asked for"
        if answers is not None:
            assert kit.host.checks[V2].asked >= 1
        assert [request.probation for request in kit.host.requests if isinstance(request, host_api.Start)] == [
            True,
            True,
        ]


@pytest.mark.asyncio
async def test_an_instance_restored_after_a_host_crash_is_not_on_probation(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        kit.host.kill()
        kit.host.requests.clear()
        kit.host.start()
        await kit.until(lambda: kit.host.targets() == {"web": V1})
        assert [request.probation for request in kit.host.requests if isinstance(request, host_api.Start)] == [False]


@pytest.mark.asyncio
async def test_a_restoration_ends_with_its_host(kit, monkeypatch):
    """Otherwise it would continue on the next host, beside that host's own restoration."""
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        sound, asked, go_on = kit.images.open, [], asyncio.Event()

        async def slow(**of):
            asked.append(of)
            await go_on.wait()
            return await sound(**of)

        monkeypatch.setattr(kit.images, "open", slow)
        for turn in (1, 2):
            kit.host.kill()
            kit.host.requests.clear()
            kit.host.start()
            await kit.until(lambda turn=turn: len(asked) == turn)
        go_on.set()
        await kit.until(kit.link.ready.is_set, "everything is restored")
        assert len([request for request in kit.host.requests if isinstance(request, host_api.Start)]) == 1


@pytest.mark.parametrize("how", ["refused", "rolled-back"])
@pytest.mark.asyncio
async def test_an_assignment_with_a_failed_item_is_not_reported_as_committed(kit, how):
    """The server counts a device as done by this number."""

    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0"), kit.publish("1.0.0", instance="other")))
        assert kit.store.counter("committed") == 1
        if how == "refused":
            kit.trust.trouble[V2] = [Rejected(RejectCode.GRANT_DENIED, "no")]
        else:
            kit.host.faults[V2] = 2
        await kit.run(kit.assignment(2, kit.publish("2.0.0"), kit.publish("3.0.0", instance="other")))
        assert kit.host.targets() == {"web": V1, "other": V3}
        assert (kit.store.counter("deployed"), kit.store.counter("committed")) == (2, 1)
        await kit.run(kit.assignment(3, kit.publish("1.0.0"), kit.publish("3.0.0", instance="other")))
        assert kit.store.counter("committed") == 3


@pytest.mark.asyncio
async def test_an_assignment_is_not_reported_as_committed_during_a_change(kit):
    """An instance that is no longer assigned is still being removed."""

    async with kit.running():
        web, other = kit.publish("1.0.0"), kit.publish("1.0.0", instance="other")
        await kit.run(kit.assignment(1, web, other))
        stop, let = kit.carrier.stop, asyncio.Event()

        async def late(change):
            await let.wait()
            return await stop(change)

        kit.carrier.stop = late
        await kit.deployer.desire(kit.assignment(2, web))
        await kit.until(lambda: [each.item.instance for each in kit.committed()] == ["web"])
        await kit.handled()
        assert kit.store.counter("committed") == 1
        let.set()
        await kit.settled()
        assert kit.store.counter("committed") == 2
