"""The main job on an emulated board of each architecture: well, pushed, swapped, rolled back, the plug pulled."""

import re
import statistics
import time
from pathlib import Path

import pytest
import rig
import stages
from conftest import Joined, need_engine
from operator_side import HELLO, OperatorSide, swap_gap
from stages import budget, figure

from deploy.riscv64 import build as riscv64
from tests.boards import interfaces


@pytest.fixture(scope="session", params=stages.ON_BOTH)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_the_system_is_well(enrolled: Joined) -> None:
    assert enrolled.board.ok("systemctl --failed --plain --no-legend") == ""
    assert (
        enrolled.board.ok("systemctl is-active fleet-host fleet-agent fleet-compiler.socket").split() == ["active"] * 3
    )
    # nothing of the package's is in sight of the board's own Python
    for name in ("agent", "fleet", "signing", "wasmtime", "tuf"):
        assert enrolled.board.run(f"cd / && python3 -c 'import {name}'").status != 0


def test_without_an_engine_a_board_says_so(enrolled: Joined, architecture: str, operator: OperatorSide) -> None:
    if architecture != "riscv64" or riscv64.finished() is not None:
        pytest.skip("this board has an engine")
    operator.push(operator.fresh("1"), group=enrolled.group)
    # the server passes it over, knowing that from its health; and the board itself refuses what it cannot run
    rollout = operator.finished(group=enrolled.group)
    (skipped,) = operator.scene.client.rollout(rollout.id).devices
    assert "no wasm engine" in skipped.message
    operator.until("its own word arrives", lambda: "no-engine" in operator.fleet("why", enrolled.device) or None)
    assert "engine" in enrolled.board.ok("fleet-agent why", timeout_s=120)


def test_a_component_is_pushed_and_compiled_for_this_cpu(
    enrolled: Joined, architecture: str, operator: OperatorSide
) -> None:
    need_engine(architecture)
    update, started = enrolled.next(), time.monotonic()
    with budget(f"push {architecture}", 90), operator.first_answer(enrolled.board.port, update.answer) as answered:
        operator.pushed(update, group=enrolled.group)
    figure(architecture, "from `fleet push` to the first answer", f"{answered() - started:.1f} s")
    header = enrolled.board.ok("head -c 20 $(ls -t /var/lib/wasmfleet-agent/images/*.cwasm | head -n 1) | od -An -tx1")
    header = "".join(header.split())
    assert header.startswith("7f454c46"), "an image is an ELF file"
    machine = int.from_bytes(bytes.fromhex(header[36:40]), "little")
    assert machine == rig.MACHINES[architecture].elf


def test_a_swap_under_requests_loses_none(running: Joined, architecture: str, operator: OperatorSide) -> None:
    before, update = running.answering(), running.next()
    with budget(f"swap {architecture}", 90), operator.asking_steadily(running.board.port) as asked:
        seen = operator.under_load(running.board.port, update, group=running.group)
    assert seen.lost == 0, seen.losses
    assert set(seen.by_version) == {before, update.answer}
    waits = [each.took for each in asked]
    usual_ms, longest_ms = 1000 * statistics.median(waits), 1000 * max(waits)
    figure(
        architecture,
        "swap gap: the old version's last answer to the new one's first, less the usual",
        f"{1000 * swap_gap(asked):.0f} ms",
    )
    figure(
        architecture,
        "an answer takes: usually, at most while an update is fetched, compiled and swapped in",
        f"{usual_ms:.0f} ms, {longest_ms:.0f} ms",
    )


def test_ten_instances_answer_soon_after_their_hosts_start(running: Joined, architecture: str) -> None:
    need_engine(architecture)
    running.board.put("/var/tmp/ten_instances.py", (Path(__file__).parent / "ten_instances.py").read_bytes())
    image = "$(ls -t /var/lib/wasmfleet-agent/images/*.cwasm | head -n 1)"
    command = f"/usr/lib/wasmfleet/agent/bin/python3 ten_instances.py {image}"
    with budget(f"ten instances {architecture}", 90):
        said = running.board.ok(f"cd /var/tmp && {command}", timeout_s=300)
    print(said)
    found = re.search(r"^all answered ([\d.]+) s$", said, re.MULTILINE)
    assert found, said
    figure(architecture, "from a host's start to the answers of ten instances", f"{found[1]} s")
    assert said.count("worker ") == 10


def test_the_boards_own_figures_arrive(running: Joined, architecture: str, operator: OperatorSide) -> None:
    operator.settled(running.device)
    (target,) = (each.target for each in operator.device(running.device).instances if each.instance == HELLO)
    version = target.rpartition("/")[2].removesuffix(".wasm")
    assert version.startswith(f"{running.answering()}.0.")
    text = operator.fleet("device", running.device)
    assert "wasmtime 50.0.1" in text
    assert rig.MACHINES[architecture].machine in text
    assert re.search(rf"^hello +\S*hello@{re.escape(version)} (\(probation\) )? *running", text, re.MULTILINE), text
    assert re.search(r"^hardware +up .* on 2 CPUs", text, re.MULTILINE), text
    assert re.search(r"^memory +[\d.]+ \w+ of [\d.]+ \w+ free", text, re.MULTILINE), text


