"""Emulated boards for the tests: packages built, installed, booted, and kept as a snapshot to start from."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # no __init__.py under tests/, so what lies here is found this way
sys.path.insert(0, str(Path(__file__).parents[2]))  # deploy/ is no part of the wheel

import rig
import stage
from operator_side import OperatorSide, budget

from deploy import debian
from deploy.packages import build as packages

OWNER = "[Service]\nEnvironment=WASMFLEET_INGRESS=0.0.0.0:8080\n"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.board)
            item.add_marker(pytest.mark.timeout(2400))


@dataclass
class Booted:
    """A disk with a snapshot of a board that has booted (where snapshots work), to be copied for each test."""

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


@pytest.fixture(scope="session")
def package(boards_ready: None, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The agent's package for an architecture, built once."""
    made: dict[str, Path] = {}
    scratch = tmp_path_factory.mktemp("packages")

    def build(architecture: str) -> Path:
        ready_made = os.environ.get("WASMFLEET_PACKAGES")
        if ready_made:
            return next(Path(ready_made).glob(f"wasmfleet-agent_*_{architecture}.deb"))
        if architecture not in made:
            with budget(f"package {architecture}", 60):
                made.setdefault("wheel", packages.own_wheel(scratch / "wheel"))
                made[architecture] = packages.build("wasmfleet-agent", architecture, made["wheel"], scratch)
        return made[architecture]

    return build


@pytest.fixture(scope="session")
def booted(package: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Booted]:
    """A board that has booted with the package installed, and was kept at that moment."""
    made: dict[str, Booted] = {}

    def boot(architecture: str) -> Booted:
        if architecture in made:
            return made[architecture]
        with budget(f"root and disk {architecture}", 360):
            image = stage.build(architecture, [package(architecture)])
        # as long as nothing it was made of changes, a board that has booted is as good as one that boots
        recipe = debian.key(OWNER, Path(rig.__file__).read_text(), Path(__file__).read_text())
        disk = image.disk.with_name(f"booted-{recipe}.qcow2")
        if not disk.exists():
            place = tmp_path_factory.mktemp(f"booted-{architecture}")
            fresh = stage.overlay(image, place / "disk.qcow2")
            board = rig.Board(rig.MACHINES[architecture], image.kernel, image.initrd, fresh, place)
            with budget(f"first boot {architecture}", 120):
                try:
                    _first_boot(board)
                finally:
                    board.pull_the_plug()
            shutil.move(fresh, disk)
        made[architecture] = Booted(image, disk, "ready" if rig.MACHINES[architecture].snapshots else "")
        return made[architecture]

    return boot


def _first_boot(board: rig.Board) -> None:
    board.start()
    # the board's owner opens the shared port, as the package's README says
    board.ok("mkdir -p /etc/systemd/system/fleet-host.service.d")
    board.put("/etc/systemd/system/fleet-host.service.d/owner.conf", OWNER.encode())
    board.ok("systemctl daemon-reload && systemctl restart fleet-host", timeout_s=240)
    board.ok("systemctl is-system-running --wait || true", timeout_s=300)
    if board.machine.snapshots:
        board.save("ready")
    else:
        board.shut_down()


@pytest.fixture(scope="session")
def new_board(
    booted: Callable[[str], Booted], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., rig.Board]]:
    """Boards that start from the snapshot, each with a disk of its own; all are off at the end."""
    made: list[rig.Board] = []

    def board(architecture: str, name: str) -> rig.Board:
        base = booted(architecture)
        place = tmp_path_factory.mktemp(name)
        shutil.copy2(base.disk, place / "disk.qcow2")
        fresh = rig.Board(rig.MACHINES[architecture], base.image.kernel, base.image.initrd, place / "disk.qcow2", place)
        made.append(fresh)
        fresh.start(snapshot=base.snapshot)
        fresh.ok(f"hostname {name}; echo {name} > /etc/hostname")
        return fresh

    yield board
    for each in made:
        each.pull_the_plug()


@pytest.fixture(scope="session")
def operator(boards_ready: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorSide]:
    side = OperatorSide(tmp_path_factory.mktemp("operator"))
    yield side
    side.close()


def enrol(board: rig.Board, operator: OperatorSide, group: str = "boards") -> str:
    """Join the fleet as an owner does, with the token on standard input; the device's id."""
    board.put("/run/token", operator.token(group).encode(), mode=0o600)
    said = board.ok("fleet-agent enroll < /run/token && rm /run/token", timeout_s=180)
    device = said.split(" ", 1)[0]
    operator.online(device)
    return device
