"""Reads a register of a meter by Modbus TCP, counts the readings, and sends them to the operator.

One run, one reading. The modules imported are what componentize-py makes of the WIT.
"""

import json
import socket
import struct

from wit_world import exports
from wit_world.imports import atomics, producer
from wit_world.imports import wasi_config_store as config
from wit_world.imports import wasi_keyvalue_store as store
from wit_world.imports.types import Client, Message

REGISTER = 100  # temperature in tenths of a degree
READ_REGISTERS = 3  # the function of the protocol


class Run(exports.Run):
    """The export wasi:cli/run."""

    def run(self) -> None:
        """Take a reading. An exception is the end of the run, and a fault."""
        meter, topic = config.get("meter"), config.get("topic")
        if not meter or not topic:
            raise KeyError("no meter or no topic is configured")
        celsius = read_register(meter, REGISTER) / 10

        readings = atomics.increment(store.open("default"), "readings", 1)

        reading = json.dumps({"celsius": celsius, "readings": readings})
        message = Message(reading.encode())
        message.set_content_type("application/json")
        producer.send(Client.connect(""), topic, message)
        print(f"sent {reading}", flush=True)  # noqa: T201 - a line of its log


def read_register(meter: str, register: int) -> int:
    """Read one holding register of unit 1."""
    host, _, port = meter.rpartition(":")
    with socket.create_connection(
        (host.encode(), int(port)), timeout=5
    ) as connection:  # bytes: no codec for names here
        # transaction 1, protocol 0, 6 bytes: unit 1, the function, the register, one of them
        connection.sendall(struct.pack(">HHHBBHH", 1, 0, 6, 1, READ_REGISTERS, register, 1))
        answer = receive(connection, 9)
        if answer[7] != READ_REGISTERS:
            raise OSError(f"the meter refuses register {register}: error {answer[8]}")
        return int(struct.unpack(">H", receive(connection, 2))[0])


def receive(connection: socket.socket, size: int) -> bytes:
    """Read so many bytes."""
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        if not piece:
            raise OSError("the meter has ended the connection")
        data += piece
    return data
