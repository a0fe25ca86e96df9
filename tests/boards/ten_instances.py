"""Start a host with ten instances of one image, and print how long until all answer, and what each process takes.

For a board: only the package's Python and what is installed with it. Usage: ten_instances.py IMAGE
"""

import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from agent.host.ipc import host_api
from fleet.protocol.manifest import Http, Manifest

INSTANCES = 10
REQUEST = "GET /{}/ HTTP/1.1\r\nhost: board\r\nconnection: close\r\n\r\n"
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
HOST = (sys.executable, "-m", "agent.host.cli")
PORT = 18080  # of a board, where nothing else has it


def sealed(image: bytes) -> int:
    """Return a memfd with an image, as the agent passes one."""
    fd = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(image)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def connected(sock: socket.socket, path: Path) -> bool:
    """Return whether a socket could be connected."""
    try:
        sock.connect(str(path))
    except OSError:
        return False
    return True


@contextlib.contextmanager
def running(directory: Path, port: int) -> Iterator[socket.socket]:
    """Run a host, and give the agent's connection to it as soon as there is one."""
    runtime = directory / "run"
    ingress = ("--ingress", f"127.0.0.1:{port}")
    host = subprocess.Popen([*HOST, "run", "--runtime", runtime, "--state", directory / "state", *ingress])
    sock = host_api.new_socket()
    try:
        while not connected(sock, runtime / "host.sock"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                host.wait(0.01)
            if host.returncode is not None:
                raise SystemExit(f"the host ended with {host.returncode}")
        yield sock
    finally:
        sock.close()
        host.send_signal(signal.SIGTERM)
        host.wait()


def start(sock: socket.socket, number: int, image: int) -> None:
    """Start an instance. Raises SystemExit: the host refuses it."""
    manifest = Manifest(name=f"i{number}", version="1.0.0", trigger=Http())
    target = f"components/main/i{number}/1.0.0.wasm"
    run = host_api.Run(
        instance=f"i{number}",
        generation=1,
        target=target,
        manifest=manifest,
        grants=manifest.grants,
        limits=manifest.limits,
    )
    host_api.send(sock, host_api.Start(id=number + 1, run=run), image)
    messages = iter(lambda: host_api.receive_from_host(sock), None)
    reply = next(message for message in messages if getattr(message, "id", None) == number + 1)
    if not isinstance(reply, host_api.Started):
        raise SystemExit(f"instance {number}: {reply}")


def answer(number: int, port: int) -> bytes:
    """Return the status line of an instance's answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as client:
        client.sendall(REQUEST.format(f"i{number}").encode())
        return client.makefile("rb").readline()


def main(image: str, port: int = PORT) -> None:
    """Measure, and print the seconds and the table."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        began_s = time.monotonic()
        with running(directory, port) as sock:
            connected_s = time.monotonic()
            fd = sealed(Path(image).read_bytes())
            for number in range(INSTANCES):
                start(sock, number, fd)
            started_s = time.monotonic()
            statuses = {answer(number, port).split(maxsplit=2)[1] for number in range(INSTANCES)}
            all_s = time.monotonic()
            if statuses != {b"200"}:
                raise SystemExit(f"not all answered with 200: {statuses}")
            print(f"host ready {connected_s - began_s:.2f} s")
            print(f"all started {started_s - began_s:.2f} s")
            print(f"all answered {all_s - began_s:.2f} s", flush=True)
            subprocess.run([*HOST, "processes", "--runtime", directory / "run"], check=True)


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
