"""Images: components compiled for this board, by this board, and checked before every use.

An image is native code, and loading a damaged one is code execution. So an image carries a MAC under a key that never
leaves the board, over everything that made it and its own hash; it is copied into a sealed memfd, and the MAC is
checked over *that*, since a file can change under a mapping. Files are written once, by rename, 0444. The compiler is a
program of its own under limits: one that panics or eats memory is a refused update, and nothing else.
"""

import asyncio
import contextlib
import hashlib
import hmac
import logging
import os
import resource
import secrets
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from agent.host.ipc import framing
from fleet.protocol import bounds, wire
from fleet.protocol.codes import RejectCode
from fleet.protocol.files import atomic_write, create_exclusive, set_aside

log = logging.getLogger("agent.update.images")
KEY_BYTES: Final = 32
CHUNK_BYTES: Final = 1 << 20
COMPILER_VARIABLE: Final = "WASMFLEET_COMPILER"
DESCRIBE_MAX_S: Final = 60.0
STDERR_MAX_BYTES: Final = 16 * 1024


def compiler() -> tuple[str, ...]:
    """The compiler's command line; a unit without executable memory names another in `WASMFLEET_COMPILER`."""
    return tuple(shlex.split(os.environ.get(COMPILER_VARIABLE, ""))) or (
        sys.executable,
        "-m",
        "agent.host.compiler",
    )


