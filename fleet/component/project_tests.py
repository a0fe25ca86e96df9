"""tests.toml: requests to a component and the answers that are expected, and what it must log.

An answer is compared as a whole (`body`), or has a part (`contains`); `docs/components.md` lists every field.
"""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from fleet.component.toml_fields import Table
from fleet.protocol import bounds
from fleet.protocol.manifest import BadManifestError

_WITHIN_MS: Final = 30_000
_STATUS: Final = 200
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # as methods and names of headers are written
_PATH: Final = re.compile(r"/[!-~]*")
_VALUE: Final = re.compile(r"[\t -~\u00a0-\u00ff]*")


class BadTestsError(Exception):
    """tests.toml cannot be read: one line with the field's path."""


@dataclass(frozen=True, slots=True)
class RequestTest:
    """Request, and the answer that is expected.

    Attributes:
        body: exactly; None for any.
        contains: a part of the body; empty for any.
        answer_headers: that the answer must have, with these values.
    """

    name: str
    method: str
    path: str
    headers: dict[str, str]
    send: bytes
    status: int
    body: str | None
    contains: str
    answer_headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class LogTest:
    """Line that the component must log, at the latest `within_ms` after its start."""

    name: str
    contains: str
    within_ms: int


def load(file: Path) -> tuple[RequestTest | LogTest, ...]:
    """Read the tests of a project, requests first. Raises `BadTestsError`."""
    try:
        raw = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadTestsError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise BadTestsError(f"{file} is not TOML: {error}") from error
    try:
        requests = tuple(_request(table) for table in _tables(raw, "request"))
        logs = tuple(_log(table) for table in _tables(raw, "log"))
    except BadManifestError as error:
        raise BadTestsError(str(error).replace("component.toml", file.name, 1)) from None
    if unknown := sorted(set(raw) - {"request", "log"}):
        raise BadTestsError(f"{file.name}: {unknown[0]}: unknown; there are [[request]] and [[log]]")
    if not requests + logs:
        raise BadTestsError(f"{file} has no test: add a [[request]] or a [[log]]")
    return requests + logs


def _tables(raw: dict[str, Any], key: str) -> list[Table]:
    found = raw.get(key, [])
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise BadManifestError(f"component.toml: {key}: write each as a table, [[{key}]]")
    return [Table(f"{key}[{number}]", each) for number, each in enumerate(found, 1)]


def _request(table: Table) -> RequestTest:
    path = table.text("path", "/")
    if not path.startswith("/"):
        raise BadManifestError(f"component.toml: {table.at('path')}: begin it with a slash")
    if not _PATH.fullmatch(path):
        raise BadManifestError(f"component.toml: {table.at('path')}: write blanks and other letters as %20 and so on")
    method = table.text("method", "GET").upper()
    if not _TOKEN.fullmatch(method):
        raise BadManifestError(f"component.toml: {table.at('method')}: {method[:40]!r} is no method, such as POST")
    status = table.whole("status", _STATUS)
    body = table.text("body", "\0")
    test = RequestTest(
        name=table.text("name", f"{method} {path}"),
        method=method,
        path=path,
        headers=_headers(table, "headers"),
        send=table.text("send", "").encode(),
        status=status,
        body=None if body == "\0" else body,
        contains=table.text("contains", ""),
        answer_headers=_headers(table, "answer-headers"),
    )
    table.finish()
    return test


def _headers(table: Table, key: str) -> dict[str, str]:
    found = table.take(key)
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise table.wrong(key, "a table of texts", found)
    for name, value in found.items():
        if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise BadManifestError(f"component.toml: {table.at(key)}: {name[:40]!r}: HTTP has no such name or value")
    return {name.lower(): value for name, value in found.items()}


def _log(table: Table) -> LogTest:
    contains = table.text("contains", "")
    if not contains:
        raise BadManifestError(f"component.toml: {table.at('contains')}: which text must a line have?")
    test = LogTest(
        name=table.text("name", f"logs {contains}"),
        contains=contains,
        within_ms=table.duration("within", _WITHIN_MS) or _WITHIN_MS,
    )
    table.finish()
    return test


def judge(test: RequestTest, status: int, headers: dict[str, str], body: bytes) -> str:
    """Return what is wrong with an answer; empty for nothing."""
    if status != test.status:
        return f"answered {status}, expected {test.status}: {_shown(body)}"
    for name, value in test.answer_headers.items():
        if headers.get(name) != value:
            return f"{name} is {headers.get(name)!r}, expected {value!r}"
    text = body.decode("utf-8", errors="replace")
    if test.body is not None and text != test.body:
        return f"answered {_shown(body)}, expected {test.body[:80]!r}"
    if test.contains not in text:
        return f"answered {_shown(body)}, which has no {test.contains[:80]!r}"
    return ""


def _shown(body: bytes) -> str:
    return repr(body[: bounds.KIB // 8].decode("utf-8", errors="replace"))
