"""HTTPS client of the device, built on the standard library: small requests, resumable downloads, TLS.

Every exchange has a byte limit and a total deadline. A download also has a minimum rate, and resumes with a Range
request where the last attempt ended, even after a reboot. Nothing received is trusted: a file gets its final name only
after its length and sha256 have been checked. All functions block, and are called on worker threads.

TLS trusts only the fleet's CA, and presents the device certificate if there is one. Certificates are verified at the
reference time (`agent.clock.ReferenceClock`): while the system clock is behind the floor, OpenSSL ignores the clock,
and `check_not_after` compares the peer's certificate with the floor.
"""

import contextlib
import errno
import hashlib
import http.client
import logging
import os
import random
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import IO, Final, Protocol

import msgspec

from agent import disk
from agent.clock import ReferenceClock
from agent.disk import Write
from agent.happy_eyeballs import NoAnswerError
from agent.link import dialer
from agent.link.partial_file import PartialFile
from agent.proxy import authority
from fleet.protocol import bounds, files, wire
from fleet.protocol.codes import RejectCode

log = logging.getLogger("agent.link.https")

CHUNK_BYTES: Final = 64 * 1024
RATE_WINDOW_S: Final = 30.0
USER_AGENT: Final = "wasmfleet-agent"
CONNECT_S: Final = 20.0
RETRY_AFTER_MAX_S: Final = 86_400
_SLACK_S: Final = 0.1
"""Delay of the last measure after a deadline, which is usually noticed between two pieces."""

_WORDS_MAX: Final = 500
_LOGIN_PAGE: Final = (
    "something on the way answers in place of the server, such as the login page of a network: log in there, or let "
    "this device through"
)
_NO_TLS: Final = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"})
"""OpenSSL's reasons where the peer does not speak TLS."""

_MEANINGS: Final = {
    http.client.UNAUTHORIZED: "it asks for a certificate, which something on the way may have taken off",
    http.client.FORBIDDEN: "it refuses this device",
    http.client.METHOD_NOT_ALLOWED: "it does not know this request: it may be of an earlier version",
    http.client.REQUEST_TIMEOUT: "the request took too long",
    http.client.REQUEST_ENTITY_TOO_LARGE: "the request is too large",
    http.client.TOO_MANY_REQUESTS: "this device asks too often",
    http.client.INTERNAL_SERVER_ERROR: "it has a problem of its own, which its log describes",
    http.client.BAD_GATEWAY: "what stands before the server cannot reach it",
    http.client.SERVICE_UNAVAILABLE: "it is starting, stopping or busy",
    http.client.GATEWAY_TIMEOUT: "the server does not answer what stands before it",
    http.client.NETWORK_AUTHENTICATION_REQUIRED: _LOGIN_PAGE,
}


class Problem(msgspec.Struct, frozen=True):
    """Problem that a server answers with (RFC 9457), as far as an agent reads it; empty where an answer is none."""

    type: str = ""
    title: str = ""
    detail: str = ""
    action: str = ""

    @classmethod
    def read(cls, body: bytes) -> "Problem":
        """Return the problem in the body of an answer."""
        try:
            return msgspec.json.decode(body, type=cls)
        except wire.JSON_ERRORS:
            return cls()

    @property
    def words(self) -> str:
        """Sentence for people, of bounded length; empty for none."""
        sentence = ": ".join(filter(None, (self.title, self.detail)))
        return (sentence + (f" ({self.action})" if self.action else ""))[:_WORDS_MAX]


