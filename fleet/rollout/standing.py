"""Members of a rollout, gathered by what decisions ask of them, so that a decision costs what changed.

A decision asks how many devices stand in a certain way, and which are the first to be silent for too long. Members that
differ only in their names, times and messages stand alike: they share a `Kind`, and a question is put to each kind
once, however many devices there are of it.
"""

import heapq
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from itertools import chain, islice
from typing import Final, NamedTuple, Self

from fleet.protocol.codes import Outcome
from fleet.rollout.model import FROM_SWAP, UNCOUNTED, Member

_OCCUPIED: Final = frozenset({Outcome.WAITING, Outcome.IN_PROGRESS, Outcome.DEFERRED, Outcome.LOST})


class Kind(NamedTuple):
    """Standing of one member as far as decisions ask; each field as of `Member`.

    Attributes:
        offered: whether it was ever offered the change; `began` whether it has begun since the newest offer.
        accepted: whether an operator accepted the outcome that it has now.
        undecided: as `Member.undecided`.
    """

    wave: int
    outcome: Outcome
    online: bool
    offered: bool
    began: bool
    swapping: bool
    accepted: bool
    canary: bool
    busy: bool
    replaced: bool
    arrival: bool
    new: bool
    returning: bool
    undecided: bool

    @classmethod
    def of(cls, member: Member) -> Self:
        """Return how a member stands."""
        outcome = member.outcome
        fields = (
            member.wave,
            outcome,
            member.online_since is not None,
            member.offered_at is not None,
            member.began_at is not None,
            member.phase in FROM_SWAP,
            member.accepted is outcome,
            member.canary,
            member.busy,
            member.replaced,
            member.arrival,
            member.new,
            member.returning,
            member.undecided,
        )
        return tuple.__new__(cls, fields)  # half the time of a call with fourteen arguments

    @property
    def counted(self) -> bool:
        """Tell whether the device is in the counts of its wave."""
        return self.wave > 0 and self.outcome not in UNCOUNTED

    @property
    def available(self) -> bool:
        """Tell whether the device counts for the budget of its site: it is there, and at nothing."""
        return self.online and not self.busy and self.outcome not in _OCCUPIED

    def counts_as(self, outcome: Outcome) -> bool:
        """Tell whether the device has this outcome and no operator accepted it."""
        return self.outcome is outcome and not self.accepted


Chosen = Callable[[Kind], bool]
"""Question to a kind of members."""

Clock = Callable[[Member], float]
"""Time of a member."""


class _Cell:
    """Members of one kind: their places in order, and by each clock that was asked for."""

    __slots__ = ("clocks", "places")

    def __init__(self) -> None:
        self.places: list[int] = []
        self.clocks: dict[Clock, list[tuple[float, int]]] = {}

    def add(self, place: int, member: Member) -> None:
        insort(self.places, place)
        for clock, times in self.clocks.items():
            insort(times, (clock(member), place))

    def remove(self, place: int, member: Member) -> None:
        del self.places[bisect_left(self.places, place)]
        for clock, times in self.clocks.items():
            del times[bisect_left(times, (clock(member), place))]

    def exchange(self, place: int, old: Member, new: Member) -> None:
        for clock, times in self.clocks.items():
            before, after = clock(old), clock(new)
            if before != after:
                del times[bisect_left(times, (before, place))]
                insort(times, (after, place))


