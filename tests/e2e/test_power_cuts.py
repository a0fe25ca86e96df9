"""Power cuts of a real agent in real updates: at each write that an update makes, and before and after each effect.

The agent ends by SIGKILL with what a cut leaves on the disk, and is started again; host and server are real too. The
old version answers until the new one does, the rollout succeeds, and its outcome is reported once.
`tests/agent/test_power_cuts.py` has every write, those of an update among them, without a server.
"""

import asyncio
import os
from collections import Counter
from pathlib import Path

import pytest

from agent.update.machine import Effect
from fleet.demo.load import Load
from fleet.protocol.codes import Phase, RolloutState
from tests.e2e.stage import GROUP, HELLO, Stage

pytestmark = [pytest.mark.e2e, pytest.mark.nightly, pytest.mark.timeout(900)]

HERE = Path(__file__).parent
WITHOUT_WORK = {Effect.STAGE, Effect.REMEMBER, Effect.CLOSE}  # nothing is carried out
OTHERWISE = {Effect.STOP, Effect.REVERT}  # not in an update that goes well: tests of their own
WAITS = {Effect.RETRY}  # a pause, and then as FETCH
EFFECTS = [each.name for each in Effect if each not in WITHOUT_WORK | OTHERWISE | WAITS]
FILE = ("before", "torn", "zeros", "unnamed", "after")
WRITES = {
    "STORE_ACCEPTED": ("before", "middle", "torn", "after"),
    "STORE_STEP": ("before", "middle", "torn", "after"),
    "STORE_SAVED": ("before", "torn", "after"),
    "STORE_COUNTER": ("before", "torn", "after"),
    "STORE_ACKED": ("before", "torn", "after"),
    "TRUST": FILE,
    "PART": ("before", "torn", "zeros"),
    "MARK": FILE,
    "MARK_DROPPED": ("before", "after"),
    "ARTIFACT": ("before", "after"),
    "IMAGE": FILE,
    "IMAGE_NOTE": FILE,
    "RUNSET": FILE,
}
ROWS = [(name, how) for name, hows in WRITES.items() for how in hows]
ROWS += [(name, how) for name in EFFECTS for how in ("before", "after")]


class Cuts:
    """A device whose agent can be cut."""

    def __init__(self, stage, plan):
        self.stage, self.plan, self.version = stage, plan, "1"

    @property
    def device(self):
        return self.stage.scene.devices[0]

    async def cut(self, name, how):
        """Begin an update, and end the agent at one place of it; return the rollout and what was lost meanwhile."""
        for name_of in ("artifacts", "images", "trust"):  # as evicted: all is fetched, compiled and cached again
            for path in (self.stage.state(self.device) / name_of).rglob("*"):
                if path.is_file():
                    path.unlink()
        self.plan.write_text(f"{name} {how}")
        self.version = "2" if self.version == "1" else "1"
        async with Load(port=self.device.port, path=f"/{HELLO}/", kept_alive=1, fresh=1, pause_s=0.05) as load:
            code, output, errors = await self.stage.push(f"v{self.version}.wasm", "--detach")
            assert code == 0, output + errors
            rollout = (await self.stage.newest_rollout()).id
            async with asyncio.timeout(120):
                status = await self.device.agent.process.wait()
            assert status == -9
            await self.stage.start_agent(self.device)
            ended = await self.stage.until("the rollout is over", lambda: self.over(rollout))
            await load.seen(self.version)
            return ended, (await load.stop()).lost

    def over(self, rollout):
        view = self.stage.scene.client.rollout(rollout)
        return None if view.state is RolloutState.RUNNING else view

    async def committed_after(self, began):
        """Changes that were reported as committed; a removal names no rollout.

        A report without durations is none of a change: the server has asked how an instance stands.
        """
        entries = (await self.stage.scene.ask(lambda c: c.timeline(self.device.device, limit=200))).entries
        ends = [e for e in entries if e.kind == "report" and e.at > began and e.phase is Phase.COMMITTED]
        return [(e.instance, e.target) for e in ends if e.timings_ms]

    async def ends(self, rollout):
        """How often each outcome was reported."""
        entries = (await self.stage.scene.ask(lambda c: c.timeline(self.device.device, limit=200))).entries
        return Counter(
            (e.phase, e.code) for e in entries if e.kind == "report" and e.rollout == rollout
            and e.phase in {Phase.COMMITTED, Phase.ROLLED_BACK, Phase.FAILED}
        )  # fmt: skip


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    directory = tmp_path_factory.mktemp("fleet")
    plan = directory / "cut"
    with Stage(directory / "scene") as stage:
        environment = stage.scene.processes._environment
        environment["PYTHONPATH"] = os.pathsep.join((str(HERE / "cuts"), environment["PYTHONPATH"]))
        environment["WASMFLEET_TEST_CUT"] = str(plan)
        stage.do(stage.scene.add_device("berlin", GROUP))
        stage.do(stage.pushed("v1.wasm"))
        yield Cuts(stage, plan)


