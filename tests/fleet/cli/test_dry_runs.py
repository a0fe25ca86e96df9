"""`--dry-run`: nothing is sent that changes anything, the devices concerned are named, what is not there is refused."""

import json
from datetime import UTC, datetime

import pytest

from fleet.cli.answers import ANSWERS, fits
from fleet.protocol import operator_api, trust_api
from fleet.protocol.codes import Outcome, RolloutState
from tests.fleet.cli.walk import COMMANDS

DEVICE = "gate-0a0a0a0a"
TARGET = "components/main/hello/1.0.0.wasm"
CHANGES = {
    "pin": f"pin {DEVICE} hello@1.0.0",
    "unpin": f"unpin {DEVICE} hello",
    "retry": f"retry {DEVICE} hello",
    "restart": f"restart {DEVICE} hello",
    "label": f"label {DEVICE} site=berlin floor-",
    "revoke": f"revoke {DEVICE}",
    "device set": f"device set {DEVICE} hello room=cellar",
    "device unset": f"device unset {DEVICE} hello room",
    "remove": "remove hello --group edge-eu",
    "undo": "undo 7",
    "freeze": "freeze --reason fair",
    "unfreeze": "unfreeze",
    "group change": f"group change edge-eu --add {DEVICE}",
    "secret rm": "secret rm key --group edge-eu",
    "rollout pause": "rollout pause 7",
    "rollout resume": "rollout resume 7",
    "rollout approve": "rollout approve 7",
    "rollout abort": "rollout abort 7",
    "rollout retry": "rollout retry 7",
    "rollout cancel-device": f"rollout cancel-device 7 {DEVICE}",
}
ELSEWHERE = {"push", "deploy", "withdraw", "group policy", "data publish", "data push"}
"""Commands whose dry runs have tests of their own."""


def test_every_command_that_changes_devices_has_a_dry_run():
    able = {name for name, command in COMMANDS.items() if any("--dry-run" in each.opts for each in command.params)}
    assert able == CHANGES.keys() | ELSEWHERE


@pytest.fixture
def filled(desk):
    instance = operator_api.Effective(instance="hello", target=TARGET, source="pin")
    row = operator_api.DeviceRow(id=DEVICE, name="gate", groups=("edge-eu",), pins=("hello",))
    entry = operator_api.RolloutDevice(device=DEVICE, wave=1, outcome=Outcome.SUCCEEDED)
    view = operator_api.RolloutView(
        id="r7", number=7, revision=1, state=RolloutState.PAUSED, instance="hello", target=TARGET, group="edge-eu",
        devices=(entry,), created_at=datetime.now(UTC),
    )  # fmt: skip
    holding = trust_api.Holding(device=DEVICE, version=1, at="2026-11-30T18:00:00Z", by="admin", sealed="server")
    secret = trust_api.SecretRow(instance="hello", name="key", version=1, devices=(holding,))
    desk.routes |= {
        ("GET", "/v1/devices"): operator_api.Devices(devices=(row,)),
        ("GET", f"/v1/devices/{DEVICE}"): operator_api.DeviceDetail(
            row=row, enrolled_at=datetime.now(UTC), effective=(instance,)
        ),
        ("GET", "/v1/rollouts/7"): view,
        ("GET", "/v1/secrets"): trust_api.Secrets(secrets=(secret,)),
        ("POST", "/v1/preflight"): operator_api.Preflight(waves=((DEVICE,),)),
    }
    return desk


@pytest.mark.parametrize("name", CHANGES)
def test_a_dry_run_names_the_devices_and_changes_nothing(name, fleet, filled):
    done = fleet(*CHANGES[name].split(), "--dry-run")
    assert done.exit_code == 0, done.output
    assert DEVICE in done.stdout
    assert done.stdout.endswith("Nothing was changed.\n")
    found = json.loads(fleet(*CHANGES[name].split(), "--dry-run", "--json").stdout)
    assert name in ANSWERS
    assert fits(name, found)
    assert filled.paths("PUT") == []
    assert set(filled.paths("POST")) <= {"/v1/preflight"}


@pytest.mark.parametrize(
    "words",
    [f"restart {DEVICE} nope", f"retry {DEVICE} nope", f"unpin {DEVICE} nope", "rollout cancel-device 7 hut-00000000"],
)
def test_a_dry_run_refuses_what_is_not_there(words, fleet, filled):
    assert fleet(*words.split(), "--dry-run").exit_code == 4


def test_an_undo_that_names_no_rollout_foresees_none(fleet, filled):
    assert "--dry-run needs the NUMBER" in fleet("undo", "--dry-run").stderr
