"""Compiler behind a socket, for an agent that may neither have executable memory nor start a process that has.

    python -m agent.host.compiler.service ARGUMENTS...  client: replaces `python -m agent.host.compiler`
    python -m agent.host.compiler.service --serve       service: a connection on stdin (systemd, Accept=yes)

Under `MemoryDenyWriteExecute=` compiling fails, and every child inherits that filter. So the client passes its stdin,
stdout and stderr over a Unix socket, with its arguments and resource limits, to a unit outside the filter, which runs
the real compiler on them. To its caller, the client behaves like the compiler: same streams, same exit status, and the
same signal if one killed the compiler. Only this module's two packets are parsed on the way.
"""

import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
from typing import Final

from agent.host.ipc import framing

SOCKET: Final = "/run/wasmfleet/compiler.sock"
_PACKET_MAX_BYTES: Final = 4096
_STREAMS: Final = 3
_LIMITS: Final = ("RLIMIT_DATA", "RLIMIT_AS", "RLIMIT_CPU", "RLIMIT_CORE")
# nothing else may be started, although the only client is the agent
_ARGUMENTS: Final = frozenset({"--describe", "--fuel", "--sockets"})
# exit statuses of the compiler, see `agent.host.compiler`
_UNREACHABLE: Final = 5
# of this client only: the service was stopped, or the kernel killed it
_INTERRUPTED: Final = 6


def _complain(code: str, message: str) -> None:
    sys.stderr.write(json.dumps({"code": code, "message": message}) + "\n")


def client(arguments: list[str]) -> int:
    """Have the service compile from this process's stdin to its stdout; return the exit status."""
    path = os.environ.get("WASMFLEET_COMPILER_SOCKET", SOCKET)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        try:
            sock.connect(path)
        except OSError as error:
            _complain("no-engine", f"cannot connect to the compiler's service at {path}: {error.strerror}")
            return _UNREACHABLE
        if "--describe" not in arguments:
            # The caller sets limits on this process before it writes: with the first byte, they are set.
            select.select([0], [], [])
        limits = {name: resource.getrlimit(getattr(resource, name)) for name in _LIMITS}
        packet = json.dumps({"arguments": arguments, "limits": limits}).encode()
        try:
            framing.send_packet(sock, packet, tuple(range(_STREAMS)))
            # The compiler now owns the streams: their reader must see the end as soon as the compiler closes them.
            for number in (0, 1):
                os.close(number)
            answer = sock.recv(_PACKET_MAX_BYTES)
        except ConnectionError:  # the service ended before it read the request
            answer = b""
    if not answer:
        _complain("interrupted", "the compiler's service ended before it answered: stopped, or out of memory")
        return _INTERRUPTED
    status = int(json.loads(answer)["status"])
    if status < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler to reset
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    return status


def serve(sock: socket.socket) -> int:
    """Run the compiler once, for the client on `sock`; kill it if the client disconnects."""
    try:
        packet, streams = framing.receive_packet(sock, max_bytes=_PACKET_MAX_BYTES, max_fds=_STREAMS)
    except framing.GoneError:
        return 0  # the client disconnected before its request
    try:
        asked = json.loads(packet)
        arguments = [str(each) for each in asked["arguments"]]
        limits = {str(name): (int(soft), int(hard)) for name, (soft, hard) in asked["limits"].items()}
        if len(streams) != _STREAMS or not set(arguments) <= _ARGUMENTS or not set(limits) <= set(_LIMITS):
            raise ValueError("not a request")  # noqa: TRY301 - refused like any other malformed packet
    except (ValueError, KeyError, TypeError, AttributeError):
        sys.stderr.write("the compiler's service refused a malformed request\n")
        return 1

    def confine() -> None:
        for name, (soft, hard) in limits.items():
            with contextlib.suppress(ValueError, OSError):  # a limit above the unit's: the unit's applies
                resource.setrlimit(getattr(resource, name), (soft, hard))

    with subprocess.Popen(
        [sys.executable, "-m", "agent.host.compiler", *arguments],
        stdin=streams[0],
        stdout=streams[1],
        stderr=streams[2],
        preexec_fn=confine,  # noqa: PLW1509 - this process has one thread
    ) as compiler:
        for stream in streams:
            os.close(stream)
        ended = os.pidfd_open(compiler.pid)
        readable, _, _ = select.select([ended, sock.fileno()], [], [])
        if ended not in readable:
            compiler.kill()  # the client disconnected: it was killed, or gave up
        os.close(ended)
        status = compiler.wait()
    with contextlib.suppress(OSError):
        sock.send(json.dumps({"status": status}).encode())
    return 0


def main() -> int:
    """Serve the connection on stdin, or run as the client."""
    if sys.argv[1:] == ["--serve"]:
        with socket.socket(fileno=os.dup(0)) as sock:
            return serve(sock)
    status = client(sys.argv[1:])
    sys.stderr.flush()
    os._exit(status)  # the compiler owns the streams: this process must not touch them, even at its exit


if __name__ == "__main__":
    sys.exit(main())
