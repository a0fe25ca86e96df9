"""Following a rollout: what is printed, when it ends, and what the exit code says."""

import functools
import io
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from rich.console import Console

from fleet.cli import operator, output, rollout
from fleet.cli.base import Exit, Fault, Options
from fleet.client import Client, UnreachableError
from fleet.protocol.codes import Outcome, PauseCause, Phase, RejectCode, RolloutState
from fleet.protocol.operator_api import GroupRow, Groups, RolloutDevice, RolloutView, WaveView
from fleet.protocol.operator_api import Settled as SettledHere

START = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
A, B = "berlin-0a0a0a0a", "paris-1b1b1b1b"


def device(name: str, outcome: Outcome, **more: object) -> RolloutDevice:
    return RolloutDevice(device=name, wave=1 if name == A else 2, outcome=outcome, **({"online": True} | more))


def view(state: RolloutState, *devices: RolloutDevice, **more: object) -> RolloutView:
    return RolloutView(
        **{
            "id": "r7",
            "number": 7,
            "revision": 1,
            "state": state,
            "instance": "hello",
            "target": "components/main/hello/2.0.0.wasm",
            "group": "edge-eu",
            "waves": (WaveView(text="1", devices=1, offered=True), WaveView(text="100%", devices=1)),
            "devices": devices,
            "created_at": START,
            **more,
        }
    )


SUCCEEDED = functools.partial(
    device, outcome=Outcome.SUCCEEDED, offered_at=START, ended_at=START + timedelta(seconds=1.5)
)
GOOD = [
    view(RolloutState.RUNNING, device(A, Outcome.WAITING), device(B, Outcome.PENDING)),
    view(
        RolloutState.RUNNING,
        device(A, Outcome.IN_PROGRESS, phase=Phase.FETCHING, progress=40),
        device(B, Outcome.PENDING),
        revision=2,
    ),
    view(
        RolloutState.RUNNING,
        device(A, Outcome.IN_PROGRESS, phase=Phase.PROBATION),
        device(B, Outcome.PENDING),
        revision=3,
    ),
    view(RolloutState.RUNNING, SUCCEEDED(A), device(B, Outcome.WAITING, online=False), revision=4),
    view(
        RolloutState.SUCCEEDED,
        SUCCEEDED(A),
        SUCCEEDED(B, exercised=False),
        revision=5,
        ended_at=START + timedelta(seconds=9),
    ),
]
BAD = [
    GOOD[0],
    view(
        RolloutState.REVERTED,
        device(
            A,
            Outcome.FAILED,
            phase=Phase.ROLLED_BACK,
            code=RejectCode.TRAPPED,
            message="unreachable executed\nin handle",
            log=("counting",),
        ),
        device(B, Outcome.NOT_AFFECTED),
        revision=2,
        reason="1 of 1 devices failed",
    ),
]


class Script:
    """A client whose rollouts come one after the other."""

    def __init__(self, *views: RolloutView | BaseException) -> None:
        self.views = list(views)
        self.asked: list[int] = []

    def rollout(self, _id: str, *, wait_s: int, since: int) -> RolloutView:
        assert wait_s > 0
        self.asked.append(since)
        answer = self.views.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


def test_each_change_is_a_line_and_success_is_exit_code_0(capsys):
    script = Script(*GOOD[1:])
    assert rollout.follow(script, GOOD[0], Options()) is Exit.OK
    assert capsys.readouterr().out == (
        "Rollout 7: main/hello@2.0.0 as hello to group edge-eu (2 devices, waves 1, 100%)\n"
        "  berlin-0a0a0a0a  waiting\n"
        "  berlin-0a0a0a0a  fetching 40 %\n"
        "  berlin-0a0a0a0a  probation\n"
        "  berlin-0a0a0a0a  succeeded in 1.5 s\n"
        "  paris-1b1b1b1b  waiting: the device is offline\n"
        "  paris-1b1b1b1b  succeeded in 1.5 s, with few calls so far\n"
        "Rollout 7 succeeded after 9.0 s: 2 of 2 devices run main/hello@2.0.0\n"
    )
    # always waited for what is newer than what was shown
    assert script.asked == [1, 2, 3, 4]


