"""Selectors: which devices are meant, in one grammar for filters, `--where`, plans and whatever chooses devices.

    arch = riscv64 and memory >= 512MiB and site in (berlin, paris)
    not online or (agent < 0.2.0 and runs = hello@1.4.0)

    selector   = all { "or" all }
    all        = term { ("and" | ",") term }
    term       = "not" term | "(" selector ")" | name
               | name ("=" | "!=" | "<" | "<=" | ">" | ">=") value
               | name [ "not" ] "in" "(" value { "," value } ")"

A name is one of `NAMES`, or a label; `label.NAME` is a label that has the name of something else. A name alone means
that the device has a value for it, of a flag that it is so; it does not follow a comma, where a value may be meant. A
value with spaces or signs stands in quotes.

Each comparison is true or false, never unknown: of a value that a device does not have, `!=` and `not in` are true and
every other comparison is false. Names that an update may change (`Fact.passing`) choose devices at one moment, as in a
filter or at the beginning of a rollout, and never define a group or a stage.

The parser is written out: three rules need no library.
"""

import difflib
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Final

from fleet.protocol.names import ARCHES, BadNameError, check_label

MAX_CHARS: Final = 1000
"""Longest text: room for some dozens of values."""

DEPTH_MAX: Final = 20
"""Parentheses and `not` within each other."""

Scalar = str | int
"""Single value; a flag is a bool."""

Value = Scalar | tuple[str, ...]
"""Value of a device under a name: several where it has more than one, as the components that it runs."""


class Kind(Enum):
    """Form of a value: the way it is written and compared."""

    TEXT = "text"
    ARCH = "arch"
    NUMBER = "number"
    SIZE = "size"
    VERSION = "version"
    FLAG = "flag"
    SEVERAL = "several"


@dataclass(frozen=True, slots=True)
class Fact:
    """Name of something that the server knows of a device.

    Attributes:
        passing: an update, a rollout or the day may change it.
    """

    kind: Kind
    text: str
    passing: bool = False


NAMES: Final[Mapping[str, Fact]] = {
    "id": Fact(Kind.TEXT, "id of the device"),
    "name": Fact(Kind.TEXT, "name that it enrolled with"),
    "arch": Fact(Kind.ARCH, f"CPU: {', '.join(ARCHES)}"),
    "cpus": Fact(Kind.NUMBER, "number of CPUs"),
    "memory": Fact(Kind.SIZE, "memory that its kernel has, as 512MiB"),
    "disk": Fact(Kind.SIZE, "size of the disk that holds its components"),
    "online": Fact(Kind.FLAG, "connected now", passing=True),
    "healthy": Fact(Kind.FLAG, "without a problem by its newest health message", passing=True),
    "group": Fact(Kind.SEVERAL, "groups that it is in", passing=True),
    "runs": Fact(Kind.SEVERAL, "components that it runs: hello, hello@1.4.0, acme/hello@1.4.0", passing=True),
    "agent": Fact(Kind.VERSION, "version of its agent", passing=True),
    "host": Fact(Kind.VERSION, "version of its host", passing=True),
    "engine": Fact(Kind.VERSION, "version of its Wasm engine", passing=True),
    "kernel": Fact(Kind.VERSION, "release of its kernel", passing=True),
    "os": Fact(Kind.TEXT, "operating system", passing=True),
}
"""Names with a meaning of their own."""

_LABEL: Final = Fact(Kind.TEXT, "label")
_PREFIX: Final = "label."
_ORDERED: Final = frozenset({Kind.NUMBER, Kind.SIZE, Kind.VERSION})
_UNITS: Final = {
    "": 1,
    "b": 1,
    **{f"{letter}ib": 1 << (10 * power) for power, letter in enumerate("kmgt", 1)},
    **{f"{letter}b": 1000**power for power, letter in enumerate("kmgt", 1)},
}
_SIZE: Final = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,6})?)([a-zA-Z]{0,3})")
_NUMBER: Final = re.compile(r"[0-9]{1,15}")
_FLAGS: Final = {"true": True, "yes": True, "false": False, "no": False}


class BadSelectorError(ValueError):
    """A selector that cannot be read: one sentence for people, with the column (from 1) of what is wrong."""

    def __init__(self, column: int, problem: str) -> None:
        super().__init__(f"column {column}: {problem}")
        self.column, self.problem = column, problem


