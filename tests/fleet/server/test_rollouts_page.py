"""Examples of the page on rollouts are run, each as a process over a real server, and do what the page says.

Numbers and the id of a device on the page stand for those of the scene that an example finds.
"""

import re
import shlex
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from fleet.protocol import codes, operator_api
from fleet.protocol.codes import Outcome, RolloutState
from fleet.protocol.manifest import ConfigKey
from fleet.protocol.operator_api import GroupPlan, GroupPolicy, GroupPolicyRequest, PlanStage
from fleet.protocol.trust_api import OperatorReply, OperatorRequest, Role

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "rollouts.md").read_text()
EXAMPLES = re.findall(r"^\$ fleet (.+)$", PAGE, re.MULTILINE)
PLAN = re.search(r"```toml\n(.+?)```", PAGE, re.DOTALL)[1]
GROUP, DEVICE, NUMBER = "edge-eu", "gate-7-1f2e3d4c", "7"
UNENDED = codes.OPEN_STATES | {RolloutState.SCHEDULED}


class Scene:
    """A group that runs 1.3.0, and the newest rollout of 1.4.0 in it."""

    def __init__(self, fleet, devices) -> None:
        self.fleet, self.operator, self.devices = fleet, fleet.operator, devices
        self.view: operator_api.RolloutView | None = None

    async def set(self, targets: list[str]) -> None:
        self.before, self.target = targets
        await self.operator.decided(await self.operator.deploy(self.before, group=GROUP))

    async def newest(self) -> operator_api.RolloutView:
        (found,) = (await self.operator.get(operator_api.Rollouts, "/v1/rollouts", limit=1)).rollouts
        return await self.operator.get(operator_api.RolloutView, f"/v1/rollouts/{found.id}")

    async def act(self, verb: str) -> None:
        self.view = await self.operator.send(
            operator_api.RolloutView, "POST", f"/v1/rollouts/{self.view.number}/{verb}"
        )

    async def set_plan(self, plan: GroupPlan | None) -> None:
        await self.operator.send(GroupPolicy, "PUT", f"/v1/groups/{GROUP}/policy", GroupPolicyRequest(plan=plan))

    # what an example finds

    async def quiet(self) -> None:
        """Nothing is under way, nothing is pinned, and the group has no plan."""
        await self.set_plan(None)
        self.view = await self.newest()
        if self.view.state in UNENDED:
            await self.act("abort")
        for row in (await self.operator.get(operator_api.Devices, "/v1/devices")).devices:
            for instance in row.pins:
                wish = operator_api.InstanceRequest(instance=instance)
                await self.operator.send(operator_api.DeviceDetail, "POST", f"/v1/devices/{row.id}/unpin", wish)
        for device in self.devices:
            await device.until(lambda device: device.items and device.items["hello"].target == self.before)

    async def soaking(self) -> None:
        """The first device of a rollout has succeeded."""
        await self.quiet()
        self.view = await self.operator.deploy(self.target, group=GROUP, waves="1, 100%", soak_s=3600)
        self.view = await self.operator.follow(self.view, lambda view: view.counts.get("succeeded") == 1)

    async def paused(self) -> None:
        await self.soaking()
        await self.act("pause")

    async def aborted(self) -> None:
        await self.soaking()
        await self.act("abort")

    async def unapproved(self) -> None:
        """Somebody else began it, its first device has succeeded, and the plan wants an approval."""
        await self.quiet()
        await self.set_plan(GroupPlan(stages=(PlanStage(size="1", approval=True), PlanStage())))
        reply = await self.operator.send(OperatorReply, "PUT", "/v1/operators/eve", OperatorRequest(role=Role.OPERATOR))
        wish = operator_api.RolloutRequest(instance="hello", target=self.target, group=GROUP)
        began = await self.operator.http.post(
            "/v1/rollouts", content=msgspec.json.encode(wish), headers={"authorization": f"Bearer {reply.token}"}
        )
        view = msgspec.json.decode(began.content, type=operator_api.RolloutView)
        self.view = await self.operator.follow(view, lambda view: view.state is RolloutState.PAUSED)

    async def sited(self) -> None:
        """A device is in berlin."""
        await self.quiet()
        assert (await self.fleet.command("label", self.devices[0].id, "site=berlin")).code == 0

    async def planned(self) -> None:
        await self.quiet()
        await self.set_plan(GroupPlan(soak_s=60))

    async def with_a_key(self) -> None:
        await self.quiet()
        assert (await self.fleet.command("device", "set", self.devices[0].id, "hello", "room=cellar")).code == 0
        await in_the_cellar(self)

    async def succeeded(self) -> None:
        await self.quiet()
        self.view = await self.operator.decided(await self.operator.deploy(self.target, group=GROUP))

    async def frozen(self) -> None:
        await self.quiet()
        freeze = operator_api.FreezeRequest(group=GROUP, reason="trade fair")
        await self.operator.send(operator_api.Freezes, "POST", "/v1/freeze", freeze)

    # what it leaves

    async def is_(self, state: RolloutState) -> None:
        self.view = await self.newest()
        assert self.view.state is state, self.view

    async def freezes(self) -> dict[str, str]:
        return (await self.operator.get(operator_api.Freezes, "/v1/freezes")).freezes


