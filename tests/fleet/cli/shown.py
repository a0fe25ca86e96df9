"""Which command shows which answer of the server."""

from typing import get_type_hints

import msgspec

from fleet.client import Client

DEVICE = "gate-0a0a0a0a"

# Client method -> the request and the command that shows its answer
SHOWN: dict[str, tuple[tuple[str, str], tuple[str, ...]]] = {
    "status": (("GET", "/v1/status"), ("status",)),
    "groups": (("GET", "/v1/groups"), ("groups",)),
    "set_group": (("PUT", "/v1/groups/edge"), ("group", "edge", "--priority", "1")),
    "enroll_token": (("POST", "/v1/enroll-tokens"), ("enroll-token", "--group", "edge")),
    "ca": (("GET", "/v1/ca"), ("ca", "status")),
    "online": (("GET", "/v1/online"), ("sign", "status")),
    "operators": (("GET", "/v1/operators"), ("operators", "list")),
    "consumers": (("GET", "/v1/consumers"), ("consumers", "list")),
    "components": (("GET", "/v1/components"), ("components",)),
    "devices": (("GET", "/v1/devices"), ("devices",)),
    "device": (("GET", f"/v1/devices/{DEVICE}"), ("device", DEVICE)),
    "timeline": (("GET", f"/v1/devices/{DEVICE}/timeline"), ("why", DEVICE, "--log")),
    "label": (("PUT", f"/v1/devices/{DEVICE}/labels"), ("label", DEVICE, "site=berlin")),
    "set_keys": (("PUT", f"/v1/devices/{DEVICE}/keys"), ("device", "set", DEVICE, "hello", "room=attic")),
    "pin": (("PUT", f"/v1/devices/{DEVICE}/pin"), ("pin", DEVICE, "hello@1.0.0", "--detach")),
    "unpin": (("POST", f"/v1/devices/{DEVICE}/unpin"), ("unpin", DEVICE, "hello")),
    "retry": (("POST", f"/v1/devices/{DEVICE}/retry"), ("retry", DEVICE, "hello")),
    "command": (("POST", f"/v1/devices/{DEVICE}/command"), ("restart", DEVICE, "hello")),
    "logs": (("GET", f"/v1/devices/{DEVICE}/logs"), ("logs", "hello", "--device", DEVICE)),
    "revoke": (("POST", f"/v1/devices/{DEVICE}/revoke"), ("revoke", DEVICE, "--yes")),
    "reconcile": (("POST", "/v1/reconcile"), ("server", "reconcile", "--adopt", "--yes")),
    "secrets": (("GET", "/v1/secrets"), ("secret", "list")),
    "set_secret": (("PUT", "/v1/secrets/key"), ("secret", "set", "key", "--group", "edge", "--instance", "hello")),
    "remove_secret": (("POST", "/v1/secrets/key/remove"), ("secret", "rm", "key", "--group", "edge")),
    "withdrawal": (("GET", "/v1/withdrawal"), ("withdraw", "hello@1.0.0", "--dry-run")),
    "deploy": (("POST", "/v1/rollouts"), ("deploy", "hello@1.0.0", "--group", "edge")),
    "rollouts": (("GET", "/v1/rollouts"), ("rollouts",)),
    "rollout": (("GET", "/v1/rollouts/7"), ("rollout", "show", "7")),
    "act": (("POST", "/v1/rollouts/7/pause"), ("rollout", "pause", "7")),
    "abort": (("POST", "/v1/rollouts/7/abort"), ("rollout", "abort", "7")),
    "cancel_device": (("POST", "/v1/rollouts/7/cancel-device"), ("rollout", "cancel-device", "7", DEVICE)),
    "policy": (("GET", "/v1/groups/edge-eu/policy"), ("group", "policy", "edge-eu")),
    "set_policy": (("PUT", "/v1/groups/edge-eu/policy"), ("group", "policy", "edge-eu", "--clear")),
    "freeze": (("POST", "/v1/freeze"), ("freeze", "--reason", "fair")),
    "unfreeze": (("POST", "/v1/unfreeze"), ("unfreeze",)),
    "undo": (("POST", "/v1/undo"), ("undo",)),
    "remove": (("POST", "/v1/removals"), ("remove", "hello", "--group", "edge")),
}


def answers(name: str) -> type[msgspec.Struct] | None:
    kind = get_type_hints(getattr(Client, name)).get("return")
    return kind if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else None
