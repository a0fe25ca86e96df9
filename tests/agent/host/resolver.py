"""A name server for tests, and the files and mounts by which a host's processes use it and nothing else."""

import contextlib
import ipaddress
import os
import shutil
import socket
import struct
import subprocess
import threading

import pytest

ADDRESS = f"127.83.{os.getpid() >> 8 & 255}.{os.getpid() & 255 or 53}"  # tests may run side by side
_TYPES = {1: 4, 28: 6}  # A, AAAA: version of the protocol
_MOUNTS = """
for each in hosts resolv.conf nsswitch.conf; do mount --bind "$0/$each" "/etc/$each" || exit; done
[ ! -d "$0/certs" ] || mount --bind "$0/certs" /etc/ssl/certs || exit
exec "$@"
"""


class NameServer:
    """Answers with the addresses in `names`; nothing at all for those in `silent`; otherwise there is no such name."""

    def __init__(self):
        self.names = {}
        self.silent = set()
        self._asked = set()
        self._changed = threading.Condition()
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.bind((ADDRESS, 53))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        with contextlib.suppress(OSError):
            while True:
                query, client = self._sock.recvfrom(4096)
                if not query:
                    return
                answer = self._answer(query)
                if answer:
                    self._sock.sendto(answer, client)

    def _answer(self, query):
        labels, at = [], 12
        while query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]].decode())
            at += 1 + query[at]
        name, end = ".".join(labels).lower(), at + 5
        with self._changed:
            self._asked.add(name)
            self._changed.notify_all()
        if name in self.silent:
            return b""
        (kind,) = struct.unpack("!H", query[at + 1 : at + 3])
        addresses = [ipaddress.ip_address(each) for each in self.names.get(name, ())]
        found = [each.packed for each in addresses if each.version == _TYPES.get(kind)]
        records = b"".join(struct.pack("!HHHIH", 0xC00C, kind, 1, 1, len(each)) + each for each in found)
        status = 0x8180 if name in self.names else 0x8183
        return query[:2] + struct.pack("!HHHHH", status, 1, len(found), 0, 0) + query[12:end] + records

    def asked(self, name):
        """Wait until somebody has asked for this name."""
        with self._changed:
            return self._changed.wait_for(lambda: name in self._asked, timeout=30)

    def clear(self):
        """Forget all names, and who asked for them."""
        self.names.clear()
        self.silent.clear()
        self._asked.clear()

    def close(self):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", (ADDRESS, 53))
        self._thread.join(30)
        self._sock.close()


def files(directory, *, hosts=(), certificates=()):
    """Write the files; `certificates`: name -> bytes of the system's directory of them, if not this machine's."""
    (directory / "hosts").write_text("".join(f"{line}\n" for line in ("127.0.0.1 localhost", *hosts)))
    (directory / "resolv.conf").write_text(f"nameserver {ADDRESS}\noptions timeout:30 attempts:1\n")
    (directory / "nsswitch.conf").write_text("hosts: files dns\n")
    if certificates:
        (directory / "certs").mkdir()
        for name, data in dict(certificates).items():
            (directory / "certs" / name).write_bytes(data)


def prefix(directory):
    """Return the command before a host's, which gives it these files. Skips the test where that cannot be done."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root, and a mount namespace of its own")
    command = ("unshare", "--mount", "--propagation", "private", "sh", "-c", _MOUNTS, str(directory))
    if subprocess.run([*command, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no mount namespace can be made here")
    return command
