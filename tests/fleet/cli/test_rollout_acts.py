"""Acts on rollouts at the command line: each sends what it says, and prints what came of it."""

import json
from datetime import UTC, datetime

import msgspec
import pytest

from fleet.protocol import operator_api
from fleet.protocol.codes import Outcome, PauseCause, RolloutState
from fleet.rollout import members

NOW = datetime(2026, 11, 30, tzinfo=UTC)
VIEW = operator_api.RolloutView(
    id="r7", number=7, revision=1, state=RolloutState.RUNNING, instance="hello", target="main/hello/1.0.0.wasm",
    group="edge-eu", created_at=NOW, seed=42,
)  # fmt: skip


def sent(desk, path):
    return [json.loads(body or b"null") for method, seen, body in desk.seen if (method, seen) == ("POST", path)]


@pytest.mark.parametrize(
    ("words", "path", "body", "said"),
    [
        (["abort", "7"], "/v1/rollouts/7/abort", {"keep": False}, "is aborted: its devices are offered"),
        (["abort", "7", "--keep"], "/v1/rollouts/7/abort", {"keep": True}, "pinned where they are: none"),
        (["approve", "7"], "/v1/rollouts/7/approve", None, "is approved"),
        (["cancel-device", "7", "berlin"], "/v1/rollouts/7/cancel-device", {"device": "berlin"}, "without berlin"),
        (["retry", "7", "--detach"], "/v1/rollouts/7/retry", None, "Follow it with"),
    ],
)
def test_an_act_on_a_rollout_is_sent_and_told(fleet, desk, words, path, body, said):
    desk.routes[("POST", path)] = VIEW
    result = fleet("rollout", *words)
    assert result.exit_code == 0, result.output
    assert said in result.output
    assert sent(desk, path) == [body]


def test_a_freeze_and_its_end_are_sent_and_told(fleet, desk):
    desk.routes[("POST", "/v1/freeze")] = operator_api.Freezes(freezes={"edge-eu": "fair"})
    desk.routes[("POST", "/v1/unfreeze")] = operator_api.Freezes()
    assert "edge-eu is frozen: fair." in fleet("freeze", "--group", "edge-eu", "--reason", "fair").output
    assert "The fleet is no longer frozen." in fleet("unfreeze").output
    assert sent(desk, "/v1/freeze") == [{"group": "edge-eu", "reason": "fair"}]
    assert sent(desk, "/v1/unfreeze") == [{"group": ""}]


def test_a_freeze_has_a_reason(fleet, desk):
    assert (fleet("freeze", "--reason", " ").exit_code, desk.seen) == (2, [])


def test_the_help_of_the_group_cuts_no_sentence_off(fleet):
    shown = " ".join(fleet("rollout", "--help").output.split())
    assert "End a rollout and return its devices to what they had before." in shown


def test_a_scheduled_rollout_says_when_it_begins(fleet, desk):
    later = msgspec.structs.replace(
        VIEW, state=RolloutState.SCHEDULED, starts_at=datetime(2027, 1, 2, 3, 4, tzinfo=UTC)
    )
    desk.routes[("GET", "/v1/rollouts/7")] = later
    shown = fleet("rollout", "7").output
    assert "to group edge-eu (begins 2027-01-02 03:04 UTC)" in shown


def test_a_rollout_is_shown_with_whom_it_waits_for_and_why_it_is_paused(fleet, desk):
    waiting = operator_api.RolloutDevice(device="berlin", wave=1, outcome=Outcome.LOST, reason="silent")
    desk.routes[("GET", "/v1/rollouts/7")] = msgspec.structs.replace(
        VIEW, state=RolloutState.PAUSED, causes=(PauseCause.LOST,), reason="berlin lost", devices=(waiting,),
        waits_for=("berlin",), waits=3, queue_closed="oslo failed",
    )  # fmt: skip
    shown = " ".join(fleet("rollout", "7").output.split())
    for words in (
        "lost: silent", "state paused (lost)", "waits for berlin and 2 more", "queue closed: oslo failed", "seed 42",
    ):  # fmt: skip
        assert words in shown, shown


def test_a_refused_rollout_has_an_exit_code_of_its_own(fleet, desk):
    desk.routes[("POST", "/v1/undo")] = msgspec.structs.replace(
        VIEW, state=RolloutState.REFUSED, reason="it concerns no device", ended_at=NOW
    )
    result = fleet("undo", "6")
    assert result.exit_code == 5
    assert "--allow-empty" in result.output


