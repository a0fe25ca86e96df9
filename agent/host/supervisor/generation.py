"""Generation of an instance: its run request, workers, figures and data directory."""

import asyncio
import contextlib
import errno
import hashlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NamedTuple

from agent import disk
from agent.disk import Point, Write
from agent.host.ipc import host_api, metrics_page
from agent.host.ipc.host_api import StartError
from agent.host.ipc.stats_page import CallStats
from agent.host.supervisor.resources import Listener
from agent.host.supervisor.worker_handle import WorkerHandle
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Service
from fleet.protocol.messages import HealthChecks
from fleet.protocol.metrics import Metric
from fleet.protocol.names import BadNameError, TargetName

_CHUNK_BYTES: Final = 1024 * 1024
_ENTRY_BYTES: Final = 4096
_UNFINISHED: Final = ".copy"
"""Copy for another schema until it is whole: a power cut must not leave half of it as the new version's data."""


def namespace_of(run: host_api.Run) -> str:
    """Return the namespace of an instance's publisher; empty for a target without one."""
    try:
        return TargetName.from_path(run.target).namespace
    except BadNameError:
        return ""


async def data_directory(run: host_api.Run, uid: int | None, parent: Path, old: "Generation | None") -> str:
    """Make the data directory of a generation, owned by its user; return an empty string if it may have no files.

    Each `data_schema` has a directory of its own. A generation with another schema than the `old` one gets a copy, so
    that a rollback finds the old data unchanged.

    Raises:
        StartError: NO_SPACE or INTERNAL: the directory cannot be made or copied, which is not the component's fault.
    """
    if not any(name.startswith("wasi:filesystem") for name in run.grants.interfaces):
        return ""
    schema = run.manifest.data_schema
    path = (Path(run.data) if run.data else parent / run.instance) / str(schema)
    try:
        if old is not None and old.data and old.run.manifest.data_schema != schema:
            if path.exists():  # from an aborted attempt
                await remove_tree(path)
            unfinished = path.with_name(_UNFINISHED)
            await remove_tree(unfinished)
            await _copy(old.data, unfinished)
            await _sync(unfinished)
            disk.take_name(Write.DATA_COPIED, unfinished, path)
        disk.make_directory(Write.DATA, path, mode=0o700)
        if uid is not None:
            os.chown(path, uid, uid, follow_symlinks=False)
    except OSError as error:
        code = RejectCode.NO_SPACE if error.errno in {errno.ENOSPC, errno.EDQUOT} else RejectCode.INTERNAL
        raise StartError(code, f"{run.instance}: cannot make the data directory: {error}") from error
    return str(path)


async def _copy(old: str, new: Path) -> None:
    plain = {**os.environ, "LC_ALL": "C"}  # messages are searched below
    process = await asyncio.create_subprocess_exec("cp", "-a", "--", old, str(new), stderr=subprocess.PIPE, env=plain)
    _, errors = await process.communicate()
    if process.returncode != 0:
        await remove_tree(new)
        said = errors.decode(errors="replace").strip()[-300:]
        is_full = any(os.strerror(number) in said for number in (errno.ENOSPC, errno.EDQUOT))
        raise OSError(errno.ENOSPC if is_full else errno.EIO, f"its data cannot be copied for another schema: {said}")


async def _sync(path: Path) -> None:
    """Bring a copied tree onto the medium before it gets its name, with the whole file system that it is on."""
    process = await asyncio.create_subprocess_exec("sync", "-f", "--", str(path), stderr=subprocess.DEVNULL)
    await process.wait()


async def remove_tree(path: Path) -> None:
    """Remove a tree with `rm` (it is copied with `cp`): guests can nest directories deeper than Python can follow."""
    disk.reached(Write.DATA_REMOVED, Point.BEFORE, path, b"")
    process = await asyncio.create_subprocess_exec("rm", "-rf", "--", str(path), stderr=subprocess.DEVNULL)
    await process.wait()
    disk.reached(Write.DATA_REMOVED, Point.AFTER, path, b"")


async def forget_other_schemas(data: str) -> None:
    """Remove the data directories of other schemas beside this one."""
    if data:
        for other in Path(data).parent.iterdir():
            if other.name != Path(data).name:
                await remove_tree(other)


async def forget_other_pairs(home: Path, schema: int) -> None:
    """Remove the key-value pairs of other schemas, of an instance whose databases are in `home`."""
    for name in names_in(home):
        if name.partition(".")[0] != str(schema):
            await remove_tree(home / name)


def names_in(directory: Path) -> list[str]:
    """Return the names in a directory; none where there is no such directory."""
    try:
        return os.listdir(directory)  # noqa: PTH208 - their names
    except FileNotFoundError:
        return []


def storage_problem(directory: str, max_bytes: int) -> str:
    """Return why a data directory exceeds its limit of `max_bytes` on disk; empty if it does not.

    Even an empty entry counts as a block, as a disk can run out of those, too. The walk ends as soon as the limit is
    exceeded, so that no guest can make it long; links are not followed. An eighth more is tolerated for partly used
    blocks and directories.
    """
    total, todo, most = 0, [directory], max_bytes + max_bytes // 8
    while todo:
        try:
            for entry in _entries(todo.pop()):
                total += max(entry.blocks * 512, _ENTRY_BYTES)
                if total > most:
                    return f"its data takes at least {total} bytes on disk, {max_bytes} are allowed (limits.storage)"
                if entry.is_directory:
                    todo.append(entry.path)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return "its data has directories nested deeper than a path can be"
    return ""


