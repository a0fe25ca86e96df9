"""Soak of an emulated board: the rounds of `tests/soak.py` with a real kernel, disk, clock and network.

Five minutes, or SOAK=3600; SEED=N repeats a run. Afterwards the shell lines of docs/device.md are run as they stand.
"""

import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Joined
from stages import budget

from fleet.demo.environment import DemoError
from fleet.protocol.codes import Phase, RolloutState
from tests import soak

PAGE = (Path(__file__).parents[2] / "docs/device.md").read_text(encoding="utf-8")
PACE = 3.0
REST_S = 60
OVER = frozenset(RolloutState) - {RolloutState.SCHEDULED, RolloutState.RUNNING, RolloutState.PAUSED}
ENDS = (Phase.COMMITTED, Phase.ROLLED_BACK)
WITHOUT = frozenset({soak.SERVER})
"""The server is on this machine, and shared: to the board, a cable that is pulled is the same."""


class Soak:
    """A board and what was seen of it."""

    def __init__(self, running: Joined) -> None:
        self.running, self.board, self.operator = running, running.board, running.operator
        self.faults: Counter[str] = Counter()
        self.states: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.begun: list[str] = []

    def play(self, this: soak.Round) -> None:
        self.change(this.change)
        undo, retry = this.change == soak.PUSH_AND_UNDO, this.change == soak.RETRY
        for fault in this.faults:
            time.sleep(fault.after_s)  # the moment is the point
            self.faults[fault.kind] += 1
            self.broken(fault)
            if undo:
                self.change(soak.UNDO)
                undo = False
        if undo:
            self.change(soak.UNDO)
        if retry:  # refused where nothing has failed: said so, and everything stays
            try:
                self.operator.fleet("retry", self.running.device, "hello")
                self.states["retried"] += 1
            except DemoError:
                self.states["retry refused"] += 1
        self.settled(this)

    def change(self, what: str) -> None:
        if what == soak.NOTHING:
            return
        try:
            if what == soak.UNDO:
                self.operator.fleet("undo", "--group", self.running.group, "--detach")
            else:
                self.running.offered(self.running.next())
        except Exception as error:
            self.states[f"{what} refused"] += 1
            if "undo" not in what:
                raise error from None
            return
        rows = self.operator.scene.client.rollouts(group=self.running.group, limit=1).rollouts
        self.begun.append(rows[0].id)

    def broken(self, fault: soak.Fault) -> None:
        board = self.board
        match fault.kind:
            case soak.CUT:
                board.pull_the_plug()
                board.start()
            case soak.AGENT | soak.HOST:
                unit = "fleet-agent" if fault.kind == soak.AGENT else "fleet-host"
                board.ok(f"systemctl kill --signal=KILL {unit}")
            case soak.AGENT_STOPPED:
                board.ok("systemctl restart fleet-agent", timeout_s=180)
            case soak.HELPER:
                children = f"$(pgrep -P {self.running.pid('fleet-host')})"
                board.run(f"set -- {children}; shift $(({fault.choice} % $#)); kill -KILL $1")
            case soak.SILENT:
                board.ok("tc qdisc add dev eth0 root netem loss 100%")
                time.sleep(fault.lasts_s)
                board.ok("tc qdisc del dev eth0 root")
            case soak.REFUSED:
                board.set_link(up=False)
                time.sleep(fault.lasts_s)
                board.set_link(up=True)
            case soak.FULL:
                board.ok("dd if=/dev/zero of=/fill bs=64k 2>/dev/null; true", timeout_s=240)
                time.sleep(fault.lasts_s)
                board.ok("rm -f /fill && sync")
            case soak.FORWARD | soak.BACK:
                board.ok(f"date --utc --set @$(($(date +%s) + {fault.jump_s})) >/dev/null")
                time.sleep(fault.lasts_s)
                board.set_clock()

    def settled(self, this: soak.Round) -> None:
        for rollout in self.begun:
            view = self.until(f"{this}: rollout {rollout} is over", lambda r=rollout: self.over(r))
            self.states[view.state] += 1
            entries = self.operator.scene.client.timeline(self.running.device, limit=200).entries
            ends = Counter(
                (e.phase, e.code) for e in entries if e.kind == "report" and e.rollout == rollout and e.phase in ENDS
            )
            if max(ends.values(), default=0) > 1 or (view.state is RolloutState.SUCCEEDED and not ends):
                self.wrong.append(f"{this}: {view.state}, reported {dict(ends)}")
        self.begun.clear()
        self.until(f"{this}: nothing is being changed", self.at_rest)
        version = "1" if "/1." in self.target() else "2"
        self.until(f"{this}: {version} answers", lambda: self.running.answering() == version or None)
        self.running.store_is_whole()

    def until(self, what, question):
        return self.operator.until(f"{what}, SEED={soak.SEED}", question, timeout_s=600)

    def over(self, rollout):
        view = self.operator.scene.client.rollout(rollout)
        return view if view.state in OVER else None

    def at_rest(self):
        said = self.board.run("fleet-agent status --json | tr -d ' \\n'")
        return True if '"changing":[]' in said.text and '"unsent_reports":0' in said.text else None

    def target(self) -> str:
        said = self.board.ok("fleet-agent status --json | tr -d ' \\n'")
        found = re.search(r'"target":"([^"]+)"', said)
        assert found, said
        return found[1]

    def figures(self) -> list[str]:
        """Measure what the board costs at rest, with the settings as shipped."""
        board = self.board
        board.ok("mv /etc/wasmfleet/config.d/50-test.toml /root/; systemctl restart fleet-agent", timeout_s=180)
        self.operator.online(self.running.device)
        time.sleep(REST_S / 2)  # what a start still has to do
        read = (
            "for u in agent host; do p=$(systemctl show -P MainPID fleet-$u); "
            "for q in $p $(pgrep -P $p); do grep -h ^voluntary /proc/$q/status; done | "
            "awk -v u=$u '{n+=$2} END {print u, n}'; done; "
            "awk '/:/ && !/lo:/ {print \"wire\", $2+$10}' /proc/net/dev"
        )
        before = dict(line.split() for line in board.ok(read).splitlines())
        time.sleep(REST_S)  # a measurement takes its time
        after = dict(line.split() for line in board.ok(read).splitlines())
        told = [f"{name}: {int(after[name]) - int(before[name])} in {REST_S} s" for name in after]
        told.append(board.ok("du -sk /var/lib/wasmfleet-agent /var/lib/wasmfleet-host").replace("\n", "; ") + " KiB")
        board.ok("mv /root/50-test.toml /etc/wasmfleet/config.d/; systemctl restart fleet-agent", timeout_s=180)
        return told


