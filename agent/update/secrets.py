"""Secrets of this device: sealed boxes on disk, opened only when they are passed to the workers that need them.

Boxes are fetched by the sha256 in the signed assignment, and kept under it in the state directory, still sealed. An
opened value is in this process only while it is written into a sealed memfd, which the host passes on without reading.
No value is kept in memory, and no value is part of any message.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import msgspec

from agent import disk
from agent.disk import Write
from agent.host.ipc import framing
from agent.identity.identity import Identity
from agent.link.https import FetchError, Source
from fleet.protocol import bounds, files
from fleet.protocol.assignment import Item, SecretRef
from fleet.protocol.codes import RejectCode
from signing import sealing
from signing.errors import KeyFileError, Rejected
from signing.sealing import Purpose

PATH: Final = "/v1/secrets/"
_END: Final = ".box"


class SecretStore:
    """Store of the device's sealed secrets, and of the key that opens them."""

    def __init__(self, directory: Path, key: Path, identity: Identity) -> None:
        """Use boxes in `directory`, created with the first box, and the sealing key in the file `key`."""
        self._directory = directory
        self._key = key
        self._identity = identity

    def fetch(self, item: Item, source: Source) -> None:
        """Fetch every secret of an item and check that it opens, before anything is changed for the item.

        Raises:
            FetchError: a box cannot be fetched, is too large, or has another hash than assigned.
            Rejected: SECRET_UNOPENED and others of `signing.sealing.open_box`.
            OSError: a box cannot be written.
        """
        for ref in item.secrets:
            if self._read(ref) is None:
                box = _fetched(ref, source)
                disk.make_directory(Write.DIRECTORY, self._directory, mode=0o700)
                disk.write(Write.BOX, self._path(ref), box, mode=0o600)
        self.values(item)

    def descriptor(self, item: Item) -> int:
        """Return a sealed memfd with an item's values by name, as JSON; -1 without secrets. The caller closes it.

        Raises:
            Rejected: a box is missing, or does not open.
        """
        if not item.secrets:
            return -1
        values = memoryview(msgspec.json.encode(self.values(item)))

        def write(fd: int) -> None:
            written = 0
            while written < len(values):
                written += os.write(fd, values[written:])

        return framing.constant_memfd("secrets", write)

    def evict(self, keep: Iterable[Item]) -> None:
        """Remove the boxes that none of these items uses."""
        names = {self._path(ref).name for item in keep for ref in item.secrets}
        with contextlib.suppress(OSError):
            for path in list(self._directory.iterdir()):
                if path.suffix == _END and path.name not in names:
                    disk.remove(Write.BOX_EVICTED, path)

    def values(self, item: Item) -> dict[str, str]:
        """Return an item's secrets by name. Raises `Rejected`: a box is missing, or does not open."""
        if not item.secrets:
            return {}
        try:
            key = sealing.load(files.read(self._key))
        except (OSError, KeyFileError) as error:
            raise Rejected(RejectCode.SECRET_UNOPENED, f"the sealing key cannot be used: {error}") from error
        values = {}
        for ref in item.secrets:
            box = self._read(ref)
            if box is None:
                raise Rejected(RejectCode.NOT_FOUND, f"the box of the secret {ref.name} is not on this device's disk")
            purpose = Purpose(
                fleet=self._identity.fleet,
                device=self._identity.device,
                instance=item.instance,
                name=ref.name,
                version=ref.version,
            )
            values[ref.name] = sealing.open_box(box, key=key, purpose=purpose)
        return values

    def _path(self, ref: SecretRef) -> Path:
        return self._directory / f"{ref.sha256}{_END}"

    def _read(self, ref: SecretRef) -> bytes | None:
        """Read a box; None if it is missing, or was changed on disk."""
        try:
            with files.open_to_read(self._path(ref)) as file:
                box = file.read(bounds.SECRET_BOX_MAX_BYTES + 1)
        except OSError:
            return None
        return box if hashlib.sha256(box).hexdigest() == ref.sha256 else None


def _fetched(ref: SecretRef, source: Source) -> bytes:
    try:
        box = source.request("GET", f"{PATH}{ref.sha256}", max_bytes=bounds.SECRET_BOX_MAX_BYTES)
    except FetchError as error:
        raise FetchError(error.code, f"the secret {ref.name}: {error.message}", status=error.status) from error
    if hashlib.sha256(box).hexdigest() != ref.sha256:
        raise FetchError(RejectCode.HASH_MISMATCH, f"the secret {ref.name}: the box has another hash than assigned")
    return box
