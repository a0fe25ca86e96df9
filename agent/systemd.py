"""Interface to systemd: readiness, status, watchdog and journal; does nothing where systemd does not run.

Implements the sd_notify protocol (a datagram to `$NOTIFY_SOCKET`) itself, so that no library is needed. With
systemd-python installed, log records go to the journal with structured fields.
"""

import contextlib
import logging
import os
import socket
from pathlib import Path
from typing import Final

from fleet.protocol.printable import PrintableFormatter

WATCHDOG_SHARE: Final = 3
FIELD: Final = "WASMFLEET_"


def notify(**fields: str) -> bool:
    """Send a notification to systemd, such as `notify(READY="1", STATUS="connected")`; return whether it was sent."""
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
    """Format a number of instances for a status line."""
    return "1 instance" if number == 1 else f"{number} instances"


def watchdog_s() -> float | None:
    """Return the interval of watchdog notifications, a third of the watchdog's timeout; None without a watchdog."""
    try:
        if int(os.environ.get("WATCHDOG_PID", os.getpid())) != os.getpid():
            return None
        return int(os.environ["WATCHDOG_USEC"]) / 1e6 / WATCHDOG_SHARE
    except (KeyError, ValueError):
        return None


def fields(**values: object) -> dict[str, str]:
    """Return journal fields for a log record's `extra`, such as WASMFLEET_INSTANCE; empty values are left out."""
    return {f"{FIELD}{name.upper()}": str(value) for name, value in values.items() if value}


def log_to_journal(level: int, kept: Path | None = None, **always: object) -> None:
    """Log to the journal if systemd-python is installed and stderr is the journal, otherwise as lines on stderr.

    Args:
        level: minimum level of the records.
        kept: file that keeps the newest records too, over boots; None for none.
        always: fields that every record in the journal gets.
    """
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if os.environ.get("JOURNAL_STREAM"):
        with contextlib.suppress(ImportError):
            from systemd import journal  # noqa: PLC0415 - optional: Debian's python3-systemd

            handler = journal.JournalHandler(SYSLOG_IDENTIFIER="fleet-agent", **fields(**always))
            handler.setFormatter(PrintableFormatter("%(message)s"))  # level and logger are fields
    handlers = [handler]
    if kept is not None:
        from agent.kept_log import KeptLog  # noqa: PLC0415 - not for the host, which imports this module too

        handlers.append(KeptLog(kept))
    logging.basicConfig(level=level, handlers=handlers)
