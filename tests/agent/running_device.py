"""Device on disk with a committed component, and its host, agent and commands as processes."""

import contextlib
import hashlib
import os
import selectors
import signal
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from agent.host.ipc import host_api
from agent.update import restore
from agent.update.state import Committed
from fleet.demo.environment import free_ports
from fleet.protocol.assignment import Item
from fleet.protocol.manifest import Http, Manifest
from signing.state import VerifierState
from tests.agent.enrolled_device import enrolled
from tests.eventually import eventually

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "components" / "demo"


def committed_demo(instance="web", *, version="v1", generation=1):
    """The demo's component as a committed item, and its bytes."""
    data = (DEMO / f"{version}.wasm").read_bytes()
    manifest = Manifest(name="hello", version="1.0.0", trigger=Http())
    item = Item(
        instance=instance,
        target="components/main/hello/1.0.0.wasm",
        length=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        manifest_sha256=manifest.digest(),
    )
    at = datetime.now(UTC).replace(microsecond=0)
    return Committed(item=item, manifest=manifest, generation=generation, assignment=1, at=at), data


class RunningDevice:
    """Device whose server and broker do not answer, with `instances` of the demo's component committed.

    Attributes:
        state, runtime: directories of the agent.
        prefix: of every command line.
        guests: directory of components for tests, as text.
    """

    guests = ROOT / "components" / "guests"

    def __init__(self, directory: Path, *instances: str, prefix=(), python=(sys.executable,)):
        device, store = enrolled(directory)
        self.directory, self.places = directory, device.places
        self.state, self.runtime = device.places.state, device.places.runtime
        self.prefix, self.python = list(prefix), list(python)
        self.port = free_ports(1)[0]
        (directory / "agent.toml").touch()
        device.places.artifacts.mkdir()
        for number, instance in enumerate(instances, start=1):
            committed, data = committed_demo(instance, generation=number)
            store.save(committed=committed)
            (device.places.artifacts / f"{committed.item.sha256}.wasm").write_bytes(data)
        if instances:
            restore.write_runset(self.places.runset, store.committed(), VerifierState(), device.mac_key)
        store.close()
        self._processes = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in reversed(self._processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()

    def start_host(self, *arguments, **more):
        """Start the host; return its process once it listens."""
        return self._start(
            "host",
            [
                *("-m", "agent.host.cli", "run", "--runtime", str(self.runtime)),
                *("--state", str(self.directory / "host"), "--ingress", f"127.0.0.1:{self.port}", *arguments),
            ],
            **more,
        )

    def start_agent(self, **more):
        """Start the agent; return its process once it is ready."""
        return self._start("agent", ["-m", "agent.cli", "run", *self._options()], **more)

    def agent(self, command, *arguments, **more):
        """Run a command of `fleet-agent`."""
        line = [*self.prefix, *self.python, "-m", "agent.cli", command, *self._options(), *arguments]
        how = {"capture_output": True, "text": True, "timeout": 100, "cwd": ROOT} | more
        return subprocess.run(line, check=False, **how)

    def said(self, name):
        """What a process has written to standard error, over all its starts."""
        log = self.directory / f"{name}.log"
        return log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""

    def enrolled_on(self, machine, **evidence):
        """Let the identity come from a machine with these ids."""
        path = self.state / "identity" / "enrolled.json"
        who = msgspec.json.decode(path.read_bytes()) | {"machine": machine, "evidence": evidence}
        path.write_bytes(msgspec.json.encode(who))

    def answers(self, instance="web"):
        """Status of a request to an instance through the router; 0 without an answer."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=30) as sock:
            sock.sendall(f"GET /{instance}/ HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode())
            head = sock.makefile("rb").readline().split()
            return int(head[1]) if len(head) > 1 else 0
        return 0

    def comes_to_answer(self, instance="web"):
        """Wait until an instance answers."""
        eventually(lambda: self.answers(instance) == 200, f"{instance} answers")

    def ask_host(self, kind=host_api.Hello, **fields):
        """Ask the host on a connection of its own."""
        with host_api.new_socket() as sock:
            sock.settimeout(60)
            sock.connect(str(self.places.host_socket))
            host_api.send(sock, kind(id=1, **fields))
            while True:
                reply = host_api.receive_from_host(sock)
                if getattr(reply, "id", None) == 1:
                    return reply

    def ask_host_to_stop(self, instance):
        """Stop an instance on the host."""
        self.ask_host(host_api.Stop, instance=instance)

    def _options(self):
        return [
            *("--state", str(self.state), "--runtime", str(self.runtime)),
            *("--config", str(self.directory / "agent.toml")),
        ]

    def _start(self, name, arguments, *, env=None, prefix=None, ready=True):
        address = self.directory / f"{name}.notify"
        address.unlink(missing_ok=True)
        log_file = self.directory / f"{name}.log"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, log_file.open("a") as log:
            notify.bind(str(address))
            process = subprocess.Popen(
                [*(self.prefix if prefix is None else prefix), *self.python, *arguments],
                cwd=ROOT,
                env={**os.environ, **(env or {}), "NOTIFY_SOCKET": str(address)},
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
            self._processes.append(process)
            if ready and not _comes_up(notify, process):
                raise AssertionError(f"the {name} ended: {self.said(name)}")
        return process


def _comes_up(notify, process):
    """Whether a process says that it is ready, before it ends."""
    pidfd = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as selector:
            for each in (notify, pidfd):
                selector.register(each, selectors.EVENT_READ)
            while found := selector.select(100):
                if notify not in [key.fileobj for key, _ in found]:
                    return False
                if b"READY=1" in notify.recv(4096):
                    return True
        raise AssertionError("neither ready nor ended")
    finally:
        os.close(pidfd)
