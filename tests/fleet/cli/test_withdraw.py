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
    desk.routes["GET", "/v1/devices"] = operator_api.Devices()
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
    assert versions(published) == ["1.0.0", "1.1.0"]


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
