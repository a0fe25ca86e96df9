"""What can be wrong with a server's database, each a sentence for people.

StoreError
  OtherVersionError   written by a newer program
  OtherOwnerError     belongs to another user, or may not be written
  OtherFleetError     holds another fleet
  DamagedError        not a database, or damaged
"""


class StoreError(Exception):
    """The database cannot be used."""


class OtherVersionError(StoreError):
    """Written by a newer program than this one."""


class OtherOwnerError(StoreError):
    """Belongs to another user, or may not be written."""


class OtherFleetError(StoreError):
    """Holds another fleet than the configuration says."""


class RolledBackError(StoreError):
    """SQLite gave up a whole transaction by itself, as it does when the disk is full: nothing of it was kept."""


class DamagedError(StoreError):
    """Not a database, or damaged."""
