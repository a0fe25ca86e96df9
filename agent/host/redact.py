"""Keeps the values of secrets out of what a lane says: log lines, traps, and what a guest says of its health.

A guest's own carelessness is what this is for: one that wants to tell its secret can always write it in another way. So
a value is found as it stands and in the forms in which programs print values by mistake, whole or by the line.
"""

import base64
import json
import re
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Final

import msgspec

from agent.host import control

REDACTED: Final = "redacted"
LINE_MIN_CHARS: Final = 8
"""A shorter line of a value of several lines is as good as any word."""


class Redactor:
    """Replaces values in text."""

    def __init__(self, values: Iterable[str]) -> None:
        """`values` are looked for from now on; without any, text stays as it is."""
        found = {form for value in values for form in _forms(value)}
        longest_first = sorted(found, key=lambda form: (-len(form), form))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if found else None

    def text(self, text: str) -> str:
        """The text without values."""
        return text if self._pattern is None else self._pattern.sub(REDACTED, text)

    def message(self, message: control.FromLane) -> control.FromLane:
        """What a lane is about to say, without values."""
        if self._pattern is None:
            return message
        match message:
            case control.Line(text=text):
                return msgspec.structs.replace(message, text=self.text(text))
            case control.Fault(message=text) | control.Refused(message=text):
                return msgspec.structs.replace(message, message=self.text(text))
            case (
                control.Checked(problem=str(text))
                | control.Ran(problem=str(text))
                | control.StateSaved(problem=str(text))
                | control.StateLoaded(problem=str(text))
            ):
                return msgspec.structs.replace(message, problem=self.text(text))
            case _:
                return message


def _forms(value: str) -> Iterator[str]:
    whole = value.strip() or value
    lines = [line.strip() for line in value.splitlines()]
    for each in (value, whole, *(line for line in lines if len(line) >= LINE_MIN_CHARS)):
        data = each.encode()
        yield each
        yield json.dumps(each)[1:-1]
        yield json.dumps(each, ensure_ascii=False)[1:-1]
        yield urllib.parse.quote(each, safe="")
        yield urllib.parse.quote_plus(each)
        yield from (base64.b64encode(data).decode().rstrip("="), base64.urlsafe_b64encode(data).decode().rstrip("="))
        yield from (data.hex(), data.hex().upper())
