"""`fleet image prepare`: the token lies where the device will look for it, and whatever is not an image is named."""

import shutil
import struct
import subprocess
import uuid
from datetime import UTC, datetime, timedelta

import pytest
from click.testing import CliRunner

from agent.identity import identity
from fleet.cli import bundle
from fleet.cli.main import main
from fleet.protocol.messages import Token

MIB = 1 << 20
TOOLS = ("mkfs.fat", "mcopy", "mtype")
needs_tools = pytest.mark.skipif(
    not all(shutil.which(tool, path="/usr/sbin:/sbin:/usr/bin:/bin") for tool in TOOLS),
    reason="mkfs.fat or mtools is missing: apt-get install dosfstools mtools",
)


def token(**changes):
    now = datetime.now(UTC)
    facts = {
        "url": "https://fleet.example.com:8743",
        "fleet": "harbour",
        "ca_sha256": "0" * 64,
        "root_sha256": "1" * 64,
        "floor": now,
        "expires": now + timedelta(hours=1),
        "secret": "s" * 40,
    }
    return Token(**(facts | changes)).encode()


def fat(path, offset):
    command = ["/usr/sbin/mkfs.fat", "-F", "16", "-s", "1", "--offset", str(offset // 512), str(path), str(5 * 1024)]
    subprocess.run(command, check=True, capture_output=True)


def master_boot_record(*partitions):
    """Partitions as (type, start in MiB, size in MiB)."""
    entries = [
        struct.pack("<B3sB3sII", 0, b"\0" * 3, kind, b"\0" * 3, start * 2048, size * 2048)
        for kind, start, size in partitions
    ]
    return b"\0" * 446 + b"".join(entries).ljust(64, b"\0") + b"\x55\xaa"


@pytest.fixture
def raspios(tmp_path):
    """As Raspberry Pi OS comes: a FAT boot partition first, and Linux behind it."""
    path = tmp_path / "raspios.img"
    path.write_bytes(master_boot_record((0x0C, 4, 6), (0x83, 10, 2)).ljust(12 * MIB, b"\0"))
    fat(path, 4 * MIB)
    return path


@pytest.fixture
def efi(tmp_path):
    """A GPT with a Linux partition first and the EFI system partition behind it."""

    def entry(kind, start, end):
        return (uuid.UUID(kind).bytes_le + uuid.uuid4().bytes_le + struct.pack("<QQ", start, end)).ljust(128, b"\0")

    header = b"EFI PART".ljust(72, b"\0") + struct.pack("<QII", 2, 128, 128)
    entries = entry("0fc63daf-8483-4772-8e79-3d69d8477de4", 2048, 6143) + entry(
        "c12a7328-f81f-11d2-ba4b-00a0c93ec93b", 6144, 16383
    )
    path = tmp_path / "efi.img"
    path.write_bytes((master_boot_record((0xEE, 0, 1)) + header.ljust(512, b"\0") + entries).ljust(12 * MIB, b"\0"))
    fat(path, 3 * MIB)
    return path


def run(*arguments, stdin=""):
    return CliRunner().invoke(main, ["image", "prepare", *map(str, arguments)], input=stdin)


def on_card(path, offset):
    command = ["mtype", "-i", f"{path}@@{offset}", f"::{identity.NAME}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_tools
@pytest.mark.parametrize(("card", "offset"), [("raspios", 4 * MIB), ("efi", 3 * MIB)])
def test_the_token_lies_where_the_device_looks_for_it(request, card, offset):
    path, text = request.getfixturevalue(card), token()
    done = run(path, "--token", text)
    assert done.exit_code == 0, done.output
    assert "harbour" in done.output
    assert on_card(path, offset) == text + "\n"
    # and a second one takes its place
    again = token(fleet="other")
    assert run(path, "--token", "-", stdin=again + "\n").exit_code == 0
    assert on_card(path, offset) == again + "\n"


@needs_tools
def test_nothing_else_of_the_image_is_touched(raspios):
    before = raspios.read_bytes()
    assert run(raspios, "--token", token()).exit_code == 0
    after = raspios.read_bytes()
    assert len(after) == len(before)
    assert after[: 4 * MIB] == before[: 4 * MIB]
    assert after[10 * MIB :] == before[10 * MIB :]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xfd7zXZ\0" + b"x" * 600, "compressed with xz; unpack it first"),
        (b"no image at all", "has no partition table"),
        (master_boot_record((0x83, 1, 2)).ljust(4 * MIB, b"\0"), "has no FAT partition"),
        (master_boot_record((0x0C, 1, 2)).ljust(4 * MIB, b"\0"), "has no FAT partition"),  # never formatted
        (master_boot_record((0xEE, 0, 1)), "has no FAT partition"),  # and the GPT is missing
        (None, "No such file"),
    ],
)
def test_what_is_no_image_is_named(tmp_path, content, said):
    path = tmp_path / "card.img"
    if content is not None:
        path.write_bytes(content)
    done = run(path, "--token", token())
    assert done.exit_code == 2
    assert said.lower() in done.output.lower()
    assert "Traceback" not in done.output


def test_a_token_that_no_device_would_take_is_refused_here(tmp_path):
    card = tmp_path / "card.img"
    assert "damaged" in run(card, "--token", "wf1.damaged").output
    old = token(expires=datetime.now(UTC) - timedelta(minutes=1))
    done = run(card, "--token", old)
    assert (done.exit_code, "expired" in done.output) == (2, True)


def test_the_device_and_the_operator_mean_the_same_file():
    assert bundle.NAME == identity.NAME


@pytest.mark.parametrize("word", ["nonsense", "wf1.AAAA"])
def test_a_bad_token_is_refused_with_one_way_to_get_another(word, fleet, tmp_path):
    result = fleet("image", "prepare", str(tmp_path / "card.img"), "--token", word)
    assert result.exit_code == 2
    assert result.stderr.count("fleet enroll-token") == 1
