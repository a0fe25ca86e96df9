"""Archive of what is known of this device, for whoever helps its owner: `fleet-agent diagnose`.

Read from files, the kernel and the host, without the agent, and on a read-only disk too. Each member and the whole have
a bound. Nothing secret goes in: no file of the identity, no sealed secret, no component's configuration, no password of
a proxy. As a second barrier, every member is searched for this device's keys, for private keys, tokens and passwords in
addresses, and what is found is masked.

Root may read the logs of instances and of the kernel. Whatever belongs to the agent's user is read as that user, who
could put a link to a file of root's there.
"""

import base64
import contextlib
import errno
import gzip
import io
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
from typing import Any, Final, NamedTuple
from urllib.parse import unquote
from urllib.request import getproxies

import msgspec

from agent import disk
from agent.config import Paths, Settings
from agent.disk import Write
from agent.host.ipc import host_api
from agent.kept_log import KEPT_BYTES
from agent.proxy import Proxy, ProxyError
from agent.report import check, device_info
from agent.report.status import StatusReport, format_status, format_timeline
from fleet.protocol.bounds import KIB, MIB
from fleet.protocol.names import readable
from fleet.protocol.printable import json_text, printable

MEMBER_MAX_BYTES: Final = MIB
LOG_MAX_BYTES: Final = KEPT_BYTES
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
_KEY_FILES: Final = ("device.key", "sealing.key", "mac.key")
_SECRET_MIN_BYTES: Final = 16
_PASSWORD_MIN_BYTES: Final = 6
"""Shorter passwords would mask words; in an address they are masked all the same."""


@dataclass(frozen=True, slots=True)
class Subject:
    """Device to describe.

    Attributes:
        host_state: state directory of the host; its logs are read as far as this user may.
        status: with its whole history.
        as_owner: context of the user who owns the agent's state.
    """

    places: Paths
    host_state: Path
    settings: Settings
    status: StatusReport
    as_owner: Callable[[], AbstractContextManager[None]]


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
    with (
        os.fdopen(fd, "wb") as file,
        gzip.GzipFile(fileobj=file, mode="wb", mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w|") as archive,
    ):
        os.fchmod(fd, 0o600)  # of a file that was there
        return list(_members(subject, archive, masks))


def _members(subject: Subject, archive: tarfile.TarFile, masks: Iterable[bytes]) -> Iterator[str]:
    left, omitted = ALL_MAX_BYTES, []
    for name, most, read, by_root in _sources(subject):
        try:
            with contextlib.nullcontext() if by_root else subject.as_owner():
                data = read()
        except Exception as error:  # noqa: BLE001 - what cannot be read is said, and the rest is still wanted
            data = f"cannot be read: {type(error).__name__}: {error}\n".encode()
        data = masked(data, masks)[-most:]  # a key cut in two would not be found
        if len(data) > left:
            omitted.append(name)
            continue
        left -= len(data)
        _add(archive, name, data)
        yield f"{name}: {len(data)} bytes"
    if omitted:
        _add(archive, "left-out.txt", ("\n".join(omitted) + "\n").encode())
        yield f"left out, as the archive has at most {ALL_MAX_BYTES >> 20} MiB: {', '.join(omitted)}"


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(f"diagnose/{name}")
    info.size, info.mode, info.mtime = len(data), 0o600, int(time.time())
    archive.addfile(info, io.BytesIO(data))


def masked(data: bytes, masks: Iterable[bytes]) -> bytes:
    """Return data without private keys, tokens, passwords in addresses, and the given secrets."""
    for pattern in (_PRIVATE, _TOKEN, _PASSWORD):
        data = pattern.sub(_MASK, data)
    for secret in masks:
        data = data.replace(secret, _MASK)
    return data


def _masks(subject: Subject) -> list[bytes]:
    """Return this device's secrets in the forms in which they could be written, longest first."""
    found = {each for each in _keys(subject.places) if len(each) >= _SECRET_MIN_BYTES}
    found |= {each for each in _passwords(subject.settings) if len(each) >= _PASSWORD_MIN_BYTES}
    return sorted(found, key=len, reverse=True)


def _keys(places: Paths) -> Iterator[bytes]:
    for name in _KEY_FILES:
        with contextlib.suppress(OSError):
            key = (places.identity / name).read_bytes()
            lines = [line for line in key.splitlines() if not line.startswith(b"-----")]
            yield from lines
            for each in (key, b"".join(lines)):
                yield from (each, base64.b64encode(each), base64.urlsafe_b64encode(each).rstrip(b"="))
                yield each.hex().encode()


def _passwords(settings: Settings) -> Iterator[bytes]:
    """Return users with passwords, and passwords, of the configured proxy and of the environment's."""
    for address in (settings.network.proxy, *getproxies().values()):
        pair = address.rpartition("@")[0].rpartition("//")[2]
        for text in (pair, pair.partition(":")[2]):
            yield from (os.fsencode(text), os.fsencode(unquote(text)))
        with contextlib.suppress(ProxyError):
            yield Proxy.parse(address).credentials.removeprefix("Basic ").encode()


def _sources(subject: Subject) -> Iterator[Source]:
    places, status = subject.places, subject.status
    story = (*format_status(status), "history, oldest first:", *format_timeline(status))
    lines = "".join(f"{printable(readable(line))}\n" for line in story)
    yield Source("status.txt", MEMBER_MAX_BYTES, lines.encode)
    yield Source("status.json", MEMBER_MAX_BYTES, lambda: _json(status))
    yield Source("device.json", MEMBER_MAX_BYTES, lambda: _json(_device(places)))
    yield Source("check.json", MEMBER_MAX_BYTES, lambda: _json(check.run_checks(places, subject.settings)))
    yield Source("host.json", MEMBER_MAX_BYTES, lambda: _json(_host(places)))
    yield Source("configuration.json", MEMBER_MAX_BYTES, lambda: _json(_configuration(subject.settings)))
    roots = (places.state, subject.host_state, places.runtime)
    yield Source("files.txt", MEMBER_MAX_BYTES, lambda: _listing(roots), by_root=True)
    yield Source("kernel.txt", _KERNEL_BYTES, _kernel, by_root=True)
    for path in (places.log.with_name(places.log.name + ".1"), places.log):
        if path.exists():
            yield Source(f"log/{path.name}", LOG_MAX_BYTES, path.read_bytes)
    logs = subject.host_state / "logs"
    found = list(logs.iterdir()) if os.access(logs, os.R_OK | os.X_OK) else []
    for path in sorted(found, key=_modified, reverse=True):
        yield Source(f"log/instances/{path.name}", LOG_MAX_BYTES, path.read_bytes, by_root=True)
    if not found:
        for running in status.running:
            read = partial(_latest_lines, places, running.instance)
            yield Source(f"log/instances/{running.instance}.log", LOG_MAX_BYTES, read)


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


def _latest_lines(places: Paths, instance: str) -> bytes:
    (reply,) = _ask(places, host_api.Logs(id=1, instance=instance))
    return "".join(f"{line}\n" for line in getattr(reply, "lines", ())).encode()


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