async def runs_again(scene: Scene) -> None:
    began = scene.view.number
    await scene.is_(RolloutState.RUNNING)
    assert scene.view.number > began


async def kept_as_a_pin(scene: Scene) -> None:
    await scene.is_(RolloutState.ABORTED)
    (kept,) = [each.device for each in scene.view.devices if each.outcome is Outcome.SUCCEEDED]
    detail = await scene.operator.get(operator_api.DeviceDetail, f"/v1/devices/{kept}")
    assert detail.row.pins == ("hello",)


async def left_out(scene: Scene) -> None:
    await scene.is_(RolloutState.RUNNING)
    (entry,) = [each for each in scene.view.devices if each.device == scene.devices[0].id]
    assert entry.outcome is Outcome.NOT_AFFECTED


async def gone_back(scene: Scene) -> None:
    await scene.is_(RolloutState.SUCCEEDED)
    assert scene.view.target == scene.before


async def is_frozen(scene: Scene) -> None:
    assert await scene.freezes() == {GROUP: "trade fair"}
    await scene.operator.send(operator_api.Freezes, "POST", "/v1/unfreeze", operator_api.UnfreezeRequest(group=GROUP))


async def is_not_frozen(scene: Scene) -> None:
    assert await scene.freezes() == {}


async def plan_of(scene: Scene) -> GroupPlan | None:
    return (await scene.operator.get(GroupPolicy, f"/v1/groups/{GROUP}/policy")).plan


async def has_no_plan(scene: Scene) -> None:
    assert await plan_of(scene) is None


async def has_the_plan_of_the_page(scene: Scene) -> None:
    plan = await plan_of(scene)
    assert (plan.soak_s, len(plan.stages), plan.budget.by, plan.limits.at_once) == (600, 3, "site", 20)


async def keeps_its_plan(scene: Scene) -> None:
    assert await plan_of(scene) == GroupPlan(soak_s=60)


async def approved(scene: Scene) -> None:
    scene.view = await scene.operator.decided(await scene.newest())
    assert (scene.view.state, scene.view.by) == (RolloutState.SUCCEEDED, "eve")
    undo = operator_api.UndoRequest(rollout=str(scene.view.number))
    await scene.set_plan(None)
    await scene.operator.decided(await scene.operator.send(operator_api.RolloutView, "POST", "/v1/undo", undo))


async def nothing_new(scene: Scene) -> None:
    assert (await scene.newest()).number == scene.view.number


async def only_in_berlin(scene: Scene) -> None:
    await scene.is_(RolloutState.SUCCEEDED)
    reached = [each.device for each in scene.view.devices if each.outcome is Outcome.SUCCEEDED]
    assert reached == [scene.devices[0].id]
    undo = operator_api.UndoRequest(rollout=str(scene.view.number))
    await scene.operator.decided(await scene.operator.send(operator_api.RolloutView, "POST", "/v1/undo", undo))


async def in_the_cellar(scene: Scene) -> None:
    await scene.devices[0].until(lambda device: dict(device.items["hello"].config) == {"room": "cellar"})


async def no_longer_in_the_cellar(scene: Scene) -> None:
    await scene.devices[0].until(lambda device: not device.items["hello"].config)


def stays(state: RolloutState) -> Callable[[Scene], Awaitable[None]]:
    return lambda scene: scene.is_(state)


