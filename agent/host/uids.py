"""Which user each instance's lanes become: a uid from a reserved range, the same after a restart, never another's.

Only a host that runs as root can give users away. The range is one that no account, container or dynamic user has
(systemd, "Users, Groups, UIDs and GIDs": above the container range). A uid is not given again while the range lasts, so
nobody inherits files; then those of instances that no longer run are, the longest unused first.

A board has one host, in the packaged place. Where there are more (tests, a demonstration), each has a range of its own,
by where its state is: the kernel counts processes by user, so hosts that shared users would share their limits.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Final

FIRST: Final = 1_879_048_192
COUNT: Final = 65_000
_RANGES: Final = 2048
_RANGE: Final = 1 << 16
_END: Final = FIRST + _RANGES * _RANGE
_PACKAGED: Final = Path("/var/lib/wasmfleet-host")


def first_of(state: Path) -> int:
    """Where the range of the host begins whose state directory this is."""
    if state == _PACKAGED:
        return FIRST
    digest = hashlib.sha256(os.fsencode(state.resolve())).digest()
    return FIRST + _RANGE * (1 + int.from_bytes(digest[:8]) % (_RANGES - 1))


class Uids:
    """The uids given, kept in a file of the host's state directory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._first = first_of(path.parent)
        self._given: dict[str, int] = {}
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            self._given = {str(name): int(uid) for name, uid in kept.items() if FIRST <= int(uid) < _END}
        except FileNotFoundError:
            pass
        except (OSError, ValueError, AttributeError):
            path.unlink(missing_ok=True)  # written whole or not at all, so this is not ours

    def of(self, instance: str) -> int | None:
        """The uid of an instance, given now if it has none; None where this host cannot give any."""
        if os.geteuid() != 0:
            return None
        found = self._given.pop(instance, None)
        if found is None:
            found = self._free()
            self._given[instance] = found
            self._save()
        else:
            self._given[instance] = found  # the longest unused stands first
        return found

    def _free(self) -> int:
        own = range(self._first, self._first + COUNT)
        free = 1 + max((uid for uid in self._given.values() if uid in own), default=self._first - 1)
        if free in own:
            return free
        oldest = next(iter(self._given))
        return self._given.pop(oldest)

    def _save(self) -> None:
        part = self._path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            json.dump(self._given, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)
