"""Client of the host for tests: starts `fleet-host` on free ports, compiles guests, sends the agent's requests."""

import contextlib
import fcntl
import hashlib
import lzma
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent.host.ipc import host_api
from fleet.component import compose
from fleet.protocol.manifest import Grants, Health, Http, Limits, Manifest

ROOT = Path(__file__).parents[3]
GUESTS = ROOT / "components" / "guests"
DEMO = ROOT / "components" / "demo"
ADAPTER = ROOT / "components" / "adapter"
PREVIEW1 = ROOT / "components" / "preview1"
BUILD = ROOT / "components" / "examples" / "wasi-http" / "build.py"
CACHE = Path(os.environ.get("WASMFLEET_TEST_CACHE", f"/tmp/wasmfleet-test-images-{os.getuid()}"))

PIECE_BYTES = 1 << 20
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

IN_PLACE_OF_THE_ADAPTER = """(component
  (core module $guest
    (memory (export "memory") 4)
    (data (i32.const 64) "\\00\\01\\00\\00{length}")
    (data (i32.const 256) "{said}")
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 196608))
    (func (export "handle") (param i32 i32) (result i32) (i32.const 64))
    (func (export "flush")))
  (core instance $guest (instantiate $guest))
  (func $handle (param "head" string) (result string) (canon lift (core func $guest "handle")
    (memory (core memory $guest "memory")) (realloc (core func $guest "realloc"))))
  (func $flush (canon lift (core func $guest "flush")))
  (instance $bridge (export "handle" (func $handle)) (export "flush" (func $flush)))
  (export "wasmfleet:adapter/bridge@0.1.0" (instance $bridge)))
"""


def wasm(guest):
    """A guest's text or bytes: a name in components/guests, demo or adapter, or WAT itself."""
    if isinstance(guest, bytes):
        return guest
    if guest.lstrip().startswith("("):
        return guest.encode()
    for path in (GUESTS / f"{guest}.wat", DEMO / f"{guest}.wasm", ADAPTER / f"{guest}.wasm"):
        if path.exists():
            return path.read_bytes()
    for packed in (ADAPTER / f"{guest}.wasm.xz", PREVIEW1 / f"{guest}.wasm.xz"):
        if packed.exists():
            return lzma.decompress(packed.read_bytes())
    raise FileNotFoundError(guest)


def hexed(data):
    return "".join(f"\\{byte:02x}" for byte in data)


def in_place_of_the_adapter(said):
    """A guest of wasi:http whose adapter says this at the end of each answer, which has no body."""
    length = hexed(len(said).to_bytes(4, "little"))
    return IN_PLACE_OF_THE_ADAPTER.replace("{length}", length).replace("{said}", hexed(said))


