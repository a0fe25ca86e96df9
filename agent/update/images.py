"""Images: components compiled on this device for this device, and verified before every use.

An image is native code, so loading a manipulated one would execute foreign code. Each image has a MAC, under a key that
never leaves the device, over all inputs of the compilation and the image's hash. Before use, the image is copied into a
sealed memfd, and the MAC is checked against the copy, as a file can change while it is mapped. Files are written once,
by rename, with mode 0444. The compiler is a separate program with limits: if it panics or uses too much memory, only
the update is refused.
"""

import asyncio
import contextlib
import errno
import hashlib
import hmac
import logging
import os
import resource
import secrets
import shlex
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from agent import disk
from agent.disk import Write
from agent.host.ipc import framing
from fleet.protocol import bounds, files, wire
from fleet.protocol.codes import RejectCode
from fleet.protocol.files import irregular

log = logging.getLogger("agent.update.images")
KEY_BYTES: Final = 32
CHUNK_BYTES: Final = 1 << 20
COMPILER_VARIABLE: Final = "WASMFLEET_COMPILER"
DESCRIBE_MAX_S: Final = 60.0
STDERR_MAX_BYTES: Final = 16 * 1024
TRANSIENT: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR})
"""Errors that say nothing of the file that was to be read."""

VMSTAT: Final = Path("/proc/vmstat")

_OWN_SIGNALS: Final = frozenset(
    {
        signal.SIGXCPU,  # the limit of CPU time; that of memory leads to SIGABRT
        signal.SIGABRT,
        signal.SIGBUS,
        signal.SIGFPE,
        signal.SIGILL,
        signal.SIGSEGV,
        signal.SIGSYS,  # a system call that its sandbox forbids
        signal.SIGTRAP,
    }
)
"""Signals by which a component may end its compiler. Any other comes from outside (a stop of the agent, the OOM killer)
and says nothing of the component."""


def compiler() -> tuple[str, ...]:
    """Return the compiler's command line; `WASMFLEET_COMPILER` overrides it, for units without executable memory."""
    return tuple(shlex.split(os.environ.get(COMPILER_VARIABLE, ""))) or (
        sys.executable,
        "-m",
        "agent.host.compiler",
    )


