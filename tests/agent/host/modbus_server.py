"""A Modbus TCP server on loopback (pymodbus), in a thread of its own."""

import asyncio
import threading

from pymodbus.server import ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

UNIT = 1
REGISTERS = [230, 501, 0, 7]  # at address 100


class Meter:
    """The server, in a thread."""

    def __init__(self):
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self._thread.start()
        assert self._ready.wait(30)

    async def _run(self):
        self._loop, self._ends = asyncio.get_running_loop(), asyncio.Event()
        device = SimDevice(UNIT, SimData(100, values=REGISTERS, datatype=DataType.REGISTERS))
        server = ModbusTcpServer(device, address=("127.0.0.1", 0))
        await server.serve_forever(background=True)
        self.port = server.transport.sockets[0].getsockname()[1]
        self._ready.set()
        await self._ends.wait()
        await server.shutdown()

    def close(self):
        self._loop.call_soon_threadsafe(self._ends.set)
        self._thread.join(30)
