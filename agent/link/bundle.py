"""Offline bundles: files for this device from a medium instead of the network, verified as if they had been fetched.

`stage` unpacks what concerns this device from an untrusted tar, with limits on everything, into `<state>/bundle`.
`Bundle` is the source of only those files, used to verify the bundle. `BundleSource` combines them with the network for
every other fetch, also at the same time. A FIFO in the state directory wakes a running agent.
"""

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Final

import msgspec

from agent import disk
from agent.disk import Write
from agent.link.https import FetchError, HttpsClient, finish
from fleet.protocol import files, names, wire
from fleet.protocol.assignment import Assignment
from fleet.protocol.bounds import Count
from fleet.protocol.codes import RejectCode
from signing import dsse
from signing.errors import Rejected

if TYPE_CHECKING:
    import tarfile

_TUF: Final = "/v1/tuf/"
_ARTIFACTS: Final = "/v1/artifacts/"
_SECRETS: Final = "/v1/secrets/"
_AWAY: Final = frozenset({RejectCode.UNREACHABLE, RejectCode.TOO_SLOW})


class BundleError(Exception):
    """The file is not a bundle, or not for this device; the message says what to do."""


class BundleVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """Verdict on a staged bundle: the version accepted, or the reason of the refusal."""

    version: Count = 0
    code: str = ""
    message: str = ""


class _Head(msgspec.Struct):
    v: Count


def stage(file: IO[bytes], directory: Path, *, device: str) -> None:
    """Unpack what concerns this device into `directory`, in place of an earlier bundle.

    Args:
        file: a tar, seekable.
        directory: replaced as a whole.
        device: this device's id.

    Raises:
        BundleError: not a bundle, another version of the layout, nothing for this device, or incomplete.
        OSError: the directory cannot be written.
    """
    import tarfile  # noqa: PLC0415 - for `fleet-agent apply` alone

    unpacked = directory.with_name(f"{directory.name}.new")
    disk.remove_tree(Write.BUNDLE_DROPPED, unpacked)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = _members(tar)
            _check_head(tar, members)
            wanted = _wanted(_read(tar, _of(device, members)))
            files = [name for name in members if name.startswith("tuf/")]
            files += [names.desired(device), *(name for name in wanted if name in members)]
            for name in files:
                _extract(tar, members[name], unpacked / name)
    except tarfile.TarError as error:
        disk.remove_tree(Write.BUNDLE_DROPPED, unpacked)
        raise BundleError(f"not a bundle: {error}; 'fleet bundle create' makes one") from error
    except (BundleError, OSError):
        disk.remove_tree(Write.BUNDLE_DROPPED, unpacked)
        raise
    disk.remove_tree(Write.BUNDLE_DROPPED, directory)
    disk.move(Write.BUNDLE, unpacked, directory)


def _members(tar: "tarfile.TarFile") -> "dict[str, tarfile.TarInfo]":
    found: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        limit = names.max_bytes(member.name)
        if not limit or not member.isreg() or member.name in found or len(found) >= names.MEMBERS_MAX:
            raise BundleError(f"not a bundle: unexpected file {member.name[:100]!r}")
        if member.size > limit:
            raise BundleError(f"{member.name} has {member.size} bytes, at most {limit} are accepted")
        found[member.name] = member
    return found


def _of(device: str, members: "dict[str, tarfile.TarInfo]") -> "tarfile.TarInfo":
    try:
        return members[names.desired(device)]
    except KeyError as error:
        message = f"the bundle has nothing for {device}: create one for the device's group with 'fleet bundle create'"
        raise BundleError(message) from error


def _read(tar: "tarfile.TarFile", member: "tarfile.TarInfo") -> bytes:
    source = tar.extractfile(member)
    assert source is not None
    return source.read()


def _check_head(tar: "tarfile.TarFile", members: "dict[str, tarfile.TarInfo]") -> None:
    try:
        head = msgspec.json.decode(_read(tar, members[names.HEAD]), type=_Head)
    except (KeyError, *wire.JSON_ERRORS) as error:
        raise BundleError("not a bundle: 'fleet bundle create' makes one") from error
    if head.v != names.VERSION:
        raise BundleError(f"the bundle has layout {head.v}, but this agent reads {names.VERSION}: upgrade the agent")


def _wanted(envelope: bytes) -> list[str]:
    """Return the artifacts and secrets that the assignment names, before it is verified."""
    try:
        items = wire.decode(Assignment, dsse.parse(envelope).payload).items
    except (Rejected, wire.WireError):
        return []
    named = [names.artifact(item.sha256) for item in items]
    named += [names.secret(ref.sha256) for item in items for ref in item.secrets]
    return [name for name in dict.fromkeys(named) if names.max_bytes(name)]


def _extract(tar: "tarfile.TarFile", member: "tarfile.TarInfo", into: Path) -> None:
    disk.make_directory(Write.DIRECTORY, into.parent, mode=0o700)
    source = tar.extractfile(member)
    assert source is not None
    with disk.open_file(Write.BUNDLE_FILE, into, begin=True) as file:
        shutil.copyfileobj(source, file)


