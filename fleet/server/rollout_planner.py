"""Plans a rollout from an operator's request: checked against published components, devices and what runs.

Deploy, removal, pin, undo and retry all end in a rollout or a raised attempt; nothing else changes what devices run.
`value_of` checks the requested configuration, grants and port against what the publisher signed.
"""

import secrets
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from itertools import pairwise
from typing import Any, Final

import msgspec

from fleet.protocol import bounds, names, outbound, wire
from fleet.protocol.codes import OPEN_STATES, Outcome, PauseCause, RolloutState
from fleet.protocol.manifest import Grants
from fleet.protocol.operator_api import (
    Excluded,
    GroupPlan,
    PlanLimits,
    Preflight,
    Refusal,
    RemovalRequest,
    RolloutRequest,
    UndoRequest,
)
from fleet.protocol.trust_api import Role
from fleet.rollout import advance, effective, group_plan
from fleet.rollout.decide import Rollout
from fleet.rollout.effective import Fitness, Group, SettledValue, Withdrawal
from fleet.rollout.members import Amount, BadWavesError, approvals, default_waves, parse_waves
from fleet.rollout.model import OPEN, Value, cancel
from fleet.server.director import Director, bad_value
from fleet.server.facts import read_selector
from fleet.server.retries import nothing_to_retry
from fleet.server.rollout_controller import RolloutController, approvers, beside_open, wants_approval
from fleet.server.rollout_members import Change, Drawn, Membership, refusal
from fleet.server.tuf_repository import TufRepository
from fleet.store.rollouts import NewRollout
from fleet.store.rows import DeviceRow, GroupRow, RolloutPlan, RolloutRow
from fleet.store.store import Store
from signing.policy import Release

_LIMITS: Final = PlanLimits.__struct_fields__
_NAMED_MAX: Final = 5