def test_an_approval_that_guards_nobody_is_no_reason_to_allow_an_empty_group(fleet, desk):
    refused = members.Draw((), (), (), unguarded=members.Stage(members.EVERYBODY)).refusal
    desk.routes[("POST", "/v1/undo")] = msgspec.structs.replace(
        VIEW, state=RolloutState.REFUSED, reason=f"the group has no devices; {refused}", ended_at=NOW
    )
    result = fleet("undo", "6")
    assert (result.exit_code, "--allow-empty" in result.output) == (5, False)
    assert "change the plan: 'fleet group policy edge-eu'" in result.output


def test_a_plan_is_played_over_the_group(fleet, desk):
    rows = tuple(
        operator_api.DeviceRow(id=f"d{number}", name="d", groups=("edge-eu",), online=True) for number in range(6)
    )
    desk.routes[("GET", "/v1/devices")] = operator_api.Devices(devices=rows)
    result = fleet("rollout", "simulate", "--group", "edge-eu", "--runs", "3", "--seed", "2")
    assert result.exit_code == 0, result.output
    worst = result.output.splitlines()[-1].split()
    assert worst[:5] == ["100%", "3", "of", "3", "1"], "it halts in wave 1 each time"
    assert worst[7:9] == ["1", "1"], "one device is hurt, usually and at most"
    again = fleet("--json", "rollout", "simulate", "--group", "edge-eu", "--runs", "3", "--seed", "2")
    assert json.loads(again.output)["rates"][-1]["hurt_most"] == 1
    assert fleet("rollout", "simulate", "--group", "nowhere").exit_code == 4
    bad = fleet("rollout", "simulate", "--group", "edge-eu", "--max-lost", "x")
    assert (bad.exit_code, "--max-lost: 'x'" in bad.stderr) == (2, True)


@pytest.mark.parametrize(("where", "said"), [([], "no devices"), (["--where", "site=mars"], "no devices that --where")])
def test_a_plan_that_concerns_nobody_is_not_played(fleet, desk, where, said):
    desk.routes[("GET", "/v1/devices")] = operator_api.Devices(devices=())
    result = fleet("rollout", "simulate", "--group", "edge-eu", *where)
    assert (result.exit_code, f"the group 'edge-eu' has {said}" in result.stderr) == (4, True)
    assert "'fleet devices' lists all, with their groups" in result.stderr


def test_a_rollout_that_waits_for_an_approval_says_who_gives_it(fleet, desk):
    desk.routes[("GET", "/v1/rollouts/7")] = msgspec.structs.replace(
        VIEW, state=RolloutState.PAUSED, causes=(PauseCause.APPROVAL,), reason="wave 1 wants an approval", by="alice"
    )
    shown = " ".join(fleet("rollout", "7").output.split())
    assert "approval somebody other than alice: 'fleet rollout approve 7'" in shown
    desk.routes[("GET", "/v1/rollouts/7")] = msgspec.structs.replace(VIEW, by="alice")
    assert "somebody other than" not in fleet("rollout", "7").output


def test_the_plan_of_the_group_is_played_where_no_option_says_otherwise(fleet, desk):
    rows = tuple(
        operator_api.DeviceRow(
            id=f"d{number}",
            name="d",
            groups=("edge-eu",),
            online=True,
            labels={"ring": "lab" if number < 2 else "shop"},
        )
        for number in range(6)
    )
    desk.routes[("GET", "/v1/devices")] = operator_api.Devices(devices=rows)
    stages = (operator_api.PlanStage(select={"ring": "lab"}, approval=True), operator_api.PlanStage())
    plan = operator_api.GroupPlan(soak_s=86_400, stages=stages)
    desk.routes[("GET", "/v1/groups/edge-eu/policy")] = operator_api.GroupPolicy(group="edge-eu", plan=plan)

    def played(*words):
        return json.loads(fleet("--json", "rollout", "simulate", "--group", "edge-eu", "--runs", "3", *words).output)[
            "rates"
        ]

    good, *_, bad = played()
    assert (good["halted"], good["after_s"] > 86_400) == (0, True), "it soaks, and an approval is no halt"
    assert (bad["halted"], bad["wave"], bad["hurt_most"]) == (3, 1, 2), "both devices of the lab, and nobody else"
    good, *_, bad = played("--waves", "100%", "--soak", "0")
    assert (good["after_s"] < 86_400, bad["hurt_most"] > 2) == (True, True)
