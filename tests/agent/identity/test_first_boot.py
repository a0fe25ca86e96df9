"""First boot: sources of the token, its erasure after use, and detection of copied disks."""

import stat
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest

from agent import cli
from agent.identity import identity
from agent.identity.identity import Identity
from fleet.protocol import names
from fleet.protocol.messages import Token
from tests.agent.enrolled_device import NOW, enrolled

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
def device(tmp_path):
    for name in ("credentials", "firmware", "boot"):
        (tmp_path / name).mkdir()
    (tmp_path / "cmdline").write_text("console=tty1 root=/dev/vda\n")
    return tmp_path


def find(device):
    return identity.find_token(
        credentials=str(device / "credentials"),
        boot=(device / "firmware", device / "boot"),
        command_line=device / "cmdline",
    )


def test_a_device_without_a_token_finds_none(device):
    assert find(device) is None
    (device / "boot" / "wasmfleet.token").write_text("")
    assert find(device) is None


def test_a_token_on_the_boot_partition_is_used_and_erased(device):
    path = device / "boot" / "wasmfleet.token"
    path.write_text("wf1.abc\n")
    found = find(device)
    assert (found.text, found.file) == ("wf1.abc", path)
    descriptor = path.open("rb")  # still open elsewhere: the bytes are erased nevertheless
    assert identity.erase(found)
    assert not path.exists()
    assert descriptor.read().strip(b"\0") == b""


def test_a_token_is_removed_from_the_kernels_command_line(device):
    line = "console=tty1 wasmfleet.token=wf1.abc root=/dev/vda"
    (device / "cmdline").write_text(line)
    (device / "firmware" / "cmdline.txt").write_text(line)
    (device / "firmware" / "cmdline.txt").chmod(0o640)
    found = find(device)
    assert found.text == "wf1.abc"
    old = (device / "firmware" / "cmdline.txt").open("rb")  # bytes that a FAT would leave between its files
    assert identity.erase(found)
    assert (device / "firmware" / "cmdline.txt").read_text() == "console=tty1 root=/dev/vda\n"
    assert stat.S_IMODE((device / "firmware" / "cmdline.txt").stat().st_mode) == 0o640
    assert old.read().strip(b"\0") == b""


def test_a_credential_is_preferred_and_not_erased(device):
    (device / "credentials" / "wasmfleet.token").write_text("wf1.credential")
    (device / "boot" / "wasmfleet.token").write_text("wf1.file")
    found = find(device)
    assert found.text == "wf1.credential"
    assert not identity.erase(found)


def test_a_token_that_cannot_be_erased_is_reported(device):
    (device / "cmdline").write_text("wasmfleet.token=wf1.abc")
    assert not identity.erase(find(device))


def machine(tmp_path, **values):
    sources = {}
    for name, value in values.items():
        sources[name] = tmp_path / name
        if value is not None:
            sources[name].write_text(value)
    return sources


def test_the_serial_is_the_preferred_machine_id(tmp_path):
    assert identity.machine(machine(tmp_path, serial="1000abc\0", id="xy")) == "serial:1000abc"
    assert identity.machine(machine(tmp_path, dmi=None, id="xy\n")) == "id:xy"
    assert identity.machine({}) == ""


@pytest.mark.parametrize(
    ("enrolled_on", "here", "copy"),
    [
        ("serial:1ab", {"serial": "1ab"}, False),
        ("serial:1ab", {"serial": "2ab"}, True),
        # The agent's user may not be able to read root's source: another source must not lead to a conclusion.
        ("dmi:1ab", {"dmi": None, "id": "xy"}, False),
        ("", {"serial": "2ab"}, False),
        ("id:1ab", {"id": "2ab"}, False),
    ],
)
def test_a_copied_disk_is_detected(tmp_path, enrolled_on, here, copy):
    who = msgspec.structs.replace(WHO, machine=enrolled_on)
    assert identity.is_copied_disk(who, machine(tmp_path, **here)) is copy


ENROLLED = {"serial": "1000abc", "dmi": "0b1e-4711", "id": "aabb"}


@pytest.mark.parametrize(
    ("here", "found"),
    [
        ({}, "same"),  # nothing speaks against it
        ({"id": "ccdd"}, "doubtful"),
        ({"id": "uninitialized"}, "same"),
        ({"id": ""}, "same"),
        ({"serial": "1000abc", "id": "ccdd"}, "same"),
        ({"serial": "1000abd", "id": "aabb"}, "copied"),
        ({"serial": "0000000000000000", "id": "aabb"}, "same"),
        ({"dmi": "03000200-0400-0500-0006-000700080009"}, "same"),
        ({"dmi": "To be filled by O.E.M."}, "same"),
        ({"dmi": "ffffffff-ffff-ffff-ffff-ffffffffffff"}, "same"),
        ({"serial": "1000abc", "dmi": "9999-4712"}, "doubtful"),  # a part was replaced
        ({"serial": "1000abd", "dmi": "9999-4712"}, "copied"),
        ({"soc": "77ab"}, "same"),  # a kernel that tells more than the one before
    ],
)
def test_an_identity_follows_the_ids_of_the_hardware(tmp_path, here, found):
    who = msgspec.structs.replace(WHO, machine="serial:1000abc", evidence=ENROLLED)
    sources = machine(tmp_path, **here)
    assert identity.origin(who, sources) == found
    assert bool(identity.doubt(who, sources)) == (found == "doubtful")


def test_a_machine_id_in_memory_is_no_evidence():
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:  # as systemd has it where /etc is read-only
        file.write(b"0123456789abcdef0123456789abcdef")
        file.flush()
        assert identity.evidence({"id": Path(file.name)}) == {}


@pytest.mark.parametrize(
    ("machine", "name"),
    [
        ("serial:10000000DEADBEEF", "gate-deadbeef"),
        ("serial:7", "gate-7"),
        ("dmi:0b1e...", "gate"),  # these do not exist on any device
        ("id:0123456789abcdef", "gate"),
        ("", "gate"),
    ],
)
def test_the_default_name_contains_the_serial(machine, name):
    assert identity.name_of("gate", machine) == name


def test_a_long_host_name_leaves_room_for_the_serial_and_the_key():
    name = identity.name_of("x" * 54, "serial:10000000deadbeef")
    assert name.endswith("x-deadbeef")
    names.check_device(names.device_id(name, b"key"))


def test_a_token_file_of_zeros_is_none(device):
    """After a power cut in the middle of its erasure."""
    (device / "boot" / "wasmfleet.token").write_bytes(b"\0" * 64)
    assert find(device) is None


@pytest.mark.parametrize(("floor", "left"), [(NOW, False), (NOW - timedelta(days=1), True)])
def test_a_token_that_was_used_before_a_power_cut_is_erased_at_the_next_boot(
    device, tmp_path, monkeypatch, floor, left
):
    """Another token stays: its owner may mean something by it."""
    made, store = enrolled(tmp_path / "device")
    store.close()
    token = Token(
        url="https://127.0.0.1:1", fleet="f", ca_sha256="0" * 64, root_sha256="0" * 64, floor=floor,
        expires=NOW + timedelta(days=1), secret="hush",
    )  # fmt: skip
    path = device / "boot" / "wasmfleet.token"
    path.write_text(token.encode())
    found = find(device)
    monkeypatch.setattr(identity, "find_token", lambda **_: found)
    (tmp_path / "agent.toml").touch()
    places = ("--state", made.places.state, "--runtime", made.places.runtime, "--config", tmp_path / "agent.toml")
    assert cli.main(["enroll", "--first-boot", *map(str, places)]) == 0
    assert path.exists() == left