class RolloutPlanner:
    """Makes rollouts."""

    def __init__(
        self,
        *,
        store: Store,
        repository: TufRepository,
        director: Director,
        membership: Membership,
        conductor: RolloutController,
        clock: Callable[[], datetime],
    ) -> None:
        self._store, self._repository, self._director = store, repository, director
        self._membership = membership
        self._conductor, self._clock = conductor, clock

    # -- deploy ------------------------------------------------------------------------------------------------------

    def deploy(self, request: RolloutRequest, *, by: str) -> RolloutRow:
        """Begin a rollout; an open one of the same instance and scope is superseded.

        Raises:
            Refusal, BadNameError: what is asked cannot be meant, or contradicts what is.
        """
        value, group = self._check(request)
        overridden = () if group is None else _overridden(request, group.policy)
        if overridden and self._store.access.role(by) != Role.ADMIN:
            raise Refusal(
                403,
                "plan",
                f"the plan of {request.group} sets {', '.join(overridden)}, and {by} is not an admin",
                action=f"leave it out, or ask an admin: fleet group policy {request.group} shows the plan",
            )
        with self._store.atomic():
            if request.also:
                row = self._begin_set([(request, value), *self._companions(request)], by=by)
            else:
                row = self._begin(request, value, by=by)
            if overridden:
                words = f"instead of the plan of {request.group}: {', '.join(overridden)}"
                now = self._clock().timestamp()
                self._store.access.audit(actor=by, act="plan-override", subject=row.id, detail=words, now=now)
        return row

    def _companions(self, request: RolloutRequest) -> list[tuple[RolloutRequest, Value]]:
        """Return the other members of a set, each checked like the first."""
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
        value, _ = self._check(request)
        before = self._before(request)
        asked = [(request, value), *self._companions(request)]
        also_out = self._membership.left_out_of_all([_change(*each) for each in asked]) if request.also else None
        plan = self._plan(request, value)
        drawn = self._membership.draw(_change(request, value), plan, also_out=also_out)
        refused = "" if request.also else self._unchanged(request, value, drawn)
        if not drawn.progress.gates:
            refused = drawn.unguarded or refusal(drawn.left_out)
        release = None if value.target is None else self._repository.release(value.target)
        old = None if before is None or before.target is None else self._repository.release(before.target)
        gates = drawn.progress.gates
        count = 0 if refused else len(gates)
        wanted = approvals((gate.approval for gate in gates), first=plan.approval)
        return Preflight(
            waves=tuple(
                tuple(each.device for each in drawn.affected if each.wave == wave) for wave in range(1, count + 1)
            ),
            excluded=tuple(Excluded(device=each, reason=reason) for each, reason in sorted(drawn.left_out.items())),
            new_grants=new_grants(release, old),
            previous="" if before is None else before.target or "",
            warnings=(f"it is refused: {refused}",) if refused else tuple(wanted),
        )

    def foresee_withdrawal(self, target: str) -> Withdrawal:
        """Return what would follow if a release were withdrawn now."""
        return self._conductor.foresee(target)

    def _plan(self, request: RolloutRequest, value: Value, *, staged: bool = True) -> RolloutPlan:
        """Return the waves and limits that a request asks for, and for what it leaves open those of the group's plan.

        Args:
            request: checked before.
            value: what is offered.
            staged: whether the plan's stages are for this rollout: not for one that takes something back or off.
        """
        group = self._store.devices.group(request.group) if request.group else None
        policy = (None if group is None else group.policy) or GroupPlan()
        budget = policy.budget
        limits = PlanLimits(**{name: _either(_asked(request, name), getattr(policy.limits, name)) for name in _LIMITS})
        stages = group_plan.stages_of(policy) if staged and not request.waves else ()
        waves = request.waves or default_waves(len(self._membership.selected(_change(request, value))))
        soak_s = _either(request.soak_s, policy.soak_s if staged else None) or 0
        if request.soak_s is not None:
            stages = tuple(replace(stage, soak_s=None) for stage in stages)
        release = None if value.target is None else self._repository.release(value.target)
        manifest = None if release is None else release.manifest
        return RolloutPlan(
            stages=stages or parse_waves("100%" if request.device else waves),
            limits=group_plan.limits_of(limits, min_available=None if budget is None else budget.min_available),
            site_label="" if budget is None else budget.by,
            approval=staged and policy.approval,
            soak_s=soak_s,
            seed=secrets.randbelow(1 << 31) if request.seed is None else request.seed,
            starts_at=None if request.starts_at is None else request.starts_at.timestamp(),
            allow_empty=request.allow_empty,
            where=request.where,
            fitness=Fitness(0, 0) if manifest is None else Fitness(manifest.security_epoch, manifest.data_schema),
        )

    def _check(self, request: RolloutRequest) -> tuple[Value, GroupRow | None]:
        names.check_label(request.instance, "instance")
        group = self._scope(request.group, request.device)
        if request.where and request.device:
            raise Refusal(400, "bad-request", "where chooses among the devices of a group, and this names a device")
        if request.where:
            read_selector(request.where)
        _check_waves(request.waves)
        try:
            for amount in ("min_success", "failures", "max_lost", "catch_up"):
                if text := _asked(request, amount):
                    Amount.parse(text)
        except BadWavesError as error:
            raise Refusal(400, "bad-waves", str(error)) from error
        if request.timeout_s is not None and request.timeout_s < group_plan.TIMEOUT_MIN_S:
            raise Refusal(400, "bad-request", f"timeout_s is at least {group_plan.TIMEOUT_MIN_S}")
        self._check_frozen(request)
        value = self._value(request)
        self._check_open(request, value)
        at_once = request.starts_at is None  # of a scheduled one it is judged when it begins
        if request.where and at_once and (reason := beside_open(self._superseded(request))):
            raise Refusal(409, "open-rollout", reason, action="wait for its end, or abort it")
        if group is not None and value.target is not None:
            self._check_room(group, request.instance)
            self._check_conflict(group, request.instance, value)
        self._check_secrets(request, value)
        return value, group

    def _check_open(self, request: RolloutRequest, value: Value) -> None:
        """Refuse another configuration while a rollout of the instance is open, unless it is to be superseded."""
        before = self._before(request)
        changed = request.config is not None and (before is None or before.config != value.config)
        if not changed or request.supersede:
            return
        for row in self._superseded(request):
            if row.value.config != value.config:
                title = f"rollout {row.number} of {request.instance} is {row.state}, and this changes its configuration"
                raise Refusal(409, "open-rollout", title, action="wait for its end, or add --supersede")

    def _check_frozen(self, request: RolloutRequest) -> None:
        """Refuse a new rollout while the fleet or its group is frozen."""
        freezes = self._store.rollouts.freezes()
        scopes = ["", request.group] if request.group else [""]
        for scope in scopes:
            if scope in freezes:
                where = f" --group {scope}" if scope else ""
                raise Refusal(
                    409,
                    "frozen",
                    f"{scope or 'the fleet'} is frozen",
                    freezes[scope],
                    f"fleet unfreeze{where} ends that",
                )

    def _check_secrets(self, request: RolloutRequest, value: Value) -> None:
        """Refuse a rollout that no device could start; single devices that lack a secret are left out."""
        release = None if value.target is None else self._repository.release(value.target)
        rows = [] if release is None else self._membership.selected(_change(request, value))
        missing = [self._membership.lacks(row, release, request.instance) for row in rows if not row.revoked]
        if missing and release is not None and all(missing):
            where = f"--group {request.group}" if request.group else f"--device {request.device}"
            raise Refusal(
                422,
                "missing-secret",
                f"{release.name} needs the secret {', '.join(missing[0])}, which no device there has",
                action=f"give it first: fleet secret set {missing[0][0]} {where} --instance {request.instance}",
            )

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
        if release is None and self._repository.is_withdrawn(request.target):
            title = f"{request.target} was withdrawn"
            raise Refusal(409, "revoked", title, "a withdrawal is for good", "deploy another version: fleet components")
        if release is None:
            raise Refusal(
                404, "unknown-target", f"{request.target} is not published", action="publish it: fleet publish FILE"
            )
        self._check_kind(request, release, before)
        return value_of(request, release, before, attempt=attempt)

    def _check_kind(self, request: RolloutRequest, release: Release, before: Value | None) -> None:
        """Refuse data under the name of an instance, and the other way round: devices know both by their names."""
        old = None if before is None or before.target is None else self._repository.release(before.target)
        if old is not None and old.manifest.is_data != release.manifest.is_data:
            kinds = ("an instance", "a data package")
            was, now = (kinds[each.manifest.is_data] for each in (old, release))
            raise Refusal(
                409, "conflict", f"{request.instance} is {was} there, and would be {now}", action="remove it first"
            )
        if release.manifest.is_data and request.instance != release.name.name:
            raise Refusal(422, "bad-request", f"data has the name under which it was published: {release.name.name}")

    def _attempt(self, request: RolloutRequest) -> int:
        """Count an explicit deploy of what failed somewhere as an explicit wish to try it again."""
        if request.attempt is not None:
            return request.attempt
        failed = 0
        for row in self._store.rollouts.newest(50, group=request.group or None):
            same = (row.instance, row.value.target) == (request.instance, request.target)
            if same and (row.group, row.device) == (request.group, request.device):
                for member in self._store.rollouts.members(row.number):
                    if member.outcome is Outcome.FAILED or member.code:
                        failed = max(failed, member.attempt + 1, row.value.attempt + 1)
        return failed

    def _before(self, request: RolloutRequest | RolloutRow) -> Value | None:
        return self._store.rollouts.settled_value(group=request.group, device=request.device, instance=request.instance)

    def _check_room(self, group: GroupRow, instance: str) -> None:
        """Refuse more instances than a device may run."""
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

    # -- beginning ----------------------------------------------------------------------------------------------------

    def _begin_set(
        self,
        asked: list[tuple[RolloutRequest, Value]],
        *,
        by: str,
        undoes: tuple[str, ...] = (),
    ) -> RolloutRow:
        """Begin the rollouts of an atomic set; return the one that leads it: the first that changes something.

        A device that cannot run one of the members is left out of all.
        """
        word = f"s{secrets.token_hex(6)}"
        plan = self._plan(*asked[0], staged=not undoes)
        left_out = self._membership.left_out_of_all([_change(request, value) for request, value in asked])
        taken_back = undoes or ("",) * len(asked)
        superseded = [self._superseded(request) for request, _ in asked]  # the first member ends the whole old set
        with self._store.atomic():
            rows = [
                self._begin(
                    request,
                    replace(value, atomic=word),
                    by=by,
                    undoes=past,
                    also_out=left_out,
                    plan=plan,
                    superseded=old,
                )
                for (request, value), past, old in zip(asked, taken_back, superseded, strict=True)
            ]
        return next((row for row in rows if row.state is not RolloutState.REFUSED), rows[0])

    def _begin(
        self,
        request: RolloutRequest,
        value: Value,
        *,
        by: str,
        undoes: str = "",
        also_out: dict[str, str] | None = None,
        plan: RolloutPlan | None = None,
        superseded: list[RolloutRow] | None = None,
    ) -> RolloutRow:
        plan = self._plan(request, value) if plan is None else plan
        before = self._before(request)
        drawn = self._membership.draw(_change(request, value), plan, also_out=also_out)
        progress, reason = drawn.progress, self._unchanged(request, value, drawn, superseded)
        settles = (value.target is None or plan.allow_empty) and not drawn.unguarded
        if not reason and not drawn.progress.gates:
            reason = drawn.unguarded or refusal(drawn.left_out)
        if plan.starts_at is not None:
            progress = Rollout(RolloutState.SCHEDULED, (), plan.limits, approval=plan.approval)
            reason = "it wants the approval of a second person" if plan.approval else ""
        elif reason:
            progress = Rollout(RolloutState.SUCCEEDED if settles else RolloutState.REFUSED, (), plan.limits)
        now = self._clock().timestamp()
        new = NewRollout(
            id=f"r{secrets.token_hex(6)}",
            group=request.group,
            device=request.device,
            instance=request.instance,
            value=value,
            before=before,
            waves=drawn.waves,
            plan=plan,
            progress=progress,
            members=() if plan.starts_at is not None else drawn.members,
            by=by,
            note=request.note[:500],
            undoes=undoes,
            reason=reason,
        )
        with self._store.atomic():
            row = self._store.rollouts.create(new, now=now)
            if progress.state in OPEN_STATES | {RolloutState.SUCCEEDED}:
                self._conductor.supersede(row)
            if progress.state is RolloutState.SUCCEEDED:
                self._settle(row)
            act = "undo" if undoes else "remove" if value.target is None else "deploy"
            words = f"{request.instance} = {value.target or 'nothing'} on {request.group or request.device}"
            self._store.access.audit(actor=by, act=act, subject=row.id, detail=words, now=now)
        self._conductor.wake()
        return row

    def _unchanged(
        self, request: RolloutRequest, value: Value, drawn: Drawn, superseded: list[RolloutRow] | None = None
    ) -> str:
        """Say that a rollout would change nothing; empty where it would.

        A rollout of the settled value changes something where it takes the place of an open one, or concerns a device
        that was left out of the one that settled the value.
        """
        before = self._before(request)
        superseded = self._superseded(request) if superseded is None else superseded
        if superseded or before is None or not before.same(value) or value.attempt > before.attempt:
            return ""
        left_out = self._store.rollouts.left_out(group=request.group, device=request.device, instance=request.instance)
        if any(each.device in left_out for each in drawn.affected):
            return ""
        return f"nothing would change: {request.group or request.device} is settled on it"

    def _superseded(self, request: RolloutRequest) -> list[RolloutRow]:
        """Return the open rollouts whose place a new one takes, those of their sets included."""
        return [
            each
            for old in self._store.rollouts.open_on(
                group=request.group, device=request.device, instance=request.instance
            )
            for each in self._store.rollouts.together(old)
            if each.state in OPEN_STATES
        ]

    def _settle(self, row: RolloutRow) -> None:
        """Settle the value of a rollout that concerns no device."""
        self._conductor.settle(
            group=row.group, device=row.device, instance=row.instance, value=row.value, rollout=row.id
        )
        self._conductor.touch_scope(row)

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
        _check_waves(request.waves)
        self._check_frozen(asked)
        if group is not None:
            self._check_conflict(group, request.instance, Value(None))
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
        value = self._value(asked)
        return self._begin(asked, value, by=by, plan=self._plan(asked, value, staged=False))

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
        self._scope(past.group, past.device)
        members = self._conductor.set_of(past)
        asked = [self._taken_back(each, request.waves) for each in members]
        if len(members) == 1:
            return self._begin(*asked[0], by=by, undoes=past.id, plan=self._plan(*asked[0], staged=False))
        return self._begin_set(asked, by=by, undoes=tuple(each.id for each in members))

    def _taken_back(self, past: RolloutRow, sizes: str) -> tuple[RolloutRequest, Value]:
        """Return the request that takes a rollout back; raises as `undo`."""
        try:
            value = replace(effective.target_of(_past(past)), atomic="")
        except effective.NothingToUndoError as error:
            raise Refusal(409, "nothing-to-undo", str(error), action=error.action) from error
        _check_waves(sizes)
        self._check_had_before(past, value)
        if value.target is not None and self._repository.release(value.target) is None:
            raise Refusal(409, "revoked", f"{value.target} is not published any more", action="deploy another version")
        asked = RolloutRequest(
            instance=past.instance,
            target=value.target,
            group=past.group,
            device=past.device,
            where=past.plan.where,
            waves=sizes if past.group else "100%",
            timeout_s=int(past.plan.limits.timeout_s),
            attempt=value.attempt,
        )
        return asked, value

    def _check_had_before(self, past: RolloutRow, value: Value) -> None:
        """Refuse to take a rollout back on devices that the value before it had left out: they had another one.

        Raises:
            Refusal: naming some of the devices.
        """
        rollouts = self._store.rollouts
        scope = {"group": past.group, "device": past.device, "instance": past.instance}
        settled = [rollouts.settled_by(**scope), *(each.rollout for each in rollouts.settled_history(**scope))]
        before = next((each for own, each in pairwise(settled) if own == past.id), "")
        reached = [member.device for member in rollouts.members(past.number) if member.wave]
        others = sorted(device for device, out in rollouts.unselected(reached).items() if before in out)
        if others:
            some = ", ".join(others[:_NAMED_MAX]) + ", ..." * (len(others) > _NAMED_MAX)
            had = value.target or "nothing"
            raise Refusal(
                409,
                "nothing-to-undo",
                f"not all devices of rollout {past.number} had {had} before it: --where left out {some}",
                action="deploy to each of them what it had, with --where; fleet rollouts lists the rollouts before",
            )

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
            raise Refusal(409, "nothing-to-undo", str(error), action=error.action) from error
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
                self._conductor.end(row, RolloutState.ABORTED, "the pin was taken off")
            self._conductor.settle(group="", device=device.id, instance=instance, value=None, rollout="")
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
                f"{device.id} is not to run {instance!r}: a reverted rollout is not retried",
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

    def control(self, row: RolloutRow, verb: str, *, by: str, keep: bool = False) -> None:
        """Pause, resume, approve or abort.

        `keep` leaves devices that have the version, or began with it, where they are, as pins.

        Raises:
            Refusal: the rollout is over, frozen, or wants somebody else's approval.
        """
        closed = verb == "resume" and row.state is RolloutState.SUCCEEDED and row.progress.closed
        if row.state not in OPEN_STATES | {RolloutState.SCHEDULED} and not closed:
            raise Refusal(409, "rollout-over", f"rollout {row.number} is over: it {_was(row.state)}")
        now = self._clock().timestamp()
        match verb:
            case "abort":
                if keep:
                    self._pin_kept(row)
                self._conductor.end(row, RolloutState.ABORTED, f"aborted by {by}", keep=keep)
            case "pause":
                for each in self._conductor.set_of(row):
                    if PauseCause.OPERATOR not in each.progress.causes:
                        self._conductor.save(each, advance.pause(each.model), reason=f"paused by {by}")
                self._conductor.look(self._store.rollouts.get(row.id) or row)
            case "approve":
                self._approve(row, by=by)
            case _:
                self._resume(row, by=by)
        self._store.access.audit(actor=by, act=f"rollout-{verb}", subject=row.id, now=now)
        self._conductor.wake()

    def _resume(self, row: RolloutRow, *, by: str) -> None:
        """Go on, accepting by name the failures and losses so far, and what gates on metrics left undecided."""
        causes = row.progress.causes
        if causes == {PauseCause.FREEZE}:
            raise Refusal(409, "frozen", f"rollout {row.number} is frozen", action="fleet unfreeze ends that")
        if PauseCause.APPROVAL in causes:
            raise Refusal(
                409,
                "approval",
                f"wave {row.progress.wave} of rollout {row.number} wants an approval"
                if row.progress.wave
                else f"rollout {row.number} wants an approval before it offers anything",
                action=approvers(row),
            )
        names: list[str] = []
        what: set[str] = set()
        for each in self._conductor.set_of(row):
            progress, after, accepted = advance.resume(each.model, self._store.rollouts.members(each.number))
            names += [member.device for member in accepted]
            what |= {"undecided" if member.undecided else "failures and losses" for member in accepted}
            changed = [member for member in after if member.device in names]
            self._conductor.save(each, progress, changed, reason="")
        if names:
            now, words = self._clock().timestamp(), ", ".join(sorted(set(names)))
            self._store.access.audit(
                actor=by, act="rollout-accept", subject=row.id, detail=f"{', '.join(sorted(what))} of {words}", now=now
            )

    def _approve(self, row: RolloutRow, *, by: str) -> None:
        if not wants_approval(row):
            raise Refusal(409, "approval", f"rollout {row.number} waits for no approval")
        if by == row.by:
            raise Refusal(403, "approval", f"{by} began rollout {row.number}", action=approvers(row))
        for each in self._conductor.set_of(row):
            self._conductor.save(each, advance.approve(each.model), reason="")

    def _pin_kept(self, row: RolloutRow) -> None:
        """Pin the value on devices that keep it when their rollout is aborted."""
        for each in self._conductor.set_of(row):
            for member in self._store.rollouts.members(each.number):
                if member.outcome is Outcome.SUCCEEDED or (member.began_at is not None and member.outcome in OPEN):
                    self._conductor.settle(
                        group="", device=member.device, instance=each.instance, value=each.value, rollout=""
                    )

    def cancel(self, row: RolloutRow, device: str, *, by: str) -> None:
        """Leave one device out of an open rollout.

        Raises:
            Refusal: the rollout is over, or does not have the device.
        """
        if row.state is RolloutState.SCHEDULED:
            title = f"rollout {row.number} has not begun: its devices are chosen then"
            raise Refusal(409, "not-begun", title, action=f"or end it: fleet rollout abort {row.number}")
        if row.state not in OPEN_STATES:
            raise Refusal(409, "rollout-over", f"rollout {row.number} is over: it {_was(row.state)}")
        for each in self._conductor.set_of(row):
            found = self._store.rollouts.member(each.number, device)
            if found is None:
                raise Refusal(404, "unknown-device", f"rollout {row.number} has no device {device}")
            self._conductor.save(each, each.model, [cancel(found[0], by)], reason=each.reason)
        now = self._clock().timestamp()
        self._store.access.audit(actor=by, act="rollout-cancel-device", subject=row.id, detail=device, now=now)

    def again(self, row: RolloutRow, *, by: str) -> RolloutRow:
        """Begin a rollout that took itself back once more, at wave 1 and with a raised attempt.

        Raises:
            Refusal: it did not end that way, or cannot be meant any more.
        """
        if row.state not in {RolloutState.REVERTED, RolloutState.ABORTED}:
            raise Refusal(
                409, "not-reverted", f"rollout {row.number} {_was(row.state)}: only a reverted one is retried"
            )
        attempts = [member.attempt for member in self._store.rollouts.members(row.number)]
        value = replace(row.value, attempt=max([row.value.attempt, *attempts]) + 1, atomic="")
        asked = RolloutRequest(
            instance=row.instance, target=value.target, group=row.group, device=row.device, where=row.plan.where
        )
        self._check_frozen(asked)
        if value.target is not None and self._repository.release(value.target) is None:
            raise Refusal(409, "revoked", f"{value.target} is not published any more", action="deploy another version")
        group = self._store.devices.group(row.group) if row.group else None
        if group is not None and group.policy is not None:
            plan = self._plan(asked, value)  # the group's plan as it is now, not one from before it
        else:
            plan = msgspec.structs.replace(row.plan, starts_at=None, seed=secrets.randbelow(1 << 31))
        return self._begin(asked, value, by=by, plan=plan)

    def freeze(self, group: str, *, reason: str, by: str) -> None:
        """Pause every rollout and catch-up queue of a group (empty: of the fleet), and refuse new ones."""
        if group:
            self._scope(group, "")
        now = self._clock().timestamp()
        with self._store.atomic():
            self._store.rollouts.freeze(group, reason=reason, by=by, now=now)
            self._store.access.audit(actor=by, act="freeze", subject=group or "fleet", detail=reason, now=now)
        self._conductor.wake()

    def unfreeze(self, group: str, *, by: str) -> None:
        """End a freeze; raises `Refusal` where there is none."""
        now = self._clock().timestamp()
        if not self._store.rollouts.unfreeze(group):
            raise Refusal(409, "not-frozen", f"{group or 'the fleet'} is not frozen")
        self._store.access.audit(actor=by, act="unfreeze", subject=group or "fleet", now=now)
        self._conductor.wake()


