"""The door to systemd: readiness, status in human sentences, watchdog; and nothing at all where systemd is not there.

The protocol is sd_notify's (one datagram to `$NOTIFY_SOCKET`), spoken directly, so that no library is needed; where
systemd-python is installed, log records go to the journal with their fields.
"""

import contextlib
import logging
import os
import socket
from typing import Final

from fleet.protocol.printable import PrintableFormatter

WATCHDOG_SHARE: Final = 3
FIELD: Final = "WASMFLEET_"


def notify(**fields: str) -> bool:
    """Tell systemd; returns whether there was somebody to tell. `notify(READY="1", STATUS="connected")`."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    message = "\n".join(f"{name}={value.replace(chr(10), ' ')}" for name, value in fields.items())
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.sendto(message.encode(), address)
        return True
    return False


def instances(number: int) -> str:
    """So many instances, for a status."""
    return "1 instance" if number == 1 else f"{number} instances"


def watchdog_s() -> float | None:
    """How often to pet the watchdog: a third of its patience; None where there is none."""
    try:
        if int(os.environ.get("WATCHDOG_PID", os.getpid())) != os.getpid():
            return None
        return int(os.environ["WATCHDOG_USEC"]) / 1e6 / WATCHDOG_SHARE
    except (KeyError, ValueError):
        return None


def fields(**values: object) -> dict[str, str]:
    """Journal fields of a log record (its `extra`), such as WASMFLEET_INSTANCE; what is empty is left out."""
    return {f"{FIELD}{name.upper()}": str(value) for name, value in values.items() if value}


def log_to_journal(level: int, **always: object) -> None:
    """Log to the journal where systemd-python is there and stderr is the journal, else as lines on stderr.

    Args:
        level: what is less is left out.
        always: fields that each record of the journal gets.
    """
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if os.environ.get("JOURNAL_STREAM"):
        with contextlib.suppress(ImportError):
            from systemd import journal  # noqa: PLC0415 - optional: Debian's python3-systemd

            handler = journal.JournalHandler(SYSLOG_IDENTIFIER="fleet-agent", **fields(**always))
            handler.setFormatter(PrintableFormatter("%(message)s"))  # level and logger are fields
    logging.basicConfig(level=level, handlers=[handler])
