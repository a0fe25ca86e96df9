"""The stable names of everything that leaves a process: the one place where golden files meet the names of classes.

A name here is a word of the wire and stays when a class or a module is renamed: then only imports and the right side
change. Messages with a tag are called by it.
"""

import enum
from typing import get_args

import msgspec

import fleet.cli.audit as cli_audit
import fleet.publisher as signing_host
import fleet.server.director as server_director
import fleet.server.repository as server_repository
from agent import bundle, check, config, enroll, identity, images, records, restore, why
from agent.host import cell, cli, compiler, control, egress, engine, heads, ipc, router, walls
from agent.update import machine, plan, probation
from fleet.cli.base import Exit
from fleet.evidence import embedded, provenance, query
from fleet.protocol import (
    api,
    assignment,
    authority,
    codes,
    component,
    enrolment,
    evidence,
    history,
    logs,
    manifest,
    messages,
    names,
    online,
    people,
    sealed,
    topics,
    wire,
)
from fleet.protocol import bundle as bundle_layout
from fleet.rollout import model
from fleet.store import boxes, rows
from signing import (
    audit,
    dsse,
    events,
    facts,
    keyring,
    keys,
    rotation,
    sealing,
    sealing_keys,
    statements,
    workflow,
)


def _tagged(*kinds: type[msgspec.Struct]) -> dict[str, type]:
    return {str(kind.__struct_config__.tag): kind for kind in kinds}


