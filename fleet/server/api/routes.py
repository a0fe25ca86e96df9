"""Route tables of both listeners: Starlette's routes, and for operators the OpenAPI document, are made from them.

A row holds the path, the handler, its request and reply, and the required role. The document describes the
structs of `fleet.protocol.operator_api` and `fleet.protocol.trust_api`.
"""

import functools
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, assert_never

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route as StarletteRoute

from fleet.protocol import operator_api as api
from fleet.protocol import trust_api as trust
from fleet.protocol.messages import (
    ArchiveNote,
    ArchiveTaken,
    ArchiveView,
    DesiredReply,
    Enrolled,
    EnrolRequest,
    Exchange,
    ExchangeReply,
    LogAnswer,
    LogChunk,
    LogView,
    RenewReply,
    RenewRequest,
)
from fleet.protocol.operator_api import Refusal
from fleet.protocol.trust_api import Role
from fleet.server.api import archives, devices, http, messages, operators, query, secrets
from fleet.server.api import trust as trust_handlers
from fleet.server.api.archives import Archives
from fleet.server.api.devices import DeviceApi, LogRelay
from fleet.server.api.messages import MessageHandlers
from fleet.server.api.operators import (
    CommandHandlers,
    DeviceHandlers,
    EnrolmentHandlers,
    FleetHandlers,
    GroupHandlers,
    RolloutHandlers,
)
from fleet.server.api.publishing import PublishingHandlers
from fleet.server.api.query import Parameter
from fleet.server.api.secrets import SecretHandlers
from fleet.server.api.trust import CaHandlers, OnlineRoles, OperatorAccounts
from fleet.server.consumers import ConsumerHandlers
from fleet.store.rows import DeviceRow
from fleet.store.store import Store

Struct = type[msgspec.Struct]
Schemas = dict[Any, dict[str, Any]]

Handler = Callable[[Request, str], Awaitable[Response]]
"""Coroutine from a request and the name of the operator who sent it ("" where the route is open) to a response."""

DeviceHandler = Callable[[Request, DeviceRow], Awaitable[Response]]
"""Coroutine from a request and the device that sent it to a response."""