class FetchError(Exception):
    """A transfer failed: the network, the server or the disk.

    Attributes:
        code: reason, from the vocabulary of reports.
        message: a sentence for people.
        status, body: of the HTTP response; 0 and empty without a response.
        retry_after_s: time before which the server does not want to be asked again; 0 for none.
    """

    def __init__(
        self, code: RejectCode, message: str, *, status: int = 0, body: bytes = b"", retry_after_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.code = code
        self.message = message
        self.status = status
        self.body = body


class CancelledError(Exception):
    """The caller cancelled the download."""


class Source(Protocol):
    """Source of files. Passed as a value, so that no thread changes another thread's source."""

    def request(self, method: str, path: str, *, max_bytes: int) -> bytes:
        """Return the body of the response; raises `FetchError`."""


class Poster(Protocol):
    """Client that posts too."""

    def request(
        self,
        method: str,
        path: str,
        *,
        max_bytes: int,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        within_s: float | None = None,
    ) -> bytes:
        """Return the body of the answer; raises `FetchError`."""


class ArtifactSource(Source, Protocol):
    """Source of artifacts too."""

    def download(
        self,
        path: str,
        into: Path,
        *,
        length: int,
        sha256: str,
        progress: Callable[[int], None],
        cancelled: threading.Event,
    ) -> None:
        """Fetch a file of known length and hash, see `HttpsClient.download`."""


@dataclass(frozen=True, slots=True)
class ConnectionTls:
    """TLS settings of a connection.

    Attributes:
        context: for the handshake.
        floor: earliest possible current time, if the context ignores the system clock; None if it uses the clock.
    """

    context: ssl.SSLContext
    floor: datetime | None = None

    def check(self, connection: ssl.SSLSocket) -> None:
        """Check the certificate's end after the handshake, if the context does not. Raises `StaleCertificateError`."""
        if self.floor is not None:
            check_not_after(connection, self.floor)


class Tls(Protocol):
    """Source of TLS settings (`agent.link.https.DeviceTls`)."""

    def for_connection(self) -> ConnectionTls:
        """Return the settings of the next connection; raises `OSError` if a certificate or key cannot be read."""


@dataclass(frozen=True, slots=True)
class FixedTls:
    """TLS settings with the same context for every connection: for enrolment and tests."""

    context: ssl.SSLContext
    floor: datetime | None = None

    def for_connection(self) -> ConnectionTls:
        """Return the settings of the next connection."""
        return ConnectionTls(self.context, self.floor)


class HttpsClient:
    """HTTPS client of a single base URL."""

    def __init__(
        self,
        base: str,
        tls: Tls,
        *,
        proxy: str = "",
        request_s: float = 30.0,
        download_s: float = 3600.0,
        min_rate_bytes_s: int = 256,
        reserve_bytes: int = 0,
    ) -> None:
        """Prepare a client; each request opens its own connection.

        Args:
            base: `https://host:port`.
            tls: source of TLS settings.
            proxy: `http://[user:password@]host:port`; empty to use the environment's, if any.
            request_s: total time of a small request.
            download_s: total time of a download attempt.
            min_rate_bytes_s: minimum rate of a download over half a minute; a slower one is aborted (TOO_SLOW).
            reserve_bytes: to keep free on the file system of a download.
        """
        self._url = urllib.parse.urlsplit(base)
        self._tls = tls
        self._proxy = proxy
        self._request_s = request_s
        self._download_s = download_s
        self._min_rate = min_rate_bytes_s
        self._reserve = reserve_bytes
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._closed = 0

    def close(self) -> None:
        """End all requests under way, which fail; later ones work."""
        with self._lock:
            self._closed += 1
            for sock in self._open:
                _shut(sock)

    @contextlib.contextmanager
    def _exchange(
        self, method: str, path: str, body: bytes | IO[bytes] | None, headers: dict[str, str], deadline: float
    ) -> Iterator[tuple[http.client.HTTPResponse, http.client.HTTPSConnection]]:
        host, port = self._url.hostname or "", self._url.port or 443
        where = authority(host, port)
        try:
            tls = self._tls.for_connection()
        except (OSError, ValueError) as error:  # a file of the identity is missing or damaged
            reason = why(error) if isinstance(error, ssl.SSLError) else str(error)
            raise FetchError(RejectCode.UNREACHABLE, f"{where}: TLS: {reason}") from error
        connection = http.client.HTTPSConnection(host, port, context=tls.context)
        closed = self._closed
        try:
            connection.sock = secured = self._connect(host, port, tls, deadline)
            with self._watched(secured, closed, deadline):
                secured.do_handshake()
                tls.check(secured)
                base = self._url.path.rstrip("/")
                connection.request(method, base + path, body, {"User-Agent": USER_AGENT, **headers})
                yield connection.getresponse(), connection
        except (OSError, http.client.HTTPException) as error:
            raise _failure(error, where, path, late=time.monotonic() >= deadline) from error
        finally:
            connection.close()

    def _connect(self, host: str, port: int, tls: ConnectionTls, deadline: float) -> ssl.SSLSocket:
        """Return a connected socket, before its handshake."""
        left = max(0.1, deadline - time.monotonic())
        proxy = dialer.proxy_for(host, self._proxy)
        plain = dialer.connect(host, port, timeout_s=min(left, CONNECT_S), proxy=proxy)
        try:
            plain.settimeout(max(0.1, deadline - time.monotonic()))
            return tls.context.wrap_socket(plain, server_hostname=host, do_handshake_on_connect=False)
        except BaseException:
            plain.close()
            raise

    @contextlib.contextmanager
    def _watched(self, sock: socket.socket, closed: int, deadline: float) -> Iterator[None]:
        """Shut the connection at the deadline, however steadily the peer sends single bytes, or when `close` says so.

        Args:
            sock: the connection.
            closed: number of calls of `close` before this request began.
            deadline: of the whole exchange.
        """
        timer = threading.Timer(max(0.0, deadline - time.monotonic()) + _SLACK_S, _shut, (sock,))
        timer.daemon = True
        with self._lock:
            self._open.add(sock)
            if self._closed != closed:
                _shut(sock)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            with self._lock:
                self._open.discard(sock)

    def request(
        self,
        method: str,
        path: str,
        *,
        max_bytes: int,
        body: bytes | IO[bytes] | None = None,
        headers: dict[str, str] | None = None,
        within_s: float | None = None,
    ) -> bytes:
        """Send a small request and return the body of the response; it takes `within_s`, or `request_s`, at most.

        The body may be a file, read from where it stands; `headers` then say its length.

        Raises:
            FetchError: NOT_FOUND (404 or 410), TOO_LARGE, TOO_SLOW, UNREACHABLE (also for any other status).
        """
        deadline = time.monotonic() + (self._request_s if within_s is None else within_s)
        with self._exchange(method, path, body, headers or {}, deadline) as (answer, connection):
            data = bytearray()
            while chunk := self._read(answer, connection, deadline):
                data += chunk
                if len(data) > max_bytes:
                    raise FetchError(RejectCode.TOO_LARGE, f"{path}: more than {max_bytes} bytes")
            if answer.status not in {http.client.OK, http.client.CREATED}:
                raise _refusal(answer, path, bytes(data))
            if answer.length:
                raise FetchError(RejectCode.UNREACHABLE, f"{path}: the response ended early")
            return bytes(data)

    @staticmethod
    def _read(answer: http.client.HTTPResponse, connection: http.client.HTTPSConnection, deadline: float) -> bytes:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        if connection.sock is not None:
            connection.sock.settimeout(left)
        chunk = answer.read1(CHUNK_BYTES)
        if not chunk and time.monotonic() >= deadline:
            raise TimeoutError
        return chunk

    def download(
        self,
        path: str,
        into: Path,
        *,
        length: int,
        sha256: str,
        progress: Callable[[int], None] = lambda _received: None,
        cancelled: threading.Event | None = None,
    ) -> None:
        """Fetch a file of known length and hash to `into`, resuming `<into>.part` from an earlier attempt.

        A power cut may leave a partial file with stale blocks: it is resumed from its last checkpoint. A file that was
        resumed and has another hash is fetched once more from its start, before that says anything of the server.

        Args:
            path: below the base URL.
            into: final name of the file.
            length: in bytes, as signed.
            sha256: in hex, as signed.
            progress: called with the number of bytes received so far.
            cancelled: event that aborts the download.

        Raises:
            FetchError: NO_SPACE, LENGTH_MISMATCH and HASH_MISMATCH (the partial file is removed), NOT_FOUND,
                UNREACHABLE, TOO_SLOW, INTERNAL.
            CancelledError: `cancelled` was set; the partial file is kept.
        """
        part = into.with_name(into.name + ".part")
        try:
            disk.make_directory(Write.DIRECTORY, into.parent, mode=0o700)
            partial = PartialFile(part)
            have = partial.proven()
            if have > length:
                partial.remove()
                have = 0
            self._check_space(into.parent, length - have)
            start = self._continue(path, partial, have, length, progress, cancelled) if have < length else have
            try:
                finish(part, into, length, sha256)
            except FetchError as error:
                if not start:
                    raise
                log.warning("%s: resumed after %d bytes, and starts over: %s", path, start, error.message)
                self._continue(path, partial, 0, length, progress, cancelled)
                finish(part, into, length, sha256)
        except OSError as error:
            code = RejectCode.NO_SPACE if error.errno in {errno.ENOSPC, errno.EDQUOT} else RejectCode.INTERNAL
            raise FetchError(code, f"cannot write {into}: {error.strerror}") from error

    def _check_space(self, directory: Path, needed: int) -> None:
        free = os.statvfs(directory)
        if free.f_bavail * free.f_frsize < needed + self._reserve:
            raise FetchError(
                RejectCode.NO_SPACE,
                f"{directory} needs {needed} more bytes, but has {free.f_bavail * free.f_frsize} free, "
                f"of which {self._reserve} are kept in reserve",
            )

    def _continue(
        self,
        path: str,
        part: PartialFile,
        have: int,
        length: int,
        progress: Callable[[int], None],
        cancelled: threading.Event | None,
    ) -> int:
        """Fetch what a partial file lacks; return from which byte on the server sent it, 0 for all of it."""
        deadline = time.monotonic() + self._download_s
        headers = {"Range": f"bytes={have}-"} if have else {}
        with self._exchange("GET", path, None, headers, deadline) as (answer, connection):
            if answer.status == http.client.OK:
                have = 0
            elif answer.status != http.client.PARTIAL_CONTENT or not (
                answer.getheader("Content-Range") or ""
            ).startswith(f"bytes {have}-"):
                if answer.status in {http.client.PARTIAL_CONTENT, http.client.REQUESTED_RANGE_NOT_SATISFIABLE}:
                    part.remove()
                    raise FetchError(RejectCode.UNREACHABLE, f"{path}: the server does not resume; starting over")
                raise _refusal(answer, path, answer.read1(CHUNK_BYTES))
            start = have
            with part.open(have) as file:
                rate = _Rate(self._min_rate)
                while have < length + 1:
                    if cancelled is not None and cancelled.is_set():
                        raise CancelledError
                    window = min(deadline, time.monotonic() + RATE_WINDOW_S)
                    chunk = self._read(answer, connection, window)
                    if not chunk:
                        break
                    have += len(chunk)
                    if have > length:
                        part.remove()
                        raise FetchError(RejectCode.LENGTH_MISMATCH, f"{path}: more than the signed {length} bytes")
                    file.write(chunk)
                    rate.received(len(chunk))
                    progress(have)
        if have < length:
            raise FetchError(RejectCode.UNREACHABLE, f"{path}: the transfer ended after {have} of {length} bytes")
        return start


class _Rate:
    """Guard against transfers that are too slow."""

    def __init__(self, min_bytes_s: int) -> None:
        self._min = min_bytes_s
        self._since = time.monotonic()
        self._bytes = 0

    def received(self, count: int) -> None:
        """Count received bytes; raises `TimeoutError` if a whole window was too slow."""
        self._bytes += count
        elapsed = time.monotonic() - self._since
        if elapsed >= RATE_WINDOW_S:
            if self._bytes < self._min * elapsed:
                raise TimeoutError
            self._since, self._bytes = time.monotonic(), 0


def _shut(sock: socket.socket) -> None:
    """End a connection under the thread that uses it."""
    with contextlib.suppress(OSError):
        socket.socket.shutdown(sock, socket.SHUT_RDWR)  # an SSLSocket's own would change it under that thread


def _failure(error: OSError | http.client.HTTPException, where: str, path: str, *, late: bool) -> FetchError:
    """Return the error for a transfer that failed without an answer; `late`: its time was over."""
    code = RejectCode.UNREACHABLE
    match error:
        case NoAnswerError():
            text = f"{where}: {error}"
            code = RejectCode.TOO_SLOW if error.timed_out else code
        case OSError() if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            code, text = RejectCode.NO_SPACE, f"no space left on the disk ({error.filename or path})"
        case _ if late or isinstance(error, TimeoutError):
            code, text = RejectCode.TOO_SLOW, f"{where}: no answer in time"
        case ssl.SSLError():
            hint = f" ({_LOGIN_PAGE})" if getattr(error, "reason", "") in _NO_TLS else ""
            text = f"{where}: TLS: {why(error)}{hint}"
        case socket.gaierror():
            text = str(error.strerror)
        case OSError():
            text = f"{where}: {error.strerror or error}"
        case _:
            text = f"{where}: not HTTP: {type(error).__name__}"
    return FetchError(code, text)


def _refusal(answer: http.client.HTTPResponse, path: str, body: bytes) -> FetchError:
    """Return the error for a status other than success, in the server's words if it has any."""
    status = answer.status
    after_s = _retry_after(answer.getheader("Retry-After") or "")
    if status in {http.client.NOT_FOUND, http.client.GONE}:
        text = f"{path}: the server does not have it"
        return FetchError(RejectCode.NOT_FOUND, text, status=status, body=body, retry_after_s=after_s)
    text = f"{path}: the server answered {status}: {Problem.read(body).words or meaning(status)}"
    return FetchError(RejectCode.UNREACHABLE, text, status=status, body=body, retry_after_s=after_s)


def meaning(status: int) -> str:
    """Return what a status other than success means for a device, for people."""
    if status in _MEANINGS:
        return _MEANINGS[status]
    if status < http.client.MULTIPLE_CHOICES:
        return "that is no answer to this request: something on the way may answer in place of the server"
    if status < http.client.BAD_REQUEST:
        return _LOGIN_PAGE
    return "it refuses this request" if status < http.client.INTERNAL_SERVER_ERROR else "it has a problem of its own"


def _retry_after(value: str) -> float:
    """Return the seconds of a header Retry-After (RFC 9110, section 10.2.3), at most a day; 0 for none."""
    seconds = bounds.parse_number(value.strip().encode())
    if seconds is None:
        try:
            seconds = int((parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
        except (TypeError, ValueError):
            return 0.0
    return float(min(max(seconds, 0), RETRY_AFTER_MAX_S))


def spread(window_s: float, at_least_s: float = 0.0) -> float:
    """Return a random delay within a window that begins at `at_least_s`, so that devices do not come at once."""
    return at_least_s + random.uniform(0, max(window_s, at_least_s))  # noqa: S311 - jitter, not a secret


def finish(part: Path, into: Path, length: int, sha256: str) -> None:
    """Check a file's length and hash and give it its final name, or remove it. Raises `FetchError`, `OSError`."""
    with files.open_to_read(part) as file:
        size = os.fstat(file.fileno()).st_size
        found = hashlib.file_digest(file, "sha256").hexdigest() if size == length else "of another length"
        PartialFile(part).forget()
        if size != length or found != sha256:
            disk.remove(Write.PART_DROPPED, part)
            raise FetchError(
                RejectCode.HASH_MISMATCH,
                f"the artifact has sha256 {found[:16]}..., but {sha256[:16]}... is signed: "
                "it was changed in transit or on the server",
            )
        os.fchmod(file.fileno(), 0o444)
    disk.move(Write.ARTIFACT, part, into)


PEM_MAX_BYTES: Final = bounds.MIB
"""Bound of a file with certificates or a key."""
NO_CHECK_TIME: Final = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which the ssl module has no name."""


class StaleCertificateError(ssl.SSLError):
    """The peer's certificate expired before the earliest possible current time."""


def context(ca_pem: str, *, clock_behind: bool = False) -> ssl.SSLContext:
    """Make a client's TLS context that trusts only `ca_pem`.

    Args:
        ca_pem: certificate of the fleet's CA.
        clock_behind: ignore the system clock, as it is behind the floor; the caller must call `check_not_after`.
    """
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.load_verify_locations(cadata=ca_pem)
    if clock_behind:
        made.verify_flags |= NO_CHECK_TIME
    return made


def check_not_after(connection: ssl.SSLSocket, floor: datetime) -> None:
    """Refuse a peer whose certificate expired before `floor`.

    Raises:
        StaleCertificateError: the certificate has expired, or has no end date.
    """
    certificate = connection.getpeercert()
    not_after = certificate.get("notAfter") if certificate else None
    if not isinstance(not_after, str):
        raise StaleCertificateError("the server's certificate has no end date")
    if datetime.fromtimestamp(ssl.cert_time_to_seconds(not_after), UTC) < floor:
        raise StaleCertificateError(f"the server's certificate expired on {not_after}")


def why(error: ssl.SSLError) -> str:
    """Return the reason of a failed handshake, for people."""
    text = error.args[-1] if error.args else error  # str() of an SSLError with a single argument shows a tuple
    return getattr(error, "verify_message", "") or getattr(error, "reason", None) or str(text)


class DeviceTls:
    """TLS settings with the device certificate, read again after its renewal. Thread-safe."""

    def __init__(self, identity: Path, clock: ReferenceClock) -> None:
        self._identity = identity
        self._clock = clock
        self._lock = threading.Lock()
        self._contexts: dict[bool, tuple[int, ssl.SSLContext]] = {}

    def for_connection(self) -> ConnectionTls:
        """Return the settings of the next connection; they stay the same even if the clock is set meanwhile.

        Raises:
            OSError, ssl.SSLError: an identity file is missing or damaged.
        """
        floor = self._clock.floor if self._clock.behind else None
        return ConnectionTls(self._context(clock_behind=floor is not None), floor)

    def _context(self, *, clock_behind: bool) -> ssl.SSLContext:
        with self._lock:
            changed = (self._identity / "device.pem").stat().st_mtime_ns
            kept = self._contexts.get(clock_behind)
            if kept is None or kept[0] != changed:
                ca, pem, key = (self._identity / name for name in ("ca.pem", "device.pem", "device.key"))
                made = context(files.read_text(ca, max_bytes=PEM_MAX_BYTES), clock_behind=clock_behind)
                for each in (pem, key):
                    files.read(each, max_bytes=PEM_MAX_BYTES)  # OpenSSL would wait for a named pipe
                made.load_cert_chain(pem, key)
                self._contexts[clock_behind] = kept = (changed, made)
            return kept[1]
