"""Layers of a device's desired state: who supplies each instance, and where each configuration key comes from.

A pin decides over groups, and masks the instance when it is absent. Among groups the one with the higher priority
supplies it; a group that does not want an instance, or no longer wants it, says nothing about it. A rollout overlays
the value of its own group on the devices that it was offered to.

A device's configuration is the manifest's default, then that of the group that supplies the version, then the device's
own, key by key; groups never merge.

Besides: the choice of what an undo offers, of what replaces a withdrawn release, and the devices that are ahead.
"""

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from fleet.protocol.codes import RolloutState
from fleet.rollout.model import Value


@dataclass(frozen=True, slots=True)
class SettledValue:
    """A settled value, and the id of the rollout that settled it."""

    value: Value
    rollout: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """A group that the device belongs to, with its settled values by instance; an absent one is no wish."""

    name: str
    priority: int
    values: Mapping[str, SettledValue]


@dataclass(frozen=True, slots=True)
class Overlay:
    """A rollout that is in force on this device.

    Attributes:
        group: its scope; empty for the device itself.
    """

    rollout: str
    number: int
    group: str
    instance: str
    value: Value


@dataclass(frozen=True, slots=True)
class Key:
    """Value of one configuration key, and its source: `manifest`, `device`, or as in `Effective`.

    Attributes:
        declared: whether the manifest declares the key; a device's own key that it does not declare waits, undelivered.
    """

    value: str
    source: str
    declared: bool = True


@dataclass(frozen=True, slots=True)
class Effective:
    """The value of one instance on one device; `source` in words, `rollout` the id of the one that brought it.

    Attributes:
        value: with the device's own keys in its configuration.
    """

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
    groups: Iterable[Group],
    pins: Mapping[str, SettledValue],
    overlays: Iterable[Overlay] = (),
    *,
    own: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Effective]:
    """Return every instance's value on a device by instance, absent ones (target None) included.

    `own` are the device's own configuration keys by instance.
    """
    newest: dict[tuple[str, str], Overlay] = {}
    for overlay in sorted(overlays, key=lambda overlay: overlay.number):
        newest[overlay.group, overlay.instance] = overlay
    result: dict[str, Effective] = {}
    for group in sorted(groups, key=lambda group: (group.priority, group.name)):  # later ones win
        for instance, wish in _wishes(group, newest).items():
            if wish.value.target is not None or instance not in result:
                result[instance] = wish
    for instance, held in pins.items():
        result[instance] = Effective(held.value, "pin", held.rollout)
    for (scope, instance), overlay in newest.items():
        if not scope:
            result[instance] = Effective(overlay.value, f"rollout {overlay.number} (this device)", overlay.rollout)
    return {instance: _with_own(each, (own or {}).get(instance, {})) for instance, each in result.items()}


def _wishes(group: Group, overlays: Mapping[tuple[str, str], Overlay]) -> dict[str, Effective]:
    """Return what one group wants on the device, by instance."""
    wishes = {
        instance: Effective(held.value, f"group {group.name}", held.rollout) for instance, held in group.values.items()
    }
    for (scope, instance), overlay in overlays.items():
        if scope == group.name:
            source = f"rollout {overlay.number} (group {group.name})"
            wishes[instance] = Effective(overlay.value, source, overlay.rollout)
    return wishes


def _with_own(each: Effective, own: Mapping[str, str]) -> Effective:
    if not own or each.value.target is None:
        return each
    config = {**dict(each.value.config), **own}
    return replace(each, value=replace(each.value, config=tuple(sorted(config.items()))))


def sources(
    supplied: Value, source: str, *, declared: Mapping[str, str | None] | None, own: Mapping[str, str]
) -> dict[str, Key]:
    """Return each configuration key that has a value, and where that comes from, in order of the keys.

    Args:
        supplied: the value as the group or pin named by `source` has it, with or without the device's own keys.
        source: as in `Effective`.
        declared: the manifest's keys with their defaults; None where the manifest is not known.
        own: the device's.
    """
    keys = {key: Key(value, "manifest") for key, value in (declared or {}).items() if value is not None}
    keys |= {key: Key(value, source) for key, value in supplied.config}
    keys |= {key: Key(value, "device") for key, value in own.items()}
    known = keys if declared is None else declared
    return {key: replace(each, declared=key in known) for key, each in sorted(keys.items())}


def conflicts(groups: Iterable[Group]) -> tuple[Conflict, ...]:
    """Instances on which groups of one priority disagree, where no group of a higher one decides."""
    decided: dict[str, tuple[Group, Value]] = {}
    found = []
    for group in sorted(groups, key=lambda group: (-group.priority, group.name)):
        for instance, held in group.values.items():
            if held.value.target is None:
                continue
            if instance not in decided:
                decided[instance] = (group, held.value)
                continue
            winner, wanted = decided[instance]
            if winner.priority == group.priority and not wanted.same(held.value):
                found.append(Conflict(instance, winner.name, group.name))
    return tuple(found)


