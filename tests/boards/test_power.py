"""Power that goes at any moment, a clock that starts in 1970, an agent that never comes back: the board answers."""

import os
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import stages
from conftest import Joined
from operator_side import Update
from stages import budget

SEED = int(os.environ.get("SEED", "0")) or random.SystemRandom().randrange(1 << 30)
# Steps of an update: the first is the operator's, the others are named in the agent's journal as it takes them.
OFFERED = "offered"
STEPS = (OFFERED, "fetching", "compiling", "swapping", "probation", "committed")
# Two of each kind on arm64, the two steps on either side of the swap being the most telling; one on RISC-V.
EACH_CHANGE = (("arm64", "swapping"), ("arm64", "probation"), ("riscv64", "swapping"))
EACH_CHANGE_RANDOM = (("arm64", 1), ("arm64", 2), ("riscv64", 1))


@pytest.mark.parametrize(
    ("architecture", "step"), stages.rows(STEPS, each_change=EACH_CHANGE), indirect=["architecture"]
)
def test_the_plug_is_pulled_at_a_step_of_an_update(running: Joined, step: str) -> None:
    update = running.next()
    with budget(f"plug pulled when {step}", 100):
        if step == OFFERED:
            running.offered(update)
            running.board.pull_the_plug()
        else:
            pull_the_plug_when(running, step, update)
        goes_on(running, update)


def pull_the_plug_when(running: Joined, step: str, update: Update) -> None:
    """Push an update, and pull the plug as soon as the board's journal says that it takes this step of it."""
    board = running.board
    cursor = board.ok("journalctl --sync; journalctl --no-pager --lines=1 --show-cursor | sed -n 's/^-- cursor: //p'")
    said = f"journalctl --follow --lines=all --after-cursor='{cursor}' WASMFLEET_INSTANCE=hello WASMFLEET_PHASE={step}"

    def wait_and_pull() -> None:
        # a pipe with a name, since `journalctl | head` ends only when the journal has a second line
        board.ok(f"mkfifo /run/step; {said} >/run/step & read -r line </run/step", timeout_s=300)
        board.pull_the_plug()

    with ThreadPoolExecutor(1) as beside:
        pulled = beside.submit(wait_and_pull)
        running.offered(update)
        pulled.result()


# one name for a moment that each run chooses: the workers must collect the same tests
@pytest.mark.parametrize(
    ("architecture", "number"), stages.rows((1, 2), each_change=EACH_CHANGE_RANDOM), indirect=["architecture"]
)
def test_the_plug_is_pulled_at_a_random_moment_of_an_update(running: Joined, number: int) -> None:
    update, moment_s = running.next(), random.Random(SEED + number).uniform(0.5, 20.0)
    with budget(f"plug pulled {moment_s:.1f} s into an update, SEED={SEED}", 100):
        running.offered(update)
        time.sleep(moment_s)  # the moment is the point
        running.board.pull_the_plug()
        goes_on(running, update)


def goes_on(running: Joined, update: Update) -> None:
    """Check that the board answers after a power cut, and that the update comes to its end."""
    running.board.start()
    # either the old one or the new one, never neither
    deadline = time.monotonic() + 300
    while running.answering() not in {"1", "2"}:
        assert time.monotonic() < deadline, "nothing answers after the power cut"
        time.sleep(0.5)  # it boots on the cores that would ask
    # here the new one is sound, so it is the one that stays, and is reported
    running.operator.succeeded(group=running.group)
    running.answers(update.answer)
    running.operator.runs(running.device, update.version)
    running.store_is_whole()


@pytest.fixture
def without_clock(running: Joined) -> Iterator[Joined]:
    """A board without a battery behind its clock, in a network without a time server: off, its clock at 1970."""
    board = running.board
    board.pull_the_plug()
    board.sets_clock, board.options = False, ("-rtc", "base=1970-01-01T00:00:00")
    yield running
    board.sets_clock, board.options = True, ()


def test_a_clock_at_1970_keeps_nobody_from_an_update(without_clock: Joined) -> None:
    board = without_clock.board
    with budget("boot in 1970 and an update", 150):
        board.start()
        board.set_clock("1970-01-02")  # systemd has put it at its own date of birth
        deadline = time.monotonic() + 300
        while not without_clock.answering():
            assert time.monotonic() < deadline, "nothing answers in 1970"
            time.sleep(0.5)
        without_clock.operator.online(without_clock.device)
        assert board.ok("date +%Y") == "1970"
        without_clock.updated()
        assert board.ok("date +%Y") == "1970", "an agent does not set clocks"
    board.set_clock()


def test_a_board_whose_agent_is_disabled_still_runs_after_a_power_cut(running: Joined) -> None:
    before = running.answering()
    running.board.ok("systemctl disable --now fleet-agent.service fleet-agent.path && sync", timeout_s=120)
    running.board.pull_the_plug()
    with budget("boot without the agent", 90):
        running.board.start()
        running.answers(before)
    assert running.board.run("systemctl is-active fleet-agent").text == "inactive"
    running.board.ok("systemctl enable --now fleet-agent.path fleet-agent.service", timeout_s=180)
    running.operator.online(running.device)
