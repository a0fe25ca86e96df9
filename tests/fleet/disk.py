"""A record of what a process brought onto the medium: names that a power cut could still undo are found by it."""

import os
from pathlib import Path


class Medium:
    """Watches renames, links and fsyncs of this process while a test runs.

    Args:
        tree: files below it that are written in between must be synced too; databases look after themselves.
    """

    def __init__(self, monkeypatch, tree=None):
        self._tree = tree
        self._before = self._files()
        self._synced_files: set[int] = set()
        self._unsynced_names: dict[Path, set[str]] = {}
        self.torn: list[str] = []
        for name in ("rename", "replace", "link"):
            monkeypatch.setattr(os, name, self._naming(getattr(os, name)))
        monkeypatch.setattr(os, "fsync", self._syncing(os.fsync))

    @property
    def at_risk(self) -> list[str]:
        """Names whose directory was not synced afterwards: a power cut brings back what was there before."""
        return sorted(str(directory / name) for directory, names in self._unsynced_names.items() for name in names)

    @property
    def unsynced(self) -> list[str]:
        """Files that were written and whose content may be lost."""
        changed = {inode: name for inode, name in self._files().items() if inode not in self._before}
        return sorted(name for (inode, _), name in changed.items() if inode not in self._synced_files)

    def _files(self) -> dict[tuple[int, int], str]:
        if self._tree is None:
            return {}
        files = (path for path in self._tree.rglob("*") if path.is_file() and ".db" not in path.suffix)
        return {(path.stat().st_ino, path.stat().st_mtime_ns): str(path) for path in files}

    def _naming(self, real):
        def call(source, target, *args, **kwargs):
            content = os.lstat(source)
            real(source, target, *args, **kwargs)
            place = Path(target).absolute()
            self._unsynced_names.setdefault(place.parent, set()).add(place.name)
            if content.st_ino not in self._synced_files:
                self.torn.append(str(place))

        return call

    def _syncing(self, real):
        def call(descriptor):
            real(descriptor)
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            self._synced_files.add(os.fstat(number).st_ino)
            self._unsynced_names.pop(Path(f"/proc/self/fd/{number}").readlink(), None)

        return call
