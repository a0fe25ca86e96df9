"""Stand in for the kernel's GPIO chips, at the level of its calls: loaded into the host and its workers by PYTHONPATH.

`WASMFLEET_TEST_CHIPS` has a directory for each chip, in it a file for each line (`tests.agent.host.gpio_chips`). A
requested line is an open, locked description of that file: as in the kernel it lasts until its last copy is closed.
Every call is made for real first, so that seccomp judges it: the kernel answers ENOTTY where it lets it through.
"""

import sys

if any(name in sys.orig_argv for name in ("agent.host.cli", "agent.host.worker.zygote")):
    import errno
    import fcntl
    import mmap
    import os
    import struct
    from pathlib import Path

    REQUEST = struct.Struct("=I252x32s272sII20xi")
    CONFIG = struct.Struct("=QI20xIIQQ216x")
    VALUES = struct.Struct("=QQ")
    GET_LINE, SET_CONFIG, GET_VALUES, SET_VALUES = 0xC250B407, 0xC110B40D, 0xC010B40E, 0xC010B40F
    ACTIVE_LOW, INPUT, OUTPUT = 2, 4, 8

    kernel_ioctl, kernel_open = fcntl.ioctl, os.open
    chips = os.environ.get("WASMFLEET_TEST_CHIPS", "")

    def fail(number):
        raise OSError(number, os.strerror(number))

    def open_node(path, *arguments, **rest):
        name = os.fspath(path)
        if not isinstance(name, str) or not name.startswith("/dev/gpiochip"):
            return kernel_open(path, *arguments, **rest)
        if Path(chips, "closed").exists():
            fail(errno.EPERM)
        return kernel_open(f"{chips}/{name.removeprefix('/dev/')}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def line_of(fd):
        return mmap.mmap(fd, 16)  # at 0 the level, at 8 the flags; no write, which the limit of file sizes would refuse

    def configure(fd, data):
        flags, attributes, which, _, values, mask = CONFIG.unpack(data)
        with line_of(fd) as line:
            line[8:16] = flags.to_bytes(8, "little")
            if flags & OUTPUT:
                active = attributes == 1 and which == 2 and bool(values & mask)
                line[0] = active != bool(flags & ACTIVE_LOW)

    def get_line(fd, data):
        offset, _, config, lines, _, _ = REQUEST.unpack(data)
        if lines != 1:
            fail(errno.EINVAL)
        try:
            line = kernel_open(str(offset), os.O_RDWR | os.O_CLOEXEC, dir_fd=fd)
        except FileNotFoundError:
            fail(errno.EINVAL)
        try:
            fcntl.flock(line, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(line)
            fail(errno.EBUSY)
        configure(line, config)
        data[-4:] = line.to_bytes(4, "little")

    def values(fd, number, data):
        bits, mask = VALUES.unpack(data)
        with line_of(fd) as line:
            flags = int.from_bytes(line[8:16], "little")
            inverted = bool(flags & ACTIVE_LOW)
            if number == GET_VALUES:
                data[:] = VALUES.pack((line[0] != inverted) & mask, mask)
            elif not flags & OUTPUT:
                fail(errno.EPERM)
            else:
                line[0] = bool(bits & mask) != inverted

    def ioctl(fd, number, argument=0, *rest):
        if number & 0xFFFFFFFF not in {GET_LINE, SET_CONFIG, GET_VALUES, SET_VALUES}:
            return kernel_ioctl(fd, number, argument, *rest)
        try:
            kernel_ioctl(fd, number, bytearray(argument))
        except OSError as error:
            if error.errno != errno.ENOTTY:
                raise
        if number == GET_LINE:
            get_line(fd, argument)
        elif number == SET_CONFIG:
            configure(fd, argument)
        else:
            values(fd, number, argument)
        return 0

    os.open, fcntl.ioctl = open_node, ioctl
