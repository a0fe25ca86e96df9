"""The layout of an offline bundle: a plain tar that carries to a board what the network would have.

Nothing in it is trusted for being in it. The metadata, the assignments and the artifacts are the same bytes that the
server gives, and the board judges them in the same way.

    bundle.json             version of this layout
    desired/<device>.json   one assignment envelope a board
    tuf/<file>              metadata, named as in the repository
    artifacts/<sha256>      components
    secrets/<sha256>        secrets of boards that were named, each in a box that its board alone can open
"""

import re
from typing import Final

from fleet.protocol import caps

HEAD: Final = "bundle.json"
VERSION: Final = 1
MEMBERS_MAX: Final = 20_000
_NAME: Final = re.compile(
    r"bundle\.json"
    r"|desired/[a-z0-9][a-z0-9-]{0,80}\.json"
    r"|tuf/(?:timestamp|[1-9][0-9]{0,15}\.[a-z0-9-]{1,80}(?:\.bins-[0-9a-f]{1,3})?)\.json"
    r"|(?:artifacts|secrets)/[0-9a-f]{64}"
)


def desired(device: str) -> str:
    """Where a board's assignment lies."""
    return f"desired/{device}.json"


def metadata(file: str) -> str:
    """Where a metadata file lies."""
    return f"tuf/{file}"


def artifact(sha256: str) -> str:
    """Where a component lies."""
    return f"artifacts/{sha256}"


def secret(sha256: str) -> str:
    """Where a sealed secret lies."""
    return f"secrets/{sha256}"


def max_bytes(name: str) -> int:
    """How large a member of this name may be; 0 for a name that no bundle has."""
    if not _NAME.fullmatch(name):
        return 0
    match name.partition("/")[0]:
        case "artifacts":
            return caps.ARTIFACT_MAX_BYTES
        case "tuf":
            return caps.TARGETS_MAX_BYTES
        case "secrets":
            return caps.SECRET_BOX_MAX_BYTES
        case "desired":
            return caps.DESIRED_MAX_BYTES
        case _:
            return caps.KIB
