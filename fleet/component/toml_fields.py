"""TOML fields with types, bounds and units.

Tables are read field by field: each value is checked for its type and its bounds, and unknown fields are errors.
Every error is a `BadManifestError` of one line that begins with the file and the field's path. Sizes and durations
are written for people (`16MiB`, `500ms`) and counted in bytes and milliseconds.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

import msgspec

from fleet.protocol import bounds
from fleet.protocol.manifest import (
    CORE_INSTANCES_MAX,
    STOP_MAX_MS,
    TABLE_ELEMENTS_MAX,
    BadManifestError,
    Health,
    Limits,
)

FILE_NAME: Final = "component.toml"

_NUMBER_MAX: Final = 1 << 40
_ZERO_IS_FINE: Final = frozenset(
    {"fuel", "request", "log_lines_per_minute", "storage", "daily_written", "state", "requests_per_instance"}
    | {"probation", "min_calls", "max_faults", "max_error_percent"}
)
_AT_MOST: Final = {
    "max_error_percent": 100,
    "concurrency": 64,
    "table_elements": TABLE_ELEMENTS_MAX,
    "core_instances": CORE_INSTANCES_MAX,
    "stop": STOP_MAX_MS,
}
_AT_LEAST: Final = {"memory": 64 * bounds.KIB, "every": 100}

Checked = TypeVar("Checked")
Struct = TypeVar("Struct", Limits, Health)


def checked(check: Callable[[str], Checked], text: str, path: str) -> Checked:
    """Call `check(text)`, and put `path` before the message of its ValueError."""
    try:
        return check(text)
    except ValueError as error:
        raise BadManifestError(f"{FILE_NAME}: {path}: {error}") from error


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a manifest's struct as authors write it.

    Attributes:
        name: in the struct, with its unit.
        key: in the text, without a unit.
        kind: form of its value.
    """

    name: str
    key: str
    kind: Literal["size", "duration", "number", "switch"]


def fields(struct: type[Limits] | type[Health]) -> tuple[Field, ...]:
    """List the fields of `limits` or `health`; their names carry no unit: `memory_bytes` is `memory`."""
    found = []
    for field in msgspec.structs.fields(struct):
        if field.name == "metrics":  # a table of its own
            continue
        if field.name.endswith("_bytes"):
            found.append(Field(field.name, field.name.removesuffix("_bytes"), "size"))
        elif field.name.endswith("_ms"):
            found.append(Field(field.name, field.name.removesuffix("_ms"), "duration"))
        else:
            found.append(Field(field.name, field.name, "switch" if field.type is bool else "number"))
    return tuple(found)


