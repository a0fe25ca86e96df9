"""Compiler service: behaves like the compiler to its caller (streams, status, signals)."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.host.compiler import service as compiler_service
from tests.eventually import eventually

DEMO = Path(__file__).resolve().parents[4] / "components" / "demo" / "v1.wasm"
CLIENT = [sys.executable, "-m", "agent.host.compiler.service"]


class Service:
    """What systemd does with Accept=yes: a fresh process for each connection, with it as stdin."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.processes: list[subprocess.Popen[bytes]] = []
        self.asked = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.processes.append(subprocess.Popen([*CLIENT, "--serve"], stdin=connection))
                self.asked.set()

    @property
    def compilers(self) -> str:
        """The processes that the service has started for its first client."""
        return "".join(Path(f"/proc/{each.pid}/task/{each.pid}/children").read_text() for each in self.processes[:1])

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for process in self.processes:
            process.wait(timeout=60)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("WASMFLEET_COMPILER_SOCKET", str(tmp_path / "compiler.sock"))
    running = Service(tmp_path / "compiler.sock")
    yield running
    running.close()


def test_an_image_comes_back_as_if_compiled_here(service: Service) -> None:
    done = subprocess.run(CLIENT, input=DEMO.read_bytes(), capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"\x7fELF")


def test_the_engine_describes_itself(service: Service) -> None:
    done = subprocess.run([*CLIENT, "--describe"], stdin=subprocess.DEVNULL, capture_output=True, check=True)
    assert json.loads(done.stdout)["engine"]


def test_a_refusal_keeps_its_status_and_its_words(service: Service) -> None:
    done = subprocess.run(CLIENT, input=b"not wasm", capture_output=True, check=False)
    assert done.returncode == 2
    assert json.loads(done.stderr)["code"] == "not-a-component"


def test_limits_set_on_the_client_hold_for_the_compiler(service: Service) -> None:
    # the agent starts its compiler, limits it, and then writes
    import resource

    with subprocess.Popen(CLIENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        assert service.asked.wait(60)  # connected, and waiting for the first byte
        resource.prlimit(client.pid, resource.RLIMIT_DATA, (8 << 20, 8 << 20))
        client.communicate(DEMO.read_bytes())
    assert client.returncode != 0, "compiling in 8 MiB cannot have succeeded"


def test_a_client_that_is_ended_takes_the_compiler_along(service: Service) -> None:
    with subprocess.Popen(CLIENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as client:
        assert client.stdin is not None
        client.stdin.write(b"\0asm")  # the compiler waits for the rest
        client.stdin.flush()
        eventually(lambda: service.compilers, "a compiler is started")
        client.send_signal(signal.SIGKILL)
        client.wait()
        # its pipe is still open on this side, and yet the compiler ends
        assert service.processes[0].wait(timeout=60) == 0


def test_a_service_that_is_stopped_says_nothing_of_the_component(service: Service) -> None:
    with subprocess.Popen(CLIENT, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        assert client.stdin is not None
        client.stdin.write(b"\0asm")  # the compiler waits for the rest
        client.stdin.flush()
        eventually(lambda: service.compilers, "a compiler is started")
        compilers = [int(pid) for pid in service.compilers.split()]
        service.processes[0].kill()  # as systemd and the kernel do with the whole unit
        for pid in compilers:
            os.kill(pid, signal.SIGKILL)
        assert client.stderr is not None
        said = json.loads(client.stderr.read())
    assert client.returncode != 0
    assert said["code"] == "interrupted"


@pytest.mark.parametrize("has_asked", [True, False])
def test_a_service_that_is_killed_before_it_reads_says_nothing_of_the_component(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_asked: bool
) -> None:
    """The request is lost with the connection: ECONNRESET after it was sent, EPIPE before."""
    monkeypatch.setenv("WASMFLEET_COMPILER_SOCKET", str(tmp_path / "compiler.sock"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(tmp_path / "compiler.sock"))
        listener.listen()
        with subprocess.Popen(CLIENT, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as client:
            connection, _ = listener.accept()
            with connection:
                assert client.stdin is not None
                if has_asked:
                    client.stdin.write(b"\0asm")
                    client.stdin.flush()
                    assert select.select([connection], [], [], 60)[0], "the request is there, and nobody reads it"
            _, err = client.communicate(None if has_asked else b"\0asm")
    assert json.loads(err)["code"] == "interrupted"
    assert client.returncode == 6


def test_a_client_that_is_ended_before_it_asks_is_nobody_to_complain_of(service: Service) -> None:
    with subprocess.Popen(CLIENT, stdin=subprocess.PIPE) as client:
        assert service.asked.wait(60)
        client.send_signal(signal.SIGKILL)
    assert service.processes[0].wait(timeout=60) == 0


def test_without_the_service_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WASMFLEET_COMPILER_SOCKET", str(tmp_path / "nobody.sock"))
    done = subprocess.run([*CLIENT, "--describe"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert done.returncode == 5
    assert json.loads(done.stderr)["code"] == "no-engine"


@pytest.mark.parametrize(
    "packet",
    [b"", b"[]", b'{"arguments": ["--version"], "limits": {}}', b'{"arguments": [], "limits": {"RLIMIT_NICE": 1}}'],
)
def test_only_the_compiler_can_be_started_through_it(packet: bytes) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, open(os.devnull) as null:  # noqa: PTH123
        socket.send_fds(ours, [packet or b" "], [null.fileno()] * 3)
        assert compiler_service.serve(theirs) == 1
