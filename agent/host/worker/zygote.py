"""Process that holds an engine and forks workers, one for each fixed-size message.

    python -m agent.host.worker.zygote FD [--fuel] [--shared]

A zygote never compiles, instantiates or makes a WASI call, since each of these starts threads and a forked child would
then hang for ever; the self-test does, in a child of its own. It sees no configuration, no image and no secret: a
worker gets its own after the fork, over a socket that passes through here unread. There is one zygote for each signing
namespace, so that strangers do not share an address layout.

    supervisor -> zygote    `ZygoteMessage.fork()`, with the worker's end of its control socket
    zygote -> supervisor    FORKED, with a pidfd; EXITED when a worker has ended

The first message to a worker says whether it belongs to one instance alone or is shared. What goes wrong here is told
to the supervisor, since this process was forked and nobody above could handle it.

The self-test tries the codec on this device: bytes of many lengths go through a component and back before
anything relies on it.
"""

import contextlib
import gc
import os
import select
import signal
import socket
import sys
from typing import Final, NoReturn

from agent.host.engine import guest, runtime
from agent.host.engine.guest import Guest
from agent.host.engine.runtime import Engine
from agent.host.ipc import framing, worker_api
from agent.host.ipc.worker_api import ZygoteMessage
from agent.host.sandbox import kernel, sandbox, seccomp
from agent.host.worker import free_blocks
from agent.host.worker.worker import SharedWorker, Worker
from fleet.protocol.codes import RejectCode
from fleet.protocol.manifest import Grants, Limits

_SELF_TEST_S: Final = 20


def main(fd: int, *, fuel: bool, shared: bool) -> NoReturn:
    """Serve the supervisor on this descriptor until it closes.

    `fuel`: for images that count instructions; `shared`: for workers of many instances, which keep no room for the
    next.
    """
    sandbox.die_with_parent(os.getppid())
    kernel.set_name("zygote")
    sock = socket.socket(fileno=fd)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the supervisor decides, and closes the socket
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    ready, wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    the_engine = runtime.Engine(fuel=fuel, pooled=not shared)
    if not _self_test(the_engine):
        guest.use_stock_codec(the_engine)
        sys.stderr.write("zygote: the fast codec failed its self-test on this device: using the stock one\n")
    seccomp.prepare()
    gc.collect()
    free_blocks.fill()
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


def _self_test(the_engine: runtime.Engine) -> bool:
    """Try the codec in a child, which may compile, hang or crash."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(_SELF_TEST_S)
        try:
            os._exit(0 if self_test(the_engine) else 1)
        except BaseException:  # noqa: BLE001 - whatever it is, the answer is no
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


def _obey(sock: socket.socket, the_engine: runtime.Engine, own: tuple[int, ...]) -> None:
    try:
        data, fds = framing.receive_packet(sock)
    except framing.GoneError:
        os._exit(0)  # and the kernel ends the workers with it
    try:
        order = ZygoteMessage.decode(data)
    except framing.GoneError:
        os._exit(2)
    if order.kind != worker_api.FORKED or len(fds) != 1:
        os._exit(2)
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        sandbox.die_with_parent(parent)
        for fd in own:
            os.close(fd)
        sock.close()
        worker_main(socket.socket(fileno=fds[0]), the_engine)
    os.close(fds[0])
    pidfd = os.pidfd_open(pid)
    _send(sock, ZygoteMessage(worker_api.FORKED, pid).encode(), (pidfd,))
    os.close(pidfd)


def _reap(sock: socket.socket) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        _send(sock, ZygoteMessage(worker_api.EXITED, pid, os.waitstatus_to_exitcode(status)).encode(), ())


def _send(sock: socket.socket, data: bytes, fds: tuple[int, ...]) -> None:
    try:
        framing.send_packet(sock, data, fds)
    except OSError:
        os._exit(0)


def worker_main(sock: socket.socket, engine: Engine) -> NoReturn:
    """Be a worker on this end of a control socket."""
    status = 1
    try:
        _serve(sock, engine)
        status = 0
    except framing.GoneError:
        status = 0
    except BaseException as error:  # noqa: BLE001 - nobody above could handle it: this process was forked
        message = f"the worker failed: {type(error).__name__}: {error}"
        with contextlib.suppress(OSError, framing.GoneError):
            worker_api.send(sock, worker_api.Refused(code=RejectCode.INTERNAL, message=message))
    finally:
        os._exit(status)


def _serve(sock: socket.socket, engine: Engine) -> None:
    first, fds = worker_api.receive_to_worker(sock)
    match first:
        case worker_api.Setup():
            kernel.set_name(f"worker:{first.instance}")
            worker = Worker(sock, select.epoll())
            if worker.set_up(engine, first, fds):
                worker.loop()
        case worker_api.OpenShared():
            kernel.set_name("shared worker")
            commons = SharedWorker(sock, engine)
            if commons.open(first, fds):
                commons.loop()
        case _:
            raise framing.GoneError("the first message is not a setup")


_ECHO: Final = """
(component
  (core module $m
    (memory (export "memory") 4)
    (global $top (mut i32) (i32.const 1024))
    (func (export "realloc") (param i32 i32 i32 i32) (result i32)
      (local $at i32)
      (local.set $at (i32.and (i32.add (global.get $top) (i32.const 7)) (i32.const -8)))
      (global.set $top (i32.add (local.get $at) (local.get 3)))
      (local.get $at))
    (func (export "handle") (param i32 i32 i32 i32 i32 i32 i32 i32) (result i32)
      (i32.store16 (i32.const 64) (i32.const 299))
      (i32.store (i32.const 68) (local.get 4)) (i32.store (i32.const 72) (local.get 5))
      (i32.store (i32.const 76) (local.get 6)) (i32.store (i32.const 80) (local.get 7))
      (i32.const 64))
    (func (export "reset") (param i32) (global.set $top (i32.const 1024))))
  (core instance $i (instantiate $m))
  (type $request (record
    (field "method" string) (field "target" string) (field "headers" string) (field "body" (list u8))))
  (type $response (record (field "status" u16) (field "headers" string) (field "body" (list u8))))
  (func $handle (param "request" $request) (result $response)
    (canon lift (core func $i "handle") (memory (core memory $i "memory"))
      (realloc (core func $i "realloc")) (post-return (core func $i "reset"))))
  (instance $handler (export "request" (type $request)) (export "response" (type $response))
    (export "handle" (func $handle)))
  (export "wasmfleet:http/handler@0.1.0" (instance $handler)))
"""


def self_test(engine: Engine) -> bool:
    """Send bytes of many lengths through a component and back by the fast codec. Call it in a forked child only."""
    image = engine.read(_ECHO)
    guest = Guest(image, limits=Limits(), grants=Grants(), config={}, log=lambda _line: None)
    pattern = bytes(range(256)) * 64
    return all(
        guest.handle(b"PUT", b"/x", b"a: \xc3\xa9\r\n", pattern[:length]) == (299, b"a: \xc3\xa9\r\n", pattern[:length])
        for length in (0, 1, 31, 256, 4096, len(pattern), 7)
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), fuel="--fuel" in sys.argv, shared="--shared" in sys.argv)