class ImageError(Exception):
    """An image could not be made, or may not be used.

    Attributes:
        code: from the vocabulary of reports.
    """

    def __init__(self, code: RejectCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    """What lies beside an image."""

    artifact: str
    manifest: str
    engine: str
    image: str
    length: int
    mac: str = ""


class _CompilerSaid(msgspec.Struct, frozen=True):
    """The compiler's one line on stderr."""

    message: str = ""
    code: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Engine:
    """What compiles and runs here, as the compiler describes itself; any difference makes other images."""

    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        """Its identity."""
        return wire.digest(self.facts)

    @property
    def version(self) -> str:
        """Wasmtime's version."""
        return str(self.facts.get("engine", ""))


def load_key(path: Path) -> bytes:
    """The board's MAC key; made when there is none yet, or a damaged one.

    Raises:
        ImageError: it cannot be read or written.
    """
    try:
        if path.exists() and not _is_key(path.read_bytes()):
            log.warning("%s was damaged: every image is made anew with another key", set_aside(path))
        with contextlib.suppress(FileExistsError):
            create_exclusive(path, secrets.token_bytes(KEY_BYTES), mode=0o600)
        return path.read_bytes()
    except OSError as error:
        raise ImageError(RejectCode.INTERNAL, f"cannot use {path}: {error.strerror}") from error


def _is_key(data: bytes) -> bool:
    """Tell whether a file holds a key: zeros are what a power cut leaves, and everybody knows them."""
    return len(data) == KEY_BYTES and any(data)


@dataclass(frozen=True, slots=True)
class DamagedImage:
    """An image that was found changed on the disk, and removed: of which artifact (sha256), and why."""

    artifact: str
    message: str


class OpenImage(NamedTuple):
    """Checked image in a memfd that nobody can change; `sha256` is that of its bytes."""

    descriptor: int
    sha256: str


class ImageStore:
    """The images of one board.

    Attributes:
        damaged: every damaged image that was found; read by whoever reports them.
    """

    def __init__(
        self,
        directory: Path,
        key: bytes,
        *,
        memory_bytes: int,
        seconds: int,
    ) -> None:
        """Images in `directory`, under the MAC `key`.

        Args:
            directory: made when it does not exist.
            key: known to this board only.
            memory_bytes: of the compiler's data.
            seconds: of the compiler, CPU and wall-clock.
        """
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._key = key
        self._memory_bytes = memory_bytes
        self._seconds = seconds
        self.damaged: asyncio.Queue[DamagedImage] = asyncio.Queue()
        self._engines: dict[bool, Engine] = {}

    async def engine(self, *, fuel: bool = False) -> Engine:
        """What compiles here; asked once for components with a fuel limit and once for those without.

        Raises:
            ImageError: NO_ENGINE, with the reason.
        """
        if fuel not in self._engines:
            out, err, code = await self._run(("--describe", *_fuel(fuel)), b"", DESCRIBE_MAX_S)
            if code != 0:
                raise ImageError(RejectCode.NO_ENGINE, f"no engine on this board: {_last_line(err) or f'exit {code}'}")
            try:
                self._engines[fuel] = Engine(msgspec.json.decode(out, type=dict[str, Any]))
            except wire.JSON_ERRORS as error:
                raise ImageError(RejectCode.NO_ENGINE, f"the compiler does not describe itself: {error}") from error
        return self._engines[fuel]

    async def _run(self, arguments: tuple[str, ...], data: bytes, seconds: float) -> tuple[bytes, bytes, int]:
        with tempfile.TemporaryFile() as err:
            process = await asyncio.create_subprocess_exec(
                *compiler(),
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=err,
                limit=CHUNK_BYTES,
            )
            try:
                # The compiler waits for its input, so the limits hold before it sees a byte.
                self._confine(process.pid)
                async with asyncio.timeout(seconds):
                    out, _ = await process.communicate(data)
            except TimeoutError as error:
                raise ImageError(RejectCode.COMPILE_LIMIT, f"compiling took more than {seconds:.0f} s") from error
            finally:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
            err.seek(0)
            return out, err.read(STDERR_MAX_BYTES), process.returncode or 0

    def _confine(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            resource.prlimit(pid, resource.RLIMIT_DATA, (self._memory_bytes, self._memory_bytes))
            resource.prlimit(pid, resource.RLIMIT_CPU, (self._seconds, self._seconds))
            resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
            os.setpriority(os.PRIO_PROCESS, pid, 10)

    def _key_of(self, artifact: str, manifest: str, engine: Engine) -> str:
        return wire.digest([artifact, manifest, engine.digest])

    def _mac(self, note: _Note) -> str:
        bare = wire.canonical(msgspec.structs.replace(note, mac=""))
        return hmac.new(self._key, bare, hashlib.sha256).hexdigest()

    async def make(self, artifact: Path, *, sha256: str, manifest_sha256: str, fuel: bool = False) -> None:
        """Compile an artifact, unless a sound image of it is there.

        Args:
            artifact: the file; its bytes are hashed again before they are compiled.
            sha256: what they must hash to.
            manifest_sha256: bound into the image.
            fuel: whether the manifest limits instructions.

        Raises:
            ImageError: HASH_MISMATCH, NO_ENGINE, COMPILE_FAILED, COMPILE_LIMIT, NOT_A_COMPONENT or NO_SPACE.
        """
        engine = await self.engine(fuel=fuel)
        with contextlib.suppress(ImageError):
            found = await self.open(sha256=sha256, manifest_sha256=manifest_sha256, fuel=fuel)
            os.close(found.descriptor)
            return
        try:
            data = await asyncio.to_thread(artifact.read_bytes)
        except OSError as error:
            raise ImageError(RejectCode.NOT_FOUND, f"cannot read {artifact}: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ImageError(RejectCode.HASH_MISMATCH, f"{artifact} was changed on this board's disk")
        image, err, code = await self._run(_fuel(fuel), data, self._seconds)
        if code != 0:
            raise _compiler_failed(code, err)
        if not image or len(image) > bounds.IMAGE_MAX_BYTES:
            raise ImageError(RejectCode.COMPILE_LIMIT, f"the compiled image has {len(image)} bytes")
        note = _Note(
            artifact=sha256,
            manifest=manifest_sha256,
            engine=engine.digest,
            image=hashlib.sha256(image).hexdigest(),
            length=len(image),
        )
        name = self._key_of(sha256, manifest_sha256, engine)
        note = msgspec.structs.replace(note, mac=self._mac(note))
        try:
            await asyncio.to_thread(self._write, name, image, wire.encode(note))
        except OSError as error:
            raise ImageError(RejectCode.NO_SPACE, f"cannot write an image: {error.strerror}") from error

    def _write(self, name: str, image: bytes, note: bytes) -> None:
        for suffix, data in ((".cwasm", image), (".json", note)):
            atomic_write(self._directory / f"{name}{suffix}", data, mode=0o444)

    async def open(self, *, sha256: str, manifest_sha256: str, fuel: bool = False) -> OpenImage:
        """Open the image as a sealed memfd, checked; the caller closes it.

        Raises:
            ImageError: NOT_FOUND when there is none for this engine; IMAGE_DAMAGED when its MAC does not hold (the
                image is then removed, so that it is made anew); NO_ENGINE.
        """
        name = self._key_of(sha256, manifest_sha256, await self.engine(fuel=fuel))
        try:
            return await asyncio.to_thread(self._open, name, sha256, manifest_sha256)
        except ImageError as error:
            if error.code is RejectCode.IMAGE_DAMAGED:
                self.damaged.put_nowait(DamagedImage(sha256, error.message))
            raise

    def _open(self, name: str, artifact: str, manifest: str) -> OpenImage:
        image, beside = self._directory / f"{name}.cwasm", self._directory / f"{name}.json"
        try:
            note = msgspec.json.decode(beside.read_bytes(), type=_Note)
            opened = _seal(image, note.length)
        except FileNotFoundError as error:
            raise ImageError(RejectCode.NOT_FOUND, "there is no image of this component for this engine") from error
        except (OSError, *wire.JSON_ERRORS) as error:
            raise self._remove(name, f"the image cannot be read: {error}") from error
        sound = (
            hmac.compare_digest(self._mac(note), note.mac)
            and (note.artifact, note.manifest) == (artifact, manifest)
            and opened.sha256 == note.image
        )
        if not sound:
            os.close(opened.descriptor)
            raise self._remove(name, "the image was changed on this board's disk: its MAC does not hold")
        with contextlib.suppress(OSError):
            os.utime(image)  # for the least-recently-used eviction
        return opened

    def _remove(self, name: str, message: str) -> ImageError:
        """Remove a damaged image, so that it is never used and made anew; return the error to raise."""
        for suffix in (".json", ".cwasm"):
            with contextlib.suppress(OSError):
                (self._directory / f"{name}{suffix}").unlink()
        return ImageError(RejectCode.IMAGE_DAMAGED, message)

    async def name(self, sha256: str, manifest_sha256: str, *, fuel: bool = False) -> str:
        """The file name (without suffix) of an image, for `evict`."""
        return self._key_of(sha256, manifest_sha256, await self.engine(fuel=fuel))


def evict(images: Path, artifacts: Path, *, keep: set[str], budget_bytes: int) -> int:
    """Remove least recently used files until both directories fit the budget; what is in `keep` stays.

    Args:
        images: directory of images.
        artifacts: directory of artifacts.
        keep: stems of files that run, may be gone back to, or are being fetched.
        budget_bytes: for both together.

    Returns:
        Bytes freed.
    """
    files = []
    for directory in (images, artifacts):
        for path in directory.glob("*"):
            with contextlib.suppress(OSError):
                stat = path.stat()
                files.append((stat.st_mtime, path, stat.st_size))
    total = sum(size for _, _, size in files)
    freed = 0
    for _, path, size in sorted(files):
        if total - freed <= budget_bytes:
            break
        if path.name.split(".")[0] not in keep:
            with contextlib.suppress(OSError):
                path.unlink()
                freed += size
    return freed


def _seal(image: Path, length: int) -> OpenImage:
    """Copy the image into a memfd, seal it, and hash what is in there."""

    def copy(descriptor: int) -> None:
        with image.open("rb") as file:
            offset = 0
            while offset <= length and (sent := os.sendfile(descriptor, file.fileno(), offset, CHUNK_BYTES)):
                offset += sent

    descriptor = framing.constant_memfd("image", copy)
    try:
        digest = hashlib.sha256()
        position = 0
        while chunk := os.pread(descriptor, CHUNK_BYTES, position):
            digest.update(chunk)
            position += len(chunk)
        os.lseek(descriptor, 0, os.SEEK_SET)
    except BaseException:
        os.close(descriptor)
        raise
    return OpenImage(descriptor, digest.hexdigest())


def _fuel(wanted: bool) -> tuple[str, ...]:  # noqa: FBT001 - turns a flag into an argument
    return ("--fuel",) if wanted else ()


def _last_line(err: bytes) -> str:
    lines = [line for line in err.decode(errors="replace").splitlines() if line.strip()]
    if not lines:
        return ""
    with contextlib.suppress(*wire.JSON_ERRORS):
        said = msgspec.json.decode(lines[-1], type=_CompilerSaid)
        return said.message or said.error or said.code
    return lines[-1][:500]


def _compiler_failed(status: int, err: bytes) -> ImageError:
    line = _last_line(err)
    if status < 0:
        why = f"the compiler was stopped by signal {-status} (a limit, or a fault of its own)"
        return ImageError(RejectCode.COMPILE_LIMIT, f"{why}{': ' + line if line else ''}")
    code = RejectCode.COMPILE_FAILED
    lines = err.decode(errors="replace").strip().splitlines()
    if lines:
        with contextlib.suppress(*wire.JSON_ERRORS, ValueError):
            code = RejectCode(msgspec.json.decode(lines[-1], type=_CompilerSaid).code)
    return ImageError(code, line or f"the compiler ended with exit code {status}")
