"""Operators and their tokens: shown once, or written where nobody else reads them."""

import json
import stat
from datetime import UTC, datetime

import pytest

from fleet.protocol.trust_api import OperatorReply, OperatorRow, Operators, Role
from tests.fleet.cli.conftest import problem

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@pytest.fixture
def people(desk):
    """A desk that lets in whom it is told to, and knows who is there."""
    rows = {"admin": Role.ADMIN, "bob": Role.VIEWER}

    def show():
        found = tuple(OperatorRow(name=name, role=role, created_at=NOW) for name, role in rows.items())
        desk.routes["GET", "/v1/operators"] = Operators(operators=found)

    show()
    for name in ("admin", "bob", "eve"):
        desk.routes["PUT", f"/v1/operators/{name}"] = OperatorReply(name=name, role=Role.VIEWER, token=f"t-{name}")
    desk.routes["POST", "/v1/operators/bob/remove"] = Operators()
    desk.routes["GET", "/v1/status"] = problem("unauthorised", "who are you", 401)
    return desk


def test_an_operator_is_let_in_with_a_token_that_is_shown_once(fleet, people, tmp_path):
    added = fleet("operators", "add", "eve", "--role", "viewer")
    assert added.exit_code == 0, added.output
    assert added.stdout.splitlines()[-1] == "t-eve"
    assert people.sent("/v1/operators/eve") == {"role": "viewer"}

    path = tmp_path / "eve.token"
    saved = fleet("operators", "add", "eve", "--save", path)
    assert saved.exit_code == 0, saved.output
    assert "t-eve" not in saved.output
    assert path.read_text() == "t-eve\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = fleet("operators", "add", "eve", "--save", path)
    assert again.exit_code == 2
    assert "never overwritten" in again.stderr
    assert json.loads(fleet("operators", "add", "eve", "--json").stdout)["token"] == "t-eve"


def test_who_is_there_is_not_added_but_rotated_and_keeps_its_role(fleet, people):
    twice = fleet("operators", "add", "bob")
    assert twice.exit_code == 2
    assert "fleet operators rotate bob" in twice.stderr
    people.routes["GET", "/v1/status"] = problem("busy", "later", 500)  # this machine's own token still counts
    rotated = fleet("operators", "rotate", "bob")
    assert rotated.stdout.splitlines()[-1] == "t-bob"
    assert people.sent("/v1/operators/bob") == {"role": "viewer"}
    unknown = fleet("operators", "rotate", "mallory")
    assert unknown.exit_code == 4
    assert "there are admin, bob" in unknown.stderr


def test_this_machines_own_token_is_put_in_place(fleet, people, home):
    before = (home / "operator/token").read_text()
    rotated = fleet("operators", "rotate", "admin")
    assert rotated.exit_code == 0, rotated.output
    assert (home / "operator/token").read_text() == "t-admin\n" != before
    assert stat.S_IMODE((home / "operator/token").stat().st_mode) == 0o600
    assert "t-admin" not in rotated.output


def test_an_operator_is_shut_out(fleet, people):
    listed = fleet("operators", "list")
    assert "bob" in listed.stdout
    assert "viewer" in listed.stdout
    assert fleet("operators", "revoke", "bob").exit_code == 0
    assert "/v1/operators/bob/remove" in people.paths("POST")
    assert fleet("operators", "revoke", "mallory").exit_code == 4
