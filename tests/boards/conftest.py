"""Emulated boards for the tests: packages built, installed, booted, and kept as a snapshot to start from.

Two workers share the machine's two cores, and each has one board switched on at a time. Tests share a board that has
joined the fleet as long as they succeed: starting, joining and the first update take two minutes. No test relies on
the one before. A fixture brings the board to where the test begins (joined; a component answers), each test updates
to what does not answer now, and after a failure the next test gets another board.
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
from collections.abc import Callable, Generator, Iterator
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
from operator_side import OperatorSide, Update
from stages import budget

from deploy import debian
from deploy.packages import build as packages
from deploy.riscv64 import build as riscv64

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.stem != "test_story")  # the main job first: it gives the figures


# Tests with boards of their own; all others share one of their architecture.
APART = ("test_containment", "test_first_boot", "test_package")


def group_of(nodeid: str) -> str:
    """The boards that a test uses, by architecture and use: tests of one group run in one worker."""
    file, _, name = nodeid.partition("::")
    architecture = next((each for each in stages.ARCHITECTURES if each in name), "")
    return f"{architecture} {next((each for each in APART if each in file), 'shared')}"


class BoardByBoard(LoadScopeScheduling):  # type: ignore[misc, no-any-unimported]  # xdist has no types
    """The tests that share boards go to one worker; the largest group first."""

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> BoardByBoard:
    return BoardByBoard(config, log)


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput") and stages.BEGAN in os.environ:
        shutil.rmtree(os.environ.pop(stages.DIRECTORY), ignore_errors=True)
        del os.environ[stages.BEGAN]


_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Remember that a test failed: the board that it leaves behind may be in any state."""
    report = yield
    if report.failed:
        item.config.stash[_failed] = True
    return report


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

    def answering(self) -> str:
        """The version of the demo's component that answers now; empty when none does."""
        return self.operator.version(self.board.port)

    def answers(self, version: str, *, timeout_s: float = 300.0) -> None:
        """Wait until this version answers a request from outside."""
        self.operator.answers(self.board.port, version, timeout_s=timeout_s)

    def next(self) -> Update:
        """Make an update to the version, 1 or 2, that does not answer now."""
        return self.operator.fresh("2" if self.answering() == "1" else "1")

    def updated(self) -> Update:
        """Update to the version that does not answer now."""
        update = self.next()
        self.operator.pushed(update, group=self.group)
        self.answers(update.answer)
        return update

    def offered(self, update: Update) -> None:
        """Push without waiting for the board."""
        code, said = self.operator.push(update, "--detach", group=self.group)
        assert code == 0, said

    def pid(self, unit: str) -> str:
        """The main process of a unit."""
        return self.board.ok(f"systemctl show --property=MainPID --value {unit}")

    def store_is_whole(self) -> None:
        """Check that the agent's store is a sound database, as after a power cut."""
        connect = "import sqlite3; store = sqlite3.connect('/var/lib/wasmfleet-agent/store.db')"
        check = f"{connect}; print(*store.execute('pragma integrity_check').fetchone())"
        assert self.board.ok(f'python3 -c "{check}"') == "ok"

    @property
    def healthy(self) -> bool:
        """Whether the board is on and its shell answers."""
        try:
            return self.board.process is not None and self.board.run("true").status == 0
        except rig.BoardError:
            return False


def enrol(board: rig.Board, operator: OperatorSide, group: str = "boards") -> str:
    """Join the fleet as an owner does, with the token on standard input; the device's id."""
    board.put("/run/token", operator.token(group).encode(), mode=0o600)
    said = board.ok("fleet-agent enroll < /run/token && rm /run/token", timeout_s=180)
    device = said.split(" ", 1)[0]
    operator.online(device)
    return device


def need_engine(architecture: str) -> None:
    """Skip the test where this architecture's boards have no engine."""
    if architecture == "riscv64" and riscv64.finished() is None:
        pytest.skip("no riscv64 engine in the wheelhouse: make riscv64-wheel builds it")


