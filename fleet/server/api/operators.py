"""The routes for operators and enrolment. Every one but enrolment and /healthz needs a bearer token."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fleet.protocol import names, operator_api, wire
from fleet.protocol.assignment import FollowLogs, Restart
from fleet.protocol.messages import EnrolRequest
from fleet.protocol.operator_api import Refusal
from fleet.protocol.trust_api import Role
from fleet.server.api import http, routes
from fleet.server.api.devices import LogRelay
from fleet.server.api.http import answer, body, number, param
from fleet.server.api.publishing import Artifacts, Publishing
from fleet.server.api.routes import _healthy
from fleet.server.api.secrets import SecretHandlers
from fleet.server.api.trust import CaHandlers, OnlineRoles, OperatorAccounts
from fleet.server.api.views import Metrics, Views
from fleet.server.director import Director
from fleet.server.enrolment import Enrolment
from fleet.server.rollout_controller import RolloutController
from fleet.server.rollout_planner import RolloutPlanner
from fleet.server.tuf_repository import TufRepository
from fleet.store.rows import DeviceRow, RolloutRow
from fleet.store.store import ChangeSignal, Store
from signing.state import VERSION_MAX

WAIT_MAX_S: Final = 60

_LIST_MAX: Final = 1000

_BOOT_ID_MAX: Final = 64

_GATHER_MAX_S: Final = 2.0

_GATHER_BOARDS_PER_S: Final = 2000

_SMALL: Final = 50
"""A long poll on so many boards answers at once; on more it waits a little, up to two seconds."""

BRING: Final = "/v1/online"
"""What is brought there counts by its signatures: the publisher host's token needs no more than a viewer's."""

_READERS: Final = frozenset({"GET", "HEAD"})

Handler = Callable[[Request, str], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Services:
    """What the routes need."""

    store: Store
    repository: TufRepository
    artifacts: Artifacts
    enrolment: Enrolment
    director: Director
    conductor: RolloutController
    planner: RolloutPlanner
    views: Views
    logs: LogRelay
    watch: ChangeSignal
    metrics: Metrics
    status: Callable[[], operator_api.Status]
    shut_out: Callable[[], None]
    authority: CaHandlers
    online: OnlineRoles
    clock: Callable[[], datetime]


class Operators:
    """The API of `fleet.protocol.operator_api`."""

    def __init__(self, services: Services) -> None:
        self._s = services
        self._people = OperatorAccounts(services.store, services.clock)
        self._vault = SecretHandlers(
            services.store, services.repository, services.director, services.conductor, services.clock
        )
        self._publishing = Publishing(
            services.store,
            services.repository,
            services.artifacts,
            services.conductor,
            services.online,
            services.clock,
        )

    def application(self) -> Starlette:
        """The ASGI application."""
        table: list[tuple[str, str, Handler]] = [
            ("GET", "/v1/status", self.status),
            ("GET", "/v1/devices", self.devices),
            ("GET", "/v1/devices/{id}", self.device),
            ("GET", "/v1/devices/{id}/timeline", self.timeline),
            ("GET", "/v1/devices/{id}/reports", self.history),
            ("GET", "/v1/devices/{id}/desired", self.desired),
            ("PUT", "/v1/devices/{id}/labels", self.labels),
            ("PUT", "/v1/devices/{id}/pin", self.pin),
            ("POST", "/v1/devices/{id}/unpin", self.unpin),
            ("POST", "/v1/devices/{id}/retry", self.retry),
            ("POST", "/v1/devices/{id}/command", self.command),
            ("GET", "/v1/devices/{id}/logs", self._s.logs.read),
            ("POST", "/v1/devices/{id}/revoke", self.revoke),
            ("GET", "/v1/groups", self.groups),
            ("PUT", "/v1/groups/{name}", self.group),
            ("POST", "/v1/enroll-tokens", self.enroll_token),
            ("GET", "/v1/components", self._publishing.components),
            ("GET", "/v1/tuf/{file}", self._publishing.tuf),
            ("PUT", "/v1/artifacts/{sha256}", self._publishing.put_artifact),
            ("GET", "/v1/artifacts/{sha256}", self._publishing.get_artifact),
            ("POST", "/v1/roles/{namespace}", self._publishing.role),
            ("POST", "/v1/signing-events", self._publishing.event),
            ("GET", "/v1/secrets", self._vault.list),
            ("PUT", "/v1/secrets/{name}", self._vault.set),
            ("GET", "/v1/secrets/{name}/keys", self._vault.keys),
            ("POST", "/v1/secrets/{name}/remove", self._vault.remove),
            ("GET", "/v1/devices/{id}/secrets/{sha256}", self._vault.box),
            ("POST", "/v1/rollouts", self.deploy),
            ("GET", "/v1/rollouts", self.rollouts),
            ("GET", "/v1/rollouts/{id}", self.rollout),
            ("POST", "/v1/rollouts/{id}/{verb:str}", self.control),
            ("POST", "/v1/preflight", self.preflight),
            ("POST", "/v1/undo", self.undo),
            ("POST", "/v1/removals", self.remove),
            ("GET", "/v1/audit", self.audit),
            ("GET", "/v1/operators", self._people.everyone),
            ("PUT", "/v1/operators/{name}", self._people.let_in),
            ("POST", "/v1/operators/{name}/remove", self._people.shut_out),
            ("GET", "/v1/online", self._s.online.show),
            ("POST", BRING, self._s.online.bring),
            ("POST", "/v1/online/discard", self._s.online.discard),
            ("GET", "/v1/ca", self._s.authority.show),
            ("PUT", "/v1/ca/issuing", self._s.authority.install),
            ("POST", "/v1/ca/issuers/{serial}/revoke", self._s.authority.revoke),
            ("GET", "/metrics", self.show_metrics),
            ("GET", "/openapi.json", self.show_openapi),
        ]
        routes = [Route(path, self._authorised(handler), methods=[method]) for method, path, handler in table]
        open_routes = [
            Route("/v1/enrol", http.guarded(self.enrol), methods=["POST"]),
            Route("/healthz", _healthy, methods=["GET"]),
        ]
        return Starlette(routes=[*open_routes, *routes], exception_handlers=http.HANDLERS)

    def _authorised(self, handler: Handler) -> http.Route:
        async def route(request: Request) -> Response:
            operator = self._s.store.access.operator(http.bearer(request))
            if operator is None:
                raise Refusal(
                    401,
                    "unauthorised",
                    "this needs an operator's token",
                    action="send the token that fleet init wrote to operator/token",
                )
            name, role = operator
            if role == Role.VIEWER and request.method not in _READERS and request.url.path != BRING:
                raise Refusal(403, "forbidden", f"{name} may look and not change")
            return await handler(request, name)

        return http.guarded(route)

    # -- the fleet ---------------------------------------------------------------------------------------------------

    async def status(self, _request: Request, _by: str) -> Response:
        """GET /v1/status."""
        return answer(self._s.status())

    async def audit(self, request: Request, _by: str) -> Response:
        """GET /v1/audit."""
        return answer(self._s.views.audit(number(request, "limit", 100, _LIST_MAX)))

    async def show_metrics(self, _request: Request, _by: str) -> Response:
        """GET /metrics."""
        return Response(self._s.metrics.text(), media_type="text/plain; version=0.0.4")

    async def show_openapi(self, _request: Request, _by: str) -> Response:
        """GET /openapi.json."""
        return Response(routes.document(), media_type="application/json")

    # -- boards and groups -------------------------------------------------------------------------------------------

    async def devices(self, _request: Request, _by: str) -> Response:
        """GET /v1/devices."""
        return answer(self._s.views.devices())

    async def device(self, request: Request, _by: str) -> Response:
        """GET /v1/devices/{id}."""
        return answer(self._s.views.detail(self._device(request)))

    async def timeline(self, request: Request, _by: str) -> Response:
        """GET /v1/devices/{id}/timeline."""
        limit = number(request, "limit", 100, _LIST_MAX)
        return answer(self._s.views.timeline(self._device(request).id, limit))

    async def history(self, request: Request, _by: str) -> Response:
        """GET /v1/devices/{id}/reports."""
        after = request.query_params.get("boot_id", "")[:_BOOT_ID_MAX], number(request, "after", 0, VERSION_MAX)
        return answer(self._s.views.history(self._device(request), after=after))

    async def desired(self, request: Request, _by: str) -> Response:
        """GET /v1/devices/{id}/desired."""
        row = self._s.store.delivery.assignment(self._device(request).id)
        if row is None:
            raise Refusal(404, "not-found", "nothing was ever assigned to this board")
        return Response(row.envelope, media_type="application/json", headers={"cache-control": "no-store"})

    async def labels(self, request: Request, by: str) -> Response:
        """PUT /v1/devices/{id}/labels."""
        row = self._device(request)
        wish = await body(request, operator_api.LabelsRequest)
        labels = dict(row.labels)
        for key, value in wish.labels.items():
            names.check_label(key, "label")
            if value is None:
                labels.pop(key, None)
            else:
                labels[key] = names.check_label(value, f"value of the label {key},")
        self._s.store.devices.set_labels(row.id, labels)
        self._audit(by, "label", row.id, " ".join(f"{key}={value}" for key, value in sorted(labels.items())))
        self._s.conductor.touch([row.id])
        return answer(self._s.views.detail(self._device(request)))

    async def pin(self, request: Request, by: str) -> Response:
        """PUT /v1/devices/{id}/pin."""
        row = self._device(request)
        wish = await body(request, operator_api.RolloutRequest)
        if wish.group or wish.device not in {"", row.id}:
            raise Refusal(400, "bad-request", "the device of a pin is the one in the path")
        pinned = operator_api.RolloutRequest(
            **{name: getattr(wish, name) for name in wish.__struct_fields__ if name not in {"device", "waves"}},
            device=row.id,
            waves="100%",
        )
        return answer(self._s.views.rollout(self._s.planner.deploy(pinned, by=by)), 201)

    async def unpin(self, request: Request, by: str) -> Response:
        """POST /v1/devices/{id}/unpin."""
        wish = await body(request, operator_api.InstanceRequest)
        self._s.planner.unpin(self._device(request), wish.instance, by=by)
        return answer(self._s.views.detail(self._device(request)))

    async def retry(self, request: Request, by: str) -> Response:
        """POST /v1/devices/{id}/retry."""
        wish = await body(request, operator_api.InstanceRequest)
        self._s.planner.retry(self._device(request), wish.instance, by=by)
        return answer(self._s.views.detail(self._device(request)))

    async def command(self, request: Request, by: str) -> Response:
        """POST /v1/devices/{id}/command."""
        row = self._device(request)
        wish = await body(request, operator_api.CommandRequest)
        if isinstance(wish.verb, Restart | FollowLogs) and wish.verb.instance not in self._s.director.effective(row):
            raise Refusal(
                404,
                "unknown-instance",
                f"{row.id} is not to run {wish.verb.instance!r}",
                action=f"fleet device {row.id} shows what it should run",
            )
        sequence, expires, sent = self._s.director.command(row.id, wish.verb)
        if not sent:
            raise Refusal(503, "no-broker", "the broker is away, and a command is not kept", action="try again")
        if isinstance(wish.verb, FollowLogs):
            self._s.logs.expect(row.id, sequence, wish.verb.instance, minutes=wish.verb.minutes)
        words = wire.canonical(wish.verb).decode()
        self._audit(by, "command", row.id, words)
        self._s.store.devices.note(row.id, "command", f"{by} sent {words}", now=self._now())
        return answer(operator_api.CommandReply(sequence=sequence, expires=expires), 202)

    async def revoke(self, request: Request, by: str) -> Response:
        """POST /v1/devices/{id}/revoke."""
        row = self._device(request)
        with self._s.store.atomic():
            self._s.store.devices.revoke(row.id)
            self._s.store.boxes.forget(row.id)
            self._s.store.devices.note(row.id, "revoked", f"shut out by {by}", now=self._now())
            self._audit(by, "revoke", row.id)
        self._s.shut_out()
        self._s.conductor.wake()
        return answer(self._s.views.detail(self._device(request)))

    async def groups(self, _request: Request, _by: str) -> Response:
        """GET /v1/groups."""
        return answer(self._s.views.groups())

    async def group(self, request: Request, by: str) -> Response:
        """PUT /v1/groups/{name}."""
        name = names.check_label(param(request, "name"), "group")
        wish = await body(request, operator_api.GroupRequest)
        devices = self._s.store.devices
        for device in (*wish.add, *wish.remove):
            if devices.get(device) is None:
                raise Refusal(404, "unknown-device", f"there is no device {device}", action="fleet devices lists them")
        before = devices.group(name)
        selector = wish.selector if wish.selector is not None else before.selector if before is not None else {}
        if selector and (wish.add or (before is not None and not before.selector and devices.listed(name))):
            raise Refusal(
                409, "selector-group", f"{name} cannot list boards and choose them by labels", action="label them"
            )
        touched = set(devices.members(before)) if before is not None else set()
        with self._s.store.atomic():
            devices.ensure_group(name, now=self._now())
            devices.change_group(name, priority=wish.priority, selector=wish.selector)
            devices.join(name, wish.add)
            devices.leave(name, wish.remove)
            self._audit(by, "change-group", name, wire.canonical(wish).decode())
        row = devices.group(name)
        assert row is not None
        self._s.conductor.touch(touched | set(devices.members(row)) | set(wish.remove))
        return answer(self._s.views.group(row), 201 if before is None else 200)

    async def enroll_token(self, request: Request, by: str) -> Response:
        """POST /v1/enroll-tokens."""
        wish = await body(request, operator_api.EnrollTokenRequest)
        return answer(self._s.enrolment.make_token(wish, by=by), 201)

    async def enrol(self, request: Request) -> Response:
        """POST /v1/enrol: the token inside is all that a board has yet."""
        try:
            wish = wire.decode(EnrolRequest, await http.read(request))
        except wire.WireError as error:
            raise Refusal(400, "bad-request", "this is no enrolment", str(error)) from error
        return answer(self._s.enrolment.enrol(wish), 201)

    # -- rollouts ----------------------------------------------------------------------------------------------------

    async def deploy(self, request: Request, by: str) -> Response:
        """POST /v1/rollouts."""
        row = self._s.planner.deploy(await body(request, operator_api.RolloutRequest), by=by)
        return answer(self._s.views.rollout(row), 201)

    async def rollouts(self, request: Request, _by: str) -> Response:
        """GET /v1/rollouts."""
        group = request.query_params.get("group")
        rows = self._s.store.rollouts.newest(number(request, "limit", 50, _LIST_MAX), group=group or None)
        return answer(self._s.views.rollouts(rows))

    async def rollout(self, request: Request, _by: str) -> Response:
        """GET /v1/rollouts/{id}: with `wait` and `since`, as soon as there is a later revision."""
        row = self._rollout(request)
        since = number(request, "since", 0, 1 << 60)
        wait_s = number(request, "wait", 0, WAIT_MAX_S)

        def later() -> RolloutRow | None:
            found = self._s.store.rollouts.get(row.id)
            return found if found is not None and found.revision > since else None

        newer = await self._s.watch.until(later, timeout_s=wait_s)
        if newer is not None and wait_s:
            # a large rollout changes all the time: what follows at once comes along
            await asyncio.sleep(max(0.0, min(_GATHER_MAX_S, (newer.sizes[-1] - _SMALL) / _GATHER_BOARDS_PER_S)))
        return answer(self._s.views.rollout(self._s.store.rollouts.get(row.id) or row))

    async def control(self, request: Request, by: str) -> Response:
        """POST /v1/rollouts/{id}/pause|resume|abort."""
        verb = param(request, "verb")
        if verb not in {"pause", "resume", "abort"}:
            raise Refusal(404, "not-found", f"a rollout has no {verb!r}", action="pause, resume or abort it")
        self._s.planner.control(self._rollout(request), verb, by=by)
        return answer(self._s.views.rollout(self._rollout(request)))

    async def preflight(self, request: Request, _by: str) -> Response:
        """POST /v1/preflight."""
        return answer(self._s.planner.preflight(await body(request, operator_api.RolloutRequest)))

    async def undo(self, request: Request, by: str) -> Response:
        """POST /v1/undo."""
        row = self._s.planner.undo(await body(request, operator_api.UndoRequest), by=by)
        return answer(self._s.views.rollout(row), 201)

    async def remove(self, request: Request, by: str) -> Response:
        """POST /v1/removals."""
        row = self._s.planner.remove(await body(request, operator_api.RemovalRequest), by=by)
        return answer(self._s.views.rollout(row), 201)

    # -- small parts -------------------------------------------------------------------------------------------------

    def _device(self, request: Request) -> DeviceRow:
        device = param(request, "id")
        row = self._s.store.devices.get(device)
        if row is None:
            raise Refusal(404, "unknown-device", f"there is no device {device}", action="fleet devices lists them")
        return row

    def _rollout(self, request: Request) -> RolloutRow:
        key = param(request, "id")
        row = self._s.store.rollouts.get(key)
        if row is None:
            raise Refusal(404, "unknown-rollout", f"there is no rollout {key}", action="fleet rollouts lists them")
        return row

    def _audit(self, by: str, act: str, subject: str, detail: str = "") -> None:
        self._s.store.access.audit(actor=by, act=act, subject=subject, detail=detail, now=self._now())

    def _now(self) -> float:
        return self._s.clock().timestamp()