class Access(Enum):
    """Role that a route requires, least first."""

    OPEN = 0  # no token
    SCRAPER = 1
    VIEWER = 2
    OPERATOR = 3
    ADMIN = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Handlers:
    """Handlers of the operator API, by subject."""

    fleet: FleetHandlers
    devices: DeviceHandlers
    commands: CommandHandlers
    enrolment: EnrolmentHandlers
    groups: GroupHandlers
    rollouts: RolloutHandlers
    publishing: PublishingHandlers
    secrets: SecretHandlers
    accounts: OperatorAccounts
    ca: CaHandlers
    online: OnlineRoles
    logs: LogRelay
    messages: MessageHandlers
    archives: Archives
    consumers: ConsumerHandlers


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Row of a route table.

    Attributes:
        method: in lower case, as OpenAPI writes it.
        path: with names of its variable parts in braces.
        reply: struct of the reply, or its media type.
        summary: one line, imperative.
        request: struct of the request's body, or its media type; None for no body.
        query: parameters.
    """

    method: str
    path: str
    reply: Struct | str
    summary: str
    request: Struct | str | None = None
    query: tuple[Parameter, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Route(Row):
    """Route of the operator API.

    Attributes:
        handler: chooses the handler.
        access: who may call it.
    """

    handler: Callable[[Handlers], Handler]
    access: Access


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceRoute(Row):
    """Route of the API for enrolled devices, which show their certificate.

    Attributes:
        handler: chooses the handler.
        renewing: whether an expired certificate is accepted.
    """

    handler: Callable[[DeviceApi], DeviceHandler]
    renewing: bool = False


def _get(
    path: str,
    handler: Callable[[Handlers], Handler],
    reply: Struct | str,
    summary: str,
    *,
    query: tuple[Parameter, ...] = (),
    access: Access = Access.VIEWER,
) -> Route:
    return Route(method="get", path=path, handler=handler, reply=reply, summary=summary, access=access, query=query)


def _put(
    path: str,
    handler: Callable[[Handlers], Handler],
    reply: Struct | str,
    summary: str,
    *,
    request: Struct | str | None = None,
    access: Access = Access.OPERATOR,
) -> Route:
    return Route(method="put", path=path, handler=handler, reply=reply, summary=summary, access=access, request=request)


def _post(
    path: str,
    handler: Callable[[Handlers], Handler],
    reply: Struct | str,
    summary: str,
    *,
    request: Struct | str | None = None,
    access: Access = Access.OPERATOR,
) -> Route:
    return Route(
        method="post", path=path, handler=handler, reply=reply, summary=summary, access=access, request=request
    )


ROUTES: Final[tuple[Route, ...]] = (
    _get("/v1/status", lambda on: on.fleet.status, api.Status, "Show the state of the fleet"),
    _get("/v1/devices", lambda on: on.devices.list, api.Devices, "List devices", query=(operators.DEVICES_WHERE,)),
    _get("/v1/devices/{id}", lambda on: on.devices.show, api.DeviceDetail, "Show a device"),
    _get(
        "/v1/devices/{id}/timeline",
        lambda on: on.devices.timeline,
        api.Timeline,
        "List what happened to a device",
        query=(operators.TIMELINE_LIMIT,),
    ),
    _get(
        "/v1/devices/{id}/reports",
        lambda on: on.devices.reports,
        api.History,
        "List a device's reports as the device signed them",
        query=(operators.REPORTS_BOOT, operators.REPORTS_AFTER),
    ),
    _get(
        "/v1/devices/{id}/desired",
        lambda on: on.devices.desired,
        "application/json",
        "Get a device's newest signed assignment",
    ),
    _put(
        "/v1/devices/{id}/labels",
        lambda on: on.devices.labels,
        api.DeviceDetail,
        "Set or remove labels",
        request=api.LabelsRequest,
    ),
    _put(
        "/v1/devices/{id}/keys",
        lambda on: on.devices.keys,
        api.DeviceDetail,
        "Set or remove a device's own configuration keys",
        request=api.KeysRequest,
    ),
    _put(
        "/v1/devices/{id}/pin",
        lambda on: on.devices.pin,
        api.RolloutView,
        "Pin a value to one device",
        request=api.RolloutRequest,
    ),
    _post(
        "/v1/devices/{id}/unpin",
        lambda on: on.devices.unpin,
        api.DeviceDetail,
        "Remove a pin: the device follows its groups again",
        request=api.InstanceRequest,
    ),
    _post(
        "/v1/devices/{id}/retry",
        lambda on: on.devices.retry,
        api.DeviceDetail,
        "Retry a failed deployment",
        request=api.InstanceRequest,
    ),
    _post(
        "/v1/devices/{id}/command",
        lambda on: on.commands.send,
        api.CommandReply,
        "Send a signed command",
        request=api.CommandRequest,
    ),
    _get(
        "/v1/devices/{id}/logs",
        lambda on: on.logs.read,
        LogView,
        "Read the log lines that a command asked for; wait makes it a long poll",
        query=(devices.LOGS_COMMAND, devices.LOGS_AFTER, devices.LOGS_WAIT),
    ),
    _get(
        "/v1/devices/{id}/diagnose",
        lambda on: on.archives.look,
        ArchiveView,
        "Show how far the archive is that a command asked for; wait and known make it a long poll",
        query=(archives.ARCHIVE_COMMAND, archives.ARCHIVE_KNOWN, archives.ARCHIVE_WAIT),
        access=Access.OPERATOR,
    ),
    _get(
        "/v1/devices/{id}/diagnose/archive",
        lambda on: on.archives.fetch,
        "application/octet-stream",
        "Fetch the sealed archive once",
        query=(archives.ARCHIVE_COMMAND,),
        access=Access.OPERATOR,
    ),
    _post("/v1/devices/{id}/revoke", lambda on: on.enrolment.revoke, api.DeviceDetail, "Revoke a device"),
    _get(
        "/v1/messages",
        lambda on: on.messages.read,
        api.Messages,
        "List messages of components: the newest, or those after a number; wait makes it a long poll",
        query=messages.PARAMETERS,
    ),
    _get("/v1/groups", lambda on: on.groups.list, api.Groups, "List groups"),
    _put(
        "/v1/groups/{name}",
        lambda on: on.groups.change,
        api.GroupRow,
        "Create or change a group",
        request=api.GroupRequest,
    ),
    _get("/v1/groups/{name}/policy", lambda on: on.groups.policy, api.GroupPolicy, "Show the plan of a group"),
    _put(
        "/v1/groups/{name}/policy",
        lambda on: on.groups.set_policy,
        api.GroupPolicy,
        "Set or clear the plan of a group",
        request=api.GroupPolicyRequest,
        access=Access.ADMIN,
    ),
    _post(
        "/v1/enroll-tokens",
        lambda on: on.enrolment.make_token,
        api.EnrollTokenReply,
        "Create a one-time enrolment token",
        request=api.EnrollTokenRequest,
    ),
    _post(
        "/v1/enrol",
        lambda on: on.enrolment.enrol,
        Enrolled,
        "Enrol a device with its token",
        request=EnrolRequest,
        access=Access.OPEN,
    ),
    _get("/v1/components", lambda on: on.publishing.components, api.Components, "List published components"),
    _get("/v1/tuf/{file}", lambda on: on.publishing.tuf, "application/json", "Get a TUF metadata file"),
    _put(
        "/v1/artifacts/{sha256}",
        lambda on: on.publishing.put_artifact,
        api.ArtifactReply,
        "Upload an artifact",
        request="application/wasm",
    ),
    _get(
        "/v1/artifacts/{sha256}",
        lambda on: on.publishing.get_artifact,
        "application/wasm",
        "Get an artifact, whole or by Range",
    ),
    _post(
        "/v1/roles/{namespace}",
        lambda on: on.publishing.role,
        api.RoleReply,
        "Publish a namespace's next role",
        request="application/json",
    ),
    _post(
        "/v1/signing-events",
        lambda on: on.publishing.event,
        api.RoleReply,
        "Publish changes of root, targets and namespaces",
        request="application/json",
    ),
    _get("/v1/secrets", lambda on: on.secrets.list, trust.Secrets, "List secrets, without values"),
    _put(
        "/v1/secrets/{name}",
        lambda on: on.secrets.set,
        trust.SecretReply,
        "Set the next version of a secret",
        request=trust.SecretRequest,
    ),
    _get(
        "/v1/secrets/{name}/keys",
        lambda on: on.secrets.keys,
        trust.SealingKeys,
        "List devices' sealing keys, each signed by its device",
        query=(secrets.KEYS_GROUP, secrets.KEYS_DEVICE, secrets.KEYS_INSTANCE),
    ),
    _post(
        "/v1/secrets/{name}/remove",
        lambda on: on.secrets.remove,
        trust.Secrets,
        "Remove a secret from devices",
        request=trust.SecretScope,
    ),
    _get(
        "/v1/devices/{id}/secrets/{sha256}",
        lambda on: on.secrets.box,
        "application/octet-stream",
        "Get a device's sealed box",
    ),
    _post(
        "/v1/rollouts", lambda on: on.rollouts.deploy, api.RolloutView, "Start a rollout", request=api.RolloutRequest
    ),
    _get(
        "/v1/rollouts",
        lambda on: on.rollouts.list,
        api.Rollouts,
        "List rollouts, newest first",
        query=(operators.ROLLOUTS_LIMIT, operators.ROLLOUTS_GROUP),
    ),
    _get(
        "/v1/rollouts/{id}",
        lambda on: on.rollouts.show,
        api.RolloutView,
        "Show a rollout; wait and since make it a long poll",
        query=(operators.ROLLOUT_WAIT, operators.ROLLOUT_SINCE),
    ),
    _post("/v1/rollouts/{id}/pause", lambda on: on.rollouts.pause, api.RolloutView, "Pause a rollout"),
    _post("/v1/rollouts/{id}/resume", lambda on: on.rollouts.resume, api.RolloutView, "Resume a rollout"),
    _post(
        "/v1/rollouts/{id}/abort",
        lambda on: on.rollouts.abort,
        api.RolloutView,
        "Abort a rollout and roll back",
        request=api.AbortRequest,
    ),
    _post("/v1/rollouts/{id}/approve", lambda on: on.rollouts.approve, api.RolloutView, "Approve the gate of a wave"),
    _post(
        "/v1/rollouts/{id}/retry", lambda on: on.rollouts.retry, api.RolloutView, "Start a reverted rollout once more"
    ),
    _post(
        "/v1/rollouts/{id}/cancel-device",
        lambda on: on.rollouts.cancel_device,
        api.RolloutView,
        "Leave one device out of a rollout",
        request=api.CancelRequest,
    ),
    _get("/v1/freezes", lambda on: on.rollouts.freezes, api.Freezes, "List the freezes"),
    _post(
        "/v1/freeze",
        lambda on: on.rollouts.freeze,
        api.Freezes,
        "Pause every rollout and refuse new ones",
        request=api.FreezeRequest,
    ),
    _post("/v1/unfreeze", lambda on: on.rollouts.unfreeze, api.Freezes, "End a freeze", request=api.UnfreezeRequest),
    _post(
        "/v1/preflight",
        lambda on: on.rollouts.preflight,
        api.Preflight,
        "Show what a rollout would do",
        request=api.RolloutRequest,
    ),
    _get(
        "/v1/withdrawal",
        lambda on: on.rollouts.withdrawal,
        api.WithdrawalView,
        "Show what the withdrawal of a release would do",
        query=(operators.WITHDRAWAL_TARGET,),
    ),
    _post(
        "/v1/undo",
        lambda on: on.rollouts.undo,
        api.RolloutView,
        "Start a rollout of the previous state",
        request=api.UndoRequest,
    ),
    _post(
        "/v1/removals", lambda on: on.rollouts.remove, api.RolloutView, "Remove an instance", request=api.RemovalRequest
    ),
    _post(
        "/v1/reconcile",
        lambda on: on.fleet.reconcile,
        api.Reconciliation,
        "Decide on devices that are ahead of a server made anew from a backup",
        request=api.ReconcileRequest,
    ),
    _get("/v1/audit", lambda on: on.fleet.audit, api.Audit, "List operators' acts", query=(operators.AUDIT_LIMIT,)),
    _get(
        "/v1/online",
        lambda on: on.online.show,
        trust.OnlineView,
        "Show which host signs snapshot and timestamp, and what waits for it",
        query=(trust_handlers.ONLINE_WAIT,),
    ),
    _post(
        "/v1/online",
        lambda on: on.online.bring,
        trust.OnlineView,
        "Bring what the signing host has signed",
        request="application/json",
        access=Access.VIEWER,
    ),
    _post(
        "/v1/online/discard",
        lambda on: on.online.discard,
        trust.OnlineView,
        "Discard what waits for the signing host",
        access=Access.ADMIN,
    ),
    _get("/v1/ca", lambda on: on.ca.show, trust.CaView, "Show the fleet's CA, and a request for the next issuing CA"),
    _put(
        "/v1/ca/issuing",
        lambda on: on.ca.install,
        trust.CaView,
        "Install a signed issuing CA",
        request=trust.IssuingRequest,
        access=Access.ADMIN,
    ),
    _post(
        "/v1/ca/issuers/{serial}/revoke",
        lambda on: on.ca.revoke,
        trust.CaView,
        "Revoke an issuing CA",
        access=Access.ADMIN,
    ),
    _get("/v1/consumers", lambda on: on.consumers.list, trust.Consumers, "List who reads messages from the broker"),
    _post(
        "/v1/consumers",
        lambda on: on.consumers.add,
        trust.ConsumerReply,
        "Let a system read messages from the broker",
        request=trust.ConsumerRequest,
        access=Access.ADMIN,
    ),
    _post(
        "/v1/consumers/{name}/revoke",
        lambda on: on.consumers.revoke,
        trust.Consumers,
        "Revoke a consumer, and end its connection",
        access=Access.ADMIN,
    ),
    _get("/v1/operators", lambda on: on.accounts.list, trust.Operators, "List operators"),
    _put(
        "/v1/operators/{name}",
        lambda on: on.accounts.put,
        trust.OperatorReply,
        "Add or change an operator",
        request=trust.OperatorRequest,
        access=Access.ADMIN,
    ),
    _post(
        "/v1/operators/{name}/remove",
        lambda on: on.accounts.delete,
        trust.Operators,
        "Remove an operator",
        access=Access.ADMIN,
    ),
)
"""The documented routes."""


async def _health(_request: Request, _by: str) -> Response:
    return Response("ok\n", media_type="text/plain")


async def _openapi(_request: Request, _by: str) -> Response:
    return Response(document(), media_type="application/json")


UNDOCUMENTED: Final[tuple[Route, ...]] = (
    _get("/healthz", lambda _: _health, "text/plain", "Answer while the server runs", access=Access.OPEN),
    _get("/metrics", lambda on: on.fleet.metrics, "text/plain", "Show figures for Prometheus", access=Access.SCRAPER),
    _get("/openapi.json", lambda _: _openapi, "application/json", "Show this document"),
)
"""Routes outside of the OpenAPI document, for machines."""


DEVICE_ROUTES: Final[tuple[DeviceRoute, ...]] = (
    DeviceRoute(
        method="get",
        path="/v1/tuf/{file}",
        handler=lambda on: on.tuf,
        reply="application/json",
        summary="Get a TUF metadata file",
    ),
    DeviceRoute(
        method="get",
        path="/v1/artifacts/{sha256}",
        handler=lambda on: on.artifact,
        reply="application/wasm",
        summary="Get an artifact, whole or by Range",
    ),
    DeviceRoute(
        method="get",
        path="/v1/secrets/{sha256}",
        handler=lambda on: on.secret,
        reply="application/octet-stream",
        summary="Get a sealed box of its own",
    ),
    DeviceRoute(
        method="get",
        path="/v1/desired",
        handler=lambda on: on.desired,
        reply=DesiredReply,
        summary="Get the newest assignment; the envelope alone without a nonce",
        query=(devices.NONCE,),
    ),
    DeviceRoute(
        method="post",
        path="/v1/assignment",
        handler=lambda on: on.show,
        reply="application/json",
        summary="Show its assignment to a server that was made anew from a backup",
        request="application/json",
    ),
    DeviceRoute(
        method="post",
        path="/v1/exchange",
        handler=lambda on: on.exchange,
        reply=ExchangeReply,
        summary="Exchange the messages of MQTT where a network blocks it",
        request=Exchange,
    ),
    DeviceRoute(
        method="post",
        path="/v1/logs",
        handler=lambda on: on.logs.take,
        reply=LogAnswer,
        summary="Send log lines that a command asked for",
        request=LogChunk,
    ),
    DeviceRoute(
        method="post",
        path="/v1/diagnose",
        handler=lambda on: on.archives.note,
        reply=ArchiveTaken,
        summary="Say that the archive that a command asked for is made, or why not",
        request=ArchiveNote,
    ),
    DeviceRoute(
        method="put",
        path="/v1/diagnose",
        handler=lambda on: on.archives.take,
        reply=ArchiveTaken,
        summary="Send the archive that a command asked for, sealed to the operator",
        request="application/octet-stream",
        query=(archives.ARCHIVE_COMMAND,),
    ),
    DeviceRoute(
        method="post",
        path="/v1/renew",
        handler=lambda on: on.renew,
        reply=RenewReply,
        summary="Renew its certificate",
        request=RenewRequest,
        renewing=True,
    ),
)
"""Routes of the listener for devices. A later agent may send query parameters that this server does not know."""


def application(handlers: Handlers, store: Store) -> Starlette:
    """Return the ASGI application of the operator API."""
    return _application((route, _guarded(route, handlers, store)) for route in (*ROUTES, *UNDOCUMENTED))


def device_application(api: DeviceApi) -> Starlette:
    """Return the ASGI application of the API for devices."""
    return _application((route, _known(route, api)) for route in DEVICE_ROUTES)


def _application(routes: Iterable[tuple[Row, http.Route]]) -> Starlette:
    return Starlette(
        routes=[StarletteRoute(row.path, http.guarded(route), methods=[row.method.upper()]) for row, route in routes],
        exception_handlers=http.HANDLERS,
    )


def _guarded(route: Route, handlers: Handlers, store: Store) -> http.Route:
    handler, needs = route.handler(handlers), route.access

    async def serve(request: Request) -> Response:
        by = "" if needs is Access.OPEN else _authorise(request, needs, store)
        if route not in UNDOCUMENTED:  # machines add parameters of their own
            query.check(request, route.query)
        return await handler(request, by)

    return serve


def _known(route: DeviceRoute, api: DeviceApi) -> http.Route:
    handler = route.handler(api)

    async def serve(request: Request) -> Response:
        return await handler(request, api.caller(request, renewing=route.renewing))

    return serve


def _authorise(request: Request, needs: Access, store: Store) -> str:
    """Return the name of the operator who sent a request.

    Raises:
        Refusal: no valid token, or the operator's role does not suffice.
    """
    token = http.bearer(request)
    operator = store.access.operator(token)
    if operator is None and token:
        raise Refusal(
            401,
            "unauthorised",
            "the operator's token is unknown here or was revoked",
            "the server knows the tokens that it or fleet init gave out",
            "ask an admin for another, and put it into operator/token: fleet operators rotate NAME",
        )
    if operator is None:
        raise Refusal(
            401,
            "unauthorised",
            "an operator's token is required",
            action="send the token that fleet init wrote to operator/token",
        )
    name, role = operator
    if role == Role.SCRAPER and needs is not Access.SCRAPER:
        raise Refusal(403, "forbidden", f"{name} is a scraper and may read nothing but /metrics")
    match needs:
        case Access.OPEN | Access.SCRAPER | Access.VIEWER:
            pass
        case Access.OPERATOR:
            if role == Role.VIEWER:
                raise Refusal(403, "forbidden", f"{name} is a viewer and may not change anything")
        case Access.ADMIN:
            if role != Role.ADMIN:
                raise Refusal(403, "forbidden", f"{name} is not an admin", action="ask an admin to do it")
        case _:
            assert_never(needs)
    return name


_PATH_PARTS: Final[dict[str, str]] = {
    "sha256": "[0-9a-f]{64}",
    "namespace": query.LABEL,
    "file": r"[A-Za-z0-9._-]{1,100}",
    "serial": r"[0-9A-Za-z]{1,64}",
    "id": r"[a-z0-9-]{1,63}",
}
"""Patterns of the parts of paths; what does not match is refused, or found nowhere."""

_REF: Final = "#/components/schemas/{name}"


@functools.cache
def document() -> bytes:
    """Return the OpenAPI 3.1 document as JSON."""
    bodies = [each for route in ROUTES for each in (route.request, route.reply) if isinstance(each, type)]
    kinds = [*dict.fromkeys(bodies), api.Problem]
    references, schemas = msgspec.json.schema_components(kinds, ref_template=_REF)
    by_kind: Schemas = dict(zip(kinds, references, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in ROUTES:
        operation: dict[str, Any] = {
            "summary": route.summary,
            "parameters": _parameters(route),
            "responses": {
                "2XX": {"description": "success", "content": _content(route.reply, by_kind)},
                "default": {
                    "description": "the reason why the request was refused",
                    "content": {"application/problem+json": {"schema": by_kind[api.Problem]}},
                },
            },
        }
        if route.request is not None:
            operation["requestBody"] = {"required": True, "content": _content(route.request, by_kind)}
        if route.access is Access.OPEN:
            operation["security"] = []
        paths.setdefault(route.path, {})[route.method] = operation
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "wasmfleet", "version": "1", "summary": "Operator API of a fleet"},
            "security": [{"operator": []}],
            "paths": paths,
            "components": {
                "schemas": schemas,
                "securitySchemes": {"operator": {"type": "http", "scheme": "bearer"}},
            },
        }
    )


def _content(kind: Struct | str, by_kind: Schemas) -> dict[str, Any]:
    if isinstance(kind, str):
        return {kind: {}}
    return {"application/json": {"schema": by_kind[kind]}}


def _parameters(route: Route) -> list[dict[str, Any]]:
    inside = re.findall(r"{(\w+)}", route.path)
    return [
        *({"name": name, "in": "path", "required": True, "schema": _part(route, name)} for name in inside),
        *({"name": each.name, "in": "query", "schema": each.schema} for each in route.query),
    ]


def _part(route: Route, name: str) -> dict[str, Any]:
    of_a_secret = route.path.startswith("/v1/secrets/")
    pattern = _PATH_PARTS.get(name) or ("[A-Za-z0-9][A-Za-z0-9._-]{0,63}" if of_a_secret else query.LABEL)
    return {"type": "string", "pattern": f"^{pattern}$"}
