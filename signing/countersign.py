"""Snapshot and timestamp that were signed elsewhere, judged before a server shows them.

A server that does not hold their keys takes them from a publisher host. It adds nothing to them and cannot: what it may
show is what that host has verified and signed. Pure over bytes.
"""

from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Final

from tuf.api.metadata import Root, Snapshot, Timestamp

from signing import metadata, repository
from signing.errors import ConflictError, RepositoryError

SLACK: Final = timedelta(hours=1)
"""How far two hosts' clocks may be apart."""


def check(current: Mapping[str, bytes], *, snapshot: bytes | None, timestamp: bytes, now: datetime) -> dict[str, bytes]:
    """The files to add, in their order; none where exactly this is shown already.

    Args:
        current: the repository's files with everything that is to become visible.
        snapshot: None where the newest one stays.
        timestamp: over it.
        now: UTC.

    Raises:
        Rejected: UNSIGNED, MALFORMED, TOO_LARGE, or another snapshot than the timestamp promises.
        ConflictError: not the next version.
        RepositoryError: it does not list every role's newest version, or has expired, or is valid for too long.
    """
    root = metadata.parse(Root, repository.latest(current, "root")[1], "root").signed
    if timestamp == current.get("timestamp.json") and snapshot is None and repository.online_stands(current):
        return {}
    files = {} if snapshot is None else _snapshot(current, root, snapshot, now)
    head = metadata.parse(Timestamp, timestamp, "timestamp")
    metadata.verify_metadata(root, "timestamp", head)
    before = current.get("timestamp.json")
    known = 0 if before is None else metadata.parse(Timestamp, before, "timestamp").signed.version
    if head.signed.version <= known:
        raise ConflictError(f"the timestamp is at version {known}, and this is version {head.signed.version}")
    _check_life("timestamp", head.signed.expires, now)
    version, data = repository.latest(dict(current) | files, "snapshot")
    if head.signed.snapshot_meta.version != version:
        raise RepositoryError("the timestamp promises another snapshot than the newest")
    metadata.check_file(head.signed.snapshot_meta, data, "snapshot")
    files["timestamp.json"] = timestamp
    if not repository.online_stands(dict(current) | files):
        raise RepositoryError("the snapshot does not show every role's newest version")
    return files


def _snapshot(current: Mapping[str, bytes], root: Root, data: bytes, now: datetime) -> dict[str, bytes]:
    new = metadata.parse(Snapshot, data, "snapshot")
    metadata.verify_metadata(root, "snapshot", new)
    try:
        version = repository.latest(current, "snapshot")[0]
    except RepositoryError:
        version = 0
    if new.signed.version != version + 1 and current.get(f"{version}.snapshot.json") != data:
        raise ConflictError(f"snapshot is at version {version}, and this is version {new.signed.version}")
    _check_life("snapshot", new.signed.expires, now)
    if new.signed.meta != repository.promised(current):
        raise RepositoryError("the snapshot lists other versions than were published")
    return {f"{new.signed.version}.snapshot.json": data}


def _check_life(role: str, expires: datetime, now: datetime) -> None:
    if expires <= now:
        raise RepositoryError(f"the {role} has expired")
    if expires > repository.until(now, role) + SLACK:
        raise RepositoryError(f"the {role} is valid for too long: until {expires:%Y-%m-%d %H:%M}")