def compiled(guest, *, fuel=False, sockets=False) -> bytes:
    """The image of a guest, from a cache: compiling costs more than most tests."""
    source = wasm(guest)
    place = Path(str(host_api.__file__)).parents[1]  # of the installed package, where this runs beside one
    engine = (place / "engine" / "runtime.py").read_bytes() + compose.adapter_digest().encode()
    path = CACHE / f"{hashlib.sha256(source + engine + bytes([fuel, sockets])).hexdigest()}.cwasm"
    if not path.exists():
        from agent.host.engine.runtime import Engine

        CACHE.mkdir(exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        artifact = source if source.startswith(b"\0asm") else source.decode()
        part.write_bytes(Engine(fuel=fuel).compile(artifact, sockets=sockets))
        part.rename(path)
    return path.read_bytes()


def built(language, directory, *more):
    """The component that a language's toolchain makes; skips the test where it is not here."""
    out = directory / f"{language}.wasm"
    command = [sys.executable, BUILD, language, "-o", out, *more]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return out


def sealed(data: bytes) -> int:
    """A sealed memfd with these bytes, as the agent passes it."""
    fd = os.memfd_create("image", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data) if len(data) < 1 << 30 else None
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


def remembers(pid: int, secret: bytes) -> bool:
    """Whether a process has these bytes in its resident, writable memory.

    Read piece by piece: all of it at once, twice over, is more than a device has.
    """
    with Path(f"/proc/{pid}/smaps").open() as maps, Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        span = ""
        for line in maps:
            words = line.split()
            if words[0] == "Rss:" and words[1] != "0" and span:
                start, end = (int(part, 16) for part in span.split("-"))
                if any(secret in piece for piece in _pieces(memory, start, end, len(secret) - 1)):
                    return True
            elif "-" in words[0]:
                span = words[0] if words[1].startswith("rw") else ""
    return False


def _pieces(memory, start, end, overlap):
    """What lies from `start` to `end`, each piece with the end of the one before it."""
    before = b""
    for place in range(start, end, PIECE_BYTES):
        memory.seek(place)
        try:
            piece = before + memory.read(min(PIECE_BYTES, end - place))
        except OSError:
            return  # no memory of a program's: a device's
        yield piece
        before = piece[-overlap:]


def free_port() -> int:
    """As `fleet.demo.environment`, which an emulated board does not have: these tests run there too."""
    below = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    while True:
        port = random.SystemRandom().randrange(10_000, below)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


TESTS = []  # that have begun: each runs components of its own, for a host that they share remembers who has died


def a_run(
    instance,
    generation,
    *,
    trigger=None,
    more_triggers=(),
    grants=None,
    limits=None,
    health=None,
    namespace="main",
    schema=0,
    swap="overlap",
    **rest,
):
    manifest = Manifest(
        name=instance,
        version=f"1.0.{generation}",
        trigger=trigger or Http(),
        more_triggers=more_triggers,
        grants=grants or Grants(),
        limits=limits or Limits(),
        health=health or Health(),
        data_schema=schema,
        swap=swap,
    )
    return host_api.Run(
        instance=instance,
        generation=generation,
        target=f"components/{namespace}/{instance}-{len(TESTS)}/1.0.{generation}.wasm",
        manifest=manifest,
        grants=manifest.grants,
        limits=manifest.limits,
        **rest,
    )


STARTED = []  # hosts that nobody has closed yet


class Host:
    """A running fleet-host and a connection to it."""

    def __init__(
        self,
        directory: Path,
        *,
        ingress=None,
        arguments=(),
        env=None,
        prefix=(),
        python=sys.executable,
    ):
        self.runtime = directory / "run"
        self.state = directory / "state"
        self.port = ingress or free_port()
        self.events = []
        self.shared = False
        self._id = 0
        self.stderr = (directory / "host.log").open("ab")
        self.process = subprocess.Popen(
            [
                *prefix,
                python,
                *("-m", "agent.host.cli", "run"),
                *("--runtime", str(self.runtime)),
                *("--state", str(self.state)),
                *("--ingress", f"127.0.0.1:{self.port}"),
                *arguments,
            ],
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stderr=self.stderr,
            stdin=subprocess.DEVNULL,
        )
        STARTED.append(self)
        self.sock = self.connect()

    def connect(self) -> socket.socket:
        """Connect as soon as it listens."""
        path = self.runtime / "host.sock"
        while True:
            sock = host_api.new_socket()
            sock.settimeout(60)
            try:
                sock.connect(str(path))
            except OSError:
                sock.close()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self.process.wait(0.005)  # it needs the processor more than who asks whether it listens
                if self.process.returncode is not None:
                    raise AssertionError(f"the host ended: {Path(self.stderr.name).read_text()}") from None
                continue
            return sock

    def ask(self, kind, fd=None, **fields):
        """Send a request and return its reply; events on the way are kept in `events`."""
        self._id += 1
        host_api.send(self.sock, kind(id=self._id, **fields), fd)
        while True:
            message = host_api.receive_from_host(self.sock)
            if getattr(message, "id", None) == self._id:
                return message
            self.events.append(message)

    def start(self, guest, run, *, fuel=False, **how):
        fd = sealed(compiled(guest, fuel=fuel, sockets=run.grants.sockets))
        try:
            return self.ask(host_api.Start, fd, run=run, **how)
        finally:
            os.close(fd)

    def health(self, instance):
        return next(one for one in self.ask(host_api.Status).instances if one.instance == instance)

    def lines_of(self, instance):
        return self.ask(host_api.Logs, instance=instance).lines

    def event(self, accept):
        """The next event for which `accept(event)` holds, waiting for it."""
        while True:
            for number, event in enumerate(self.events):
                if accept(event):
                    del self.events[: number + 1]
                    return event
            self.events.append(host_api.receive_from_host(self.sock))

    def close(self):
        STARTED.remove(self)
        self.sock.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.stderr.close()


@contextlib.contextmanager
def shared_host(directory, **how):
    """Host that more than one test uses; it ends with the block."""
    host = Host(directory, **how)
    host.shared = True
    try:
        yield host
    finally:
        host.close()


def http(port, request: bytes | str = "GET / HTTP/1.1\r\nhost: x\r\n\r\n", sock=None):
    """One exchange on a plain socket: (status, headers, body)."""
    own = sock is None
    sock = sock or socket.create_connection(("127.0.0.1", port), timeout=30)
    try:
        sock.sendall(request if isinstance(request, bytes) else request.encode())
        return read_answer(sock)
    finally:
        if own:
            sock.close()


def await_read(sock):
    """Until the other end, on this machine, has accepted `sock` and read all that it sent: a process that ends with
    something unread resets its connection.
    """
    ours, theirs = (f"{port:04X}" for port in (sock.getsockname()[1], sock.getpeername()[1]))
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
            _, local, remote, _, queues, _, _, _, _, inode, *_ = line.split()
            if (local[-4:], remote[-4:]) == (theirs, ours) and inode != "0" and queues.endswith(":00000000"):
                return
        time.sleep(0.005)
    raise TimeoutError("nobody reads it")


def read_answer(sock, data=b""):
    """The next answer, of which `data` has come."""
    while b"\r\n\r\n" not in data:
        more = sock.recv(65536)
        if not more:
            raise ConnectionError(f"closed after {data!r}")
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:])}
    if headers.get("transfer-encoding") == "chunked":
        return int(lines[0].split()[1]), headers, read_chunks(sock, body)
    length = int(headers.get("content-length", "0"))
    while len(body) < length:
        more = sock.recv(65536)
        if not more:
            raise ConnectionError("closed in the body")
        body += more
    return int(lines[0].split()[1]), headers, body


def read_chunks(sock, data, pause=lambda: None):
    """The body of an answer in chunks, of which `data` has come; with a pause after each piece that is read."""
    body = b""

    def more():
        nonlocal data
        came = sock.recv(65536)
        if not came:
            raise ConnectionError("closed in the body")
        data += came
        pause()

    while True:
        while b"\r\n" not in data:
            more()
        line, _, data = data.partition(b"\r\n")
        size = int(line, 16)
        while len(data) < size + 2:
            more()
        if not size:
            return body
        body, data = body + data[:size], data[size + 2 :]
