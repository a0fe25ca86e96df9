"""`fleet messages`: what components publish, once and while it comes."""

import json
from datetime import UTC, datetime

import pytest

from fleet.client import Client
from fleet.protocol.operator_api import Messages, MessageView

NOW = datetime(2026, 11, 30, 12, tzinfo=UTC)
ROUTE = ("GET", "/v1/messages")


def message(number, data=b"21.5", topic="plant/boiler"):
    return MessageView(
        number=number, device="gate-0a1b2c3d", instance="meter", sequence=number, epoch="e", at=NOW, received_at=NOW,
        topic=topic, data=data,
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    seen = []
    plain = Client.messages

    def note(self, query, **more):
        seen.append(query)
        return plain(self, query, **more)

    monkeypatch.setattr(Client, "messages", note)
    return seen


def test_the_newest_are_shown_oldest_first(fleet, desk, asked):
    desk.routes[ROUTE] = Messages(messages=(message(1), message(2, b"\xff\0"), message(3, b"a\x1b[2Jb")), next=3)
    done = fleet("messages", "--group", "edge", "--topic", "plant/#")
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines() == [
        "2026-11-30 12:00:00  gate-0a1b2c3d/meter  plant/boiler  21.5",
        "2026-11-30 12:00:00  gate-0a1b2c3d/meter  plant/boiler  (2 bytes, base64) /wA=",
        "2026-11-30 12:00:00  gate-0a1b2c3d/meter  plant/boiler  a\\x1b[2Jb",
    ]
    assert (asked[0]["group"], asked[0]["topic"], asked[0]["limit"]) == ("edge", "plant/#", 100)
    assert "after" not in asked[0]


def test_since_a_time_everything_is_asked_for_in_pieces(fleet, desk, asked):
    pages = [Messages(messages=(message(1),), next=1, more=True), Messages(messages=(message(2),), next=2)]
    desk.routes[ROUTE] = pages
    done = fleet("--json", "messages", "--since", "2026-11-30T11:00Z")
    assert done.exit_code == 0, done.output
    assert [json.loads(line)["number"] for line in done.stdout.splitlines()] == [1, 2]
    assert [each["after"] for each in asked] == [0, 1]
    assert {each["since"] for each in asked} == {int(NOW.timestamp()) - 3600}


def test_following_asks_behind_what_it_has(fleet, desk, asked):
    desk.routes[ROUTE] = [
        Messages(messages=(message(1),), next=1),
        Messages(next=1),
        Messages(messages=(message(2),), next=2),
    ]
    done = fleet("messages", "--follow", "--device", "gate-0a1b2c3d")
    assert [line[-4:] for line in done.stdout.splitlines()] == ["21.5", "21.5"]
    assert [each.get("after") for each in asked][:4] == [None, 1, 1, 2]


@pytest.mark.parametrize(
    "words", [("--topic", "a/#/b"), ("--topic", "a\0"), ("--since", "yesterday"), ("--since", "-5m")]
)
def test_nonsense_is_refused_before_anybody_is_asked(fleet, desk, words):
    done = fleet("messages", *words)
    assert done.exit_code == 2, done.output
    assert words[0] in done.stderr
