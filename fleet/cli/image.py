"""`fleet image`: make an image for a card or disk ready, so that the board joins by itself at its first boot.

Nothing is mounted, so root is not needed: the boot partition is found in the image's partition table, and mtools
writes the one file into its FAT.
"""

import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Final
from uuid import UUID

import click

from fleet.cli import out
from fleet.cli.base import Exit, Fault, Options, command
from fleet.protocol.enrolment import BadTokenError, Token

NAME: Final = "wasmfleet.token"
"""What `fleet-agent enroll --first-boot` looks for."""

_SECTOR: Final = 512
_FAT_TYPES: Final = frozenset({0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E, 0xEF})
_GPT: Final = 0xEE
_GPT_FAT: Final = frozenset(
    {UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b"), UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")}
)
_GPT_ENTRIES_MAX: Final = 128
_PACKED: Final = {b"\xfd7zXZ\0": "xz", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


@command("prepare", examples="fleet enroll-token --group edge-eu --quiet | fleet image prepare raspios.img --token -")
@click.argument("img", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--token", "given", required=True, metavar="T", help="Of 'fleet enroll-token'; '-' reads standard input")
def prepare(options: Options, *, img: Path, given: str) -> Exit:
    """Put an enrolment token on the boot partition of the image (or card) IMG.

    The board that boots from it joins the fleet, and erases the token. A token is good for one board.
    """
    text = (sys.stdin.readline() if given == "-" else given).strip()
    try:
        token = Token.decode(text)
    except BadTokenError as error:
        raise Fault(str(error), action="'fleet enroll-token' makes one") from None
    if token.expires <= datetime.now(UTC):
        raise Fault(f"this token expired on {token.expires:%Y-%m-%d %H:%M} UTC", action="make another one")
    offset = boot_partition(img)
    _write(img, offset, text)
    if options.json:
        out.show_json({"image": str(img), "file": NAME, "offset_bytes": offset, "fleet": token.fleet})
    else:
        out.say(
            options,
            f"{img}: the board that boots from it joins the fleet {token.fleet}; "
            f"the token is good until {token.expires:%Y-%m-%d %H:%M} UTC.",
        )
    return Exit.OK


@click.group("image")
def image() -> None:
    """Images of cards and disks that boards boot from."""


image.add_command(prepare)


def boot_partition(img: Path) -> int:
    """Where the first FAT partition of an image begins, in bytes.

    Raises:
        Fault: it cannot be read, or has none; one line for people.
    """
    try:
        with img.open("rb") as file:
            head = file.read(_SECTOR)
            packed = next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)
            if packed:
                raise Fault(f"{img} is packed with {packed}", action="unpack it first")
            if head[510:] != b"\x55\xaa":
                raise Fault(f"{img} has no partition table", "it is no image of a card or disk")
            for start in _starts(file, head):
                file.seek(start * _SECTOR)
                if _is_fat(file.read(_SECTOR)):
                    return start * _SECTOR
    except OSError as error:
        raise Fault(f"cannot read {img}", error.strerror or str(error), "check the path and its permissions") from None
    raise Fault(f"{img} has no FAT partition", "that is where a board looks for its token")


def _starts(file: IO[bytes], head: bytes) -> Iterator[int]:
    """First sectors of the partitions that may be FAT: of a master boot record, or of a GPT behind one."""
    for place in range(446, 510, 16):
        kind, start = head[place + 4], struct.unpack_from("<I", head, place + 8)[0]
        if kind == _GPT:
            yield from _gpt_starts(file)
        elif kind in _FAT_TYPES:
            yield start


def _gpt_starts(file: IO[bytes]) -> Iterator[int]:
    file.seek(_SECTOR)
    header = file.read(_SECTOR)
    if header[:8] != b"EFI PART":
        return
    table, count, size = struct.unpack_from("<QII", header, 72)
    file.seek(table * _SECTOR)
    entries = file.read(min(count, _GPT_ENTRIES_MAX) * size)
    for place in range(0, len(entries), size or _SECTOR):
        if UUID(bytes_le=entries[place : place + 16]) in _GPT_FAT:
            yield struct.unpack_from("<Q", entries, place + 32)[0]


def _is_fat(sector: bytes) -> bool:
    """Whether a partition's first sector is a FAT file system's (its type is named at 54 or, for FAT32, at 82)."""
    return sector[510:] == b"\x55\xaa" and (sector[54:57] == b"FAT" or sector[82:85] == b"FAT")


def _write(img: Path, offset: int, text: str) -> None:
    mcopy = shutil.which("mcopy")
    if mcopy is None:
        raise Fault("mcopy is missing", "it writes into the image", "install mtools")
    done = subprocess.run(
        [mcopy, "-o", "-i", f"{img}@@{offset}", "-", f"::{NAME}"],
        input=f"{text}\n".encode(),
        capture_output=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "MTOOLS_SKIP_CHECK": "1"},
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise Fault(f"{img} cannot be written", said[-1] if said else "mcopy failed", "is it mounted, or read-only?")
