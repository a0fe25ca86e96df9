"""Verifier state: remembered versions, by which rollbacks are detected.

A plain value. `StateStore` (`signing.updater`) keeps it safe from torn writes (in SQLite with synchronous=FULL, or in a
file that is replaced atomically) and apart from the cache of metadata files. A new state is stored *before* anything
that was accepted is acted on.

Every remembered version belongs to the keys that signed it. When root gives a role other keys, the versions of the old
keys are dropped, so that an attacker who signed version 2^31 with a stolen key has not locked the fleet forever (TUF
specification, 5.3.11: recovery from fast-forward attacks).
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

import msgspec

from fleet.protocol import bounds, wire

VERSION_MAX: Final = bounds.NUMBER_MAX
"""Largest version that is accepted anywhere."""

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


class Remembered(msgspec.Struct, frozen=True):
    """Newest version seen of a role, an assignment or a command.

    Attributes:
        version: of the role or assignment; a command's sequence.
        sha256: of the bytes (of an envelope's payload), to detect an equal version with other bytes.
        keys: digest of the key set that verified it.
    """

    version: int
    sha256: str
    keys: str


class VerifierState(msgspec.Struct, frozen=True, kw_only=True):
    """State that a verifier remembers; stored through `encode` and `decode`.

    Attributes:
        root: version of the newest root verified.
        online: digest of the key sets of timestamp and snapshot; `roles` and `meta` are of these keys.
        roles: role name -> newest version verified (timestamp, snapshot, targets, namespaces).
        meta: file name -> newest version promised for it by timestamp and snapshot.
        assignment: the newest accepted assignment.
        command: the newest accepted command.
        epochs: component (`namespace/name`) -> security epoch of what was committed.
        secrets: `instance/name` -> newest version of a secret that was committed.
        floor: earliest possible current time, whatever the clock shows.
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
        """Read an encoded state; raises `msgspec.DecodeError` if it is damaged in any way."""
        try:
            return msgspec.json.decode(data, type=cls)
        except wire.JSON_ERRORS as error:
            raise msgspec.DecodeError(str(error)) from error

    def time(self, wall_clock: datetime) -> datetime:
        """Return the reference time: the system's clock, or the floor if the clock is behind it."""
        return max(wall_clock, self.floor)

    def with_floor(self, floor: datetime) -> "VerifierState":
        """Return the state with the time floor raised to `floor`; the floor never falls."""
        return msgspec.structs.replace(self, floor=max(self.floor, floor))

    def with_root(self, version: int, online: str) -> "VerifierState":
        """Return the state with the newest root; new timestamp or snapshot keys drop the versions of the old ones."""
        if online == self.online:
            return msgspec.structs.replace(self, root=version)
        return msgspec.structs.replace(self, root=version, online=online, roles={}, meta={})

    def with_role(self, role: str, remembered: Remembered) -> "VerifierState":
        """Return the state with the newest version of a role."""
        return msgspec.structs.replace(self, roles={**self.roles, role: remembered})

    def with_meta(self, versions: Mapping[str, int]) -> "VerifierState":
        """Return the state with the versions that timestamp or snapshot promise (file name -> version)."""
        return msgspec.structs.replace(self, meta={**self.meta, **versions})

    def with_committed(self, component: str, epoch: int) -> "VerifierState":
        """Return the state with the security epoch of a component, to be called once COMMITTED; it never falls."""
        return msgspec.structs.replace(
            self, epochs={**self.epochs, component: max(epoch, self.epochs.get(component, 0))}
        )

    def with_secrets(self, instance: str, versions: Mapping[str, int]) -> "VerifierState":
        """Return the state with the versions of an instance's secrets, once COMMITTED; versions never fall."""
        newer = {f"{instance}/{name}": version for name, version in versions.items()}
        newer = {key: max(version, self.secrets.get(key, 0)) for key, version in newer.items()}
        return msgspec.structs.replace(self, secrets={**self.secrets, **newer}) if newer else self

    def role(self, name: str, keys: str) -> Remembered | None:
        """Return the newest version of a role seen under these keys; None for none."""
        known = self.roles.get(name)
        return known if known is not None and known.keys == keys else None
