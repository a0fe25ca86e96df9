"""Plans a rollout from an operator's request: checked against published components, devices and what runs.

Deploy, removal, pin, undo and retry all end in a rollout or a raised attempt; nothing else changes what devices run.
`value_of` checks the requested configuration, grants and port against what the publisher signed.
"""

import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Final

import msgspec

from fleet.protocol import bounds, names, outbound, wire
from fleet.protocol.codes import OPEN_STATES, Outcome, RolloutState
from fleet.protocol.manifest import Grants
from fleet.protocol.operator_api import Excluded, Preflight, Refusal, RemovalRequest, RolloutRequest, UndoRequest
from fleet.rollout import effective, model
from fleet.rollout.effective import Group, SettledValue
from fleet.rollout.model import BREACHES, DeviceProgress, Value
from fleet.server.director import Director, lacks, unfit
from fleet.server.retries import nothing_to_retry
from fleet.server.rollout_controller import RolloutController
from fleet.server.tuf_repository import TufRepository
from fleet.store.rows import DeviceRow, GroupRow, RolloutRow
from fleet.store.store import Store
from signing.policy import Release

_TIMEOUT_MIN_S: Final = 10


class RolloutPlanner:
    """Makes rollouts."""

    def __init__(
        self,
        *,
        store: Store,
        repository: TufRepository,
        director: Director,
        conductor: RolloutController,
        clock: Callable[[], datetime],
    ) -> None:
        self._store, self._repository, self._director = store, repository, director
        self._conductor, self._clock = conductor, clock

    # -- deploy ------------------------------------------------------------------------------------------------------

    def deploy(self, request: RolloutRequest, *, by: str) -> RolloutRow:
        """Begin a rollout; an open one of the same instance and scope is superseded.

        Raises:
            Refusal, BadNameError: what is asked cannot be meant, or contradicts what is.
        """
        value, group = self._check(request)
        if not request.also:
            return self._begin(request, value, group, by=by)
        return self._begin_set([(request, value), *self._companions(request)], group, by=by)

    def _companions(self, request: RolloutRequest) -> list[tuple[RolloutRequest, Value]]:
        """The other members of a set, each checked like the first."""
        found = []
        for instance, target in request.also.items():
            if instance == request.instance:
                raise Refusal(400, "bad-request", f"{instance} is named twice in one set")
            asked = msgspec.structs.replace(
                request, instance=instance, target=target, also={}, config=None, port=None, grants=None
            )
            found.append((asked, self._check(asked)[0]))
        return found

    def preflight(self, request: RolloutRequest) -> Preflight:
        """Return what a rollout would do, without doing it; raises as `deploy`."""
        value, group = self._check(request)
        before = self._before(request)
        boards, left_out = self._boards(request, group, value)
        release = None if value.target is None else self._repository.release(value.target)
        old = None if before is None or before.target is None else self._repository.release(before.target)
        sizes = model.sizes(model.parse(request.waves), len(boards))
        starts = (0, *sizes[:-1])
        return Preflight(
            waves=tuple(boards[start:end] for start, end in zip(starts, sizes, strict=True)),
            excluded=tuple(Excluded(device=each, reason=reason) for each, reason in sorted(left_out.items())),
            new_grants=new_grants(release, old),
            previous="" if before is None else before.target or "",
            warnings=() if boards else ("the group has no devices yet: it is settled at once",),
        )

    def _check(self, request: RolloutRequest) -> tuple[Value, GroupRow | None]:
        names.check_label(request.instance, "instance")
        group = self._scope(request.group, request.device)
        try:
            model.parse(request.waves)
        except model.BadWavesError as error:
            raise Refusal(400, "bad-waves", str(error)) from error
        if request.timeout_s < _TIMEOUT_MIN_S or request.soak_s < 0 or request.failures < 0:
            raise Refusal(400, "bad-request", f"timeout_s is at least {_TIMEOUT_MIN_S}; soak_s and failures at least 0")
        value = self._value(request)
        if group is not None and value.target is not None:
            self._check_room(group, request.instance)
            self._check_conflict(group, request.instance, value)
        self._check_secrets(request, group, value)
        return value, group

    def _check_secrets(self, request: RolloutRequest, group: GroupRow | None, value: Value) -> None:
        """Refuse a rollout that no device could start; single devices that lack a secret are left out."""
        release = None if value.target is None else self._repository.release(value.target)
        rows = [] if release is None else self._store.devices.some(self._members(request, group))
        missing = [self._lacks(row, release, request.instance) for row in rows if not row.revoked]
        if missing and release is not None and all(missing):
            where = f"--group {request.group}" if request.group else f"--device {request.device}"
            raise Refusal(
                422,
                "missing-secret",
                f"{release.name} needs the secret {', '.join(missing[0])}, which no device there has",
                action=f"give it first: fleet secret set {missing[0][0]} {where} --instance {request.instance}",
            )

    def _lacks(self, row: DeviceRow, release: Release | None, instance: str) -> tuple[str, ...]:
        if release is None or not release.manifest.secrets:
            return ()
        return lacks(release, instance, self._store.boxes.newest(row.id))

    def _members(self, request: RolloutRequest, group: GroupRow | None) -> list[str]:
        return [request.device] if group is None else self._store.devices.members(group)

    def _left_out(self, release: Release, row: DeviceRow, instance: str) -> str:
        """Why a device cannot run a release, in words; empty for no reason."""
        missing = self._lacks(row, release, instance)
        secret = f"it lacks the secret {missing[0]}: fleet secret set {missing[0]} --device {row.id}" if missing else ""
        return unfit(release, row) or _engineless(row) or secret

    def _scope(self, group: str, device: str) -> GroupRow | None:
        if bool(group) == bool(device):
            raise Refusal(400, "bad-request", "name either a group or a device")
        if device:
            row = self._store.devices.get(device)
            if row is None or row.revoked:
                raise Refusal(404, "unknown-device", f"there is no device {device}", action="fleet devices lists them")
            return None
        found = self._store.devices.group(group)
        if found is None:
            known = ", ".join(each.name for each in self._store.devices.groups()[:10]) or "none yet"
            raise Refusal(
                404,
                "unknown-group",
                f"there is no group {group!r}",
                f"groups: {known}",
                f"make it with fleet enroll-token --group {group}, or correct the name",
            )
        return found

    def _value(self, request: RolloutRequest) -> Value:
        before = self._before(request)
        attempt = self._attempt(request)
        if request.target is None:
            return Value(None, keep_data=request.keep_data, attempt=attempt)
        release = self._repository.release(request.target)
        if release is None:
            raise Refusal(
                404, "unknown-target", f"{request.target} is not published", action="publish it: fleet publish FILE"
            )
        return value_of(request, release, before, attempt=attempt)

    def _attempt(self, request: RolloutRequest) -> int:
        """An explicit deploy of what failed somewhere is an explicit wish to try it again."""
        if request.attempt is not None:
            return request.attempt
        failed = 0
        for row in self._store.rollouts.newest(50, group=request.group or None):
            same = (row.instance, row.value.target) == (request.instance, request.target)
            if same and (row.group, row.device) == (request.group, request.device):
                for board, _ in self._store.rollouts.boards(row.number):
                    if board.outcome in BREACHES:
                        failed = max(failed, board.attempt + 1, row.value.attempt + 1)
        return failed

    def _before(self, request: RolloutRequest | RolloutRow) -> Value | None:
        return self._store.rollouts.settled_value(group=request.group, device=request.device, instance=request.instance)

    def _check_room(self, group: GroupRow, instance: str) -> None:
        """A device runs so many instances and no more."""
        here = {row.instance for row in self._store.rollouts.settled(group=group.name) if row.value.target is not None}
        if instance not in here and len(here) >= bounds.ITEMS_MAX:
            raise Refusal(
                409, "too-many", f"{group.name} runs {len(here)} instances already", action="remove one first"
            )

    def _check_conflict(self, group: GroupRow, instance: str, value: Value) -> None:
        """Two groups of one priority must not want different things on one device."""
        held: dict[str, Group] = {group.name: Group(group.name, group.priority, {instance: SettledValue(value)})}
        for each in self._store.devices.groups():
            settled = self._store.rollouts.settled_value(group=each.name, device="", instance=instance)
            if each.name != group.name and settled is not None:
                held[each.name] = Group(each.name, each.priority, {instance: SettledValue(settled)})
        if not effective.conflicts(held.values()):
            return  # most of the time there is no such group at all
        rows = self._store.devices.some(self._store.devices.members(group))
        for device, groups in self._store.devices.groups_of_each(rows).items():
            for conflict in effective.conflicts(held[each.name] for each in groups if each.name in held):
                other = conflict.second if conflict.first == group.name else conflict.first
                raise Refusal(
                    409,
                    "conflict",
                    f"{other} and {group.name} have the same priority and disagree about {instance} on {device}",
                    action=f"give one a higher priority: fleet group {group.name} --priority 10",
                )

    # -- devices ------------------------------------------------------------------------------------------------------

    def _boards(
        self, request: RolloutRequest, group: GroupRow | None, value: Value
    ) -> tuple[tuple[str, ...], dict[str, str]]:
        """The devices in the order in which they are offered it, and those that are left out, with the reason."""
        rows = self._store.devices.some(self._members(request, group))
        release = None if value.target is None else self._repository.release(value.target)
        reasons = {} if release is None else {row.id: self._left_out(release, row, request.instance) for row in rows}
        left_out = {device: reason for device, reason in reasons.items() if reason}
        online = {row.id: row.online for row in rows if not row.revoked and row.id not in left_out}
        return model.order(online), left_out

    def _begin_set(
        self,
        members: list[tuple[RolloutRequest, Value]],
        group: GroupRow | None,
        *,
        by: str,
        undoes: tuple[str, ...] = (),
    ) -> RolloutRow:
        """Begin the rollouts of an atomic set; the first of them, which leads it.

        A device that cannot run one of the members is left out of all.
        """
        word = f"s{secrets.token_hex(6)}"
        left_out: dict[str, str] = {}
        for request, value in members:
            left_out |= self._boards(request, group, value)[1]
        taken_back = undoes or ("",) * len(members)
        with self._store.atomic():
            rows = [
                self._begin(request, replace(value, atomic=word), group, by=by, undoes=past, left_out=left_out)
                for (request, value), past in zip(members, taken_back, strict=True)
            ]
        return rows[0]

    def _begin(
        self,
        request: RolloutRequest,
        value: Value,
        group: GroupRow | None,
        *,
        by: str,
        undoes: str = "",
        left_out: dict[str, str] | None = None,
    ) -> RolloutRow:
        devices, unfit_here = self._boards(request, group, value)
        left_out = unfit_here if left_out is None else left_out
        devices = tuple(device for device in devices if device not in left_out)
        sizes = model.sizes(model.parse(request.waves), len(devices))
        now = self._clock().timestamp()
        boards = [
            *(
                DeviceProgress(device, model.wave_of(index, sizes), attempt=value.attempt)
                for index, device in enumerate(devices)
            ),
            *(
                DeviceProgress(device, len(sizes), Outcome.SKIPPED, message=reason)
                for device, reason in sorted(left_out.items())
            ),
        ]
        with self._store.atomic():
            superseded = [
                each
                for old in self._store.rollouts.open_on(
                    group=request.group, device=request.device, instance=request.instance
                )
                for each in self._store.rollouts.together(old)
                if each.state in OPEN_STATES
            ]
            row = self._store.rollouts.create(
                id=f"r{secrets.token_hex(6)}",
                group=request.group,
                device=request.device,
                instance=request.instance,
                value=value,
                before=self._before(request),
                waves=request.waves,
                sizes=sizes,
                boards=boards,
                failures=request.failures,
                soak_s=request.soak_s,
                timeout_s=request.timeout_s,
                note=request.note[:500],
                by=by,
                undoes=undoes,
                now=now,
            )
            for old in superseded:
                self._store.rollouts.set_state(
                    old.number,
                    RolloutState.SUPERSEDED,
                    reason=f"rollout {row.number} took over",
                    superseded_by=row.number,
                    now=now,
                )
            act = "undo" if undoes else "remove" if value.target is None else "deploy"
            words = f"{request.instance} = {value.target or 'nothing'} on {request.group or request.device}"
            self._store.access.audit(actor=by, act=act, subject=row.id, detail=words, now=now)
        self._conductor.wake()
        return row

    # -- the other ways ----------------------------------------------------------------------------------------------

    def remove(self, request: RemovalRequest, *, by: str) -> RolloutRow:
        """Take an instance off; raises as `deploy`, and when it is not there."""
        asked = RolloutRequest(
            instance=request.instance,
            group=request.group,
            device=request.device,
            keep_data=request.keep_data,
            waves=request.waves,
        )
        group = self._scope(request.group, request.device)
        before = self._before(asked)
        under_way = self._store.rollouts.open_on(group=request.group, device=request.device, instance=request.instance)
        shown = request.group or request.device
        if (before is None or before.target is None) and not under_way and not self._runs(request):
            raise Refusal(
                404,
                "unknown-instance",
                f"{shown} has no instance {request.instance!r}",
                action=f"fleet groups and fleet device {request.device or 'ID'} show what runs",
            )
        return self._begin(asked, self._value(asked), group, by=by)

    def _runs(self, request: RemovalRequest) -> bool:
        """Tell whether a device runs an instance because of a group."""
        row = self._store.devices.get(request.device) if request.device else None
        held = None if row is None else self._director.effective(row).get(request.instance)
        return held is not None and held.value.target is not None

    def undo(self, request: UndoRequest, *, by: str) -> RolloutRow:
        """Offer the state before a rollout again.

        Raises:
            Refusal: no such rollout, or nothing to take back.
        """
        past = self._past(request)
        group = self._scope(past.group, past.device)
        members = self._store.rollouts.together(past)
        asked = [self._taken_back(each, request.waves) for each in members]
        if len(members) == 1:
            return self._begin(*asked[0], group, by=by, undoes=past.id)
        return self._begin_set(asked, group, by=by, undoes=tuple(each.id for each in members))

    def _taken_back(self, past: RolloutRow, sizes: str) -> tuple[RolloutRequest, Value]:
        """Return the request that takes a rollout back; raises as `undo`."""
        try:
            value = replace(effective.target_of(_past(past)), atomic="")
            model.parse(sizes)
        except (effective.NothingToUndoError, model.BadWavesError) as error:
            raise Refusal(409, "nothing-to-undo", str(error)) from error
        if value.target is not None and self._repository.release(value.target) is None:
            raise Refusal(409, "revoked", f"{value.target} is not published any more", action="deploy another version")
        asked = RolloutRequest(
            instance=past.instance,
            target=value.target,
            group=past.group,
            device=past.device,
            waves=sizes if past.group else "100%",
            timeout_s=int(past.timeout_s),
        )
        return asked, value

    def _past(self, request: UndoRequest) -> RolloutRow:
        if request.rollout:
            row = self._store.rollouts.get(request.rollout)
            if row is None:
                raise Refusal(
                    404, "unknown-rollout", f"there is no rollout {request.rollout}", action="fleet rollouts lists them"
                )
            return row
        if request.group:
            self._scope(request.group, "")
        rows = {row.id: row for row in self._store.rollouts.newest(1000, group=request.group or None)}
        try:
            chosen = effective.choose_undo([_past(row) for row in rows.values()])
        except effective.NothingToUndoError as error:
            raise Refusal(409, "nothing-to-undo", str(error)) from error
        return rows[chosen.id]

    def unpin(self, device: DeviceRow, instance: str, *, by: str) -> None:
        """Let a device follow its groups again.

        Raises:
            Refusal: it is not pinned.
        """
        now = self._clock().timestamp()
        under_way = self._store.rollouts.open_on(group="", device=device.id, instance=instance)
        pinned = self._store.rollouts.settled_value(group="", device=device.id, instance=instance)
        if pinned is None and not under_way:
            raise Refusal(409, "not-pinned", f"{instance} is not pinned on {device.id}")
        with self._store.atomic():
            for row in under_way:
                self._store.rollouts.set_state(
                    row.number, RolloutState.ABORTED, reason="the pin was taken off", now=now
                )
            self._store.rollouts.settle(group="", device=device.id, instance=instance, value=None, rollout="", now=now)
            self._store.access.audit(actor=by, act="unpin", subject=device.id, detail=instance, now=now)
        self._conductor.touch([device.id])

    def retry(self, device: DeviceRow, instance: str, *, by: str) -> None:
        """Have a device try again what failed there.

        Raises:
            Refusal: the device is not to run such an instance, or runs it well, or is trying it.
        """
        held = self._director.effective(device).get(instance)
        if held is None or held.value.target is None:
            raise Refusal(
                404,
                "unknown-instance",
                f"{device.id} is not to run {instance!r}: a halted rollout is not retried",
                action=f"fleet device {device.id} shows what it should run; deploy again to try again",
            )
        idle = nothing_to_retry(self._store, device, instance, held.value.target)
        if idle:
            raise Refusal(
                409,
                "nothing-to-do",
                f"there is nothing to try again: {idle}",
                action=f"fleet restart {device.id} {instance} restarts it",
            )
        now = self._clock().timestamp()
        attempt = max(held.value.attempt, self._store.delivery.attempts(device.id).get(instance, 0)) + 1
        with self._store.atomic():
            self._store.delivery.set_attempt(device.id, instance, attempt)
            self._store.access.audit(actor=by, act="retry", subject=device.id, detail=instance, now=now)
        self._conductor.touch([device.id])

    def control(self, row: RolloutRow, verb: str, *, by: str) -> None:
        """Pause, resume or abort.

        Raises:
            Refusal: the rollout is over.
        """
        if row.state not in OPEN_STATES:
            raise Refusal(409, "rollout-over", f"rollout {row.number} is over: it {_was(row.state)}")
        now = self._clock().timestamp()
        self._store.access.audit(actor=by, act=f"rollout-{verb}", subject=row.id, now=now)
        if verb == "abort":
            self._conductor.end(row, RolloutState.ABORTED, f"aborted by {by}")
            return
        state = RolloutState.PAUSED if verb == "pause" else RolloutState.RUNNING
        if state is not row.state:
            reason = f"paused by {by}" if state is RolloutState.PAUSED else ""
            for each in self._store.rollouts.together(row):
                if each.state in OPEN_STATES:
                    self._store.rollouts.set_state(each.number, state, reason=reason)
        self._conductor.wake()


