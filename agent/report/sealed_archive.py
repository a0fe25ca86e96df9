"""Archive about this device for an operator, made in a process of its own: `python -m agent.report.sealed_archive`.

An `ArchiveRequest` comes on standard input, since the settings may hold a proxy's password; the sealed archive goes to
standard output, a file in memory, so that neither a full nor a read-only disk is in its way. What checks, reads and
compresses ends with this process, and its memory with it.
"""

import contextlib
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import msgspec

from agent.config import Paths
from agent.identity import identity
from agent.report import diagnose, status
from agent.report.archive_sender import ArchiveRequest
from agent.update.store import HISTORY_ROWS, StoreError
from fleet.protocol import wire
from signing import sealing
from signing.sealing import ArchivePurpose

_REQUEST_MAX_BYTES: Final = 1 << 20


def sealed(request: ArchiveRequest) -> bytes:
    """Return the archive that the owner's policy allows, sealed to its recipient. Raises `SigningError`."""
    places = Paths(Path(request.state), Path(request.runtime))
    try:
        found = status.read_device(places, identity.load(places.identity), rows=HISTORY_ROWS)
    except (identity.IdentityError, StoreError) as error:  # the rest is wanted all the more
        found = status.unknown(str(error))
    extent = diagnose.Extent.allowed(request.settings.policy)
    subject = diagnose.Subject(places, None, request.settings, found, nullcontext, extent)
    purpose = ArchivePurpose(device=request.device, command=request.command)
    return sealing.seal_archive(diagnose.packed(subject), recipient=request.recipient, purpose=purpose)


def main() -> int:
    """Read the request and write the sealed archive; return the exit code."""
    try:
        request = msgspec.json.decode(sys.stdin.buffer.read(_REQUEST_MAX_BYTES), type=ArchiveRequest)
    except wire.JSON_ERRORS as error:
        sys.stderr.write(f"the request cannot be read: {error}; was the agent upgraded meanwhile?\n")
        return 1
    output = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    with contextlib.redirect_stdout(sys.stderr), output:
        output.write(sealed(request))
    return 0


if __name__ == "__main__":
    sys.exit(main())
