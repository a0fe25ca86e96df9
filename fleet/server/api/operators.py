"""Handlers of the operator API for the fleet as a whole, its devices, groups and rollouts.

Requests and replies are the structs of `fleet.protocol.operator_api`; `fleet.server.api.routes` maps paths to
handlers, and says who may call them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from fleet.protocol import names, operator_api, wire
from fleet.protocol.assignment import FIRST_COMMANDS, CheckIn, Diagnose, FollowLogs, Restart
from fleet.protocol.bounds import LOGS_MINUTES_MAX, NUMBER_MAX
from fleet.protocol.messages import EnrolRequest
from fleet.protocol.operator_api import Refusal
from fleet.rollout import group_plan
from fleet.server.ahead import AheadDevices
from fleet.server.api import http
from fleet.server.api.archives import Archives
from fleet.server.api.devices import LogRelay
from fleet.server.api.http import answer, body, param
from fleet.server.api.metrics import Metrics
from fleet.server.api.query import LABEL, Number, Word
from fleet.server.api.views import Views
from fleet.server.device_keys import DeviceKeys
from fleet.server.director import Director
from fleet.server.enrolment import Enrolment
from fleet.server.facts import read_selector
from fleet.server.rollout_controller import RolloutController
from fleet.server.rollout_planner import RolloutPlanner
from fleet.server.unknown import unknown_device, unknown_group
from fleet.store.rows import DeviceRow, GroupRow, RolloutRow
from fleet.store.store import AuditLog, ChangeSignal, Store
from signing import sealing
from signing.state import VERSION_MAX

_LIST_MAX: Final = 1000
AUDIT_LIMIT: Final = Number(name="limit", default=100, most=_LIST_MAX)
TIMELINE_LIMIT: Final = Number(name="limit", default=100, most=_LIST_MAX)
ROLLOUTS_LIMIT: Final = Number(name="limit", default=50, most=_LIST_MAX)
DEVICES_WHERE: Final = Word(name="where", pattern=r"[\s\S]{1,2000}", what="a selector of at most 2000 characters")
ROLLOUTS_GROUP: Final = Word(name="group", pattern=LABEL, what="the name of a group")
WITHDRAWAL_TARGET: Final = Word(name="target", pattern="[a-zA-Z0-9/._+-]{1,255}", what="the path of a target")
ROLLOUT_WAIT: Final = Number(name="wait", most=60)
ROLLOUT_SINCE: Final = Number(name="since", most=NUMBER_MAX)
REPORTS_BOOT: Final = Word(name="boot_id", pattern=".{1,64}", what="a boot id")
REPORTS_AFTER: Final = Number(name="after", most=VERSION_MAX)
_GATHER_MAX_S: Final = 2.0

_GATHER_DEVICES_PER_S: Final = 2000

_SMALL: Final = 50
"""Devices of a rollout up to which a long poll returns at once; with more it collects changes for up to 2 s."""


class FleetHandlers:
    """Handlers for the fleet as a whole: status, audit, metrics, reconciliation after a restore."""

    def __init__(
        self, *, views: Views, metrics: Metrics, status: Callable[[], operator_api.Status], ahead: AheadDevices
    ) -> None:
        self._views, self._metrics, self._status, self._ahead = views, metrics, status, ahead

    async def status(self, _request: Request, _by: str) -> Response:
        """GET /v1/status."""
        return answer(self._status())

    async def audit(self, request: Request, _by: str) -> Response:
        """GET /v1/audit."""
        return answer(self._views.audit(AUDIT_LIMIT.of(request)))

    async def reconcile(self, request: Request, by: str) -> Response:
        """POST /v1/reconcile."""
        wanted = await body(request, operator_api.ReconcileRequest)
        return answer(self._ahead.reconcile(wanted, by=by))

    async def metrics(self, request: Request, _by: str) -> Response:
        """GET /metrics."""
        text, kind = self._metrics.text(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": kind})


class DeviceHandlers:
    """Handlers for devices: listing, labels, configuration keys, pins, retries."""

    def __init__(
        self,
        *,
        store: Store,
        controller: RolloutController,
        planner: RolloutPlanner,
        keys: DeviceKeys,
        views: Views,
        audit: AuditLog,
    ) -> None:
        self._store, self._controller, self._planner = store, controller, planner
        self._keys, self._views, self._audit = keys, views, audit

    async def list(self, request: Request, _by: str) -> Response:
        """GET /v1/devices."""
        where = DEVICES_WHERE.of(request)
        return answer(self._views.devices(read_selector(where) if where else None))

    async def show(self, request: Request, _by: str) -> Response:
        """GET /v1/devices/{id}."""
        return answer(self._views.detail(_device(self._store, request)))

    async def timeline(self, request: Request, _by: str) -> Response:
        """GET /v1/devices/{id}/timeline."""
        limit = TIMELINE_LIMIT.of(request)
        return answer(self._views.timeline(_device(self._store, request).id, limit))

    async def reports(self, request: Request, _by: str) -> Response:
        """GET /v1/devices/{id}/reports."""
        after = REPORTS_BOOT.of(request), REPORTS_AFTER.of(request)
        return answer(self._views.history(_device(self._store, request), after=after))

    async def desired(self, request: Request, _by: str) -> Response:
        """GET /v1/devices/{id}/desired."""
        row = self._store.delivery.assignment(_device(self._store, request).id)
        if row is None:
            raise Refusal(404, "not-found", "nothing is assigned to this device yet")
        return Response(row.envelope, media_type="application/json", headers={"cache-control": "no-store"})

    async def labels(self, request: Request, by: str) -> Response:
        """PUT /v1/devices/{id}/labels."""
        wanted = await body(request, operator_api.LabelsRequest)
        row = _device(self._store, request)  # after the body: others may have changed the labels while it came
        labels = dict(row.labels)
        for key, value in wanted.labels.items():
            names.check_label(key, "label")
            if value is None:
                labels.pop(key, None)
            else:
                labels[key] = names.check_label(value, f"value of the label {key},")
        with self._store.atomic():
            self._store.devices.set_labels(row.id, labels)
            self._audit.record(by, "label", row.id, " ".join(f"{key}={value}" for key, value in sorted(labels.items())))
        self._controller.touch([row.id])
        return answer(self._views.detail(_device(self._store, request)))

    async def keys(self, request: Request, by: str) -> Response:
        """PUT /v1/devices/{id}/keys."""
        wanted = await body(request, operator_api.KeysRequest)
        self._keys.change(_device(self._store, request), wanted, by=by)
        return answer(self._views.detail(_device(self._store, request)))

    async def pin(self, request: Request, by: str) -> Response:
        """PUT /v1/devices/{id}/pin."""
        row = _device(self._store, request)
        wanted = await body(request, operator_api.RolloutRequest)
        if wanted.group or wanted.device not in {"", row.id}:
            raise Refusal(400, "bad-request", "a pin is for the device in the path: leave out group and device")
        pinned = operator_api.RolloutRequest(
            **{name: getattr(wanted, name) for name in wanted.__struct_fields__ if name not in {"device", "waves"}},
            device=row.id,
            waves="100%",
        )
        return answer(self._views.rollout(self._planner.deploy(pinned, by=by)), 201)

    async def unpin(self, request: Request, by: str) -> Response:
        """POST /v1/devices/{id}/unpin."""
        wanted = await body(request, operator_api.InstanceRequest)
        self._planner.unpin(_device(self._store, request), wanted.instance, by=by)
        return answer(self._views.detail(_device(self._store, request)))

    async def retry(self, request: Request, by: str) -> Response:
        """POST /v1/devices/{id}/retry."""
        wanted = await body(request, operator_api.InstanceRequest)
        self._planner.retry(_device(self._store, request), wanted.instance, by=by)
        return answer(self._views.detail(_device(self._store, request)))


class CommandHandlers:
    """Handler for commands that the server signs."""

    def __init__(
        self,
        *,
        store: Store,
        director: Director,
        logs: LogRelay,
        archives: Archives,
        audit: AuditLog,
        clock: Callable[[], datetime],
    ) -> None:
        self._store, self._director, self._logs, self._archives = store, director, logs, archives
        self._audit, self._clock = audit, clock

    async def send(self, request: Request, by: str) -> Response:
        """POST /v1/devices/{id}/command."""
        row = _device(self._store, request)
        wanted = await body(request, operator_api.CommandRequest)
        if isinstance(wanted.verb, Restart | FollowLogs) and wanted.verb.instance not in self._director.effective(row):
            raise Refusal(
                404,
                "unknown-instance",
                f"{wanted.verb.instance!r} is not assigned to {row.id}",
                action=f"fleet device {row.id} shows what it should run",
            )
        if isinstance(wanted.verb, FollowLogs) and wanted.verb.minutes > LOGS_MINUTES_MAX:
            raise Refusal(400, "bad-request", f"minutes={wanted.verb.minutes} is more than {LOGS_MINUTES_MAX}")
        _check_known(row, wanted.verb)
        if isinstance(wanted.verb, Diagnose):
            sealing.check_key(wanted.verb.recipient)
            self._archives.check_room(row.id, by=by)
        sent = self._director.command(row.id, wanted.verb)
        if not sent.sent:
            raise Refusal(
                503, "no-broker", "the broker is not connected, and commands are not kept", action="try again"
            )
        if isinstance(wanted.verb, FollowLogs):
            self._logs.expect(row.id, sent.sequence, wanted.verb.instance, minutes=wanted.verb.minutes)
        if isinstance(wanted.verb, Diagnose):
            self._archives.expect(row.id, sent.sequence, by=by)
        words = wire.canonical(wanted.verb).decode()
        with self._store.atomic():
            self._audit.record(by, "command", row.id, words)
            self._store.devices.note(row.id, "command", f"{by} sent {words}", now=self._now())
        return answer(operator_api.CommandReply(sequence=sent.sequence, expires=sent.expires), 202)

    def _now(self) -> float:
        return self._clock().timestamp()


def _check_known(row: DeviceRow, verb: CheckIn | Restart | FollowLogs | Diagnose) -> None:
    """Check that a device's agent knows a command, which an earlier one would drop; raises `Refusal`."""
    name = str(verb.__struct_config__.tag)
    if name not in FIRST_COMMANDS and name not in row.versions.commands:
        raise Refusal(
            409,
            "unknown-command",
            f"{name} is not known to this agent: {row.id} runs version {row.versions.agent or 'unknown'}",
            action="upgrade the agent; until then, ask on the device: sudo fleet-agent diagnose -o FILE",
        )


