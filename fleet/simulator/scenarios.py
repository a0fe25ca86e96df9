"""Random scenarios: fleets, plans and operators' acts, each drawn from one seed."""

import random

from fleet.protocol.codes import OnBreach
from fleet.rollout.decide import Limits
from fleet.rollout.members import EVERYBODY, Amount, Stage, parse_waves
from fleet.simulator.devices import DAY, HOUR, MINUTE, Mix, traits
from fleet.simulator.simulation import OLD, Act, Scenario, Site

_WAVES = ("100%", "1, 100%", "1, 25%, 100%", "2, 4, 100%", "1, 50%, 100%", "3, 100%")
_VERBS = ("pause", "resume", "abort", "revoke", "leave")


def scenario(seed: int, *, devices_max: int = 16) -> Scenario:
    """Draw a scenario."""
    rng = random.Random(seed)  # noqa: S311 - a simulation, not a secret
    rate = rng.choice((0.0, 0.0, 0.05, 0.3, 1.0))
    names = [f"d{number:02}" for number in range(rng.randint(1, devices_max))]
    sites = {name: Site(rng.choice("ab"), affected=rng.random() > 0.1) for name in names}  # noqa: PLR2004 - one in ten
    return Scenario(
        seed=seed,
        devices={name: traits(rng, Mix(), failure_rate=rate) for name in names},
        stages=_stages(rng),
        limits=_limits(rng),
        soak_s=rng.choice((0.0, 0.0, 10 * MINUTE, HOUR)),
        sites=sites,
        before=rng.choice((OLD, OLD, None)),
        acts=_acts(rng),
        resumes=rng.random() < 0.3,  # noqa: PLR2004 - three in ten
        horizon_s=4 * DAY,
    )


def _stages(rng: random.Random) -> tuple[Stage, ...]:
    if rng.random() < 0.8:  # noqa: PLR2004 - four in five
        return parse_waves(rng.choice(_WAVES))
    small = Stage(Amount(rng.randint(1, 3)), from_first=False, soak_s=HOUR, approval=rng.random() < 0.5)  # noqa: PLR2004
    half = Stage(Amount(50, percent=True), from_first=False)
    return (small, half, Stage(EVERYBODY))


def _limits(rng: random.Random) -> Limits:
    return Limits(
        min_success=rng.choice((Amount(10, percent=True), Amount(50, percent=True), Amount(2))),
        failures=rng.choice((None, None, Amount(0), Amount(1), Amount(20, percent=True))),
        lost=rng.choice((None, None, Amount(1))),
        on_breach=rng.choice((OnBreach.ROLLBACK, OnBreach.ROLLBACK, OnBreach.PAUSE)),
        at_once=rng.choice((0, 0, 1, 3)),
        min_available=rng.choice((None, None, None, 1, 2)),
        timeout_s=rng.choice((5 * MINUTE, 15 * MINUTE)),
    )


def _acts(rng: random.Random) -> tuple[Act, ...]:
    if rng.random() < 0.5:  # noqa: PLR2004 - every second
        return ()
    times = sorted(rng.uniform(0, 2 * HOUR) for _ in range(rng.randint(1, 3)))
    return tuple(Act(at, rng.choice(_VERBS)) for at in times)