# -- undo --------------------------------------------------------------------------------------------------------------


class NothingToUndoError(ValueError):
    """No rollout can be taken back; one sentence for people, and what to do instead."""

    def __init__(self, text: str, action: str = "") -> None:
        super().__init__(text)
        self.action = action


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


_TOOK_BACK = frozenset({RolloutState.REVERTED, RolloutState.ABORTED, RolloutState.REVOKED, RolloutState.HALTED})
_OPEN = frozenset({RolloutState.RUNNING, RolloutState.PAUSED, RolloutState.SCHEDULED})
_LEFT_OUT = frozenset({RolloutState.REFUSED})


def choose_undo(history: Sequence[Past]) -> Past:
    """Return the newest rollout, if plain `undo` may take it back.

    Raises:
        NothingToUndoError: there is none, or the newest one ended by itself, is an undo, or is still open.
    """
    shown = sorted((past for past in history if past.state not in _LEFT_OUT), key=lambda past: -past.number)
    if not shown:
        raise NothingToUndoError("there is nothing to undo: no rollout changed anything")
    newest = shown[0]
    if newest.state in _OPEN:
        raise NothingToUndoError(
            f"rollout {newest.number} is still {newest.state}", f"end it: fleet rollout abort {newest.number}"
        )
    if newest.undoes or newest.state in _TOOK_BACK:
        why = "is an undo itself" if newest.undoes else f"was {newest.state}: its devices have their previous state"
        raise NothingToUndoError(f"rollout {newest.number} {why}", _earlier(shown))
    return newest


def _earlier(shown: Sequence[Past]) -> str:
    """Name the undo that goes further back."""
    undone = {past.undoes for past in shown if past.undoes and past.state is RolloutState.SUCCEEDED}
    for past in shown:
        if past.state is RolloutState.SUCCEEDED and not past.undoes and past.id not in undone:
            return f"to take rollout {past.number} back: fleet undo {past.number}"
    return ""


def target_of(past: Past) -> Value:
    """Return what devices are offered when `past` is undone.

    Raises:
        NothingToUndoError: it ended without lasting effect, or is still open.
    """
    if past.state in _OPEN:
        raise NothingToUndoError(
            f"rollout {past.number} is still {past.state}", f"end it: fleet rollout abort {past.number}"
        )
    if past.state is not RolloutState.SUCCEEDED:
        raise NothingToUndoError(
            f"rollout {past.number} was {past.state}: its devices have their previous state already"
        )
    return past.before if past.before is not None else Value(None, keep_data=True)


# -- withdrawn releases ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Fitness:
    """Facts of a published release that decide whether devices may go to it."""

    security_epoch: int
    data_schema: int


def safe_value(
    withdrawn: Fitness, history: Iterable[SettledValue], published: Mapping[str, Fitness]
) -> SettledValue | None:
    """Return the value that takes the place of a withdrawn one.

    Args:
        withdrawn: facts of the release that was withdrawn.
        history: settled values of the instance in the group, newest first.
        published: facts of each release that may still run, by target.

    Returns:
        The newest settled and published version at or above the security epoch with the same data schema; None where
        there is none, and the devices run nothing.
    """
    for held in history:
        facts = None if held.value.target is None else published.get(held.value.target)
        if facts is None or facts.security_epoch < withdrawn.security_epoch:
            continue
        if facts.data_schema == withdrawn.data_schema:
            return held
    return None


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """Consequences of withdrawing a release, before or while they are carried out.

    Attributes:
        target: of the release.
        ended: numbers of the rollouts that end with it.
        replaced: the value that takes the place of each settled one, None for nothing, by group, device and instance.
    """

    target: str
    ended: frozenset[int]
    replaced: Mapping[tuple[str, str, str], SettledValue | None]


# -- devices ahead of the server ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Standing:
    """Assignment that a device signed to have accepted."""

    device: str
    accepted: int
    accepted_sha256: str = ""


def ahead(standing: Standing, *, newest: int, known: AbstractSet[str], bound: int) -> bool:
    """Tell whether a device follows an assignment that this server has never signed, as after a restored backup.

    Args:
        standing: by the device.
        newest: version of the newest assignment here, 0 for none.
        known: sha256 of the assignments that are kept here.
        bound: no honest version is beyond it: a stolen key may have driven it up.
    """
    if standing.accepted > bound:
        return False
    if standing.accepted > newest:
        return True
    return standing.accepted == newest and bool(standing.accepted_sha256) and standing.accepted_sha256 not in known
