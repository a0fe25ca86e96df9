"""Parts of all routes: strict request bodies, replies, problems (RFC 9457), bearer tokens.

A route is a coroutine from request to response. Errors are raised as `Refusal` and answered as
`application/problem+json`; no request ends in a traceback.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from fleet.protocol import bounds, wire
from fleet.protocol.names import BadNameError
from fleet.protocol.operator_api import Problem, Refusal
from signing.errors import ConflictError, Rejected, RepositoryError, SigningError

log = logging.getLogger(__name__)
B = TypeVar("B", bound=msgspec.Struct)
Route = Callable[[Request], Awaitable[Response]]
_HEADERS: Final = {401: {"www-authenticate": "Bearer"}, 429: {"retry-after": "60"}, 503: {"retry-after": "60"}}
"""RFC 9110, sections 15.5.2 and 10.2.3."""


def answer(value: msgspec.Struct, status: int = 200) -> Response:
    """Return a reply with a struct as JSON."""
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def problem(value: Problem) -> Response:
    """Return a problem as `application/problem+json`."""
    headers = _HEADERS.get(value.status)
    return Response(msgspec.json.encode(value), value.status, headers, media_type="application/problem+json")


async def read(request: Request, max_bytes: int = bounds.API_BODY_MAX_BYTES) -> bytes:
    """Read the whole request body.

    Raises:
        Refusal: it is larger than `max_bytes`.
    """
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise Refusal(413, "too-large", f"the request is larger than {max_bytes} bytes")
    return bytes(body)


async def body(request: Request, kind: type[B], max_bytes: int = bounds.API_BODY_MAX_BYTES) -> B:
    """Read the request body as a struct.

    Raises:
        Refusal: too large, not JSON, or a field that is missing, unknown or of another type; the detail names it.
    """
    return decoded(await read(request, max_bytes), kind)


def decoded(data: bytes, kind: type[B]) -> B:
    """Decode bytes as a struct. Raises `Refusal` as `body` does."""
    try:
        return msgspec.json.decode(data or b"{}", type=kind)
    except msgspec.ValidationError as error:
        raise Refusal(
            400,
            "bad-request",
            "a field of the request is missing, unknown or of another type",
            str(error),
        ) from error
    except wire.JSON_ERRORS as error:
        raise Refusal(400, "bad-request", "the request is not valid JSON", str(error)) from error


def guarded(route: Route) -> Route:
    """Wrap a route: answer every exception with a problem."""

    async def serve(request: Request) -> Response:
        try:
            return await route(request)
        except Exception as error:  # noqa: BLE001 - outermost: the client gets a problem, the log the traceback
            if isinstance(error, ClientDisconnect):
                return Response(status_code=499)
            return problem(explain(error))

    return serve


def explain(error: Exception) -> Problem:
    """Return the problem that tells a client about an error."""
    match error:
        case Refusal():
            return error.problem
        case BadNameError():
            return Problem(type="bad-name", title=str(error), status=400)
        case ConflictError():
            return Problem(
                type="conflict", title=str(error), status=409, action="fetch the repository and publish again"
            )
        case Rejected():
            return Problem(type=str(error.code), title=error.message, status=422)
        case RepositoryError() | SigningError():
            return Problem(type="refused", title=str(error), status=422)
        case _:
            log.error("a request failed", exc_info=error)
            return Problem(
                type="internal",
                title="internal error of the server",
                status=500,
                detail=type(error).__name__,
                action="see the server's log for the traceback",
            )


def bearer(request: Request) -> str:
    """Return the bearer token of a request; empty for none."""
    kind, _, token = request.headers.get("authorization", "").partition(" ")
    return token.strip() if kind.lower() == "bearer" else ""


def param(request: Request, name: str) -> str:
    """Return a named part of the path."""
    found: Any = request.path_params[name]
    return str(found)


async def _not_found(request: Request, _error: Exception) -> Response:
    return problem(Problem(type="not-found", title=f"there is nothing at {request.url.path[:200]}", status=404))


async def _not_allowed(request: Request, _error: Exception) -> Response:
    title = f"{request.url.path[:200]} does not support {request.method}"
    return problem(Problem(type="method-not-allowed", title=title, status=405))


HANDLERS: Final[Mapping[Any, Any]] = {404: _not_found, 405: _not_allowed}
"""Problems in place of the replies of Starlette's router."""