class Example(NamedTuple):
    """Checks before and after an example; `more` are words that the page leaves out, since it would follow for long."""

    finds: Callable[[Scene], Awaitable[None]]
    leaves: Callable[[Scene], Awaitable[None]]
    code: int = 0
    says: str = ""
    more: tuple[str, ...] = ()


STORY = {
    "deploy hello@1.4.0": Example(Scene.quiet, runs_again, says="to group edge-eu", more=("--detach",)),
    "devices": Example(Scene.quiet, nothing_new, says="No such device"),
    'deploy hello@1.4.0 --group edge-eu --where "site in (berlin, paris) and not runs=hello@1.4.0"': Example(
        Scene.sited, nothing_new, says="Nothing was changed."
    ),
    'deploy hello@1.4.0 --group edge-eu --where "site in (berlin, paris)"': Example(
        Scene.sited, only_in_berlin, says="1 of 1 devices run main/hello@1.4.0"
    ),
    "rollout 7": Example(Scene.soaking, stays(RolloutState.RUNNING), says="wave 1 soaks for 3600 s"),
    "rollout pause 7": Example(Scene.soaking, stays(RolloutState.PAUSED), says="is paused"),
    "rollout resume 7": Example(Scene.paused, stays(RolloutState.RUNNING), says="goes on"),
    "rollout abort 7": Example(Scene.soaking, stays(RolloutState.ABORTED), says="is aborted"),
    "rollout abort 7 --keep": Example(Scene.soaking, kept_as_a_pin, says="pinned where they are"),
    "rollout retry 7": Example(Scene.aborted, runs_again, says="Follow it with", more=("--detach",)),
    "rollout cancel-device 7": Example(Scene.soaking, left_out, says="goes on without"),
    "rollout approve 7": Example(Scene.unapproved, approved, says="is approved"),
    "undo 7": Example(Scene.succeeded, gone_back, says="3 of 3 devices run main/hello@1.3.0"),
    "freeze": Example(Scene.quiet, is_frozen, says="edge-eu is frozen: trade fair."),
    "unfreeze": Example(Scene.frozen, is_not_frozen, says="edge-eu is no longer frozen."),
    "rollout simulate": Example(Scene.quiet, has_no_plan, says="HALTS"),
    "group policy edge-eu --set plan.toml --dry-run": Example(Scene.quiet, has_no_plan, says="ring=canary"),
    "group policy edge-eu --set plan.toml": Example(Scene.quiet, has_the_plan_of_the_page, says="ring=canary"),
    "group policy edge-eu": Example(Scene.planned, keeps_its_plan, says="soak"),
    "group policy edge-eu --clear": Example(Scene.planned, has_no_plan, says="edge-eu"),
    f"device set {DEVICE}": Example(Scene.quiet, in_the_cellar, says="room"),
    f"device {DEVICE} --effective": Example(Scene.with_a_key, in_the_cellar, says="cellar"),
    f"device unset {DEVICE}": Example(Scene.with_a_key, no_longer_in_the_cellar, says="room"),
}


def of(example: str) -> str:
    """Return the longest beginning of an example that the story has."""
    return max((begins for begins in STORY if f"{example} ".startswith(f"{begins} ")), key=len)


def test_the_story_has_every_example_of_the_page_and_no_other():
    assert sorted(map(of, EXAMPLES)) == sorted(STORY)


@pytest.mark.asyncio
@pytest.mark.timeout(400)
async def test_each_example_does_what_the_page_says(new_fleet):
    async with new_fleet() as fleet:
        devices = [await fleet.device(name, group=GROUP) for name in ("a", "b", "c")]
        scene = Scene(fleet, devices)
        keys = {"room": ConfigKey(default="attic")}
        await scene.set([await fleet.operator.publish(version, config=keys) for version in ("1.3.0", "1.4.0")])
        (fleet.directory / "plan.toml").write_text(PLAN)
        for example in EXAMPLES:
            story = STORY[of(example)]
            await story.finds(scene)
            here = {NUMBER: str(scene.view.number), DEVICE: devices[0].id} if "--seed" not in example else {}
            words = [here.get(word, word) for word in shlex.split(example)]
            done = await fleet.command(*words, *story.more)
            assert done.code == story.code, (example, done)
            assert story.says in done.stdout + done.stderr, (example, done)
            await story.leaves(scene)
