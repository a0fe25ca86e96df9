"""Lines of keys in TOML, so that an error about a value names the line that sets it: tomllib does not say."""

import re
from typing import Final

KeyPath = tuple[str | int, ...]
"""Path of a key: names of tables, and places in arrays of tables, counted from 0."""

_HEADER: Final = re.compile(r"\s*(\[\[?)([^\[\]]+)\]")
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


def _parts(dotted: str) -> KeyPath:
    return tuple(part.strip().strip("\"'") for part in dotted.split("."))
