"""`fleet push --dry-run`: who would get it, who would not and why, what it newly wants; and nothing is changed."""

import json
import platform
import shutil
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import pytest

from fleet.protocol import operator_api
from fleet.protocol.messages import Versions

DEMO = Path(__file__).resolve().parents[3] / "components" / "demo"
ARM = Versions(agent="1", host="1", engine="50.0.1")
TOML = 'name = "ticker"\nversion = "2.0.0"\ntrigger = { type = "schedule", every = "2s" }\narch = ["aarch64"]\n'


def row(name: str, **more: object) -> operator_api.DeviceRow:
    given = {"groups": ("edge-eu",), "online": True, "machine": "aarch64", "versions": ARM}
    return operator_api.DeviceRow(id=f"{name}-00000000", name=name, **(given | more))


DEVICES = (
    row("a"),
    row("b", online=False),
    row("c", machine="riscv64"),
    row("d", revoked=True),
    row("e", versions=Versions(agent="1", host="1")),
    row("f"),
    row("other", groups=("edge-us",)),
)


@pytest.fixture
def file(tmp_path, desk):
    desk.routes["GET", "/v1/devices"] = operator_api.Devices(devices=DEVICES)
    desk.routes["GET", "/v1/groups"] = operator_api.Groups(
        groups=(
            operator_api.GroupRow(
                name="edge-eu",
                settled=(
                    operator_api.Settled(
                        instance="ticker",
                        target="components/main/ticker/1.0.0.wasm",
                        since=datetime(2026, 5, 1, tzinfo=UTC),
                    ),
                ),
            ),
        )
    )
    shutil.copy(DEMO / "ticker.wasm", tmp_path / "ticker.wasm")
    (tmp_path / "component.toml").write_text(TOML + '[grants]\ninterfaces = ["wasi:logging"]\n')
    return tmp_path / "ticker.wasm"


def test_it_names_waves_exclusions_and_new_grants_and_changes_nothing(fleet, desk, file):
    result = fleet("push", file, "--group", "edge-eu", "--dry-run", "--seed", "0", "--json")
    assert result.exit_code == 0
    said = json.loads(result.stdout)
    checked_by = said.pop("checked_by")
    assert checked_by.startswith("this machine's host: wasmtime ")
    assert said == {
        "waves": [["f-00000000"], ["a-00000000", "b-00000000"]],
        "excluded": [
            {"device": "c-00000000", "reason": "it is riscv64, the component is for aarch64"},
            {"device": "d-00000000", "reason": "it is revoked"},
            {"device": "e-00000000", "reason": "it has no engine"},
        ],
        "new_grants": ["interface wasi:logging"],
        "previous": "main/ticker@1.0.0",
        "warnings": [
            "b-00000000 is offline and gets it when it reconnects",
            "the waves are drawn: --seed 0 draws these",
            f"not compiled for aarch64 with wasmtime {ARM.engine} (devices: 3): judged by what they reported",
        ],
        "problems": [],
    }
    assert (desk.paths("PUT"), desk.paths("POST")) == ([], [])


def test_people_read_it_line_by_line(fleet, file):
    text = fleet("push", file, "--group", "edge-eu", "--dry-run", "--seed", "0").stdout
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[1:] == [
        "imports wasi:logging/logging@0.1.0-draft",
        f"manifest {file.with_name('component.toml')}",
        f"checked by this machine's host: wasmtime {version('wasmtime')}, {platform.machine()}",
        "would be main/ticker@2.0.0, in place of main/ticker@1.0.0",
        "new grant interface wasi:logging",
        "wave 1 f-00000000",
        "wave 2 a-00000000, b-00000000",
        "excluded c-00000000: it is riscv64, the component is for aarch64",
        "excluded d-00000000: it is revoked",
        "excluded e-00000000: it has no engine",
        "note b-00000000 is offline and gets it when it reconnects",
        "note the waves are drawn: --seed 0 draws these",
        f"note not compiled for aarch64 with wasmtime {ARM.engine} (devices: 3): judged by what they reported",
        "Nothing was changed.",
    ]


