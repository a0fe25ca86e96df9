"""Text from outside, made safe to show: on a terminal, in a journal, in a page of text.

Names, problems, messages and log lines come from devices, components and publishers. Escape sequences, C1 and
bidirectional controls in them would move a cursor, change colours or reorder a line, and a line feed would forge one.
Whatever is printed passes one of three functions here: `printable` a text, `cleaned` a decoded answer, `json_text`
JSON, which keeps every character, escaped. `PrintableFormatter` does the same for log records.
"""

import enum
import logging
import re
import unicodedata
from typing import Any, Final, TypeVar

import msgspec

_PEM: Final = re.compile(r"(?:-----BEGIN [A-Z ]+-----\n[A-Za-z0-9+/=\n]+-----END [A-Z ]+-----\n?)+")
_LINES: Final = frozenset({"message", "text", "error", "reason", "problem"})
"""Fields that may have several lines, a trap's backtrace for example; whoever shows one takes its lines apart."""

_ESCAPED: Final = re.compile(rb"\\[bfnrtu]|[\x7f-\xff]")
"""In JSON, everything that `printable` might change is an escape or outside of ASCII."""

_JOINERS: Final = "\u200c\u200d"
"""ZERO WIDTH NON-JOINER and JOINER: Persian and Indic words, and emoji of several parts, are spelt with them."""

_ODD: Final = re.compile(r"[^\n -~]")
T = TypeVar("T")


def printable(text: str, *, lines: bool = False) -> str:
    r"""Return a text without characters that do anything but stand there; others are shown as `\x1b` or `\u202e`.

    Spaces of every width become plain ones. A joiner stays between two characters outside of ASCII that it can join.

    Args:
        text: from outside.
        lines: keep line feeds; without it the text becomes one line.
    """
    if text.isprintable():
        return text
    text = text.replace("\r\n", "\n")
    return "".join(
        each if each in _JOINERS and _joins(text[at - 1 : at], text[at + 1 : at + 2]) else _shown(each, lines=lines)
        for at, each in enumerate(text)
    )


def _joins(before: str, after: str) -> bool:
    """Tell whether a joiner has letters, marks or symbols outside of ASCII on both sides."""
    return all(
        each and not each.isascii() and (unicodedata.category(each) == "So" or unicodedata.category(each)[0] in "LM")
        for each in (before, after)
    )


def _shown(character: str, *, lines: bool) -> str:
    if character == "\n":
        return "\n" if lines else " "
    if character.isprintable():
        return character
    if character == "\t" or unicodedata.category(character) == "Zs":
        return " "
    return character.encode("unicode_escape").decode()


def cleaned(value: T) -> T:
    """Return a decoded message with every text in it made printable, names in dictionaries too."""
    changed: Any = _cleaned(value, lines=False)
    return changed  # type: ignore[no-any-return]


def _cleaned(value: object, *, lines: bool) -> object:
    match value:
        case enum.Enum():
            return value
        case str():
            return printable(value, lines=lines or _PEM.fullmatch(value) is not None)
        case msgspec.Struct():
            fields = {name: _cleaned(getattr(value, name), lines=name in _LINES) for name in value.__struct_fields__}
            return msgspec.structs.replace(value, **fields)
        case tuple() | list():
            return type(value)(_cleaned(each, lines=False) for each in value)
        case dict():
            return {_cleaned(key, lines=False): _cleaned(each, lines=False) for key, each in value.items()}
        case _:
            return value


def is_plain(data: bytes) -> bool:
    """Tell whether JSON has nothing that `cleaned` would change: by far the most has not, and is not looked through."""
    return _ESCAPED.search(data) is None


def json_text(text: str) -> str:
    """Return JSON with every character escaped that is not printable: the same value, safe to show."""
    return _ODD.sub(_escape, text)


def _escape(found: re.Match[str]) -> str:
    character = found[0]
    if character.isprintable():
        return character
    units = character.encode("utf-16-be").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


class PrintableFormatter(logging.Formatter):
    """Formatter of log records: a message is one line, whatever came from outside into it."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the name of the standard library
        """Format a record without its traceback."""
        return printable(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - the name of the standard library
        """Format a traceback, with its lines."""
        return printable(super().formatException(ei), lines=True)
