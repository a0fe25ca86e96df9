"""Effective state of a device and its sources; choice of what an undo takes back.

What one device should run, and who says so: device pin over group, the group with the higher priority over the rest.

An open rollout overlays the devices of its offered waves. A newer rollout takes the place of an older one on the same
instance and scope; the older one's devices keep what they were offered until the newer one's waves reach them.

Which rollout an undo takes back, and to what: the history of one scope read as a stack.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fleet.protocol.codes import RolloutState
from fleet.rollout.model import Value


@dataclass(frozen=True, slots=True)
class SettledValue:
    """A settled value, and the id of the rollout that settled it."""

    value: Value
    rollout: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """A group that the device belongs to, with its settled values by instance."""

    name: str
    priority: int
    values: Mapping[str, SettledValue]


@dataclass(frozen=True, slots=True)
class Overlay:
    """A rollout that has been offered to this device.

    Attributes:
        group: its scope; empty for the device itself.
    """

    rollout: str
    number: int
    group: str
    instance: str
    value: Value


@dataclass(frozen=True, slots=True)
class Effective:
    """The value of one instance on one device; `source` in words, `rollout` the id of the one that brought it."""

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
    groups: Iterable[Group], pins: Mapping[str, SettledValue], overlays: Iterable[Overlay] = ()
) -> dict[str, Effective]:
    """Every instance's value on a device, absent ones (target None) included, by instance."""
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
            result[instance] = Effective(overlay.value, f"rollout {overlay.number} (this device)", overlay.rollout)
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


class NothingToUndoError(ValueError):
    """No rollout can be taken back; one sentence for people."""


@dataclass(frozen=True, slots=True)
class Past:
    """A rollout as history sees it.

    Attributes:
        before: the settled value when it began, None when the instance was not there at all.
        undoes: id of the rollout that it took back, empty for none.
    """

    id: str
    number: int
    state: RolloutState
    before: Value | None
    undoes: str = ""


_UNDOABLE = frozenset({RolloutState.RUNNING, RolloutState.PAUSED, RolloutState.SUCCEEDED})


def choose_undo(history: Sequence[Past]) -> Past:
    """The newest rollout that changed something and has not been taken back, undos themselves left out.

    So one undo after the other walks back through history.

    Raises:
        NothingToUndoError: there is none.
    """
    undone = {past.undoes for past in history if past.undoes and past.state in _UNDOABLE}
    for past in sorted(history, key=lambda past: -past.number):
        if past.state in _UNDOABLE and not past.undoes and past.id not in undone:
            return past
    raise NothingToUndoError("there is nothing to undo: no rollout changed anything that is still in force")


def target_of(past: Past) -> Value:
    """Return what devices are offered when `past` is undone.

    Raises:
        NothingToUndoError: it ended without lasting effect.
    """
    if past.state not in _UNDOABLE:
        raise NothingToUndoError(
            f"rollout {past.number} was {past.state}: its devices have their previous state already"
        )
    return past.before if past.before is not None else Value(None)