def test_its_owner_is_told_by_systemd_and_the_journal(running: Joined) -> None:
    for unit, said in (("fleet-agent", "connected; 1 instance"), ("fleet-host", "1 instance; wasmtime 50.0.1")):
        # said whenever the watchdog is fed: within a third of its patience
        shows = f"systemctl show --property=StatusText --value {unit} | grep -qF '{said}'"
        running.board.ok(f"for n in $(seq 120); do {shows} && exit 0; sleep 0.5; done; exit 1", timeout_s=240)
    fields = f"WASMFLEET_DEVICE={running.device} WASMFLEET_INSTANCE=hello WASMFLEET_PHASE=committed"
    lines = running.board.ok(
        f"journalctl --no-pager --output=cat _SYSTEMD_UNIT=fleet-agent.service {fields}"
    ).splitlines()
    assert len(lines) >= 1, "each version that was committed"
    assert all(re.fullmatch(r"hello: committed \S+/hello/\S+\.wasm", line) for line in lines), lines


def test_what_it_takes_at_rest(enrolled: Joined, architecture: str) -> None:
    # an emulated board's pages are a board's: the budget is 60 MB without an instance
    total_kb: dict[str, int] = {"fleet-agent": 0, "fleet-host": 0}
    for unit in total_kb:
        group = enrolled.board.ok(f"systemctl show --property=ControlGroup --value {unit}")
        for pid in enrolled.board.ok(f"find /sys/fs/cgroup{group} -name cgroup.procs -exec cat {{}} +").split():
            pss = enrolled.board.run(f"awk '/^Pss:/ {{print $2}}' /proc/{pid}/smaps_rollup").text
            total_kb[unit] += int(pss) if pss.isdigit() else 0
    assert all(total_kb.values())
    agent, host = (f"{kb / 1024:.0f} MB" for kb in total_kb.values())
    instances = enrolled.board.ok("ls -d /sys/fs/cgroup/system.slice/fleet-host.service/i-* 2>/dev/null | wc -l")
    figure(architecture, f"PSS at rest, {instances} instance: agent, host with its processes", f"{agent}, {host}")
    assert sum(total_kb.values()) < 200 * 1024


def test_how_long_compiling_takes(running: Joined, architecture: str) -> None:
    artifact = running.board.ok("ls /var/lib/wasmfleet-agent/artifacts/* | head -1")
    size = running.board.ok(f"stat -c %s {artifact}")
    compiler = "/usr/lib/wasmfleet/agent/bin/python3 -I -m agent.host.compiler"
    started = time.monotonic()
    running.board.ok(f"{compiler} <{artifact} >/dev/null", timeout_s=120)
    took = time.monotonic() - started
    figure(architecture, f"compiling {size} bytes, start of the compiler included", f"{took:.1f} s")


def test_a_bad_version_goes_back_by_itself(running: Joined, architecture: str, operator: OperatorSide) -> None:
    before = running.answering()
    with budget(f"a bad version and back {architecture}", 120):
        code, said = operator.rolled_back(operator.fresh("3"), running.board.port, group=running.group)
    assert code != 0, said
    running.answers(before)
    assert re.search(r"trap|unreachable", running.board.ok("fleet-agent why", timeout_s=120))
    journal = "journalctl --no-pager --output=cat WASMFLEET_INSTANCE=hello WASMFLEET_PHASE=rolled-back"
    assert "trap" in running.board.ok(journal)


@pytest.mark.parametrize("architecture", stages.ARM64_NIGHTLY, indirect=True)  # on arm64 test_power.py does more
def test_the_plug_is_pulled_and_the_same_version_answers(running: Joined, operator: OperatorSide) -> None:
    before = running.answering()
    running.board.pull_the_plug()
    with budget(f"boot after a power cut {running.group}", 120):
        running.board.start()
        running.answers(before)
    operator.online(running.device)
    running.store_is_whole()


@pytest.mark.parametrize("architecture", [pytest.param("arm64", marks=pytest.mark.nightly)], indirect=True)
def test_each_interface_is_used_once(running: Joined, operator: OperatorSide, tmp_path: Path) -> None:
    board = running.board
    with budget("key-value pairs, messages, sockets, a command and its files", 400):
        for name, guest in interfaces.guests().items():
            operator.pushed(interfaces.saved(name, guest, tmp_path), group=running.group, instance=name)
        board.put("/run/asks.py", interfaces.ASKS.encode())
        said = board.ok(f"python3 /run/asks.py {interfaces.PORT}", timeout_s=180)
        assert said.splitlines() == interfaces.SAID
        operator.until("the message arrives", lambda: "plant/boiler" in operator.fleet("messages") or None)
        kept = board.ok(f"find /var/lib -name {interfaces.KEPT}").split()
        assert len(kept) == 1, kept
        assert board.ok(f"head -c 8 {kept[0]}") == "lineline"
        for name in interfaces.guests():  # the figures of what follows on this board are without them
            operator.fleet("remove", name, "--group", running.group, "--detach")
