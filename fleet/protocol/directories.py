"""Directories of a device that its owner lets components read: their names, and where components see them.

The owner names a directory (`[policy.directories] maps = "/srv/maps"`); a grant says at which path a component sees
the one of that name (`[grants.directories] "/maps" = "maps"`). No release knows a path of a device.
"""

import re
from collections.abc import Mapping
from typing import Final

from fleet.protocol import names

DIRECTORIES_MAX: Final = 8
"""Directories of one grant."""

OFFERED_MAX: Final = 16
"""Directories that one owner names."""

DATA: Final = "/data"
"""Place of a component's own files, below which nothing else is mounted."""

_PLACE: Final = re.compile(r"(/[A-Za-z0-9_-][A-Za-z0-9._-]{0,62}){1,4}")


class BadDirectoryError(ValueError):
    """Not a name of a directory, or not a path at which a component can see one."""


def check_name(name: str) -> str:
    """Return the name of a directory. Raises `BadDirectoryError`."""
    try:
        return names.check_label(name, "directory")
    except names.BadNameError as error:
        raise BadDirectoryError(str(error)) from None


def check_place(place: str) -> str:
    """Return the path at which a component sees a directory. Raises `BadDirectoryError`."""
    if _PLACE.fullmatch(place) is None:
        raise BadDirectoryError(
            f"{place[:80]!r} is no path for a directory: write an absolute one, such as /maps, of at most 4 names of "
            "A-Z, a-z, 0-9, '.', '_' and '-'"
        )
    if place == DATA or place.startswith(f"{DATA}/"):
        raise BadDirectoryError(f"{place}: {DATA} has the component's own files")
    return place


def check_grant(granted: Mapping[str, str]) -> None:
    """Check the directories of a grant, by place. Raises `BadDirectoryError`."""
    if len(granted) > DIRECTORIES_MAX:
        raise BadDirectoryError(f"{len(granted)} directories, at most {DIRECTORIES_MAX} are allowed")
    for place, name in granted.items():
        check_place(place)
        check_name(name)
