"""Update machine: every state has an exit, illegal events change nothing, and every walk ends."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.update import machine
from agent.update.machine import LIMITS, TABLE, Effect, Event, Happened, IllegalEventError, State, advance
from fleet.protocol import codes
from fleet.protocol.codes import Phase

NOW = 1000.0
DOCS = Path(__file__).parents[3] / "docs" / "update-machine.md"


def walk(*events, state=None):
    state, effects = state or State(), []
    for event in events:
        state, effect = advance(state, event if isinstance(event, Happened) else Happened(event), NOW)
        effects.append(effect)
    return state, effects


def test_phases_have_the_names_of_the_protocol():
    assert [phase.value for phase in Phase] == [phase.value for phase in codes.Phase]


def test_a_successful_update():
    state, effects = walk(Event.BEGIN, *[Event.DONE] * 5)
    assert state.phase is Phase.PROBATION
    assert effects == [Effect.FETCH, Effect.VERIFY, Effect.COMPILE, Effect.STAGE, Effect.SWAP, Effect.WATCH]
    state, effects = walk(Happened(Event.WELL, exercised=False), Event.DONE, state=state)
    assert effects == [Effect.COMMIT, Effect.CLOSE]
    assert not state.exercised


@pytest.mark.parametrize("phase", [Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING, Phase.STAGED])
def test_a_refusal_before_the_swap_affects_no_running_component(phase):
    state, effect = advance(State(phase=phase), Happened(Event.REFUSED, "hash-mismatch", "why"), NOW)
    assert (state.phase, effect) == (Phase.FAILED, Effect.REMEMBER)
    assert (state.code, state.message) == ("hash-mismatch", "why")


@pytest.mark.parametrize(("phase", "event"), [(Phase.SWAPPING, Event.REFUSED), (Phase.PROBATION, Event.UNWELL)])
def test_from_the_swap_on_there_is_a_way_back(phase, event):
    state, effects = walk(Happened(event, "trapped", "it trapped"), Event.DONE, Event.DONE, state=State(phase=phase))
    assert effects == [Effect.REVERT, Effect.REMEMBER, Effect.CLOSE]
    assert state.code == "trapped"


def test_every_stored_state_names_its_recovery():
    assert {row.phase for row in TABLE if row.event is Event.INTERRUPTED} == set(Phase)


def test_an_unknown_stored_phase_rolls_back():
    assert machine.phase_of("teleporting") is Phase.ROLLING_BACK
    assert machine.phase_of("fetching") is Phase.FETCHING


LEGAL = {(row.phase, row.event) for row in TABLE}


@pytest.mark.parametrize("phase", Phase)
def test_an_illegal_event_raises_and_changes_nothing(phase):
    state = State(phase=phase, delays=2)
    for event in set(Event) - {event for there, event in LEGAL if there is phase}:
        with pytest.raises(IllegalEventError):
            advance(state, Happened(event), NOW)
    assert state == State(phase=phase, delays=2)


def test_each_pair_is_in_the_table_once():
    assert len(LEGAL) == len(TABLE)


def test_every_backward_row_has_a_counter():
    order = list(Phase)
    back = [row for row in TABLE if order.index(row.to) <= order.index(row.phase) and row.phase is not Phase.IDLE]
    ends = {Phase.IDLE}
    assert all(row.counter is not None or row.to in ends for row in back)


@given(st.lists(st.sampled_from(list(Event)), max_size=400), st.booleans())
def test_every_walk_ends(events, removal):
    """For any sequence of events, a change ends after a bounded number of events."""
    state, _ = walk(Event.REMOVE if removal else Event.BEGIN)
    steps = 0
    for event in events:
        try:
            state, effect = advance(state, Happened(event), NOW)
        except IllegalEventError:
            continue
        steps += 1
        if effect is Effect.CLOSE:
            break
        assert not (state.removal and effect in {Effect.SWAP, Effect.REVERT, Effect.FETCH})
    assert steps <= len(Phase) * 2 + sum(LIMITS.values()) * len(Phase)


@pytest.mark.parametrize("row", [row for row in TABLE if row.counter], ids=lambda row: f"{row.phase}-{row.event}")
def test_each_counter_has_an_end(row):
    full = State(phase=row.phase, **{str(row.counter): LIMITS[row.counter]})
    state, effect = advance(full, Happened(row.event), NOW)
    assert state.phase is row.beyond
    if row.beyond is not Phase.IDLE:
        assert state.code in set(codes.RejectCode)
        assert state.message
    assert effect is not row.effect or row.effect is Effect.REMEMBER


def test_earlier_problems_are_removed_from_the_report():
    state, _ = walk(Event.BEGIN, Happened(Event.DELAYED, "unreachable", "no network"))
    assert state.code == "unreachable"
    state, _ = walk(Event.DONE, state=state)
    assert (state.code, state.message) == ("", "")


def test_retry_delays_double_up_to_five_minutes():
    delays = [machine.retry_delay_s(State(delays=count)) for count in range(1, 15)]
    assert delays == sorted(delays)
    assert (delays[0], delays[-1]) == (2.0, 300.0)


def test_the_page_in_the_docs_is_the_printed_table():
    _, _, generated = DOCS.read_text().partition("<!-- generated -->\n")
    assert generated.strip() == machine.markdown().strip(), "put the output of python -m agent.update.machine there"


def test_the_diagram_names_every_phase():
    assert set(re.findall(r"--> (\w+)", machine.mermaid())) == {phase.value.replace("-", "_") for phase in Phase}


FAULT = Happened(Event.FAULT, "internal", "a bug")


@pytest.mark.parametrize("phase", [Phase.FETCHING, Phase.VERIFYING, Phase.COMPILING, Phase.STAGED])
def test_an_internal_error_before_the_swap_is_retried_from_the_download(phase):
    state, effect = advance(State(phase=phase), FAULT, NOW)
    assert (state.phase, state.code, state.faults, effect) == (Phase.FETCHING, "internal", 1, Effect.RETRY)


@pytest.mark.parametrize(
    ("state", "phase", "effect"),
    [
        (State(phase=Phase.SWAPPING), Phase.ROLLING_BACK, Effect.REVERT),
        (State(phase=Phase.PROBATION), Phase.PROBATION, Effect.WATCH),
        (State(phase=Phase.PROBATION, faults=12), Phase.ROLLING_BACK, Effect.REVERT),
        (State(phase=Phase.ROLLING_BACK), Phase.ROLLING_BACK, Effect.REVERT),
        (State(phase=Phase.ROLLING_BACK, faults=12), Phase.ROLLED_BACK, Effect.REMEMBER),
        (State(phase=Phase.COMMITTED), Phase.IDLE, Effect.CLOSE),
        (State(phase=Phase.SWAPPING, removal=True), Phase.SWAPPING, Effect.STOP),
        (State(phase=Phase.SWAPPING, removal=True, faults=12), Phase.COMMITTED, Effect.COMMIT),
    ],
)
def test_an_internal_error_from_the_swap_on(state, phase, effect):
    following, to_do = advance(state, FAULT, NOW)
    assert (following.phase, to_do) == (phase, effect)


def test_an_internal_error_does_not_restart_probation():
    state, _ = advance(State(phase=Phase.PROBATION, entered=7.0), FAULT, NOW)
    assert (state.entered, state.code) == (7.0, "internal")


def test_retry_delays_after_internal_errors_double():
    assert [machine.retry_delay_s(State(faults=count)) for count in (1, 2, 12)] == [2.0, 4.0, 300.0]
    assert [machine.retry_delay_s(State(losses=count)) for count in (0, 1, 2, 3)] == [2.0, 2.0, 4.0, 8.0]


@pytest.mark.parametrize("event", [Event.HOST_LOST, Event.FAULT, Event.INTERRUPTED, Event.DONE])
@pytest.mark.parametrize("used", [0, 100])
def test_the_reason_of_a_rollback_is_kept(event, used):
    state = State(
        phase=Phase.ROLLING_BACK, code="trapped", message="it trapped", losses=used, faults=used, interruptions=used
    )
    state, _ = advance(state, Happened(event, "other", "another trouble"), NOW)
    assert (state.code, state.message) == ("trapped", "it trapped")


@pytest.mark.parametrize("phase", [Phase.SWAPPING, Phase.FETCHING])
def test_an_ended_counter_reports_its_own_reason(phase):
    state = State(phase=phase, interruptions=3, resumptions=100, code="host-gone", message="the host was lost")
    state, _ = advance(state, Happened(Event.INTERRUPTED), NOW)
    assert state.code == "interrupted"
    assert "host" not in state.message


def test_a_removal_in_an_unknown_phase_is_stopped_and_ends():
    state, effects = walk(Event.INTERRUPTED, Event.STOPPED, state=State(phase=Phase.ROLLING_BACK, removal=True))
    assert (state.phase, effects) == (Phase.COMMITTED, [Effect.STOP, Effect.COMMIT])