class EnrolmentHandlers:
    """Handlers for a device's place in the fleet: tokens, enrolment, revocation.

    Args:
        update_revoked: called with a device that was revoked, so that the broker ends its connection.
    """

    def __init__(
        self,
        *,
        store: Store,
        enrolment: Enrolment,
        controller: RolloutController,
        views: Views,
        update_revoked: Callable[[str], Awaitable[None]],
        audit: AuditLog,
        clock: Callable[[], datetime],
    ) -> None:
        self._store, self._enrolment, self._controller = store, enrolment, controller
        self._views, self._update_revoked = views, update_revoked
        self._audit, self._clock = audit, clock

    async def revoke(self, request: Request, by: str) -> Response:
        """POST /v1/devices/{id}/revoke."""
        row = _device(self._store, request)
        with self._store.atomic():
            self._store.devices.revoke(row.id)
            self._store.boxes.forget(row.id)
            self._store.devices.note(row.id, "revoked", f"revoked by {by}", now=self._now())
            self._audit.record(by, "revoke", row.id)
        await self._update_revoked(row.id)
        self._controller.wake()
        return answer(self._views.detail(_device(self._store, request)))

    async def make_token(self, request: Request, by: str) -> Response:
        """POST /v1/enroll-tokens."""
        wanted = await body(request, operator_api.EnrollTokenRequest)
        return answer(self._enrolment.make_token(wanted, by=by), 201)

    async def enrol(self, request: Request, _by: str) -> Response:
        """POST /v1/enrol: open to everyone; the token in the body authenticates the device."""
        try:
            wanted = wire.decode(EnrolRequest, await http.read(request, EnrolRequest.MAX_BYTES))
        except wire.WireError as error:
            raise Refusal(400, "bad-request", "the enrolment request cannot be read", str(error)) from error
        return answer(self._enrolment.enrol(wanted), 201)

    def _now(self) -> float:
        return self._clock().timestamp()


