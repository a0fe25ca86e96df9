"""`fleet withdraw NAME@VERSION`: a release that must not run any more."""

import json
import shutil
from pathlib import Path

import pytest

from fleet.protocol import operator_api
from signing import keys, repository

DEMO = Path(__file__).resolve().parents[3] / "components" / "demo"


@pytest.fixture
def published(desk, fleet, tmp_path):
    desk.routes["GET", "/v1/withdrawal"] = operator_api.WithdrawalView(target="components/main/hello/1.0.0.wasm")
    file = shutil.copy(DEMO / "v1.wasm", tmp_path / "hello.wasm")
    for version in ("1.0.0", "1.1.0"):
        assert fleet("publish", file, "--version", version).exit_code == 0
    return desk


def versions(desk) -> list[str]:
    return [release.name.version for release in repository.releases(repository.latest(desk.files, "main")[1])]


def test_a_release_is_taken_back_for_good(fleet, published, tmp_path):
    done = fleet("withdraw", "hello@1.0.0", "--yes")
    assert done.exit_code == 0, done.output
    assert versions(published) == ["1.1.0"]
    again = fleet("withdraw", "hello@1.0.0", "--yes", "--json")
    assert json.loads(again.stdout)["new"] is False
    refused = fleet("publish", tmp_path / "hello.wasm", "--version", "1.0.0")
    assert refused.exit_code == 2
    assert "was revoked" in refused.stderr


def test_it_asks_first(fleet, published):
    asked = fleet("withdraw", "hello@1.0.0", stdin="n\n")
    assert asked.exit_code == 130
    assert "no device runs it" in asked.stderr
    assert "nothing was changed; the question was not answered with yes; add --yes" in asked.stderr
    assert versions(published) == ["1.0.0", "1.1.0"]


def test_at_the_end_of_the_input_it_says_what_to_do(fleet, published):
    asked = fleet("withdraw", "hello@1.0.0", stdin="")
    assert asked.exit_code == 130
    assert "nothing was changed; the " in asked.stderr  # click 8.1 tests with empty lines after the end of the input
    assert "; add --yes to do it without the question" in asked.stderr
    assert "interrupted" not in asked.stderr
    assert versions(published) == ["1.0.0", "1.1.0"]
    asked = fleet("revoke", "gate-7-1f2e3d4c", stdin="")
    assert "gate-7-1f2e3d4c was not revoked; the " in asked.stderr
    assert "; add --yes" in asked.stderr
    assert not [path for method, path, _ in published.seen if path.endswith("/revoke")]


CONCERNED = operator_api.WithdrawalView(
    target="components/main/hello/1.0.0.wasm",
    devices=(
        operator_api.WithdrawnDevice(
            device="berlin", instance="hello", online=True, runs=True, next="components/main/hello/0.9.0.wasm"
        ),
        operator_api.WithdrawnDevice(device="cairo", instance="hello", runs=True),
        operator_api.WithdrawnDevice(device="oslo", instance="hello", online=True),
    ),
    rollouts=(7,),
)
SAID = """\
By what devices report, 2 devices run it; 1 more is to run it.
  2 run nothing in its place, and keep their data: cairo, oslo
  1 goes to main/hello@0.9.0: berlin
  1 is offline, and follows when it is back: cairo
  rollout 7: revoked
"""


def test_the_devices_that_run_it_are_counted_and_named_with_what_becomes_of_them_before_it_asks(fleet, published):
    published.routes["GET", "/v1/withdrawal"] = CONCERNED
    asked = fleet("withdraw", "hello@1.0.0", stdin="n\n")
    assert asked.exit_code == 130
    assert asked.stderr.startswith(SAID + "Revoke main/hello@1.0.0 for good?")
    assert versions(published) == ["1.0.0", "1.1.0"]
    done = fleet("withdraw", "hello@1.0.0", "--yes")
    assert done.stdout == SAID + "main/hello@1.0.0 is revoked.\n"


def test_a_dry_run_revokes_nothing(fleet, published):
    published.routes["GET", "/v1/withdrawal"] = CONCERNED
    shown = fleet("withdraw", "hello@1.0.0", "--dry-run")
    assert (shown.exit_code, shown.stdout) == (0, SAID + "Nothing was changed.\n")
    answer = json.loads(fleet("withdraw", "hello@1.0.0", "--dry-run", "--json").stdout)
    assert (answer["revoked"], answer["new"], answer["running"]) == (False, False, ["berlin", "cairo"])
    assert [each.get("next", "") for each in answer["devices"]] == ["main/hello@0.9.0", "", ""]
    assert answer["rollouts"] == [7]
    assert versions(published) == ["1.0.0", "1.1.0"]
    assert fleet("withdraw", "hello@9.9.9", "--dry-run").exit_code == 4


def test_of_many_devices_the_first_are_named(fleet, published):
    many = tuple(
        operator_api.WithdrawnDevice(device=f"d{number:02}", instance="hello", online=True, runs=True)
        for number in range(30)
    )
    published.routes["GET", "/v1/withdrawal"] = operator_api.WithdrawalView(target="t", devices=many)
    shown = fleet("withdraw", "hello@1.0.0", "--dry-run").stdout
    assert "30 devices run it." in shown
    assert "d19 and 10 more" in shown
    assert "d20" not in shown


def test_a_device_with_two_instances_of_it_is_counted_once(fleet, published):
    twice = tuple(
        operator_api.WithdrawnDevice(device=device, instance=instance, online=True, runs=True, next=path)
        for device, instance, path in (
            ("gate", "hello", "components/main/hello/0.9.0.wasm"),
            ("gate", "again", "components/main/hello/0.9.0.wasm"),
            ("oslo", "hello", ""),
            ("oslo", "again", ""),
        )
    )
    published.routes["GET", "/v1/withdrawal"] = operator_api.WithdrawalView(target="t", devices=twice)
    shown = fleet("withdraw", "hello@1.0.0", "--dry-run").stdout
    assert "  1 goes to main/hello@0.9.0: gate\n" in shown
    assert "  1 runs nothing in its place, and keeps its data: oslo\n" in shown


def test_somebody_who_publishes_in_between_loses_nothing(fleet, published):
    def somebody() -> None:
        published.before_role = lambda: None
        role = repository.latest(published.files, "main")[1]
        from datetime import UTC, datetime

        key = keys.load(published.home / "operator/keys/main.pem")
        published.accept("main", repository.renew(role, signer=key, now=datetime.now(UTC)))

    published.before_role = somebody
    assert fleet("withdraw", "hello@1.1.0", "--yes").exit_code == 0
    assert versions(published) == ["1.0.0"]


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("hello@9.9.9", 4, "is not published"),
        ("other/hello@1.0.0", 2, "not of the namespace main"),
        ("hello", 2, "NAME@VERSION"),
    ],
)
def test_what_cannot_be_taken_back(name, code, words, fleet, published):
    refused = fleet("withdraw", name, "--yes")
    assert refused.exit_code == code
    assert words in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
