"""ONE route table: Starlette routes and OpenAPI.

The OpenAPI document, generated from the structs of `fleet.protocol.operator_api` and the table of routes below.
"""

import functools
import re
from typing import Any, Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from fleet.protocol import operator_api, trust_api
from fleet.protocol.messages import Enrolled, EnrolRequest, LogView
from fleet.protocol.operator_api import History
from fleet.protocol.trust_api import OperatorReply, OperatorRequest, Operators

Struct = type[msgspec.Struct]

Schemas = dict[Any, dict[str, Any]]

ROUTES: Final[tuple[tuple[str, str, Struct | str | None, Struct | str, str], ...]] = (
    ("get", "/v1/status", None, operator_api.Status, "The fleet at a glance"),
    ("get", "/v1/devices", None, operator_api.Devices, "Every board"),
    ("get", "/v1/devices/{id}", None, operator_api.DeviceDetail, "One board"),
    ("get", "/v1/devices/{id}/timeline", None, operator_api.Timeline, "What happened to a board"),
    ("get", "/v1/devices/{id}/reports", None, History, "What a board said, as it signed it"),
    ("get", "/v1/devices/{id}/desired", None, "application/json", "A board's newest assignment, signed"),
    ("put", "/v1/devices/{id}/labels", operator_api.LabelsRequest, operator_api.DeviceDetail, "Set or remove labels"),
    (
        "put",
        "/v1/devices/{id}/pin",
        operator_api.RolloutRequest,
        operator_api.RolloutView,
        "Give one board a value of its own",
    ),
    (
        "post",
        "/v1/devices/{id}/unpin",
        operator_api.InstanceRequest,
        operator_api.DeviceDetail,
        "Let a board follow its groups again",
    ),
    (
        "post",
        "/v1/devices/{id}/retry",
        operator_api.InstanceRequest,
        operator_api.DeviceDetail,
        "Try again what failed",
    ),
    (
        "post",
        "/v1/devices/{id}/command",
        operator_api.CommandRequest,
        operator_api.CommandReply,
        "Send a signed command",
    ),
    ("get", "/v1/devices/{id}/logs", None, LogView, "Log lines that a command asked for, while they come"),
    ("post", "/v1/devices/{id}/revoke", None, operator_api.DeviceDetail, "Shut a board out"),
    ("get", "/v1/groups", None, operator_api.Groups, "Every group"),
    ("put", "/v1/groups/{name}", operator_api.GroupRequest, operator_api.GroupRow, "Make or change a group"),
    (
        "post",
        "/v1/enroll-tokens",
        operator_api.EnrollTokenRequest,
        operator_api.EnrollTokenReply,
        "A one-time token for a board",
    ),
    ("post", "/v1/enrol", EnrolRequest, Enrolled, "Enrol a board with its token"),
    ("get", "/v1/components", None, operator_api.Components, "Everything published"),
    ("get", "/v1/tuf/{file}", None, "application/json", "A TUF metadata file"),
    ("put", "/v1/artifacts/{sha256}", "application/wasm", operator_api.ArtifactReply, "Upload an artifact"),
    ("get", "/v1/artifacts/{sha256}", None, "application/wasm", "An artifact, whole or by Range"),
    ("post", "/v1/roles/{namespace}", "application/json", operator_api.RoleReply, "Publish a namespace's next role"),
    (
        "post",
        "/v1/signing-events",
        "application/json",
        operator_api.RoleReply,
        "Publish changes of root, targets, namespaces",
    ),
    ("get", "/v1/secrets", None, trust_api.Secrets, "Every secret, without its value"),
    (
        "put",
        "/v1/secrets/{name}",
        trust_api.SecretRequest,
        trust_api.SecretReply,
        "Give boards the next version of a secret",
    ),
    ("get", "/v1/secrets/{name}/keys", None, trust_api.SealingKeys, "Boards' sealing keys, proved by their own word"),
    ("post", "/v1/secrets/{name}/remove", trust_api.SecretScope, trust_api.Secrets, "Take a secret from boards"),
    ("get", "/v1/devices/{id}/secrets/{sha256}", None, "application/octet-stream", "A board's sealed box"),
    ("post", "/v1/rollouts", operator_api.RolloutRequest, operator_api.RolloutView, "Begin a rollout"),
    ("get", "/v1/rollouts", None, operator_api.Rollouts, "Rollouts, newest first"),
    ("get", "/v1/rollouts/{id}", None, operator_api.RolloutView, "One rollout; wait and since make it a long poll"),
    ("post", "/v1/rollouts/{id}/pause", None, operator_api.RolloutView, "Pause a rollout"),
    ("post", "/v1/rollouts/{id}/resume", None, operator_api.RolloutView, "Go on with a rollout"),
    ("post", "/v1/rollouts/{id}/abort", None, operator_api.RolloutView, "End a rollout and go back"),
    ("post", "/v1/preflight", operator_api.RolloutRequest, operator_api.Preflight, "What a rollout would do"),
    ("post", "/v1/undo", operator_api.UndoRequest, operator_api.RolloutView, "Offer the previous state again"),
    ("post", "/v1/removals", operator_api.RemovalRequest, operator_api.RolloutView, "Take an instance off"),
    ("get", "/v1/audit", None, operator_api.Audit, "Who did what"),
    ("get", "/v1/online", None, trust_api.OnlineView, "Where snapshot and timestamp are signed, and what waits for it"),
    ("post", "/v1/online", "application/json", trust_api.OnlineView, "Show what the publisher host has signed"),
    ("post", "/v1/online/discard", None, trust_api.OnlineView, "Forget what waits for the publisher host"),
    ("get", "/v1/ca", None, trust_api.CaView, "The fleet's CA, and a request for the next issuing CA"),
    ("put", "/v1/ca/issuing", trust_api.IssuingRequest, trust_api.CaView, "Put a signed issuing CA in place"),
    ("post", "/v1/ca/issuers/{serial}/revoke", None, trust_api.CaView, "Accept an issuing CA no more"),
    ("get", "/v1/operators", None, Operators, "Who may come in"),
    ("put", "/v1/operators/{name}", OperatorRequest, OperatorReply, "Let an operator in"),
    ("post", "/v1/operators/{name}/remove", None, Operators, "Shut an operator out"),
)

