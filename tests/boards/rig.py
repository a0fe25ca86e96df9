"""An emulated board: QEMU's `virt` machine, driven over a virtconsole, its disk an overlay that a test may ruin.

A board answers commands in a root shell on /dev/hvc0. Its network is QEMU's user network: the machine that runs the
tests is 10.0.2.2, and the board's port 8080 is forwarded to a free port here.
"""

import contextlib
import ctypes
import json
import os
import re
import secrets
import select
import shlex
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

COMMAND_S = 60.0
HOST = "10.0.2.2"  # this machine, as the board sees it
ROOT = "/dev/vda2"
# What costs an emulated kernel time at each entry and each page, and shows nothing about the package.
QUICK = "mitigations=off init_on_alloc=0 audit=0"

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


@dataclass(frozen=True)
class Machine:
    """One architecture's emulator."""

    architecture: str
    machine: str  # by its kernel's name
    emulator: str
    options: tuple[str, ...]
    serial: str
    elf: int  # e_machine of native code
    snapshots: bool  # QEMU 7.2 loses a RISC-V core's timer in a snapshot: that core then sleeps for ever
    boot_s: float  # a first boot takes a third of this on an idle machine; beyond it, it hangs


MACHINES = {
    "arm64": Machine(
        "arm64", "aarch64", "qemu-system-aarch64", ("-M", "virt", "-cpu", "cortex-a72"), "ttyAMA0", 183, True, 120.0
    ),
    "riscv64": Machine("riscv64", "riscv64", "qemu-system-riscv64", ("-M", "virt"), "ttyS0", 243, False, 200.0),
}


class BoardError(Exception):
    """The emulated board did not do what any board does: boot, answer."""


@dataclass(frozen=True)
class Answer:
    """What a command on the board said."""

    status: int
    text: str