def _device(store: Store, request: Request) -> DeviceRow:
    device = param(request, "id")
    row = store.devices.get(device)
    if row is None:
        raise unknown_device(store, device)
    return row


class GroupHandlers:
    """Handlers for groups."""

    def __init__(
        self,
        *,
        store: Store,
        controller: RolloutController,
        views: Views,
        audit: AuditLog,
        clock: Callable[[], datetime],
    ) -> None:
        self._store, self._controller, self._views = store, controller, views
        self._audit, self._clock = audit, clock

    async def list(self, _request: Request, _by: str) -> Response:
        """GET /v1/groups."""
        return answer(self._views.groups())

    async def change(self, request: Request, by: str) -> Response:
        """PUT /v1/groups/{name}."""
        name = names.check_label(param(request, "name"), "group")
        wanted = await body(request, operator_api.GroupRequest)
        devices = self._store.devices
        for device in (*wanted.add, *wanted.remove):
            if devices.get(device) is None:
                raise unknown_device(self._store, device)
        before = devices.group(name)
        if before is None and not wanted.add and wanted.selector is None and wanted.priority is None:
            raise unknown_group(
                self._store, name, action="to make it, name its devices: --add DEVICE or --select LABEL=VALUE"
            )
        self._check_removal(name, before, wanted.remove)
        selector = wanted.selector if wanted.selector is not None else before.selector if before is not None else {}
        if selector and (wanted.add or (before is not None and not before.selector and devices.listed(name))):
            raise Refusal(
                409,
                "selector-group",
                f"{name} selects devices by labels, or lists them, not both",
                action="label the devices",
            )
        touched = set(devices.members(before)) if before is not None else set()
        with self._store.atomic():
            devices.ensure_group(name, now=self._now())
            devices.change_group(name, priority=wanted.priority, selector=wanted.selector)
            devices.join(name, wanted.add)
            devices.leave(name, wanted.remove)
            self._audit.record(by, "change-group", name, wire.canonical(wanted).decode())
        row = devices.group(name)
        assert row is not None
        self._controller.touch(touched | set(devices.members(row)) | set(wanted.remove))
        return answer(self._views.group(row), 201 if before is None else 200)

    async def policy(self, request: Request, _by: str) -> Response:
        """GET /v1/groups/{name}/policy."""
        row = self._group(request)
        return answer(self._views.policy(row, row.policy))

    async def set_policy(self, request: Request, by: str) -> Response:
        """PUT /v1/groups/{name}/policy."""
        wanted = await body(request, operator_api.GroupPolicyRequest)
        row = self._group(request)
        try:
            if wanted.plan is not None:
                group_plan.check(wanted.plan)
        except group_plan.BadPlanError as error:
            raise Refusal(400, "bad-plan", str(error)) from error
        if not wanted.dry_run:
            words = "cleared" if wanted.plan is None else wire.canonical(wanted.plan).decode()
            with self._store.atomic():
                self._store.devices.set_policy(row.name, wanted.plan)
                self._audit.record(by, "group-policy", row.name, words)
        return answer(self._views.policy(row, wanted.plan))

    def _group(self, request: Request) -> GroupRow:
        name = param(request, "name")
        row = self._store.devices.group(name)
        if row is None:
            raise unknown_group(self._store, name, action="fleet groups lists them")
        return row

    def _check_removal(self, name: str, before: GroupRow | None, remove: Iterable[str]) -> None:
        listed = () if before is None else self._store.devices.listed(name)
        for device in remove:
            if device in listed:
                continue
            chosen = before is not None and bool(before.selector)
            raise Refusal(
                409,
                "no-member",
                f"{device} is not on the list of the group {name}",
                f"{name} selects devices by labels" if chosen else "",
                "change the device's labels" if chosen else f"see its groups: fleet device {device}",
            )

    def _now(self) -> float:
        return self._clock().timestamp()


