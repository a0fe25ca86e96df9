"""The operator's side of the HTTP API: a small synchronous client with the fleet's own CA pinned.

Each method is one route of `fleet.protocol.operator_api`. Requests are not retried: the caller knows whether that is
safe. Four errors say whose fault it is:

    ClientError
    ├── UnreachableError   network, address or certificate: the request did not reach the server
    ├── RequestError       the request itself: a name that fits no route
    ├── ProblemError       the server refused; `.problem` says what, why and what to do
    └── AnswerError        the client does not understand the server's answer
"""

import contextlib
import ipaddress
import mmap
import ssl
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import msgspec

from fleet.protocol import operator_api, trust_api, wire
from fleet.protocol.messages import ArchiveView, LogView
from fleet.protocol.operator_api import History
from fleet.protocol.printable import cleaned, is_plain
from fleet.protocol.trust_api import (
    CaView,
    ConsumerReply,
    ConsumerRequest,
    Consumers,
    IssuingRequest,
    OnlineRequest,
    OnlineView,
    OperatorReply,
    OperatorRequest,
    Operators,
    Role,
)

CHUNK_BYTES: Final = 64 * 1024
CONNECT_TIMEOUT_S: Final = 5.0
READ_TIMEOUT_S: Final = 30.0
_NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL; the ssl module has no name for it."""

V = TypeVar("V", bound=msgspec.Struct)

_GATEWAY: Final = frozenset({502, 503, 504})
"""Statuses with which a proxy says that the server behind it does not answer (RFC 9110, section 15.6)."""

_CHECK_SERVER: Final = "start it with 'fleet serve', or look at its log"
_CHECK_NETWORK: Final = "check the address in operator/config.toml and the network between"
_LISTINGS: Final = "'fleet devices', 'fleet groups' and 'fleet rollouts' list them"
_CHECK_HOME: Final = "use the --home of this fleet, or check that the address is right"


class ClientError(Exception):
    """Base of the errors between this machine and the server.

    Attributes:
        what, why, action: failure, reason and what to do, for people.
    """

    def __init__(self, what: str, why: str, action: str) -> None:
        super().__init__("; ".join(part for part in (what, why, action) if part))
        self.what, self.why, self.action = what, why, action


class UnreachableError(ClientError):
    """The request did not reach the server."""


class RequestError(ClientError):
    """The request is malformed: a name fits no route."""


class AnswerError(ClientError):
    """The answer does not follow this API, or follows a later version of it."""


class ProblemError(ClientError):
    """The server refused; `problem.type` is the word for programs, `problem.status` the HTTP status."""

    def __init__(self, problem: operator_api.Problem) -> None:
        super().__init__(problem.title, problem.detail, problem.action)
        self.problem = problem


class Client:
    """Connection to one fleet's server.

    Args:
        url: of the operators' listener, `https://host:port`.
        ca: PEM file with the fleet's CA; nothing else is trusted.
        token: the operator's bearer token.
        late: also accept a server certificate that has expired, to renew the CA behind it.
        clean: make every text of an answer printable, for whoever shows answers to people.

    Raises:
        UnreachableError: `ca` cannot be read as a certificate.
    """

    def __init__(
        self,
        *,
        url: str,
        ca: Path,
        token: str,
        late: bool = False,
        clean: bool = False,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._clean = clean
        try:
            context = ssl.create_default_context(cafile=str(ca))
        except (OSError, ssl.SSLError) as error:
            raise UnreachableError(
                f"cannot use the fleet's CA certificate {ca}",
                getattr(error, "strerror", None) or str(error),
                "copy operator/ca.pem from the machine where 'fleet init' ran",
            ) from error
        if late:
            context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
        self._http = httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {token}", "Accept": "application/json"},
            verify=context,
            trust_env=not _is_loopback(self.url),
            timeout=httpx.Timeout(READ_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            transport=transport,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    # the fleet

    def status(self) -> operator_api.Status:
        """Fetch the state of the fleet."""
        return self._get(operator_api.Status, "/v1/status")

    def groups(self) -> operator_api.Groups:
        """List the groups."""
        return self._get(operator_api.Groups, "/v1/groups")

    def set_group(self, name: str, request: operator_api.GroupRequest) -> operator_api.GroupRow:
        """Make or change a group."""
        return self._send(operator_api.GroupRow, "PUT", f"/v1/groups/{_quoted(name)}", request)

    def policy(self, group: str) -> operator_api.GroupPolicy:
        """Fetch the plan of a group."""
        return self._get(operator_api.GroupPolicy, f"/v1/groups/{_quoted(group)}/policy")

    def set_policy(self, group: str, request: operator_api.GroupPolicyRequest) -> operator_api.GroupPolicy:
        """Set or clear the plan of a group, or tell what it would be."""
        return self._send(operator_api.GroupPolicy, "PUT", f"/v1/groups/{_quoted(group)}/policy", request)

    def enroll_token(self, request: operator_api.EnrollTokenRequest) -> operator_api.EnrollTokenReply:
        """Create a one-time token for one device."""
        return self._send(operator_api.EnrollTokenReply, "POST", "/v1/enroll-tokens", request)

    def audit(self, *, limit: int) -> operator_api.Audit:
        """List the newest entries of the audit log."""
        return self._get(operator_api.Audit, "/v1/audit", {"limit": limit})

    # the CA and operators

    def ca(self) -> CaView:
        """Fetch the fleet's CA."""
        return self._get(CaView, "/v1/ca")

    def install_issuing(self, request: IssuingRequest) -> CaView:
        """Install an issuing CA that the root has signed."""
        return self._send(CaView, "PUT", "/v1/ca/issuing", request)

    def revoke_issuer(self, serial: str) -> CaView:
        """Stop accepting an issuing CA."""
        return self._send(CaView, "POST", f"/v1/ca/issuers/{_quoted(serial)}/revoke", None)

    def online(self, *, wait_s: int = 0) -> OnlineView:
        """Fetch the state of online signing; with `wait_s`, wait up to that long for a change to sign."""
        query = {"wait": wait_s} if wait_s else {}
        return self._get(OnlineView, "/v1/online", query, timeout_s=READ_TIMEOUT_S + wait_s)

    def countersign(self, request: OnlineRequest) -> OnlineView:
        """Upload signed snapshot and timestamp."""
        return self._send(OnlineView, "POST", "/v1/online", request)

    def discard_waiting(self) -> OnlineView:
        """Discard the change that waits for the signing host."""
        return self._send(OnlineView, "POST", "/v1/online/discard", None)

    def operators(self) -> Operators:
        """List the operators."""
        return self._get(Operators, "/v1/operators")

    def set_operator(self, name: str, role: Role) -> OperatorReply:
        """Add an operator, or give one another role and token."""
        return self._send(OperatorReply, "PUT", f"/v1/operators/{_quoted(name)}", OperatorRequest(role=role))

    def remove_operator(self, name: str) -> Operators:
        """Remove an operator."""
        return self._send(Operators, "POST", f"/v1/operators/{_quoted(name)}/remove", None)

    def consumers(self) -> Consumers:
        """List who reads messages from the broker."""
        return self._get(Consumers, "/v1/consumers")

    def add_consumer(self, wanted: ConsumerRequest) -> ConsumerReply:
        """Let a system read messages from the broker."""
        return self._send(ConsumerReply, "POST", "/v1/consumers", wanted)

    def revoke_consumer(self, name: str) -> Consumers:
        """Revoke a consumer, and end its connection."""
        return self._send(Consumers, "POST", f"/v1/consumers/{_quoted(name)}/revoke", None)

    # devices

    def devices(self, where: str = "") -> operator_api.Devices:
        """List the devices, every one or those that a selector takes."""
        return self._get(operator_api.Devices, "/v1/devices", {"where": where} if where else None)

    def device(self, device: str) -> operator_api.DeviceDetail:
        """Fetch one device in full."""
        return self._get(operator_api.DeviceDetail, f"/v1/devices/{_quoted(device)}")

    def timeline(self, device: str, *, limit: int) -> operator_api.Timeline:
        """Fetch the events of a device, newest first."""
        return self._get(operator_api.Timeline, f"/v1/devices/{_quoted(device)}/timeline", {"limit": limit})

    def messages(self, query: Mapping[str, str | int], *, wait_s: int = 0) -> operator_api.Messages:
        """Fetch messages of components, by the parameters of the route; wait up to `wait_s` for one."""
        asked = {name: value for name, value in query.items() if value != ""} | ({"wait": wait_s} if wait_s else {})
        return self._get(operator_api.Messages, "/v1/messages", asked, timeout_s=READ_TIMEOUT_S + wait_s)

    def history(self, device: str, *, boot_id: str = "", after: int = 0) -> History:
        """Fetch a page of a device's signed reports, after a position in them."""
        return self._get(History, f"/v1/devices/{_quoted(device)}/reports", {"boot_id": boot_id, "after": after})

    def label(self, device: str, request: operator_api.LabelsRequest) -> operator_api.DeviceDetail:
        """Set and remove labels."""
        return self._send(operator_api.DeviceDetail, "PUT", f"/v1/devices/{_quoted(device)}/labels", request)

    def set_keys(self, device: str, request: operator_api.KeysRequest) -> operator_api.DeviceDetail:
        """Set and remove a device's own configuration keys."""
        return self._send(operator_api.DeviceDetail, "PUT", f"/v1/devices/{_quoted(device)}/keys", request)

    def pin(self, device: str, request: operator_api.RolloutRequest) -> operator_api.RolloutView:
        """Give one device a target of its own."""
        return self._send(operator_api.RolloutView, "PUT", f"/v1/devices/{_quoted(device)}/pin", request)

    def unpin(self, device: str, instance: str) -> operator_api.DeviceDetail:
        """Let a device follow its groups again."""
        return self._send(
            operator_api.DeviceDetail,
            "POST",
            f"/v1/devices/{_quoted(device)}/unpin",
            operator_api.InstanceRequest(instance=instance),
        )

    def reconcile(self, request: operator_api.ReconcileRequest) -> operator_api.Reconciliation:
        """Decide on devices that are ahead of the server, or tell what would be done."""
        return self._send(operator_api.Reconciliation, "POST", "/v1/reconcile", request)

    def retry(self, device: str, instance: str) -> operator_api.DeviceDetail:
        """Retry a failed instance."""
        return self._send(
            operator_api.DeviceDetail,
            "POST",
            f"/v1/devices/{_quoted(device)}/retry",
            operator_api.InstanceRequest(instance=instance),
        )

    def command(self, device: str, request: operator_api.CommandRequest) -> operator_api.CommandReply:
        """Send a signed command."""
        return self._send(operator_api.CommandReply, "POST", f"/v1/devices/{_quoted(device)}/command", request)

    def logs(self, device: str, *, command: int, after: int, wait_s: int) -> LogView:
        """Fetch the log lines of a command after a position in them; wait up to `wait_s` for more."""
        query = {"command": command, "after": after, "wait": wait_s}
        return self._get(LogView, f"/v1/devices/{_quoted(device)}/logs", query, timeout_s=READ_TIMEOUT_S + wait_s)

    def archive_view(self, device: str, *, command: int, known: str, wait_s: int) -> ArchiveView:
        """Fetch the progress of an archive; wait up to `wait_s` for another step than the known one."""
        query: dict[str, str | int] = {"command": command, "wait": wait_s} | ({"known": known} if known else {})
        path = f"/v1/devices/{_quoted(device)}/diagnose"
        return self._get(ArchiveView, path, query, timeout_s=READ_TIMEOUT_S + wait_s)

    def archive(self, device: str, *, command: int) -> bytes:
        """Fetch a sealed archive, which the server then forgets."""
        path = f"/v1/devices/{_quoted(device)}/diagnose/archive"
        return self._checked(self._request("GET", path, params={"command": command})).content

    def revoke(self, device: str) -> operator_api.DeviceDetail:
        """Remove a device from the fleet."""
        return self._send(operator_api.DeviceDetail, "POST", f"/v1/devices/{_quoted(device)}/revoke", None)

    # publishing

    def components(self) -> operator_api.Components:
        """List the published targets."""
        return self._get(operator_api.Components, "/v1/components")

    def tuf(self, file: str) -> bytes | None:
        """Fetch a file of the TUF repository; None when there is none of that name."""
        response = self._request("GET", f"/v1/tuf/{_quoted(file)}")
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        return self._checked(response).content

    def desired(self, device: str) -> bytes | None:
        """Fetch a device's newest assignment in its envelope; None when there is none."""
        response = self._request("GET", f"/v1/devices/{_quoted(device)}/desired")
        return None if response.status_code == httpx.codes.NOT_FOUND else self._checked(response).content

    def has_artifact(self, sha256: str) -> bool:
        """Tell whether the server has these bytes."""
        response = self._request("HEAD", f"/v1/artifacts/{_quoted(sha256)}")
        if response.is_success or response.status_code == httpx.codes.NOT_FOUND:
            return response.is_success
        raise AnswerError(f"{self.url} answered {response.status_code}", "when asked for an artifact", _CHECK_SERVER)

    def artifact(self, sha256: str) -> bytes:
        """Fetch a component's bytes, unverified: check the hash."""
        return self._checked(self._request("GET", f"/v1/artifacts/{_quoted(sha256)}")).content

    def upload(
        self,
        sha256: str,
        data: bytes | mmap.mmap,
        *,
        progress: Callable[[int], None] | None = None,
        is_data: bool = False,
    ) -> operator_api.ArtifactReply:
        """Store an artifact; `progress` gets the size of each chunk in bytes as it is sent.

        `is_data`: of a data package, which may be larger than a component.
        """

        def chunks() -> Iterator[bytes]:
            for start in range(0, len(data), CHUNK_BYTES):
                chunk = data[start : start + CHUNK_BYTES]
                yield chunk
                if progress is not None:
                    progress(len(chunk))

        kind = operator_api.DATA_MEDIA_TYPE if is_data else "application/wasm"
        headers = {"Content-Length": str(len(data)), "Content-Type": kind}
        response = self._request("PUT", f"/v1/artifacts/{_quoted(sha256)}", content=chunks(), headers=headers)
        return self._decoded(operator_api.ArtifactReply, response)

    def publish_role(self, namespace: str, role: bytes) -> operator_api.RoleReply:
        """Publish the namespace's next role; a `ProblemError` with status 409 means that someone else was first."""
        headers = {"Content-Type": "application/json"}
        response = self._request("POST", f"/v1/roles/{_quoted(namespace)}", content=role, headers=headers)
        return self._decoded(operator_api.RoleReply, response)

    def publish_event(self, event: bytes) -> operator_api.RoleReply:
        """Publish a signing event; a `ProblemError` with status 409 means that someone else was first."""
        headers = {"Content-Type": "application/json"}
        return self._decoded(
            operator_api.RoleReply, self._request("POST", "/v1/signing-events", content=event, headers=headers)
        )

    # secrets

    def secrets(self) -> trust_api.Secrets:
        """List the secrets, without their values."""
        return self._get(trust_api.Secrets, "/v1/secrets")

    def sealing_keys(self, name: str, scope: trust_api.SecretScope) -> trust_api.SealingKeys:
        """Fetch the keys to seal the next version of a secret on this machine."""
        query = {"group": scope.group, "device": scope.device, "instance": scope.instance}
        return self._get(trust_api.SealingKeys, f"/v1/secrets/{_quoted(name)}/keys", query)

    def set_secret(self, name: str, request: trust_api.SecretRequest) -> trust_api.SecretReply:
        """Send the next version of a secret to devices."""
        return self._send(trust_api.SecretReply, "PUT", f"/v1/secrets/{_quoted(name)}", request)

    def remove_secret(self, name: str, scope: trust_api.SecretScope) -> trust_api.Secrets:
        """Take a secret from devices."""
        return self._send(trust_api.Secrets, "POST", f"/v1/secrets/{_quoted(name)}/remove", scope)

    def box(self, device: str, sha256: str) -> bytes:
        """Fetch a device's sealed box, unverified: check the hash."""
        return self._checked(self._request("GET", f"/v1/devices/{_quoted(device)}/secrets/{_quoted(sha256)}")).content

    # rollouts

    def preflight(self, request: operator_api.RolloutRequest) -> operator_api.Preflight:
        """Fetch the effect that a rollout would have."""
        return self._send(operator_api.Preflight, "POST", "/v1/preflight", request)

    def withdrawal(self, target: str) -> operator_api.WithdrawalView:
        """Fetch the effect that the withdrawal of a release would have."""
        return self._get(operator_api.WithdrawalView, "/v1/withdrawal", {"target": target})

    def deploy(self, request: operator_api.RolloutRequest) -> operator_api.RolloutView:
        """Start a rollout."""
        return self._send(operator_api.RolloutView, "POST", "/v1/rollouts", request)

    def rollouts(self, *, group: str = "", limit: int = 50) -> operator_api.Rollouts:
        """List the newest rollouts."""
        query: dict[str, str | int] = {"group": group, "limit": limit} if group else {"limit": limit}
        return self._get(operator_api.Rollouts, "/v1/rollouts", query)

    def rollout(self, rollout: str, *, wait_s: int = 0, since: int = 0) -> operator_api.RolloutView:
        """Fetch one rollout; with `wait_s`, return when its revision is above `since`, or after that time."""
        query = {"wait": wait_s, "since": since} if wait_s else {}
        return self._get(
            operator_api.RolloutView, f"/v1/rollouts/{_quoted(rollout)}", query, timeout_s=READ_TIMEOUT_S + wait_s
        )

    def act(self, rollout: str, verb: str) -> operator_api.RolloutView:
        """Pause, resume or abort a rollout."""
        return self._send(operator_api.RolloutView, "POST", f"/v1/rollouts/{_quoted(rollout)}/{verb}", None)

    def abort(self, rollout: str, *, keep: bool) -> operator_api.RolloutView:
        """Abort a rollout; with `keep` devices that have the version stay there, pinned."""
        body = operator_api.AbortRequest(keep=keep)
        return self._send(operator_api.RolloutView, "POST", f"/v1/rollouts/{_quoted(rollout)}/abort", body)

    def cancel_device(self, rollout: str, device: str) -> operator_api.RolloutView:
        """Leave one device out of a rollout."""
        body = operator_api.CancelRequest(device=device)
        return self._send(operator_api.RolloutView, "POST", f"/v1/rollouts/{_quoted(rollout)}/cancel-device", body)

    def freezes(self) -> operator_api.Freezes:
        """List the freezes in force."""
        return self._get(operator_api.Freezes, "/v1/freezes")

    def freeze(self, group: str, reason: str) -> operator_api.Freezes:
        """Pause every rollout of a group (empty: of the fleet), and refuse new ones."""
        return self._send(
            operator_api.Freezes, "POST", "/v1/freeze", operator_api.FreezeRequest(group=group, reason=reason)
        )

    def unfreeze(self, group: str) -> operator_api.Freezes:
        """End a freeze."""
        return self._send(operator_api.Freezes, "POST", "/v1/unfreeze", operator_api.UnfreezeRequest(group=group))

    def undo(self, request: operator_api.UndoRequest) -> operator_api.RolloutView:
        """Offer the previous state again."""
        return self._send(operator_api.RolloutView, "POST", "/v1/undo", request)

    def remove(self, request: operator_api.RemovalRequest) -> operator_api.RolloutView:
        """Remove an instance from a group or a device."""
        return self._send(operator_api.RolloutView, "POST", "/v1/removals", request)

    # requests

    def _get(
        self, kind: type[V], path: str, query: Mapping[str, str | int] | None = None, *, timeout_s: float | None = None
    ) -> V:
        extra: dict[str, Any] = {} if timeout_s is None else {"timeout": timeout_s}
        return self._decoded(kind, self._request("GET", path, params=query, **extra))

    def _send(self, kind: type[V], method: str, path: str, body: msgspec.Struct | None) -> V:
        headers = {"Content-Type": "application/json"}
        content = b"" if body is None else msgspec.json.encode(body)
        return self._decoded(kind, self._request(method, path, content=content, headers=headers))

    def _request(self, method: str, path: str, **how: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **how)
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, ValueError) as error:
            raise _unreachable(self.url, error) from error

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.is_success:
            return response
        try:
            problem = msgspec.json.decode(response.content, type=operator_api.Problem)
        except wire.JSON_ERRORS as error:
            if response.status_code in _GATEWAY:
                raise UnreachableError(
                    f"cannot reach the server at {self.url}",
                    f"a proxy in between answered {response.status_code} {response.reason_phrase}",
                    _CHECK_SERVER,
                ) from error
            raise AnswerError(
                f"{self.url} answered {response.status_code} {response.reason_phrase}",
                "which is not an answer of a wasmfleet server",
                "check the url in operator/config.toml and what listens there",
            ) from error
        raise ProblemError(cleaned(problem))

    def _decoded(self, kind: type[V], response: httpx.Response) -> V:
        content = self._checked(response).content
        try:
            value = msgspec.json.decode(content, type=kind)
            return cleaned(value) if self._clean and not is_plain(content) else value
        except wire.JSON_ERRORS as error:
            raise AnswerError(
                f"cannot understand the answer of {self.url}",
                str(error),
                "the server may be another version: compare 'fleet --version' on both machines",
            ) from error


