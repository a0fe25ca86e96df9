"""Other end of a serial port, as a pseudo-terminal."""

import fcntl
import os
import struct
import termios
import threading
import tty


class Peer:
    """Other end of a serial port."""

    def __init__(self):
        self.fd, port = os.openpty()
        tty.setraw(port)
        self.node = os.ttyname(port)
        self._port = port

    def settings(self):
        """What the port was set to."""
        return termios.tcgetattr(self._port)

    def read(self, size):
        """What the port sends, as much of it as asked for."""
        data = b""
        while len(data) < size:
            data += os.read(self.fd, size - len(data))
        return data

    def write(self, data):
        """Send to the port."""
        os.write(self.fd, data)

    def answer(self, size, said):
        """Answer the next `size` bytes, from a thread."""
        thread = threading.Thread(target=lambda: (self.read(size), self.write(said)))
        thread.start()
        return thread

    def is_exclusive(self):
        """Whether no other program may open it."""
        return struct.unpack("=i", fcntl.ioctl(self._port, 0x80045440, bytes(4))) != (0,)  # TIOCGEXCL

    def hang_up(self):
        """Pull it out."""
        os.close(self._port)
        os.close(self.fd)
        self.fd = self._port = -1

    def close(self):
        if self.fd >= 0:
            self.hang_up()