class RolloutHandlers:
    """Handlers for rollouts, and for the requests that start one: deploy, undo, remove."""

    def __init__(self, *, store: Store, planner: RolloutPlanner, views: Views, changes: ChangeSignal) -> None:
        self._store, self._planner, self._views, self._changes = store, planner, views, changes

    async def deploy(self, request: Request, by: str) -> Response:
        """POST /v1/rollouts."""
        row = self._planner.deploy(await body(request, operator_api.RolloutRequest), by=by)
        return answer(self._views.rollout(row), 201)

    async def list(self, request: Request, _by: str) -> Response:
        """GET /v1/rollouts."""
        rows = self._store.rollouts.newest(ROLLOUTS_LIMIT.of(request), group=ROLLOUTS_GROUP.of(request) or None)
        return answer(self._views.rollouts(rows))

    async def show(self, request: Request, _by: str) -> Response:
        """GET /v1/rollouts/{id}; a long poll with `wait` (seconds) and `since` (revision)."""
        row = self._rollout(request)
        since = ROLLOUT_SINCE.of(request)
        wait_s = ROLLOUT_WAIT.of(request)

        def later() -> RolloutRow | None:
            found = self._store.rollouts.get(row.id)
            return found if found is not None and found.revision > since else None

        newer = await self._changes.until(later, timeout_s=wait_s)
        if newer is not None and wait_s:
            # a large rollout changes all the time: collect changes into one reply
            devices = sum(self._store.rollouts.waves(newer.number).values())
            await asyncio.sleep(max(0.0, min(_GATHER_MAX_S, (devices - _SMALL) / _GATHER_DEVICES_PER_S)))
        return answer(self._views.rollout(self._store.rollouts.get(row.id) or row))

    async def pause(self, request: Request, by: str) -> Response:
        """POST /v1/rollouts/{id}/pause."""
        return self._control(request, "pause", by)

    async def resume(self, request: Request, by: str) -> Response:
        """POST /v1/rollouts/{id}/resume."""
        return self._control(request, "resume", by)

    async def abort(self, request: Request, by: str) -> Response:
        """POST /v1/rollouts/{id}/abort."""
        wanted = await body(request, operator_api.AbortRequest)
        self._planner.control(self._rollout(request), "abort", by=by, keep=wanted.keep)
        return answer(self._views.rollout(self._rollout(request)))

    async def approve(self, request: Request, by: str) -> Response:
        """POST /v1/rollouts/{id}/approve."""
        return self._control(request, "approve", by)

    async def retry(self, request: Request, by: str) -> Response:
        """POST /v1/rollouts/{id}/retry."""
        return answer(self._views.rollout(self._planner.again(self._rollout(request), by=by)), 201)

    async def cancel_device(self, request: Request, by: str) -> Response:
        """POST /v1/rollouts/{id}/cancel-device."""
        wanted = await body(request, operator_api.CancelRequest)
        self._planner.cancel(self._rollout(request), wanted.device, by=by)
        return answer(self._views.rollout(self._rollout(request)))

    async def freezes(self, _request: Request, _by: str) -> Response:
        """GET /v1/freezes."""
        return answer(operator_api.Freezes(freezes=self._store.rollouts.freezes()))

    async def freeze(self, request: Request, by: str) -> Response:
        """POST /v1/freeze."""
        wanted = await body(request, operator_api.FreezeRequest)
        self._planner.freeze(wanted.group, reason=wanted.reason, by=by)
        return await self.freezes(request, by)

    async def unfreeze(self, request: Request, by: str) -> Response:
        """POST /v1/unfreeze."""
        wanted = await body(request, operator_api.UnfreezeRequest)
        self._planner.unfreeze(wanted.group, by=by)
        return await self.freezes(request, by)

    async def preflight(self, request: Request, _by: str) -> Response:
        """POST /v1/preflight."""
        return answer(self._planner.preflight(await body(request, operator_api.RolloutRequest)))

    async def withdrawal(self, request: Request, _by: str) -> Response:
        """GET /v1/withdrawal."""
        foreseen = self._planner.foresee_withdrawal(WITHDRAWAL_TARGET.of(request))
        return answer(self._views.withdrawal(foreseen))

    async def undo(self, request: Request, by: str) -> Response:
        """POST /v1/undo."""
        row = self._planner.undo(await body(request, operator_api.UndoRequest), by=by)
        return answer(self._views.rollout(row), 201)

    async def remove(self, request: Request, by: str) -> Response:
        """POST /v1/removals."""
        row = self._planner.remove(await body(request, operator_api.RemovalRequest), by=by)
        return answer(self._views.rollout(row), 201)

    def _control(self, request: Request, verb: str, by: str) -> Response:
        self._planner.control(self._rollout(request), verb, by=by)
        return answer(self._views.rollout(self._rollout(request)))

    def _rollout(self, request: Request) -> RolloutRow:
        key = param(request, "id")
        row = self._store.rollouts.get(key)
        if row is None:
            raise Refusal(404, "unknown-rollout", f"there is no rollout {key}", action="fleet rollouts lists them")
        return row