@pytest.mark.nightly
@pytest.mark.timeout(soak.SECONDS + 3000)
@pytest.mark.parametrize("architecture", ["arm64"], indirect=True)
def test_a_soak_of_a_board(running: Joined, capsys: pytest.CaptureFixture[str]) -> None:
    made = Soak(running)
    until = time.monotonic() + soak.SECONDS
    with budget(f"soak, SEED={soak.SEED}", soak.SECONDS + 300):
        for this in soak.rounds(soak.SEED, without=WITHOUT, pace=PACE):
            if time.monotonic() > until:
                break
            with capsys.disabled():
                print(this, flush=True)
            made.play(this)
    with capsys.disabled():
        print(f"faults {dict(made.faults)}; rollouts {dict(made.states)}")
        print("\n".join(made.figures()), flush=True)
    assert not made.wrong, f"SEED={soak.SEED}\n" + "\n".join(made.wrong)


def lines() -> Iterator[str]:
    for block in re.findall(r"```sh board\n(.*?)```", PAGE, re.DOTALL):
        yield from block.splitlines()


@pytest.mark.nightly
@pytest.mark.parametrize("architecture", ["arm64"], indirect=True)
def test_each_line_of_the_page_for_owners_says_something(running: Joined) -> None:
    for line in lines():
        said = running.board.run(f'sudo() {{ "$@"; }}; {line}', timeout_s=120)
        assert said.status == 0, (line, said.text)
        assert said.text or "set-property" in line, line