class Table:
    """Table of a TOML text: returns fields by type, and remembers which were not read."""

    def __init__(self, path: str, raw: dict[str, Any]) -> None:
        self.path = path
        self.raw = raw
        self.known: list[str] = []

    def at(self, key: str) -> str:
        """Return the path of a field."""
        return f"{self.path}.{key}" if self.path else key

    def wrong(self, key: str, wanted: str, value: object) -> BadManifestError:
        """Make the error that says which type is wanted."""
        shown = {bool: "a switch", int: "a number", float: "a number", str: "a text", list: "a list", dict: "a table"}
        what = shown.get(type(value), "a date or time")
        return BadManifestError(f"{FILE_NAME}: {self.at(key)}: expected {wanted}, not {what}")

    def take(self, key: str) -> Any:
        """Take the raw value, None where there is none, and mark the field as known."""
        self.known.append(key)
        return self.raw.get(key)

    def text(self, key: str, default: str) -> str:
        """Take a text."""
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a text", value)
        return value

    def texts(self, key: str, check: Callable[[str], str | None]) -> tuple[str, ...]:
        """Take a list of different texts; `check` returns what is wrong with one, or None."""
        value = self.take(key)
        if value is None:
            return ()
        if not isinstance(value, list):
            raise self.wrong(key, "a list of texts", value)
        for item in value:
            if not isinstance(item, str):
                raise self.wrong(key, "a list of texts", item)
            if said := check(item):
                raise BadManifestError(f"{FILE_NAME}: {self.at(key)}: {item[:80]!r}: {said}")
        return tuple(dict.fromkeys(value))

    def switch(self, key: str, default: bool) -> bool:  # noqa: FBT001 - a value, not an option
        """Take true or false."""
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false", value)
        return value

    def whole(self, key: str, default: int) -> int:
        """Take a whole number within its bounds."""
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(key, "a whole number", value)
        return self.in_bounds(key, value)

    def signed(self, key: str) -> int | None:
        """Take a whole number that may be negative; None where there is none."""
        value = self.take(key)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.wrong(key, "a whole number", value)
        if abs(value) > bounds.NUMBER_MAX:
            raise BadManifestError(f"{FILE_NAME}: {self.at(key)}: beyond 2^53")
        return value

    def size(self, key: str, default: int) -> int:
        """Take a size, in bytes."""
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, 'a size with its unit, such as "16MiB"', value)
        return self.in_bounds(key, checked(parse_size, value, self.at(key)))

    def duration(self, key: str, default: int | None) -> int | None:
        """Take a duration, in milliseconds."""
        value = self.take(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, 'a duration with its unit, such as "500ms"', value)
        return self.in_bounds(key, checked(parse_duration, value, self.at(key)))

    def in_bounds(self, key: str, value: int) -> int:
        """Return `value` if it is within the bounds of its field."""
        least = _AT_LEAST.get(key, 0 if key in _ZERO_IS_FINE or not self.path else 1)
        most = _AT_MOST.get(key, _NUMBER_MAX)
        if not least <= value <= most:
            raise BadManifestError(f"{FILE_NAME}: {self.at(key)}: {value} is not between {least} and {most}")
        return value

    def struct(self, struct: type[Struct]) -> Struct:
        """Take a struct of numbers and switches, listed by `fields`."""
        default = struct()
        values: dict[str, Any] = {}
        for field in fields(struct):
            before = getattr(default, field.name)
            match field.kind:
                case "size":
                    values[field.name] = self.size(field.key, before)
                case "duration":
                    values[field.name] = self.duration(field.key, before)
                case "number":
                    values[field.name] = self.whole(field.key, before)
                case "switch":
                    values[field.name] = self.switch(field.key, before)
        self.finish()
        return struct(**values)

    def table(self, key: str) -> "Table":
        """Take an inner table; empty where there is none."""
        value = self.take(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, "a table", value)
        return Table(self.at(key), value or {})

    def finish(self) -> None:
        """Refuse fields that were not taken."""
        for key in self.raw:
            if key not in self.known:
                import difflib  # noqa: PLC0415 - for the sentence about a mistake alone

                near = difflib.get_close_matches(key, self.known, 1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(self.known)}"
                raise BadManifestError(f"{FILE_NAME}: {self.at(key[:80])}: unknown field; {hint}")


_SIZES: Final = {
    "B": 1,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "KiB": 1024,
    "MiB": 1024**2,
    "GiB": 1024**3,
}
_DURATIONS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_NUMBER: Final = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,3}))? ?([A-Za-z]+)")


class BadUnitError(ValueError):
    """Not a size or duration; the message shows how one is written."""


def _parse(text: str, units: dict[str, int], example: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[3] not in units:
        raise BadUnitError(f"{text[:40]!r} is not valid: write {example} (units: {', '.join(units)})")
    fraction = match[2] or ""
    scale: int = 10 ** len(fraction)
    value, rest = divmod(int(match[1] + fraction) * units[match[3]], scale)
    if rest:
        raise BadUnitError(f"{text[:40]!r} is not a whole number of {next(iter(units))}")
    return value


def parse_size(text: str) -> int:
    """Parse `16MiB` (1024s) or `16MB` (1000s) to bytes. Raises `BadUnitError`."""
    return _parse(text, _SIZES, '"16MiB"')


def parse_duration(text: str) -> int:
    """Parse `500ms`, `1.5s`, `10m`, `2h`, `1d` to milliseconds. Raises `BadUnitError`."""
    return _parse(text, _DURATIONS, '"500ms" or "30s"')


def _format(value: int, units: dict[str, int]) -> str:
    for unit, factor in sorted(units.items(), key=lambda item: -item[1]):
        if value >= factor and value % factor == 0:
            return f"{value // factor}{unit}"
    return f"{value}{next(iter(units))}"


def format_size(value: int) -> str:
    """Format a size in its shortest exact form, in 1024s: `16MiB`."""
    return _format(value, {unit: factor for unit, factor in _SIZES.items() if unit == "B" or unit.endswith("iB")})


def format_duration(value: int) -> str:
    """Format a duration in its shortest exact form: `30s`."""
    return _format(value, _DURATIONS)
