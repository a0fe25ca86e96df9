"""Log of the agent on the disk, over boots (`fleet-agent diagnose` reads it)."""

import logging
import logging.handlers
import os
import time
from io import TextIOWrapper
from pathlib import Path
from typing import Final

from agent import disk
from agent.disk import Write
from fleet.protocol.printable import PrintableFormatter

KEPT_BYTES: Final = 4 << 20


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
