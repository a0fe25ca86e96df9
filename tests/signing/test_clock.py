"""Clock set forward: expired documents are refused, and nothing of the false time is remembered."""

from datetime import timedelta

import pytest

from fleet.protocol.codes import RejectCode
from signing.errors import Rejected
from tests.simulator.repository import START, Device, Repository


@pytest.mark.parametrize("days", [3, 15, 400, 4000], ids=["timestamp", "snapshot", "targets", "root"])
def test_a_clock_set_forward_stops_updates_and_changes_no_state(days: int) -> None:
    repo = Repository()
    device = Device(repo)
    device.accept(repo.assign(repo.publish()))
    before = device.state

    next_one = repo.assign(repo.publish("1.0.1"))

    # An attacker spoofs the time source: every document that expires before the false time is refused.
    repo.now = START + timedelta(days=days)
    with pytest.raises(Rejected) as verdict:
        device.accept(next_one)
    assert verdict.value.code is RejectCode.EXPIRED
    assert device.state.floor == before.floor, "the floor rises with what is accepted, and not with a clock"

    # With the right time, the same documents are accepted, and the device continues.
    repo.now = START + timedelta(hours=1)
    device.accept(next_one)
    assert device.state.floor < START + timedelta(days=1)
