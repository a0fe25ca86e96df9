"""Data packages: the files that are kept, where they are mounted, and the judgement of a switch.

A file is named by its package and its sha256. What is committed, under way, or read by an instance stays, and of each
package that stays one version more, to go back to. A switch is judged by the instances that read the package: it is
well once each of them runs with it, and has failed where one of them went back.
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from agent import disk
from agent.disk import Write
from agent.host.ipc import host_api
from agent.update.images import ImageError
from agent.update.machine import Event
from agent.update.state import Change, DataRef, DeploymentState, EffectResult, bound_key, digest_of, item_key
from fleet.protocol import files
from fleet.protocol.assignment import Item
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Manifest
from fleet.protocol.names import TargetName

_SUFFIX: Final = ".data"
_READABLE: Final = 0o444

_found_sound: dict[Path, tuple[object, ...]] = {}
"""Files that were hashed and found as signed, with what tells that they have not changed since."""


def file_of(directory: Path, target: str, sha256: str) -> Path:
    """Return the file of a version of a package."""
    name = TargetName.from_path(target)
    return directory / f"{name.namespace}.{name.name}.{sha256}{_SUFFIX}"


def is_sound(path: Path, length: int, sha256: str) -> bool:
    """Tell whether a file is as signed, hashing it unless it was before; remove one that was changed."""
    try:
        with files.open_to_read(path) as file:
            found = os.fstat(file.fileno())
            mark = (sha256, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
            if _found_sound.get(path) == mark:
                return True
            whole = found.st_size == length and hashlib.file_digest(file, "sha256").hexdigest() == sha256
            if whole and found.st_mode & 0o777 != _READABLE:
                os.fchmod(file.fileno(), _READABLE)  # the worker that reads it is another user
                found = os.fstat(file.fileno())
                mark = (sha256, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    except OSError:
        return False
    if whole:
        _found_sound[path] = mark
        return True
    _found_sound.pop(path, None)
    disk.remove(Write.ARTIFACT_DAMAGED, path, missing_ok=True)
    return False


def mounts(directory: Path, manifest: Manifest, data: Iterable[DataRef]) -> tuple[host_api.DataMount, ...]:
    """Return what the host is to mount for an instance; the files are hashed, unless they were before.

    Raises:
        ImageError: NOT_FOUND: a file is lost, or was changed and is removed.
    """
    found = []
    for each in data:
        path = file_of(directory, each.target, each.sha256)
        if not is_sound(path, each.length, each.sha256):
            raise ImageError(RejectCode.NOT_FOUND, f"the data package {each.target} is lost or damaged on this disk")
        found.append(host_api.DataMount(path=manifest.data[each.name].path, file=str(path)))
    return tuple(found)


def in_use(state: DeploymentState) -> set[str]:
    """Return the sha256 of each version that is committed, under way, or read by an instance."""
    changes = [active.change for active in state.active.values()]
    items = [each.item for each in state.committed.values()] + [each.item for each in changes if each.item is not None]
    bound = [
        ref
        for data in ([each.data for each in state.committed.values()], [each.data for each in changes])
        for refs in data
        for ref in refs
    ]
    return {item.sha256 for item in items} | {ref.sha256 for ref in bound}


def make_room(directory: Path, keep: set[str], *, most_bytes: int, need_bytes: int = 0, spare: bool = True) -> int:
    """Remove versions that nothing uses, oldest first; return how many bytes of the quota are then missing.

    Args:
        directory: of packages.
        keep: sha256 of those in use.
        most_bytes: quota of all together.
        need_bytes: for a version that is to come.
        spare: keep, of each package of which a version is in use, the newest other one where the quota allows it.
    """
    kept: dict[str, list[tuple[float, int, Path]]] = {}
    used: set[str] = set()
    total = need_bytes
    for path in directory.glob(f"*{_SUFFIX}"):
        try:
            stat = path.stat()
        except OSError:
            continue
        package, _, sha256 = path.name.removesuffix(_SUFFIX).rpartition(".")
        total += stat.st_size
        if sha256 in keep:
            used.add(package)
        else:
            kept.setdefault(package, []).append((stat.st_mtime, stat.st_size, path))
    spared = []
    for package, versions in kept.items():
        versions.sort()
        if spare and package in used:
            spared.append(versions.pop())
        for _, size, path in versions:
            total -= _removed(path, size)
    for _, size, path in sorted(spared):
        if total > most_bytes:
            total -= _removed(path, size)
    return max(0, total - most_bytes)


def _removed(path: Path, size: int) -> int:
    try:
        disk.remove(Write.EVICTED, path, missing_ok=True)
    except OSError:
        return 0
    _found_sound.pop(path, None)
    return size


def judge(state: DeploymentState, change: Change, now: float) -> EffectResult | None:
    """Judge the switch to a version of a package; None while instances that read it are being swapped."""
    assert change.item is not None
    if state.desired is None:
        return None  # after a boot, nobody has said yet which instances stay
    of = TargetName.from_path(change.item.target)
    readers, waits = 0, False
    for name, have in state.committed.items():
        if of.name not in have.manifest.data or TargetName.from_path(have.item.target).namespace != of.namespace:
            continue
        bound = state.bind(have.item, have.manifest)
        if isinstance(bound, str) or all(each.sha256 != change.item.sha256 for each in bound):
            continue  # does not take this version
        if any(each.sha256 == change.item.sha256 for each in have.data):
            readers += 1
            continue
        wanted = state.wanted().get(name)
        if wanted is None and name not in state.active:
            continue  # being removed
        known = state.failed.get((name, bound_key(item_key(have.item), digest_of(bound)), have.item.attempt))
        if known is not None and name not in state.active and (known.retry_at is None or known.retry_at > now):
            message = f"{name} went back to its former data: {known.message}"
            return EffectResult(event=Event.UNWELL, code=known.code, message=message)
        if wanted is not None and item_key(wanted) != item_key(have.item) and name not in state.active:
            continue  # waits for another version of its own, which cannot be had
        waits = True
    return None if waits else EffectResult(event=Event.WELL, exercised=readers > 0)


def same_kind(item: Item, manifest: Manifest, before: Manifest | None) -> str:
    """Say why an item cannot take the place of the committed one; empty where it can."""
    if before is None or before.is_data == manifest.is_data:
        return ""
    was, now = ("a data package", "an instance") if before.is_data else ("an instance", "a data package")
    return f"{item.instance} is {was} on this device, and would be {now}: remove it first"
