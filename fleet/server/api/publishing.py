"""Handlers for TUF metadata and artifacts, on both listeners.

Artifacts are files named by the sha256 of their bytes; an upload becomes such a file only when its hash matches.
"""

import hashlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from fleet.protocol import bounds, names, operator_api
from fleet.protocol.files import move_into_place, set_aside
from fleet.protocol.operator_api import Refusal
from fleet.server.api import http
from fleet.server.api.http import answer, param
from fleet.server.api.trust import OnlineRoles
from fleet.server.rollout_controller import RolloutController
from fleet.server.tuf_repository import TufRepository
from fleet.store.store import AuditLog, Store
from signing import events

log = logging.getLogger(__name__)
_BLOCK_BYTES: Final = 1 << 20
_HEAD_BYTES: Final = 4096
"""Block of most file systems: what was not written before a power cut is zeros from there on."""


class ArtifactError(Exception):
    """The upload is refused; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Stored artifact; `new` is false when it was there before."""

    sha256: str
    length: int
    new: bool


class Artifacts:
    """Directory of artifacts; an upload may have `most_bytes`, of a data package `most_data_bytes`."""

    def __init__(
        self,
        directory: Path,
        *,
        most_bytes: int = bounds.ARTIFACT_MAX_BYTES,
        most_data_bytes: int = bounds.DATA_MAX_BYTES,
    ) -> None:
        self._directory, self.most_bytes, self.most_data_bytes = directory, most_bytes, most_data_bytes
        self._damaged: set[str] = set()
        for left_over in directory.glob(".upload-*"):
            left_over.unlink(missing_ok=True)

    def path(self, sha256: str, length: int | None) -> Path | None:
        """Return the file of an artifact; None for an unknown one.

        A file that a power cut left cut off or full of zeros is moved aside: devices would hold it against the version,
        and an upload of the same bytes replaces it. The bytes themselves are for devices to judge, by their hash.

        Args:
            sha256: of the artifact.
            length: as it was uploaded; None where that is not known.
        """
        path = self._directory / names.check_sha256(sha256)
        if not path.is_file():
            return None
        with path.open("rb") as file:
            whole = any(file.read(_HEAD_BYTES)) and length in {None, path.stat().st_size}
        if not whole:
            self._damaged.add(sha256)
            log.error("the artifact %s is damaged and was moved aside", set_aside(path))
            return None
        return path

    def problems(self) -> list[str]:
        """Return sentences for the status: artifacts that were found damaged, and not uploaded again."""
        return [
            f"the artifact {sha256[:16]} is damaged on this server: publish its version again with the same file"
            for sha256 in sorted(self._damaged)
        ]

    async def store(self, sha256: str, chunks: AsyncIterator[bytes], *, most_bytes: int | None = None) -> Stored:
        """Store an upload whose bytes have the named hash, flushed to disk before it gets its name.

        Raises:
            ArtifactError: too large, or the bytes have another hash.
        """
        most = self.most_bytes if most_bytes is None else most_bytes
        path = self._directory / names.check_sha256(sha256)
        beside = self._directory / f".upload-{secrets.token_hex(8)}"
        digest, length = hashlib.sha256(), 0
        try:
            with beside.open("xb") as file:
                async for block in _blocks(chunks):
                    length += len(block)
                    if length > most:
                        raise ArtifactError(f"more than {most} bytes, which is as much as this server takes")
                    await run_in_threadpool(_take, file, digest, block)
            if digest.hexdigest() != sha256:
                raise ArtifactError(
                    f"the {length} bytes that came have the sha256 {digest.hexdigest()}, not {sha256}: send them again"
                )
            new = not path.exists()
            await run_in_threadpool(move_into_place, beside, path)
            self._damaged.discard(sha256)
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