_QUERY: Final = {
    "/v1/devices/{id}/timeline": ("limit",),
    "/v1/devices/{id}/reports": ("boot_id", "after"),
    "/v1/devices/{id}/logs": ("command", "after", "wait"),
    "/v1/secrets/{name}/keys": ("group", "device", "instance"),
    "/v1/rollouts": ("limit", "group"),
    "/v1/rollouts/{id}": ("wait", "since"),
    "/v1/audit": ("limit",),
    "/v1/online": ("wait",),
}

_REF: Final = "#/components/schemas/{name}"


@functools.cache
def document() -> bytes:
    """OpenAPI 3.1, as JSON."""
    bodies = [each for _, _, request, reply, _ in ROUTES for each in (request, reply) if isinstance(each, type)]
    kinds = [*dict.fromkeys(bodies), operator_api.Problem]
    references, schemas = msgspec.json.schema_components(kinds, ref_template=_REF)
    by_kind: Schemas = dict(zip(kinds, references, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for method, path, request, reply, summary in ROUTES:
        operation: dict[str, Any] = {
            "summary": summary,
            "parameters": _parameters(path, method),
            "responses": {
                "2XX": {"description": "done", "content": _content(reply, by_kind)},
                "default": {
                    "description": "why not",
                    "content": {"application/problem+json": {"schema": by_kind[operator_api.Problem]}},
                },
            },
        }
        if request is not None:
            operation["requestBody"] = {"required": True, "content": _content(request, by_kind)}
        if path == "/v1/enrol":
            operation["security"] = []
        paths.setdefault(path, {})[method] = operation
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "wasmfleet", "version": "1", "summary": "The operator API of a fleet"},
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


def _parameters(path: str, method: str) -> list[dict[str, Any]]:
    inside = re.findall(r"{(\w+)}", path)
    asked = _QUERY.get(path, ()) if method == "get" else ()
    return [
        *({"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in inside),
        *({"name": name, "in": "query", "schema": {"type": "string"}} for name in asked),
    ]


async def _healthy(_request: Request) -> Response:
    return Response("ok\n", media_type="text/plain")
