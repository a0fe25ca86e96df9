"""First boot: where a token may lie, that it is erased after use, and that a copied disk is noticed."""

from datetime import UTC, datetime

import msgspec
import pytest

from agent.identity import identity
from agent.identity.identity import Identity
from fleet.protocol import names

WHO = Identity(
    device="crane-0a1b2c3d",
    fleet="harbour",
    group="",
    devices_url="https://127.0.0.1:1",
    mqtt=(),
    production=False,
    floor=datetime(2026, 1, 1, tzinfo=UTC),
)


@pytest.fixture
def board(tmp_path):
    for name in ("credentials", "firmware", "boot"):
        (tmp_path / name).mkdir()
    (tmp_path / "cmdline").write_text("console=tty1 root=/dev/vda\n")
    return tmp_path


def find(board):
    return identity.find_token(
        credentials=str(board / "credentials"),
        boot=(board / "firmware", board / "boot"),
        command_line=board / "cmdline",
    )


def test_a_board_without_a_token_has_nothing_to_do(board):
    assert find(board) is None
    (board / "boot" / "wasmfleet.token").write_text("")
    assert find(board) is None


def test_a_token_on_the_boot_partition_is_used_and_erased(board):
    path = board / "boot" / "wasmfleet.token"
    path.write_text("wf1.abc\n")
    found = find(board)
    assert (found.text, found.file) == ("wf1.abc", path)
    descriptor = path.open("rb")  # somebody still has it open: the bytes are gone all the same
    assert identity.erase(found)
    assert not path.exists()
    assert descriptor.read().strip(b"\0") == b""


def test_a_token_on_the_kernels_command_line_is_taken_out_of_it(board):
    line = "console=tty1 wasmfleet.token=wf1.abc root=/dev/vda"
    (board / "cmdline").write_text(line)
    (board / "firmware" / "cmdline.txt").write_text(line)
    found = find(board)
    assert found.text == "wf1.abc"
    old = (board / "firmware" / "cmdline.txt").open("rb")  # what a FAT would leave between its files
    assert identity.erase(found)
    assert (board / "firmware" / "cmdline.txt").read_text() == "console=tty1 root=/dev/vda\n"
    assert old.read().strip(b"\0") == b""


def test_a_credential_comes_first_and_is_nobodys_to_erase(board):
    (board / "credentials" / "wasmfleet.token").write_text("wf1.credential")
    (board / "boot" / "wasmfleet.token").write_text("wf1.file")
    found = find(board)
    assert found.text == "wf1.credential"
    assert not identity.erase(found)


def test_what_cannot_be_erased_is_said(board):
    (board / "cmdline").write_text("wasmfleet.token=wf1.abc")
    assert not identity.erase(find(board))


def machine(tmp_path, **values):
    sources = {}
    for name, value in values.items():
        sources[name] = tmp_path / name
        if value is not None:
            sources[name].write_text(value)
    return sources


def test_the_machines_serial_is_the_best_there_is(tmp_path):
    assert identity.machine(machine(tmp_path, serial="1000abc\0", id="x")) == "serial:1000abc"
    assert identity.machine(machine(tmp_path, dmi=None, id="x\n")) == "id:x"
    assert identity.machine({}) == ""


@pytest.mark.parametrize(
    ("enrolled_on", "here", "copy"),
    [
        ("serial:1", {"serial": "1"}, False),
        ("serial:1", {"serial": "2"}, True),
        # The agent's user may not read what root could: no conclusion is drawn from another source.
        ("dmi:1", {"dmi": None, "id": "x"}, False),
        ("", {"serial": "2"}, False),
    ],
)
def test_a_copied_disk_is_noticed(tmp_path, enrolled_on, here, copy):
    who = msgspec.structs.replace(WHO, machine=enrolled_on)
    assert identity.is_copied_disk(who, machine(tmp_path, **here)) is copy


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ("serial:10000000DEADBEEF", "gate-deadbeef"),
        ("serial:7", "gate-7"),
        ("dmi:0b1e...", "gate"),  # nobody reads these off a board
        ("id:0123456789abcdef", "gate"),
        ("", "gate"),
    ],
)
def test_a_board_that_nobody_named_is_called_by_its_serial(machine, name):
    assert identity.name_of("gate", machine) == name


def test_a_long_host_name_leaves_room_for_the_serial_and_the_key():
    name = identity.name_of("x" * 54, "serial:10000000deadbeef")
    assert name.endswith("x-deadbeef")
    names.check_device(names.device_id(name, b"key"))
