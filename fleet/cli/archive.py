"""`fleet device ID --diagnose`: an archive about a device, sealed by the device to a key made for this request."""

import hashlib
import os
import time
from pathlib import Path
from typing import Final

import click

from fleet.cli import operator, output
from fleet.cli.base import Exit, Fault, Options
from fleet.cli.operator import connect
from fleet.client import Client, ProblemError
from fleet.protocol import operator_api
from fleet.protocol.assignment import Diagnose
from fleet.protocol.files import atomic_write, create_exclusive
from fleet.protocol.messages import ArchiveView
from signing import sealing
from signing.errors import SigningError
from signing.sealing import ArchivePurpose

ANSWER_S: Final = 30
"""Time for a device to take up the command."""

SILENCE_S: Final = 360
"""Time without progress, longer than a device may take to make an archive."""

LOOK_S: Final = 5
_EVERY_PERCENT: Final = 10


def fetch(options: Options, device: str, file: Path, *, force: bool) -> None:
    """Ask a device for an archive, wait for it, open it and write it into a file.

    Raises:
        Fault: the file exists, the device is offline, does not answer, refuses or fails.
    """
    _check_file(file, force=force)
    key = sealing.archive_key()
    with connect(options) as client:
        _check_online(client, device)
        request = operator_api.CommandRequest(verb=Diagnose(recipient=sealing.public_key(key)))
        command = client.command(device, request).sequence
        _Progress(options, device).follow(client, command)
        sealed = client.archive(device, command=command)
    try:
        archive = sealing.open_archive(sealed, key=key, purpose=ArchivePurpose(device=device, command=command))
    except SigningError as error:
        raise Fault("the archive cannot be opened", str(error), "ask again", code=Exit.FAILED) from error
    _write(file, archive, force=force)
    sha256 = hashlib.sha256(sealed).hexdigest()
    output.result(
        options,
        {"device": device, "file": str(file), "bytes": len(archive), "command": command, "sealed_sha256": sha256},
        f"Wrote {file}, {output.size(len(archive))}: it holds names, addresses and log lines, and no key.\n"
        f"The device's history has command {command} with sha256 {sha256} of the sealed archive.",
    )


def _check_online(client: Client, device: str) -> None:
    row = client.device(device).row
    if row.revoked:
        raise Fault(f"{device} is revoked", "the server refuses whatever it sends", "enrol it anew", code=Exit.REFUSED)
    if not row.online:
        raise Fault(
            f"{device} is offline",
            f"seen {output.ago(row.seen_at)}; commands are not kept for later",
            "ask when it is back, or on the device: sudo fleet-agent diagnose -o FILE",
            code=Exit.FAILED,
        )


class _Progress:
    """Progress for people who wait, on standard error."""

    def __init__(self, options: Options, device: str) -> None:
        self._quiet = options.quiet or options.json
        self._device = device
        self._said = ""

    def follow(self, client: Client, command: int) -> None:
        """Return when the archive has come. Raises `Fault`."""
        known, patience, before = "", time.monotonic() + ANSWER_S, ArchiveView(step="asked")
        self._say(f"asked {self._device}")
        while True:
            view = operator.patiently(lambda known=known: _look(client, self._device, command, known))  # type: ignore[misc]
            if view != before:
                patience, before = time.monotonic() + SILENCE_S, view
            known = view.step
            match view.step:
                case "ready":
                    return
                case "refused":
                    raise Fault(f"{self._device} refused to send an archive", view.refused, code=Exit.REFUSED)
                case "failed":
                    raise Fault(f"{self._device} sent no archive", view.refused, "ask again", code=Exit.FAILED)
                case "made":
                    self._say(f"{self._device} makes the archive")
                case "sent":
                    percent = 100 * view.received // max(1, view.bytes) // _EVERY_PERCENT * _EVERY_PERCENT
                    self._say(f"{self._device} sends it: {percent} % of {output.size(view.bytes)}")
                case _:
                    pass
            if time.monotonic() >= patience:
                raise Fault(
                    f"{self._device} does not answer" if known == "asked" else f"{self._device} has stopped sending",
                    "the device is offline, or cannot reach the devices' port",
                    "fleet device shows when it was last seen",
                    code=Exit.FAILED,
                )

    def _say(self, text: str) -> None:
        if text != self._said and not self._quiet:
            click.echo(text, err=True)
        self._said = text


def _look(client: Client, device: str, command: int, known: str) -> ArchiveView:
    try:
        return client.archive_view(device, command=command, known=known, wait_s=LOOK_S)
    except ProblemError as error:
        if error.problem.type != "not-found":
            raise
        raise Fault(
            f"the server does not know of an archive of {device} any more",
            "it was started again, or somebody asked anew",
            "ask again",
            code=Exit.FAILED,
        ) from error


def _check_file(file: Path, *, force: bool) -> None:
    """Check that the archive can be written, before the device is asked. Raises `Fault`."""
    if os.path.lexists(file) and not (force and file.is_file() and not file.is_symlink()):
        why = "a file is not replaced without --force" if file.is_file() else "it is not a file"
        raise Fault(
            f"{file} exists", why, "choose another -o, or add --force" if file.is_file() else "choose another -o"
        )
    if not os.access(file.absolute().parent, os.W_OK | os.X_OK):
        raise Fault(f"cannot write {file}", "its directory does not exist, or is not writable", "choose another -o")


def _write(file: Path, data: bytes, *, force: bool) -> None:
    """Write a file whole, with mode 0600. Raises `Fault`."""
    try:
        (atomic_write if force else create_exclusive)(file, data, mode=0o600)
    except OSError as error:
        raise Fault(f"cannot write {file}", error.strerror or str(error), "choose another -o") from error