@dataclass
class Board:
    """One emulated board. `start`, then `run` commands; `pull_the_plug` and `start` again boots the same disk."""

    machine: Machine
    kernel: Path
    initrd: Path
    disk: Path
    workdir: Path
    append: str = ""
    options: tuple[str, ...] = ()  # of QEMU, beside the machine's
    format: str = "qcow2"
    sets_clock: bool = True  # as a network's time server would, before anything starts
    memory_mb: int = 512
    process: subprocess.Popen[bytes] | None = None
    _console: socket.socket | None = None
    _qmp: socket.socket | None = None
    _pending: bytes = b""
    boots: int = 0
    log: list[str] = field(default_factory=list)

    def start(self, *, snapshot: str = "", attempts: int = 2) -> None:
        """Power on, and wait for the shell; a hung boot is retried once and logged."""
        for attempt in range(1, attempts + 1):
            self._power_on(snapshot)
            try:
                self._wait_for_shell(self.machine.boot_s, banner=not snapshot)
            except BoardError as error:
                self.pull_the_plug()
                self.log.append(f"boot attempt {attempt}: {error}")
                if attempt == attempts:
                    raise BoardError(f"{error}; the end of its serial log:\n{self.serial_tail()}") from error
            else:
                return

    def _power_on(self, snapshot: str) -> None:
        assert self.process is None, "it is on already"
        self.boots += 1
        self.workdir.mkdir(parents=True, exist_ok=True)
        for name in ("console.sock", "qmp.sock"):
            (self.workdir / name).unlink(missing_ok=True)
        append = f"root={ROOT} rw net.ifnames=0 console={self.machine.serial} loglevel=4 panic=-1 {QUICK} {self.append}"
        command = [
            self.machine.emulator,
            *self.machine.options,
            *self.options,
            *("-smp", "2", "-m", str(self.memory_mb), "-accel", "tcg,thread=multi"),
            *("-nodefaults", "-display", "none", "-no-user-config"),
            *("-kernel", str(self.kernel), "-initrd", str(self.initrd), "-append", append.strip()),
            # unsafe: what the board has flushed is in this machine's page cache, where killing QEMU leaves it
            *("-drive", f"if=none,id=disk,file={self.disk},format={self.format},cache=unsafe,discard=unmap"),
            *("-device", "virtio-blk-pci,drive=disk"),
            *("-netdev", "user,id=net,hostfwd=tcp:127.0.0.1:0-:8080", "-device", "virtio-net-pci,netdev=net,romfile="),
            *("-device", "virtio-rng-pci", "-device", "virtio-serial-pci"),
            *("-chardev", "socket,id=console,path=console.sock,server=on,wait=off"),
            *("-device", "virtconsole,chardev=console"),
            *("-qmp", "unix:qmp.sock,server=on,wait=off", "-serial", f"file:serial-{self.boots}.log"),
            *(("-loadvm", snapshot) if snapshot else ()),
        ]
        with (self.workdir / "qemu.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.workdir,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # no board outlives its tests, which have one thread
                preexec_fn=lambda: _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL),  # noqa: PLW1509
            )
        self._qmp = self._connect("qmp.sock")
        self._console = self._connect("console.sock")
        self._pending = b""
        self._qmp_line(time.monotonic() + 30)
        self.qmp("qmp_capabilities")

    def _connect(self, name: str) -> socket.socket:
        path, deadline = self.workdir / name, time.monotonic() + 30
        while time.monotonic() < deadline:
            assert self.process is not None
            if self.process.poll() is not None:
                tail = (self.workdir / "qemu.log").read_text(errors="replace")[-2000:]
                self.process = None
                raise BoardError(f"QEMU ended at once: {tail}")
            sock = socket.socket(socket.AF_UNIX)
            # a relative name: socket paths are short, temporary directories are not
            directory = os.open(self.workdir, os.O_PATH)
            try:
                sock.connect(f"/proc/self/fd/{directory}/{path.name}")
            except OSError:
                sock.close()
                time.sleep(0.05)  # QEMU tells nobody when it listens
            else:
                return sock
            finally:
                os.close(directory)
        raise BoardError(f"QEMU does not listen on {name}")

    # The monitor.

    def _qmp_line(self, deadline: float) -> dict[str, object]:
        assert self._qmp is not None
        line = b""
        while not line.endswith(b"\n"):
            self._qmp.settimeout(max(0.1, deadline - time.monotonic()))
            byte = self._qmp.recv(1)
            if not byte:
                raise BoardError("QEMU's monitor hung up")
            line += byte
        return dict(json.loads(line))

    def qmp(self, command: str, **arguments: object) -> object:
        """A command of QEMU's monitor."""
        assert self._qmp is not None
        self._qmp.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        deadline = time.monotonic() + 120
        while True:
            said = self._qmp_line(deadline)
            if "error" in said:
                raise BoardError(f"{command}: {said['error']}")
            if "return" in said:
                return said["return"]

    def monitor(self, line: str) -> str:
        """A command of the human monitor, such as `savevm` or `info usernet`."""
        return str(self.qmp("human-monitor-command", **{"command-line": line}))

    @property
    def port(self) -> int:
        """The port here that is the board's 8080."""
        found = re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+\S+\s+(\d+)\s+\S+\s+8080", self.monitor("info usernet"))
        assert found, "QEMU forwards no port"
        return int(found[1])

    def set_link(self, *, up: bool) -> None:
        """Plug or unplug the network cable."""
        self.qmp("set_link", name="net", up=up)

    def save(self, name: str) -> None:
        """Keep the running board in its disk, to start from again."""
        self.run("sync; echo 3 > /proc/sys/vm/drop_caches", timeout_s=120)
        said = self.monitor(f"savevm {name}")
        if said.strip():
            raise BoardError(f"savevm: {said.strip()}")

    # The console.

    def _wait_for_shell(self, timeout_s: float, *, banner: bool) -> None:
        # What is typed before the shell is there is lost in part, and half a line confuses it: wait for its first word.
        if banner:
            self._read_until(re.compile(rb"board-shell-ready\r?\n"), timeout_s, "the shell's first word")
        self.ok("true", timeout_s=timeout_s)
        if self.sets_clock:
            self.set_clock()  # after a snapshot, its clock stands at that time

    def _read_until(self, pattern: re.Pattern[bytes], timeout_s: float, what: str) -> re.Match[bytes]:
        assert self._console is not None
        deadline = time.monotonic() + timeout_s
        while True:
            found = pattern.search(self._pending)
            if found:
                self._pending = self._pending[found.end() :]
                return found
            ready, _, _ = select.select([self._console], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                tail = self._pending[-500:].decode(errors="replace")
                raise BoardError(f"no answer to {what} within {timeout_s:.0f} s; so far: {tail!r}")
            data = self._console.recv(65536)
            if not data:
                raise BoardError("QEMU ended")
            self._pending += data

    def set_clock(self, when: str = "") -> None:
        """Set the board's clock: to now, or to what `date` understands.

        Linux refuses (EINVAL) a moment closer to 1970 than the board has been up.
        """
        self.ok(f"date --utc --set '{when or f'@{time.time():.0f}'}' >/dev/null")

    def settle(self) -> None:
        """Wait until everything that starts at boot has started.

        Raises:
            BoardError: it came up in an emergency or not at all.
        """
        state = self.run("systemctl is-system-running --wait", timeout_s=600).text
        if state not in {"running", "degraded"}:
            raise BoardError(f"the board is {state!r} after its boot; the end of its serial log:\n{self.serial_tail()}")

    def run(self, command: str, *, timeout_s: float = COMMAND_S, check: bool = False) -> Answer:
        """Run a command in the board's root shell.

        Raises:
            BoardError: it does not answer in time, or (with `check`) it failed.
        """
        assert self._console is not None
        token = secrets.token_hex(8)
        # the token is put together on the board, so that an echo of this line is not taken for the answer
        quoted = shlex.quote(command)
        line = f"echo 'begin-''{token}'; (eval {quoted}) </dev/null 2>&1; echo \"end-\"'{token}' \"$?\"\n"
        self._console.sendall(line.encode())
        pattern = re.compile(rf"begin-{token}\r?\n(.*?)end-{token} (\d+)\r?\n".encode(), re.DOTALL)
        found = self._read_until(pattern, timeout_s, repr(command))
        answer = Answer(int(found[2]), found[1].decode(errors="replace").replace("\r\n", "\n").strip("\n"))
        if check and answer.status != 0:
            raise BoardError(f"{command!r} ended with {answer.status}:\n{answer.text}")
        return answer

    def ok(self, command: str, *, timeout_s: float = COMMAND_S) -> str:
        """What a command says that must succeed."""
        return self.run(command, timeout_s=timeout_s, check=True).text

    def put(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """Write a small file on the board."""
        import base64

        text = base64.b64encode(data).decode()
        self.ok(f"rm -f {path}.b64 {path}")
        for start in range(0, len(text), 3000):
            self.ok(f"echo {text[start : start + 3000]} >> {path}.b64")
        self.ok(f"base64 -d {path}.b64 > {path} && rm {path}.b64 && chmod {mode:o} {path}")

    def fetch(self, url: str, path: str) -> None:
        """Have the board fetch a file from a URL."""
        self.ok(f"python3 -c \"import urllib.request; urllib.request.urlretrieve('{url}', '{path}')\"", timeout_s=120)

    def asks_itself(self, path: str) -> str:
        """What the board's shared port answers to the board itself, whatever its network does; empty for nothing."""
        url = f"http://127.0.0.1:8080{path}"
        code = f"import urllib.request as r; print(r.urlopen('{url}', timeout=20).read().decode(), end='')"
        said = self.run(f'python3 -c "{code}"')
        return said.text if said.status == 0 else ""

    # Its end.

    def pull_the_plug(self) -> None:
        """The power goes, now."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None
        for sock in (self._console, self._qmp):
            if sock is not None:
                sock.close()
        self._console = self._qmp = None

    def shut_down(self) -> None:
        """Shut down in order."""
        assert self._console is not None
        assert self.process is not None
        self._console.sendall(b"systemctl poweroff\n")
        try:
            self.process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self.log.append("it did not power off within 120 s")
        self.pull_the_plug()

    def serial_tail(self, lines: int = 30) -> str:
        """The end of its serial log."""
        path = self.workdir / f"serial-{self.boots}.log"
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""