def _was(state: RolloutState) -> str:
    return "succeeded" if state is RolloutState.SUCCEEDED else f"was {state}"


def _past(row: RolloutRow) -> effective.Past:
    return effective.Past(row.id, row.number, row.state, row.before, row.undoes)


def _engineless(row: DeviceRow) -> str:
    """A host that runs and knows no engine will never run a component."""
    return "it has no wasm engine" if row.versions.host and not row.versions.engine else ""


_PORT_MAX: Final = 65_535


def value_of(request: RolloutRequest, release: Release, before: Value | None, *, attempt: int) -> Value:
    """The value that a request asks for; what it leaves open stays as it was before.

    Raises:
        Refusal: a key or grant that the manifest does not have, a missing key, or a port that is none.
    """
    assert request.target is not None
    config = dict(before.config if before is not None else ()) if request.config is None else request.config
    _check_config(release, config, explicit=request.config is not None)
    config = {key: value for key, value in config.items() if key in release.manifest.config}
    if request.grants is not None and not request.grants.within(release.manifest.grants):
        raise Refusal(422, "grant-denied", "an operator narrows grants and never widens them: see the manifest")
    if request.port is not None and not 0 <= request.port <= _PORT_MAX:
        raise Refusal(400, "bad-request", f"port {request.port} is none")
    kept = before if before is not None and before.target is not None else None
    port = (kept.port if kept else None) if request.port is None else request.port or None
    grants = _grants(request.grants, kept, release)
    share = (kept.share_worker if kept else False) if request.share_worker is None else request.share_worker
    return Value(request.target, tuple(sorted(config.items())), grants, port, attempt=attempt, share_worker=share)


