"""The main job on an emulated board of each architecture, as one story: every test goes on where the last one ended."""

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import rig
from conftest import enrol
from operator_side import GROUP, OperatorSide, swap_gap
from stages import budget, figure

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
    operator.push("v1.wasm", group=story.group)
    # the server passes it over, knowing that from its health; and the board itself refuses what it cannot run
    rollout = operator.finished(group=story.group)
    (skipped,) = operator.scene.client.rollout(rollout.id).boards
    assert "no wasm engine" in skipped.message
    operator.until("its own word arrives", lambda: "no-engine" in operator.fleet("why", story.device) or None)
    assert "engine" in story.board.ok("fleet-agent why", timeout_s=120)


@pytest.mark.usefixtures("engine")
def test_a_component_is_pushed_and_compiled_for_this_cpu(story: Story, operator: OperatorSide) -> None:
    started = time.monotonic()
    with budget(f"push v1 {story.architecture}", 90), operator.first_answer(story.board.port) as answered:
        operator.pushed("v1.wasm", group=story.group)
    figure(story.architecture, "from `fleet push` to the first answer", f"{answered() - started:.1f} s")
    header = story.board.ok("head -c 20 /var/lib/wasmfleet-agent/images/*.cwasm | od -An -tx1 | tr -d ' \\n'")
    assert header.startswith("7f454c46"), "an image is an ELF file"
    machine = int.from_bytes(bytes.fromhex(header[36:40]), "little")
    assert machine == rig.MACHINES[story.architecture].elf


@pytest.mark.usefixtures("engine")
def test_a_swap_under_requests_loses_none(story: Story, operator: OperatorSide) -> None:
    with budget(f"swap to v2 {story.architecture}", 90), operator.asking_steadily(story.board.port) as asked:
        seen = operator.under_load(story.board.port, "v2.wasm", "2", group=story.group)
    assert seen.lost == 0, seen.losses
    assert set(seen.by_version) == {"1", "2"}
    waits = [each.took for each in asked]
    usual_ms, longest_ms = 1000 * statistics.median(waits), 1000 * max(waits)
    figure(
        story.architecture,
        "swap gap: v1's last answer to v2's first, less the usual",
        f"{1000 * swap_gap(asked):.0f} ms",
    )
    figure(
        story.architecture,
        "an answer takes: usually, at most while v2 is fetched, compiled and swapped in",
        f"{usual_ms:.0f} ms, {longest_ms:.0f} ms",
    )


@pytest.mark.usefixtures("engine")
def test_the_boards_own_figures_arrive(story: Story, operator: OperatorSide) -> None:
    operator.runs(story.device, "2.0.0")
    text = operator.fleet("device", story.device)
    assert "wasmtime 50.0.1" in text
    assert rig.MACHINES[story.architecture].machine in text
    assert re.search(r"^hello +\S*hello@2\.0\.0 (\(probation\) )? *running", text, re.MULTILINE), text
    assert re.search(r"^board +up .* on 2 CPUs", text, re.MULTILINE), text
    assert re.search(r"^memory +[\d.]+ \w+ of [\d.]+ \w+ free", text, re.MULTILINE), text


@pytest.mark.usefixtures("engine")
def test_its_owner_is_told_by_systemd_and_the_journal(story: Story) -> None:
    for unit, said in (("fleet-agent", "connected; 1 instance"), ("fleet-host", "1 instance; wasmtime 50.0.1")):
        # said whenever the watchdog is fed: within a third of its patience
        shows = f"systemctl show --property=StatusText --value {unit} | grep -qF '{said}'"
        story.board.ok(f"for n in $(seq 120); do {shows} && exit 0; sleep 0.5; done; exit 1", timeout_s=240)
    fields = f"WASMFLEET_DEVICE={story.device} WASMFLEET_INSTANCE=hello WASMFLEET_PHASE=committed"
    lines = story.board.ok(
        f"journalctl --no-pager --output=cat _SYSTEMD_UNIT=fleet-agent.service {fields}"
    ).splitlines()
    assert len(lines) >= 1, "each version that was committed"
    assert all(re.fullmatch(r"hello: committed \S+/hello/\S+\.wasm", line) for line in lines), lines


def test_what_it_takes_at_rest(story: Story) -> None:
    # an emulated board's pages are a board's: the budget is 60 MB without an instance
    total_kb: dict[str, int] = {"fleet-agent": 0, "fleet-host": 0}
    for unit in total_kb:
        group = story.board.ok(f"systemctl show --property=ControlGroup --value {unit}")
        for pid in story.board.ok(f"find /sys/fs/cgroup{group} -name cgroup.procs -exec cat {{}} +").split():
            pss = story.board.run(f"awk '/^Pss:/ {{print $2}}' /proc/{pid}/smaps_rollup").text
            total_kb[unit] += int(pss) if pss.isdigit() else 0
    assert all(total_kb.values())
    agent, host = (f"{kb / 1024:.0f} MB" for kb in total_kb.values())
    instances = story.board.ok("ls -d /sys/fs/cgroup/system.slice/fleet-host.service/i-* 2>/dev/null | wc -l")
    figure(story.architecture, f"PSS at rest, {instances} instance: agent, host with its processes", f"{agent}, {host}")
    assert sum(total_kb.values()) < 200 * 1024


@pytest.mark.usefixtures("engine")
def test_how_long_compiling_takes(story: Story) -> None:
    artifact = story.board.ok("ls /var/lib/wasmfleet-agent/artifacts/* | head -1")
    size = story.board.ok(f"stat -c %s {artifact}")
    compiler = "/usr/lib/wasmfleet/agent/bin/python3 -I -m agent.host.compiler"
    started = time.monotonic()
    story.board.ok(f"{compiler} <{artifact} >/dev/null", timeout_s=120)
    took = time.monotonic() - started
    figure(story.architecture, f"compiling {size} bytes, start of the compiler included", f"{took:.1f} s")


@pytest.mark.usefixtures("engine")
def test_a_bad_version_goes_back_by_itself(story: Story, operator: OperatorSide) -> None:
    with budget(f"v3 and back {story.architecture}", 120):
        code, said = operator.rolled_back("v3.wasm", story.board.port, group=story.group)
    assert code != 0, said
    operator.answers(story.board.port, "2")
    assert re.search(r"trap|unreachable", story.board.ok("fleet-agent why", timeout_s=120))
    journal = "journalctl --no-pager --output=cat WASMFLEET_INSTANCE=hello WASMFLEET_PHASE=rolled-back"
    assert "trap" in story.board.ok(journal)


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