class Boards:
    """This worker's boards: one at a time, since an idle one takes a part of a core from the others."""

    def __init__(
        self, config: pytest.Config, booted: Callable[[str], Booted], operator: OperatorSide, places: Path
    ) -> None:
        self._config = config
        self._booted = booted
        self._operator = operator
        self._places = places
        self._on: rig.Board | None = None
        self._kept: tuple[tuple[str, str], Joined] | None = None
        self._made = 0

    def new(self, architecture: str, *, append: str = "") -> rig.Board:
        """Switch on a board of which the fleet has never heard.

        Args:
            architecture: of the board.
            append: to the kernel's command line.
        """
        self.switch_off()
        self._config.stash[_failed] = False
        self._made += 1
        name = f"board-{architecture}-{self._made}"
        base = self._booted(architecture)
        snapshot = "" if append else base.snapshot  # a kernel's parameters are those it booted with
        place = self._places / name
        place.mkdir()
        shutil.copy2(base.disk, place / "disk.qcow2")
        fresh = rig.Board(rig.MACHINES[architecture], base.image.kernel, base.image.initrd, place / "disk.qcow2", place)
        fresh.append = append
        self._on = fresh
        with budget(f"start of {name}", 15 if snapshot else 180):
            fresh.start(snapshot=snapshot)
            fresh.ok(f"hostname {name}; echo {name} > /etc/hostname")
            if not snapshot:
                fresh.settle()
        return fresh

    def switch_off(self) -> None:
        """Switch off the board that is on; whoever wants one next gets a new one."""
        self._kept = None
        if self._on is not None:
            self._on.pull_the_plug()
            self._on = None

    def spend(self) -> None:
        """Let no further test have the board as one that has joined."""
        self._kept = None

    def any(self, architecture: str) -> rig.Board:
        """Return the board that is on, whatever was done to it, or another; it is spent."""
        self.spend()
        on = self._on
        if self._sound() and on is not None and on.machine.architecture == architecture and not on.append:
            return on
        return self.new(architecture)

    def _sound(self) -> bool:
        return not self._config.stash.get(_failed, False)

    def enrolled(self, architecture: str, *, append: str = "") -> Joined:
        """Return a board that has joined the fleet: the one that the test before left, or another."""
        wanted = (architecture, append)
        if self._sound() and self._kept is not None and self._kept[0] == wanted and self._kept[1].healthy:
            return self._kept[1]
        board = self.new(architecture, append=append)
        name = board.workdir.name
        board.put("/etc/wasmfleet/config.d/50-test.toml", IMPATIENT)
        with budget(f"{name} joins", 60):
            made = Joined(board, enrol(board, self._operator, name), name, self._operator)
        self._kept = (wanted, made)
        return made

    def running(self, architecture: str, *, append: str = "") -> Joined:
        """Return a board on which a version of the demo's component answers."""
        need_engine(architecture)
        made = self.enrolled(architecture, append=append)
        if not made.answering():
            with budget(f"{made.group} gets its first component", 90):
                made.updated()
        return made


@pytest.fixture(scope="session")
def boards(
    request: pytest.FixtureRequest,
    booted: Callable[[str], Booted],
    operator: OperatorSide,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Boards]:
    made = Boards(request.config, booted, operator, tmp_path_factory.mktemp("boards"))
    yield made
    made.switch_off()


@pytest.fixture(scope="session", params=stages.RISCV64_NIGHTLY)
def architecture(request: pytest.FixtureRequest) -> str:
    """Test on arm64, and every night on RISC-V too; `stages` has other choices, for a test's own parametrization."""
    return str(request.param)


@pytest.fixture
def enrolled(boards: Boards, architecture: str) -> Joined:
    """A board that has joined; components may run on it."""
    return boards.enrolled(architecture)


@pytest.fixture
def running(boards: Boards, architecture: str) -> Joined:
    """A board that has joined, and on which a version of the demo's component answers."""
    return boards.running(architecture)