def _unreachable(url: str, error: Exception) -> UnreachableError:
    """Name the reason why a request got no answer, and what to do."""
    text = str(error) or type(error).__name__
    match error:
        case httpx.ConnectTimeout():
            why, action = f"no connection within {CONNECT_TIMEOUT_S:g} s", _CHECK_NETWORK
        case httpx.TimeoutException():
            why, action = "the server accepted the connection and did not answer in time", _CHECK_SERVER
        case httpx.InvalidURL() | httpx.UnsupportedProtocol() | ValueError():
            why, action = text, 'write url = "https://HOST:PORT" in operator/config.toml'
        case _ if "CERTIFICATE_VERIFY_FAILED" in text:
            reason = text.partition("CERTIFICATE_VERIFY_FAILED] ")[2].partition(" (_ssl")[0] or text
            why, action = f"its certificate is not this fleet's: {reason}", _CHECK_HOME
        case httpx.ConnectError() if "refused" in text.lower():
            why, action = "connection refused, nothing listens there", _CHECK_SERVER
        case httpx.ConnectError():
            why, action = text, _CHECK_NETWORK
        case _:
            why, action = f"the connection was lost: {text}", _CHECK_SERVER
    return UnreachableError(f"cannot reach the server at {url}", why, action)


def _is_loopback(url: str) -> bool:
    """Tell whether a URL is on this machine, which requests reach without a proxy."""
    with contextlib.suppress(ValueError):
        host = urlsplit(url).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    return False


def _quoted(part: str) -> str:
    """Quote one segment of a path. Raises `RequestError` for text that no path can hold."""
    if part in {"", ".", ".."} or "/" in part:
        raise RequestError(f"{part[:80]!r} is not a name", "names are made of a-z, 0-9 and '-'", _LISTINGS)
    return quote(part, safe="")
