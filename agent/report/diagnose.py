"""Archive of what is known of this device, for whoever helps its owner: `fleet-agent diagnose`.

Read from files, the kernel and the host, without the agent, and on a read-only disk too. Each member and the whole have
a bound. Nothing secret goes in: no file of the identity, no sealed secret, no component's configuration, no password of
a proxy. As a second barrier, every member is searched for this device's keys, its components' secrets, private keys,
tokens, and passwords in addresses and in the environment; what is found is masked, however it is written.

The owner gives everything away by the command itself. What an operator may have without the owner's presence is less:
see `Extent`.

Root may read the logs of instances and of the kernel. Whatever belongs to the agent's user is read as that user, who
could put a link to a file of root's there.
"""

import base64
import contextlib
import errno
import gzip
import io
import json
import os
import platform
import re
import stat
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any, Final, NamedTuple
from urllib.parse import quote, quote_plus, unquote
from urllib.request import getproxies

import msgspec

from agent import disk
from agent.config import Paths, Policy, Settings
from agent.disk import Write
from agent.host.ipc import host_api
from agent.identity.identity import load
from agent.kept_log import KEPT_BYTES
from agent.proxy import Proxy, ProxyError
from agent.report import check, device_info
from agent.report.status import StatusReport, format_status, format_timeline
from agent.update.store import Store
from fleet.protocol import bounds, files
from fleet.protocol.bounds import KIB, MIB
from fleet.protocol.names import readable
from fleet.protocol.printable import json_text, printable

MEMBER_MAX_BYTES: Final = MIB
LOG_MAX_BYTES: Final = KEPT_BYTES
SENT_LOG_MAX_BYTES: Final = 256 * KIB
"""Of a log in an archive that is sent: some minutes over a slow link for all of them."""
ALL_MAX_BYTES: Final = 24 * MIB
"""Bound of all members together, before they are compressed; later ones are left out, and named."""

_FILES_MAX: Final = 2000
_KERNEL_BYTES: Final = 256 * KIB
_HOST_S: Final = 10.0
_MASK: Final = b"[secret]"
_PRIVATE: Final = re.compile(
    rb"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL
)
_PASSWORD: Final = re.compile(rb"(?<=://)[^/\s@\"']+(?=@)")
_TOKEN: Final = re.compile(rb"\bwf1\.[A-Za-z0-9_-]{16,}")
_ENCODED_TOKEN: Final = re.compile(  # in base64 at each place of its three bytes, and in hex
    rb"(?:d2YxL|[HXn3]dmMS[4-7]|3ZjEu)[A-Za-z0-9+/_-]{20,}|7766312[eE][0-9A-Fa-f]{32,}"
)
_KEY_FILES: Final = ("device.key", "sealing.key", "mac.key")
_SECRET_NAME: Final = re.compile("PASS|SECRET|TOKEN|CREDENTIAL|KEY", re.IGNORECASE)
_SECRET_MIN_BYTES: Final = 16
_PASSWORD_MIN_BYTES: Final = 6
"""Shorter passwords would mask words; in an address they are masked all the same."""


