"""Answers of commands with --json: one object each, by the full name of the command.

A value is the type of the whole object (its fields are in the API's description, /v1/openapi.json), or its keys, of
which a `?` at the end marks those that may be missing. Some commands have a second form, with an option.
`docs/cli.md` is written from this table, and tests hold every command to it.
"""

from typing import Final

import msgspec

from fleet.protocol import operator_api, trust_api
from fleet.protocol.operator_api import DeviceDetail, Freezes, GroupPolicy, Preflight, RolloutView

Shape = type[msgspec.Struct] | tuple[str, ...]

_EVENT: Final = ("published", "event?", "snapshot?", "file?", "missing?")
_DRY: Final = ("dry_run", "would", "devices")
_TOKEN: Final = ("name", "role", "token?")
_DATA: Final = ("dry_run", "target", "length", "sha256", "new")

ANSWERS: Final[dict[str, Shape | dict[str, Shape]]] = {
    "init": ("home", "fleet", "size", "namespace", "url", "warnings", "recovery", "event"),
    "operators list": trust_api.Operators,
    "operators add": _TOKEN,
    "operators rotate": _TOKEN,
    "operators revoke": trust_api.Operators,
    "consumers list": trust_api.Consumers,
    "consumers add": ("name", "group", "directory", "user", "brokers", "subscriptions", "ends"),
    "consumers revoke": trust_api.Consumers,
    "server backup": ("file", "bytes"),
    "server reconcile": operator_api.Reconciliation,
    "server key": ("file", "keyid", "public"),
    "server rebuild": ("url", "devices", "admitted", "lost"),
    "status": operator_api.Status,
    "push": {"": RolloutView, "--dry-run": Preflight},
    "publish": ("target", "length", "sha256", "manifest_sha256", "evidence", "new"),
    "deploy": {"": RolloutView, "--dry-run": Preflight},
    "withdraw": ("target", "revoked", "new", "running", "devices", "rollouts"),
    "data publish": {"": ("target", "length", "sha256", "manifest_sha256", "new"), "--dry-run": _DATA},
    "data push": {"": RolloutView, "--dry-run": Preflight},
    "data list": operator_api.Components,
    "components": operator_api.Components,
    "sbom show": ("target", "sha256", "evidence", "source", "packages", "provenance"),
    "component new": ("directory", "files"),
    "component build": ("file", "size_bytes", "command"),
    "component run": (
        *("type", "url?", "generation?", "swapped?", "compile_ms?", "start_ms?", "image_bytes?", "line?", "calls?"),
        *("p99_us?", "step?", "code?", "problem?", "log?", "message?", "size_bytes?", "elapsed_s?"),
    ),
    "component test": ("file", "ok", "tests"),
    "component inspect": {
        "": (
            *("size_bytes", "imports", "exports", "modules", "components", "producers", "custom", "plain"),
            *("triggers", "problem", "unserved", "notes", "component_toml"),
        ),
        "--write": ("file", "component_toml"),
    },
    "component check": (
        *("file", "ok", "checked_by", "problems", "notes", "excluded", "engine", "machine", "component_toml"),
    ),
    "component compose": ("output", "size_bytes", "adapter", "imports"),
    "rollouts": operator_api.Rollouts,
    "rollout show": RolloutView,
    "rollout pause": {"": RolloutView, "--dry-run": _DRY},
    "rollout resume": {"": RolloutView, "--dry-run": _DRY},
    "rollout approve": {"": RolloutView, "--dry-run": _DRY},
    "rollout abort": {"": RolloutView, "--dry-run": _DRY},
    "rollout retry": {"": RolloutView, "--dry-run": _DRY},
    "rollout cancel-device": {"": RolloutView, "--dry-run": _DRY},
    "rollout simulate": ("rates",),
    "freeze": {"": Freezes, "--dry-run": _DRY},
    "unfreeze": {"": Freezes, "--dry-run": _DRY},
    "bundle create": ("file", "bytes", "devices", "left_out", "good_until"),
    "undo": {"": RolloutView, "--dry-run": _DRY},
    "remove": {"": RolloutView, "--dry-run": Preflight},
    "devices": operator_api.Devices,
    "device show": {
        "": DeviceDetail,
        "--effective": ("effective",),
        "--diagnose": ("device", "file", "bytes", "command", "sealed_sha256"),
    },
    "device set": {"": DeviceDetail, "--dry-run": _DRY},
    "device unset": {"": DeviceDetail, "--dry-run": _DRY},
    "groups": operator_api.Groups,
    "group change": {"": operator_api.GroupRow, "--dry-run": _DRY},
    "group policy": GroupPolicy,
    "why": operator_api.Timeline,
    "enroll-token": operator_api.EnrollTokenReply,
    "image prepare": ("image", "file", "offset_bytes", "fleet"),
    "pin": {"": RolloutView, "--dry-run": Preflight},
    "unpin": {"": DeviceDetail, "--dry-run": _DRY},
    "retry": {"": DeviceDetail, "--dry-run": _DRY},
    "logs": ("time", "level", "device", "instance", "line"),
    "messages": operator_api.MessageView,
    "restart": {"": operator_api.CommandReply, "--dry-run": _DRY},
    "label": {"": DeviceDetail, "--dry-run": _DRY},
    "revoke": {"": DeviceDetail, "--dry-run": _DRY},
    "secret set": trust_api.SecretReply,
    "secret rotate": trust_api.SecretReply,
    "secret list": trust_api.Secrets,
    "secret rm": {"": trust_api.Secrets, "--dry-run": _DRY},
    "keys new": {"": ("name", "keyid", "file"), "--ci": _EVENT},
    "keys import": ("name", "keyid", "where"),
    "keys list": ("keys",),
    "keys show": ("name", "keyid", "where", "public"),
    "keys rotate": _EVENT,
    "keys revoke": _EVENT,
    "publisher keys": ("snapshot", "timestamp"),
    "ca status": trust_api.CaView,
    "ca renew": trust_api.CaView,
    "ca revoke": trust_api.CaView,
    "affected": ("question", "devices", "targets", "affected", "unknown"),
    "audit verify": ("devices",),
    "sign status": ("roles", "late"),
    "sign approve": _EVENT,
    "sign publish": _EVENT,
    "sign renew": _EVENT,
}


def shapes(name: str) -> dict[str, Shape]:
    """Return the forms of a command's answer, by the option that asks for each."""
    answer = ANSWERS[name]
    return answer if isinstance(answer, dict) else {"": answer}


def keys(shape: Shape) -> tuple[str, ...]:
    """Return the keys of an answer, those that may be missing with a `?`."""
    if isinstance(shape, tuple):
        return shape
    # a field that has its default value is left out of some answers
    optional = "?" if shape.__struct_config__.omit_defaults else ""
    return tuple(name + optional for name in shape.__struct_encode_fields__)


def fits(name: str, found: dict[str, object]) -> bool:
    """Tell whether an answer has the keys of one of its command's forms."""
    for shape in shapes(name).values():
        allowed = {each.rstrip("?") for each in keys(shape)}
        if {each for each in keys(shape) if not each.endswith("?")} <= found.keys() <= allowed:
            return True
    return False
