"""TLS contexts for the board: the fleet's own CA and nothing else, with the device certificate where there is one.

A board without a battery-backed clock wakes up in 1970. So the time of verification is `max(wall clock, floor)`: where
the wall clock is behind the floor, OpenSSL is told not to look at the clock, and `check_not_after` compares the peer's
certificate with the floor instead.
"""

import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

NO_CHECK_TIME: Final = 0x200000
"""X509_V_FLAG_NO_CHECK_TIME of OpenSSL; the ssl module has no name for it."""


class StaleCertificateError(ssl.SSLError):
    """The peer's certificate ended before the earliest time that it can be now."""


def context(ca_pem: str, *, clock_behind: bool = False) -> ssl.SSLContext:
    """A client's context that trusts `ca_pem` alone.

    Args:
        ca_pem: the fleet's CA.
        clock_behind: the wall clock is earlier than the floor; the caller then calls `check_not_after`.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.load_verify_locations(cadata=ca_pem)
    if clock_behind:
        made.verify_flags |= NO_CHECK_TIME
    return made


def check_not_after(connection: ssl.SSLSocket, floor: datetime) -> None:
    """Refuse a certificate that ended before `floor`.

    Raises:
        StaleCertificateError: it did, or it does not say.
    """
    certificate = connection.getpeercert()
    not_after = certificate.get("notAfter") if certificate else None
    if not isinstance(not_after, str):
        raise StaleCertificateError("the server's certificate does not say when it ends")
    if datetime.fromtimestamp(ssl.cert_time_to_seconds(not_after), UTC) < floor:
        raise StaleCertificateError(f"the server's certificate ended on {not_after}")


def why(error: ssl.SSLError) -> str:
    """What was wrong with a handshake, for people."""
    return getattr(error, "verify_message", "") or getattr(error, "reason", None) or str(error)


class DeviceTls:
    """Contexts with the device certificate, made anew when its files changed (renewal)."""

    def __init__(self, identity: Path, floor: Callable[[], datetime]) -> None:
        self._identity = identity
        self._floor = floor
        self._made: tuple[tuple[int, bool], ssl.SSLContext] | None = None

    @property
    def clock_behind(self) -> bool:
        """Whether the wall clock is earlier than it can be."""
        return datetime.now(UTC) < self._floor()

    def context(self) -> ssl.SSLContext:
        """The context for the next connection.

        Raises:
            OSError, ssl.SSLError: an identity file is missing or damaged.
        """
        stamp = ((self._identity / "device.pem").stat().st_mtime_ns, self.clock_behind)
        if self._made is None or self._made[0] != stamp:
            made = context((self._identity / "ca.pem").read_text(), clock_behind=stamp[1])
            made.load_cert_chain(self._identity / "device.pem", self._identity / "device.key")
            self._made = (stamp, made)
        return self._made[1]

    def check(self, connection: ssl.SSLSocket) -> None:
        """After a handshake: what OpenSSL was told not to look at. Raises `StaleCertificateError`."""
        if self.clock_behind:
            check_not_after(connection, self._floor())
