"""Topics of components' messages, and filters over them, as MQTT has them.

A topic is one to `LEVELS_MAX` levels with `/` between them: `plant/boiler/temperature`. In a filter, `+` stands for one
level and `#`, as the last, for all that follow, and for none: `plant/#` also matches `plant`. Stricter than MQTT 3.1.1,
section 4.7: no level is empty, no topic begins with `$`, and no character is a control character.
"""

from typing import Final

TOPIC_MAX_BYTES: Final = 256
LEVELS_MAX: Final = 16
FILTERS_MAX: Final = 16
"""Filters of one grant."""

_FIRST_PRINTABLE: Final = 0x20
_DELETE: Final = 0x7F
_LAST_CONTROL: Final = 0x9F
_SURROGATES: Final = range(0xD800, 0xE000)
_NO_CHARACTERS: Final = range(0xFDD0, 0xFDF0)
_IN_PLANE: Final = 0xFFFF
_LAST_OF_PLANE: Final = (0xFFFE, 0xFFFF)


class BadMessageTopicError(ValueError):
    """Not a topic, or not a filter, of components' messages."""


def check_topic(text: str) -> str:
    """Return a topic on which a message may be published. Raises `BadMessageTopicError`."""
    for level in _levels(text):
        if "+" in level or "#" in level:
            raise BadMessageTopicError(f"{_shown(text)} has a wildcard (+ or #), which only a filter may have")
    if any(map(_is_no_character, text)):
        raise BadMessageTopicError(f"{_shown(text)} is no topic: one of its code points is no character")
    return text


def check_filter(text: str) -> str:
    """Return a filter. Raises `BadMessageTopicError`."""
    levels = _levels(text)
    for number, level in enumerate(levels, 1):
        if level == "#" and number < len(levels):
            raise BadMessageTopicError(f"{_shown(text)}: # is the last level of a filter")
        if level not in {"+", "#"} and ("+" in level or "#" in level):
            raise BadMessageTopicError(f"{_shown(text)}: + and # are whole levels of a filter")
    return text


def matches(pattern: str, topic: str) -> bool:
    """Tell whether a topic fits a filter; both have been checked."""
    wanted, found = pattern.split("/"), topic.split("/")
    if wanted[-1] == "#":
        wanted.pop()
        found = found[: len(wanted)]
    return len(wanted) == len(found) and all(each in {"+", level} for each, level in zip(wanted, found, strict=True))


def any_matches(filters: tuple[str, ...], topic: str) -> bool:
    """Tell whether a topic fits one of some filters."""
    return any(matches(each, topic) for each in filters)


def covered(pattern: str, filters: tuple[str, ...]) -> bool:
    """Tell whether one of `filters` matches every topic that `pattern` does."""
    return any(_covers(each.split("/"), pattern.split("/")) for each in filters)


def _covers(wide: list[str], narrow: list[str]) -> bool:
    for number, level in enumerate(wide):
        if level == "#":
            return True
        if number >= len(narrow) or narrow[number] == "#" or (level != "+" and level != narrow[number]):
            return False
    return len(wide) == len(narrow)


def _levels(text: str) -> list[str]:
    """Return the levels of a topic or filter. Raises `BadMessageTopicError`."""
    if len(text) > TOPIC_MAX_BYTES or any(map(_is_odd, text)) or len(text.encode()) > TOPIC_MAX_BYTES:
        raise BadMessageTopicError(
            f"{_shown(text)} is no topic: at most {TOPIC_MAX_BYTES} bytes, without control characters"
        )
    levels = text.split("/")
    if len(levels) > LEVELS_MAX or not all(levels) or text.startswith("$"):
        raise BadMessageTopicError(
            f"{_shown(text)} is no topic: 1 to {LEVELS_MAX} levels with / between them, none empty, and no $ at first"
        )
    return levels


def _is_odd(character: str) -> bool:
    code = ord(character)
    return code < _FIRST_PRINTABLE or _DELETE <= code <= _LAST_CONTROL or code in _SURROGATES


def _is_no_character(character: str) -> bool:
    """Tell whether brokers end the connection of whoever publishes on a topic with it."""
    code = ord(character)
    return code in _NO_CHARACTERS or code & _IN_PLANE in _LAST_OF_PLANE


def _shown(text: str) -> str:
    return repr(text[:40])
