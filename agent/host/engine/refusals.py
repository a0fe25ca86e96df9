"""Sentences for what the engine says of a component that it cannot link or instantiate.

The engine names an interface, a function or a number of pages; its author needs to know which limit or interface that
is, and what to do. What is not recognised stays as it is. Pure.
"""

import re
from typing import Final

from fleet.component import served
from fleet.component.toml_fields import format_size
from fleet.protocol.manifest import Limits

_UNLINKED: Final = re.compile(r"component imports (?:instance|function|resource|type|module|component) `([^`]+)`, but")
_MEMBER: Final = re.compile(r"instance export `([^`]+)` has the wrong type")
_UNKNOWN_MEMBER: Final = re.compile(r"type mismatch for import `([^`]+)`[\s;]+missing expected export `([^`]+)`")
_TABLE: Final = re.compile(r"table minimum size of (\d{1,12}) elements exceeds table limits")
_TABLE_IN_POOL: Final = re.compile(r"minimum element size of (\d{1,12}) which exceeds the limit of (\d{1,12})")
_IN_POOL: Final = (
    re.compile(r"contains (?P<count>\d{1,12}) (?:core module |Wasm )(?P<what>[a-z ]+), which .* of (?P<most>\d{1,12})"),
    re.compile(r"defined (?P<what>\w+) count of (?P<count>\d{1,12}) exceeds the .* of (?P<most>\d{1,12})"),
)
_MEMORY: Final = "pages exceeds memory limits"
_COUNT: Final = re.compile(r"(?:instance|table|memory) count too high at")
_NO_MEMORY: Final = "Cannot allocate memory (os error 12)"
"""Said where the sandbox's limit of data, which follows from limits.memory, is met before the engine's own."""

_MISSING: Final = "implementation is missing"


def unlinked(text: str, limits: Limits) -> str | None:
    """Say why a component cannot be instantiated; None for a text that is not recognised.

    Args:
        text: what the engine says.
        limits: of its manifest.
    """
    if _MEMORY in text or _NO_MEMORY in text:
        return f"its memory begins with more than limits.memory, which is {format_size(limits.memory_bytes)}: raise it"
    if said := _too_many(text, limits):
        return said
    found = _UNLINKED.search(text)
    if found is None:
        return None
    name, member = found[1], _MEMBER.search(text)
    if not text.rstrip().endswith(_MISSING):
        what = f"{member[1]} of {name}" if member else name
        return f"it imports {what} with another type: {_causes(text)}; build it against the WIT of that interface"
    if not served.is_served(name):
        return served.reason(name)
    what = f"{member[1]} of {name}" if member else name
    return _newer(what)


def _too_many(text: str, limits: Limits) -> str | None:
    if found := _TABLE.search(text):
        return _table(found[1], limits.table_elements)
    if _COUNT.search(text):
        most = limits.core_instances
        return f"it has more than {most} core instances, memories or tables (limits.core_instances): raise it"
    return None


def unloaded(text: str) -> str | None:
    """Say which bound of all components an image exceeds; None for a text that is not recognised."""
    if found := _TABLE_IN_POOL.search(text):
        return _table(found[1], int(found[2]))
    for pattern in _IN_POOL:
        if found := pattern.search(text):
            kind, count, most = found["what"], found["count"], found["most"]
            return f"it has {count} {kind}, at most {most} are allowed (limits.core_instances)"
    return None


def _table(elements: str, most: int) -> str:
    return f"a table begins with {elements} elements, at most {most} are allowed (limits.table_elements)"


def uncompiled(text: str) -> str | None:
    """Say which function the adapter of wasi:http does not have; None for a text that is not recognised."""
    found = _UNKNOWN_MEMBER.search(text)
    return None if found is None else _newer(f"{found[2]} of {found[1]}")


def _newer(what: str) -> str:
    return (
        f"it imports {what}, which this host does not serve: leave it out, or build against an earlier release of "
        "WASI 0.2"
    )


def _causes(text: str) -> str:
    """Return the innermost causes in one line."""
    lines = [re.sub(r"^\d+: ", "", line.strip()) for line in text.splitlines() if line.strip()]
    return "; ".join(line for line in lines[1:] if "Caused by" not in line and "instance export" not in line)[:300]
