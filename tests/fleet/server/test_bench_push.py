"""What a push to a thousand boards, and their health, cost the server. It prints; nothing is timed to pass."""

import asyncio
import time
from datetime import UTC, datetime

import pytest

from fleet.protocol import codes, operator_api, wire
from fleet.protocol.codes import InstanceState, Phase
from fleet.protocol.messages import Health, InstanceHealth, Report, State
from fleet.protocol.topics import Down, Topic, Up

pytestmark = [pytest.mark.bench, pytest.mark.timeout(300)]
BOARDS = 1000
PHASES = (Phase.FETCHING, Phase.COMPILING, Phase.PROBATION, Phase.COMMITTED)


class Crowd:
    """Boards that exist in the store alone, and answer each assignment with four reports, past the broker."""

    def __init__(self, fleet):
        store = fleet.server._store
        self.ids = [f"b{number}-{number:08x}" for number in range(BOARDS)]
        self._ingest = fleet.server._bus._on_message.__self__
        self._assigned = asyncio.Queue()
        store.devices.ensure_group("edge", now=1.0)
        with store.atomic():
            for device in self.ids:
                store.devices.add(
                    device=device, name="b", machine="", sealing_key="", key_sha256=device, group="edge", now=1.0
                )
                store.devices.hear_state(State(device=device, online=True), 2.0)
        publish = fleet.server._director._publish

        def overhear(topic, payload):
            if topic.channel is Down.DESIRED:
                self._assigned.put_nowait(topic.device)
            return publish(topic, payload)

        fleet.server._director._publish = overhear

    async def answer(self, view):
        for _ in self.ids:
            device = await self._assigned.get()
            for sequence, phase in enumerate(PHASES, 1):
                report = Report(
                    device=device, boot_id="x", sequence=sequence, at=datetime.now(UTC), assignment=1,
                    instance=view.instance, target=view.target, rollout=view.id, phase=phase,
                )  # fmt: skip
                self._ingest.on_message(str(Topic(device, Up.REPORT)), wire.encode(report))

    def say_health(self, target):
        figure = InstanceHealth(instance="hello", target=target, generation=1, state=InstanceState.RUNNING)
        messages = [
            (
                str(Topic(device, Up.HEALTH)),
                wire.encode(Health(device=device, boot_id="x", at=datetime.now(UTC), committed=1, instances=(figure,))),
            )
            for device in self.ids
        ]
        began = time.process_time()
        for topic, payload in messages:
            self._ingest.on_message(topic, payload)
        self._ingest.flush()
        return (time.process_time() - began) / BOARDS


@pytest.mark.asyncio
async def test_a_push_to_a_thousand_boards(new_fleet):
    async with new_fleet() as fleet:
        crowd = Crowd(fleet)
        target = await fleet.operator.publish("1.0.0")
        wall, cpu = time.perf_counter(), time.process_time()
        view = await fleet.operator.deploy(target)
        answers = asyncio.create_task(crowd.answer(view))
        async with asyncio.timeout(200):
            while view.state in codes.OPEN_STATES:
                path = f"/v1/rollouts/{view.id}"
                view = await fleet.operator.get(operator_api.RolloutView, path, wait=10, since=view.revision)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        await answers
        assert view.counts == {"succeeded": BOARDS}
        health = crowd.say_health(target)
        each = cpu / BOARDS * 1e3
        print(f"\npush -> {BOARDS} boards, {4 * BOARDS} reports: {wall:.1f} s, CPU {each:.2f} ms a board")
        print(f"one health report: CPU {health * 1e6:.0f} us (budget 100)")
