"""What one board should run, and who says so: device pin over group, the group with the higher priority over the rest.

An open rollout overlays the boards of its offered waves. A newer rollout takes the place of an older one on the same
instance and scope; the older one's boards keep what they were offered until the newer one's waves reach them.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fleet.rollout.model import Value


@dataclass(frozen=True, slots=True)
class Held:
    """A settled value, and the id of the rollout that settled it."""

    value: Value
    rollout: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """A group that the board belongs to, with its settled values by instance."""

    name: str
    priority: int
    values: Mapping[str, Held]


@dataclass(frozen=True, slots=True)
class Overlay:
    """A rollout that has been offered to this board.

    Attributes:
        group: its scope; empty for the board itself.
    """

    rollout: str
    number: int
    group: str
    instance: str
    value: Value


@dataclass(frozen=True, slots=True)
class Effective:
    """The value of one instance on one board; `source` in words, `rollout` the id of the one that brought it."""

    value: Value
    source: str
    rollout: str = ""


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two groups of the same priority that want different things."""

    instance: str
    first: str
    second: str


def effective(
    groups: Iterable[Group], pins: Mapping[str, Held], overlays: Iterable[Overlay] = ()
) -> dict[str, Effective]:
    """Every instance's value on a board, absent ones (target None) included, by instance."""
    newest: dict[tuple[str, str], Overlay] = {}
    for overlay in sorted(overlays, key=lambda overlay: overlay.number):
        newest[overlay.group, overlay.instance] = overlay
    members = sorted(groups, key=lambda group: (group.priority, group.name))
    result: dict[str, Effective] = {}
    for group in members:  # later ones win
        for instance, held in group.values.items():
            result[instance] = Effective(held.value, f"group {group.name}", held.rollout)
        for (scope, instance), overlay in newest.items():
            if scope == group.name:
                source = f"rollout {overlay.number} (group {group.name})"
                result[instance] = Effective(overlay.value, source, overlay.rollout)
    for instance, held in pins.items():
        result[instance] = Effective(held.value, "pin", held.rollout)
    for (scope, instance), overlay in newest.items():
        if not scope:
            result[instance] = Effective(overlay.value, f"rollout {overlay.number} (this board)", overlay.rollout)
    return result


def conflicts(groups: Iterable[Group]) -> tuple[Conflict, ...]:
    """Instances on which groups of one priority disagree, where no group of a higher one decides."""
    members = sorted(groups, key=lambda group: (-group.priority, group.name))
    decided: dict[str, tuple[Group, Value]] = {}
    found = []
    for group in members:
        for instance, held in group.values.items():
            if instance not in decided:
                decided[instance] = (group, held.value)
                continue
            winner, wanted = decided[instance]
            if winner.priority == group.priority and not wanted.same(held.value):
                found.append(Conflict(instance, winner.name, group.name))
    return tuple(found)
