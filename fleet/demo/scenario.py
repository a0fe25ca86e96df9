"""Steps of the demo, and the claims that must hold at its end.

The demo's components lie beside this file in an installed package, and in `components/demo` in a source tree.
"""

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from fleet.client import Client
from fleet.demo.environment import DemoDevice, Environment
from fleet.demo.load import Load, LoadResult, first_answer
from fleet.protocol import operator_api
from fleet.protocol.codes import Outcome, Phase, RolloutState

GROUP: Final = "edge-eu"
DEVICES: Final = (("berlin", GROUP), ("paris", GROUP), ("boston", "edge-us"))
INSTANCE: Final = "hello"
PATH: Final = f"/{INSTANCE}/"
CLIENTS: Final = 4
REQUESTS_AROUND: Final = 100
"""Requests to each device before a command starts, and after it has ended."""

PAUSE_S: Final = 0.01
ACT_S: Final = 300.0
"""Time after which a step has failed."""

_SERVER_ERROR: Final = 500

TITLES: Final = {
    "v1": "Push v1 to the two devices of edge-eu",
    "v2": f"Push v2 while {2 * CLIENTS} clients send requests; no client retries, half keep their connection",
    "v3": "Push v3, which passes its checks and then traps under traffic",
    "undo": "Take the group back from v2 to v1, still under load",
}

HERE: Final = Path(__file__).resolve().parent
_PLACES: Final = (HERE / "components", HERE.parents[1] / "components" / "demo")


@dataclass(frozen=True, slots=True)
class Step:
    """Push or undo, and its result.

    Attributes:
        command: as a person types it.
        exit_code: of that command.
        first_s, last_s: from the start of the command to the first answer of the new version, on the first and on the
            last device; None where it never answered, or had answered before.
        load: results of the requests meanwhile, by device; empty without load.
        rollout: as the server shows it afterwards.
    """

    name: str
    command: str
    exit_code: int
    first_s: float | None
    last_s: float | None
    load: dict[str, LoadResult]
    rollout: operator_api.RolloutView

    @property
    def total(self) -> LoadResult:
        """Sum over all devices."""
        return sum(self.load.values(), LoadResult())


@dataclass(slots=True)
class Scenario:
    """Result of the demo: steps, the version on every device at the end, and which claims held."""

    acts: list[Step] = field(default_factory=list)
    ends: dict[str, str] = field(default_factory=dict)
    checks: list[tuple[str, bool]] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """True when every claim held."""
        return bool(self.checks) and all(good for _, good in self.checks)


class Reporter(Protocol):
    """Receiver of progress: a console, or nothing in a test."""

    def act(self, title: str) -> None:
        """Begin a new step."""

    def waiting(self, what: str) -> AbstractContextManager[None]:
        """Show that something is going on."""

    def did(self, command: str, result: str) -> None:
        """Report a command and its result."""

    def runs(self, arguments: Sequence[str]) -> None:
        """Announce a `fleet` command that prints for itself."""

    def came_of(self, load: LoadResult | None) -> None:
        """Report what the clients of a step saw."""


async def play(environment: Environment, reporter: Reporter, *, broker: str = "auto") -> Scenario:
    """Run all steps.

    Raises:
        DemoError, ChildDiedError, ClientError, TimeoutError: the demo cannot continue.
    """
    scenario = Scenario()
    await _set_up(environment, reporter, broker)
    members = [device for device in environment.devices if device.group == GROUP]
    for name, command, version in (
        ("v1", ("push", str(fixture("v1.wasm")), "--group", GROUP, "--waves", "100%"), "1"),
        ("v2", ("push", str(fixture("v2.wasm")), "--group", GROUP), "2"),
        ("v3", ("push", str(fixture("v3.wasm")), "--group", GROUP), "3"),
        ("undo", ("undo", "2", "--group", GROUP), "1"),
    ):
        reporter.act(TITLES[name])
        async with asyncio.timeout(ACT_S):
            act = await _perform(environment, reporter, name, command, version, members)
        scenario.acts.append(act)
        reporter.came_of(act.total if act.load else None)
    for device in environment.devices:
        scenario.ends[device.device] = await _answers(device)
    scenario.checks = judge(scenario, environment.devices)
    return scenario


async def _set_up(environment: Environment, reporter: Reporter, broker: str) -> None:
    reporter.act("A development fleet")
    with reporter.waiting("fleet init --dev"):
        await environment.make_fleet(broker=broker)
    reporter.did("fleet init --dev", "keys, TUF repository, certificates, admin token")
    with reporter.waiting("fleet serve"):
        status = await environment.serve()
    reporter.did("fleet serve", f"{status.operators_url}, broker: {status.broker}")
    reporter.act("Three devices, each a fleet-agent and a fleet-host with directories of their own")
    for name, group in DEVICES:
        with reporter.waiting(f"{name}: fleet-host run, fleet-agent enroll, fleet-agent run"):
            device = await environment.add_device(name, group)
        reporter.did(f"fleet enroll-token --group {group} | fleet-agent enroll", f"{device.device}, {device.url('')}")