def test_each_effect_is_cut():
    assert {each.name for each in Effect} == set(EFFECTS) | {each.name for each in WITHOUT_WORK | OTHERWISE | WAITS}


@pytest.mark.parametrize(("name", "how"), ROWS)
def test_power_is_cut_in_an_update(cuts, name, how):
    async def story():
        ended, lost = await cuts.cut(name, how)
        return ended, lost, await cuts.ends(ended.id)

    ended, lost, reported = cuts.stage.do(story())
    assert ended.state is RolloutState.SUCCEEDED
    assert lost == 0
    assert reported == {(Phase.COMMITTED, None): 1}


@pytest.mark.parametrize("how", ["before", "after"])
def test_power_is_cut_while_an_update_is_taken_back(cuts, how):
    async def story():
        began = await cuts.stage.latest(cuts.device)
        cuts.plan.write_text(f"REVERT {how}")
        async with Load(port=cuts.device.port, path=f"/{HELLO}/", kept_alive=0, fresh=1, pause_s=0.02):
            await cuts.stage.push("v3.wasm", "--detach")
            rollout = (await cuts.stage.newest_rollout()).id
            async with asyncio.timeout(120):
                await cuts.device.agent.process.wait()
            await cuts.stage.start_agent(cuts.device)
            await cuts.stage.reported(cuts.device, phase=Phase.ROLLED_BACK, after=began)
            ended = await cuts.stage.until("the rollout is over", lambda: cuts.over(rollout))
        await cuts.stage.answers(cuts.device, cuts.version)
        return ended, await cuts.ends(rollout)

    ended, reported = cuts.stage.do(story())
    assert ended.state is RolloutState.REVERTED
    assert [count for (phase, _), count in reported.items() if phase is Phase.ROLLED_BACK] == [1]


@pytest.mark.parametrize("how", ["before", "after"])
def test_power_is_cut_while_an_instance_is_removed(cuts, how):
    async def story():
        began = await cuts.stage.latest(cuts.device)
        cuts.plan.write_text(f"STOP {how}")
        code, output, errors = await cuts.stage.fleet("remove", HELLO, "--group", GROUP, "--detach")
        assert code == 0, output + errors
        rollout = (await cuts.stage.newest_rollout()).id
        async with asyncio.timeout(120):
            await cuts.device.agent.process.wait()
        await cuts.stage.start_agent(cuts.device)
        ended = await cuts.stage.until("the rollout is over", lambda: cuts.over(rollout))
        gone = await cuts.stage.version(cuts.device)
        reported = await cuts.committed_after(began)
        await cuts.stage.pushed(f"v{cuts.version}.wasm")
        return ended, gone, reported

    ended, gone, reported = cuts.stage.do(story())
    assert ended.state is RolloutState.SUCCEEDED
    assert gone == ""
    assert reported == [(HELLO, "")]