class PublishingHandlers:
    """Handlers of the operator API for components, metadata and artifacts."""

    def __init__(
        self,
        *,
        store: Store,
        repository: TufRepository,
        artifacts: Artifacts,
        controller: RolloutController,
        online: OnlineRoles,
        audit: AuditLog,
        clock: Callable[[], datetime],
    ) -> None:
        self._store, self._repository, self._artifacts = store, repository, artifacts
        self._controller, self._online = controller, online
        self._audit, self._clock = audit, clock

    async def components(self, _request: Request, _by: str) -> Response:
        """GET /v1/components."""
        rows = (
            operator_api.ComponentRow(
                target=release.name.path,
                namespace=release.name.namespace,
                name=release.name.name,
                version=release.name.version,
                length=release.length,
                sha256=release.sha256,
                kind="data" if release.manifest.is_data else "component",
            )
            for release in self._repository.releases()
        )
        return answer(operator_api.Components(components=tuple(rows)))

    async def tuf(self, request: Request, _by: str) -> Response:
        """GET /v1/tuf/{file}."""
        return tuf_file(self._repository, param(request, "file"))

    async def put_artifact(self, request: Request, by: str) -> Response:
        """PUT /v1/artifacts/{sha256}."""
        sha256 = names.check_sha256(param(request, "sha256"))
        declared = request.headers.get("content-length", "0")
        is_data = request.headers.get("content-type", "") == operator_api.DATA_MEDIA_TYPE
        most = self._artifacts.most_data_bytes if is_data else self._artifacts.most_bytes
        key, usual = ("data_bytes", bounds.DATA_MAX_BYTES) if is_data else ("artifact_bytes", bounds.ARTIFACT_MAX_BYTES)
        if declared.isdigit() and int(declared) > most:
            raise Refusal(
                413,
                "too-large",
                f"{declared} bytes, at most {most} are accepted",
                action="" if most == usual else f"raise limits.{key} in server.toml",
            )
        try:
            stored = await self._artifacts.store(sha256, request.stream(), most_bytes=most)
        except ArtifactError as error:
            raise Refusal(422, "hash-mismatch", str(error)) from error
        with self._store.atomic():
            if self._store.delivery.add_artifact(sha256, stored.length, by=by, now=self._now()):
                self._audit.record(by, "upload", sha256, f"{stored.length} bytes")
        return answer(
            operator_api.ArtifactReply(sha256=sha256, length=stored.length, new=stored.new), 201 if stored.new else 200
        )

    async def get_artifact(self, request: Request, _by: str) -> Response:
        """GET /v1/artifacts/{sha256}."""
        return artifact_file(self._artifacts, self._store, request)

    async def role(self, request: Request, by: str) -> Response:
        """POST /v1/roles/{namespace}."""
        namespace = names.check_label(param(request, "namespace"), "namespace")
        data = await http.read(request, bounds.TARGETS_MAX_BYTES)
        before = {release.name.path for release in self._repository.releases()}
        reply = await self._online.published(lambda: self._repository.publish(namespace, data, now=self._clock()))
        self._audit.record(by, "publish-role", namespace, f"version {reply.version}")
        if before - {release.name.path for release in self._repository.releases()}:
            # a release was revoked: remove it from every device that runs it
            self._controller.touch(row.id for row in self._store.devices.all())
        return answer(reply, 201)

    async def event(self, request: Request, by: str) -> Response:
        """POST /v1/signing-events: changes of root, targets and namespaces, published together or not at all."""
        data = await http.read(request, events.MAX_BYTES)
        reply = await self._online.published(lambda: self._repository.publish_event(data, now=self._clock()))
        self._audit.record(by, "publish-event", events.decode(data).name, events.decode(data).note[:200])
        # keys and namespaces may have changed: check every device's assignment against those trusted now
        self._controller.touch(row.id for row in self._store.devices.all())
        return answer(reply, 201)

    def _now(self) -> float:
        return self._clock().timestamp()


def tuf_file(repository: TufRepository, name: str) -> Response:
    """Serve a metadata file. Caches may keep all but the head, which never change."""
    data = repository.file(name)
    if data is None:
        raise Refusal(404, "not-found", f"the repository has no {name[:100]}")
    caching = "no-cache" if name == "timestamp.json" else "public, max-age=86400, immutable"
    return Response(data, media_type="application/json", headers={"cache-control": caching})


def artifact_file(artifacts: Artifacts, store: Store, request: Request) -> Response:
    """Serve an artifact, whole or by Range (RFC 9110, section 14); its hash is its entity tag."""
    sha256 = param(request, "sha256")
    path = artifacts.path(sha256, store.delivery.artifact(sha256))
    if path is None:
        raise Refusal(404, "not-found", f"there is no artifact {sha256}", action="upload it: fleet publish FILE")
    tag = f'"{sha256}"'
    headers = {"etag": tag, "cache-control": "public, max-age=31536000, immutable"}
    if request.headers.get("if-none-match") == tag:
        return Response(status_code=304, headers=headers)
    return FileResponse(path, media_type="application/wasm", headers=headers)
