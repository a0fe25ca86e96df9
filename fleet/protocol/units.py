"""Sizes and durations as people write them, `16MiB` and `500ms`, and as programs count them: bytes, milliseconds."""

import re
from typing import Final

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
        raise BadUnitError(f"{text[:40]!r} is not understood: write {example} (units: {', '.join(units)})")
    fraction = match[2] or ""
    scale: int = 10 ** len(fraction)
    value, rest = divmod(int(match[1] + fraction) * units[match[3]], scale)
    if rest:
        raise BadUnitError(f"{text[:40]!r} is not a whole number of {next(iter(units))}")
    return value


def parse_size(text: str) -> int:
    """Bytes of `16MiB` (1024s) or `16MB` (1000s); raises `BadUnitError`."""
    return _parse(text, _SIZES, '"16MiB"')


def parse_duration(text: str) -> int:
    """Milliseconds of `500ms`, `1.5s`, `10m`, `2h`, `1d`; raises `BadUnitError`."""
    return _parse(text, _DURATIONS, '"500ms" or "30s"')


def _format(value: int, units: dict[str, int]) -> str:
    for unit, factor in sorted(units.items(), key=lambda item: -item[1]):
        if value >= factor and value % factor == 0:
            return f"{value // factor}{unit}"
    return f"{value}{next(iter(units))}"


def format_size(value: int) -> str:
    """The shortest exact form in 1024s, such as `16MiB`."""
    return _format(value, {unit: factor for unit, factor in _SIZES.items() if unit == "B" or unit.endswith("iB")})


def format_duration(value: int) -> str:
    """The shortest exact form, such as `30s`."""
    return _format(value, _DURATIONS)
