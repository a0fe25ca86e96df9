"""TCP proxy that shapes as a slow radio link does: a rate, a delay, lost packets as stalls, and cuts."""

import contextlib
import random
import socket
import threading
import time

PACKET_BYTES = 1400
RETRANSMITTED_S = 0.6  # twice the delay: what a sender waits before it sends a lost packet again


class SlowLink:
    """Link to a port of this machine, by default of 64 kbit/s, 300 ms and 5 % loss.

    Attributes:
        port: of this end.
        cut_after: bytes to the client after which a connection is cut; None for never.
        connections: how many there were.
    """

    def __init__(self, to_port, *, bits_s=64_000, delay_s=0.3, loss=0.05, cut_after=None, seed=1):
        self._to_port, self._bytes_s, self._delay_s, self._loss = to_port, bits_s / 8, delay_s, loss
        self._chance = random.Random(seed)
        self._ended = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port, self.cut_after, self.connections = self._listener.getsockname()[1], cut_after, 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        """End the link with its connections."""
        self._ended.set()
        self._listener.close()

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                server = socket.create_connection(("127.0.0.1", self._to_port))
                for source, target, most in ((client, server, None), (server, client, self.cut_after)):
                    threading.Thread(target=self._carry, args=(source, target, most), daemon=True).start()

    def _carry(self, source, target, most):
        """Bring each packet `delay_s` after it has left, no faster than the link is."""
        free_s, carried = time.monotonic(), 0
        with contextlib.suppress(OSError):
            while data := source.recv(PACKET_BYTES):
                free_s = max(free_s, time.monotonic()) + len(data) / self._bytes_s
                free_s += RETRANSMITTED_S if self._chance.random() < self._loss else 0.0
                if self._ended.wait(max(0.0, free_s - time.monotonic() + (self._delay_s if not carried else 0.0))):
                    break
                target.sendall(data)
                carried += len(data)
                if most is not None and carried >= most:
                    break
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
