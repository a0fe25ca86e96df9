"""Data packages: ranges of versions, and the path at which a guest finds a package.

A range is a list of conditions, joined by commas, that a version has to meet all: `>=2`, `>=2, <4`, `1.4`. A number
with fewer parts than three stands for the first version with it (`>=2` is `>=2.0.0`), and without an operator for every
version that begins so (`1.4` is 1.4.0, 1.4.1, ...). A pre-release fits only a range that names one of the same version.
`*` takes every release.
"""

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from fleet.protocol import names

ANY: Final = "*"
PATH_MAX_CHARS: Final = 200
_RANGE_MAX_CHARS: Final = 100
_CONDITION: Final = re.compile(
    r"(>=|<=|>|<|=|)\s*((?:0|[1-9][0-9]{0,8})(?:\.(?:0|[1-9][0-9]{0,8})){0,2})(-[0-9a-zA-Z.-]+)?"
)
_PATH: Final = re.compile(r"(/[A-Za-z0-9_][A-Za-z0-9._-]*)+")
_PARTS: Final = 3


class BadRangeError(ValueError):
    """Not a range of versions."""


class BadPathError(ValueError):
    """Not a path at which a guest can find a package."""


class _Condition(NamedTuple):
    operator: str
    parts: int
    version: str

    def fits(self, version: str) -> bool:
        have, bound = names.version_key(version), names.version_key(self.version)
        match self.operator:
            case ">=":
                return have >= bound
            case "<=":
                return have <= bound
            case ">":
                return have > bound
            case "<":
                return have < bound
            case "=":
                return have == bound
            case _:
                return have == bound if self.parts == _PARTS else have[: self.parts] == bound[: self.parts]


def full_version(text: str) -> str:
    """Return a version with its three parts: `2` is `2.0.0`. Raises `names.BadNameError`."""
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        text += ".0" * (_PARTS - 1 - text.count("."))
    return names.check_version(text)


def next_version(published: Iterable[str]) -> str:
    """Return the version that follows the newest of those published: the next whole number."""
    newest = max((names.version_key(each)[0] for each in published), default=0)
    return f"{newest + 1}.0.0"


def check_range(text: str) -> str:
    """Return a range of versions. Raises `BadRangeError`."""
    _conditions(text)
    return text


def matches(text: str, version: str) -> bool:
    """Tell whether a version is in a range. Raises `BadRangeError`."""
    conditions = _conditions(text)
    if "-" in version.partition("+")[0]:
        release = names.version_key(version)[:_PARTS]
        named = any("-" in each.version and names.version_key(each.version)[:_PARTS] == release for each in conditions)
        if not named:
            return False
    return all(each.fits(version) for each in conditions)


def _conditions(text: str) -> tuple[_Condition, ...]:
    if text.strip() == ANY:
        return ()
    found = []
    for part in text[: _RANGE_MAX_CHARS + 1].split(","):
        condition = _CONDITION.fullmatch(part.strip())
        if condition is None or len(text) > _RANGE_MAX_CHARS:
            raise BadRangeError(f"{text[:80]!r} is no range of versions, such as >=2, or >=2, <4")
        operator, number, pre = condition.groups()
        parts = number.count(".") + 1
        if pre is not None and parts < _PARTS:
            raise BadRangeError(f"{text[:80]!r}: a pre-release has three numbers, such as 2.0.0-rc.1")
        try:
            version = names.check_version(number + ".0" * (_PARTS - parts) + (pre or ""))
        except names.BadNameError as error:
            raise BadRangeError(str(error)) from error
        found.append(_Condition(operator, parts, version))
    return tuple(found)


def check_path(text: str) -> str:
    """Return the path of a package's file, as a guest opens it. Raises `BadPathError`."""
    if len(text) > PATH_MAX_CHARS or _PATH.fullmatch(text) is None:
        raise BadPathError(f"{text[:80]!r} is no path of a file, such as /data/model.bin: A-Z, a-z, 0-9, '.', '_', '-'")
    return text
