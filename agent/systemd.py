"""Interface to systemd: readiness, status, watchdog and journal; does nothing where systemd does not run.

Implements the sd_notify protocol (a datagram to `$NOTIFY_SOCKET`) itself, so that no library is needed. With
systemd-python installed, log records go to the journal with structured fields.
"""

import contextlib
import logging
import logging.handlers
import os
import socket
import time
from io import TextIOWrapper
from pathlib import Path
from typing import Final

from agent import disk
from agent.disk import Write
from fleet.protocol.printable import PrintableFormatter

WATCHDOG_SHARE: Final = 3
FIELD: Final = "WASMFLEET_"
KEPT_BYTES: Final = 4 << 20


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


class KeptLog(logging.handlers.RotatingFileHandler):
    """Log on the disk, over boots, as a journal may be lost at each: the newest records, in two files of 2 MiB.

    No record is waited for: on a full or broken disk it is lost.
    """

    def __init__(self, path: Path) -> None:
        """Append to a file, opened at the first record."""
        super().__init__(path, maxBytes=KEPT_BYTES // 2, backupCount=1, encoding="utf-8", errors="replace", delay=True)
        formatter = PrintableFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        formatter.converter = time.gmtime
        self.setFormatter(formatter)

    def _open(self) -> TextIOWrapper:
        path = Path(self.baseFilename)
        disk.make_directory(Write.DIRECTORY, path.parent, mode=0o700)
        descriptor = disk.open_descriptor(Write.AGENT_LOG, path, os.O_WRONLY | os.O_APPEND)
        return os.fdopen(descriptor, "a", encoding=self.encoding, errors=self.errors)

    def rotate(self, source: str, dest: str) -> None:
        """Keep the full file beside the new one."""
        disk.take_name(Write.AGENT_LOG_TURNED, Path(source), Path(dest))

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name of the standard library
        """Lose a record that cannot be written."""


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
    logging.basicConfig(level=level, handlers=[handler, *([KeptLog(kept)] if kept else [])])
