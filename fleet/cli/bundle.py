"""`fleet bundle create` and `fleet image prepare`: updates and enrolment by file, for devices without network.

Preparing an image needs no root: nothing is mounted. The boot partition is found in the image's partition table, and
mtools writes the one file into its FAT.
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
from typing import IO, TYPE_CHECKING, Final, NamedTuple
from uuid import UUID

import click
import msgspec

from fleet.cli import operator, output
from fleet.cli.base import FORCE_OPTION, Exit, Fault, Group, Options, command, new_file_option, reason
from fleet.cli.operator import Operator, load_operator
from fleet.protocol import names
from fleet.protocol.codes import RejectCode
from fleet.protocol.files import move_into_place, temporary_name
from fleet.protocol.messages import BadTokenError, Token
from fleet.protocol.operator_api import DeviceRow
from signing.errors import FetchNotFound, Rejected

if TYPE_CHECKING:
    from fleet.client import Client

NAME: Final = "wasmfleet.token"
"""File that `fleet-agent enroll --first-boot` looks for."""

_SECTOR: Final = 512
_FAT_TYPES: Final = frozenset({0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E, 0xEF})
_GPT: Final = 0xEE
_GPT_FAT: Final = frozenset(
    {UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b"), UUID("ebd0a0a2-b9e5-4433-87c0-68b6b72699c7")}
)
_GPT_ENTRIES_MAX: Final = 128
_PACKED: Final = {b"\xfd7zXZ\0": "xz", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"}


@click.group("bundle", cls=Group, short_help="Carry updates to devices that no network reaches")
def bundles() -> None:
    """Carry updates to devices that no network reaches."""


@command(
    "create",
    examples="fleet bundle create --group edge-eu -o update.tar\n"
    "fleet bundle create --device gate-7-1f2e3d4c -o gate-7.tar     (with its secrets)\n"
    "sudo fleet-agent apply update.tar                (on the device)",
)
@click.option(
    "--group",
    default="",
    shell_complete=operator.groups,
    metavar="NAME",
    help="Put in all devices of this group, without their secrets",
)
@click.option(
    "--device",
    "named",
    multiple=True,
    shell_complete=operator.devices,
    metavar="ID",
    help="Put in this device, with its secrets in boxes that it alone can open; repeatable",
)
@new_file_option("-o", "--output", "target", required=True, metavar="FILE", help="Write the bundle to this file")
@FORCE_OPTION
def create(options: Options, *, group: str, named: tuple[str, ...], target: Path) -> None:
    """Put what a group's devices should run into one file: assignments, metadata and components.

    Everything is verified from the root pinned on this machine as it is collected, and a device verifies it again.
    Deploy first: a device that is offline is offered its assignment all the same. Secrets are included for devices
    given with --device, and nobody else can open them.
    """
    if not group and not named:
        raise click.UsageError("Name a --group, or devices with --device.")
    who = load_operator(options)
    with who.client() as client:
        bundle = _collect(who, client, group, named)
    if not bundle.devices:
        raise Fault(
            f"nothing is assigned to {group or ', '.join(named)}",
            action="assign something first: fleet deploy",
            code=Exit.REFUSED,
        )
    size, good = _write(target, bundle.files), bundle.good_until
    if options.json:
        output.show_json(
            {
                "file": str(target),
                "bytes": size,
                "devices": bundle.devices,
                "left_out": bundle.left_out,
                "good_until": good,
            }
        )
        return
    output.say(options, f"{target}: {output.size(size)}, for {', '.join(bundle.devices)}")
    output.say(
        options,
        f"  valid until {good['bundles']:%Y-%m-%d %H:%M} UTC; "
        f"until {good['late_bundles']:%Y-%m-%d} where the device's owner allows late bundles",
    )
    for device in bundle.left_out:
        output.say(options, f"  left out: {device}, which has no assignment")


class _Bundle(NamedTuple):
    """Content of a bundle.

    Attributes:
        files: the members by name.
        devices: ids of its devices.
        left_out: devices without any assignment.
        good_until: end of validity: `bundles`, and `late_bundles` where a device's owner allows late bundles.
    """

    files: dict[str, bytes]
    devices: list[str]
    left_out: list[str]
    good_until: dict[str, datetime]


def _collect(who: Operator, client: "Client", group: str, named: tuple[str, ...]) -> _Bundle:
    """Fetch and verify all members of the bundle."""
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

    # No state is kept: the bundle must verify on a device that has fetched nothing since its enrolment.
    root = who.pinned_root()
    updater = Updater(pinned_root=root, fetch=fetch, states=MemoryState())
    now, fleet = datetime.now(UTC), client.status().fleet
    offline: list[datetime] = []
    devices: list[str] = []
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
            devices.append(row.id)
        ends = trusted.expiries()
    except Rejected as error:
        raise Fault(
            "cannot make the bundle: the server's files do not verify", error.message, code=Exit.REFUSED
        ) from None
    late = min((*offline, ends["root"], ends["targets"]))
    return _Bundle(files, devices, left, {"bundles": min((*ends.values(), *offline)), "late_bundles": late})


def _artifact(client: "Client", sha256: str) -> bytes:
    data = client.artifact(sha256)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Rejected(RejectCode.HASH_MISMATCH, f"the server holds other bytes than the artifact {sha256[:16]}")
    return data


def _rows(client: "Client", group: str, named: tuple[str, ...]) -> list[DeviceRow]:
    """Look up the devices of the group and those named; the server refuses unknown names."""
    alone = [client.device(device).row for device in named]
    members = [row for row in client.devices().devices if group in row.groups] if group else []
    if group and not members:
        client.policy(group)  # the server refuses a name that no group has
    return [row for row in {row.id: row for row in (*alone, *members)}.values() if not row.revoked]


def _box(client: "Client", device: str, sha256: str) -> bytes:
    box = client.box(device, sha256)
    if hashlib.sha256(box).hexdigest() != sha256:
        raise Rejected(RejectCode.HASH_MISMATCH, f"the server holds another box for {device} than it assigned")
    return box


def _write(target: Path, files: dict[str, bytes]) -> int:
    """Write the tar beside its target and move it into place; returns its size in bytes."""
    beside = temporary_name(target)
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


@command("prepare", examples="fleet enroll-token --group edge-eu --quiet | fleet image prepare raspios.img --token -")
@click.argument("img", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--token",
    "given",
    required=True,
    metavar="T",
    help="Token from 'fleet enroll-token'; '-' reads it from standard input",
)
def prepare(options: Options, *, img: Path, given: str) -> Exit:
    """Put an enrolment token on the boot partition of the image (or card) IMG.

    The device that boots from it joins the fleet and erases the token. A token admits one device.
    """
    text = (sys.stdin.readline() if given == "-" else given).strip()
    try:
        token = Token.decode(text)
    except BadTokenError as error:
        raise Fault(str(error), action="'fleet enroll-token' creates one") from None
    if token.expires <= datetime.now(UTC):
        raise Fault(
            f"this token expired on {token.expires:%Y-%m-%d %H:%M} UTC",
            action="create another one with fleet enroll-token",
        )
    offset = boot_partition(img)
    _write_image(img, offset, text)
    output.result(
        options,
        {"image": str(img), "file": NAME, "offset_bytes": offset, "fleet": token.fleet},
        f"{img}: the device that boots from it joins the fleet {token.fleet}; "
        f"the token is valid until {token.expires:%Y-%m-%d %H:%M} UTC.",
    )
    return Exit.OK


@click.group("image", cls=Group)
def image() -> None:
    """Prepare images of cards and disks that devices boot from."""


image.add_command(prepare)


def boot_partition(img: Path) -> int:
    """Find the first FAT partition of an image, and return its offset in bytes.

    Raises:
        Fault: the image cannot be read, or has no such partition.
    """
    try:
        with img.open("rb") as file:
            head = file.read(_SECTOR)
            packed = next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)
            if packed:
                raise Fault(f"{img} is compressed with {packed}", action="unpack it first")
            if head[510:] != b"\x55\xaa":
                raise Fault(f"{img} has no partition table", "it is not an image of a card or disk", "name a raw image")
            for start in _starts(file, head):
                file.seek(start * _SECTOR)
                if _is_fat(file.read(_SECTOR)):
                    return start * _SECTOR
    except OSError as error:
        raise Fault(f"cannot read {img}", reason(error), "check the path and its permissions") from None
    raise Fault(
        f"{img} has no FAT partition", "a device looks for its token on one", "use an image with a FAT boot partition"
    )


def _starts(file: IO[bytes], head: bytes) -> Iterator[int]:
    """Yield first sectors of partitions that may be FAT, from a master boot record or the GPT behind one."""
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
    """Recognise a FAT file system's first sector: the type stands at 54 or, for FAT32, at 82."""
    return sector[510:] == b"\x55\xaa" and (sector[54:57] == b"FAT" or sector[82:85] == b"FAT")


def _write_image(img: Path, offset: int, text: str) -> None:
    mcopy = shutil.which("mcopy")
    if mcopy is None:
        raise Fault("cannot write into the image", "mcopy is not installed", "install mtools")
    done = subprocess.run(
        [mcopy, "-o", "-i", f"{img}@@{offset}", "-", f"::{NAME}"],
        input=f"{text}\n".encode(),
        capture_output=True,
        check=False,
        env={"PATH": "/usr/bin:/bin", "MTOOLS_SKIP_CHECK": "1"},
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise Fault(
            f"cannot write into {img}",
            said[-1] if said else "mcopy failed",
            "check that it is neither mounted nor read-only",
        )
