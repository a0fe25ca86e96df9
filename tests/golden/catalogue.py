"""The stable names of everything that leaves a process: the one place where golden files meet the names of classes.

A name here is a word of the wire and stays when a class or a module is renamed: then only imports and the right side
change. Messages with a tag are called by it.
"""

import enum
from typing import get_args

import msgspec

from agent import config, disk, starts
from agent.host import cli, processes
from agent.host.compiler import __main__
from agent.host.engine import guest, runtime
from agent.host.http import ingress_config, routing
from agent.host.ipc import frames, helper_api, host_api, keyvalue_api, message_api, worker_api
from agent.host.sandbox import sandbox
from agent.identity import identity
from agent.link import bundle, https, partial_file
from agent.report import archive_sender, check, spool, status
from agent.update import images, machine, plan, probation, restore, state
from fleet.admin import signing_host
from fleet.cli import audit as cli_audit
from fleet.cli import trust_store
from fleet.cli.base import Exit
from fleet.component import reader, wasi
from fleet.evidence import provenance, query, sbom
from fleet.protocol import (
    assignment,
    codes,
    component_check,
    hardware,
    manifest,
    messages,
    metrics,
    names,
    operator_api,
    topics,
    trust_api,
    wire,
)
from fleet.protocol import names as bundle_layout
from fleet.rollout import decide, effective, members, model, selector, steady
from fleet.server import director as server_director
from fleet.server import tuf_repository as server_repository
from fleet.server.api import routes
from fleet.store import consumers, delivery, readings, rows
from signing import device_statements, dsse, events, keyring, keys, metadata, rotation, sealing
from signing import state as verifier_state


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
        **_tagged(assignment.CheckIn, assignment.Restart, assignment.FollowLogs, assignment.Diagnose),
        "later-command": assignment.LaterCommand,
        "later-verb": assignment.LaterVerb,
        "manifest": manifest.Manifest,
        "trigger-http": manifest.Http,
        "trigger-schedule": manifest.Schedule,
        "trigger-message": manifest.OnMessage,
        "trigger-service": manifest.Service,
        "trigger-data": manifest.Data,
        "data-use": manifest.DataUse,
        "grants": manifest.Grants,
        "hardware": hardware.Hardware,
        "gpio-line": hardware.GpioLine,
        "serial-port": hardware.SerialPort,
        "limits": manifest.Limits,
        "health-check": manifest.Health,
        "metric-gate": manifest.MetricGate,
        "config-key": manifest.ConfigKey,
        "secret-key": manifest.SecretKey,
        "evidence": manifest.Evidence,
        "sealing-key": sealing.SealingKey,
        "purpose-of-a-box": sealing.Purpose,
        "purpose-of-an-archive": sealing.ArchivePurpose,
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
        "figures-of-a-device": messages.DeviceResources,
        "figures-of-an-instance": messages.InstanceHealth,
        "health-checks-of-an-instance": messages.HealthChecks,
        "figures-that-stay-on-the-device": messages.LocalFigures,
        "metric-of-a-component": metrics.Metric,
        "readings-kept-by-a-device": messages.ReadingsHealth,
        "queue-of-an-instance": messages.QueueHealth,
        "readings": messages.Readings,
        "reading": messages.Reading,
        "readings-ack": messages.ReadingsAck,
        "report": messages.Report,
        "desired-reply": messages.DesiredReply,
        "ack": messages.Ack,
        "packet": messages.Packet,
        "exchange": messages.Exchange,
        "exchange-reply": messages.ExchangeReply,
        "poke": messages.Poke,
        "token": messages.Token,
        "enrol-request": messages.EnrolRequest,
        "enrolled": messages.Enrolled,
        "renew-request": messages.RenewRequest,
        "renew-reply": messages.RenewReply,
        "log-chunk": messages.LogChunk,
        "log-answer": messages.LogAnswer,
        "log-view": messages.LogView,
        "archive-note": messages.ArchiveNote,
        "archive-taken": messages.ArchiveTaken,
        "archive-view": messages.ArchiveView,
    },
    "operator": {
        "problem": operator_api.Problem,
        "abort-request": operator_api.AbortRequest,
        "cancel-request": operator_api.CancelRequest,
        "freeze-request": operator_api.FreezeRequest,
        "unfreeze-request": operator_api.UnfreezeRequest,
        "freezes": operator_api.Freezes,
        "published-role": operator_api.Published,
        "status": operator_api.Status,
        "device-row": operator_api.DeviceRow,
        "devices": operator_api.Devices,
        "effective-key": operator_api.EffectiveKey,
        "effective": operator_api.Effective,
        "device-detail": operator_api.DeviceDetail,
        "timeline-entry": operator_api.TimelineEntry,
        "device-alert": operator_api.Alert,
        "timeline": operator_api.Timeline,
        "message": operator_api.MessageView,
        "messages": operator_api.Messages,
        "labels-request": operator_api.LabelsRequest,
        "keys-request": operator_api.KeysRequest,
        "instance-request": operator_api.InstanceRequest,
        "command-request": operator_api.CommandRequest,
        "command-reply": operator_api.CommandReply,
        "settled": operator_api.Settled,
        "group-row": operator_api.GroupRow,
        "groups": operator_api.Groups,
        "group-request": operator_api.GroupRequest,
        "plan-stage": operator_api.PlanStage,
        "plan-limits": operator_api.PlanLimits,
        "plan-budget": operator_api.PlanBudget,
        "group-plan": operator_api.GroupPlan,
        "group-policy-request": operator_api.GroupPolicyRequest,
        "stage": operator_api.StageView,
        "group-policy": operator_api.GroupPolicy,
        "enroll-token-request": operator_api.EnrollTokenRequest,
        "enroll-token-reply": operator_api.EnrollTokenReply,
        "component-row": operator_api.ComponentRow,
        "components": operator_api.Components,
        "artifact-reply": operator_api.ArtifactReply,
        "role-reply": operator_api.RoleReply,
        "rollout-request": operator_api.RolloutRequest,
        "removal-request": operator_api.RemovalRequest,
        "undo-request": operator_api.UndoRequest,
        "rollout-device": operator_api.RolloutDevice,
        "rollout-wave": operator_api.WaveView,
        "rollout": operator_api.RolloutView,
        "rollouts": operator_api.Rollouts,
        "excluded": operator_api.Excluded,
        "preflight": operator_api.Preflight,
        "component-check-request": component_check.ComponentCheckRequest,
        "component-check-reply": component_check.ComponentCheckReply,
        "withdrawn-device": operator_api.WithdrawnDevice,
        "withdrawal": operator_api.WithdrawalView,
        "audit-entry": operator_api.AuditEntry,
        "audit": operator_api.Audit,
        "device-ahead": operator_api.AheadDevice,
        "reconcile-request": operator_api.ReconcileRequest,
        "reconciliation": operator_api.Reconciliation,
        "history": operator_api.History,
        "issuing-request": trust_api.IssuingRequest,
        "issuer": trust_api.Issuer,
        "ca": trust_api.CaView,
        "online-request": trust_api.OnlineRequest,
        "online": trust_api.OnlineView,
        "operator-request": trust_api.OperatorRequest,
        "operator-reply": trust_api.OperatorReply,
        "operator-row": trust_api.OperatorRow,
        "operators": trust_api.Operators,
        "consumer-request": trust_api.ConsumerRequest,
        "consumer-reply": trust_api.ConsumerReply,
        "consumer": trust_api.ConsumerView,
        "consumers": trust_api.Consumers,
        "box": trust_api.Box,
        "secret-request": trust_api.SecretRequest,
        "secret-reply": trust_api.SecretReply,
        "secret-scope": trust_api.SecretScope,
        "secret-row": trust_api.SecretRow,
        "secret-holding": trust_api.Holding,
        "secrets": trust_api.Secrets,
        "sealing-key-of-a-device": trust_api.DeviceKey,
        "sealing-keys": trust_api.SealingKeys,
        "sealed-box": trust_api.SealedBox,
    },
    "host": {
        **_tagged(*get_args(host_api.Request), *get_args(host_api.FromHost)),
        **_tagged(host_api.EarlierPutSecrets, host_api.EarlierHostStats),
        "what-to-run": host_api.Run,
        "what-runs": host_api.Running,
        "route-to-an-instance": host_api.RouteView,
        "message-of-a-component": host_api.Message,
    },
    "worker": {
        **_tagged(*get_args(worker_api.ToWorker), *get_args(worker_api.FromWorker), *get_args(worker_api.Earlier)),
        "publish": message_api.Publish,
        "published": message_api.Published,
    },
    "router-and-egress": {
        **_tagged(*get_args(helper_api.ToRouter), helper_api.RegisterWorker),
        **_tagged(*(each for each in get_args(helper_api.FromRouter) if each is not helper_api.RouteAcknowledged)),
        "route-rule": helper_api.RouteRule,
        "forwarded-policy": helper_api.ForwardedPolicy,
        "tls-client": helper_api.TlsClient,
        "ingress-toml": ingress_config._File,
        "ingress-toml-route": ingress_config._Route,
        "ingress-toml-forwarded": ingress_config._Forwarded,
        "ingress-toml-tls": ingress_config.Tls,
        "ingress-toml-certificate": ingress_config.Certificate,
        "route acknowledged": helper_api.RouteAcknowledged,
        "ask": helper_api.ConnectRequest,
        "look up": helper_api.LookupRequest,
        "told": helper_api.ConnectReply,
    },
    "key-value-store": {
        "user": keyvalue_api.RegisterUser,
        "request": keyvalue_api.Request,
        "reply": keyvalue_api.Reply,
    },
    "kept-by-the-agent": {
        "agent-toml": config.Settings,
        "agent-toml-policy": config.Policy,
        "agent-toml-network": config.Network,
        "agent-toml-disk": config.Disk,
        "agent-toml-uplink": config.UplinkSettings,
        "agent-toml-uplink-readings": config.ReadingsSettings,
        "committed": state.Committed,
        "change": state.Change,
        "change-state": machine.State,
        "replaced-figures": probation.ProbationSample,
        "metric-of-a-replaced-version": probation.MetricSample,
        "failed": state.FailedItem,
        "doubt": state.Violation,
        "runset": restore._Runset,
        "starts": starts.StartLog,
        "message-to-keep": spool.Draft,
        "segment-head": spool._Head,
        "segment-record": spool._Record,
        "checkpoint-of-a-partial-file": partial_file.Checkpoint,
        "archive-request": archive_sender.ArchiveRequest,
        "identity": identity.Identity,
        "verifier-state": verifier_state.VerifierState,
        "verifier-state-role": verifier_state.Remembered,
        "image-note": images._Note,
        "bundle-outcome": bundle.BundleVerdict,
        "compiler-refusal": images._CompilerResult,
    },
    "told-by-fleet-agent": {
        "process": processes.ProcessFigures,
        "check": check.Result,
        "standing": status.StatusReport,
        "running": status.Running,
        "changing": status.Changing,
        "failed": status.Failed,
    },
    "kept-by-the-server": {
        "device": rows.DeviceRow,
        "alert": rows.AlertRow,
        "group": rows.GroupRow,
        "token": rows.TokenRow,
        "operator": rows.OperatorRow,
        "certificate": rows.CertificateRow,
        "settled": rows.SettledRow,
        "rollout": rows.RolloutRow,
        "rollout-value": model.Value,
        "rollout-plan": rows.RolloutPlan,
        "rollout-progress": decide.Rollout,
        "rollout-gate": decide.Gate,
        "rollout-limits": decide.Limits,
        "rollout-stage": members.Stage,
        "rollout-amount": members.Amount,
        "rollout-fitness": effective.Fitness,
        "rollout-device": model.Member,
        "steady-witness": steady.Witness,
        "rollout-device-extra": rows.Extra,
        "assignment": rows.AssignmentRow,
        "report": rows.ReportRow,
        "reading": readings.ReadingRow,
        "consumer": consumers.ConsumerRow,
        "event": rows.EventRow,
        "audit": rows.AuditRow,
        "box": delivery.BoxRow,
    },
    "kept-by-the-operator": {
        "audit-seen": device_statements.Seen,
        "audit-place": trust_store.Place,
        "audit-memory": trust_store.DeviceMemory,
        "audit-memory-before": trust_store._DeviceMemoryBefore,
        "audit-shown": cli_audit._Shown,
    },
    # what is read of a larger document, most of them of somebody else's making
    "read-in-part": {
        "schema-version": wire._Version,
        "bundle-head": bundle._Head,
        "problem": https.Problem,
        "role": server_repository._File,
        "role-signed": server_repository._Signed,
        "wanted": server_director._Wanted,
        "role-head": signing_host._Head,
        "role-version": signing_host._Version,
        "crate": sbom._Crate,
        "provenance-subject": provenance._Subject,
        "provenance-resource": provenance._Resource,
        "provenance-definition": provenance._Definition,
        "provenance-builder": provenance._Builder,
        "provenance-run": provenance._Run,
        "provenance-predicate": provenance._Predicate,
    },
}

