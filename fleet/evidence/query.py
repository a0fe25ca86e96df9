"""Queries such as `serde<1.0.200`, and their match with the packages of a list.

A query is a name or a package URL, and conditions on the version separated by commas. Versions are compared by the
rules of the package's own ecosystem. Where a comparison is impossible (no version in the list, or one that does not
parse) the answer is `MAYBE`, never silently `NO`.
"""

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from univers.version_range import RANGE_CLASS_BY_SCHEMES
from univers.versions import PypiVersion, SemverVersion

from fleet.evidence.sbom import DocumentError, Package, folded, from_purl

_COMPARE: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    "==": operator.eq,
    "=": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    ">": operator.gt,
}
_QUERY: Final = re.compile(r"\s*(?P<what>[^<>=!,\s]+)\s*(?P<conditions>[<>=!].*)?\s*")
_CONDITION: Final = re.compile(r"\s*(<=|>=|==|!=|<|>|=)\s*([^<>=!,\s]+)\s*")
_TEXT_MAX: Final = 500
_VERSION_MAX: Final = 100
"""Longest version: the time to compare versions grows with the square of their length."""

_EXAMPLES: Final = "write serde, 'serde<1.0.200', 'openssl>=3.0,<3.0.15', pkg:npm/lodash or 'pkg:npm/%40scope/name<2'"


class Answer(StrEnum):
    """Match of a package with a query."""

    YES = "yes"
    MAYBE = "maybe"  # same name; its version cannot be compared
    NO = "no"


@dataclass(frozen=True, slots=True)
class Query:
    """Parsed query. `conditions` are pairs of a comparison and a version; all must hold."""

    text: str
    package: Package
    conditions: tuple[tuple[str, str], ...]

    def matches(self, found: Package) -> Answer:
        """Compare a package of a list with the query."""
        wanted = self.package
        kind = found.type or wanted.type
        if wanted.type and found.type and wanted.type != found.type:
            return Answer.NO
        names = {folded(found.name, kind)}
        if found.namespace:
            names |= {folded(f"{found.namespace}{glue}{found.name}", kind) for glue in "/:"}
        full = f"{wanted.namespace}/{wanted.name}" if wanted.namespace else wanted.name
        if folded(full, kind) not in names:
            return Answer.NO
        answers = [_holds(kind, found.version, how, limit) for how, limit in self.conditions]
        if Answer.NO in answers:
            return Answer.NO
        return Answer.MAYBE if Answer.MAYBE in answers else Answer.YES


def parse(text: str) -> Query:
    """Read a query.

    Raises:
        DocumentError: not a query; the message has examples.
    """
    found = _QUERY.fullmatch(text) if len(text) <= _TEXT_MAX else None
    if found is None:
        raise DocumentError(f"{text[:100]!r} is not a query for packages: {_EXAMPLES}")
    what, rest = found["what"], found["conditions"] or ""
    package = from_purl(what) if what.startswith("pkg:") else Package(what, "")
    conditions = []
    for part in rest.split(",") if rest else ():
        condition = _CONDITION.fullmatch(part)
        if condition is None:
            raise DocumentError(f"{part.strip()[:50]!r} is not a condition on a version: {_EXAMPLES}")
        conditions.append((condition[1], condition[2]))
    if package.version:
        conditions.append(("==", package.version))
    return Query(text.strip(), package, tuple(conditions))


def _holds(kind: str, version: str, how: str, limit: str) -> Answer:
    if not version:
        return Answer.MAYBE
    for scheme in _schemes(kind) if max(len(version), len(limit)) <= _VERSION_MAX else ():
        try:
            return Answer.YES if _COMPARE[how](scheme(version), scheme(limit)) else Answer.NO
        except Exception:  # noqa: BLE001, S112 - a version that its own scheme cannot read, in whichever way it says so
            continue
    if version == limit:
        return Answer.YES if how in {"==", "=", "<=", ">="} else Answer.NO
    return Answer.MAYBE


def _schemes(kind: str) -> tuple[Callable[[str], Any], ...]:
    ranges: Any = RANGE_CLASS_BY_SCHEMES.get(kind)
    return (SemverVersion, PypiVersion) if ranges is None else (ranges.version_class,)
