"""The main job on an emulated board of each architecture, as one story: every test goes on where the last one ended."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import rig
from conftest import enrol
from operator_side import GROUP, OperatorSide, budget

from deploy.riscv64 import build as riscv64


@dataclass
class Story:
    architecture: str
    board: rig.Board
    device: str
    group: str


@pytest.fixture(scope="module", params=["arm64", "riscv64"])
def story(request: pytest.FixtureRequest, new_board: Callable[..., rig.Board], operator: OperatorSide) -> Story:
    architecture = str(request.param)
    board = new_board(architecture, f"story-{architecture}")
    with budget(f"enrol {architecture}", 60):
        device = enrol(board, operator, f"{GROUP}-{architecture}")
    return Story(architecture, board, device, f"{GROUP}-{architecture}")


@pytest.fixture
def engine(story: Story) -> None:
    if story.architecture == "riscv64" and riscv64.finished() is None:
        pytest.skip("no riscv64 engine in the wheelhouse: make riscv64-wheel builds it")


def test_the_system_is_well(story: Story) -> None:
    assert story.board.ok("systemctl --failed --plain --no-legend") == ""
    assert story.board.ok("systemctl is-active fleet-host fleet-agent fleet-compiler.socket").split() == ["active"] * 3
    # nothing of the package's is in sight of the board's own Python
    for name in ("agent", "fleet", "signing", "wasmtime", "tuf"):
        assert story.board.run(f"cd / && python3 -c 'import {name}'").status != 0


def test_without_an_engine_a_board_says_so(story: Story, operator: OperatorSide) -> None:
    if story.architecture != "riscv64" or riscv64.finished() is not None:
        pytest.skip("this board has an engine")
    code, said = operator.push("v1.wasm", group=story.group)
    assert code != 0
    assert "no engine" in said + story.board.run("fleet-agent why", timeout_s=120).text


@pytest.mark.usefixtures("engine")
def test_a_component_is_pushed_and_compiled_for_this_cpu(story: Story, operator: OperatorSide) -> None:
    with budget(f"push v1 {story.architecture}", 90):
        operator.pushed("v1.wasm", group=story.group)
    operator.answers(story.board.port, "1")
    header = story.board.ok("head -c 20 /var/lib/wasmfleet-agent/images/*.cwasm | od -An -tx1 | tr -d ' \\n'")
    assert header.startswith("7f454c46"), "an image is an ELF file"
    machine = int.from_bytes(bytes.fromhex(header[36:40]), "little")
    assert machine == rig.MACHINES[story.architecture].elf


@pytest.mark.usefixtures("engine")
def test_a_swap_under_requests_loses_none(story: Story, operator: OperatorSide) -> None:
    with budget(f"swap to v2 {story.architecture}", 90):
        seen = operator.under_load(story.board.port, "v2.wasm", "2", group=story.group)
    assert seen.lost == 0, seen.losses
    assert set(seen.by_version) == {"1", "2"}


@pytest.mark.usefixtures("engine")
def test_the_boards_own_figures_arrive(story: Story, operator: OperatorSide) -> None:
    text = operator.fleet("device", story.device)
    assert "50.0.1" in text
    assert "hello" in text


def test_what_it_takes_at_rest(story: Story) -> None:
    # a figure for docs/boards.md; the budget is 60 MB without an instance, and an emulated board's pages are a board's
    total_kb = 0
    for line in story.board.ok("ps -eo pid=,args= | grep '[/]usr/bin/fleet-'").splitlines():
        pid, command = line.split(maxsplit=1)
        pss = story.board.ok(f"awk '/^Pss:/ {{print $2}}' /proc/{pid}/smaps_rollup")
        print(f"\n    {int(pss) / 1024:5.1f} MB  {command.split('/usr/bin/')[1][:40]}", end="")
        total_kb += int(pss)
    print(f"\n=== PSS of agent and host on {story.architecture}: {total_kb / 1024:.0f} MB", flush=True)
    assert total_kb < 200 * 1024


@pytest.mark.usefixtures("engine")
def test_a_bad_version_goes_back_by_itself(story: Story, operator: OperatorSide) -> None:
    with budget(f"v3 and back {story.architecture}", 120):
        code, said = operator.rolled_back("v3.wasm", story.board.port, group=story.group)
    assert code != 0, said
    operator.answers(story.board.port, "2")
    assert re.search(r"trap|unreachable", story.board.ok("fleet-agent why", timeout_s=120))


@pytest.mark.usefixtures("engine")
def test_the_plug_is_pulled_and_the_same_version_answers(story: Story, operator: OperatorSide) -> None:
    story.board.pull_the_plug()
    with budget(f"boot after a power cut {story.architecture}", 120):
        story.board.start()
        operator.answers(story.board.port, "2", timeout_s=300)
    operator.online(story.device)
    connect = "import sqlite3; store = sqlite3.connect('/var/lib/wasmfleet-agent/store.db')"
    check = f"{connect}; print(*store.execute('pragma integrity_check').fetchone())"
    assert story.board.ok(f'python3 -c "{check}"') == "ok"
