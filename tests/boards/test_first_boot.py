"""A board that joins by itself: flashed, switched on, nothing typed. And its disk, copied to another board."""

import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import devicetree
import pytest
import rig
import stage
from conftest import Boards, need_engine
from operator_side import HELLO, OperatorSide
from stages import budget

BOOT_OFFSET, BOOT_END = 1 << 20, 65 << 20


@dataclass
class Flashed:
    """Images as they lie on cards, and boards with serial numbers to put them into."""

    image: stage.Image
    place: Path
    group: str

    def card(self, name: str, source: Path) -> Path:
        card = self.place / f"{name}.img"
        subprocess.run(["cp", "--sparse=always", str(source), str(card)], check=True)
        return card

    def board(self, serial: str, card: Path, *, append: str = "") -> rig.Board:
        machine = rig.MACHINES[self.image.architecture]
        place = self.place / serial
        place.mkdir()
        tree = devicetree.with_serial(machine.emulator, machine.options, serial, place / "tree.dtb")
        options = ("-dtb", str(tree))
        board = rig.Board(machine, self.image.kernel, self.image.initrd, card, place, append, options)
        board.format = "raw"
        return board


@pytest.fixture(scope="module")
def flashed(
    boards: Boards,
    image: Callable[[str], stage.Image],
    architecture: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Flashed:
    need_engine(architecture)
    boards.switch_off()  # the boards of these tests are in other hands
    return Flashed(image(architecture), tmp_path_factory.mktemp(f"cards-{architecture}"), f"cards-{architecture}")


@dataclass
class First:
    """A board that joined at its first boot, runs a component, and is off again."""

    card: Path
    token: str
    device: str
    key: str
    token_file_left: bool


@pytest.fixture(scope="module")
def first(flashed: Flashed, operator: OperatorSide) -> First:
    """Flash a card with a token, switch the board on, and type nothing."""
    card = flashed.card("first", flashed.image.disk)
    token = operator.token(flashed.group)
    operator.fleet("image", "prepare", str(card), "--token", token)
    assert holds(card, token)
    board = flashed.board("10000000c0ffee01", card)
    try:
        with budget("first boot with a token on the boot partition", 150):
            board.start()
            device = joined_as(operator, "-c0ffee01")
        token_file_left = board.run("ls /boot/firmware/wasmfleet.token").status == 0
        key = key_of(board)
        operator.pushed(operator.fresh("1"), group=flashed.group)
        operator.answers(board.port, "1")
        board.shut_down()
    finally:
        board.pull_the_plug()
    return First(card, token, device, key, token_file_left)


def joined_as(operator: OperatorSide, tail: str) -> str:
    """Wait until a board whose name ends so is online; its device id."""

    def seen() -> str | None:
        rows = operator.scene.client.devices().devices
        return next((row.id for row in rows if row.online and row.name.endswith(tail)), None)

    return operator.until(f"a board named *{tail} is online", seen, timeout_s=300)


def online(operator: OperatorSide) -> set[str]:
    return {row.id for row in operator.scene.client.devices().devices if row.online}


def holds(card: Path, text: str) -> bool:
    """Whether a text lies anywhere on a card's boot partition, in files or between them."""
    with card.open("rb") as file:
        return text.encode() in file.read(BOOT_END)


def key_of(board: rig.Board) -> str:
    return board.ok("sha256sum /var/lib/wasmfleet-agent/identity/device.key").split()[0]


def test_a_card_with_a_token_joins_and_keeps_no_token(first: First) -> None:
    assert not first.token_file_left
    assert not holds(first.card, first.token), "the token is nowhere on the boot partition"


def test_a_copy_with_a_token_is_another_board(flashed: Flashed, first: First, operator: OperatorSide) -> None:
    copy = flashed.card("copy", first.card)
    token = operator.token(flashed.group)
    word = f"wasmfleet.token={token}"
    put(copy, "cmdline.txt", f"console=tty1 {word} quiet\n")
    board = flashed.board("10000000c0ffee02", copy, append=word)
    try:
        with budget("first boot of a copy, with a token on the kernel's command line", 150):
            board.start()
            clone = joined_as(operator, "-c0ffee02")
        assert clone != first.device
        assert key_of(board) != first.key, "two boards with one key are none"
        assert board.ok("cat /boot/firmware/cmdline.txt") == "console=tty1 quiet"
        # what it runs, it was told itself
        operator.until("the copy runs its group's component", lambda: _runs(operator, clone))
        board.shut_down()
        assert not holds(copy, token)
    finally:
        board.pull_the_plug()
    assert operator.device(first.device).id == first.device, "the board that was copied is still itself"


def test_a_copy_without_a_token_is_nobody(flashed: Flashed, first: First, operator: OperatorSide) -> None:
    copy = flashed.card("third", first.card)
    board = flashed.board("10000000c0ffee03", copy)
    operator.offline(first.device)
    before = online(operator)
    try:
        with budget("boot of a copy without a token", 120):
            board.start()
            board.settle()
        said = board.run("systemctl status fleet-agent --no-pager; journalctl -u fleet-agent --no-pager").text
        assert "copied" in said
    finally:
        board.pull_the_plug()
    assert online(operator) <= before, "it has not joined, and is not taken for the board that it was copied from"


def put(card: Path, name: str, text: str) -> None:
    """Write a file on a card's boot partition, as whoever flashes it may."""
    command = ["mcopy", "-o", "-i", f"{card}@@{BOOT_OFFSET}", "-", f"::{name}"]
    subprocess.run(command, input=text.encode(), check=True)


def _runs(operator: OperatorSide, device: str) -> bool | None:
    return True if any(each.instance == HELLO for each in operator.device(device).instances) else None
