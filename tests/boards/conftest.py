"""Emulated boards for the tests: packages built, installed, booted, and kept as a snapshot to start from.

Each board is a group of tests that runs in order in one worker; two workers share the machine's two cores.
"""

import contextlib
import fcntl
import functools
import http.server
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

sys.path.insert(0, str(Path(__file__).parent))  # no __init__.py under tests/, so what lies here is found this way
sys.path.insert(0, str(Path(__file__).parents[2]))  # deploy/ is no part of the wheel

import rig
import stage
import stages
from operator_side import OperatorSide
from stages import budget

from deploy import debian
from deploy.packages import build as packages

GIVEN = "WASMFLEET_BOARDS_S"  # no board is begun with after so many seconds; the default is to test all, however long

# patience for the tests: the shipped values are minutes
IMPATIENT = b"health_s = 20.0\nrefresh_s = 10.0\n[network]\nkeepalive_s = 20\n"


def pytest_configure(config: pytest.Config) -> None:
    # the process that starts the workers decides where they note what they took
    if not hasattr(config, "workerinput") and stages.DIRECTORY not in os.environ:
        os.environ[stages.DIRECTORY] = tempfile.mkdtemp(prefix="wasmfleet-boards-")
        os.environ[stages.BEGAN] = str(time.monotonic())


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.board)
    item.add_marker(pytest.mark.timeout(1500))


def group_of(nodeid: str) -> str:
    """The board that a test is about: its file and its architecture."""
    file, _, name = nodeid.partition("::")
    return f"{file} {next((each for each in stages.ARCHITECTURES if each in name), '')}"


