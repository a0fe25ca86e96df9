"""`fleet serve` as a process, and clients that behave badly towards its ports."""

import asyncio
import contextlib
import os
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Self

from fleet.server.config import Address, ServerConfig, ServerPaths

ROOT = Path(__file__).resolve().parents[3]


class ServerProcess:
    """A running `fleet serve` and its addresses."""

    def __init__(self, home: Path, process: asyncio.subprocess.Process) -> None:
        self.home, self.process = home, process
        config = ServerConfig.load(ServerPaths(home).config)
        self.operators = Address.parse(config.operators, "operators")
        self.devices = Address.parse(config.devices, "devices")

    def files(self) -> int:
        """How many files, connections among them, the process has open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def memory_mib(self) -> int:
        """What the process holds in memory now."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) // 1024

    def tls(self) -> ssl.SSLContext:
        """A context that trusts the fleet's CA."""
        return ssl.create_default_context(cafile=str(self.home / "operator" / "ca.pem"))

    async def ended(self) -> int:
        """Ask it to end, and wait until it has."""
        self.process.terminate()
        return await asyncio.wait_for(self.process.wait(), 90)


@contextlib.asynccontextmanager
async def serving(home: Path) -> AsyncIterator[ServerProcess]:
    """`fleet serve` on `home` until the end of the block."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "fleet.cli.main", "serve"),
        env={**os.environ, "PYTHONPATH": str(ROOT), "WASMFLEET_HOME": str(home), "PYTHONUNBUFFERED": "1"},
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        while b"broker" not in (line := await asyncio.wait_for(process.stdout.readline(), 60)):
            assert line, "the server ended"
        yield ServerProcess(home, process)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


class Crowd:
    """Connections that take what the server says until it closes them.

    Attributes:
        said: what each one has been told by now.
    """

    def __init__(self) -> None:
        self.said: list[bytearray] = []
        self._writers: list[asyncio.StreamWriter] = []
        self._readers: list[asyncio.Task[None]] = []

    async def join(self, where: Address, count: int, *, tls: ssl.SSLContext | None = None, says: bytes = b"") -> Self:
        """Open connections one after the other; those that are refused are left out."""
        for _ in range(count):
            with contextlib.suppress(OSError):
                reader, writer = await asyncio.open_connection(where.host, where.port, ssl=tls)
                writer.write(says)
                said = bytearray()
                self.said.append(said)
                self._writers.append(writer)
                self._readers.append(asyncio.create_task(_listen(reader, said)))
        return self

    @property
    def open(self) -> int:
        """How many the server has not closed."""
        return sum(not each.done() for each in self._readers)

    async def closed(self) -> None:
        """Wait until the server has closed every one."""
        await asyncio.wait(self._readers)

    def hang_up(self) -> None:
        """Close them."""
        for writer in self._writers:
            writer.transport.abort()


async def _listen(reader: asyncio.StreamReader, said: bytearray) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(4096):
            said += data
