"""Artifacts: files named by the sha256 of their bytes. An upload becomes a file only when its hash is its name."""

import hashlib
import os
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from starlette.concurrency import run_in_threadpool

from fleet.protocol import caps, names

_BLOCK_BYTES: Final = 1 << 20


class ArtifactError(Exception):
    """An upload that cannot be kept; one sentence for people."""


@dataclass(frozen=True, slots=True)
class Stored:
    """An artifact on disk; `new` is false when it was there before."""

    sha256: str
    length: int
    new: bool


class Artifacts:
    """The directory of artifacts."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        for left_over in directory.glob(".upload-*"):
            left_over.unlink(missing_ok=True)

    def path(self, sha256: str) -> Path | None:
        """The file of an artifact; None for none."""
        path = self._directory / names.check_sha256(sha256)
        return path if path.is_file() else None

    async def store(self, sha256: str, chunks: AsyncIterator[bytes]) -> Stored:
        """Keep what comes, if it is what its name says. Written as it comes, flushed to disk before it counts.

        Raises:
            ArtifactError: too large, or the bytes have another hash.
        """
        path = self._directory / names.check_sha256(sha256)
        beside = self._directory / f".upload-{secrets.token_hex(8)}"
        digest, length = hashlib.sha256(), 0
        try:
            with beside.open("xb") as file:
                async for block in _blocks(chunks):
                    length += len(block)
                    if length > caps.ARTIFACT_MAX_BYTES:
                        raise ArtifactError(
                            f"more than {caps.ARTIFACT_MAX_BYTES >> 20} MiB: a component of that size fits no board"
                        )
                    await run_in_threadpool(_take, file, digest, block)
                await run_in_threadpool(_flush, file)
            if digest.hexdigest() != sha256:
                raise ArtifactError(
                    f"the {length} bytes that came have the sha256 {digest.hexdigest()}, not {sha256}: send them again"
                )
            new = not path.exists()
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        return Stored(sha256, length, new)


async def _blocks(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    pending: list[bytes] = []
    size = 0
    async for chunk in chunks:
        pending.append(chunk)
        size += len(chunk)
        if size >= _BLOCK_BYTES:
            yield b"".join(pending)
            pending, size = [], 0
    if pending:
        yield b"".join(pending)


def _take(file: Any, digest: Any, block: bytes) -> None:
    file.write(block)
    digest.update(block)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
