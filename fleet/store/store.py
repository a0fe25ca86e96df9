"""The server's memory: one database, five views of it. Nothing outside this package knows that it is SQL."""

from contextlib import AbstractContextManager
from pathlib import Path

from fleet.store.access import Access
from fleet.store.boxes import Boxes
from fleet.store.database import Database
from fleet.store.delivery import Delivery
from fleet.store.devices import Devices
from fleet.store.rollouts import Rollouts


class Store:
    """Boards, access, rollouts, delivery and secrets over one database."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self.devices = Devices(db)
        self.access = Access(db)
        self.rollouts = Rollouts(db)
        self.delivery = Delivery(db)
        self.boxes = Boxes(db)

    @classmethod
    def open(cls, path: Path, *, fleet: str) -> "Store":
        """Open a fleet's store; raises the errors of `fleet.store.errors`."""
        return cls(Database.open(path, fleet=fleet))

    def atomic(self) -> AbstractContextManager[None]:
        """All or nothing."""
        return self._db.atomic()

    def savepoint(self) -> AbstractContextManager[None]:
        """A part of a transaction that is undone alone when it raises.

        Raises:
            RolledBackError: the whole transaction is gone.
        """
        return self._db.savepoint()

    def backup(self, path: Path) -> None:
        """A consistent copy into a new file."""
        self._db.backup(path)

    def close(self) -> None:
        """Close it."""
        self._db.close()