EARLY = view(RolloutState.SUCCEEDED, SUCCEEDED(A), device(B, Outcome.PENDING), revision=5, ended_at=START)
LATE = view(RolloutState.SUCCEEDED, SUCCEEDED(A), SUCCEEDED(B), revision=6, ended_at=START)


class SettledScript(Script):
    """A script in whose group a rollout has settled the value."""

    rollout_id = "r7"

    def groups(self) -> Groups:
        settled = SettledHere(instance="hello", target=EARLY.target, since=START, rollout=self.rollout_id)
        return Groups(groups=(GroupRow(name="edge-eu", settled=(settled,)),))


def test_a_rollout_is_followed_to_the_last_device_of_its_queue_where_asked(capsys):
    script = SettledScript(*GOOD[1:4], EARLY, EARLY, LATE)
    assert rollout.follow(script, GOOD[0], Options(), everybody=True) is Exit.OK
    assert not script.views
    assert capsys.readouterr().out.endswith(
        f"  succeeded: not yet on {B}\n"
        f"  {B}  succeeded in 1.5 s\n"
        "Rollout 7 succeeded after 0.0 s: 2 of 2 devices run main/hello@2.0.0\n"
    )
    assert rollout.follow(SettledScript(EARLY), GOOD[0], Options(), everybody=False) is Exit.OK


@pytest.mark.parametrize("quiet", [True, False])
def test_a_queue_that_closes_is_not_followed_for_ever(quiet):
    closed = view(RolloutState.SUCCEEDED, *EARLY.devices, revision=6, queue_closed="oslo failed", ended_at=START)
    with pytest.raises(Fault, match="closed: oslo failed; run 'fleet rollout resume 7'") as stopped:
        rollout.follow(SettledScript(EARLY, closed), GOOD[0], Options(quiet=quiet), everybody=True)
    assert stopped.value.code is Exit.FAILED
    assert rollout.follow(SettledScript(EARLY, closed), GOOD[0], Options(json=True), everybody=True) is Exit.FAILED


def test_a_queue_whose_value_another_rollout_replaced_is_not_followed_for_ever():
    script = SettledScript(EARLY)
    script.rollout_id = "r8"
    with pytest.raises(Fault, match=f"does not reach {B}; another value took its place"):
        rollout.follow(script, GOOD[0], Options(), everybody=True)


def test_a_rollback_is_told_with_its_reason_and_log_and_is_exit_code_1(capsys):
    with pytest.raises(Fault) as caught:
        rollout.follow(Script(*BAD[1:]), BAD[0], Options())
    assert caught.value.code is Exit.FAILED
    assert str(caught.value) == f"rollout 7 reverted; {A} rolled back (trapped); run 'fleet why {A}'"
    told = capsys.readouterr()
    assert f"  {A}  rolled back (trapped)\n" in told.out
    # the device's own words stand once, line by line
    words = "  unreachable executed\n  in handle\n  | counting\n"
    assert told.err == f"\n{A}:\n{words}  fleet why {A} --log shows the log before it\n"


@pytest.mark.parametrize("state", [RolloutState.REVERTED, RolloutState.ABORTED, RolloutState.SUPERSEDED])
def test_whatever_is_not_success_is_exit_code_1(state):
    with pytest.raises(Fault) as caught:
        rollout.follow(Script(), view(state, device(A, Outcome.NOT_AFFECTED)), Options(quiet=True))
    assert caught.value.code is Exit.FAILED


@pytest.mark.parametrize("cause", [PauseCause.LOST, PauseCause.BREACH, PauseCause.CANARY])
def test_a_rollout_that_paused_itself_is_not_followed_for_ever(cause):
    paused = view(RolloutState.PAUSED, device(A, Outcome.WAITING), revision=2, reason="2 devices lost", causes=(cause,))
    with pytest.raises(Fault, match="paused") as stopped:
        rollout.follow(Script(paused, GOOD[4]), GOOD[0], Options())
    assert stopped.value.code is Exit.FAILED
    assert str(stopped.value) == (
        "rollout 7 paused; 2 devices lost; run 'fleet rollout resume 7' or 'fleet rollout abort 7'"
    )


def test_a_paused_rollout_is_followed_on(capsys):
    paused = view(RolloutState.PAUSED, device(A, Outcome.WAITING), revision=2, reason="paused by admin")
    assert rollout.follow(Script(paused, GOOD[4]), GOOD[0], Options()) is Exit.OK
    assert "  paused: paused by admin\n" in capsys.readouterr().out