async def _perform(
    environment: Environment,
    reporter: Reporter,
    name: str,
    arguments: Sequence[str],
    version: str,
    members: Sequence[DemoDevice],
) -> Step:
    """Run one command of the demo and note when `version` first answers on each of `members`.

    Once the instance is there, clients send requests from before the command until after it.
    """
    loaded = name != "v1"
    async with contextlib.AsyncExitStack() as stack:
        loads = {
            device.device: await stack.enter_async_context(_clients(device)) for device in (members if loaded else [])
        }
        first_answers = {} if loaded else {each.device: asyncio.create_task(_first(each, version)) for each in members}
        await _traffic(loads)
        began = time.monotonic()
        reporter.runs(arguments)
        code = await environment.shown(*arguments)
        rollout = await environment.ask(_newest)
        await _traffic(loads)
        results = {device: await load.stop() for device, load in loads.items()}
    if rollout.state is not RolloutState.SUCCEEDED:
        for task in first_answers.values():
            task.cancel()
    seen = [load.first_answer(version) for load in loads.values()]
    seen += [None if isinstance(each, BaseException) else each for each in await _all(first_answers)]
    when = [moment - began for moment in seen if moment is not None and moment >= began]
    return Step(
        name=name,
        command=f"fleet {' '.join(arguments)}",
        exit_code=code,
        first_s=min(when, default=None),
        last_s=max(when) if len(when) == len(members) else None,
        load=results,
        rollout=rollout,
    )


def _clients(device: DemoDevice) -> Load:
    return Load(port=device.port, path=PATH, kept_alive=CLIENTS // 2, fresh=CLIENTS // 2, pause_s=PAUSE_S)


async def _first(device: DemoDevice, version: str) -> float:
    return await first_answer(port=device.port, path=PATH, version=version)


async def _all(first_answers: Mapping[str, asyncio.Task[float]]) -> list[float | BaseException]:
    return await asyncio.gather(*first_answers.values(), return_exceptions=True)


async def _traffic(loads: Mapping[str, Load]) -> None:
    """Let every device answer some requests."""
    for load in loads.values():
        await load.sent(REQUESTS_AROUND)


def _newest(client: Client) -> operator_api.RolloutView:
    return client.rollout(client.rollouts(group=GROUP, limit=1).rollouts[0].id)


async def _answers(device: DemoDevice) -> str:
    """Return the version that answers on a device; empty for none."""
    async with Load(port=device.port, path=PATH, kept_alive=0, fresh=1) as load:
        await load.sent(1)
        return next(iter((await load.stop()).by_version), "")


def judge(scenario: Scenario, devices: Sequence[DemoDevice]) -> list[tuple[str, bool]]:
    """Check each claim of the demo against the steps."""
    acts = {act.name: act for act in scenario.acts}
    v1, v2, v3, undo = (acts[name] for name in TITLES)
    bad = [device for device in v3.rollout.devices if device.outcome is Outcome.FAILED]
    tried = {device.device for device in bad}
    spared = [device for device in v3.rollout.devices if device.device not in tried]
    first = LoadResult() if not bad else v3.load.get(bad[0].device, LoadResult())
    outside = [device.device for device in devices if device.group != GROUP]
    return [
        ("v1 runs on both devices of edge-eu", v1.exit_code == 0 and v1.last_s is not None),
        ("v2 replaced it on both", v2.exit_code == 0 and v2.total.by_version["2"] > 0 and v2.last_s is not None),
        (f"0 of {v2.total.sent:,} requests lost in the swap", v2.total.sent > 0 and v2.total.lost == 0),
        ("v3 was rolled back on the first device", len(bad) == 1 and bad[0].phase is Phase.ROLLED_BACK),
        ("only requests that v3 itself trapped on saw an error", _only_server_errors(first)),
        (
            "v3 was reverted before the second device",
            v3.exit_code == 1
            and v3.rollout.state is RolloutState.REVERTED
            and len(spared) == 1
            and all(device.offered_at is None for device in spared)
            and all(v3.load[device.device].by_version["3"] == 0 for device in spared),
        ),
        ("the second device lost nothing meanwhile", all(v3.load[device.device].lost == 0 for device in spared)),
        ("fleet undo brought v1 back to both", undo.exit_code == 0 and undo.last_s is not None),
        (f"0 of {undo.total.sent:,} requests lost on the way back", undo.total.sent > 0 and undo.total.lost == 0),
        (
            "every device runs what it should",
            all(version == ("" if device in outside else "1") for device, version in scenario.ends.items())
            and len(scenario.ends) == len(devices),
        ),
    ]


def _only_server_errors(load: LoadResult) -> bool:
    """Tell whether requests were lost, and all of them by a status of 500 or above."""
    answered_badly = sum(count for status, count in load.by_status.items() if status >= _SERVER_ERROR)
    return load.lost > 0 and load.lost == answered_badly


class NoFixtureError(Exception):
    """The demo's components are missing; the message names the searched directories."""


def fixture(name: str) -> Path:
    """Return the path of one component, such as `v1.wasm`; its manifest lies beside it as `v1.toml`.

    Raises:
        NoFixtureError: neither place has it.
    """
    for place in _PLACES:
        if (place / name).is_file():
            return place / name
    raise NoFixtureError(f"{name} is neither in {' nor in '.join(map(str, _PLACES))}; install wasmfleet anew")
