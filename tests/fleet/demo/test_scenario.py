"""The demo's verdict: every claim must be able to fail, or the demo would show nothing."""

import dataclasses
import io
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from fleet.demo import scenario
from fleet.demo.load import LoadResult
from fleet.demo.run import ConsoleReporter
from fleet.demo.scenario import Scenario, Step, judge
from fleet.protocol.codes import Outcome, Phase, RejectCode, RolloutState
from fleet.protocol.operator_api import RolloutDevice, RolloutView

NOW = datetime(2026, 5, 1, tzinfo=UTC)
BERLIN, PARIS, BOSTON = "berlin-0a0a0a0a", "paris-1b1b1b1b", "boston-2c2c2c2c"
DEVICES = [
    SimpleNamespace(device=device, group=group, url=lambda: "http://127.0.0.1:1/")
    for device, group in ((BERLIN, "edge-eu"), (PARIS, "edge-eu"), (BOSTON, "edge-us"))
]


def answered(version: str, count: int = 500, lost: int = 0) -> LoadResult:
    return LoadResult(answered=count, lost=lost, by_version=Counter({version: count}), by_status=Counter({200: count}))


def rollout(state: RolloutState, *devices: RolloutDevice) -> RolloutView:
    return RolloutView(id="r", number=1, revision=1, state=state, instance="hello", created_at=NOW, devices=devices)


def on(device: str, outcome: Outcome = Outcome.SUCCEEDED, **more: object) -> RolloutDevice:
    return RolloutDevice(device=device, wave=1, outcome=outcome, **({"offered_at": NOW} | more))


def act(name: str, **more: object) -> Step:
    return Step(
        **{
            "name": name,
            "command": f"fleet push {name}.wasm",
            "exit_code": 0,
            "first_s": 1.0,
            "last_s": 2.0,
            "load": {},
            "rollout": rollout(RolloutState.SUCCEEDED, on(BERLIN), on(PARIS)),
            **more,
        }
    )


TRAPPED = LoadResult(answered=90, lost=2, by_version=Counter({"2": 70, "3": 20}), by_status=Counter({200: 90, 500: 2}))
V3 = act(
    "v3",
    exit_code=1,
    last_s=None,
    load={BERLIN: TRAPPED, PARIS: answered("2")},
    rollout=rollout(
        RolloutState.REVERTED,
        on(BERLIN, Outcome.FAILED, phase=Phase.ROLLED_BACK, code=RejectCode.TRAPPED),
        on(PARIS, Outcome.NOT_AFFECTED, offered_at=None),
    ),
)
GOOD = {
    "v1": act("v1"),
    "v2": act("v2", load={BERLIN: answered("2"), PARIS: answered("2")}),
    "v3": V3,
    "undo": act("undo", load={BERLIN: answered("1"), PARIS: answered("1")}),
}
ENDS = {BERLIN: "1", PARIS: "1", BOSTON: ""}


def story(ends: dict[str, str] = ENDS, **changed: Step) -> Scenario:
    told = Scenario(acts=list((GOOD | changed).values()), ends=ends)
    told.checks = judge(told, DEVICES)
    return told


def change(name: str, **fields: object) -> Step:
    return dataclasses.replace(GOOD[name], **fields)


def test_a_good_story_holds():
    told = story()
    assert [claim for claim, held in told.checks if not held] == []
    assert len(told.checks) == 10
    assert told.held


@pytest.mark.parametrize(
    ("changed", "claim"),
    [
        ({"v1": change("v1", exit_code=1)}, "v1 runs on both"),
        ({"v1": change("v1", last_s=None)}, "v1 runs on both"),
        ({"v2": change("v2", exit_code=3)}, "v2 replaced it"),
        (
            {"v2": change("v2", load={BERLIN: answered("2", lost=1), PARIS: answered("2")})},
            "0 of 1,001 requests lost in the swap",
        ),
        ({"v2": change("v2", load={})}, "0 of 0 requests lost in the swap"),
        (
            {"v3": change("v3", rollout=rollout(RolloutState.SUCCEEDED, on(BERLIN), on(PARIS)))},
            "v3 was rolled back on the first",
        ),
        (
            {
                "v3": change(
                    "v3",
                    rollout=rollout(
                        RolloutState.REVERTED,
                        on(BERLIN, Outcome.FAILED, phase=Phase.ROLLED_BACK),
                        on(PARIS, Outcome.SUCCEEDED),
                    ),
                )
            },
            "v3 was reverted before the second",
        ),
        (
            {"v3": change("v3", load={BERLIN: TRAPPED, PARIS: answered("3")})},
            "v3 was reverted before the second",
        ),
        (
            {"v3": change("v3", load={BERLIN: TRAPPED, PARIS: answered("2", lost=1)})},
            "the second device lost nothing",
        ),
        (
            {"v3": change("v3", load={BERLIN: dataclasses.replace(TRAPPED, lost=3), PARIS: answered("2")})},
            "only requests that v3 itself trapped on",
        ),
        ({"undo": change("undo", last_s=None)}, "fleet undo brought v1 back"),
        (
            {"undo": change("undo", load={BERLIN: answered("1"), PARIS: answered("1", lost=2)})},
            "0 of 1,002 requests lost on the way back",
        ),
        ({"ends": ENDS | {PARIS: "2"}}, "every device runs what it should"),
        ({"ends": ENDS | {BOSTON: "1"}}, "every device runs what it should"),
        ({"ends": {BERLIN: "1", PARIS: "1"}}, "every device runs what it should"),
    ],
)
def test_each_claim_fails_when_it_is_not_so(changed, claim):
    told = story(**changed)
    assert not told.held
    assert any(text.startswith(claim) and not held for text, held in told.checks), told.checks


def test_a_story_that_was_not_played_does_not_hold():
    assert not Scenario().held


def test_the_end_is_a_table_with_times_and_losses():
    screen = Console(file=io.StringIO(), width=120, color_system=None)
    ConsoleReporter(screen).end(story(), DEVICES)
    printed = screen.file.getvalue().splitlines()
    assert printed == [line.rstrip() for line in printed]
    lines = [" ".join(line.split()) for line in printed]
    for line in (
        "PUSH RESULT FIRST DEVICE BOTH DEVICES ANSWERED LOST",
        "v1 succeeded 1.0 s 2.0 s - -",
        "v2 succeeded 1.0 s 2.0 s 1,000 0",
        "v3 rolled back (trapped), reverted before the 2nd device 1.0 s - 590 2 by its trap",
        "berlin-0a0a0a0a edge-eu hello v1 http://127.0.0.1:1/",
        "boston-2c2c2c2c edge-us nothing http://127.0.0.1:1/",
        "yes v3 was rolled back on the first device",
    ):
        assert line in lines


def test_the_components_are_found_in_a_tree_and_in_a_package(tmp_path, monkeypatch):
    for name in ("v1.wasm", "v2.wasm", "v3.wasm"):
        assert scenario.fixture(name).with_suffix(".toml").is_file()
    (tmp_path / "v1.wasm").write_bytes(b"packaged")
    monkeypatch.setattr(scenario, "_PLACES", (tmp_path, Path("/nowhere")))
    assert scenario.fixture("v1.wasm").read_bytes() == b"packaged"
    with pytest.raises(scenario.NoFixtureError, match=r"v2\.wasm is neither in"):
        scenario.fixture("v2.wasm")
