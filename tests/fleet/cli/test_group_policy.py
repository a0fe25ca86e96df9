"""`fleet group policy`: a plan is checked here, sent, shown as TOML that can be set again, and cleared."""

import json

import pytest

from fleet.protocol import operator_api
from fleet.protocol.operator_api import GroupPlan, PlanLimits, PlanStage, StageView

PATH = "/v1/groups/edge-eu/policy"
TEXT = '[limits]\nfailures = 2\n\n[[stages]]\nselect = { ring = "canary" }\nsize = 2\napproval = true\n\n[[stages]]\n'
PLAN = GroupPlan(
    limits=PlanLimits(failures="2"),
    stages=(PlanStage(select={"ring": "canary"}, size="2", approval=True), PlanStage()),
)
POLICY = operator_api.GroupPolicy(
    group="edge-eu",
    plan=PLAN,
    stages=(StageView(text="ring=canary: 2", devices=1, approval=True), StageView(text="100%", devices=7)),
)


def sent(desk):
    return [json.loads(body) for method, path, body in desk.seen if (method, path) == ("PUT", PATH)]


@pytest.fixture
def plan_file(tmp_path):
    file = tmp_path / "plan.toml"
    file.write_text(TEXT)
    return file


def test_a_plan_is_set_and_told_with_whom_its_stages_take(fleet, desk, plan_file):
    desk.routes[("PUT", PATH)] = POLICY
    result = fleet("group", "policy", "edge-eu", "--set", str(plan_file))
    assert result.exit_code == 0, result.output
    assert "# stage 1 (ring=canary: 2): 1 device, then an approval\n# stage 2 (100%): 7 devices\n" in result.output
    assert result.output.endswith("edge-eu has this plan from now on.\n")
    (body,) = sent(desk)
    assert body["plan"]["stages"] == [{"select": {"ring": "canary"}, "size": "2", "approval": True}, {}]
    assert body["dry_run"] is False


def test_a_dry_run_changes_nothing_and_says_so(fleet, desk, plan_file):
    desk.routes[("PUT", PATH)] = POLICY
    result = fleet("group", "policy", "edge-eu", "--set", str(plan_file), "--dry-run")
    assert (result.exit_code, sent(desk)[0]["dry_run"]) == (0, True)
    assert result.output.endswith("Nothing was changed.\n")


def test_a_plan_is_shown_as_toml_that_can_be_set_again(fleet, desk, tmp_path):
    desk.routes[("GET", PATH)] = desk.routes[("PUT", PATH)] = POLICY
    shown = fleet("group", "policy", "edge-eu")
    assert shown.output.startswith(TEXT)
    again = tmp_path / "again.toml"
    again.write_text(shown.output)
    assert fleet("group", "policy", "edge-eu", "--set", str(again)).exit_code == 0
    assert sent(desk)[0]["plan"]["limits"] == {"failures": "2"}
    as_json = json.loads(fleet("--json", "group", "policy", "edge-eu").output)
    assert (as_json["group"], as_json["stages"][0]["devices"]) == ("edge-eu", 1)


def test_a_plan_is_cleared(fleet, desk):
    desk.routes[("GET", PATH)] = desk.routes[("PUT", PATH)] = operator_api.GroupPolicy(group="edge-eu")
    assert "edge-eu has no plan" in fleet("group", "policy", "edge-eu").output
    assert "edge-eu has no plan" in fleet("group", "policy", "edge-eu", "--clear").output
    assert sent(desk) == [{"plan": None, "dry_run": False}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"[limits]\nfailuers = 1\n", "plan.toml: line 2: limits.failuers: unknown key; did you mean failures?"),
        (b"\xff", "it is not text in UTF-8"),
        (b"#" * 70_000, "it is larger than 65536 bytes"),
    ],
)
def test_a_plan_that_cannot_be_meant_is_not_sent(fleet, desk, plan_file, text, said):
    plan_file.write_bytes(text)
    result = fleet("group", "policy", "edge-eu", "--set", str(plan_file))
    assert (result.exit_code, desk.seen) == (2, [])
    assert said in result.stderr


@pytest.mark.parametrize("words", [["--dry-run"], ["--set", "plan.toml", "--clear"], ["--set", "nowhere.toml"]])
def test_options_that_do_not_go_together_are_refused(fleet, desk, words):
    assert (fleet("group", "policy", "edge-eu", *words).exit_code, desk.seen) == (2, [])


@pytest.mark.parametrize("words", [["edge-eu", "--priority", "3"], ["--priority", "3", "edge-eu"]])
def test_a_group_is_changed_without_the_word_change(fleet, desk, words):
    desk.routes[("PUT", "/v1/groups/edge-eu")] = operator_api.GroupRow(name="edge-eu", devices=2)
    assert fleet("group", *words).output == "Group edge-eu: 2 devices.\n"


def test_a_group_with_the_name_of_a_command_is_changed_by_the_long_form(fleet, desk):
    desk.routes[("PUT", "/v1/groups/policy")] = operator_api.GroupRow(name="policy", devices=1)
    assert fleet("group", "change", "policy", "--priority", "1").output == "Group policy: 1 device.\n"


def test_what_is_not_given_is_left_to_the_plan(fleet, desk):
    asked = ("deploy", "hello@1.0.0", "--group", "edge-eu", "--detach")
    fleet(*asked)
    fleet(*asked, "--soak", "0", "--timeout", "900", "--on-breach", "rollback", "--at-once", "0")
    bodies = [json.loads(body) for method, path, body in desk.seen if (method, path) == ("POST", "/v1/rollouts")]
    names = {"soak_s", "timeout_s", "on_breach", "at_once", "waves", "failures"}
    assert [sorted(names & body.keys()) for body in bodies] == [[], ["at_once", "on_breach", "soak_s", "timeout_s"]]
