"""bundle create; image prepare (media for devices without a network or console).

`fleet bundle create`: what a group's boards should run, as one file for boards that no network reaches.

`fleet image`: make an image for a card or disk ready, so that the board joins by itself at its first boot.

Nothing is mounted, so root is not needed: the boot partition is found in the image's partition table, and mtools
writes the one file into its FAT.
"""

import hashlib
import io
import shutil
import struct
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final
from uuid import UUID

import click
import msgspec

from fleet.cli import operator, output
from fleet.cli.base import Exit, Fault, Options, command, read_file, reason
from fleet.cli.operator import Operator, load_operator
from fleet.protocol import bounds, names
from fleet.protocol.codes import RejectCode
from fleet.protocol.files import move_into_place
from fleet.protocol.messages import BadTokenError, Token
from fleet.protocol.operator_api import DeviceRow
from signing.errors import FetchNotFound, Rejected

if TYPE_CHECKING:
    from fleet.client import Client


@click.group("bundle", short_help="Carry updates to boards that no network reaches")
def bundles() -> None:
    """Carry updates to boards that no network reaches."""


@command(
    "create",
    examples="fleet bundle create --group edge-eu -o update.tar\n"
    "fleet bundle create --device gate-7-1f2e3d4c -o gate-7.tar     (with its secrets)\n"
    "sudo fleet-agent apply update.tar                (on the board)",
)
@click.option("--group", default="", shell_complete=operator.groups, help="Whose boards; without their secrets")
@click.option(
    "--device",
    "named",
    multiple=True,
    shell_complete=operator.devices,
    metavar="ID",
    help="This board, with its secrets in boxes that it alone can open; may be given more than once",
)
@click.option(
    "-o", "--output", "target", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The file to write"
)
def create(options: Options, *, group: str, named: tuple[str, ...], target: Path) -> None:
    """Put what a group's boards should run into one file: assignments, metadata and components.

    Everything is verified from this machine's pinned root as it is collected, and a board verifies it again. Deploy
    first: a board that cannot be reached is offered its assignment all the same. Secrets go with boards that are named
    one by one, and nobody else can open them.
    """
    if not group and not named:
        raise click.UsageError("Name a --group, or boards with --device.")
    who = load_operator(options)
    with who.client() as client:
        files, boards, left, good = _collect(who, client, group, named)
    if not boards:
        raise Fault(
            f"nothing was ever assigned to {group or ', '.join(named)}", action="fleet deploy does", code=Exit.REFUSED
        )
    size = _write(target, files)
    if options.json:
        output.show_json({"file": str(target), "bytes": size, "boards": boards, "left_out": left, "good_until": good})
        return
    output.say(options, f"{target}: {output.size(size)}, for {', '.join(boards)}")
    output.say(
        options,
        f"  good until {good['bundles']:%Y-%m-%d %H:%M} UTC; "
        f"until {good['late_bundles']:%Y-%m-%d} where the board's owner allows late bundles",
    )
    for device in left:
        output.say(options, f"  left out: {device}, to which nothing was ever assigned")


def _collect(
    who: Operator, client: "Client", group: str, named: tuple[str, ...]
) -> tuple[dict[str, bytes], list[str], list[str], dict[str, datetime]]:
    """The members of the bundle, the boards in it, those that have nothing to run, and until when it is good."""
    from signing.state import VerifierState  # noqa: PLC0415 - tuf is not for --help, nor for images
    from signing.updater import MemoryState, Updater  # noqa: PLC0415 - the same
    from signing.verifier import accept_assignment, published  # noqa: PLC0415 - the same

    files: dict[str, bytes] = {names.HEAD: msgspec.json.encode({"v": names.VERSION})}

    def fetch(name: str, _max_bytes: int) -> bytes:
        data = client.tuf(name)
        if data is None:
            raise FetchNotFound(name)
        files[names.metadata(name)] = data
        return data

    # Nothing is remembered: the bundle must verify on a device that has seen nothing since its enrolment.
    root = read_file(who.root, bounds.ROOT_MAX_BYTES)
    updater = Updater(pinned_root=root, fetch=fetch, states=MemoryState())
    now, fleet = datetime.now(UTC), client.status().fleet
    offline: list[datetime] = []
    boards: list[str] = []
    left: list[str] = []
    try:
        trusted = updater.refresh(now)
        for row in _rows(client, group, named):
            envelope = client.desired(row.id)
            if envelope is None:
                left.append(row.id)
                continue
            accepted = accept_assignment(trusted, envelope, fleet=fleet, device=row.id, state=VerifierState(), now=now)
            offline.append(accepted.assignment.expires)
            for item in accepted.assignment.items:
                published(updater.find(item.target), item.target)
                if names.artifact(item.sha256) not in files:
                    files[names.artifact(item.sha256)] = _artifact(client, item.sha256)
                for ref in item.secrets if row.id in named else ():
                    files[names.secret(ref.sha256)] = _box(client, row.id, ref.sha256)
            files[names.desired(row.id)] = envelope
            boards.append(row.id)
        ends = trusted.expiries()
    except Rejected as error:
        raise Fault("what the server shows does not verify", error.message, code=Exit.REFUSED) from None
    people = min((*offline, ends["root"], ends["targets"]))
    return files, boards, left, {"bundles": min((*ends.values(), *offline)), "late_bundles": people}


def _artifact(client: "Client", sha256: str) -> bytes:
    data = client.artifact(sha256)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Rejected(RejectCode.HASH_MISMATCH, f"the server has other bytes than the artifact {sha256[:16]}")
    return data


def _rows(client: "Client", group: str, named: tuple[str, ...]) -> list[DeviceRow]:
    """The boards of the group, and those that are named; an unknown name is the server's to refuse."""
    alone = [client.device(device).row for device in named]
    members = [row for row in client.devices().devices if group in row.groups] if group else []
    return [row for row in {row.id: row for row in (*alone, *members)}.values() if not row.revoked]


def _box(client: "Client", device: str, sha256: str) -> bytes:
    box = client.box(device, sha256)
    if hashlib.sha256(box).hexdigest() != sha256:
        raise Rejected(RejectCode.HASH_MISMATCH, f"the server has another box for {device} than it assigned")
    return box


def _write(target: Path, files: dict[str, bytes]) -> int:
    """The tar, written beside and put in place; its size in bytes."""
    beside = target.with_name(f".{target.name}.new")
    try:
        with beside.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for name, data in files.items():
                    member = tarfile.TarInfo(name)
                    member.size, member.mode = len(data), 0o644
                    tar.addfile(member, io.BytesIO(data))
            size = file.tell()
        move_into_place(beside, target)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise Fault(f"cannot write {target}", reason(error), "check the path, and the space left there") from None
    return size


bundles.add_command(create)

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
    _write_image(img, offset, text)
    if options.json:
        output.show_json({"image": str(img), "file": NAME, "offset_bytes": offset, "fleet": token.fleet})
    else:
        output.say(
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
        raise Fault(f"cannot read {img}", reason(error), "check the path and its permissions") from None
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


def _write_image(img: Path, offset: int, text: str) -> None:
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