def _check_config(release: Release, config: dict[str, str], *, explicit: bool) -> None:
    known = release.manifest.config
    for key, value in config.items():
        if explicit and key not in known:
            raise Refusal(
                422,
                "unknown-config",
                f"{release.name} has no configuration key {key!r}",
                f"it knows {', '.join(sorted(known)) or 'none'}",
            )
        if len(value.encode()) > bounds.CONFIG_VALUE_MAX_BYTES:
            raise Refusal(413, "too-large", f"the value of {key} is larger than {bounds.CONFIG_VALUE_MAX_BYTES} bytes")
    missing = [key for key, declared in known.items() if declared.default is None and key not in config]
    if missing:
        raise Refusal(
            422,
            "missing-config",
            f"{release.name} needs a value for {', '.join(missing)}",
            action="give --config KEY=VALUE",
        )


def _grants(asked: Grants | None, kept: Value | None, release: Release) -> str:
    if asked is not None:
        return wire.canonical(asked).decode()
    if kept is None or not kept.grants:
        return ""
    narrowed, ceiling = msgspec.json.decode(kept.grants, type=Grants), release.manifest.grants
    still = Grants(
        interfaces=tuple(name for name in narrowed.interfaces if ceiling.allows(name)),
        outbound=tuple(name for name in narrowed.outbound if outbound.covered(name, ceiling.outbound)),
        instances=tuple(name for name in narrowed.instances if name in ceiling.instances),
    )
    return wire.canonical(still).decode()


def new_grants(release: Release | None, old: Release | None) -> tuple[str, ...]:
    """Return grants of the new version that the old one does not have."""
    if release is None:
        return ()
    new, before = release.manifest.grants, old.manifest.grants if old is not None else Grants()
    return (
        *(f"interface {name}" for name in new.interfaces if not before.allows(name)),
        *(
            f"outbound {outbound.describe(name)}"
            for name in new.outbound
            if not outbound.covered(name, before.outbound)
        ),
        *(f"instance {name}" for name in new.instances if name not in before.instances),
    )