class ImageError(Exception):
    """An image could not be made, or must not be used.

    Attributes:
        code: reason, from the vocabulary of reports.
    """

    def __init__(self, code: RejectCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    """Metadata stored beside an image."""

    artifact: str
    manifest: str
    engine: str
    image: str
    length: int
    mac: str = ""


class _CompilerResult(msgspec.Struct, frozen=True):
    """Result line of the compiler on stderr."""

    message: str = ""
    code: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Engine:
    """Description of the engine by the compiler; images are specific to all of it."""

    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        """Hash of the description; part of each image's name."""
        return wire.digest(self.facts)

    @property
    def version(self) -> str:
        """Version of Wasmtime."""
        return str(self.facts.get("engine", ""))


_KEY_MAX_BYTES: Final = bounds.KIB


def load_key(path: Path) -> bytes:
    """Load the device's MAC key, or make one if there is none or it is damaged.

    Raises:
        ImageError: the file cannot be read or written, or is damaged.
    """
    try:
        if os.path.lexists(path) and not _holds_key(path):
            log.warning(
                "%s was damaged: all images are compiled again under a new key",
                disk.set_aside(Write.MAC_KEY_DAMAGED, path),
            )
        if not path.exists():  # a read-only disk refuses the attempt
            with contextlib.suppress(FileExistsError):
                disk.create(Write.MAC_KEY, path, secrets.token_bytes(KEY_BYTES), mode=0o600)
        return files.read(path)
    except OSError as error:
        raise ImageError(RejectCode.INTERNAL, f"cannot use {path}: {error.strerror}") from error


def _holds_key(path: Path) -> bool:
    """Return whether a file holds a key; whatever else has its name does not. Raises `OSError`: it cannot be read."""
    return not irregular(path) and path.stat().st_size <= _KEY_MAX_BYTES and _is_key(files.read(path))


def _is_key(data: bytes) -> bool:
    """Return whether a file holds a key; a power cut may leave zeros, which are not a secret."""
    return len(data) == KEY_BYTES and any(data)


@dataclass(frozen=True, slots=True)
class DamagedImage:
    """Image that was changed on disk and has been removed: its artifact (sha256), and the reason."""

    artifact: str
    message: str


class OpenImage(NamedTuple):
    """Verified image in a sealed memfd; `sha256` is that of its bytes."""

    descriptor: int
    sha256: str


class ImageStore:
    """Store of the device's images.

    Attributes:
        damaged: damaged images that were found, for their reporter.
    """

    def __init__(
        self,
        directory: Path,
        key: bytes,
        *,
        memory_bytes: int,
        seconds: int,
    ) -> None:
        """Use the images in `directory`.

        Args:
            directory: created if it does not exist.
            key: MAC key, known only to this device.
            memory_bytes: limit of the compiler's memory.
            seconds: limit of the compiler's CPU time and of its elapsed time.
        """
        disk.make_directory(Write.DIRECTORY, directory, mode=0o700)
        self._directory = directory
        self._key = key
        self._memory_bytes = memory_bytes
        self._seconds = seconds
        self.damaged: asyncio.Queue[DamagedImage] = asyncio.Queue()
        self._engines: dict[bool, Engine] = {}
        self._making = asyncio.Semaphore(1)

    async def engine(self, *, fuel: bool = False) -> Engine:
        """Return the engine's description, from the compiler at the first call, for components with or without fuel.

        Raises:
            ImageError: NO_ENGINE, with the reason; INTERRUPTED: the compiler was stopped.
        """
        if fuel not in self._engines:
            kills = _oom_kills()
            out, err, code = await self._run(("--describe", *_fuel(fuel)), b"", DESCRIBE_MAX_S)
            if code != 0:
                failed = _compiler_failed(code, err, kills)
                if failed.code is RejectCode.INTERRUPTED:
                    raise failed
                raise ImageError(RejectCode.NO_ENGINE, f"no engine on this device: {_last_line(err) or f'exit {code}'}")
            try:
                self._engines[fuel] = Engine(msgspec.json.decode(out, type=dict[str, Any]))
            except wire.JSON_ERRORS as error:
                raise ImageError(
                    RejectCode.NO_ENGINE, f"the compiler's description of the engine cannot be read: {error}"
                ) from error
        return self._engines[fuel]

    async def _run(self, arguments: tuple[str, ...], data: bytes, seconds: float) -> tuple[bytes, bytes, int]:
        with framing.memory_file("compiler-errors") as err:
            process = await asyncio.create_subprocess_exec(
                *compiler(),
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=err,
                limit=CHUNK_BYTES,
                start_new_session=True,  # a signal to the agent's process group is for the agent, which ends it
            )
            try:
                # The compiler waits for its input, so the limits are set before it reads a byte.
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
            # SIGXCPU comes a second before the SIGKILL of the hard limit, which would look like one from outside
            resource.prlimit(pid, resource.RLIMIT_CPU, (self._seconds, self._seconds + 1))
            resource.prlimit(pid, resource.RLIMIT_CORE, (0, 0))
            os.setpriority(os.PRIO_PROCESS, pid, 10)

    def _key_of(self, artifact: str, manifest: str, engine: Engine) -> str:
        return wire.digest([artifact, manifest, engine.digest])

    def _mac(self, note: _Note) -> str:
        bare = wire.canonical(msgspec.structs.replace(note, mac=""))
        return hmac.new(self._key, bare, hashlib.sha256).hexdigest()

    async def make(
        self, artifact: Path, *, sha256: str, manifest_sha256: str, fuel: bool = False, sockets: bool = False
    ) -> None:
        """Compile an artifact, unless there is an intact image of it; one at a time, whoever asks.

        Args:
            artifact: file, hashed again before it is compiled.
            sha256: of the artifact.
            manifest_sha256: of the manifest, bound into the image.
            fuel: compile for a limited number of instructions.
            sockets: compile for a manifest that grants sockets.

        Raises:
            ImageError: HASH_MISMATCH, NOT_FOUND, NO_ENGINE, COMPILE_FAILED, COMPILE_LIMIT, NOT_A_COMPONENT, NO_SPACE,
                INTERNAL, or INTERRUPTED: the compiler was stopped, which says nothing of the component.
        """
        async with self._making:
            await self._make(artifact, sha256, manifest_sha256, fuel=fuel, sockets=sockets)

    async def _make(self, artifact: Path, sha256: str, manifest_sha256: str, *, fuel: bool, sockets: bool) -> None:
        engine = await self.engine(fuel=fuel)
        with contextlib.suppress(ImageError):
            found = await self.open(sha256=sha256, manifest_sha256=manifest_sha256, fuel=fuel)
            os.close(found.descriptor)
            return
        try:
            data = await asyncio.to_thread(files.read, artifact)
        except OSError as error:
            lost = isinstance(error, FileNotFoundError)
            reason = RejectCode.NOT_FOUND if lost else RejectCode.INTERNAL
            raise ImageError(reason, f"cannot read {artifact}: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != sha256:
            raise ImageError(RejectCode.HASH_MISMATCH, f"{artifact} was changed on this device's disk")
        kills = _oom_kills()
        image, err, code = await self._run((*_fuel(fuel), *(("--sockets",) if sockets else ())), data, self._seconds)
        if code != 0:
            raise _compiler_failed(code, err, kills)
        if not image or len(image) > bounds.IMAGE_MAX_BYTES:
            raise ImageError(RejectCode.COMPILE_LIMIT, f"the compiled image is too large: {len(image)} bytes")
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
        disk.write(Write.IMAGE, self._directory / f"{name}.cwasm", image, mode=0o444)
        disk.write(Write.IMAGE_NOTE, self._directory / f"{name}.json", note, mode=0o444)

    async def open(self, *, sha256: str, manifest_sha256: str, fuel: bool = False) -> OpenImage:
        """Return a sealed memfd of the verified image; the caller closes it.

        Raises:
            ImageError: NOT_FOUND: no image for this engine; IMAGE_DAMAGED: its MAC does not match (the image is
                removed, so that it is compiled again); NO_ENGINE.
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
            note = msgspec.json.decode(files.read(beside), type=_Note)
            opened = _seal(image, note.length)
        except FileNotFoundError as error:
            raise ImageError(RejectCode.NOT_FOUND, "there is no image of this component for this engine") from error
        except OSError as error:
            if error.errno in TRANSIENT:
                raise ImageError(RejectCode.INTERNAL, f"the image cannot be read: {error.strerror}") from error
            raise self._remove(name, f"the image cannot be read: {error}") from error
        except wire.JSON_ERRORS as error:
            raise self._remove(name, f"the image cannot be read: {error}") from error
        is_intact = (
            hmac.compare_digest(self._mac(note), note.mac)
            and (note.artifact, note.manifest) == (artifact, manifest)
            and opened.sha256 == note.image
        )
        if not is_intact:
            os.close(opened.descriptor)
            raise self._remove(name, "the image was changed on this device's disk: its MAC does not match")
        with contextlib.suppress(OSError):
            os.utime(image)  # for the least-recently-used eviction
        return opened

    def _remove(self, name: str, message: str) -> ImageError:
        """Remove a damaged image, so that it is compiled again; return the error to raise."""
        for suffix in (".json", ".cwasm"):
            with contextlib.suppress(OSError):
                disk.remove(Write.IMAGE_DAMAGED, self._directory / f"{name}{suffix}")
        return ImageError(RejectCode.IMAGE_DAMAGED, message)

    async def name(self, sha256: str, manifest_sha256: str, *, fuel: bool = False) -> str:
        """Return the file name (without suffix) of an image, for `evict`."""
        return self._key_of(sha256, manifest_sha256, await self.engine(fuel=fuel))


def evict(images: Path, artifacts: Path, *, keep: set[str], budget_bytes: int) -> int:
    """Remove least recently used files until both directories fit the budget, except those in `keep`.

    Args:
        images: directory of images.
        artifacts: directory of artifacts.
        keep: stems of files that are in use, needed for a rollback, or being fetched.
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
                disk.remove(Write.EVICTED, path)
                freed += size
    return freed


def _seal(image: Path, length: int) -> OpenImage:
    """Copy the image into a memfd, seal it, and hash the copy."""

    def copy(descriptor: int) -> None:
        with files.open_to_read(image) as file:
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
        result = msgspec.json.decode(lines[-1], type=_CompilerResult)
        return result.message or result.error or result.code
    return lines[-1][:500]


def _oom_kills() -> int:
    """Return how many processes the kernel has killed since the boot as memory ran out; 0 where it does not count."""
    with contextlib.suppress(OSError, ValueError):
        counts = dict(line.split() for line in VMSTAT.read_text(encoding="ascii").splitlines())
        return int(counts.get("oom_kill", 0))
    return 0


def _compiler_failed(status: int, err: bytes, kills: int) -> ImageError:
    """Make the error of a compiler that ended with `status`; `kills` is `_oom_kills` of before it began."""
    line = _last_line(err)
    if status < 0:
        name = _signal_name(-status)
        if -status not in _OWN_SIGNALS:
            if -status == signal.SIGKILL and _oom_kills() > kills:
                why = "the device ran out of memory, and the kernel killed the compiler"
            else:
                why = f"the compiler was stopped by {name} before it had finished"
            return ImageError(RejectCode.INTERRUPTED, why)
        why = f"the compiler was killed by {name} (a limit, or an internal error)"
        return ImageError(RejectCode.COMPILE_LIMIT, f"{why}{': ' + line if line else ''}")
    code = RejectCode.COMPILE_FAILED
    lines = err.decode(errors="replace").strip().splitlines()
    if lines:
        with contextlib.suppress(*wire.JSON_ERRORS, ValueError):
            code = RejectCode(msgspec.json.decode(lines[-1], type=_CompilerResult).code)
    return ImageError(code, line or f"the compiler ended with exit code {status}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
