r"""Patterns of configuration values: regular expressions that are matched in time linear in the value.

A pattern has literals, `.`, classes such as `[a-z0-9_-]`, the escapes `\d \w \s` and their opposites, groups, `|` and
the repetitions `?`, `*`, `+`, `{3}`, `{1,}`, `{1,5}`. It describes the whole value, so that `^` and `$` have no place.
What it describes is as in Python's `re` with `re.ASCII`; back-references and look-around are refused.

Python's `re` tries one way after the other, and a pattern such as `(a+)+b` stops it for years. This engine follows all
ways at once (Glushkov's automaton): each character costs at most one pass over `POSITIONS_MAX` positions. Libraries
that do so have no packages for all devices (riscv64, Debian), and the device has to judge as the server does.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Final

MAX_CHARS: Final = 500
POSITIONS_MAX: Final = 256
"""Characters of a pattern after its counted repetitions are written out; bounds the work of each step."""

DEPTH_MAX: Final = 20
_KEPT_MAX: Final = 1024
"""Sets of positions whose successors are kept at a time."""

_LAST: Final = 0x10FFFF
Ranges = tuple[tuple[int, int], ...]


class BadPatternError(ValueError):
    """A pattern that cannot be meant: one sentence for people, with the column (from 1)."""

    def __init__(self, column: int, problem: str) -> None:
        super().__init__(f"column {column}: {problem}")


def flaw(pattern: str) -> str:
    """Say why a pattern cannot be meant; empty where it can."""
    try:
        _compiled(pattern)
    except BadPatternError as error:
        return str(error)
    return ""


def matches(pattern: str, value: str) -> bool:
    """Tell whether a pattern describes a whole value.

    Raises:
        BadPatternError: the pattern cannot be meant.
    """
    return _compiled(pattern).matches(value)


# -- sets of characters ------------------------------------------------------------------------------------------------


def _ranges(text: str) -> Ranges:
    return tuple((ord(first), ord(last)) for first, last in zip(text[::2], text[1::2], strict=True))


def _joined(ranges: Iterable[tuple[int, int]]) -> Ranges:
    """Return ranges in order, without overlap."""
    found: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return tuple(found)


def _opposite(ranges: Iterable[tuple[int, int]]) -> Ranges:
    edges = [(-1, -1), *_joined(ranges), (_LAST + 1, _LAST + 1)]
    return tuple((left[1] + 1, right[0] - 1) for left, right in pairwise(edges) if left[1] + 1 < right[0])


_DIGIT: Final = _ranges("09")
_WORD: Final = _ranges("09AZ__az")
_SPACE: Final = _ranges("\t\r  ")
_NAMED: Final = {
    "d": _DIGIT, "w": _WORD, "s": _SPACE, "D": _opposite(_DIGIT), "W": _opposite(_WORD), "S": _opposite(_SPACE),
}  # fmt: skip
_CONTROL: Final = {"t": "\t", "n": "\n", "r": "\r", "f": "\f", "v": "\v"}
_ANY: Final = _opposite(_ranges("\n\n"))


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Set:
    ranges: Ranges


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: tuple["_Node", ...]


@dataclass(frozen=True, slots=True)
class _Either:
    parts: tuple["_Node", ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    inner: "_Node"
    least: int
    most: int | None


_Node = _Set | _Sequence | _Either | _Repeat
_COUNTED: Final = re.compile(r"\{([0-9]{1,4})(?:(,)([0-9]{0,4}))?\}")
_REPEATS: Final[dict[str, tuple[int, int | None]]] = {"?": (0, 1), "*": (0, None), "+": (1, None)}


class _Reader:
    """Recursive descent over one pattern."""

    def __init__(self, text: str) -> None:
        self.text, self.place, self.depth = text, 0, 0

    def read(self) -> _Node:
        if len(self.text) > MAX_CHARS:
            raise BadPatternError(MAX_CHARS + 1, f"a pattern has at most {MAX_CHARS} characters")
        found = self._either()
        if self.place < len(self.text):
            raise self._wrong("this ) closes nothing")
        return found

    def _wrong(self, problem: str, back: int = 0) -> BadPatternError:
        return BadPatternError(self.place + 1 - back, problem)

    @property
    def _next(self) -> str:
        return self.text[self.place : self.place + 1]

    def _take(self) -> str:
        char = self._next
        self.place += 1
        return char

    def _either(self) -> _Node:
        parts = [self._sequence()]
        while self._next == "|":
            self._take()
            parts.append(self._sequence())
        return parts[0] if len(parts) == 1 else _Either(tuple(parts))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._next and self._next not in "|)":
            parts.append(self._repeated(self._atom()))
        return _Sequence(tuple(parts))

    def _repeated(self, inner: _Node) -> _Node:
        if self._next in _REPEATS and self._next:
            inner = _Repeat(inner, *_REPEATS[self._take()])
        elif self._next == "{":
            found = _COUNTED.match(self.text, self.place)
            if found is None:
                raise self._wrong(r"expected {3}, {1,} or {1,5}; the character itself is written \{")
            least, most = int(found[1]), int(found[3]) if found[3] else None if found[2] else int(found[1])
            if most is not None and most < least:
                raise self._wrong(f"{found[0]} ends below its beginning")
            inner, self.place = _Repeat(inner, least, most), found.end()
        else:
            return inner
        if self._next and self._next in "?*+{":
            raise self._wrong("a repetition is repeated: put a group around it")
        return inner

    def _atom(self) -> _Node:
        char = self._take()
        if char == "(":
            return self._group()
        if char == "[":
            return _Set(self._class())
        if char == "\\":
            return _Set(self._escape())
        if char in "?*+{":
            raise self._wrong(f"nothing stands before {char} to repeat", 1)
        if char in "^$":
            raise self._wrong(
                rf"{char} has no place: the whole value is meant; the character itself is written \{char}", 1
            )
        if char in "]}":
            raise self._wrong(rf"{char} closes nothing; the character itself is written \{char}", 1)
        return _Set(_ANY if char == "." else ((ord(char), ord(char)),))

    def _group(self) -> _Node:
        start = self.place
        if self.text.startswith("?:", self.place):
            self.place += 2
        elif self._next == "?":
            raise self._wrong("only plain groups are taken: ( and (?:")
        self.depth += 1
        if self.depth > DEPTH_MAX:
            raise self._wrong(f"nested more than {DEPTH_MAX} deep")
        inner = self._either()
        if not self._next:
            raise BadPatternError(start, "this ( is never closed")
        self._take()
        self.depth -= 1
        return inner

    def _escape(self) -> Ranges:
        """Read what follows a backslash."""
        char = self._take()
        if char in _NAMED and char:
            return _NAMED[char]
        if char in _CONTROL and char:
            return _ranges(_CONTROL[char] * 2)
        if char in {"x", "u"}:
            digits = self.text[self.place : self.place + (2 if char == "x" else 4)]
            if not re.fullmatch("[0-9a-fA-F]{2}" if char == "x" else "[0-9a-fA-F]{4}", digits):
                raise self._wrong(rf"expected hexadecimal digits, as \{'x41' if char == 'x' else 'u00e4'}")
            self.place += len(digits)
            return ((int(digits, 16), int(digits, 16)),)
        if not char or char.isalnum() or ord(char) >= 0x80:  # noqa: PLR2004 - the end of ASCII
            raise self._wrong(f"\\{char} has no meaning here", 1)
        return ((ord(char), ord(char)),)

    def _class(self) -> Ranges:
        start = self.place
        found: list[tuple[int, int]] = []
        negated = self._next == "^"
        if negated:
            self._take()
        first = True
        while self._next != "]" or first:
            if not self._next:
                raise BadPatternError(start, "this [ is never closed")
            if first and self._next == "]":
                raise self._wrong(r"an empty class; the character itself is written \]")
            first = False
            found += self._item()
        self._take()
        return _opposite(found) if negated else _joined(found)

    def _item(self) -> Ranges:
        """Read one character, escape or range of a class."""
        left = self._member()
        if self._next != "-" or self.text.startswith("]", self.place + 1):
            return left
        self._take()
        if not self._next:
            return left  # never closed, which the class says
        right = self._member()
        if left[0][0] != left[-1][1] or right[0][0] != right[-1][1] or left[0][0] > right[0][0]:
            raise self._wrong("this range has no beginning or no end, or ends before it begins", 1)
        return ((left[0][0], right[0][0]),)

    def _member(self) -> Ranges:
        char = self._take()
        if char == "\\":
            return self._escape()
        if char == "[":
            raise self._wrong(r"the character itself is written \[", 1)
        return ((ord(char), ord(char)),)


# -- matching ----------------------------------------------------------------------------------------------------------


class _Automaton:
    """Glushkov's automaton: a state for each place of a character in the pattern; sets of them are bits of a number."""

    def __init__(self, pattern: str) -> None:
        self._sets: list[Ranges] = []
        self._after: list[int] = []
        tree = _Reader(pattern).read()
        if _size(tree) > POSITIONS_MAX:
            raise BadPatternError(1, f"with its repetitions it has more than {POSITIONS_MAX} characters")
        self._first, self._last, self._empty = self._add(tree)
        self._edges = sorted({edge for ranges in self._sets for first, last in ranges for edge in (first, last + 1)})
        self._of_kind: dict[int, int] = {}
        self._followers: dict[int, int] = {}

    def matches(self, value: str) -> bool:
        """Tell whether the pattern describes a whole value."""
        if not value:
            return self._empty
        there = self._first & self._accepting(value[0])
        for char in value[1:]:
            if not there:
                return False
            there = self._follow(there) & self._accepting(char)
        return bool(there & self._last)

    def _accepting(self, char: str) -> int:
        """Return the positions that accept a character."""
        kind = bisect_right(self._edges, ord(char))
        found = self._of_kind.get(kind)
        if found is None:
            code = ord(char)
            holds = (any(first <= code <= last for first, last in ranges) for ranges in self._sets)
            found = self._of_kind[kind] = sum(1 << place for place, each in enumerate(holds) if each)
        return found

    def _follow(self, there: int) -> int:
        found = self._followers.get(there)
        if found is None:
            found, rest = 0, there
            while rest:
                lowest = rest & -rest
                found |= self._after[lowest.bit_length() - 1]
                rest ^= lowest
            if len(self._followers) >= _KEPT_MAX:
                self._followers.clear()
            self._followers[there] = found
        return found

    def _add(self, node: _Node) -> tuple[int, int, bool]:
        """Add the positions of a node; return its first and last ones, and whether it describes an empty text."""
        match node:
            case _Set(ranges):
                self._sets.append(ranges)
                self._after.append(0)
                place = 1 << (len(self._sets) - 1)
                return place, place, False
            case _Sequence(parts):
                return self._chain(parts)
            case _Either(parts):
                found = [self._add(part) for part in parts]
                firsts = lasts = 0
                for first, last, _ in found:
                    firsts, lasts = firsts | first, lasts | last
                return firsts, lasts, any(empty for _, _, empty in found)
            case _Repeat(inner, least, most):
                return self._repeat(inner, least, most)

    def _repeat(self, inner: _Node, least: int, most: int | None) -> tuple[int, int, bool]:
        """Write a repetition out: what is needed, then what may follow."""
        if most is not None:
            return self._chain((*[inner] * least, *[_Either((inner, _Sequence(())))] * (most - least)))
        first, last, empty = self._chain([inner] * (least - 1))
        begins, ends, nothing = self._add(inner)
        self._link(ends, begins)
        self._link(last, begins)
        joined = first | begins if empty else first
        return joined, ends | last if nothing else ends, (empty and nothing) or least == 0

    def _chain(self, parts: Iterable[_Node]) -> tuple[int, int, bool]:
        first = last = 0
        empty = True
        for part in parts:
            begins, ends, nothing = self._add(part)
            self._link(last, begins)
            first |= begins if empty else 0
            last = ends | last if nothing else ends
            empty = empty and nothing
        return first, last, empty

    def _link(self, before: int, after: int) -> None:
        while before:
            lowest = before & -before
            self._after[lowest.bit_length() - 1] |= after
            before ^= lowest


def _size(node: _Node) -> int:
    """Count the characters of a pattern with its repetitions written out; an empty part counts as one."""
    match node:
        case _Set():
            return 1
        case _Sequence(parts) | _Either(parts):
            return max(1, sum(map(_size, parts)))
        case _Repeat(inner, least, most):
            return _size(inner) * max(1, least if most is None else most)


@lru_cache(maxsize=64)
def _compiled(pattern: str) -> _Automaton:
    return _Automaton(pattern)
