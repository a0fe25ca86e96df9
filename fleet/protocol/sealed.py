"""The part of the operator API that is about secrets. A value goes in by `SecretRequest` alone and never comes out."""

import msgspec

from fleet.protocol.api import Body, View
from fleet.protocol.caps import Count, Stored


class Box(Body, frozen=True, kw_only=True):
    """A box that was sealed for one board on the operator's machine; base64 (`signing.sealing`)."""

    device: str
    box: str


class SecretRequest(Body, frozen=True, kw_only=True):
    """`PUT /v1/secrets/{name}`: the next version of a secret, for the boards that belong to a group now, or for one.

    Attributes:
        instance: whose secret; empty where one instance of these boards alone declares a secret of that name.
        group, device: exactly one of them.
        value: to be sealed by the server, which forgets it; empty with `boxes`.
        boxes: sealed already, one for each board; of the version that `SealingKeys` told.
        rotate: refuse unless there is a version that this one replaces.
        ahead: keep it although what runs declares no such secret: for a version that is still to be deployed.
    """

    instance: str = ""
    group: str = ""
    device: str = ""
    value: str = ""
    boxes: tuple[Box, ...] = ()
    version: Count = 0
    rotate: bool = False
    ahead: bool = False

    def __repr__(self) -> str:
        """Without the value, wherever it is printed."""
        return f"SecretRequest(instance={self.instance!r}, group={self.group!r}, device={self.device!r})"


class SecretReply(View, frozen=True, kw_only=True):
    """Which boards have it now.

    Attributes:
        boards: that it was sealed for.
        unsealable: that have no sealing key: enrolled by an agent of before.
    """

    name: str
    instance: str
    version: Stored
    boards: tuple[str, ...] = ()
    unsealable: tuple[str, ...] = ()


class SecretScope(Body, frozen=True, kw_only=True):
    """`POST /v1/secrets/{name}/remove`: whose secret, on which boards."""

    instance: str = ""
    group: str = ""
    device: str = ""


class BoardKey(View, frozen=True, kw_only=True):
    """A board's sealing key by its own word: `proof` is signed by the key of the certificate."""

    device: str
    proof: str
    certificate_pem: str


class SealingKeys(View, frozen=True, kw_only=True):
    """`GET /v1/secrets/{name}/keys`: what is needed to seal the next version on the operator's machine."""

    fleet: str
    name: str
    instance: str
    version: Stored
    boards: tuple[BoardKey, ...] = ()


class Holding(View, frozen=True, kw_only=True):
    """A board that has a box.

    Attributes:
        sealed: `server`, which saw the value then, or `operator`, and it did not.
    """

    device: str
    version: Stored
    at: str
    by: str
    sealed: str


class SecretRow(View, frozen=True, kw_only=True):
    """One secret of one instance; `lacking` boards should run the instance and have no box of it."""

    instance: str
    name: str
    version: Stored
    boards: tuple[Holding, ...] = ()
    lacking: tuple[str, ...] = ()


class Secrets(View, frozen=True, kw_only=True):
    """`GET /v1/secrets`: every secret, without any value."""

    secrets: tuple[SecretRow, ...] = ()


class SealedBox(msgspec.Struct, frozen=True, kw_only=True):
    """A box on its way into the store."""

    device: str
    box: bytes
    sealed: str
