"""Steps of a change as values: everything that they persist, their reports, and the effects that follow."""

from datetime import UTC, datetime

import msgspec
import pytest

from agent.host.ipc import host_api
from agent.update.machine import LIMITS, TABLE, Counter, Effect, Event, State
from agent.update.probation import ProbationSample
from agent.update.state import (
    DONE,
    SUPERSEDED,
    Change,
    Committed,
    DeviceContext,
    EffectResult,
    FailedItem,
    Transition,
    fault,
    item_key,
    lost,
    of_change,
    refused,
    transition,
)
from fleet.protocol import bounds, wire
from fleet.protocol.assignment import Item, SecretRef
from fleet.protocol.codes import RETRYABLE, Phase, RejectCode
from fleet.protocol.manifest import ConfigKey, Grants, Http, Limits, Manifest

AT = datetime(2026, 5, 1, tzinfo=UTC)
DEVICE = DeviceContext(device="d-01234567", boot_id="b", places=None, mac_key=b"", clock=None)
OLD, NEW = (
    Item(
        instance="web",
        target=f"components/acme/web/{version}.0.0.wasm",
        length=1,
        sha256=str(version) * 64,
        manifest_sha256=str(version) * 64,
        secrets=(SecretRef(name="key", sha256="3" * 64, version=version),),
    )
    for version in (1, 2)
)
MANIFEST = Manifest(name="web", version="2.0.0", trigger=Http(), security_epoch=7)
RUNS = Committed(item=OLD, manifest=MANIFEST, generation=3, assignment=1, at=AT)


def change(phase, *, item=NEW, generation=0, **state):
    return Change(
        instance="web",
        assignment=2,
        state=State(phase=phase, entered=10.0, **state),
        item=item,
        manifest=MANIFEST,
        generation=generation,
        boot_id="b",
    )


def step(before, result, **more):
    return transition(before, result, device=DEVICE, now=12.5, at=AT, **{"committed": RUNS, **more})


WELL, STOPPED, UNWELL = (EffectResult(event=event) for event in (Event.WELL, Event.STOPPED, Event.UNWELL))
DELAYED = EffectResult(event=Event.DELAYED, code=RejectCode.UNREACHABLE, message="no route")
BEGIN, REMOVE, FOUND = (EffectResult(event=event) for event in (Event.BEGIN, Event.REMOVE, Event.INTERRUPTED))
NO = refused(RejectCode.REVOKED, "revoked")

P, E = Phase, Effect


@pytest.mark.parametrize(
    ("phase", "result", "to", "effect", "reported"),
    [
        (P.IDLE, BEGIN, P.FETCHING, E.FETCH, True),
        (P.FETCHING, DONE, P.VERIFYING, E.VERIFY, False),
        (P.FETCHING, DELAYED, P.FETCHING, E.RETRY, True),
        (P.FETCHING, fault("bug"), P.FETCHING, E.RETRY, True),
        (P.FETCHING, FOUND, P.FETCHING, E.FETCH, False),
        (P.FETCHING, NO, P.FAILED, E.REMEMBER, True),
        (P.VERIFYING, DONE, P.COMPILING, E.COMPILE, True),
        (P.VERIFYING, fault("bug"), P.FETCHING, E.RETRY, True),
        (P.COMPILING, DONE, P.STAGED, E.STAGE, False),
        (P.STAGED, DONE, P.SWAPPING, E.SWAP, True),
        (P.SWAPPING, DONE, P.PROBATION, E.WATCH, True),
        (P.SWAPPING, lost("gone"), P.SWAPPING, E.SWAP, False),
        (P.SWAPPING, fault("bug"), P.ROLLING_BACK, E.REVERT, False),
        (P.PROBATION, WELL, P.COMMITTED, E.COMMIT, True),
        (P.PROBATION, UNWELL, P.ROLLING_BACK, E.REVERT, False),
        (P.PROBATION, SUPERSEDED, P.ROLLING_BACK, E.REVERT, False),
        (P.PROBATION, fault("bug"), P.PROBATION, E.WATCH, True),
        (P.PROBATION, FOUND, P.PROBATION, E.WATCH, False),
        (P.PROBATION, lost("gone"), P.SWAPPING, E.SWAP, True),
        (P.ROLLING_BACK, DONE, P.ROLLED_BACK, E.REMEMBER, True),
        (P.ROLLING_BACK, fault("bug"), P.ROLLING_BACK, E.REVERT, False),
    ],
)
def test_a_step_stores_the_change_and_a_report_if_needed(phase, result, to, effect, reported):
    done = step(change(phase, generation=4), result)
    assert (done.change.phase, done.effect, done.report is not None) == (to, effect, reported)
    assert (done.closed, done.removed, done.new_generation) == ("", "", False)
    if reported:
        assert (done.report.phase, done.report.at, done.report.code) == (to.value, AT, result.code)
        assert done.report.running == (NEW if to in {P.PROBATION, P.COMMITTED} else OLD).target


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.phase}-{row.event}")
def test_outcomes_are_stored_only_on_entering_their_phase(row):
    done = step(change(row.phase, generation=4), EffectResult(event=row.event))
    enters = row.to is not row.phase and row.effect is not Effect.CLOSE
    assert (done.committed is not None) == (enters and row.to is Phase.COMMITTED)
    assert (done.failure is not None) == (enters and row.to in {Phase.FAILED, Phase.ROLLED_BACK})
    assert bool(done.epochs) == bool(done.secrets) == (done.committed is not None)
    assert (done.closed == "web") == (done.change is None) == (row.effect is Effect.CLOSE)
    assert done.removed == ""


