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
    "sudo fleet-agent apply update.tar                (on the board)",
)
@click.option("--group", required=True, shell_complete=complete.groups, help="Whose boards")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The file to write"
)
def create(options: Options, *, group: str, output: Path) -> None:
    """Put what a group's boards should run into one file: assignments, metadata and components.

    Everything is verified from this machine's pinned root as it is collected, and a board verifies it again. Deploy
    first: a board that cannot be reached is offered its assignment all the same.
    """
    who = operator(options)
    with who.client() as client:
        files, boards, left, good = _collect(who, client, group)
    if not boards:
        raise Fault(f"nothing was ever assigned to a board of {group}", action="fleet deploy does", code=Exit.REFUSED)
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
    who: Operator, client: Client, group: str
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
        for row in client.devices().devices:
            if group not in row.groups or row.revoked:
                continue
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