# Structs that others are made from and that travel nowhere themselves.
BASES: frozenset[type] = frozenset({wire.Message, assignment.Verb, operator_api.Body, operator_api.View})

# stable name -> classes that hold the same words
VOCABULARIES: dict[str, tuple[type[enum.Enum], ...]] = {
    "reject-code": (codes.RejectCode,),
    "phase": (codes.Phase,),
    "component-check-step": (component_check.Step,),
    "call-outcome": (codes.CallOutcome,),
    "instance-state": (codes.InstanceState,),
    "alert-kind": (codes.AlertKind,),
    "rollout-outcome": (codes.Outcome,),
    "rollout-state": (codes.RolloutState,),
    "cause-of-a-pause": (codes.PauseCause,),
    "consequence-of-a-breach": (codes.OnBreach,),
    "role-of-an-operator": (trust_api.Role,),
    "fleet-size": (rotation.Size,),
    "key-format": (keys.Format,),
    "component-fault": (reader.Fault,),
    "counter-of-a-change": (machine.Counter,),
    "topic-down": (topics.Down,),
    "topic-up": (topics.Up,),
    "affected-answer": (query.Answer,),
    "kind-of-a-frame": (frames.Kind,),
    "turn-of-a-loop": (guest.Turn,),
    "fleet-exit-code": (Exit,),
}