@dataclass(frozen=True, slots=True)
class Bundle:
    """Unpacked bundle, as the only source of files: used to verify the bundle with its own timestamp."""

    directory: Path

    def exists(self) -> bool:
        """Return whether there is a bundle with metadata."""
        return (self.directory / names.metadata("timestamp.json")).exists()

    def envelope(self) -> bytes | None:
        """Return the assignment in the bundle; None if there is none, or another bundle takes its place just now."""
        found = sorted((self.directory / "desired").glob("*.json"))
        try:
            return files.read(found[0]) if found else None
        except FileNotFoundError:
            return None  # whoever stages the other bundle wakes the agent for it

    def done(self, outcome: BundleVerdict) -> None:
        """Record the verdict, and remove the assignment, so that it is not verified again."""
        disk.write(Write.BUNDLE_VERDICT, self.directory / "outcome.json", msgspec.json.encode(outcome), mode=0o600)
        disk.remove_tree(Write.BUNDLE_DONE, self.directory / "desired")

    def request(self, method: str, path: str, *, max_bytes: int) -> bytes:
        """Return a file of the bundle; raises `FetchError` (NOT_FOUND) if the bundle does not contain it."""
        data = self.find(path, max_bytes) if method == "GET" else None
        if data is None:
            raise FetchError(RejectCode.NOT_FOUND, f"{path} is not in the bundle")
        return data

    def find(self, path: str, max_bytes: int) -> bytes | None:
        """Return the metadata file or sealed secret of this path; None if the bundle has none."""
        if path.startswith(_TUF):
            name = names.metadata(path.removeprefix(_TUF))
        elif path.startswith(_SECRETS):
            name = names.secret(path.removeprefix(_SECRETS))
        else:
            return None
        if not names.max_bytes(name):
            return None
        try:
            with files.open_to_read(self.directory / name) as file:
                data = file.read(max_bytes + 1)
        except OSError:
            return None
        if len(data) > max_bytes:
            raise FetchError(RejectCode.TOO_LARGE, f"{name} in the bundle has more than {max_bytes} bytes")
        return data

    def artifact(self, path: str) -> Path | None:
        """Return the file of the artifact of this path; None if the bundle has none."""
        name = names.artifact(path.removeprefix(_ARTIFACTS))
        kept = self.directory / name
        return kept if names.max_bytes(name) and kept.is_file() else None


class BundleSource:
    """Network and bundle combined: the source of all files, except while the bundle itself is verified.

    A file with a version or a digest in its name is the same everywhere: taken from the bundle, else from the network.
    The timestamp is taken from the network, and from the bundle only while the network is unavailable. Everything else
    comes from the network. Immutable, so that any thread may fetch.

    Attributes:
        bundle: the bundle as the only source.
    """

    def __init__(self, https: HttpsClient, directory: Path) -> None:
        """Combine `https` with the bundle in `directory` (see `stage`), which may not exist."""
        self._https = https
        self.bundle = Bundle(directory)

    def request(
        self,
        method: str,
        path: str,
        *,
        max_bytes: int,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> bytes:
        """See `HttpsClient.request`."""
        kept = self.bundle.find(path, max_bytes) if method == "GET" else None
        if kept is not None and not path.endswith("/timestamp.json"):
            return kept
        try:
            return self._https.request(method, path, max_bytes=max_bytes, body=body, headers=headers)
        except FetchError as error:
            if kept is None or error.code not in _AWAY:
                raise
            return kept

    def download(
        self,
        path: str,
        into: Path,
        *,
        length: int,
        sha256: str,
        progress: Callable[[int], None] = lambda _received: None,
        cancelled: threading.Event | None = None,
    ) -> None:
        """See `HttpsClient.download`; a file in the bundle is moved, and hashed like a downloaded one."""
        kept = self.bundle.artifact(path)
        if kept is not None:
            part = into.with_name(into.name + ".part")
            try:
                disk.make_directory(Write.DIRECTORY, into.parent, mode=0o700)
                _move(kept, part)
                finish(part, into, length, sha256)
            except OSError as error:
                raise FetchError(RejectCode.INTERNAL, f"cannot write {into}: {error.strerror}") from error
            return
        self._https.download(path, into, length=length, sha256=sha256, progress=progress, cancelled=cancelled)


def _move(kept: Path, part: Path) -> None:
    """Move a file of the bundle; copy it where data packages are kept on another file system. Raises `OSError`."""
    try:
        disk.move(Write.BUNDLE_ARTIFACT, kept, part)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        with files.open_to_read(kept) as source, disk.open_file(Write.BUNDLE_FILE, part, begin=True) as target:
            shutil.copyfileobj(source, target)


def listen(path: Path) -> int:
    """Create the FIFO that wakes the agent, and return the descriptor to read from. Raises `OSError`."""
    if os.path.lexists(path) and not path.is_fifo():
        disk.set_aside(Write.WAKE, path)
    with contextlib.suppress(FileExistsError):
        disk.make_fifo(Write.WAKE, path, mode=0o600)
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def wake(path: Path) -> bool:
    """Notify the agent of a bundle; return False if no agent runs."""
    if not path.is_fifo():
        return False
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in {errno.ENXIO, errno.ENOENT}:
            return False
        raise
    try:
        os.write(descriptor, b"b")
    finally:
        os.close(descriptor)
    return True
