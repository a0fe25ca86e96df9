"""Swaps under load without a lost request, and rollbacks by the device and by the operator."""

import pytest

from fleet.demo.load import Load
from fleet.protocol.codes import Phase
from tests.e2e.stage import HELLO

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def load_on(device):
    """Half of the clients keep their connection; one request in ten is a POST; none retries."""
    return Load(port=device.port, path=f"/{HELLO}/", kept_alive=3, fresh=3, pause_s=0.005, post_every=10)


def test_a_new_version_takes_over_and_nobody_notices(stage, device):
    async def story():
        async with load_on(device) as load:
            await load.sent(200)
            await stage.pushed("v2.wasm")
            await load.sent(200)
            return await load.stop()

    result = stage.do(story())
    assert result.lost == 0, result.losses
    assert result.by_version["1"] > 0
    assert result.by_version["2"] > 0
    assert result.posts * 9 <= result.sent <= result.posts * 11


def test_one_that_traps_under_traffic_is_taken_back_by_the_device(stage, device):
    # v3 passes its checks and its first calls, and then traps at every call
    async def story():
        async with load_on(device) as load:
            await load.sent(100)
            code, output, _ = await stage.push("v3.wasm")
            rolled_back = await stage.reported(device, phase=Phase.ROLLED_BACK)
            before = load.count()
            await load.sent(200)
            return code, output, rolled_back, await load.stop() - before

    code, output, rolled_back, after = stage.do(story())
    assert code == 1
    assert "rolled back" in output
    assert rolled_back.code == "trapped"
    assert rolled_back.log is not None
    assert after.lost == 0
    assert set(after.by_version) == {"2"}


def test_undo_offers_the_state_before_through_the_same_gates(stage, device):
    async def story():
        async with load_on(device) as load:
            await load.sent(100)
            # the newest rollout took itself back: what to undo is named, and the good version stays until then
            code, output, errors = await stage.fleet("undo", "--group", "edge-eu")
            assert (code, "fleet undo 2" in output + errors) == (4, True), output + errors
            code, output, errors = await stage.fleet("undo", "2")
            await load.sent(100)
            return code, output + errors, await load.stop()

    code, said, result = stage.do(story())
    assert code == 0, said
    assert result.lost == 0, result.losses
    assert stage.do(stage.version(device)) == "1"


def test_removal_stops_it_and_says_so(stage, device):
    code, output, errors = stage.do(stage.fleet("remove", HELLO, "--group", "edge-eu"))
    assert code == 0, output + errors
    assert stage.do(stage.version(device)) == ""
    stage.do(stage.until("the device says so", lambda: not stage.scene.client.devices().devices[0].instances or None))
