"""Verifier state: remembered versions that make a rollback visible.

A plain value. `StateStore` (`signing.updater`) keeps it where a torn write cannot reach (SQLite with synchronous=FULL,
or a file replaced atomically), apart from the cache of metadata files, and stores a new one *before* anything is done
about what was accepted.

Every remembered version belongs to the keys that signed it. When root gives a role other keys, what was remembered of
the old ones is dropped: someone who signed version 2^31 with a stolen key has not locked the fleet for ever (TUF
specification, 5.3.11: recovery from fast-forward attacks).
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

import msgspec

from fleet.protocol import bounds, wire

VERSION_MAX: Final = bounds.NUMBER_MAX
"""The largest version that anyone accepts."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Remembered(msgspec.Struct, frozen=True):
    """The newest version seen of one signed thing.

    Attributes:
        version: its version (a command's sequence).
        sha256: of its bytes (of the payload for envelopes), so that an equal version with other bytes is noticed.
        keys: the digest of the key set that it was verified against.
    """

    version: int
    sha256: str
    keys: str


class VerifierState(msgspec.Struct, frozen=True, kw_only=True):
    """Everything remembered, as one value; `encode` and `decode` for storing it.

    Attributes:
        root: version of the newest root verified.
        online: digest of the key sets of timestamp and snapshot; `roles` and `meta` are of these keys.
        roles: role name -> newest version verified (timestamp, snapshot, targets, namespaces).
        meta: file name -> newest version promised for it by timestamp and snapshot.
        assignment: the accepted assignment.
        command: the newest command obeyed.
        epochs: component (`namespace/name`) -> security epoch of what was committed.
        secrets: `instance/name` -> newest version of a secret that was committed.
        floor: it is no earlier than this, whatever the clock says.
    """

    root: int = 0
    online: str = ""
    roles: dict[str, Remembered] = {}
    meta: dict[str, int] = {}
    assignment: Remembered | None = None
    command: Remembered | None = None
    epochs: dict[str, int] = {}
    secrets: dict[str, int] = {}
    floor: datetime = _EPOCH

    def encode(self) -> bytes:
        """Encode as JSON, for a `StateStore`."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> "VerifierState":
        """Read what `encode` made; raises `msgspec.DecodeError` on damage of any kind."""
        try:
            return msgspec.json.decode(data, type=cls)
        except wire.JSON_ERRORS as error:
            raise msgspec.DecodeError(str(error)) from error

    def time(self, wall_clock: datetime) -> datetime:
        """Return the reference time: the wall clock, or the floor where the clock is behind it."""
        return max(wall_clock, self.floor)

    def with_floor(self, floor: datetime) -> "VerifierState":
        """With the time floor raised to `floor`; it never falls. Enrolment sets it from the token."""
        return msgspec.structs.replace(self, floor=max(self.floor, floor))

    def with_root(self, version: int, online: str) -> "VerifierState":
        """With the newest root; other keys for timestamp or snapshot drop what was remembered of the old ones."""
        if online == self.online:
            return msgspec.structs.replace(self, root=version)
        return msgspec.structs.replace(self, root=version, online=online, roles={}, meta={})

    def with_role(self, role: str, remembered: Remembered) -> "VerifierState":
        """With the newest version of a role."""
        return msgspec.structs.replace(self, roles={**self.roles, role: remembered})

    def with_meta(self, versions: Mapping[str, int]) -> "VerifierState":
        """With the versions that timestamp or snapshot promise."""
        return msgspec.structs.replace(self, meta={**self.meta, **versions})

    def with_committed(self, component: str, epoch: int) -> "VerifierState":
        """With the security epoch of a component that was COMMITTED (never before); it never falls."""
        return msgspec.structs.replace(
            self, epochs={**self.epochs, component: max(epoch, self.epochs.get(component, 0))}
        )

    def with_secrets(self, instance: str, versions: Mapping[str, int]) -> "VerifierState":
        """With the versions of an instance's secrets, by name, that were COMMITTED; they never fall."""
        newer = {f"{instance}/{name}": version for name, version in versions.items()}
        newer = {key: max(version, self.secrets.get(key, 0)) for key, version in newer.items()}
        return msgspec.structs.replace(self, secrets={**self.secrets, **newer}) if newer else self

    def role(self, name: str, keys: str) -> Remembered | None:
        """Return what is remembered of a role under these keys; None for nothing."""
        known = self.roles.get(name)
        return known if known is not None and known.keys == keys else None