class BoardByBoard(LoadScopeScheduling):  # type: ignore[misc, no-any-unimported]  # xdist has no types
    """The tests about one board go to one worker."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> BoardByBoard:
    return BoardByBoard(config, log)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and stages.BEGAN in os.environ:
        shutil.rmtree(os.environ.pop(stages.DIRECTORY), ignore_errors=True)
        del os.environ[stages.BEGAN]


_begun: set[str] = set()
_on: list[rig.Board] = []


def pytest_runtest_setup(item: pytest.Item) -> None:
    """On a machine that is too slow, boards that nobody has begun with are dropped, and each test says so.

    The workers take the groups with the most tests first: power, the two stories, faults, network, package,
    containment, first boot. So the last of these is what is dropped first.
    """
    group = group_of(item.nodeid)
    began, most = float(os.environ[stages.BEGAN]), float(os.environ.get(GIVEN, "inf"))
    if group not in _begun and time.monotonic() - began > most:
        pytest.skip(f"DROPPED for lack of time: {GIVEN} gives the boards {most:.0f} s, and they have gone")
    _begun.add(group)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """A board whose tests are done is switched off: idle, it would still take a part of a core from the others."""
    if nextitem is None or group_of(nextitem.nodeid) != group_of(item.nodeid):
        while _on:
            _on.pop().pull_the_plug()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if hasattr(terminalreporter.config, "workerinput"):
        return
    for title, lines in (
        ("stages, beside what they may take on two idle cores", stages.stage_table()),
        ("figures for docs/boards.md, by make test-boards", stages.figure_table()),
    ):
        if lines:
            terminalreporter.section(title)
            terminalreporter.write_line("\n".join(lines))


@dataclass
class Booted:
    """A disk to be copied for each test: with a snapshot of a board that has booted, where snapshots work."""

    image: stage.Image
    disk: Path
    snapshot: str


@pytest.fixture(scope="session")
def boards_ready() -> None:
    if not debian.is_root():
        pytest.skip("emulated boards are made and booted by root: run `make test-boards` as root")
    try:
        debian.need("qemu-system-aarch64", "qemu-system-riscv64", "qemu-img", "mmdebstrap", "mke2fs", "dpkg-deb")
    except debian.BuildError as error:
        pytest.skip(f"{error} (make test-boards installs it)")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@contextlib.contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Two workers want the same package, disk, snapshot: the second waits and finds it made."""
    with (debian.cache_dir() / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def package(boards_ready: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The agent's package for an architecture, built once."""
    ready_made = os.environ.get("WASMFLEET_PACKAGES")
    out = Path(ready_made) if ready_made else Path(os.environ[stages.DIRECTORY]) / "packages"

    def build(architecture: str) -> Path:
        with one_at_a_time("package"):
            found = next(out.glob(f"wasmfleet-agent_*_{architecture}.deb"), None)
            if found is None:
                with budget(f"package {architecture}", 60):
                    wheel = next((out / "wheel").glob("*.whl"), None) or packages.own_wheel(out / "wheel")
                    found = packages.build("wasmfleet-agent", architecture, wheel, out)
        return found

    return build


@pytest.fixture(scope="session")
def image(package: Callable[[str], Path]) -> Callable[[str], stage.Image]:
    """The disk of a board with the package installed, which has never booted."""

    def build(architecture: str) -> stage.Image:
        made_of = package(architecture)
        with one_at_a_time(f"disk-{architecture}"), budget(f"root and disk {architecture}", 90):
            return stage.build(architecture, [made_of])

    return build


@pytest.fixture(scope="session")
def booted(image: Callable[[str], stage.Image], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Booted]:
    """A board that has booted, kept at that moment; where QEMU cannot keep it, its disk as it was before."""
    made: dict[str, Booted] = {}

    def boot(architecture: str) -> Booted:
        if architecture in made:
            return made[architecture]
        base = image(architecture)
        machine = rig.MACHINES[architecture]
        # as long as nothing it was made of changes, a board that has booted is as good as one that boots
        disk = base.disk.with_name(f"booted-{debian.key(Path(rig.__file__).read_text())}.qcow2")
        with one_at_a_time(f"booted-{architecture}"):
            if not disk.exists():
                place = tmp_path_factory.mktemp(f"booted-{architecture}")
                fresh = stage.overlay(base, place / "disk.qcow2")
                if machine.snapshots:
                    with budget(f"first boot {architecture}", 90):
                        _first_boot(rig.Board(machine, base.kernel, base.initrd, fresh, place))
                shutil.move(fresh, disk)
        made[architecture] = Booted(base, disk, "ready" if machine.snapshots else "")
        return made[architecture]

    return boot


def _first_boot(board: rig.Board) -> None:
    try:
        board.start()
        board.settle()
        board.save("ready")
    finally:
        board.pull_the_plug()


@pytest.fixture(scope="session")
def new_board(booted: Callable[[str], Booted], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., rig.Board]:
    """Boards that start from the snapshot, each with a disk of its own; each is off when its group of tests is done."""

    def board(architecture: str, name: str, *, append: str = "") -> rig.Board:
        base = booted(architecture)
        snapshot = "" if append else base.snapshot  # a kernel's parameters are those it booted with
        place = tmp_path_factory.mktemp(name)
        shutil.copy2(base.disk, place / "disk.qcow2")
        fresh = rig.Board(rig.MACHINES[architecture], base.image.kernel, base.image.initrd, place / "disk.qcow2", place)
        fresh.append = append
        _on.append(fresh)
        with budget(f"start of the board {name}", 15 if snapshot else 180):
            fresh.start(snapshot=snapshot)
            fresh.ok(f"hostname {name}; echo {name} > /etc/hostname")
            if not snapshot:
                fresh.settle()
        return fresh

    return board


@dataclass
class Served:
    """Files that boards fetch from this machine."""

    directory: Path
    port: int

    def url(self, file: Path) -> str:
        """Where a board finds a copy of a file."""
        shutil.copy2(file, self.directory)
        return f"http://{rig.HOST}:{self.port}/{file.name}"


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    directory = tmp_path_factory.mktemp("served")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Served(directory, server.server_address[1])
        server.shutdown()


@pytest.fixture(scope="session")
def operator(boards_ready: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorSide]:
    side = OperatorSide(tmp_path_factory.mktemp("operator"))
    yield side
    side.close()


@dataclass
class Joined:
    """A board that has joined the fleet, and the operator who sees it."""

    board: rig.Board
    device: str
    group: str
    operator: OperatorSide

    def answers(self, version: str, *, timeout_s: float = 300.0) -> None:
        """Wait until this version answers a request from outside."""
        self.operator.answers(self.board.port, version, timeout_s=timeout_s)

    def pid(self, unit: str) -> str:
        """The main process of a unit."""
        return self.board.ok(f"systemctl show --property=MainPID --value {unit}")


def enrol(board: rig.Board, operator: OperatorSide, group: str = "boards") -> str:
    """Join the fleet as an owner does, with the token on standard input; the device's id."""
    board.put("/run/token", operator.token(group).encode(), mode=0o600)
    said = board.ok("fleet-agent enroll < /run/token && rm /run/token", timeout_s=180)
    device = said.split(" ", 1)[0]
    operator.online(device)
    return device


@pytest.fixture(scope="session")
def joined(new_board: Callable[..., rig.Board], operator: OperatorSide) -> Callable[[str, str], Joined]:
    """Make a board that has joined, with v1 answering: what the tests of faults start from."""

    def make(architecture: str, name: str) -> Joined:
        board = new_board(architecture, name)
        board.put("/etc/wasmfleet/config.d/50-test.toml", IMPATIENT)
        with budget(f"{name} joins and gets v1", 90):
            made = Joined(board, enrol(board, operator, name), name, operator)
            operator.pushed("v1.wasm", group=name)
            made.answers("1")
        return made

    return make
