"""Network between a device and its server that can be cut: a relay for each port, which counts what passes."""

import asyncio
import contextlib


class Relay:
    """Relay to a port on loopback.

    Attributes:
        port: to connect to.
        passed: bytes both ways.
    """

    def __init__(self, target):
        self.target, self.passed, self.port = target, 0, 0
        self._passing = asyncio.Event()
        self._passing.set()
        self._tasks = set()
        self._server = None

    async def open(self):
        """Listen, at the same port as before."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def refuse(self):
        """Close the port and every connection."""
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def hold(self):
        """Pass nothing on, and end nothing."""
        self._passing.clear()

    async def mend(self):
        """Pass everything on again."""
        self._passing.set()
        if not self._server.is_serving():
            await self.open()

    async def _serve(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        writers = [writer]
        try:
            await self._passing.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
            writers.append(back)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._copy(reader, back))
                both.create_task(self._copy(there, writer))
        except* (OSError, asyncio.CancelledError):
            pass
        finally:
            self._tasks.discard(task)
            for each in writers:
                with contextlib.suppress(OSError, RuntimeError):
                    each.transport.abort()

    async def _copy(self, reader, writer):
        while data := await reader.read(1 << 16):
            await self._passing.wait()
            self.passed += len(data)
            writer.write(data)
            await writer.drain()
        raise ConnectionResetError  # one side said goodbye: both ends are closed
