"""Operator API: operators, CA, online roles, secrets.

A secret's value goes in by `SecretRequest` alone and never comes out. Online roles are snapshot and timestamp, which
may be signed on another host than the server, the signing host.
"""

from enum import StrEnum
from typing import Annotated, Final

import msgspec

from fleet.protocol.bounds import DEVICES_MAX, Count, Document, Stored, Utc, Word
from fleet.protocol.operator_api import Body, View


class Role(StrEnum):
    """Role of an operator."""

    SCRAPER = "scraper"  # read the server's metrics, and nothing else
    VIEWER = "viewer"  # look
    OPERATOR = "operator"  # and change desired states
    ADMIN = "admin"  # and manage operators


class OperatorRow(View, frozen=True, kw_only=True):
    """An operator."""

    name: str
    role: Role
    created_at: Utc


class Operators(View, frozen=True, kw_only=True):
    """Every operator."""

    operators: tuple[OperatorRow, ...] = ()


class OperatorRequest(Body, frozen=True, kw_only=True):
    """Add an operator, or give one another role and a new token."""

    role: Role = Role.OPERATOR


class OperatorReply(View, frozen=True, kw_only=True):
    """The operator's token, shown once: the server keeps its hash only."""

    name: str
    role: Role
    token: str


class ConsumerRequest(Body, frozen=True, kw_only=True):
    """Let a system of the operator read messages of components from the broker.

    Attributes:
        group: whose devices' messages.
        topics: filters of the components' topics.
        request: PKCS#10 in PEM, signed by the key of the new certificate.
    """

    name: Word
    group: Word
    topics: Annotated[tuple[Word, ...], msgspec.Meta(max_length=100)]
    request: Document


class ConsumerView(View, frozen=True, kw_only=True):
    """A consumer; `ends` with its certificate."""

    name: str
    group: str
    topics: tuple[str, ...]
    created_at: Utc
    ends: Utc


class Consumers(View, frozen=True, kw_only=True):
    """Every consumer."""

    consumers: tuple[ConsumerView, ...] = ()


class ConsumerReply(View, frozen=True, kw_only=True):
    """New consumer: its certificate, and what it subscribes to at which broker.

    Attributes:
        user: of the broker, the CN of the certificate.
        subscriptions: filters of the broker's topics, all that it may read.
        certificate, ca: PEM.
    """

    name: str
    user: str
    group: str
    subscriptions: tuple[str, ...]
    brokers: tuple[str, ...]
    certificate: str
    ca: str
    ends: Utc


class Issuer(View, frozen=True, kw_only=True):
    """An issuer whose certificates are accepted; `serial` in hex."""

    serial: str
    name: str
    ends: Utc
    current: bool = False


class CaView(View, frozen=True, kw_only=True):
    """The fleet's CA as its server has it.

    Attributes:
        root_sha256: of the root's certificate, DER, in hex: what devices pin.
        root_on_server: the server of a development fleet issues with the root itself.
        issuers: accepted issuers, the one in use first.
        request: for the next issuing CA, PKCS#10 in PEM; the operator signs it with the root.
    """

    root_sha256: str
    root_on_server: bool
    issuers: tuple[Issuer, ...]
    request: str


class IssuingRequest(Body, frozen=True, kw_only=True):
    """The issuing CA that the operator signed, PEM."""

    issuing_pem: Document


NONE: Final = msgspec.Raw(b"null")
"""No snapshot: the newest one remains valid."""


class OnlineView(View, frozen=True, kw_only=True):
    """Host that signs snapshot and timestamp, and the event that waits for it.

    Attributes:
        elsewhere: the server does not hold their keys; a signing host signs.
        snapshot, timestamp: versions that devices see.
        waiting: the signing event that is published as soon as both are signed over it; empty for none.
        problems: sentences for people.
    """

    elsewhere: bool
    snapshot: Stored
    timestamp: Stored
    waiting: str = ""
    problems: tuple[str, ...] = ()


class OnlineRequest(Body, frozen=True, kw_only=True):
    """Snapshot (where it changed) and timestamp, signed. The server verifies their signatures."""

    timestamp: msgspec.Raw
    snapshot: msgspec.Raw = msgspec.field(default_factory=lambda: NONE)  # a schema cannot show a raw default


class Box(Body, frozen=True, kw_only=True):
    """A box that was sealed for one device on the operator's machine; base64 (`signing.sealing`)."""

    device: Word
    box: Document


class SecretRequest(Body, frozen=True, kw_only=True):
    """`PUT /v1/secrets/{name}`: the next version of a secret, for the devices that belong to a group now, or for one.

    Attributes:
        instance: its owner; may be empty where one instance on these devices declares a secret of that name.
        group, device: exactly one of them.
        value: plain text, which the server seals and forgets; empty with `boxes`.
        boxes: sealed by the operator, one for each device, for the version in `SealingKeys`.
        rotate: refuse unless there is a version that this one replaces.
        ahead: accept a secret that no running version declares, for one that is still to be deployed.
    """

    instance: Word = ""
    group: Word = ""
    device: Word = ""
    value: Document = ""
    boxes: Annotated[tuple[Box, ...], msgspec.Meta(max_length=DEVICES_MAX)] = ()
    version: Count = 0
    rotate: bool = False
    ahead: bool = False

    def __repr__(self) -> str:
        """Leave out the value wherever the request is printed."""
        return f"SecretRequest(instance={self.instance!r}, group={self.group!r}, device={self.device!r})"


class SecretReply(View, frozen=True, kw_only=True):
    """Devices that have a secret now.

    Attributes:
        devices: ids of the devices that it was sealed for.
        unsealable: ids of devices without a sealing key, enrolled with an older agent.
    """

    name: str
    instance: str
    version: Stored
    devices: tuple[str, ...]
    unsealable: tuple[str, ...] = ()


class SecretScope(Body, frozen=True, kw_only=True):
    """`POST /v1/secrets/{name}/remove`: the secret of an instance, on a group or a device."""

    instance: Word = ""
    group: Word = ""
    device: Word = ""


class DeviceKey(View, frozen=True, kw_only=True):
    """Sealing key of a device: `proof` is signed by the key of its certificate."""

    device: str
    proof: str
    certificate_pem: str


class SealingKeys(View, frozen=True, kw_only=True):
    """`GET /v1/secrets/{name}/keys`: keys to seal the next version on the operator's machine."""

    fleet: str
    name: str
    instance: str
    version: Stored
    devices: tuple[DeviceKey, ...]


class Holding(View, frozen=True, kw_only=True):
    """A device that has a box.

    Attributes:
        sealed: `server` (which saw the value) or `operator` (the server never saw it).
    """

    device: str
    version: Stored
    at: str
    by: str
    sealed: str


class SecretRow(View, frozen=True, kw_only=True):
    """Secret of one instance; `lacking` devices should run the instance and have no box of it."""

    instance: str
    name: str
    version: Stored
    devices: tuple[Holding, ...] = ()
    lacking: tuple[str, ...] = ()


class Secrets(View, frozen=True, kw_only=True):
    """`GET /v1/secrets`: every secret, without any value."""

    secrets: tuple[SecretRow, ...] = ()


class SealedBox(msgspec.Struct, frozen=True, kw_only=True):
    """A box on its way into the store."""

    device: str
    box: bytes
    sealed: str
