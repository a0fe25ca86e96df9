"""What came on a stick instead of over the network: taken in, and shown to the verifier as if it had been fetched.

`stage` reads an untrusted tar with a limit on everything and lays out what concerns this board in `<state>/bundle`.
`Bundle` gives metadata from there alone, which is how a bundle is judged; `Offline` gives it beside the network to
whoever fetches anything else, also at the same time. The verification stays as it is. A FIFO in the state directory
wakes the agent that runs.
"""

import contextlib
import errno
import os
import shutil
import tarfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

import msgspec

from agent.link.https import FetchError, HttpsClient, finish
from fleet.protocol import names, wire
from fleet.protocol.assignment import Assignment
from fleet.protocol.bounds import Count
from fleet.protocol.codes import RejectCode
from fleet.protocol.files import atomic_write, move_into_place
from signing import dsse
from signing.errors import Rejected

_TUF: Final = "/v1/tuf/"
_ARTIFACTS: Final = "/v1/artifacts/"
_SECRETS: Final = "/v1/secrets/"
_AWAY: Final = frozenset({RejectCode.UNREACHABLE, RejectCode.TOO_SLOW})


class BundleError(Exception):
    """The file is no bundle, or not for this board; the message says what to do."""


class BundleVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a staged bundle: the version accepted, or why it was refused."""

    version: Count = 0
    code: str = ""
    message: str = ""


class _Head(msgspec.Struct):
    v: Count


def stage(file: IO[bytes], directory: Path, *, device: str) -> None:
    """Lay out what concerns this board in `directory`, in place of an earlier bundle.

    Args:
        file: a tar, seekable.
        directory: made anew.
        device: this board's id.

    Raises:
        BundleError: no bundle, of another layout, with nothing for this board, or incomplete.
        OSError: it cannot be written.
    """
    beside = directory.with_name(f"{directory.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            members = _members(tar)
            _check_head(tar, members)
            wanted = _wanted(_read(tar, _of(device, members)))
            files = [name for name in members if name.startswith("tuf/")]
            files += [names.desired(device), *(name for name in wanted if name in members)]
            for name in files:
                _extract(tar, members[name], beside / name)
    except tarfile.TarError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise BundleError(f"not a bundle: {error}; 'fleet bundle create' makes one") from error
    except (BundleError, OSError):
        shutil.rmtree(beside, ignore_errors=True)
        raise
    shutil.rmtree(directory, ignore_errors=True)
    move_into_place(beside, directory)


def _members(tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    found: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        limit = names.max_bytes(member.name)
        if not limit or not member.isreg() or member.name in found or len(found) >= names.MEMBERS_MAX:
            raise BundleError(f"not a bundle: {member.name[:100]!r} has no place in one")
        if member.size > limit:
            raise BundleError(f"{member.name} has {member.size} bytes, at most {limit} are accepted")
        found[member.name] = member
    return found


def _of(device: str, members: dict[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    try:
        return members[names.desired(device)]
    except KeyError as error:
        words = f"the bundle has nothing for {device}: name its group with 'fleet bundle create'"
        raise BundleError(words) from error


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    source = tar.extractfile(member)
    assert source is not None
    return source.read()


def _check_head(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> None:
    try:
        head = msgspec.json.decode(_read(tar, members[names.HEAD]), type=_Head)
    except (KeyError, *wire.JSON_ERRORS) as error:
        raise BundleError("not a bundle: 'fleet bundle create' makes one") from error
    if head.v != names.VERSION:
        raise BundleError(f"the bundle has layout {head.v}, this agent reads {names.VERSION}: upgrade it")


def _wanted(envelope: bytes) -> list[str]:
    """Which artifacts and secrets the assignment names; whether it counts is judged later."""
    try:
        items = wire.decode(Assignment, dsse.parse(envelope).payload).items
    except (Rejected, wire.WireError):
        return []
    named = [names.artifact(item.sha256) for item in items]
    named += [names.secret(ref.sha256) for item in items for ref in item.secrets]
    return [name for name in dict.fromkeys(named) if names.max_bytes(name)]


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, into: Path) -> None:
    into.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    source = tar.extractfile(member)
    assert source is not None
    with into.open("wb") as file:
        shutil.copyfileobj(source, file)


@dataclass(frozen=True, slots=True)
class Bundle:
    """The bundle alone, as `stage` laid it out: the source for judging it, where its own timestamp counts."""

    directory: Path

    def exists(self) -> bool:
        """Return whether the metadata of a bundle lies here."""
        return (self.directory / names.metadata("timestamp.json")).exists()

    def envelope(self) -> bytes | None:
        """Return the assignment in the bundle; None for no bundle."""
        found = sorted((self.directory / "desired").glob("*.json"))
        return found[0].read_bytes() if found else None

    def done(self, outcome: BundleVerdict) -> None:
        """Note the verdict, and remove the assignment, so that it is not judged again."""
        atomic_write(self.directory / "outcome.json", msgspec.json.encode(outcome), mode=0o600)
        shutil.rmtree(self.directory / "desired", ignore_errors=True)

    def request(self, method: str, path: str, *, max_bytes: int) -> bytes:
        """Return a file of the bundle. Raises `FetchError`: NOT_FOUND for one that is not in it."""
        data = self.find(path, max_bytes) if method == "GET" else None
        if data is None:
            raise FetchError(RejectCode.NOT_FOUND, f"{path} is not in the bundle")
        return data

    def find(self, path: str, max_bytes: int) -> bytes | None:
        """Return the metadata file or sealed secret of this path; None where the bundle has none."""
        if path.startswith(_TUF):
            name = names.metadata(path.removeprefix(_TUF))
        elif path.startswith(_SECRETS):
            name = names.secret(path.removeprefix(_SECRETS))
        else:
            return None
        if not names.max_bytes(name):
            return None
        try:
            with (self.directory / name).open("rb") as file:
                data = file.read(max_bytes + 1)
        except OSError:
            return None
        if len(data) > max_bytes:
            raise FetchError(RejectCode.TOO_LARGE, f"{name} in the bundle has more than {max_bytes} bytes")
        return data

    def artifact(self, path: str) -> Path | None:
        """Return where the artifact of this path lies; None where the bundle has none."""
        name = names.artifact(path.removeprefix(_ARTIFACTS))
        kept = self.directory / name
        return kept if names.max_bytes(name) and kept.is_file() else None


class BundleSource:
    """The network and a bundle together: the source for everything but judging that bundle.

    A file with a version or a digest in its name is the same wherever it lies: the bundle's first, then the network's.
    The timestamp has none: the network's first, and the bundle's while the network is away. All else is the network's.
    Nothing here changes after the constructor, so any thread may fetch.

    Attributes:
        bundle: the bundle alone.
    """

    def __init__(self, https: HttpsClient, directory: Path) -> None:
        """`directory` is where `stage` lays a bundle out; there may be none."""
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
        """See `Https.request`."""
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
        """See `Https.download`; what lies in the bundle is moved, and hashed like what was downloaded."""
        kept = self.bundle.artifact(path)
        if kept is not None:
            part = into.with_name(into.name + ".part")
            try:
                into.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                kept.replace(part)
                finish(part, into, length, sha256)
            except OSError as error:
                raise FetchError(RejectCode.INTERNAL, f"cannot write {into}: {error.strerror}") from error
            return
        self._https.download(path, into, length=length, sha256=sha256, progress=progress, cancelled=cancelled)


def listen(path: Path) -> int:
    """A FIFO by which the agent is woken; the descriptor to read from. Raises `OSError`."""
    with contextlib.suppress(FileExistsError):
        os.mkfifo(path, 0o600)
    return os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)


def wake(path: Path) -> bool:
    """Tell the agent that there is a bundle; false when none runs."""
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
