"""A good instance beside hostile guests and clients, and what they cost the host."""

import socket
import threading
import time
from pathlib import Path

import support
from echo_guest import ECHO

from agent.host.ipc import host_api

GROWTH_MAX_BYTES = 16 << 20  # of the host's own processes, by what allocators and caches keep


class Neighbour:
    """A good instance, asked all the while: what it answers has to be what was sent."""

    def __init__(self, host, *, shared=False):
        """`shared`: behind the shared port."""
        own = None if shared else support.free_port()
        assert isinstance(host.start(ECHO, support.a_run("neighbour", 1, port=own)), host_api.Started)
        self.port, self._path = own or host.port, b"/neighbour/" if shared else b"/"
        self.wrong, self.took_s = [], []
        self._stop = threading.Event()
        self._asked = threading.Event()
        self._client = threading.Thread(target=self._ask)
        self._client.start()
        self.asked()

    def _ask(self):
        number = 0
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as kept:
            while not self._stop.wait(0.005):
                number += 1
                body = b"%d " % number * 20
                began = time.monotonic()
                try:
                    head = b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (self._path, len(body))
                    status, _, came = support.http(self.port, head + body, sock=kept)
                except OSError as error:
                    self.wrong.append(repr(error))
                    return
                finally:
                    self._asked.set()
                self.took_s.append(time.monotonic() - began)
                if (status, came) != (200, body):
                    self.wrong.append((status, came))

    def asked(self):
        """Wait for its next answer."""
        self._asked.clear()
        assert self._asked.wait(60)

    def close(self):
        self._stop.set()
        self._client.join()


def private_bytes(pids):
    """Return the anonymous memory of processes, which the kernel tells every user."""
    lines = (line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
