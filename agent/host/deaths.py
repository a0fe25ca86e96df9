"""How often each instance's lanes have died in a row: remembered over restarts of host and board.

A component that brings its lanes (or the whole board) down gets no fresh set of chances from each reboot: it starts
again with the count it had, so that one more death is a quarantine. Written only when something dies or has recovered.
"""

import json
import os
from pathlib import Path


class Deaths:
    """The counts, by instance and target, in a file of the host's state directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts: dict[str, int] = {}
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            self._counts = {str(key): int(count) for key, count in kept.items()}
        except (OSError, ValueError, AttributeError):
            self._counts = {}  # none yet, or not ours: everybody starts anew
        self.written_bytes = 0

    @staticmethod
    def _key(instance: str, target: str) -> str:
        return f"{instance} {target}"

    def of(self, instance: str, target: str) -> int:
        """Deaths in a row of this target as this instance."""
        return self._counts.get(self._key(instance, target), 0)

    def note(self, instance: str, target: str, count: int) -> None:
        """Remember the count; 0 forgets it, and what other targets of this instance had."""
        key = self._key(instance, target)
        if self._counts.get(key, 0) == count:
            return
        self._counts = {other: n for other, n in self._counts.items() if not other.startswith(f"{instance} ")}
        if count:
            self._counts[key] = count
        self._save()

    def _save(self) -> None:
        data = json.dumps(self._counts).encode()
        part = self._path.with_suffix(".part")
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)
        self.written_bytes += len(data)
