"""One generation of an instance: what to run, the lanes that run it, and its figures over all of them."""

import asyncio
import contextlib
import errno
import hashlib
import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from agent.host.ipc import host_api
from agent.host.ipc.host_api import StartError
from agent.host.ipc.stats_page import CallStats
from agent.host.supervisor.resources import Listener
from agent.host.supervisor.worker_handle import WorkerHandle
from fleet.protocol.codes import RejectCode
from fleet.protocol.messages import HealthChecks

_CHUNK_BYTES: Final = 1024 * 1024

_ENTRY_BYTES: Final = 4096


async def data_directory(run: host_api.Run, uid: int | None, parent: Path, old: "Generation | None") -> str:
    """The directory of this generation's data, made and given to its user, if it may have files; else empty.

    One directory for each `data_schema`: a generation with another schema than the `old` one gets a copy, so that going
    back finds the data as they were.

    Raises:
        StartError: it cannot be made, or not copied.
    """
    if not any(name.startswith("wasi:filesystem") for name in run.grants.interfaces):
        return ""
    schema = run.manifest.data_schema
    path = (Path(run.data) if run.data else parent / run.instance) / str(schema)
    try:
        if old is not None and old.data and old.run.manifest.data_schema != schema:
            if path.exists():  # of an attempt that did not last
                await _remove(path)
            await _copy(old.data, path)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if uid is not None:
            os.chown(path, uid, uid, follow_symlinks=False)
    except OSError as error:
        raise StartError(RejectCode.START_FAILED, f"{run.instance}: no data directory: {error}") from error
    return str(path)


async def _copy(old: str, new: Path) -> None:
    process = await asyncio.create_subprocess_exec("cp", "-a", "--", old, str(new), stderr=subprocess.PIPE)
    _, said = await process.communicate()
    if process.returncode != 0:
        await _remove(new)
        raise OSError(f"its data cannot be copied for another schema: {said.decode(errors='replace').strip()[-300:]}")


async def _remove(path: Path) -> None:
    """By `rm`, as copying is by `cp`: a guest may have made more directories within each other than Python follows."""
    process = await asyncio.create_subprocess_exec("rm", "-rf", "--", str(path), stderr=subprocess.DEVNULL)
    await process.wait()


async def forget_other_schemas(data: str) -> None:
    """Remove what generations with another schema left beside this directory."""
    if data:
        for other in Path(data).parent.iterdir():
            if other.name != Path(data).name:
                await _remove(other)


def too_much(directory: str, most_bytes: int) -> str:
    """Why a data directory is too much for a board that allows `most_bytes` of disk; empty where it is not.

    An entry counts as a block even when it holds nothing, since a disk runs out of those too. What is counted ends
    where it is too much, so that no guest can make the counting long; links are not followed. An eighth more is let
    pass: blocks and directories are not the guest's doing.
    """
    total, todo, most = 0, [directory], most_bytes + most_bytes // 8
    while todo:
        try:
            for path, blocks, within in _listed(todo.pop()):
                total += max(blocks * 512, _ENTRY_BYTES)
                if total > most:
                    return f"its data takes {total} bytes of disk and more, {most_bytes} are allowed"
                if within:
                    todo.append(path)
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return "its data lies deeper than the kernel takes a path"
    return ""


def _listed(directory: str) -> Iterator[tuple[str, int, bool]]:
    """What lies in a directory: path, blocks of 512 bytes, whether it is a directory. Not what goes meanwhile."""
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                yield entry.path, entry.stat(follow_symlinks=False).st_blocks, entry.is_dir(follow_symlinks=False)


def _digest(fd: int) -> str:
    digest, at = hashlib.sha256(), 0
    while chunk := os.pread(fd, _CHUNK_BYTES, at):
        digest.update(chunk)
        at += len(chunk)
    return digest.hexdigest()


@dataclass(slots=True)
class Saved:
    """A state: a memfd of fixed size, and how much of it counts."""

    fd: int
    length: int

    def close(self) -> None:
        """Let it go."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@dataclass(slots=True)
class Generation:
    """One generation: what to run, and the lanes that run it.

    Attributes:
        alone: why it has a lane of its own although it may share one; empty for no such reason.
        lost: how its last lane ended that ended while another generation ran.
        image, image_bytes: of one that may share: its image's sha256 and size.
        queue: of one that may have several lanes: where clients wait for whichever is idle, to put in and to take out.
        secrets_fd: a memfd with its secrets, which is handed to its lanes and never read here; -1 for none.
        probation: the agent has not committed it yet, and may still go back.
        asked, missed, unwell: questions of its health check, those without a good answer, and of these the last in a
            row.
    """

    run: host_api.Run
    image_fd: int
    secrets_fd: int = -1
    listener: Listener | None = None
    lanes: list[WorkerHandle] = field(default_factory=list)
    past: CallStats = field(default_factory=CallStats)
    faults: int = 0
    kinds: frozenset[str] = frozenset()
    layers: dict[str, bool] = field(default_factory=dict)
    data: str = ""
    dropped: bool = False
    saved: Saved | None = None
    alone: str = ""
    lost: str = ""
    image: str = ""
    image_bytes: int = 0
    queue: tuple[socket.socket, socket.socket] | None = None
    probation: bool = False
    asked: int = 0
    missed: int = 0
    unwell: int = 0

    def __post_init__(self) -> None:
        """Name the image by what is in it, where others may use the same."""
        if self.run.share_lane:
            self.image_bytes = os.fstat(self.image_fd).st_size
            self.image = _digest(self.image_fd)

    @property
    def shares(self) -> bool:
        """Whether it takes a seat in a lane that it shares: the operator lets it, and nothing speaks against it."""
        return self.run.share_lane and not self.alone

    @property
    def number(self) -> int:
        """The agent's number for it."""
        return self.run.generation

    @property
    def alive(self) -> list[WorkerHandle]:
        """Its lanes that run."""
        return [lane for lane in self.lanes if lane.alive and lane.ready is not None]

    def count_check(self, *, well: bool) -> None:
        """Count an answer of its health check."""
        self.asked += 1
        self.missed += not well
        self.unwell = 0 if well else self.unwell + 1

    def checks(self) -> HealthChecks | None:
        """The answers of its health check; None where its manifest promises none."""
        if not self.run.manifest.health.check:
            return None
        return HealthChecks(asked=self.asked, missed=self.missed, well=not self.unwell and bool(self.alive))

    def figures(self) -> CallStats:
        """The sum over its lanes, dead ones too."""
        total = self.past
        for lane in self.lanes:
            total = total.plus(lane.page.read())
        return total