def _check_waves(sizes: str) -> None:
    """Refuse waves that cannot be meant; empty ones are left to the server. Raises `Refusal`."""
    try:
        if sizes:
            parse_waves(sizes)
    except BadWavesError as error:
        raise Refusal(400, "bad-waves", str(error)) from error


def _was(state: RolloutState) -> str:
    return "succeeded" if state is RolloutState.SUCCEEDED else f"was {state}"


def _past(row: RolloutRow) -> effective.Past:
    return effective.Past(row.id, row.number, row.state, row.before, row.undoes)


def _change(request: RolloutRequest, value: Value) -> Change:
    return Change(request.group, request.device, request.instance, value, request.where)


def _asked(request: RolloutRequest, name: str) -> Any:
    """Return a limit that a request names, amounts as text; empty or None for one that it leaves open."""
    found = getattr(request, name)
    return str(found) if name == "failures" and found is not None else found


def _either(first: Any, second: Any) -> Any:
    """Return the first where it says something, otherwise the second."""
    return second if first in (None, "") else first


def _overridden(request: RolloutRequest, policy: GroupPlan | None) -> tuple[str, ...]:
    """Return the fields for which a request names another value than the group's plan."""
    if policy is None:
        return ()
    planned = {name: getattr(policy.limits, name) for name in _LIMITS}
    found = [
        name
        for name, value in planned.items()
        if value not in (None, "") and _asked(request, name) not in (None, "", value)
    ]
    if request.waves and policy.stages:
        found.insert(0, "waves")
    soaks = {policy.soak_s, *(each.soak_s for each in policy.stages)} - {None}
    if request.soak_s is not None and soaks and soaks != {request.soak_s}:
        found.append("soak_s")
    return tuple(found)


_PORT_MAX: Final = 65_535
_GIVE: Final = "give --config KEY=VALUE"


def value_of(request: RolloutRequest, release: Release, before: Value | None, *, attempt: int) -> Value:
    """Return the value that a request asks for; what it leaves open stays as it was before.

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
        if wrong := bad_value(release, key, value):
            raise Refusal(422, "bad-config", wrong, "" if explicit else "the instance has it from before", _GIVE)
    missing = [key for key, declared in known.items() if declared.default is None and key not in config]
    if missing:
        raise Refusal(
            422,
            "missing-config",
            f"{release.name} needs a value for {', '.join(missing)}",
            action=_GIVE,
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
        **narrowed.messages_within(ceiling),
        directories={at: name for at, name in narrowed.mounts.items() if name in ceiling.mounts.values()},
        hardware=narrowed.devices.within(ceiling.devices),
        buckets={
            name: tuple(each for each in rights if each in ceiling.stores[name])
            for name, rights in narrowed.stores.items()
            if name in ceiling.stores
        },
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
        *new.messages_beyond(before),
        *new.named_beyond(before),
        *new.devices.beyond(before.devices),
    )