def test_a_commit_carries_epochs_and_secrets_with_it():
    done = step(change(P.PROBATION, generation=4), WELL)
    assert done.committed == Committed(item=NEW, manifest=MANIFEST, generation=4, assignment=2, at=AT)
    assert (done.epochs, done.secrets) == ({"acme/web": 7}, {"key": 2})


def test_a_generation_is_requested_once_when_the_swap_begins():
    assert step(change(P.STAGED), DONE).new_generation
    assert not step(change(P.STAGED, generation=4), DONE).new_generation
    assert not step(change(P.PROBATION, generation=4), lost("gone")).new_generation
    assert not step(change(P.IDLE, item=None), REMOVE).new_generation


def test_a_removal_is_stored_before_the_stop_and_ends_as_committed():
    done = step(change(P.IDLE, item=None), REMOVE)
    assert (done.removed, done.effect, done.report.running) == ("web", Effect.STOP, OLD.target)
    done = step(done.change, STOPPED, committed=None)
    assert (done.removed, done.committed, done.effect, done.report.running) == ("", None, Effect.COMMIT, "")
    assert step(done.change, DONE, committed=None) == Transition(closed="web", effect=Effect.CLOSE)


def test_a_superseded_change_ends_with_a_report_and_no_failure():
    done = step(change(P.COMPILING), SUPERSEDED)
    assert (done.closed, done.change, done.failure) == ("web", None, None)
    assert (done.report.phase, done.report.code) == ("failed", RejectCode.SUPERSEDED)
    rolled_back = step(change(P.ROLLING_BACK, code="superseded", generation=4), DONE)
    assert (rolled_back.failure, rolled_back.report.phase) == (None, "rolled-back")


@pytest.mark.parametrize(
    ("code", "known_tries", "retry_s"),
    [
        (RejectCode.INTERNAL, 0, 3600),
        (RejectCode.INTERNAL, 1, 7200),
        (RejectCode.HOST_GONE, 9, 86_400),
        (RejectCode.INTERNAL, 10, None),
        (RejectCode.TRAPPED, 0, None),
        # nothing of the device's own, and as long as the assignment stands
        (RejectCode.NO_SPACE, 0, 300),
        (RejectCode.UNREACHABLE, 1, 600),
        (RejectCode.PORT_IN_USE, 2, 1200),
        (RejectCode.NO_SPACE, 10, 86_400),
        (RejectCode.NO_SPACE, 5000, 86_400),
        (RejectCode.INTERRUPTED, 0, None),  # it went back: maybe the version's own doing
    ],
)
def test_a_failure_is_stored_with_its_next_retry(code, known_tries, retry_s):
    known = FailedItem(
        instance="web", key=item_key(NEW), attempt=0, target=NEW.target, code=code, message="", at=AT, tries=known_tries
    )
    before = change(P.ROLLING_BACK, code=code.value, message="why", generation=4)
    done = step(before, DONE, known=known if known_tries else None)
    assert (done.failure.code, done.failure.message, done.failure.tries) == (code, "why", known_tries + 1)
    assert done.failure.retry_at == (None if retry_s is None else AT.timestamp() + retry_s)
    # said where the code alone would promise another try
    assert done.report.tries_ended == (retry_s is None and code in RETRYABLE)


@pytest.mark.parametrize("known_tries", [9, 10, 5000])
@pytest.mark.parametrize("code", [RejectCode.INTERNAL, RejectCode.HOST_GONE])
def test_a_fault_of_the_devices_own_before_a_start_is_retried_once_a_day_while_the_assignment_stands(code, known_tries):
    """No verdict on the component, and nothing that runs is touched by another try."""
    known = FailedItem(
        instance="web", key=item_key(NEW), attempt=0, target=NEW.target, code=code, message="", at=AT, tries=known_tries
    )
    refusal = EffectResult(event=Event.REFUSED, code=code, message="why")
    done = step(change(P.FETCHING), refusal, known=known)
    assert (done.report.phase, done.failure.code, done.report.tries_ended) == ("failed", code, False)
    assert done.failure.retry_at == AT.timestamp() + 86_400