# Words and structs between functions of one process.
INTERNAL: frozenset[type] = frozenset(
    {routes.Access, machine.Event, machine.Effect, probation.Verdict, plan.Act, plan.Gate}
    | {model.Expected, model.Observation, selector.Kind, disk.Write, disk.Point}
)

# stable name -> words that are constants
CONSTANTS: dict[str, object] = {
    "reject codes that are tried again": sorted(codes.RETRYABLE),
    "outcome of each reject code": {str(code): str(outcome) for code, outcome in sorted(codes.CODE_OUTCOMES.items())},
    "media type of an assignment": assignment.ASSIGNMENT_TYPE,
    "media type of a freshness statement": assignment.FRESH_TYPE,
    "media type of a command": assignment.COMMAND_TYPE,
    "media type of a report": device_statements.REPORT_TYPE,
    "media type of a sealing key": sealing.SEALING_TYPE,
    "media type of provenance": provenance.PAYLOAD_TYPE,
    "context of a sealed box": sealing._INFO.decode(),
    "format of a sealed box": sealing.FORMAT,
    "signed field: ceiling of a delegation": metadata.CEILING,
    "signed field: revoked targets": metadata.REVOKED,
    "signed field: profile of root": metadata.PROFILE,
    "latency bounds (ms)": list(messages.LATENCY_BOUNDS_MS),
    "an enrolment token begins with": messages.TOKEN_PREFIX,
    "problem of a certificate that is over": messages.EXPIRED,
    "problem of a certificate of an old issuer": messages.OUTDATED,
    "kinds of evidence": [manifest.CYCLONEDX, manifest.SPDX, manifest.PROVENANCE],
    "members of a bundle": [
        bundle_layout.HEAD,
        bundle_layout.desired("DEVICE"),
        bundle_layout.metadata("FILE"),
        bundle_layout.artifact("SHA256"),
        bundle_layout.secret("SHA256"),
    ],
    "version of a bundle": bundle_layout.VERSION,
    "layers of containment": list(sandbox.LAYERS),
    "ways to run a host": list(sandbox.WAYS),
    "exports and imports with a meaning": sorted(
        [runtime.HANDLER, runtime.HEALTH, runtime.TASK, runtime.STATE, wasi.LOGGING, *wasi.CONFIG]
    ),
    "header that counts hops": routing.HOPS_HEADER.decode(),
    "file with the reason why the host did not start": host_api.WHY_NOT,
    "exit status of a host below its minimum": cli._STATUS_BELOW_MINIMUM,
    "exit status of the compiler": {str(code): status for code, status in sorted(__main__._EXIT.items())},
    "topics of a device": {
        way: [str(topics.Topic("DEVICE", channel)).replace(names.shard("DEVICE"), "SHARD") for channel in channels]
        for way, channels in (("down", topics.Down), ("up", topics.Up))
    },
    "topics that are retained": sorted(topics.RETAINED),
    "topic of all devices": topics.POKE,
    "what a device subscribes to": list(topics.device_subscriptions("device")),
    "what a server subscribes to": list(topics.server_subscriptions()),
    "shards of some devices": {device: names.shard(device) for device in ("gate-1f2e3d4c", "kiosk-00000000")},
}
