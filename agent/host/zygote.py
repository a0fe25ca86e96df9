"""A zygote: holds an engine and forks lanes, one for each fixed-size message.

    python -m agent.host.zygote FD [--fuel] [--shared]

It never compiles, instantiates or makes a WASI call, since each of these starts threads and a forked child would then
hang for ever; the self-test does, in a child of its own. It sees no configuration, no image and no secret: a lane gets
its own after the fork, over a socket that passes through here unread. One zygote for each signing namespace, so that
strangers do not share an address layout.

    supervisor -> zygote    b"F" + 7 zero bytes, with the lane's end of its control socket
    zygote -> supervisor    b"F" + pid (i32) + 0, with a pidfd;  b"X" + pid + status when a lane has ended
"""

import gc
import os
import select
import signal
import socket
import struct
import sys
from typing import Final, NoReturn

from agent.host import begin, cell, control, engine, seccomp, selftest

MESSAGE: Final = struct.Struct("=cxxxii")
FORK: Final = b"F"
EXITED: Final = b"X"
_SELF_TEST_S: Final = 20


def main(fd: int, *, fuel: bool, shared: bool) -> NoReturn:
    """Serve the supervisor on this descriptor until it closes.

    `fuel`: for images that count instructions; `shared`: for lanes of many instances, which keep no room for the next.
    """
    cell.die_with_parent(os.getppid())
    sock = socket.socket(fileno=fd)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the supervisor decides, and closes the socket
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ready, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    the_engine = engine.Engine(fuel=fuel, pooled=not shared)
    if not _self_test(the_engine):
        engine.use_stock_codec(the_engine)
        sys.stderr.write("zygote: the fast codec failed its self-test on this board, the stock one serves\n")
    seccomp.prepare()
    gc.collect()
    gc.freeze()
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    poll.register(ready, select.POLLIN)
    while True:
        for which, _ in poll.poll():
            if which == ready:
                os.read(ready, 64)
                _reap(sock)
            else:
                _obey(sock, the_engine, (ready, wake))


def _self_test(the_engine: engine.Engine) -> bool:
    """Try the codec in a child, which may compile, hang or crash."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(_SELF_TEST_S)
        try:
            os._exit(0 if selftest.self_test(the_engine) else 1)
        except BaseException:  # noqa: BLE001 - whatever it is, the answer is no
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _obey(sock: socket.socket, the_engine: engine.Engine, own: tuple[int, ...]) -> None:
    try:
        data, fds = control.receive_packet(sock)
    except control.GoneError:
        os._exit(0)  # and the kernel ends the lanes with it
    if len(data) != MESSAGE.size or not data.startswith(FORK) or len(fds) != 1:
        os._exit(2)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        cell.die_with_parent(parent)
        for fd in own:
            os.close(fd)
        sock.close()
        begin.main(socket.socket(fileno=fds[0]), the_engine)
    os.close(fds[0])
    pidfd = os.pidfd_open(pid)
    _send(sock, MESSAGE.pack(FORK, pid, 0), (pidfd,))
    os.close(pidfd)


def _reap(sock: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _send(sock, MESSAGE.pack(EXITED, pid, os.waitstatus_to_exitcode(status)), ())


def _send(sock: socket.socket, data: bytes, fds: tuple[int, ...]) -> None:
    try:
        control.send_packet(sock, data, fds)
    except OSError:
        os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), fuel="--fuel" in sys.argv, shared="--shared" in sys.argv)
