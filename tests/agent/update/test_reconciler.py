"""Reconciler with the real machine, store, effects and host client: concurrent changes, waiting, reports."""

import asyncio
import threading

import msgspec
import pytest

from agent.config import Policy, Settings
from agent.link.https import FetchError
from agent.update import effects, reconciler, restore
from agent.update.images import ImageError, ImageStore
from agent.update.machine import Event, State
from agent.update.reconciler import DownloadProgress, EffectFinished, ImageDamaged
from agent.update.state import Change, EffectResult, Violation, item_key, lost
from agent.update.store import StoreError
from fleet.protocol.codes import Outcome, Phase, RejectCode, outcome_of
from fleet.protocol.manifest import MetricGate
from fleet.protocol.metrics import Metric
from signing.errors import Rejected
from tests.eventually import eventually_async

V1, V2, V3 = (f"components/acme/web/{n}.0.0.wasm" for n in "123")


@pytest.mark.asyncio
async def test_a_first_deployment_and_its_reports(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0", rollout="r1")))
        assert kit.chain() == ["fetching", "compiling", "swapping", "probation", "committed"]
        running = [(report.phase.value, report.running) for report in kit.reports()]
        # Reports name the running version: none before the swap, the new version from probation on.
        assert running[:3] == [("fetching", ""), ("compiling", ""), ("swapping", "")]
        assert running[3:] == [("probation", V1), ("committed", V1)]
        assert {report.rollout for report in kit.reports()} == {"r1"}
        assert {"fetching", "compiling", "swapping", "probation"} <= kit.reports()[-1].timings_ms.keys()
        assert kit.store.counter("committed") == 1


@pytest.mark.asyncio
async def test_a_bad_version_is_rolled_back_and_reported_with_its_last_log_lines(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        kit.host.faults[V2] = 2
        await kit.run(kit.assignment(2, kit.publish("2.0.0", rollout="r2")))
        last = kit.reports()[-1]
        assert (last.phase, last.code, last.running) == ("rolled-back", RejectCode.TRAPPED, V1)
        assert last.log == ("a line",)
        assert kit.host.targets() == {"web": V1}
        # Another rollout of the same item gets a report at once, without a new attempt.
        fetched = len(kit.server.fetched)
        await kit.run(kit.assignment(3, kit.publish("2.0.0", rollout="r3")))
        last = kit.reports()[-1]
        assert (last.phase, last.code, last.rollout) == ("failed", RejectCode.TRAPPED, "r3")
        assert len(kit.server.fetched) == fetched


@pytest.mark.asyncio
async def test_a_version_that_does_not_start_leaves_the_old_one_serving(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        kit.host.refuse[V2] = RejectCode.HEALTH_FAILED
        kit.host.kept_log = tuple(f"line {number}" for number in range(40))
        await kit.run(kit.assignment(2, kit.publish("2.0.0")))
        last = kit.reports()[-1]
        assert (last.phase, last.code, last.running) == ("rolled-back", RejectCode.HEALTH_FAILED, V1)
        assert last.log == kit.host.kept_log
        assert kit.host.targets() == {"web": V1}


@pytest.mark.parametrize(("logs", "said"), [("errors", ("last words",)), ("off", ())])
@pytest.mark.asyncio
async def test_a_host_that_keeps_no_log_and_an_owner_who_lets_none_go(kit, logs, said):
    kit.settings = Settings(policy=Policy(logs=logs))
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        kit.host.refuse[V2] = RejectCode.HEALTH_FAILED
        kit.host.kept_log = ()
        await kit.run(kit.assignment(2, kit.publish("2.0.0")))
        assert kit.reports()[-1].log == said


@pytest.mark.parametrize("code", [RejectCode.SECURITY_EPOCH, RejectCode.UNKNOWN_TARGET, RejectCode.GRANT_DENIED])
@pytest.mark.asyncio
async def test_an_unsigned_item_is_refused_with_its_code(kit, code):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        item = kit.publish("2.0.0")
        kit.trust.trouble[V2] = [Rejected(code, "no")]
        await kit.run(kit.assignment(2, item))
        last = kit.reports()[-1]
        assert (last.phase, last.code, last.running) == ("failed", code, V1)
        assert kit.host.targets() == {"web": V1}


@pytest.mark.asyncio
async def test_a_tampered_artifact_is_refused_and_not_retried(kit):
    async with kit.running():
        kit.server.trouble = [FetchError(RejectCode.HASH_MISMATCH, "other bytes")]
        item = kit.publish("1.0.0")
        await kit.run(kit.assignment(1, item))
        assert kit.chain() == ["fetching", "failed"]
        await kit.run(kit.assignment(2, item))
        assert kit.chain() == ["fetching", "failed"]


@pytest.mark.asyncio
async def test_a_temporary_failure_is_retried_and_reported_meanwhile(kit):
    async with kit.running():
        gone = FetchError(RejectCode.UNREACHABLE, "no route")
        kit.server.trouble = [gone]
        from agent.update import machine

        machine_first, machine.RETRY_FIRST_S = machine.RETRY_FIRST_S, 0.01
        try:
            await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        finally:
            machine.RETRY_FIRST_S = machine_first
        assert kit.chain() == ["fetching", "fetching", "compiling", "swapping", "probation", "committed"]
        assert [report.code for report in kit.reports()][:3] == [None, RejectCode.UNREACHABLE, None]


@pytest.mark.asyncio
async def test_no_space_is_a_clean_refusal(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        (kit.places.artifacts / kit.publish("2.0.0").sha256).with_suffix(".wasm").unlink()
        kit.server.trouble = [FetchError(RejectCode.NO_SPACE, "full")]
        await kit.run(kit.assignment(2, kit.publish("2.0.0")))
        assert (kit.reports()[-1].phase, kit.reports()[-1].code) == ("failed", RejectCode.NO_SPACE)
        assert kit.host.targets() == {"web": V1}
        # A temporary failure, so it is retried later.
        (failure,) = kit.store.failed()
        assert failure.retry_at is not None


@pytest.mark.asyncio
async def test_a_commit_forgets_how_earlier_attempts_at_the_item_failed(kit):
    """`fleet-agent status` would go on to announce their next retry."""
    async with kit.running():
        for attempt in range(2):
            kit.server.trouble = [FetchError(RejectCode.NO_SPACE, "full")]
            await kit.run(kit.assignment(attempt + 1, kit.publish("1.0.0", attempt=attempt)))
        kit.trust.trouble[V2] = [Rejected(RejectCode.REVOKED, "revoked")]
        await kit.run(kit.assignment(3, kit.publish("2.0.0")))
        assert len(kit.store.failed()) == 3
        await kit.run(kit.assignment(4, kit.publish("1.0.0", attempt=2)))
        assert kit.host.targets() == {"web": V1}
        assert [failure.target for failure in kit.store.failed()] == [V2]
        assert kit.deployer.state.failed.keys() == {failure.failure_key for failure in kit.store.failed()}


@pytest.mark.asyncio
async def test_an_artifact_changed_on_disk_is_fetched_again(kit):
    async with kit.running():
        item = kit.publish("1.0.0")
        path = kit.places.artifacts / f"{item.sha256}.wasm"
        path.parent.mkdir()
        path.write_bytes(b"something else")
        await kit.run(kit.assignment(1, item))
        assert kit.server.fetched == [item.sha256]
        assert kit.host.targets() == {"web": V1}


@pytest.mark.asyncio
async def test_two_instances_of_one_component_fetch_it_once(kit, monkeypatch):
    looked, both_have_looked = [], threading.Event()
    plain_sound, plain_download = effects._sound, kit.server.download

    def sound(*artifact):
        found = plain_sound(*artifact)
        if not threading.current_thread().name.startswith("download"):
            looked.append(found)
            if len(looked) == 2:
                both_have_looked.set()
        return found

    def download(*what, **how):
        assert both_have_looked.wait(20)
        plain_download(*what, **how)

    monkeypatch.setattr(effects, "_sound", sound)
    monkeypatch.setattr(kit.server, "download", download)
    async with kit.running():
        first, second = (kit.publish("1.0.0", instance=name) for name in ("first", "second"))
        assert first.sha256 == second.sha256
        await kit.run(kit.assignment(1, first, second))
        assert looked == [False, False]
        assert kit.host.targets() == {"first": V1, "second": V1}
        assert kit.server.fetched == [first.sha256]


@pytest.mark.asyncio
async def test_a_port_that_the_devices_owner_does_not_give_is_refused_before_anything_is_fetched(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, msgspec.structs.replace(kit.publish("1.0.0"), port=80)))
        last = kit.reports()[-1]
        assert (last.phase, last.code) == ("failed", RejectCode.GRANT_DENIED)
        assert "policy does not allow port 80" in last.message
        assert (kit.server.fetched, kit.host.targets()) == ([], {})
        await kit.run(kit.assignment(2, msgspec.structs.replace(kit.publish("1.0.0"), port=8080)))
        assert kit.host.targets() == {"web": V1}


@pytest.mark.asyncio
async def test_the_agent_goes_on_while_a_component_is_read(kit, monkeypatch):
    plain_read, loop, seen = effects.reader.read, asyncio.get_running_loop(), []

    def read(data, **how):
        went_on = threading.Event()
        loop.call_soon_threadsafe(went_on.set)
        seen.append(went_on.wait(5))
        return plain_read(data, **how)

    monkeypatch.setattr(effects.reader, "read", read)
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        assert seen == [True]
        assert kit.host.targets() == {"web": V1}


@pytest.mark.asyncio
async def test_a_newer_item_supersedes_a_version_on_probation(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        await kit.deployer.desire(kit.assignment(2, kit.publish("2.0.0", probation_ms=60_000)))
        await kit.until(lambda: kit.chain()[-1:] == ["probation"])
        await kit.run(kit.assignment(3, kit.publish("3.0.0")))
        assert kit.host.targets() == {"web": V3}
        assert [report.code for report in kit.reports() if report.phase == "rolled-back"] == [RejectCode.SUPERSEDED]
        assert kit.store.failed() == ()


@pytest.mark.parametrize("first_heard", ["the end", "the assignment"])
@pytest.mark.parametrize("next_version", ["2.0.0", "1.0.0"])
@pytest.mark.asyncio
async def test_a_change_that_ends_while_a_newer_item_arrives_blocks_nothing(
    kit, monkeypatch, next_version, first_heard
):
    ended, goes_on = asyncio.Event(), asyncio.Event()
    async with kit.running():
        plain = kit.carrier.watch

        async def watched(change):
            result = await plain(change)
            ended.set()
            await goes_on.wait()
            return result

        monkeypatch.setattr(kit.carrier, "watch", watched)
        first = kit.publish("1.0.0")
        await kit.deployer.desire(kit.assignment(1, first))
        await ended.wait()
        # the same version for another rollout, or another one
        wanted = first if next_version == "1.0.0" else kit.publish(next_version)
        newer = kit.assignment(2, msgspec.structs.replace(wanted, rollout="r2"))
        goes_on.set()
        if first_heard == "the end":
            await kit.until(lambda: kit.deployer.state.committed)
        await kit.run(newer)
        assert kit.host.targets() == {"web": wanted.target}
        assert kit.deployer.state.committed["web"].item.rollout == "r2"
        assert kit.store.changes() == ()


@pytest.mark.asyncio
async def test_a_rollback_during_probation_needs_no_new_start(kit):
    """A halted rollout is rolled back: the warm old version answers again at once."""

    async with kit.running():
        first = kit.publish("1.0.0")
        await kit.run(kit.assignment(1, first))
        await kit.deployer.desire(kit.assignment(2, kit.publish("2.0.0", probation_ms=60_000)))
        await kit.until(lambda: kit.chain()[-1:] == ["probation"])
        starts = sum(type(request).__name__ == "Start" for request in kit.host.requests)
        await kit.run(kit.assignment(3, first))
        assert kit.host.targets() == {"web": V1}
        assert sum(type(request).__name__ == "Start" for request in kit.host.requests) == starts
        assert kit.store.counter("committed") == 3


@pytest.mark.asyncio
async def test_an_obsolete_download_blocks_nothing(kit):
    async with kit.running():
        kit.server.trouble = [FetchError(RejectCode.UNREACHABLE, "no route")] * 3
        await kit.deployer.desire(kit.assignment(1, kit.publish("1.0.0", rollout="r1")))
        await kit.until(lambda: len(kit.chain()) >= 2)
        kit.server.trouble = []
        await kit.run(kit.assignment(2, kit.publish("2.0.0")))
        assert kit.host.targets() == {"web": V2}
        superseded = [report for report in kit.reports() if report.code is RejectCode.SUPERSEDED]
        assert [(report.phase.value, report.rollout) for report in superseded] == [("failed", "r1")]


@pytest.mark.asyncio
async def test_a_removal_is_blocked_by_nothing(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0"), kit.publish("1.0.0", instance="other")))
        # The other instance hangs in a download, and the host is lost.
        stuck = kit.publish("2.0.0", instance="other")
        kit.trust.trouble[V2] = [Rejected(RejectCode.UNREACHABLE, "no route")] * 20
        kit.host.kill()
        await kit.deployer.desire(kit.assignment(2, stuck))
        web = lambda: [report for report in kit.reports() if report.instance == "web"][-1]  # noqa: E731
        await kit.until(lambda: (web().assignment, web().phase, web().running) == (2, "committed", ""))
        await kit.until(lambda: [each.item.instance for each in kit.committed()] == ["other"])
        # When the host is back, the removed instance is not started again.
        kit.host.start()
        await kit.until(lambda: kit.host.targets() == {"other": V1})


@pytest.mark.asyncio
async def test_the_host_dies_in_the_middle_of_a_swap(kit):
    async with kit.running():
        from agent.host.ipc import host_api

        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        kit.host.die_on = host_api.Start
        await kit.deployer.desire(kit.assignment(2, kit.publish("2.0.0")))
        await kit.until(lambda: kit.host.die_on is None)
        kit.host.start()
        await kit.settled()
        assert kit.host.targets() == {"web": V2}
        assert kit.chain()[-1] == "committed"


@pytest.mark.asyncio
async def test_a_new_host_first_gets_the_committed_items(kit):
    """Otherwise the old version, started late, would take over from the new one."""

    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        kit.host.kill()
        kit.host.requests.clear()
        await kit.deployer.desire(kit.assignment(2, kit.publish("2.0.0")))
        kit.host.start()
        await kit.settled()
        starts = [request.run.target for request in kit.host.requests if type(request).__name__ == "Start"]
        assert starts == [V1, V2]
        assert kit.host.targets() == {"web": V2}


@pytest.mark.asyncio
async def test_a_component_that_keeps_crashing_the_host_is_rolled_back(kit):
    async with kit.running():
        from agent.host.ipc import host_api

        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        await kit.deployer.desire(kit.assignment(2, kit.publish("2.0.0", probation_ms=60_000)))
        deaths = 0

        def over():
            nonlocal deaths
            if kit.deployer.is_idle:
                return True
            if kit.host.targets() == {"web": V2}:
                deaths += 1
                assert deaths < 10, "it never ends"
                kit.host.kill()
                kit.host.start()
            return False

        await eventually_async(over, "the change is taken back", pause_s=0.01)
        last = kit.reports()[-1]
        assert (last.phase, last.code, last.running) == ("rolled-back", RejectCode.HOST_GONE, V1)
        assert kit.host.targets() == {"web": V1}
        assert isinstance(kit.host.requests[0], host_api.Hello)


@pytest.mark.asyncio
async def test_restarting_the_agent_affects_no_instance(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        before = len(kit.host.requests)
        await kit.stop_agent()
        await kit.start_agent()
        await kit.until(lambda: len(kit.host.requests) > before)
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        assert {type(request).__name__ for request in kit.host.requests[before:]} == {"Hello"}


@pytest.mark.asyncio
async def test_an_agent_restarted_during_probation_continues_it(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        item = kit.publish("2.0.0", probation_ms=300)
        await kit.deployer.desire(kit.assignment(2, item))
        await kit.until(lambda: kit.chain()[-1:] == ["probation"])
        starts = sum(type(request).__name__ == "Start" for request in kit.host.requests)
        await kit.stop_agent()
        assert kit.host.targets() == {"web": V2}, "the new version answers while the agent is away"
        await kit.start_agent()
        await kit.run(kit.assignment(2, item))
        assert kit.chain()[-1] == "committed"
        assert sum(type(request).__name__ == "Start" for request in kit.host.requests) == starts


@pytest.mark.asyncio
async def test_failures_are_dropped_in_memory_as_in_the_store(kit, monkeypatch):
    monkeypatch.setattr("agent.update.store.FAILED_ROWS_MAX", 2)
    async with kit.running():
        for number, instance in enumerate(("a", "b", "c"), start=1):
            kit.trust.trouble[V1] = [Rejected(RejectCode.REVOKED, "revoked")]
            await kit.run(kit.assignment(number, kit.publish("1.0.0", instance=instance)))
        remembered = {failure.failure_key for failure in kit.store.failed()}
        assert {instance for instance, _, _ in remembered} == {"b", "c"}
        assert kit.deployer.state.failed.keys() == remembered


def second_record(kit):
    return restore.read_runset(kit.places.runset, b"k" * 32)


@pytest.mark.asyncio
async def test_committed_items_are_in_the_run_set_at_once(kit):
    async with kit.running():
        first, other = kit.publish("1.0.0"), kit.publish("1.0.0", instance="other")
        await kit.run(kit.assignment(1, first, other))
        assert second_record(kit) == kit.committed() != ()
        kit.carrier.stop, stop, let = held(kit.carrier.stop)
        await kit.deployer.desire(kit.assignment(2, first))
        await stop.wait()
        assert [each.item.instance for each in second_record(kit)] == ["web"], "before the host is asked to stop it"
        let.set()
        await kit.settled()
        reason = {"key": item_key(first), "target": first.target, "code": RejectCode.REVOKED, "message": "revoked"}
        await kit.deployer.hold([Violation(instance="web", **reason)])
        await kit.settled()
        assert second_record(kit) == kit.committed() == ()


@pytest.mark.parametrize("error", [OSError("read-only file system"), StoreError("store.db is damaged")])
@pytest.mark.asyncio
async def test_a_run_set_that_cannot_be_written_does_not_end_the_agent(kit, caplog, monkeypatch, error):
    async with kit.running():
        read = kit.store.facts

        def facts():
            if kit.store._db.in_transaction:  # a step, which is repeated
                return read()
            raise error

        monkeypatch.setattr(kit.store, "facts", facts)
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        assert kit.host.targets() == {"web": V1}
        assert [each.item.target for each in kit.committed()] == [V1]
        assert f"cannot write the second record of the committed items: {error}" in caplog.text


def write_facts(store, row):
    before = store._meta("facts")
    store._db.execute("REPLACE INTO meta VALUES ('facts', ?)", (row,))
    return before


@pytest.mark.asyncio
async def test_a_row_that_is_damaged_does_not_end_the_agent(kit, caplog, monkeypatch):
    """A page may be whole for SQLite, and its contents are not what was written."""
    monkeypatch.setattr("agent.update.reconciler.STORE_AGAIN_S", 0.01)
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        whole = await kit.worker(write_facts, b"{")
        await kit.deployer.desire(kit.assignment(2, kit.publish("2.0.0")))
        await kit.until(lambda: "store.db is damaged" in caplog.text)
        assert kit.host.targets() == {"web": V1}
        await kit.worker(write_facts, whole)
        await kit.until(lambda: kit.host.targets() == {"web": V2})
        await kit.settled()
        assert [each.item.target for each in kit.committed()] == [V2]


@pytest.mark.asyncio
async def test_the_run_set_is_completed_after_a_power_cut(kit):
    await kit.boot()
    await kit.run(kit.assignment(1, kit.publish("1.0.0")))
    kit.store.cut = ("web", "committed", "after")
    await kit.deployer.desire(kit.assignment(2, kit.publish("2.0.0")))
    await kit.until(lambda: kit.store.dead)
    await kit.pull_plug()
    assert [each.item.target for each in second_record(kit)] == [V1]
    async with kit.running():
        await kit.settled()
        assert [each.item.target for each in second_record(kit)] == [V2]


def held(effect):
    """Make an effect that waits; return it with the event that it has begun and the event that releases it."""
    begun, let = asyncio.Event(), asyncio.Event()

    async def waits(*arguments):
        begun.set()
        await let.wait()
        return await effect(*arguments)

    return waits, begun, let


@pytest.mark.asyncio
async def test_a_running_item_is_reported_to_a_new_rollout(kit):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0", rollout="r1")))
        await kit.run(kit.assignment(2, kit.publish("1.0.0", rollout="r2")))
        last = kit.reports()[-1]
        assert (last.phase, last.rollout, last.running) == ("committed", "r2", V1)
        assert kit.store.counter("committed") == 2


def broken(times, effect):
    """Make an effect with a bug that raises so many times."""
    left = [None] * times

    async def shows(*arguments):
        if left:
            left.pop()
            raise RuntimeError("a bug")
        return await effect(*arguments)

    return shows


@pytest.mark.asyncio
async def test_a_full_disk_is_tried_again_until_there_is_space(kit, monkeypatch):
    monkeypatch.setattr("agent.update.state.RETRY_SOON_S", 0.02)
    monkeypatch.setattr("agent.update.state.RETRY_MAX_S", 0.02)
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        (kit.places.artifacts / kit.publish("2.0.0").sha256).with_suffix(".wasm").unlink()
        kit.server.trouble = [FetchError(RejectCode.NO_SPACE, "full") for _ in range(12)]
        monkeypatch.setattr(reconciler, "RETRY_SLACK_S", 0.0)
        await kit.deployer.desire(kit.assignment(2, kit.publish("2.0.0")))
        await kit.until(lambda: kit.host.targets() == {"web": V2})
        await kit.settled()
        failed = [outcome_of(each.code, each.phase) for each in kit.reports() if each.phase == "failed"]
        assert failed == [Outcome.DEFERRED] * 12
        assert kit.chain()[-1] == "committed"
        assert kit.store.failed() == ()


STOPPED_COMPILER = """
[ "$1" = --describe ] && { echo '{"engine": "50.0.1"}'; exit; }
cat > /dev/null
echo >> "$0.times"
[ $(wc -l < "$0.times") -le LEFT ] && kill -NAME $$
echo compiled
"""


def with_a_compiler_that_is_stopped(kit, monkeypatch, *, times, name="TERM"):
    """Give a device a compiler, as a process of its own, that a signal from outside ends so many times."""
    script = kit.places.state / "compiler.sh"
    script.write_text(STOPPED_COMPILER.replace("LEFT", str(times)).replace("NAME", name))
    monkeypatch.setenv("WASMFLEET_COMPILER", f"sh {script}")
    monkeypatch.setattr("agent.update.machine.RETRY_FIRST_S", 0.01)
    kit.images_kind = ImageStore


@pytest.mark.parametrize("name", ["TERM", "KILL"])
@pytest.mark.asyncio
async def test_a_compiler_that_is_stopped_is_started_again(kit, monkeypatch, name):
    with_a_compiler_that_is_stopped(kit, monkeypatch, times=2, name=name)
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        assert kit.host.targets() == {"web": V1}
        codes = [report.code for report in kit.reports() if report.code is not None]
        assert codes == [RejectCode.INTERRUPTED] * 2
        assert kit.chain()[-1] == "committed"
        assert kit.store.failed() == ()


@pytest.mark.asyncio
async def test_a_compiler_that_is_stopped_each_time_gives_no_verdict(kit, monkeypatch):
    with_a_compiler_that_is_stopped(kit, monkeypatch, times=1000, name="KILL")
    monkeypatch.setattr("agent.update.machine.RETRY_MAX_S", 0.01)
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0", rollout="r1")))
        last = kit.reports()[-1]
        assert (last.phase, last.code) == ("failed", RejectCode.INTERRUPTED)
        assert "SIGKILL" in last.message
        assert outcome_of(last.code, last.phase) is Outcome.DEFERRED
        (failure,) = kit.store.failed()
        assert failure.retry_at is not None, "tried again by itself"


def stopped(times, asked, monkeypatch):
    """Have the compiler stopped so many times as a missing image is made again; note each wait before the next try."""
    whole, left = effects.start, [None] * times

    async def sometimes(*arguments, **more):
        if left:
            left.pop()
            raise ImageError(RejectCode.INTERRUPTED, "the compiler was stopped by SIGKILL before it had finished")
        return await whole(*arguments, **more)

    monkeypatch.setattr(effects, "start", sometimes)
    monkeypatch.setattr(effects, "retry_delay_s", lambda state: asked.append(state.losses) or 0.0)


@pytest.mark.asyncio
async def test_a_swap_whose_compiler_is_stopped_waits_before_it_is_repeated(kit, monkeypatch):
    async with kit.running():
        stopped(2, asked := [], monkeypatch)
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        assert asked == [0, 1]
        assert kit.host.targets() == {"web": V1}


@pytest.mark.asyncio
async def test_a_rollback_whose_compiler_is_stopped_waits_before_it_is_repeated(kit, monkeypatch):
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        (before,) = kit.committed()
        await kit.carrier.stop(Change(instance="web", assignment=1, state=State()))
        stopped(1, asked := [], monkeypatch)
        change = Change(instance="web", assignment=2, state=State(phase=Phase.ROLLING_BACK, losses=1), generation=9)

        async def renew(committed):
            return committed

        assert (await kit.carrier.revert(change, before, renew)).event is Event.HOST_LOST
        assert asked == [1]
        assert (await kit.carrier.revert(change, before, renew)).event is Event.DONE
        assert kit.host.targets() == {"web": V1}


EFFECTS = ["fetch", "verify", "compile", "swap", "watch", "commit"]


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.asyncio
async def test_a_temporary_internal_error_is_retried_and_costs_at_most_a_rollback(kit, monkeypatch, effect):
    monkeypatch.setattr("agent.update.machine.RETRY_FIRST_S", 0.01)
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        monkeypatch.setattr(kit.carrier, effect, broken(1, getattr(kit.carrier, effect)))
        await kit.run(kit.assignment(2, kit.publish("2.0.0")))
        said = {report.code for report in kit.reports()}
        if effect == "swap":  # a rollback is the safe way; the update is retried later
            assert (kit.host.targets(), said) == ({"web": V1}, {None, RejectCode.INTERNAL})
            assert [failure.retry_at is not None for failure in kit.store.failed()] == [True]
            return
        assert kit.host.targets() == {"web": V2}
        assert kit.chain()[-1] == "committed"
        assert said == ({None} if effect == "commit" else {None, RejectCode.INTERNAL})
        assert kit.store.failed() == ()


@pytest.mark.parametrize("effect", EFFECTS[:-1])
@pytest.mark.asyncio
async def test_a_permanent_internal_error_ends_as_internal_without_a_verdict(kit, monkeypatch, effect):
    monkeypatch.setattr("agent.update.machine.RETRY_MAX_S", 0.01)
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        plain = getattr(kit.carrier, effect)
        monkeypatch.setattr(kit.carrier, effect, broken(100, plain))
        item = kit.publish("2.0.0")
        await kit.run(kit.assignment(2, item))
        last = kit.reports()[-1]
        assert (last.phase, last.code) == (
            "failed" if effect in EFFECTS[:3] else "rolled-back",
            RejectCode.INTERNAL,
        )
        assert kit.host.targets() == {"web": V1}
        (failure,) = kit.store.failed()
        assert failure.retry_at is not None, "tried again by itself"


@pytest.mark.asyncio
async def test_a_deployment_failed_by_an_internal_error_is_retried_later(kit, monkeypatch):
    monkeypatch.setattr("agent.update.machine.RETRY_MAX_S", 0.01)
    monkeypatch.setattr("agent.update.state.RETRY_FIRST_S", 0.05)
    async with kit.running():
        monkeypatch.setattr(kit.carrier, "verify", broken(13, kit.carrier.verify))
        await kit.deployer.desire(kit.assignment(1, kit.publish("1.0.0")))
        await kit.until(lambda: kit.chain()[-1:] == ["committed"])
        assert [(each.phase, each.code) for each in kit.reports() if each.phase == "failed"] == [
            ("failed", RejectCode.INTERNAL)
        ]
        await kit.settled()
        assert kit.store.counter("committed") == 1


@pytest.mark.asyncio
async def test_an_effect_is_retried_after_an_internal_error_as_slowly_as_a_download(kit, monkeypatch):
    asked = []
    monkeypatch.setattr(effects, "retry_delay_s", lambda state: asked.append(state.faults) or 0.0)
    async with kit.running():
        monkeypatch.setattr(kit.carrier, "watch", broken(3, kit.carrier.watch))
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        assert asked == [1, 2, 3]
        assert kit.host.targets() == {"web": V1}


@pytest.mark.asyncio
async def test_an_internal_error_in_a_removal_is_retried(kit, monkeypatch):
    monkeypatch.setattr("agent.update.machine.RETRY_FIRST_S", 0.01)
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        monkeypatch.setattr(kit.carrier, "stop", broken(2, kit.carrier.stop))
        await kit.run(kit.assignment(2))
        assert kit.host.targets() == {}
        assert kit.chain()[-1] == "committed"
        assert kit.store.changes() == ()


@pytest.mark.asyncio
async def test_an_internal_error_during_a_rollback_keeps_its_reason(kit, monkeypatch):
    monkeypatch.setattr("agent.update.machine.RETRY_FIRST_S", 0.01)
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        kit.host.faults[V2] = 2
        monkeypatch.setattr(kit.carrier, "revert", broken(2, kit.carrier.revert))
        await kit.run(kit.assignment(2, kit.publish("2.0.0")))
        assert kit.host.targets() == {"web": V1}
        last = kit.reports()[-1]
        assert (last.phase, last.code) == ("rolled-back", RejectCode.TRAPPED)
        assert kit.store.failed()[0].retry_at is None, "a verdict on the component"


@pytest.mark.asyncio
async def test_an_impossible_event_is_an_internal_error(kit, monkeypatch):
    monkeypatch.setattr("agent.update.machine.RETRY_FIRST_S", 0.01)
    async with kit.running():
        verify, answers = kit.carrier.verify, [EffectResult(event=Event.WELL)]

        async def strange(change):
            return answers.pop() if answers else await verify(change)

        monkeypatch.setattr(kit.carrier, "verify", strange)
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        assert kit.host.targets() == {"web": V1}
        assert [report.code for report in kit.reports()][:2] == [None, RejectCode.INTERNAL]


@pytest.mark.asyncio
async def test_a_result_of_an_earlier_step_is_ignored(kit):
    async with kit.running():
        await kit.deployer.desire(kit.assignment(1, kit.publish("1.0.0", probation_ms=60_000)))
        await kit.until(lambda: kit.chain()[-1:] == ["probation"])
        active = kit.deployer.state.active["web"]
        late = EffectResult(event=Event.UNWELL, code=RejectCode.TRAPPED)
        for serial in range(active.serial):
            kit.deployer.post(EffectFinished("web", serial, late))
            kit.deployer.post(DownloadProgress("web", serial, 50))
        await kit.handled()
        assert active.change.phase == "probation"
        assert len(kit.reports()) == len(kit.chain())


@pytest.mark.asyncio
async def test_the_next_version_is_not_fetched_before_the_fetch_of_the_last_one_has_ended(kit, monkeypatch):
    async with kit.running():
        events, may_end, fetch = [], asyncio.Event(), kit.carrier.fetch

        async def fetched(change, progress):
            events.append(f"fetch {change.item.target}")
            try:
                if change.item.target == V1:
                    await asyncio.Event().wait()
                return await fetch(change, progress)
            finally:
                if change.item.target == V1:
                    await may_end.wait()  # it has files open
                events.append(f"end {change.item.target}")

        monkeypatch.setattr(kit.carrier, "fetch", fetched)
        await kit.deployer.desire(kit.assignment(1, kit.publish("1.0.0")))
        await kit.until(lambda: events)
        await kit.deployer.desire(kit.assignment(2, kit.publish("2.0.0")))
        await kit.deployer.desire(kit.assignment(3, kit.publish("3.0.0")))
        await kit.handled()
        assert events == [f"fetch {V1}"]
        may_end.set()
        await kit.settled()
        assert events == [f"fetch {V1}", f"end {V1}", f"fetch {V3}", f"end {V3}"]
        assert kit.host.targets() == {"web": V3}


@pytest.mark.asyncio
async def test_a_changed_image_is_reported_for_each_of_its_instances(kit):
    async with kit.running():
        item = kit.publish("1.0.0")
        await kit.run(kit.assignment(1, item))
        kit.deployer.post(ImageDamaged(item.sha256, "it was changed"))
        kit.deployer.post(ImageDamaged("0" * 64, "nobody's"))
        await kit.handled()
        last = kit.reports()[-1]
        assert (last.phase, last.code, last.running) == ("idle", RejectCode.IMAGE_DAMAGED, V1)
        assert [report.code for report in kit.reports()].count(RejectCode.IMAGE_DAMAGED) == 1


@pytest.mark.asyncio
async def test_a_report_is_passed_on_once_it_is_stored(kit, monkeypatch):
    async with kit.running():
        handed = []

        def saved(report):
            handed.append((report.phase, kit.chain()[-1]))

        monkeypatch.setattr(kit, "saved", saved)
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        assert handed == [(phase, phase) for phase in ("fetching", "compiling", "swapping", "probation", "committed")]


@pytest.mark.asyncio
async def test_a_full_disk_stops_no_running_component_and_is_retried(kit, monkeypatch):
    async with kit.running():
        monkeypatch.setattr("agent.update.reconciler.STORE_AGAIN_S", 0.01)
        await kit.run(kit.assignment(1, kit.publish("1.0.0")))
        real, failures = kit.store.apply, []

        def full(step):
            if len(failures) < 5:
                failures.append(step)
                raise StoreError("database or disk is full")
            return real(step)

        monkeypatch.setattr(kit.store, "apply", full)
        await kit.run(kit.assignment(2, kit.publish("2.0.0")))
        assert len(failures) == 5
        assert kit.host.targets() == {"web": V2}
        assert kit.chain()[-5:] == ["fetching", "compiling", "swapping", "probation", "committed"]


@pytest.mark.asyncio
async def test_the_security_epoch_is_raised_at_the_commit_and_not_before(kit):
    async with kit.running():
        item = kit.publish("1.0.0", probation_ms=200)
        kit.manifests[V1] = type(kit.manifests[V1])(
            name="web",
            version="1.0.0",
            trigger=kit.manifests[V1].trigger,
            health=kit.manifests[V1].health,
            security_epoch=7,
        )
        await kit.deployer.desire(kit.assignment(1, item))
        await kit.until(lambda: kit.chain()[-1:] == ["probation"])
        assert kit.store.facts().epochs == {}
        await kit.settled()
        assert kit.store.facts().epochs == {"acme/web": 7}


def test_lost_names_its_code():
    assert lost("gone").happened.code == RejectCode.HOST_GONE


@pytest.mark.asyncio
async def test_a_gate_on_metrics_takes_a_worse_version_back_and_says_where_it_cannot_judge(kit):
    def errors(value):
        return (Metric(name="read_errors", kind="counter", value=value, count=1),)

    gate = {"read_errors": MetricGate(max_increase_percent=20, min_samples=10, wait_ms=0)}
    async with kit.running():
        await kit.run(kit.assignment(1, kit.publish("1.0.0", metrics=gate)))
        kit.host.metrics = {V1: errors(1), V2: errors(5)}
        await kit.run(kit.assignment(2, kit.publish("2.0.0", metrics=gate)))
        last = kit.reports()[-1]
        assert (last.phase, last.code, last.running) == ("rolled-back", RejectCode.METRIC_GATE, V1)
        assert last.message == "read_errors is 0.5 where the replaced version had 0.1 (10 calls)"
        few = {"read_errors": MetricGate(max_increase_percent=20, min_samples=11, wait_ms=0)}
        await kit.run(kit.assignment(3, kit.publish("3.0.0", metrics=few)))
        last = kit.reports()[-1]
        assert (last.phase, last.code) == ("committed", None)
        assert last.undecided == "read_errors: the replaced version has 10 of 11 calls"