class _Entry(NamedTuple):
    path: str
    blocks: int
    is_directory: bool


def _entries(directory: str) -> Iterator[_Entry]:
    """Yield the entries of a directory, except those that vanish meanwhile; a block has 512 bytes."""
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                blocks = entry.stat(follow_symlinks=False).st_blocks
                yield _Entry(entry.path, blocks, entry.is_dir(follow_symlinks=False))


def _digest(fd: int) -> str:
    digest, at = hashlib.sha256(), 0
    while chunk := os.pread(fd, _CHUNK_BYTES, at):
        digest.update(chunk)
        at += len(chunk)
    return digest.hexdigest()


@dataclass(slots=True)
class SavedState:
    """Saved state of a guest: a memfd of fixed size, and the number of bytes used."""

    fd: int
    length: int

    def close(self) -> None:
        """Close the memfd."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(slots=True, eq=False)
class Generation:
    """Generation of an instance: its run request and workers.

    Attributes:
        secrets_fd: memfd with its secrets, passed to its workers and never read here; -1 for none.
        probation: not committed yet, and may still be rolled back.
        is_serving: receives calls.
        dropped: ended for good.
        before_schema: `data_schema` of the generation that it replaces; None where it replaces none.
        had_pairs: a worker of it was admitted to the key-value store.
        past, past_metrics: figures of workers that have ended, and those of the component's own.
        unshared_reason: why it has a worker of its own although it may share one; empty if it may not, or does share.
        lost: how its latest worker ended while another generation was running.
        lost_at_fault: whether that counts as a crash.
        service_ended: how the run of its latest service ended, which was reported then.
        image_sha256, image_bytes: hash and size of its image, if it may share a worker.
        checks_asked, checks_missed, checks_failing: number of health checks, of failed ones, and of the latest
            consecutive failures.
        started: set each time that a worker of it has become ready.
    """

    run: host_api.Run
    image_fd: int
    secrets_fd: int = -1
    probation: bool = False
    is_serving: bool = False
    dropped: bool = False
    listener: Listener | None = None
    workers: list[WorkerHandle] = field(default_factory=list)
    past: CallStats = field(default_factory=CallStats)
    past_metrics: metrics_page.Figures = field(default_factory=dict)
    faults: int = 0
    kinds: frozenset[str] = frozenset()
    layers: dict[str, bool] = field(default_factory=dict)
    data: str = ""
    before_schema: int | None = None
    had_pairs: bool = False
    saved: SavedState | None = None
    unshared_reason: str = ""
    lost: str = ""
    lost_at_fault: bool = True
    service_ended: str = ""
    image_sha256: str = ""
    image_bytes: int = 0
    checks_asked: int = 0
    checks_missed: int = 0
    checks_failing: int = 0
    started: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        """Hash the image if it may be shared with other instances."""
        if self.run.share_worker:
            self.image_bytes = os.fstat(self.image_fd).st_size
            self.image_sha256 = self.run.image_sha256 or _digest(self.image_fd)

    @property
    def may_share(self) -> bool:
        """True if it takes a slot in a shared worker: the operator allows it, and no reason forbids it."""
        return self.run.share_worker and not self.unshared_reason

    @property
    def service(self) -> Service | None:
        """Trigger of a service; None for others."""
        return next(iter(self.run.manifest.triggers_of(Service)), None)

    @property
    def is_exclusive(self) -> bool:
        """True if another generation starts only once this one has stopped, and this one once another has."""
        return self.run.manifest.swap == "replace"

    @property
    def number(self) -> int:
        """Number of the generation, assigned by the agent."""
        return self.run.generation

    @property
    def alive(self) -> list[WorkerHandle]:
        """Workers that are ready and have not ended."""
        return [worker for worker in self.workers if worker.alive and worker.ready is not None]

    async def until_alive(self) -> None:
        """Wait until it has a worker."""
        while not self.alive:
            self.started.clear()
            await self.started.wait()

    def count_check(self, *, well: bool) -> None:
        """Count a result of its health check."""
        self.checks_asked += 1
        self.checks_missed += not well
        self.checks_failing = 0 if well else self.checks_failing + 1

    def checks(self) -> HealthChecks | None:
        """Return the results of its health check; None if its manifest has no health check."""
        if not self.run.manifest.health.check:
            return None
        well = not self.checks_failing and bool(self.alive)
        return HealthChecks(asked=self.checks_asked, missed=self.checks_missed, well=well)

    def figures(self) -> CallStats:
        """Return the sum of its workers' figures, including workers that have ended."""
        total = self.past
        for worker in self.workers:
            total = total.plus(worker.figures())
        return total

    def metrics(self) -> tuple[Metric, ...]:
        """Return the component's own figures, of all its workers."""
        present = [worker.metrics() for worker in self.workers]
        return metrics_page.metrics(metrics_page.merged([self.past_metrics, *present]))

    def keep_figures(self, worker: WorkerHandle) -> None:
        """Keep the figures of a worker that has ended, or is about to."""
        self.past = self.past.plus(worker.figures())
        self.past_metrics = metrics_page.merged([self.past_metrics, worker.metrics()])

    def keep_state(self, saved: SavedState) -> None:
        """Keep its saved state, in place of an earlier one."""
        if self.saved is not None:
            self.saved.close()
        self.saved = saved

    def close(self) -> None:
        """Close its descriptors."""
        if self.saved is not None:
            self.saved.close()
        for fd in (self.image_fd, self.secrets_fd):
            if fd >= 0:
                os.close(fd)
        self.image_fd = self.secrets_fd = -1
