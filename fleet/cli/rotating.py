"""From what a person asks for to the keys that each role has afterwards. Pure: no file, no server, no question."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from securesystemslib.signer import Key

from fleet.cli.base import Exit, Fault
from fleet.protocol.manifest import Grants
from signing import repository, rotation
from signing.rotation import Namespace, RoleKeys
from signing.trust import DIRECTOR

TOP = ("root", "targets", "snapshot", "timestamp")


@dataclass(frozen=True, slots=True)
class Change:
    """The roles that get other keys."""

    roles: Mapping[str, RoleKeys] = field(default_factory=dict)
    director: RoleKeys | None = None
    namespaces: Mapping[str, Namespace] = field(default_factory=dict)

    def with_keys(self, files: Mapping[str, bytes], role: str, keys: RoleKeys) -> "Change":
        """And these for one role more."""
        if role in TOP:
            return replace(self, roles={**self.roles, role: keys})
        if role == DIRECTOR:
            return replace(self, director=keys)
        space = Namespace(keys)
        if role in repository.namespaces(files):
            before = rotation.namespace_of(files, role)
            kept = {key.keyid for key in keys.keys}
            space = replace(before, signers=keys, ends={k: end for k, end in before.ends.items() if k in kept})
        return replace(self, namespaces={**self.namespaces, role: space})


def replaced(
    files: Mapping[str, bytes],
    role: str,
    *,
    mine: Collection[str],
    to: tuple[Key, ...],
    make: Callable[[], Key],
    threshold: int | None,
) -> Change:
    """Other keys for a role.

    Args:
        files: the repository's.
        role: of root, the director, or a namespace, which may be new.
        mine: ids of this person's keys: without `to`, those of the role are replaced by a new one.
        to: exactly these, empty for none named.
        make: makes the new key.
        threshold: None to keep it.

    Raises:
        Fault: none of the role's keys is this person's, and none was named.
    """
    known = (*TOP, DIRECTOR, *repository.namespaces(files))
    before = rotation.keys_of(files, role) if role in known else None
    if to:
        keys = to
    elif before is None:
        keys = (make(),)
    else:
        online = role in {"snapshot", "timestamp", DIRECTOR}
        kept = () if online else tuple(key for key in before.keys if key.keyid not in mine)
        if len(kept) == len(before.keys):
            raise Fault(
                f"none of the keys of {role} is yours", "so none can be replaced", "name who signs it with --to"
            )
        keys = (*kept, make())
    least = before.threshold if before is not None else 1
    return Change().with_keys(files, role, RoleKeys(keys, threshold or min(least, len(keys))))


def without(files: Mapping[str, bytes], keyid: str) -> Change:
    """Every role without this key.

    Raises:
        Fault: it signs nothing, or a role would be left with too few.
    """
    change, found = Change(), False
    for role in (*TOP, DIRECTOR, *repository.namespaces(files)):
        keys = rotation.keys_of(files, role)
        left = tuple(key for key in keys.keys if key.keyid != keyid)
        if len(left) == len(keys.keys):
            continue
        found = True
        if len(left) < keys.threshold:
            raise Fault(
                f"{role} would be left with {len(left)} keys",
                f"it needs {keys.threshold}",
                f"give it others: fleet keys rotate {role}",
                code=Exit.REFUSED,
            )
        change = change.with_keys(files, role, RoleKeys(left, keys.threshold))
    if not found:
        raise Fault(f"the key {keyid[:12]} signs nothing", "no role has it", "fleet keys list shows who signs what")
    return change


def for_pipeline(
    files: Mapping[str, bytes], name: str, key: Key, *, now: datetime, ends: datetime, ceiling: Grants | None
) -> Namespace:
    """A namespace with one more key, a pipeline's, that ends; made when there is none. Keys that have ended go.

    Raises:
        Fault: it has no ceiling, and none was given.
    """
    if name in repository.namespaces(files):
        before = rotation.namespace_of(files, name)
        limit = before.ceiling if ceiling is None else ceiling
        over = {keyid for keyid, end in before.ends.items() if end <= now}
        kept = tuple(each for each in before.signers.keys if each.keyid not in over)
        lives = {keyid: end for keyid, end in before.ends.items() if keyid not in over}
        signers = RoleKeys((*kept, key), before.signers.threshold)
        space = Namespace(signers, limit, {**lives, key.keyid: ends})
    else:
        space = Namespace(RoleKeys((key,)), ceiling, {key.keyid: ends})
    if space.ceiling is None:
        raise Fault(
            f"the namespace {name} has no ceiling",
            "whoever steals the pipeline's key could grant anything in it",
            "say what it may reach: --ceiling wasi:http, or --namespace with another name",
        )
    return space
