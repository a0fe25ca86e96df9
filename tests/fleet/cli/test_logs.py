"""`fleet logs`: one look, or following until the device, the clock or the reader ends it."""

import json
from datetime import UTC, datetime

import httpx
import pytest

from fleet.cli import device, operator
from fleet.client import Client
from fleet.protocol import operator_api
from fleet.protocol.messages import LogView
from tests.fleet.cli.conftest import problem

GATE = "gate-0a1b2c3d"
ASK, LOOK = ("POST", f"/v1/devices/{GATE}/command"), ("GET", f"/v1/devices/{GATE}/logs")


@pytest.fixture
def looks(monkeypatch):
    """Behind which line each look asked, and for which command."""
    seen = []
    plain = Client.logs

    def logged(self, device, *, command, after, wait_s):
        seen.append((command, after, wait_s))
        return plain(self, device, command=command, after=after, wait_s=wait_s)

    monkeypatch.setattr(Client, "logs", logged)
    return seen


@pytest.fixture
def answers(desk):
    """What the device answers, look by look."""

    def answer(*views):
        desk.routes[ASK] = operator_api.CommandReply(sequence=7, expires=datetime.now(UTC))
        desk.routes[LOOK] = [*views]
        return desk.routes[LOOK]

    return answer


def test_following_asks_behind_what_it_has_until_the_device_ends_it(fleet, desk, answers, looks):
    left = answers(
        LogView(),
        LogView(lines=("one", "two"), next=2, heard=True),
        LogView(next=2, heard=True),
        LogView(lines=("three",), next=3, heard=True, left_out=4),
        LogView(next=3, heard=True, left_out=4, ended=True),
    )
    done = fleet("logs", "hello", "--device", GATE, "--follow", "--minutes", "15")
    assert done.exit_code == 0, done.output
    assert done.stdout == "one\ntwo\nthree\n"
    assert done.stderr == "(4 lines left out, by the device's policy or because they came too fast)\n"
    assert [after for _, after, _ in looks] == [0, 0, 2, 2, 3], "no line twice"
    assert {command for command, _, _ in looks} == {7}
    assert {wait for _, _, wait in looks} == {device.LOOK_S}, "the server is asked to wait: no busy loop"
    assert not left
    verb = desk.sent(ASK[1])["verb"]
    assert (verb["instance"], verb["minutes"]) == ("hello", 15)


def test_one_look_ends_with_the_first_answer_and_asks_the_device_for_a_minute(fleet, desk, answers):
    left = answers(LogView(), LogView(lines=("one",), next=1, heard=True), LogView(lines=("never shown",)))
    done = fleet("logs", "hello", "--device", GATE, "--minutes", "15")
    assert (done.exit_code, done.stdout) == (0, "one\n")
    assert len(left) == 1
    assert desk.sent(ASK[1])["verb"]["minutes"] == 1


def test_as_json_each_line_is_an_object_and_nothing_else_is_printed(fleet, answers):
    answers(
        LogView(lines=('say "no"', "2026-11-30T18:00:00Z error: two"), next=2, heard=True, left_out=1),
        LogView(next=2, heard=True, ended=True),
    )
    done = fleet("logs", "hello", "--device", GATE, "--follow", "--json")
    place = {"device": GATE, "instance": "hello"}
    assert [json.loads(line) for line in done.stdout.splitlines()] == [
        {"time": None, "level": None, **place, "line": 'say "no"'},
        {"time": "2026-11-30T18:00:00Z", "level": "error", **place, "line": "2026-11-30T18:00:00Z error: two"},
    ]
    assert done.stderr == ""


def test_what_the_device_refuses_while_it_is_followed_ends_it(fleet, answers):
    answers(
        LogView(lines=("one",), next=1, heard=True),
        LogView(next=1, heard=True, refused="its owner lets no logs out: [policy] logs"),
    )
    done = fleet("logs", "hello", "--device", GATE, "--follow")
    assert done.exit_code == 4
    assert done.stdout == "one\n"
    assert f"{GATE} refused" in done.stderr
    assert "[policy] logs" in done.stderr


def test_a_device_that_does_not_answer_is_given_up_and_one_that_did_is_not(fleet, answers, monkeypatch):
    monkeypatch.setattr(device, "ANSWER_S", 0)
    answers(LogView())
    done = fleet("logs", "hello", "--device", GATE, "--follow")
    assert done.exit_code == 1
    assert f"{GATE} does not answer" in done.stderr
    # Silence after an answer is a component that has nothing to say.
    answers(LogView(heard=True), LogView(heard=True), LogView(heard=True, ended=True))
    assert fleet("logs", "hello", "--device", GATE, "--follow").exit_code == 0


def test_a_server_that_was_started_again_is_asked_anew_for_the_minutes_that_are_left(fleet, desk, answers, monkeypatch):
    monkeypatch.setattr(operator.time, "sleep", lambda _: None)
    answers(
        LogView(lines=("one",), next=1, heard=True),
        httpx.ConnectError("connection refused"),
        problem("not-found", "nobody asked that device for lines, or that is over", 404),
        LogView(lines=("one", "two"), next=2, heard=True),
        LogView(next=2, heard=True, ended=True),
    )
    done = fleet("logs", "hello", "--device", GATE, "--follow", "--minutes", "15")
    assert done.exit_code == 0, done.output
    assert done.stdout == "one\none\ntwo\n"
    assert "started again" in done.stderr
    assert len([path for path in desk.paths("POST") if path == ASK[1]]) == 2
    assert desk.sent(ASK[1])["verb"]["minutes"] == 15
    # one look is not repeated
    answers(httpx.ConnectError("connection refused"))
    assert fleet("logs", "hello", "--device", GATE).exit_code == 3


def test_a_proxy_whose_server_is_away_is_no_other_program(fleet, desk, answers, monkeypatch):
    monkeypatch.setattr(operator.time, "sleep", lambda _: None)
    answers(httpx.Response(502, html="<h1>Bad Gateway</h1>"), LogView(heard=True, ended=True))
    assert fleet("logs", "hello", "--device", GATE, "--follow").exit_code == 0
