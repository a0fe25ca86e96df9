"""Standard error of a host's processes, read while they run."""

import os
import threading


class Heard:
    """Reader of a host's standard error: by a pipe, since confined processes may write to no file."""

    def __init__(self, directory):
        os.mkfifo(directory / "host.log")
        self._fd = os.open(directory / "host.log", os.O_RDONLY | os.O_NONBLOCK)
        self.said = ""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read)

    def start(self):
        os.set_blocking(self._fd, True)
        self._thread.start()

    def _read(self):
        while data := os.read(self._fd, 65536):
            with self._changed:
                self.said += data.decode(errors="replace")
                self._changed.notify_all()

    def has(self, words):
        with self._changed:
            return self._changed.wait_for(lambda: words in self.said, timeout=30)

    def close(self):
        self._thread.join(30)
        os.close(self._fd)
        return self.said