_EVERYTHING: Final = Policy(logs="all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Part of what is known of a device that goes into its archive.

    Attributes:
        reason: a sentence for the reader on what is left out; empty where nothing is.
        more: besides the agent's own state, the logs of instances, the kernel's messages and the names of files.
        policy: chooses the lines of instances.
        log_bytes, all_bytes: bounds of a log, and of all members.
    """

    reason: str = ""
    more: bool = True
    policy: Policy = _EVERYTHING
    log_bytes: int = LOG_MAX_BYTES
    all_bytes: int = ALL_MAX_BYTES

    @classmethod
    def allowed(cls, policy: Policy) -> "Extent":
        """Return what the owner's policy lets an operator have."""
        if policy.diagnose == "all":
            logs = {"off": "no line of an instance", "errors": "errors and the last lines of instances alone"}
            words = f"[policy] logs = {policy.logs!r}: {logs[policy.logs]}" if policy.logs in logs else ""
        else:
            words = (
                f"[policy] diagnose = {policy.diagnose!r}: no line of an instance, no message of the kernel, "
                "no names of files"
            )
        return cls(
            reason=words,
            more=policy.diagnose == "all",
            policy=policy,
            log_bytes=SENT_LOG_MAX_BYTES,
            all_bytes=bounds.ARCHIVE_MEMBERS_MAX_BYTES,
        )


@dataclass(frozen=True, slots=True)
class Subject:
    """Device to describe.

    Attributes:
        host_state: state directory of the host, whose logs are read as far as this user may; None to ask the host.
        status: with its whole history.
        as_owner: context of the user who owns the agent's state.
        extent: of what is described.
    """

    places: Paths
    host_state: Path | None
    settings: Settings
    status: StatusReport
    as_owner: Callable[[], AbstractContextManager[None]]
    extent: Extent = Extent()


class Source(NamedTuple):
    """Member of the archive; `by_root`: from files of the host and the kernel, which only root may read."""

    name: str
    max_bytes: int
    read: Callable[[], bytes]
    by_root: bool = False


def write(subject: Subject, into: Path) -> list[str]:
    """Write the archive with mode 0600; return a line on each member. Raises `OSError`."""
    with subject.as_owner():
        masks = _masks(subject)
    fd = disk.open_descriptor(Write.ARCHIVE, into, os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW)
    if not stat.S_ISREG(os.fstat(fd).st_mode):  # root would take /dev/null from everybody else
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    with os.fdopen(fd, "wb") as file:
        os.fchmod(fd, 0o600)  # of a file that was there
        return _pack(subject, file, masks)


def packed(subject: Subject) -> bytes:
    """Return the archive."""
    buffer = io.BytesIO()
    _pack(subject, buffer, _masks(subject))
    return buffer.getvalue()


def _pack(subject: Subject, file: IO[bytes], masks: Iterable[bytes]) -> list[str]:
    with (
        gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as compressed,
        tarfile.open(fileobj=compressed, mode="w|") as archive,
    ):
        return list(_members(subject, archive, masks))


def _members(subject: Subject, archive: tarfile.TarFile, masks: Iterable[bytes]) -> Iterator[str]:
    most = subject.extent.all_bytes
    left, omitted = most, []
    for name, of_one, read, by_root in _sources(subject):
        try:
            with contextlib.nullcontext() if by_root else subject.as_owner():
                data = read()
        except Exception as error:  # noqa: BLE001 - what cannot be read is said, and the rest is still wanted
            data = f"cannot be read: {type(error).__name__}: {error}\n".encode()
        data = masked(data, masks)[-of_one:]  # a key cut in two would not be found
        if len(data) > left:
            omitted.append(name)
            continue
        left -= len(data)
        _add(archive, name, data)
        yield f"{name}: {len(data)} bytes"
    if omitted:
        _add(archive, "left-out.txt", ("\n".join(omitted) + "\n").encode())
        yield f"left out, as the archive has at most {most >> 20} MiB: {', '.join(omitted)}"


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(f"diagnose/{name}")
    info.size, info.mode, info.mtime = len(data), 0o600, int(time.time())
    archive.addfile(info, io.BytesIO(data))


def masked(data: bytes, masks: Iterable[bytes]) -> bytes:
    """Return data without private keys, tokens, passwords in addresses, and the given secrets."""
    for pattern in (_PRIVATE, _TOKEN, _ENCODED_TOKEN, _PASSWORD):
        data = pattern.sub(_MASK, data)
    for secret in masks:
        data = data.replace(secret, _MASK)
    return data


def _masks(subject: Subject) -> list[bytes]:
    """Return this device's secrets in the forms in which they could be written, longest first."""
    found = {each for each in _keys(subject.places) if len(each) >= _SECRET_MIN_BYTES}
    others = {*_passwords(subject.settings), *_environment(), *_values(subject.places)}
    found |= {each for each in others if len(each) >= _PASSWORD_MIN_BYTES}
    return sorted({form for each in found for form in _forms(each)}, key=len, reverse=True)


def _forms(secret: bytes) -> Iterator[bytes]:
    """Yield a secret as it is, in JSON, in an address, in hex, and in base64 of a text that has it anywhere."""
    yield secret
    yield secret.hex().encode()
    yield secret.hex().upper().encode()
    for quoted in (quote(secret), quote(secret, safe=""), quote_plus(secret)):
        yield quoted.encode()
    with contextlib.suppress(UnicodeDecodeError):
        text = secret.decode()
        for ascii_only in (True, False):
            yield json.dumps(text, ensure_ascii=ascii_only)[1:-1].encode()
    for before in range(3):
        shifted = bytes(before) + secret
        begin, end = -(-before * 8 // 6), len(shifted) * 8 // 6  # the characters that depend on nothing else
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            yield encode(shifted)[begin:end]


def _environment() -> Iterator[bytes]:
    """Yield values of variables that are named like secrets."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and not value.startswith("/"):  # of a file
            yield os.fsencode(value)


def _values(places: Paths) -> Iterator[bytes]:
    """Yield the secrets of the committed instances, as far as this user can open them."""
    from agent.update.secrets import SecretStore  # noqa: PLC0415 - only an archive needs it in this process

    with contextlib.suppress(Exception):  # a second barrier, of a device that may be broken
        boxes = SecretStore(places.secrets, places.identity / "sealing.key", load(places.identity))
        with closing(Store(places.database, read_only=True)) as store:
            committed = store.committed()
        for each in committed:
            with contextlib.suppress(Exception):
                yield from map(str.encode, boxes.values(each.item).values())


def _keys(places: Paths) -> Iterator[bytes]:
    for name in _KEY_FILES:
        with contextlib.suppress(OSError):
            key = files.read(places.identity / name)
            lines = [line for line in key.splitlines() if not line.startswith(b"-----")]
            yield from lines
            yield from (key, b"".join(lines))


def _passwords(settings: Settings) -> Iterator[bytes]:
    """Return users with passwords, and passwords, of the configured proxy and of the environment's."""
    for address in (settings.network.proxy, *getproxies().values()):
        pair = address.rpartition("@")[0].rpartition("//")[2]
        for text in (pair, pair.partition(":")[2]):
            yield from (os.fsencode(text), os.fsencode(unquote(text)))
        with contextlib.suppress(ProxyError):
            yield Proxy.parse(address).credentials.removeprefix("Basic ").encode()


def _sources(subject: Subject) -> Iterator[Source]:
    places, extent = subject.places, subject.extent
    status = _told(subject.status, extent)
    if extent.reason:
        yield Source("policy.txt", MEMBER_MAX_BYTES, f"{extent.reason}\n".encode)
    story = (*format_status(status), "history, oldest first:", *format_timeline(status))
    lines = "".join(f"{printable(readable(line))}\n" for line in story)
    yield Source("status.txt", MEMBER_MAX_BYTES, lines.encode)
    yield Source("status.json", MEMBER_MAX_BYTES, lambda: _json(status))
    yield Source("device.json", MEMBER_MAX_BYTES, lambda: _json(_device(places)))
    yield Source("check.json", MEMBER_MAX_BYTES, lambda: _json(check.run_checks(places, subject.settings)))
    yield Source("host.json", MEMBER_MAX_BYTES, lambda: _json(_host(places)))
    yield Source("configuration.json", MEMBER_MAX_BYTES, lambda: _json(_configuration(subject.settings)))
    for path in (places.log.with_name(places.log.name + ".1"), places.log):
        if path.exists():
            yield Source(f"log/{path.name}", extent.log_bytes, partial(files.read, path))
    if not extent.more:
        return
    roots = [each for each in (places.state, subject.host_state, places.runtime) if each is not None]
    yield Source("files.txt", MEMBER_MAX_BYTES, lambda: _listing(roots), by_root=True)
    yield Source("kernel.txt", _KERNEL_BYTES, _kernel, by_root=True)
    logs = subject.host_state / "logs" if subject.host_state is not None else None
    found = list(logs.iterdir()) if logs is not None and os.access(logs, os.R_OK | os.X_OK) else []
    for path in sorted(found, key=_modified, reverse=True):
        yield Source(f"log/instances/{path.name}", LOG_MAX_BYTES, partial(files.read, path), by_root=True)
    if not found:
        for instance in sorted(_instances(status)):
            read = partial(_latest_lines, places, instance, extent)
            yield Source(f"log/instances/{instance}.log", extent.log_bytes, read)


def _instances(status: StatusReport) -> set[str]:
    """Return the names of the instances of which a device has something to say."""
    changed = {each.instance for each in status.changing} | {each.instance for each in status.failed}
    return changed | {each.instance for each in status.running}


def _told(status: StatusReport, extent: Extent) -> StatusReport:
    """Return a status whose history has the lines of instances that are described."""
    policy = extent.policy if extent.more else Policy(logs="off")
    timeline = tuple(msgspec.structs.replace(each, log=policy.excerpt(each.log)) for each in status.timeline)
    return msgspec.structs.replace(status, timeline=timeline)


def _modified(path: Path) -> float:
    with contextlib.suppress(OSError):  # a log may be rotated away meanwhile
        return path.stat().st_mtime
    return 0.0


def _json(value: Any) -> bytes:
    return json_text(msgspec.json.format(msgspec.json.encode(value), indent=2).decode()).encode() + b"\n"


def _device(places: Paths) -> dict[str, Any]:
    text = {name: Path(f"/proc/{name}").read_text(encoding="utf-8") for name in ("uptime", "loadavg", "meminfo")}
    return {
        "versions": msgspec.to_builtins(device_info.versions()),
        "resources": msgspec.to_builtins(device_info.device_resources(places.state)),
        "system": " ".join(platform.uname()),
        "mounts": Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines(),
        **text,
    }


def _ask(places: Paths, *requests: host_api.Request) -> list[host_api.FromHost]:
    with closing(host_api.new_socket()) as sock:
        sock.settimeout(_HOST_S)
        sock.connect(str(places.host_socket))
        replies: list[host_api.FromHost] = []
        for request in requests:
            host_api.send(sock, request)
            while True:
                reply = host_api.receive_from_host(sock)
                if getattr(reply, "id", None) == request.id:
                    replies.append(reply)
                    break
        return replies


def _host(places: Paths) -> list[host_api.FromHost]:
    return _ask(places, host_api.Hello(id=1, protocol=host_api.PROTOCOL), host_api.Status(id=2))


def _latest_lines(places: Paths, instance: str, extent: Extent) -> bytes:
    (reply,) = _ask(places, host_api.Logs(id=1, instance=instance, excerpt=True))
    return "".join(f"{line}\n" for line in extent.policy.excerpt(tuple(getattr(reply, "lines", ())))).encode()


def _configuration(settings: Settings) -> Any:
    """Return the settings in force; of a proxy's address, no user and no password."""
    value = msgspec.to_builtins(settings)
    if proxy := settings.network.proxy:
        value["network"]["proxy"] = f"http://{Proxy.parse(proxy)}"
    return value


def _listing(directories: Iterable[Path]) -> bytes:
    """List files with mode, owner, size and time, and none of their contents."""
    lines: list[str] = []
    for directory in directories:
        for place, _, names in os.walk(directory):
            for name in names:
                if len(lines) >= _FILES_MAX:
                    return "\n".join([*lines, "..."]).encode()
                path = Path(place, name)
                with contextlib.suppress(OSError):
                    of = path.lstat()
                    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(of.st_mtime))
                    lines.append(f"{of.st_mode:o} {of.st_uid}:{of.st_gid} {of.st_size:>10} {at} {path}")
    return "\n".join(lines).encode() + b"\n"


def _kernel() -> bytes:
    """Return the newest records of the kernel's log, as far as this user may read it."""
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kept: list[bytes] = []
    size = 0
    try:
        while True:
            try:
                record = os.read(fd, 8192)
            except BlockingIOError:
                return b"".join(kept)
            except BrokenPipeError:  # records were overwritten meanwhile
                continue
            kept.append(record)
            size += len(record)
            while size > 2 * _KERNEL_BYTES:
                size -= len(kept.pop(0))
    finally:
        os.close(fd)