def test_a_grant_that_it_had_before_is_not_new(fleet, desk, file):
    assert fleet("publish", file, "--version", "1.0.0").exit_code == 0
    result = fleet("push", file, "--group", "edge-eu", "--dry-run", "--json")
    assert json.loads(result.stdout)["new_grants"] == []


def test_no_device_that_could_run_it_is_exit_code_1(fleet, desk, file):
    desk.routes["GET", "/v1/devices"] = operator_api.Devices(devices=DEVICES[2:5])
    assert fleet("push", file, "--group", "edge-eu", "--dry-run").exit_code == 1


def test_a_plan_whose_approval_nobody_could_be_asked_for_is_warned_of(fleet, desk, file):
    plan = operator_api.GroupPlan(
        stages=(
            operator_api.PlanStage(select={"ring": "canary"}, size="2", approval=True),
            operator_api.PlanStage(),
        )
    )
    desk.routes["GET", "/v1/groups/edge-eu/policy"] = operator_api.GroupPolicy(group="edge-eu", plan=plan)
    result = fleet("push", file, "--group", "edge-eu", "--dry-run", "--seed", "0", "--json")
    shown = json.loads(result.stdout)
    assert (result.exit_code, shown.get("waves", [])) == (1, [])
    assert shown["warnings"][0] == (
        "it is refused: the stage ring=canary: 2 wants an approval, and takes no device that the change concerns"
    )


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (operator_api.GroupPlan(approval=True), "nothing is offered before the approval of a second person"),
        (
            operator_api.GroupPlan(stages=(operator_api.PlanStage(size="1", approval=True), operator_api.PlanStage())),
            "wave 1 wants the approval of a second person once it is done",
        ),
    ],
)
def test_approvals_that_the_plan_wants_are_told(fleet, desk, file, plan, told):
    desk.routes["GET", "/v1/groups/edge-eu/policy"] = operator_api.GroupPolicy(group="edge-eu", plan=plan)
    result = fleet("push", file, "--group", "edge-eu", "--dry-run", "--json")
    assert (result.exit_code, json.loads(result.stdout)["warnings"][0]) == (0, told)


def test_of_what_is_published_already_the_server_says_whether_anything_would_change(fleet, desk, file):
    assert fleet("publish", file).exit_code == 0
    refused = "it is refused: nothing would change: edge-eu is settled on it"
    desk.routes["POST", "/v1/preflight"] = operator_api.Preflight(
        waves=(), previous="components/main/ticker/2.0.0.wasm", warnings=(refused,)
    )
    result = fleet("push", file, "--group", "edge-eu", "--dry-run", "--json")
    assert (result.exit_code, json.loads(result.stdout)["warnings"]) == (5, [refused])


@pytest.mark.parametrize("where", [(), ("--where", "site=berlin")])
def test_a_rollout_that_reaches_no_device_is_refused_unless_empty_is_allowed(fleet, desk, file, where):
    desk.routes["GET", "/v1/devices"] = operator_api.Devices(devices=())
    dry = ("push", file, "--group", "edge-eu", "--dry-run", "--json", *where)
    refused, allowed = fleet(*dry), fleet(*dry, "--allow-empty")
    reason = "--where takes none of its devices" if where else "the group has no devices"
    assert (refused.exit_code, json.loads(refused.stdout)["warnings"][0]) == (
        5,
        f"it is refused: {reason}; --allow-empty settles it for devices that come later",
    )
    assert (allowed.exit_code, "it is refused" in allowed.stdout) == (0, False)


def test_waves_that_mean_nothing_are_named(fleet, file):
    result = fleet("push", file, "--group", "edge-eu", "--dry-run", "--waves", "5%, 1, many")
    assert result.exit_code == 2
    assert "'many' is not a wave" in result.stderr
