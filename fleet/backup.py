"""A server's backup: what it knows, and none of its keys. Whoever finds one can read what boards run, and sign nothing.

One tar: the configuration, a consistent copy of the database, the TUF metadata, the artifacts, and the root certificate
of the CA. `fleet.rebuild` makes a server of it on another machine.
"""

import io
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fleet.protocol import caps
from fleet.server.home import Config, Home, HomeError
from fleet.store.errors import StoreError
from fleet.store.store import Store

_FILES_MAX: Final = 1_000_000
_DATABASE_MAX_BYTES: Final = 64 << 30
_LIMITS: Final = {
    "server.toml": 64 * caps.KIB,
    "fleet.db": _DATABASE_MAX_BYTES,
    "ca/ca.pem": 64 * caps.KIB,
    "repository/": caps.TARGETS_MAX_BYTES,
    "artifacts/": caps.ARTIFACT_MAX_BYTES,
}
"""What a backup may hold, and how large: names, and directories of plain files."""


class BackupError(Exception):
    """A backup cannot be made or read; one line: what, why, what to do."""


def create(home: Path, output: Path) -> int:
    """Write a server's backup, whether it runs or not; the bytes written.

    Raises:
        BackupError: there is no server, or the file cannot be written.
    """
    place = Home(home)
    try:
        fleet = Config.load(place.config).fleet
        beside = output.with_name(f".{output.name}.new")
        with tempfile.TemporaryDirectory(dir=place.server, prefix=".backup-") as scratch:
            copy = Path(scratch) / "fleet.db"
            store = Store.open(place.database, fleet=fleet)
            try:
                store.backup(copy)
            finally:
                store.close()
            handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
                    for name, path in _members(place, copy):
                        tar.add(path, arcname=name, recursive=False)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
        beside.replace(output)
    except (HomeError, StoreError) as error:
        raise BackupError(str(error)) from error
    except OSError as error:
        raise BackupError(f"cannot write the backup {output}: {error}") from error
    return size


def _members(place: Home, database: Path) -> Iterator[tuple[str, Path]]:
    yield "server.toml", place.config
    yield "fleet.db", database
    yield "ca/ca.pem", place.ca / "ca.pem"
    for directory in (place.repository, place.artifacts):
        for path in sorted(directory.iterdir()):
            if path.is_file() and not path.name.startswith("."):
                yield f"{directory.name}/{path.name}", path


def extract(backup: Path, into: Path) -> None:
    """Lay a backup out in a new directory; nothing in it is believed, and no name leads elsewhere.

    Raises:
        BackupError: it is none, or cannot be read or written.
    """
    try:
        with tarfile.open(backup, mode="r:") as tar:
            for number, member in enumerate(tar):
                if number >= _FILES_MAX or not member.isreg() or member.size > _limit(member.name):
                    raise BackupError(f"{backup} is no backup of a server: {member.name[:100]!r} has no place in one")
                path = into / member.name
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                source = tar.extractfile(member)
                assert source is not None
                with path.open("xb") as file:
                    while block := source.read(io.DEFAULT_BUFFER_SIZE * 16):
                        file.write(block)
    except tarfile.TarError as error:
        raise BackupError(f"{backup} is no backup of a server: {error}") from error
    except OSError as error:
        raise BackupError(f"cannot read the backup {backup}: {error}") from error
    for name in ("server.toml", "fleet.db", "repository/1.root.json"):
        if not (into / name).is_file():
            raise BackupError(f"{backup} is no whole backup of a server: {name} is not in it")


def _limit(name: str) -> int:
    directory, slash, rest = name.partition("/")
    if name in _LIMITS:
        return _LIMITS[name]
    plain = rest and "/" not in rest and not rest.startswith(".")
    return _LIMITS.get(directory + slash, -1) if plain else -1
