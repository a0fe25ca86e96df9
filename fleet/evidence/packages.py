"""Packages as lists of them name them, by package URL (purl) where there is one."""

import re
from dataclasses import dataclass

from packageurl import PackageURL

from fleet.evidence.document import DocumentError

_NOTHING = frozenset({"", "NOASSERTION", "NONE", "unknown", "UNKNOWN"})


@dataclass(frozen=True, slots=True, order=True)
class Package:
    """One package in a component.

    Attributes:
        name: without its namespace.
        version: as written; empty where the list does not say.
        type: the purl's type (`cargo`, `npm`, `pypi`, `golang`, `deb`), empty where there is no purl.
        namespace: the purl's, such as `@scope` or `github.com/owner`; empty for none.
    """

    name: str
    version: str
    type: str = ""
    namespace: str = ""

    def __str__(self) -> str:
        full = f"{self.namespace}/{self.name}" if self.namespace else self.name
        return f"{full} {self.version}".rstrip() + (f" ({self.type})" if self.type else "")


def package(name: object, version: object, purl: object = None, group: object = None) -> Package | None:
    """A package from the fields of a list; None where they name nothing. A purl that cannot be read is left aside."""
    if isinstance(purl, str) and purl:
        try:
            found = from_purl(purl)
        except DocumentError:
            pass
        else:
            return found if found.version else Package(found.name, text(version), found.type, found.namespace)
    if not text(name):
        return None
    return Package(text(name), text(version), "", text(group))


def from_purl(purl: str) -> Package:
    """A package URL, such as `pkg:cargo/serde@1.0.200`; raises `DocumentError`."""
    try:
        found = PackageURL.from_string(purl)
    except (ValueError, TypeError) as error:
        raise DocumentError(f"{purl[:100]!r} is no package URL: {error}") from error
    return Package(found.name, text(found.version), found.type, found.namespace or "")


def text(value: object) -> str:
    """A field as text; empty for what says nothing."""
    found = value.strip() if isinstance(value, str) else ""
    return "" if found in _NOTHING else found


def folded(name: str, kind: str) -> str:
    """A name as its ecosystem compares it: no case; `-`, `_` and `.` alike for pypi, `-` and `_` for cargo."""
    name = name.casefold()
    if kind == "pypi":
        return re.sub(r"[-_.]+", "-", name)
    return name.replace("_", "-") if kind in {"cargo", ""} else name
