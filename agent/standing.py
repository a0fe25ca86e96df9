"""Where the board stands: what is wanted, what is committed, and what is being changed."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from agent.carry import Outcome
from agent.config import Places
from agent.records import Change, Committed, item_key
from fleet.protocol.assignment import Assignment, Item


@dataclass(frozen=True, slots=True, kw_only=True)
class Board:
    """What a deployment has to know of the board it runs on.

    Attributes:
        clock: seconds that do not jump (boot time).
    """

    device: str
    boot_id: str
    places: Places
    mac_key: bytes
    clock: Callable[[], float]


@dataclass(slots=True)
class Flight:
    """A change under way.

    Attributes:
        superseded: something else is wanted, and it shall end as soon as it may.
        over: nothing of it is kept any more.
        work: the effect being carried out.
        log: the instance's last lines, for the next report of a failure.
        progress_at: when a download's progress was last said.
        lock: held while the change is advanced or relabelled, and persisted.
    """

    change: Change
    superseded: bool = False
    over: bool = False
    work: asyncio.Task[Outcome] | None = None
    log: tuple[str, ...] = ()
    progress_at: float = 0.0
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(slots=True)
class Standing:
    """Everything that is wanted, committed, under way, and failed for good; by instance.

    Attributes:
        failed: (instance, key, attempt) of what was tried and failed.
    """

    assignment: Assignment | None = None
    committed: dict[str, Committed] = field(default_factory=dict)
    flights: dict[str, Flight] = field(default_factory=dict)
    failed: set[tuple[str, str, int]] = field(default_factory=set)

    def wanted(self) -> dict[str, Item]:
        """The desired items by instance."""
        return {} if self.assignment is None else {item.instance: item for item in self.assignment.items}

    def is_committed(self, instance: str) -> bool:
        """Whether what is wanted under this name is what is committed."""
        item, have = self.wanted().get(instance), self.committed.get(instance)
        return item is not None and have is not None and item_key(have.item) == item_key(item)

    def has_failed(self, instance: str) -> bool:
        """Whether what is wanted under this name was tried and failed."""
        item = self.wanted().get(instance)
        return item is not None and (instance, item_key(item), item.attempt) in self.failed

    def all_committed(self) -> bool:
        """Whether the board is exactly as wanted."""
        have = {name: item_key(each.item) for name, each in self.committed.items()}
        return have == {name: item_key(item) for name, item in self.wanted().items()}
