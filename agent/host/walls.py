"""The walls as people read them: each layer, in each of the ways in which a host may be run, and which way this one is.

A layer that the kernel lacks holds in none of the ways; one that takes namespaces never holds for a user without them.
"""

from collections.abc import Mapping
from typing import Final

ROOT: Final = "root service"
USER: Final = "user with namespaces"
BARE: Final = "user without namespaces"
WAYS: Final = (ROOT, USER, BARE)

_BY_NAMESPACES: Final = frozenset({"user", "network", "mount"})
_MEANING: Final = {
    "limits": "memory, descriptors and threads are limited",
    "user": "lanes are another user, or have no rights in a user namespace",
    "network": "lanes have an empty network",
    "mount": "lanes see an empty file system",
    "privileges": "nothing executed gains rights",
    "landlock": "files, ports and abstract sockets are refused a second time",
    "seccomp": "no process, socket, executable memory, tracing or signal to others",
}
_SHARED: Final = (
    "a lane that several share is no wall between them: who breaks out of one has the memory of the others; "
    "only instances of one publisher, where the operator lets them, and none with files, secrets or leave to connect"
)
_CGROUP: Final = ("Delegate=", "if given", "if given", "lanes of an instance share one limit of memory")


def way(euid: int, layers: Mapping[str, bool]) -> str:
    """In which of the ways a host of this user is run, whose lanes have these layers."""
    if euid == 0:
        return ROOT
    return USER if layers.get("user") else BARE


def holds(layer: str, in_way: str, here: str, layers: Mapping[str, bool]) -> bool:
    """Whether a layer holds in one of the ways, as far as can be said where `layers` were tried in the way `here`."""
    if in_way == here or layer not in _BY_NAMESPACES:
        return layers[layer]
    return in_way != BARE


def table(here: str, layers: Mapping[str, bool]) -> list[str]:
    """The lines of the table, the column of `here` in brackets."""
    heads = [f"[{each}]" if each == here else each for each in WAYS]
    lines = ["  " + " " * 11 + "".join(f"{head:<26}" for head in heads).rstrip()]
    for layer in layers:
        cells = ["yes" if holds(layer, each, here, layers) else "NO" for each in WAYS]
        lines.append(f"  {layer:<11}" + "".join(f"{cell:<26}" for cell in cells) + _MEANING[layer])
    lines.append(f"  {'cgroup':<11}" + "".join(f"{cell:<26}" for cell in _CGROUP[:3]) + _CGROUP[3])
    lines.append(f"  {'shared':<11}" + "".join(f"{'NO':<26}" for _ in WAYS) + _SHARED)
    return lines