@dataclass(frozen=True, slots=True)
class Named:
    """A name in a selector; `label` tells a label from a name of `NAMES`."""

    name: str
    fact: Fact
    label: bool

    def __str__(self) -> str:
        return _PREFIX + self.name if self.label and self.name in {*NAMES, *_KEYWORDS} else self.name

    def of(self, device: "Device") -> Value | None:
        """Return a device's value under this name; None for none."""
        return (device.labels if self.label else device.facts).get(self.name)


@dataclass(frozen=True, slots=True)
class Device:
    """A device as selectors see it: its labels, and what the server knows by the names of `NAMES`."""

    labels: Mapping[str, str]
    facts: Mapping[str, Value]


@dataclass(frozen=True, slots=True)
class Has:
    """A name alone."""

    named: Named

    def takes(self, device: Device) -> bool:
        """Tell whether a device has a value under the name; of a flag, whether it is so."""
        found = self.named.of(device)
        return found is not None and found not in (False, ())

    def __str__(self) -> str:
        return str(self.named)


@dataclass(frozen=True, slots=True)
class Compare:
    """A comparison with one value."""

    named: Named
    sign: str
    value: Scalar

    def takes(self, device: Device) -> bool:
        """Tell whether a device's value compares as asked."""
        found = self.named.of(device)
        if self.sign in {"=", "!="}:
            return _equals(found, self.value) is (self.sign == "=")
        if found is None or isinstance(found, tuple):
            return False
        if self.named.fact.kind is Kind.VERSION:
            return _SIGNS[self.sign](_parts(str(found)), _parts(str(self.value)))
        return _SIGNS[self.sign](found, self.value)

    def __str__(self) -> str:
        return f"{self.named} {self.sign} {_written(self.value)}"


@dataclass(frozen=True, slots=True)
class In:
    """A comparison with some values."""

    named: Named
    values: tuple[Scalar, ...]
    negated: bool = False

    def takes(self, device: Device) -> bool:
        """Tell whether a device's value is one of those, or none of them where `negated`."""
        found = self.named.of(device)
        return any(_equals(found, value) for value in self.values) is not self.negated

    def __str__(self) -> str:
        word = "not in" if self.negated else "in"
        return f"{self.named} {word} ({', '.join(map(_written, self.values))})"


@dataclass(frozen=True, slots=True)
class Not:
    """The opposite of a term."""

    term: "Term"

    def takes(self, device: Device) -> bool:
        """Tell whether the term does not take a device."""
        return not self.term.takes(device)

    def __str__(self) -> str:
        return f"not {_within(self.term)}"


@dataclass(frozen=True, slots=True)
class Many:
    """Terms of which all must take a device, or any of them."""

    word: str
    terms: tuple["Term", ...]

    def takes(self, device: Device) -> bool:
        """Tell whether all terms take a device; with the word `or`, whether any does."""
        found = (term.takes(device) for term in self.terms)
        return any(found) if self.word == "or" else all(found)

    def __str__(self) -> str:
        return f" {self.word} ".join(map(_within, self.terms))


Term = Has | Compare | In | Not | Many


def _within(term: Term) -> str:
    return f"({term})" if isinstance(term, Many) else str(term)


@dataclass(frozen=True, slots=True)
class Selector:
    """A selector that was read; as text it is written in one way."""

    term: Term

    def takes(self, device: Device) -> bool:
        """Tell whether a device is meant."""
        return self.term.takes(device)

    @property
    def names(self) -> frozenset[str]:
        """Return the names of `NAMES` in it, without labels."""
        return frozenset(named.name for named in _named(self.term) if not named.label)

    def __str__(self) -> str:
        return str(self.term)


def _named(term: Term) -> Iterator[Named]:
    match term:
        case Has(named) | Compare(named) | In(named):
            yield named
        case Not(inner):
            yield from _named(inner)
        case Many(_, terms):
            for each in terms:
                yield from _named(each)


def parse(text: str, *, lasting: bool = False) -> Selector:
    """Read a selector.

    Args:
        text: as people write it.
        lasting: refuse names that an update may change.

    Raises:
        BadSelectorError: naming the column, and what was expected there.
    """
    if len(text) > MAX_CHARS:
        raise BadSelectorError(MAX_CHARS + 1, f"a selector has at most {MAX_CHARS} characters")
    return _Parser(text, lasting=lasting).read()


# -- values ------------------------------------------------------------------------------------------------------------


def _equals(found: Value | None, value: Scalar) -> bool:
    return value in found if isinstance(found, tuple) else found is not None and found == value