def test_endless_internal_errors_are_a_failure_that_is_retried():
    done = step(change(P.FETCHING, faults=LIMITS[Counter.FAULTS]), fault("a bug"))
    assert (done.failure.code, done.failure.message) == (RejectCode.INTERNAL, "a bug")
    assert done.failure.retry_at is not None


def test_a_component_whose_compilation_takes_the_device_down_is_not_tried_for_ever():
    """Found in COMPILING once more than allowed: maybe the component's own doing, also where nothing was swapped."""
    done = step(change(P.COMPILING, interruptions=LIMITS[Counter.INTERRUPTIONS]), FOUND)
    assert (done.report.phase, done.failure.code) == ("failed", RejectCode.INTERRUPTED)
    assert (done.failure.retry_at, done.report.tries_ended) == (None, True)


@pytest.mark.parametrize(("known_tries", "retry_s"), [(0, 3600), (1, 7200), (9, 86_400), (10, None)])
def test_a_compiler_that_is_stopped_at_each_try_ends(known_tries, retry_s):
    """A component that runs the compiler out of memory at each try would be compiled for ever."""
    known = FailedItem(
        instance="web",
        key=item_key(NEW),
        attempt=0,
        target=NEW.target,
        code=RejectCode.INTERRUPTED,
        message="",
        at=AT,
        tries=known_tries,
    )
    stopped = EffectResult(event=Event.DELAYED, code=RejectCode.INTERRUPTED, message="stopped")
    before = change(P.COMPILING, delays=LIMITS[Counter.DELAYS])
    done = step(before, stopped, known=known if known_tries else None)
    assert (done.failure.code, done.failure.tries) == (RejectCode.INTERRUPTED, known_tries + 1)
    assert done.failure.retry_at == (None if retry_s is None else AT.timestamp() + retry_s)


def test_an_effects_findings_are_kept_and_log_lines_only_reported_for_failures():
    found = EffectResult(event=Event.DONE, replaced=ProbationSample(calls=3), log=("a line",))
    done = step(change(P.SWAPPING, generation=4), found)
    assert (done.change.replaced, done.change.manifest) == (ProbationSample(calls=3), MANIFEST)
    assert done.report.log == ()
    done = step(done.change, EffectResult(event=Event.UNWELL, code=RejectCode.TRAPPED))
    assert done.change.replaced == ProbationSample(calls=3)
    done = step(done.change, EffectResult(event=Event.DONE, log=("a line",)))
    assert done.report.log == ("a line",)


def test_each_phase_is_timed_and_a_repeated_one_is_summed():
    before = change(P.COMPILING)
    done = step(before, fault("a bug"))
    assert done.change.timings_ms == {"compiling": 2500}
    assert step(done.change, DONE).change.timings_ms == {"compiling": 2500, "fetching": 0}


UNTYPED = Manifest(
    name="web",
    version="2.0.0",
    trigger=Http(),
    config={"room": ConfigKey(default="attic"), "name": ConfigKey(description="shown")},
)
RUN = host_api.Run(instance="web", generation=4, target=NEW.target, manifest=UNTYPED, grants=Grants(), limits=Limits())


class EarlierKey(msgspec.Struct, forbid_unknown_fields=True):
    """A configuration key as the version before reads it."""

    description: str = ""
    default: str | None = None


@pytest.mark.parametrize(
    "written",
    [
        host_api.encode(host_api.Start(id=1, run=RUN)),
        msgspec.json.encode(Committed(item=NEW, manifest=UNTYPED, generation=4, assignment=2, at=AT)),
        msgspec.json.encode(msgspec.structs.replace(change(P.STAGED), manifest=UNTYPED)),
    ],
    ids=["start", "committed", "change"],
)
def test_the_version_before_reads_untyped_keys(written):
    """A host that still runs as the agent is upgraded, and an agent that is put back, refuse unknown fields."""
    plain = msgspec.json.decode(written)
    (keys,) = [each["manifest"]["config"] for each in (plain, plain.get("run", {})) if "manifest" in each]
    read = msgspec.convert(keys, dict[str, EarlierKey])
    assert read == {"room": EarlierKey(default="attic"), "name": EarlierKey(description="shown")}
    again = msgspec.convert(keys, dict[str, ConfigKey])
    assert again == UNTYPED.config
    assert msgspec.structs.replace(UNTYPED, config=again).digest() == UNTYPED.digest()


def test_a_report_has_as_much_of_the_log_as_it_holds():
    lines = tuple(f'{number} "quoted" \u00fc{"x" * 300}' for number in range(1000))
    back = change(P.PROBATION, code="trapped", message="m" * 4096, generation=4)
    report = of_change(DEVICE, back, before="", log=lines)
    assert report.log == lines[-len(report.log) :]
    size = len(wire.encode(report))
    assert bounds.REPORT_MAX_BYTES - 24 * bounds.KIB < size < bounds.REPORT_MAX_BYTES - 8 * bounds.KIB
