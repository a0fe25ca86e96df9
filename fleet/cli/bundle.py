"""`fleet bundle create`: what a group's boards should run, as one file for boards that no network reaches."""

import hashlib
import io
import os
import tarfile
from datetime import UTC, datetime
from pathlib import Path

import click
import msgspec

from fleet.cli import complete, out
from fleet.cli.base import Exit, Fault, Options, command
from fleet.cli.home import Operator, operator
from fleet.cli.prepare import read_file
from fleet.client import Client
from fleet.protocol import bundle, caps
from fleet.protocol.api import DeviceRow
from fleet.protocol.codes import RejectCode
from signing.errors import FetchNotFound, Rejected
from signing.facts import Facts
from signing.trust import TrustedSet


@click.group("bundle", short_help="Carry updates to boards that no network reaches")
def bundles() -> None:
    """Carry updates to boards that no network reaches."""


@command(
    "create",
    examples="fleet bundle create --group edge-eu -o update.tar\n"
    "fleet bundle create --device gate-7-1f2e3d4c -o gate-7.tar     (with its secrets)\n"
    "sudo fleet-agent apply update.tar                (on the board)",
)
@click.option("--group", default="", shell_complete=complete.groups, help="Whose boards; without their secrets")
@click.option(
    "--device",
    "named",
    multiple=True,
    shell_complete=complete.devices,
    metavar="ID",
    help="This board, with its secrets in boxes that it alone can open; may be given more than once",
)
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The file to write"
)
def create(options: Options, *, group: str, named: tuple[str, ...], output: Path) -> None:
    """Put what a group's boards should run into one file: assignments, metadata and components.

    Everything is verified from this machine's pinned root as it is collected, and a board verifies it again. Deploy
    first: a board that cannot be reached is offered its assignment all the same. Secrets go with boards that are named
    one by one, and nobody else can open them.
    """
    if not group and not named:
        raise click.UsageError("Name a --group, or boards with --device.")
    who = operator(options)
    with who.client() as client:
        files, boards, left, good = _collect(who, client, group, named)
    if not boards:
        raise Fault(
            f"nothing was ever assigned to {group or ', '.join(named)}", action="fleet deploy does", code=Exit.REFUSED
        )
    size = _write(output, files)
    if options.json:
        out.show_json({"file": str(output), "bytes": size, "boards": boards, "left_out": left, "good_until": good})
        return
    out.say(options, f"{output}: {out.size(size)}, for {', '.join(boards)}")
    out.say(
        options,
        f"  good until {good['bundles']:%Y-%m-%d %H:%M} UTC; "
        f"until {good['late_bundles']:%Y-%m-%d} where the board's owner allows late bundles",
    )
    for device in left:
        out.say(options, f"  left out: {device}, to which nothing was ever assigned")


def _collect(
    who: Operator, client: Client, group: str, named: tuple[str, ...]
) -> tuple[dict[str, bytes], list[str], list[str], dict[str, datetime]]:
    """The members of the bundle, the boards in it, those that have nothing to run, and until when it is good."""
    files: dict[str, bytes] = {bundle.HEAD: msgspec.json.encode({"v": bundle.VERSION})}

    def fetch(name: str, _max_bytes: int) -> bytes:
        data = client.tuf(name)
        if data is None:
            raise FetchNotFound(name)
        files[bundle.metadata(name)] = data
        return data

    trusted = TrustedSet(root=read_file(who.root, caps.ROOT_MAX_BYTES), fetch=fetch)
    now, fleet = datetime.now(UTC), client.status().fleet
    offline: list[datetime] = []
    boards: list[str] = []
    left: list[str] = []
    try:
        trusted.refresh(facts=Facts(), now=now)
        for row in _rows(client, group, named):
            envelope = client.desired(row.id)
            if envelope is None:
                left.append(row.id)
                continue
            accepted = trusted.accept(envelope, fleet=fleet, device=row.id, facts=Facts(), now=now)
            offline.append(accepted.assignment.expires)
            for item in accepted.assignment.items:
                trusted.lookup(item.target)
                if bundle.artifact(item.sha256) not in files:
                    files[bundle.artifact(item.sha256)] = _artifact(client, item.sha256)
                for ref in item.secrets if row.id in named else ():
                    files[bundle.secret(ref.sha256)] = _box(client, row.id, ref.sha256)
            files[bundle.desired(row.id)] = envelope
            boards.append(row.id)
        ends = trusted.expiries()
    except Rejected as error:
        raise Fault("what the server shows does not verify", error.message, code=Exit.REFUSED) from None
    people = min((*offline, ends["root"], ends["targets"]))
    return files, boards, left, {"bundles": min((*ends.values(), *offline)), "late_bundles": people}


def _artifact(client: Client, sha256: str) -> bytes:
    data = client.artifact(sha256)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Rejected(RejectCode.HASH_MISMATCH, f"the server has other bytes than the artifact {sha256[:16]}")
    return data


def _rows(client: Client, group: str, named: tuple[str, ...]) -> list[DeviceRow]:
    """The boards of the group, and those that are named; an unknown name is the server's to refuse."""
    alone = [client.device(device).row for device in named]
    members = [row for row in client.devices().devices if group in row.groups] if group else []
    return [row for row in {row.id: row for row in (*alone, *members)}.values() if not row.revoked]


def _box(client: Client, device: str, sha256: str) -> bytes:
    box = client.box(device, sha256)
    if hashlib.sha256(box).hexdigest() != sha256:
        raise Rejected(RejectCode.HASH_MISMATCH, f"the server has another box for {device} than it assigned")
    return box


def _write(output: Path, files: dict[str, bytes]) -> int:
    """The tar, written beside and put in place; its size in bytes."""
    beside = output.with_name(f".{output.name}.new")
    try:
        with beside.open("wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for name, data in files.items():
                    member = tarfile.TarInfo(name)
                    member.size, member.mode = len(data), 0o644
                    tar.addfile(member, io.BytesIO(data))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        beside.replace(output)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise Fault(f"{output} cannot be written", error.strerror or str(error)) from None
    return size


bundles.add_command(create)
