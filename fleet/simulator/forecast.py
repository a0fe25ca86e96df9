"""Forecast: an operator's plan played over the fleet as it is, with a version that fails on a share of the devices."""

import contextlib
import random
import signal
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from typing import Final

from fleet.protocol.codes import RolloutState
from fleet.rollout.decide import Limits
from fleet.rollout.members import Stage
from fleet.simulator.devices import DAY, Mix, traits
from fleet.simulator.simulation import Scenario, Simulation, Site

RATES: Final = (0.0, 0.01, 0.05, 0.2, 1.0)
"""Shares of devices on which the version fails, for which a forecast is made unless one is named."""

_TICK_S: Final = 5.0
_MIX: Final = Mix(lying=0, mute=0)


@dataclass(frozen=True, slots=True)
class Place:
    """A device as the server knows it now."""

    online: bool
    site: str = ""
    affected: bool = True
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """A change to be rolled out: its waves, limits and soak."""

    stages: tuple[Stage, ...]
    limits: Limits
    soak_s: float = 0


@dataclass(frozen=True, slots=True)
class Forecast:
    """Outcome of some runs with one failure rate.

    Attributes:
        halted: runs that reverted or paused; `wave` is the usual wave of that, 0 without any.
        after_s: usual time until the end or the halt.
        hurt, hurt_most: devices on which the version failed, usually and at most; `met` those that began with it.
    """

    rate: float
    runs: int
    halted: int
    wave: int
    after_s: float
    hurt: int
    hurt_most: int
    met: int


@dataclass(frozen=True, slots=True)
class _Run:
    """Outcome of one run."""

    halted: bool
    wave: int
    end_s: float
    hurt: int
    met: int


def forecast(
    fleet: Mapping[str, Place],
    plan: Plan,
    *,
    seed: int,
    rates: Sequence[float] = RATES,
    runs: int = 25,
    processes: int = 1,
) -> tuple[Forecast, ...]:
    """Play a plan over a fleet, `runs` times for each failure rate; in several processes the outcome is the same."""
    seeds = [seed * runs + number for number in range(runs)]
    played = _played(fleet, plan, [(rate, each) for rate in rates for each in seeds], processes)
    return tuple(_forecast(rate, [next(played) for _ in seeds]) for rate in rates)


def _played(
    fleet: Mapping[str, Place], plan: Plan, runs: Sequence[tuple[float, int]], processes: int
) -> Iterator[_Run]:
    """Yield the outcome of each run, in order."""
    play = partial(_play, fleet, plan)
    if processes == 1:
        yield from map(play, runs)
        return
    pool = ProcessPoolExecutor(processes, get_context("spawn"), initializer=_remember, initargs=(play,))
    try:
        with _interrupt_held():
            submitted = [pool.submit(_play_remembered, run) for run in runs]
        # Not `pool.map`: it cancels the rest itself, and Python 3.11 then fails to end a pool whose process is gone.
        for each in submitted:
            yield each.result()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _interrupt_held() -> Iterator[None]:
    """Hold Ctrl-C back, also from processes that start meanwhile: they would say where it met them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_remembered: list[Callable[[tuple[float, int]], _Run]] = []


def _remember(play: Callable[[tuple[float, int]], _Run]) -> None:
    """Keep the fleet in a process that plays runs, so that it is sent once; Ctrl-C ends it at once, and the run."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _remembered[:] = [play]


def _play_remembered(run: tuple[float, int]) -> _Run:
    return _remembered[0](run)


def _play(fleet: Mapping[str, Place], plan: Plan, run: tuple[float, int]) -> _Run:
    rate, seed = run
    played = Simulation(_scenario(fleet, plan, rate, seed)).run()
    return _Run(
        halted=played.rollout.state in {RolloutState.REVERTED, RolloutState.PAUSED},
        wave=played.rollout.wave,
        end_s=played.rests[-1][0] if played.rests else 0.0,
        hurt=played.hurt(),
        met=played.met(),
    )


def _forecast(rate: float, runs: Sequence[_Run]) -> Forecast:
    halted = [each for each in runs if each.halted]
    hurt = [each.hurt for each in runs]
    return Forecast(
        rate=rate,
        runs=len(runs),
        halted=len(halted),
        wave=statistics.mode(each.wave for each in halted) if halted else 0,
        after_s=statistics.median(each.end_s for each in runs),
        hurt=int(statistics.median(hurt)),
        hurt_most=max(hurt),
        met=int(statistics.median(each.met for each in runs)),
    )


def _scenario(fleet: Mapping[str, Place], plan: Plan, rate: float, seed: int) -> Scenario:
    rng = random.Random(seed)  # noqa: S311 - a simulation, not a secret
    devices = {}
    for name, place in fleet.items():
        drawn = traits(rng, _MIX, failure_rate=rate)
        later = tuple(each for each in drawn.away if each[0] > 0)
        away = later if place.online else ((0.0, rng.uniform(0.1, 4) * DAY), *later)
        devices[name] = replace(drawn, away=away)
    sites = {name: Site(place.site, affected=place.affected, labels=place.labels) for name, place in fleet.items()}
    return Scenario(seed, devices, plan.stages, plan.limits, plan.soak_s, sites, tick_s=_TICK_S)