class Standing(MutableMapping[str, Member]):
    """Members of a rollout by device, in the order in which they were given.

    Attributes:
        read: how many members were handed out or timed one by one: what decisions cost.
    """

    def __init__(self, members: Iterable[Member] = ()) -> None:
        self._members = list(members)
        self._devices = [member.device for member in self._members]
        self._kinds = list(map(Kind.of, self._members))
        self._places = {device: place for place, device in enumerate(self._devices)}
        self._cells: dict[Kind, _Cell] = {}
        self._sites: Counter[str] | None = None
        self._before: dict[int, Member] = {}
        self.read = 0
        for place, kind in enumerate(self._kinds):
            self._cell(kind).places.append(place)

    def __getitem__(self, device: str) -> Member:
        return self._members[self._places[device]]

    def __setitem__(self, device: str, member: Member) -> None:
        place = self._places.get(device)
        if place is None:
            self._append(member)
            return
        old, was, kind = self._members[place], self._kinds[place], Kind.of(member)
        self._before.setdefault(place, old)
        self._members[place] = member
        if kind == was:
            self._cells[kind].exchange(place, old, member)
        else:
            cell = self._cells[was]
            cell.remove(place, old)
            if not cell.places:
                del self._cells[was]
            self._kinds[place] = kind
            self._cell(kind).add(place, member)
        if self._sites is not None:
            self._sites[old.site] -= was.available
            self._sites[member.site] += kind.available

    def __delitem__(self, device: str) -> None:
        raise TypeError("a member stays one, whatever becomes of its device")

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._members)

    def _append(self, member: Member) -> None:
        place, kind = len(self._members), Kind.of(member)
        self._places[member.device] = place
        self._devices.append(member.device)
        self._members.append(member)
        self._kinds.append(kind)
        self._cell(kind).add(place, member)
        if self._sites is not None:
            self._sites[member.site] += kind.available

    def _cell(self, kind: Kind) -> _Cell:
        cell = self._cells.get(kind)
        if cell is None:
            cell = self._cells[kind] = _Cell()
        return cell

    def everybody(self) -> tuple[Member, ...]:
        """Return the members, in order."""
        return tuple(self._members)

    # -- changes ---------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Count changes from here on."""
        self._before.clear()

    def changed(self) -> tuple[str, ...]:
        """Return the devices whose member is another one than when changes began to count."""
        places = sorted(place for place, old in self._before.items() if self._members[place] is not old)
        return tuple(self._devices[place] for place in places)

    def place(self, device: str) -> int:
        """Return the place of a device in the order of the members."""
        return self._places[device]

    # -- questions ------------------------------------------------------------------------------------------------

    def count(self, chosen: Chosen) -> int:
        """Count the members of some kinds."""
        return sum(len(cell.places) for kind, cell in self._cells.items() if chosen(kind))

    def any(self, chosen: Chosen) -> bool:
        """Tell whether there is a member of some kinds."""
        return any(chosen(kind) for kind in self._cells)

    def select(self, chosen: Chosen) -> list[Member]:
        """Return the members of some kinds, in order."""
        return list(self.walk(chosen))

    def walk(self, chosen: Chosen) -> Iterator[Member]:
        """Yield the members of some kinds, in order; they must not change meanwhile."""
        for place in self._chosen(chosen):
            self.read += 1
            yield self._members[place]

    def devices(self, chosen: Chosen) -> tuple[str, ...]:
        """Return the devices of some kinds, in order."""
        return tuple(map(self._devices.__getitem__, self._chosen(chosen)))

    def _chosen(self, chosen: Chosen) -> Iterable[int]:
        found = [cell.places for kind, cell in self._cells.items() if chosen(kind)]
        return found[0] if len(found) == 1 else sorted(chain.from_iterable(found))

    def due(self, chosen: Chosen, clock: Clock, now: float) -> list[Member]:
        """Return the members of some kinds whose time has come, in order."""
        places: list[int] = []
        for times in self._times(chosen, clock):
            places += (place for _, place in times[: bisect_right(times, now, key=_time)])
        self.read += len(places)
        return [self._members[place] for place in sorted(places)]

    def later(self, chosen: Chosen, clock: Clock, after: float) -> int:
        """Count the members of some kinds whose time is after another."""
        return sum(len(times) - bisect_right(times, after, key=_time) for times in self._times(chosen, clock))

    def next(self, chosen: Chosen, clock: Clock, after: float) -> float | None:
        """Return the first time of the members of some kinds that is after another."""
        found = None
        for times in self._times(chosen, clock):
            place = bisect_right(times, after, key=_time)
            if place < len(times) and (found is None or times[place][0] < found):
                found = times[place][0]
        return found

    def nth(self, chosen: Chosen, clock: Clock, number: int) -> float:
        """Return the time of the member that is `number`th (from 1) by a clock."""
        return next(islice(heapq.merge(*self._times(chosen, clock)), number - 1, None))[0]

    def available(self) -> Counter[str]:
        """Count the available devices of each site; a copy, in which every site is named."""
        if self._sites is None:
            self._sites = Counter()
            for member, kind in zip(self._members, self._kinds, strict=True):
                self._sites[member.site] += kind.available
        return self._sites.copy()

    def _times(self, chosen: Chosen, clock: Clock) -> Iterator[list[tuple[float, int]]]:
        """Yield the sorted times of each of some kinds; from the first question on they are kept."""
        for kind, cell in self._cells.items():
            if not chosen(kind):
                continue
            times = cell.clocks.get(clock)
            if times is None:
                self.read += len(cell.places)
                times = sorted((clock(self._members[place]), place) for place in cell.places)
                cell.clocks[clock] = times
            yield times


def _time(entry: tuple[float, int]) -> float:
    return entry[0]