# file of golden rows -> stable name -> type
MESSAGES: dict[str, dict[str, type]] = {
    "signed": {
        "assignment": assignment.Assignment,
        "item": assignment.Item,
        "secret-reference": assignment.SecretRef,
        "freshness": assignment.Fresh,
        "command": assignment.Command,
        **_tagged(assignment.CheckIn, assignment.Restart, assignment.FollowLogs),
        "manifest": manifest.Manifest,
        "trigger-http": manifest.Http,
        "trigger-schedule": manifest.Schedule,
        "trigger-message": manifest.OnMessage,
        "trigger-service": manifest.Service,
        "grants": manifest.Grants,
        "limits": manifest.Limits,
        "health-check": manifest.Health,
        "config-key": manifest.ConfigKey,
        "secret-key": manifest.SecretKey,
        "evidence": evidence.Evidence,
        "sealing-key": sealing_keys.SealingKey,
        "purpose-of-a-box": sealing.Purpose,
        "dsse-envelope": dsse._Envelope,
        "dsse-signature": dsse._Signature,
        "signing-event": events._File,
        "signing-event-row": events._Row,
        "public-card": keyring._Card,
    },
    "device": {
        "versions": messages.Versions,
        "hello": messages.Hello,
        "state": messages.State,
        "health": messages.Health,
        "figures-of-a-device": messages.Board,
        "figures-of-an-instance": messages.InstanceHealth,
        "health-checks-of-an-instance": messages.HealthChecks,
        "report": messages.Report,
        "desired-reply": messages.DesiredReply,
        "ack": messages.Ack,
        "poke": messages.Poke,
        "token": enrolment.Token,
        "enrol-request": enrolment.EnrolRequest,
        "enrolled": enrolment.Enrolled,
        "renew-request": enrolment.RenewRequest,
        "renew-reply": enrolment.RenewReply,
        "log-chunk": logs.LogChunk,
        "log-answer": logs.LogAnswer,
        "log-view": logs.LogView,
    },
    "operator": {
        "problem": api.Problem,
        "published-role": api.Published,
        "status": api.Status,
        "device-row": api.DeviceRow,
        "devices": api.Devices,
        "effective": api.Effective,
        "device-detail": api.DeviceDetail,
        "timeline-entry": api.TimelineEntry,
        "timeline": api.Timeline,
        "labels-request": api.LabelsRequest,
        "instance-request": api.InstanceRequest,
        "command-request": api.CommandRequest,
        "command-reply": api.CommandReply,
        "settled": api.Settled,
        "group-row": api.GroupRow,
        "groups": api.Groups,
        "group-request": api.GroupRequest,
        "enroll-token-request": api.EnrollTokenRequest,
        "enroll-token-reply": api.EnrollTokenReply,
        "component-row": api.ComponentRow,
        "components": api.Components,
        "artifact-reply": api.ArtifactReply,
        "role-reply": api.RoleReply,
        "rollout-request": api.RolloutRequest,
        "removal-request": api.RemovalRequest,
        "undo-request": api.UndoRequest,
        "rollout-device": api.BoardView,
        "rollout-wave": api.WaveView,
        "rollout": api.RolloutView,
        "rollouts": api.Rollouts,
        "excluded": api.Excluded,
        "preflight": api.Preflight,
        "audit-entry": api.AuditEntry,
        "audit": api.Audit,
        "history": history.History,
        "issuing-request": authority.IssuingRequest,
        "issuer": authority.Issuer,
        "ca": authority.CaView,
        "online-request": online.OnlineRequest,
        "online": online.OnlineView,
        "operator-request": people.OperatorRequest,
        "operator-reply": people.OperatorReply,
        "operator-row": people.OperatorRow,
        "operators": people.Operators,
        "box": sealed.Box,
        "secret-request": sealed.SecretRequest,
        "secret-reply": sealed.SecretReply,
        "secret-scope": sealed.SecretScope,
        "secret-row": sealed.SecretRow,
        "secret-holding": sealed.Holding,
        "secrets": sealed.Secrets,
        "sealing-key-of-a-device": sealed.BoardKey,
        "sealing-keys": sealed.SealingKeys,
        "sealed-box": sealed.SealedBox,
    },
    "host": {
        **_tagged(*get_args(ipc.Request), *get_args(ipc.FromHost)),
        "what-to-run": ipc.Run,
        "what-runs": ipc.Running,
    },
    "worker": _tagged(*get_args(control.ToLane), *get_args(control.FromLane)),
    "router-and-egress": {
        **_tagged(router.Set, router.Unset, router.Drain, egress.Admit),
        "route acknowledged": router.Ack,
        "ask": egress.Ask,
        "told": egress.Told,
    },
    "kept-by-the-agent": {
        "agent-toml": config.Settings,
        "agent-toml-policy": config.Policy,
        "agent-toml-network": config.Network,
        "agent-toml-disk": config.Disk,
        "committed": records.Committed,
        "change": records.Change,
        "change-state": machine.State,
        "replaced-figures": probation.Facts,
        "failed": records.FailedItem,
        "doubt": records.Doubt,
        "runset": restore._Runset,
        "identity": identity.Identity,
        "verifier-state": facts.Facts,
        "verifier-state-role": facts.Remembered,
        "image-note": images._Note,
        "bundle-outcome": bundle.Outcome,
        "compiler-refusal": images._CompilerSaid,
    },
    "told-by-fleet-agent": {
        "check": check.Result,
        "standing": why.Standing,
        "running": why.Running,
        "changing": why.Changing,
        "failed": why.Failed,
    },
    "kept-by-the-server": {
        "device": rows.DeviceRow,
        "group": rows.GroupRow,
        "token": rows.TokenRow,
        "operator": rows.OperatorRow,
        "certificate": rows.CertificateRow,
        "settled": rows.SettledRow,
        "rollout": rows.RolloutRow,
        "rollout-value": model.Value,
        "rollout-device-extra": rows.Extra,
        "assignment": rows.AssignmentRow,
        "report": rows.ReportRow,
        "event": rows.EventRow,
        "audit": rows.AuditRow,
        "box": boxes.BoxRow,
    },
    "kept-by-the-operator": {
        "audit-seen": audit.Seen,
        "audit-place": cli_audit.Place,
        "audit-memory": cli_audit.Memory,
        "audit-shown": cli_audit._Shown,
    },
    # what is read of a larger document, most of them of somebody else's making
    "read-in-part": {
        "schema-version": wire._Version,
        "bundle-head": bundle._Head,
        "problem": enroll._Problem,
        "role": server_repository._File,
        "role-signed": server_repository._Signed,
        "wanted": server_director._Wanted,
        "role-head": signing_host._Head,
        "role-version": signing_host._Version,
        "crate": embedded._Crate,
        "provenance-subject": provenance._Subject,
        "provenance-resource": provenance._Resource,
        "provenance-definition": provenance._Definition,
        "provenance-builder": provenance._Builder,
        "provenance-run": provenance._Run,
        "provenance-predicate": provenance._Predicate,
    },
}

