"""Names and lines of keys in TOML, so that an error about a value says where it stands: tomllib does not."""

import re
from typing import Final

KeyPath = tuple[str | int, ...]
"""Path of a key: names of tables, and places in arrays of tables, counted from 0."""

_HEADER: Final = re.compile(r"\s*(\[\[?)([^\[\]]+)\]")
_MISSING: Final = re.compile(r"Object missing required field `(.*)`")
_UNKNOWN: Final = re.compile(r"Object contains unknown field `(.*)`")
_KEY: Final = re.compile(r"\s*((?:[\w-]+|\"[^\"]*\"|'[^']*')(?:\s*\.\s*(?:[\w-]+|\"[^\"]*\"|'[^']*'))*)\s*=")


def line_of(text: str, path: KeyPath) -> int:
    """Return the line of a key, or of the nearest table around it; 0 where none of them stands in the text."""
    lines: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    inside: KeyPath = ()
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            inside = _parts(header[2])
            if header[1] == "[[":
                counts[inside] = counts.get(inside, -1) + 1
                inside = (*inside, counts[inside])
            elif inside[:1] in counts:  # [stages.select] belongs to the newest of [[stages]]
                inside = (*inside[:1], counts[inside[:1]], *inside[1:])
            lines.setdefault(inside, number)
        elif key := _KEY.match(line):
            lines.setdefault((*inside, *_parts(key[1])), number)
    return next((lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in lines), 0)


def in_words(error: str) -> tuple[str, str]:
    """Describe an error of msgspec about a file for people, by the names of its keys.

    Returns:
        The dotted name of the key, such as `routes[0].path`, and a sentence such as `unknown key 'policy.memory'`.
    """
    words, _, place = error.partition(" - at `$")
    table = place.strip("`.")
    if unknown := _UNKNOWN.fullmatch(words):
        key = ".".join(filter(None, (table, unknown[1])))
        return key, f"unknown key {key!r}"
    if missing := _MISSING.fullmatch(words):
        return table, ": ".join(filter(None, (table, f"the key {missing[1]!r} is missing")))
    return table, f"{table}: {words}" if table else words


def path_of(key: str) -> KeyPath:
    """Return the path of a dotted name: `routes[0].path` is `("routes", 0, "path")`."""
    return tuple(int(part) if part.isdigit() else part for part in re.findall(r"[^.\[\]]+", key))


def _parts(dotted: str) -> KeyPath:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))