def _parts(version: str) -> tuple[tuple[int, int, str], ...]:
    """Return a version for comparing: numbers as numbers, before them words, as `rc1` before the release.

    The end counts as above a word and below a number: 1.0-rc1, 1.0, 1.0.1.
    """
    found = re.findall(r"[0-9]+|[a-zA-Z]+", version)
    return (*((2, int(each[:18]), "") if each.isdigit() else (0, 0, each) for each in found), (1, 0, ""))


_SIGNS: Final[dict[str, Callable[..., bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}


def _written(value: Scalar) -> str:
    """Return a value as `parse` reads it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    plain = _WORD.fullmatch(value) and value.lower() not in _KEYWORDS
    return value if plain else '"' + value.replace("\\", r"\\").replace('"', r"\"") + '"'


# -- reading -----------------------------------------------------------------------------------------------------------

_WORD: Final = re.compile(r"[^\s(),=<>!\"']+")
_TOKEN: Final = re.compile(
    r"\s*(?:(?P<word>[^\s(),=<>!\"']+)|(?P<sign>==|!=|<=|>=|[=<>(),])"
    r"|(?P<quoted>\"(?:[^\"\\]|\\.)*\"|'(?:[^'\\]|\\.)*')|(?P<end>\Z)|(?P<other>.))",
    re.DOTALL,
)
_KEYWORDS: Final = frozenset({"and", "or", "not", "in"})
_COMPARING: Final = frozenset({"=", "==", "!=", "<", "<=", ">", ">="})
_SHOWN: Final = 40


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    column: int

    @property
    def keyword(self) -> str:
        """Return the keyword or sign that it is; empty for another token."""
        if self.kind == "sign":
            return self.text
        return self.text.lower() if self.kind == "word" and self.text.lower() in _KEYWORDS else ""

    def __str__(self) -> str:
        if self.kind == "end":
            return "the end"
        return f"{self.text[:_SHOWN]!r}"


class _Parser:
    """Recursive descent over the tokens of one text."""

    def __init__(self, text: str, *, lasting: bool) -> None:
        self._tokens, self._place, self._lasting, self._depth = list(_tokens(text)), 0, lasting, 0

    def read(self) -> Selector:
        term = self._some("or")
        if self._next.kind != "end":
            raise self._unexpected("'and', 'or' or the end")
        return Selector(term)

    @property
    def _next(self) -> _Token:
        return self._tokens[self._place]

    def _take(self) -> _Token:
        token = self._next
        self._place += 1
        return token

    def _unexpected(self, expected: str) -> BadSelectorError:
        return BadSelectorError(self._next.column, f"expected {expected}, found {self._next}")

    def _some(self, word: str) -> Term:
        """Read terms joined by `or`, or by `and` and commas."""
        joints = {"or"} if word == "or" else {"and", ","}
        terms = [self._some("and") if word == "or" else self._term()]
        while self._next.keyword in joints:
            comma, column = self._take().keyword == ",", self._next.column
            terms.append(self._some("and") if word == "or" else self._term())
            if comma and isinstance(terms[-1], Has):
                problem = (
                    f"expected a comparison after the comma, found {terms[-1]}; of several values write 'in (a, b)'"
                )
                raise BadSelectorError(column, problem)
        return terms[0] if len(terms) == 1 else Many(word, tuple(terms))

    def _term(self) -> Term:
        if self._next.keyword not in {"not", "("}:
            return self._comparison()
        self._depth += 1
        if self._depth > DEPTH_MAX:
            raise BadSelectorError(self._next.column, f"nested more than {DEPTH_MAX} deep")
        if self._take().keyword == "not":
            term: Term = Not(self._term())
        else:
            term = self._some("or")
            if self._next.keyword != ")":
                raise self._unexpected("'and', 'or' or ')'")
            self._take()
        self._depth -= 1
        return term

    def _comparison(self) -> Term:
        named = self._name()
        sign = self._next
        if sign.keyword in _COMPARING:
            self._take()
            wanted = "=" if sign.text == "==" else sign.text
            if wanted not in {"=", "!="} and named.fact.kind not in _ORDERED:
                raise BadSelectorError(sign.column, _unordered(named, wanted))
            token, value = self._next, self._value(named)
            ordered = wanted not in {"=", "!="}
            if ordered and named.fact.kind is Kind.VERSION and not any(each.isdigit() for each in str(value)):
                raise BadSelectorError(token.column, f"expected {_EXPECTED[Kind.VERSION]}, found {token}")
            return Compare(named, wanted, value)
        if sign.keyword == "in" or (sign.keyword == "not" and self._tokens[self._place + 1].keyword == "in"):
            negated = self._take().keyword == "not"
            if negated:
                self._take()
            return In(named, self._values(named), negated)
        if sign.kind in {"word", "quoted", "other"} and sign.keyword not in {"and", "or"}:
            raise self._unexpected("=, !=, <, <=, >, >=, 'in', 'not in', 'and', 'or' or the end")
        return Has(named)

    def _values(self, named: Named) -> tuple[Scalar, ...]:
        if self._next.keyword != "(":
            raise self._unexpected("'(' and values, such as (berlin, paris)")
        self._take()
        values = [self._value(named)]
        while self._next.keyword == ",":
            self._take()
            values.append(self._value(named))
        if self._next.keyword != ")":
            raise self._unexpected("',' or ')'")
        self._take()
        return tuple(values)

    def _name(self) -> Named:
        token = self._next
        if token.kind != "word" or token.keyword:
            raise self._unexpected("a name such as site or arch, 'not' or '('")
        self._take()
        if token.text in NAMES:
            fact = NAMES[token.text]
            if fact.passing and self._lasting:
                lasting = ", ".join(name for name, each in NAMES.items() if not each.passing)
                raise BadSelectorError(token.column, f"{token.text} may change: here labels count, and {lasting}")
            return Named(token.text, fact, label=False)
        name = token.text.removeprefix(_PREFIX)
        try:
            check_label(name, "label")
        except BadNameError as error:
            raise BadSelectorError(token.column, str(error)) from None
        return Named(name, _LABEL, label=True)

    def _value(self, named: Named) -> Scalar:
        token = self._next
        if token.kind not in {"word", "quoted"} or token.keyword:
            raise self._unexpected(_EXPECTED[named.fact.kind])
        self._take()
        text = token.text if token.kind == "word" else re.sub(r"\\(.)", r"\1", token.text[1:-1], flags=re.DOTALL)
        value = _read(named.fact.kind, text)
        if value is None:
            raise BadSelectorError(token.column, f"expected {_EXPECTED[named.fact.kind]}, found {token}")
        return value


_EXPECTED: Final = {
    Kind.TEXT: "a value",
    Kind.ARCH: f"{', '.join(ARCHES[:-1])} or {ARCHES[-1]}",
    Kind.SEVERAL: "a value",
    Kind.NUMBER: "a number such as 4",
    Kind.SIZE: "a size such as 512MiB or 2GB",
    Kind.VERSION: "a version such as 0.2.0",
    Kind.FLAG: "true or false",
}


_FORMS: Final = {Kind.TEXT: "a text", Kind.ARCH: "a text", Kind.FLAG: "a flag", Kind.SEVERAL: "a list"}


def _read(kind: Kind, text: str) -> Scalar | None:
    """Read a value of one kind; None for what is none."""
    match kind:
        case Kind.FLAG:
            return _FLAGS.get(text.lower())
        case Kind.NUMBER:
            return int(text) if _NUMBER.fullmatch(text) else None
        case Kind.ARCH:
            return text if text in ARCHES else None
        case Kind.SIZE:
            found = _SIZE.fullmatch(text)
            unit = None if found is None else _UNITS.get(found[2].lower())
            return None if found is None or unit is None else int(Decimal(found[1]) * unit)
        case _:
            return text


def _unordered(named: Named, sign: str) -> str:
    near = difflib.get_close_matches(named.name, NAMES, 1)
    hint = f"; did you mean {near[0]}?" if named.label and near else ""
    ordered = ", ".join(name for name, each in NAMES.items() if each.kind in _ORDERED)
    form = "a label" if named.label else _FORMS[named.fact.kind]
    return f"{named} is {form}: {sign} compares {ordered}{hint}"


def _tokens(text: str) -> Iterator[_Token]:
    place = 0
    while True:
        found = _TOKEN.match(text, place)
        assert found is not None
        assert found.lastgroup is not None
        kind, place = found.lastgroup, found.end()
        token = _Token(kind, found[kind], found.start(kind) + 1)
        if kind == "other":
            problem = "the quote does not end" if token.text in "\"'" else f"{token.text!r} has no meaning here"
            raise BadSelectorError(token.column, f"{problem}; write a value with signs in quotes")
        yield token
        if kind == "end":
            return
