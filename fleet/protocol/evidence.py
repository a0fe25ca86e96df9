"""What a publisher may bind beside a component: where it came from and what is in it.

A signed target names each such file by kind, sha256 and length (`custom.evidence`). Boards read none of them: they are
for people who ask later which boards run a package, and who built it.
"""

from typing import Final

import msgspec

from fleet.protocol import names
from fleet.protocol.caps import MIB, Count

CYCLONEDX: Final = "cyclonedx"
SPDX: Final = "spdx"
PROVENANCE: Final = "slsa-provenance"
SBOMS: Final = frozenset({CYCLONEDX, SPDX})

MAX_BYTES: Final = 16 * MIB
"""Of one file."""
FILES_MAX: Final = 8
"""Of one target."""


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """One file: `kind` is a label (`cyclonedx`, `spdx`, `slsa-provenance`, or a later one that is only passed on)."""

    kind: str
    sha256: str
    length: Count


class BadEvidenceError(ValueError):
    """What is bound beside a target cannot be read."""


def convert(value: object) -> tuple[Evidence, ...]:
    """Read `custom.evidence` from decoded JSON; None for nothing.

    Raises:
        BadEvidenceError: not a list of files with kind, sha256 and length, or too many.
    """
    if value is None:
        return ()
    try:
        found = msgspec.convert(value, tuple[Evidence, ...])
        for each in found:
            names.check_label(each.kind, "kind")
            names.check_sha256(each.sha256)
    except (msgspec.ValidationError, names.BadNameError) as error:
        raise BadEvidenceError(f"evidence: {error}") from error
    if len(found) > FILES_MAX or any(not 0 < each.length <= MAX_BYTES for each in found):
        raise BadEvidenceError(f"evidence: at most {FILES_MAX} files of 1 to {MAX_BYTES} bytes are kept")
    return found
