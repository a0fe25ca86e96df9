"""Invariants of rollouts, checked after each step of a simulation against the devices as they really are.

Written from the specification with arithmetic of its own: nothing here asks `fleet.rollout.decide` what is right.
"""

import math
import random
from collections.abc import Callable, Iterable
from typing import Final

from msgspec.structs import replace

from fleet.protocol.codes import Outcome, RolloutState
from fleet.rollout.advance import Step
from fleet.rollout.decide import Offer, Open, Succeed
from fleet.rollout.members import Amount
from fleet.rollout.model import Expected, Member, Observation, observe
from fleet.simulator.simulation import NEW, Simulation

_NAMED: Final = frozenset(Outcome) - {Outcome.REFUSED, Outcome.SKIPPED}
_ENDED: Final = frozenset({RolloutState.REVERTED, RolloutState.ABORTED, RolloutState.REVOKED})
_OUT: Final = frozenset({Outcome.UNPROVEN, Outcome.NOT_AFFECTED, Outcome.REVERTED, Outcome.SUPERSEDED})
_AT_IT: Final = frozenset({Outcome.WAITING, Outcome.IN_PROGRESS})
_MAY_BEGIN: Final = _AT_IT | {Outcome.DEFERRED, Outcome.LOST}


class BrokenInvariantError(AssertionError):
    """A simulated rollout did what none may do."""


def _hold(condition: bool, simulation: Simulation, text: str) -> None:  # noqa: FBT001 - as `assert`
    if not condition:
        raise BrokenInvariantError(f"seed {simulation.scenario.seed}, at {simulation.now:.0f} s: {text}")


def check(simulation: Simulation, step: Step) -> None:
    """Check everything that holds after each step."""
    one_named_outcome(simulation, step)
    succeeded_devices_run_it(simulation, step)
    gates_hold(simulation, step)
    budgets_hold(simulation, step)
    stops_wait_for_nobody(simulation, step)


def check_end(simulation: Simulation) -> None:
    """Check what holds when nothing happens any more."""
    withdrawn_runs_nowhere(simulation)
    reports_commute(simulation)
    a_version_that_fails_everywhere_stays_in_wave_1(simulation)


def one_named_outcome(simulation: Simulation, step: Step) -> None:
    """Check that each device is in exactly one named outcome, and assigned what that outcome says."""
    names = [each.device for each in step.members]
    _hold(sorted(names) == sorted(simulation.devices), simulation, f"members {names}")
    for member in step.members:
        _hold(member.outcome in _NAMED, simulation, f"{member.device} is {member.outcome}")
        given = simulation.orders[member.device]
        version = given[-1].version if given else simulation.scenario.before
        wanted = simulation.wanted(member.device)
        _hold(version == wanted, simulation, f"{member.device} is {member.outcome} and assigned {version}")


def succeeded_devices_run_it(simulation: Simulation, step: Step) -> None:
    """Check that a device with the outcome succeeded has kept the version through its probation."""
    for member in step.members:
        if member.outcome is Outcome.SUCCEEDED:
            device = simulation.devices[member.device]
            _hold(NEW in device.committed, simulation, f"{member.device} succeeded and runs {device.running}")


def gates_hold(simulation: Simulation, step: Step) -> None:
    """Check each wave that was opened, each offer and each success against the limits."""
    for action in step.actions:
        match action:
            case Open(wave) if wave > 1:
                _gate(simulation, step, wave - 1)
            case Succeed():
                _gate(simulation, step, step.rollout.wave)
            case Offer() if step.rollout.state is RolloutState.RUNNING:
                for wave in range(1, step.rollout.wave + 1):
                    _failures(simulation, step, wave)
                at_once = step.rollout.limits.at_once
                busy = sum(each.outcome in _AT_IT for each in step.members)
                _hold(not at_once or busy <= at_once, simulation, f"{busy} devices are at it")


def _gate(simulation: Simulation, step: Step, wave: int) -> None:
    inside = [each for each in step.members if each.wave == wave and each.outcome not in _OUT and not each.replaced]
    fresh = [each for each in inside if each.accepted is not each.outcome]
    running = [each for each in inside if NEW in simulation.devices[each.device].committed]
    need = max(1, _share(simulation.scenario.limits.min_success, len(fresh), math.ceil)) if fresh else 0
    _hold(len(running) >= need, simulation, f"wave {wave} passed with {len(running)} of {need} successes")
    _failures(simulation, step, wave)
    first = [each.ended_at or 0 for each in inside if each.outcome is Outcome.SUCCEEDED]
    soaked = min(first, default=-math.inf) + step.rollout.gates[wave - 1].soak_s
    _hold(simulation.now >= soaked, simulation, f"wave {wave} passed before its soak was over")


