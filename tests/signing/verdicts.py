"""Reject code of a caught exception."""

import pytest

from fleet.protocol.codes import RejectCode
from signing.errors import Rejected


def code_of(verdict: pytest.ExceptionInfo[Rejected]) -> RejectCode:
    return verdict.value.code
