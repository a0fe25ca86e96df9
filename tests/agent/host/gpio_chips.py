"""GPIO chips of a host under test: files that `chips/sitecustomize.py` has in place of the kernel's lines."""

import contextlib
import fcntl
import signal
from pathlib import Path

import support

WAIT_S = 30


class Chips:
    """Chips in a directory, each with some lines."""

    def __init__(self, directory: Path, **chips: int) -> None:
        self.directory = directory
        for name, lines in chips.items():
            (directory / name).mkdir(parents=True)
            for line in range(lines):
                (directory / name / str(line)).write_bytes(bytes(16))

    @property
    def env(self):
        """For a host that is to have them."""
        path = f"{Path(__file__).parent / 'chips'}:{support.ROOT}"
        return {"PYTHONPATH": path, "WASMFLEET_TEST_CHIPS": str(self.directory)}

    def is_high(self, line, chip="gpiochip0"):
        """The level of a line."""
        return bool((self.directory / chip / str(line)).read_bytes()[0])

    def drive(self, line, level, chip="gpiochip0"):
        """Drive an input from outside: `high` or `low`."""
        with (self.directory / chip / str(line)).open("r+b") as file:
            file.write(bytes([level == "high"]))

    def flags(self, line, chip="gpiochip0"):
        """What it was made, as the kernel's flags."""
        return int.from_bytes((self.directory / chip / str(line)).read_bytes()[8:], "little")

    def is_held(self, line, chip="gpiochip0"):
        """Whether somebody has requested a line."""
        with (self.directory / chip / str(line)).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    def await_free(self, line, chip="gpiochip0"):
        """Wait until nobody has a line."""
        with self.taken(line, chip):
            pass

    @contextlib.contextmanager
    def taken(self, line, chip="gpiochip0"):
        """Have a line, as another program may, once it is free."""
        with (self.directory / chip / str(line)).open("rb") as file:
            before = signal.signal(signal.SIGALRM, _give_up)
            signal.alarm(WAIT_S)
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            finally:
                signal.alarm(0)
                signal.signal(signal.SIGALRM, before)
            yield

    @contextlib.contextmanager
    def closed(self):
        """Let the kernel refuse the chips, as for a service with DevicePolicy=closed."""
        mark = self.directory / "closed"
        mark.touch()
        yield
        mark.unlink()


def _give_up(*_):
    raise TimeoutError("somebody still has the line")
