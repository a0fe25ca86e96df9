"""The part of the operator API that is about operators themselves."""

from enum import StrEnum

from fleet.protocol.api import Body, View
from fleet.protocol.caps import Utc


class Role(StrEnum):
    """What an operator may do."""

    VIEWER = "viewer"  # look
    OPERATOR = "operator"  # and change what boards run
    ADMIN = "admin"  # and say who else may


class OperatorRow(View, frozen=True, kw_only=True):
    """An operator."""

    name: str
    role: Role
    created_at: Utc


class Operators(View, frozen=True, kw_only=True):
    """Every operator."""

    operators: tuple[OperatorRow, ...] = ()


class OperatorRequest(Body, frozen=True, kw_only=True):
    """Let an operator in, or give one another role and a new token."""

    role: Role = Role.OPERATOR


class OperatorReply(View, frozen=True, kw_only=True):
    """The operator's token, shown once: the server keeps its hash only."""

    name: str
    role: Role
    token: str