def test_a_server_that_restarts_is_waited_for(monkeypatch, capsys):
    monkeypatch.setattr(operator.time, "sleep", lambda _: None)
    gone = UnreachableError("cannot reach it", "refused", "start it")
    assert rollout.follow(Script(gone, gone, GOOD[4]), GOOD[0], Options(quiet=True)) is Exit.OK


def test_a_server_that_stays_away_is_given_up(monkeypatch):
    monkeypatch.setattr(operator.time, "sleep", lambda _: None)
    monkeypatch.setattr(operator, "GONE_S", -1.0)
    with pytest.raises(UnreachableError):
        rollout.follow(Script(UnreachableError("cannot reach it", "refused", "start it")), GOOD[0], Options())


def test_an_interrupt_says_that_the_rollout_goes_on(capsys):
    assert rollout.follow(Script(KeyboardInterrupt()), GOOD[0], Options()) is Exit.INTERRUPTED
    told = capsys.readouterr().err
    assert "Rollout 7 continues." in told
    assert "fleet rollout 7 --follow" in told
    assert "fleet rollout abort 7" in told


def test_json_prints_the_decided_rollout_and_nothing_else(capsys):
    with_reason = rollout.follow(Script(BAD[1]), BAD[0], Options(json=True))
    assert with_reason is Exit.FAILED
    assert capsys.readouterr().out.startswith('{\n  "id": "r7"')


def test_quiet_says_nothing_of_success(capsys):
    assert rollout.follow(Script(GOOD[4]), GOOD[0], Options(quiet=True)) is Exit.OK
    assert capsys.readouterr() == ("", "")


def test_the_bars_of_a_terminal(monkeypatch):
    # A bar for each device, in step with its update machine; drawn as text here.
    screen = Console(file=io.StringIO(), width=100, force_terminal=False, color_system=None)
    screen.print(rollout.picture(GOOD[2]))
    lines = screen.file.getvalue().splitlines()
    assert lines[0].startswith("Rollout 7: main/hello@2.0.0")
    assert lines[1].split()[0] == A
    assert lines[1].split()[-1] == "probation"
    assert lines[2].split()[-1] == "pending"


@pytest.mark.parametrize(
    ("phase", "progress", "done"),
    [
        (None, None, 0.0),
        (Phase.IDLE, None, 0.0),
        (Phase.FETCHING, 50, 0.5),
        (Phase.COMPILING, None, 2.0),
        (Phase.PROBATION, None, 5.0),
        (Phase.COMMITTED, None, 7.0),
        (Phase.ROLLING_BACK, None, 0.0),
    ],
)
def test_how_far_a_device_is(phase, progress, done):
    assert rollout.steps(device(A, Outcome.IN_PROGRESS, phase=phase, progress=progress)) == done


def test_many_devices_fit_on_a_screen_with_the_open_ones_first():
    devices = [device(f"gate-{number:08x}", Outcome.PENDING) for number in range(60)]
    devices[59] = device("gate-0000003b", Outcome.IN_PROGRESS, phase=Phase.COMPILING)
    screen = Console(file=io.StringIO(), width=100, color_system=None)
    screen.print(rollout.picture(view(RolloutState.RUNNING, *devices)))
    text = screen.file.getvalue()
    assert "gate-0000003b" in text
    assert "and 36 more" in text


def test_the_live_view_ends_with_the_decision(monkeypatch):
    screen = Console(file=io.StringIO(), width=100, force_terminal=True)
    monkeypatch.setattr(output, "console", lambda: screen)
    assert rollout.follow(Script(*GOOD[1:]), GOOD[0], Options()) is Exit.OK
    assert "succeeded in 1.5 s" in screen.file.getvalue()


def test_the_long_poll_asks_the_server_to_wait(home):
    asked: list[httpx.URL] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.url)
        import msgspec

        return httpx.Response(200, content=msgspec.json.encode(GOOD[4]))

    client = Client(
        url="https://127.0.0.1:1", ca=home / "operator/ca.pem", token="t", transport=httpx.MockTransport(answer)
    )
    with client:
        rollout.follow(client, GOOD[0], Options(quiet=True))
    assert asked[0].path == "/v1/rollouts/r7"
    assert dict(asked[0].params) == {"wait": "25", "since": "1"}
