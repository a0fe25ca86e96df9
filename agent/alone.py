"""One agent for one state directory: a second would take the first one's place at the broker, again and again."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NotAloneError(Exception):
    """Another agent runs on the same state directory; the message says what to do."""


@contextmanager
def alone(lock: Path) -> Iterator[None]:
    """Hold a state directory's lock; the kernel lets go of it when the process ends, however it ends.

    Raises:
        NotAloneError: another process holds it.
        OSError: it cannot be written.
    """
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NotAloneError(
                f"another agent runs on {lock.parent}: stop it, or give this one a --state of its own"
            ) from None
        yield
    finally:
        os.close(descriptor)