def _failures(simulation: Simulation, step: Step, wave: int) -> None:
    inside = [each for each in step.members if each.wave == wave and each.outcome not in _OUT]
    failed = [each.device for each in inside if each.outcome is Outcome.FAILED and each.accepted is not each.outcome]
    limit = simulation.scenario.limits.failures
    later = Amount(1, percent=True)
    allowed = 0 if limit is None and wave == 1 else _share(limit or later, len(inside), math.floor)
    _hold(len(failed) <= allowed, simulation, f"wave {wave} goes on after the failures of {failed}")


def _share(amount: Amount, of: int, rounding: Callable[[float], int]) -> int:
    if not amount.percent:
        return min(amount.number, of)
    return rounding(of * amount.number / 100)


def budgets_hold(simulation: Simulation, step: Step) -> None:
    """Check that an offer leaves each site of an offered device its budget."""
    least = simulation.scenario.limits.min_available
    offered = {device for action in step.actions if isinstance(action, Offer) for device in action.devices}
    new = {each.device for each in step.members if each.new}
    if least is None or not offered - new:
        return
    for site in {each.site for each in step.members if each.device in offered - new}:
        there = [each for each in step.members if each.site == site]
        idle = [each for each in there if each.online and each.outcome not in _MAY_BEGIN]
        _hold(len(idle) >= least, simulation, f"site {site!r} is left with {len(idle)} of {least} devices")


def stops_wait_for_nobody(simulation: Simulation, step: Step) -> None:
    """Check that a pause and an end take hold in the step in which they are decided."""
    state = step.rollout.state
    if state is RolloutState.PAUSED:
        offered = [each.device for each in step.members if _untouched(each)]
        _hold(not offered, simulation, f"paused, and {offered} still have the offer")
        _hold(step.rollout.causes != frozenset(), simulation, "paused without a cause")
    if state in _ENDED:
        kept = [name for name in simulation.devices if simulation.wanted(name) == NEW]
        _hold(not kept, simulation, f"{state}, and {kept} are still to run it")


def _untouched(member: Member) -> bool:
    return member.outcome is Outcome.WAITING and member.began_at is None


def withdrawn_runs_nowhere(simulation: Simulation) -> None:
    """Check that a withdrawn release runs on no device that acknowledged its stop, and is assigned to none."""
    if simulation.rollout.state is not RolloutState.REVOKED:
        return
    for name, device in simulation.devices.items():
        given = simulation.orders[name]
        _hold(not given or given[-1].version != NEW, simulation, f"{name} is assigned the withdrawn version")
        member = simulation.members[name]
        _hold(
            member.outcome is not Outcome.REVERTED or device.running != NEW,
            simulation,
            f"{name} acknowledged the stop and runs the withdrawn version",
        )


def reports_commute(simulation: Simulation) -> None:
    """Check that reports in another order, doubled, or with progress lost lead to the same outcome."""
    rng = random.Random(simulation.scenario.seed)  # noqa: S311 - a simulation, not a secret
    for name, reports in simulation.log.items():
        orders = frozenset(each.sha256 for each in simulation.orders[name] if each.version == NEW)
        about = [each for each in reports if each.assignment_sha256 in orders]
        expected = Expected(orders, NEW)
        straight = _heard(name, about, expected)
        mixed = [*about, *rng.choices(about, k=len(about))] if about else []
        rng.shuffle(mixed)
        again = _heard(name, mixed, expected)
        _hold(
            straight.outcome is again.outcome,
            simulation,
            f"{name} is {straight.outcome}, and {again.outcome} with its reports in another order",
        )


def _heard(name: str, reports: Iterable[Observation], expected: Expected) -> Member:
    member = Member(name, 1, Outcome.WAITING, offered_at=0.0)
    for number, report in enumerate(reports):
        member = observe(member, replace(report, at=float(number)), expected)
    return member


def a_version_that_fails_everywhere_stays_in_wave_1(simulation: Simulation) -> None:
    """Check that nobody outside of wave 1 and its replaced canaries meets a version that fails on every device."""
    devices, rollout = simulation.devices, simulation.rollout
    if (
        simulation.scenario.resumes
        or "resume" in simulation.ended
        or not all(each.traits.fails for each in devices.values())
    ):
        return
    met = [name for name, device in devices.items() if NEW in device.began]
    first = [name for name, member in simulation.members.items() if member.wave == 1]
    _hold(set(met) <= set(first), simulation, f"{met} met a version that fails everywhere, wave 1 is {first}")
    _hold(rollout.wave <= 1, simulation, f"wave {rollout.wave} was opened")
