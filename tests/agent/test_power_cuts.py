"""Power cuts at every write that a device makes: before it, in it and after it.

The list of writes is the product's own (`agent.disk.Write`), and so are the doors by which each is made: read from the
source, they say which positions there are. In each, a process is killed; the disk then shows the old or the new; what
was cut short goes on in another process, to its end; and the agent starts on what is there, and says nothing odd.
"""

import ast
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import msgspec
import pytest

from agent.disk import Write
from agent.identity import identity
from tests.agent.enrolment_server import Fleet
from tests.agent.named_writes import ROWS
from tests.agent.power_cut import LEFT_OVER
from tests.agent.running_device import RunningDevice

ROOT = Path(__file__).parents[2]
WHOLE = ("before", "torn", "zeros", "unnamed", "after")
POSITIONS = {
    "write": WHOLE,
    "create": WHOLE,
    "write_over": WHOLE,
    "move": ("before", "after"),
    "take_name": ("before", "after"),
    "set_aside": ("before", "after"),
    "remove": ("before", "after"),
    "remove_tree": ("before", "half", "after"),
    "remove_leftovers": ("before", "after"),
    "make_directory": ("before", "after"),
    "make_fifo": ("before", "after"),
    "open_file": ("before", "torn", "zeros"),
    "open_descriptor": ("before", "after"),
    "append": ("before", "torn", "zeros", "after"),
    "append_synced": ("before", "torn", "zeros", "after"),
    "probe": ("before", "middle", "after"),
    "erase": ("before", "middle", "after"),
    "_transaction": ("before", "middle", "torn", "after"),
    "reached": ("before", "after"),
}
TAILS = {"AGENT_LOG": ("torn", "zeros")}  # opened for a long time, and written meanwhile
WORST = ("torn", "zeros", "half", "middle", "before")


def doors():
    """Return the doors by which each name is written, from the source."""
    found = defaultdict(set)
    for file in (ROOT / "agent").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute | ast.Name):
                first = node.args[0]
                if isinstance(first, ast.Attribute) and ast.unparse(first.value) == "Write":
                    name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
                    found[first.attr].add(name)
    found["LEFTOVERS"].add("remove_leftovers")
    return found


DOORS = doors()


def positions(name):
    found = {each for door in DOORS[name] for each in POSITIONS[door]} | set(TAILS.get(name, ()))
    return [each for each in ("before", "torn", "zeros", "unnamed", "half", "middle", "after") if each in found]


class Power:
    """Processes of the agent that may be cut."""

    def __init__(self, log):
        self.log = log
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.agent.power_cut"],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def run(self, directory, name, cut=None, act=None):
        """Carry out the row's act, or another; return its exit code, negative where a signal ended it."""
        module = "tests.agent.power_acts"
        request = {
            "module": module, "act": act or name, "directory": str(directory), "cut": cut and [name, cut],
            "log": str(self.log),
        }  # fmt: skip
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def said(self):
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def close(self):
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(60)


@pytest.fixture(autouse=True)
def _the_compiler_as_before(monkeypatch):
    """Rows name a compiler of their own in the environment, which the other tests of this process must not meet."""
    monkeypatch.setenv("WASMFLEET_COMPILER", "")


@pytest.fixture(scope="module")
def power(tmp_path_factory):
    made = Power(tmp_path_factory.mktemp("said") / "log")
    yield made
    made.close()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A device with a component that is committed, with no host, and with neither server nor broker."""
    directory = tmp_path_factory.mktemp("base") / "device"
    directory.mkdir()
    RunningDevice(directory, "web")
    return directory


class StrictFleet(Fleet):
    """Enrolment server that knows a token's key: another key with the same token is refused, as by the real one."""

    def answer(self, request):
        first = self.heard[0]
        same = (first.secret, first.sealing_key) == (request.secret, request.sealing_key)
        self.status = 200 if same else 403
        return super().answer(request)


@pytest.fixture
def device(tmp_path, base):
    """Return a function that makes a device for a row."""
    fleets = []

    def make(number, row):
        directory = tmp_path / str(number)
        if row.enrolled:
            shutil.copytree(base, directory)
        else:
            for name in ("state", "run"):
                (directory / name).mkdir(parents=True)
            (directory / "agent.toml").touch()
        fleets.append(fleet := StrictFleet(directory / "fleet"))
        root = (base / "state/identity/root.json").read_bytes()
        fleet.change = lambda enrolled: msgspec.structs.replace(enrolled, root=root.decode())
        (directory / "token").write_text(fleet.token(root_sha256=hashlib.sha256(root).hexdigest()))
        row.prepare(directory)
        return directory

    yield make
    for each in fleets:
        each.close()


def test_each_write_has_a_row_and_each_door_its_positions():
    assert set(ROWS) == {each.name for each in Write}
    assert {door for found in DOORS.values() for door in found} == set(POSITIONS)


def survive(power, directory, name, how):
    """Cut one write, go on, and start the agent on what is there then."""
    row, before = ROWS[name], len(power.said())
    old = row.see(directory)
    assert power.run(directory, name, how) == -signal.SIGKILL, f"was not reached: {power.said()[before:]}"
    found = row.see(directory)
    code = power.run(directory, name)
    assert code == 0, f"does not go on: {power.said()[before:]}"
    new = row.see(directory)
    assert found in (old, new, *row.between)
    if (
        how == "after"
        and {"write", "create", "append_synced", "_transaction"} & DOORS[name]
        and row.enrolled
        and row.alone
    ):
        assert found == new, "lost"
    assert not list(identity.damaged_files(directory / "state/identity"))
    assert power.run(directory, name, act="agent") == 0, f"the agent does not start: {power.said()[before:]}"
    assert not list((directory / "state").rglob(f"{LEFT_OVER}*"))
    assert "Traceback" not in power.said()[before:], power.said()[before:]


def cut_all(power, device, cuts):
    wrong = {}
    for number, (name, how) in enumerate(cuts):
        try:
            survive(power, device(number, ROWS[name]), name, how)
        except Exception as error:  # noqa: BLE001 - the whole table is told
            wrong[name, how] = f"{type(error).__name__}: {error}"
    return wrong


def told(wrong):
    return "\n".join(f"{name}, {how}: {said}" for (name, how), said in wrong.items())


GROUPS = 4
NAMES = sorted(ROWS)


@pytest.mark.parametrize("group", range(GROUPS))
def test_power_is_cut_at_the_worst_place_of_each_write(power, device, group):
    cuts = [(name, next(how for how in WORST if how in positions(name))) for name in NAMES[group::GROUPS]]
    wrong = cut_all(power, device, cuts)
    assert not wrong, told(wrong)


@pytest.mark.nightly
@pytest.mark.parametrize("name", NAMES)
def test_power_is_cut_at_each_place_of_each_write(power, device, name):
    wrong = cut_all(power, device, [(name, how) for how in positions(name)])
    assert not wrong, told(wrong)


def test_the_number_of_cuts_is_told(capsys):
    cuts = sum(len(positions(name)) for name in NAMES)
    with capsys.disabled():
        print(f" [{len(NAMES)} writes, {cuts} cuts]", end="")
    assert cuts >= 3 * len(NAMES) - len(NAMES) // 2
