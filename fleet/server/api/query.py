"""Query parameters, declared once: a route's guard checks them, its handler reads them, the document shows them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request

from fleet.protocol.operator_api import Refusal

LABEL: Final = "[a-z0-9-]{1,63}"
"""Pattern of a group, an instance or a namespace (`fleet.protocol.names`)."""

_SHOWN: Final = 50
_DIGITS_MAX: Final = 18


@dataclass(frozen=True, slots=True, kw_only=True)
class Number:
    """Whole number.

    Attributes:
        default: where the request has none.
        most: the largest that is accepted; the smallest is 0.
    """

    name: str
    default: int = 0
    most: int

    def of(self, request: Request) -> int:
        """Return a request's number; raises `Refusal` for anything else."""
        text = request.query_params.get(self.name)
        if text is None:
            return self.default
        # int() alone takes digits of every script, signs, spaces and underscores
        number = int(text) if text.isascii() and text.isdigit() and len(text) <= _DIGITS_MAX else None
        if number is None or number > self.most:
            raise _refused(self.name, text, f"a number from 0 to {self.most}")
        return number

    @property
    def schema(self) -> dict[str, Any]:
        """As JSON schema."""
        return {"type": "integer", "minimum": 0, "maximum": self.most, "default": self.default}


@dataclass(frozen=True, slots=True, kw_only=True)
class Word:
    """Text of one pattern; empty where the request has none.

    Attributes:
        pattern: regular expression that the whole text matches.
        what: it is, for people.
    """

    name: str
    pattern: str
    what: str

    def of(self, request: Request) -> str:
        """Return a request's text; raises `Refusal` for what does not match."""
        text = request.query_params.get(self.name, "")
        if text and not re.fullmatch(self.pattern, text):
            raise _refused(self.name, text, self.what)
        return text

    @property
    def schema(self) -> dict[str, Any]:
        """As JSON schema; an empty text counts as none."""
        return {"type": "string", "pattern": f"^({self.pattern})?$"}


Parameter = Number | Word


def check(request: Request, parameters: Sequence[Parameter]) -> None:
    """Refuse a query parameter that a route does not have, that is given twice or cannot be read; raises `Refusal`."""
    known = [each.name for each in parameters]
    for name in request.query_params:
        if name not in known:
            raise Refusal(
                400,
                "bad-request",
                f"unknown parameter {name[:_SHOWN]!r}",
                f"the parameters are {', '.join(known)}" if known else f"{request.url.path[:200]} takes none",
            )
        if len(request.query_params.getlist(name)) > 1:
            raise Refusal(400, "bad-request", f"{name} is given more than once")
    for each in parameters:
        each.of(request)


def _refused(name: str, text: str, what: str) -> Refusal:
    return Refusal(400, "bad-request", f"{name}={text[:_SHOWN]!r} is not {what}")
