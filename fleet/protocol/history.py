"""What the operator API shows of a board's own words, beside `fleet.protocol.api`."""

import msgspec

from fleet.protocol.api import View
from fleet.protocol.caps import Stored


class History(View, frozen=True, kw_only=True):
    """A page of a board's reports, as it signed them: the way to prove what it ran (`signing.audit`).

    Attributes:
        certificate_pem: its newest certificate; the key in it never changes.
        reports: envelopes, byte for byte.
        boot_id, sequence: of the last one, to ask for what is behind it; 0 where there was nothing more.
    """

    device: str
    certificate_pem: str
    reports: tuple[msgspec.Raw, ...] = ()
    boot_id: str = ""
    sequence: Stored = 0