# Structs that others are made from and that travel nowhere themselves.
BASES: frozenset[type] = frozenset({wire.Message, assignment.Verb, api.Body, api.View})

# stable name -> classes that hold the same words
VOCABULARIES: dict[str, tuple[type[enum.Enum], ...]] = {
    "reject-code": (codes.RejectCode,),
    "phase": (codes.Phase, machine.Phase),
    "call-outcome": (codes.CallOutcome,),
    "instance-state": (codes.InstanceState,),
    "rollout-outcome": (api.Outcome, model.Outcome),
    "rollout-state": (api.RolloutState, model.State),
    "role-of-an-operator": (people.Role,),
    "fleet-size": (rotation.Size,),
    "key-format": (keys.Format,),
    "component-fault": (component.Fault,),
    "counter-of-a-change": (machine.Counter,),
    "topic-down": (topics.Down,),
    "topic-up": (topics.Up,),
    "affected-answer": (query.Answer,),
    "fleet-exit-code": (Exit,),
}

# Words between functions of one process.
INTERNAL: frozenset[type] = frozenset({machine.Event, machine.Effect, probation.Verdict, plan.Act})

# stable name -> words that are constants
CONSTANTS: dict[str, object] = {
    "reject codes that are tried again": sorted(codes.RETRYABLE),
    "media type of an assignment": assignment.ASSIGNMENT_TYPE,
    "media type of a freshness statement": assignment.FRESH_TYPE,
    "media type of a command": assignment.COMMAND_TYPE,
    "media type of a report": statements.REPORT_TYPE,
    "media type of a sealing key": sealing_keys.SEALING_TYPE,
    "media type of provenance": provenance.PAYLOAD_TYPE,
    "context of a sealed box": sealing._INFO.decode(),
    "format of a sealed box": sealing.FORMAT,
    "signed field: ceiling of a delegation": workflow.CEILING,
    "signed field: revoked targets": workflow.REVOKED,
    "signed field: profile of root": workflow.PROFILE,
    "latency bounds (ms)": list(messages.LATENCY_BOUNDS_MS),
    "an enrolment token begins with": enrolment.TOKEN_PREFIX,
    "problem of a certificate that is over": enrolment.EXPIRED,
    "problem of a certificate of an old issuer": enrolment.OUTDATED,
    "kinds of evidence": [evidence.CYCLONEDX, evidence.SPDX, evidence.PROVENANCE],
    "members of a bundle": [
        bundle_layout.HEAD,
        bundle_layout.desired("DEVICE"),
        bundle_layout.metadata("FILE"),
        bundle_layout.artifact("SHA256"),
        bundle_layout.secret("SHA256"),
    ],
    "version of a bundle": bundle_layout.VERSION,
    "layers of containment": list(cell.LAYERS),
    "ways to run a host": list(walls.WAYS),
    "exports and imports with a meaning": sorted(
        [engine.HANDLER, engine.HEALTH, engine.TASK, engine.STATE, engine.LOGGING, *engine.CONFIG]
    ),
    "header that counts hops": heads.HOPS.decode(),
    "file with the reason why the host did not start": ipc.WHY_NOT,
    "exit status of a host below its minimum": cli._STATUS_BELOW_MINIMUM,
    "exit status of the compiler": {str(code): status for code, status in sorted(compiler._EXIT.items())},
    "topics of a device": {
        way: [str(topics.Topic("DEVICE", channel)).replace(names.shard("DEVICE"), "SHARD") for channel in channels]
        for way, channels in (("down", topics.Down), ("up", topics.Up))
    },
    "topics that are retained": sorted(topics.RETAINED),
    "topic of all devices": topics.POKE,
    "what a device subscribes to": list(topics.board_subscriptions("device")),
    "what a server subscribes to": list(topics.server_subscriptions()),
    "shards of some devices": {device: names.shard(device) for device in ("gate-1f2e3d4c", "kiosk-00000000")},
}
