"""A Modbus TCP client by Python's own socket module: `/ADDRESS/PORT/FIRST/COUNT` reads holding registers of unit 1."""

import errno
import socket
import struct

from componentize_py_types import Ok
from wit_world import exports
from wit_world.imports.types import Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam


def read_registers(host, port, first, count):
    """Read holding registers. Raises `OSError`."""
    with socket.create_connection((host.encode(), port), timeout=5) as sock:  # as bytes: there is no encoding for names
        sock.sendall(struct.pack(">HHHBBHH", 1, 0, 6, 1, 3, first, count))
        head = receive(sock, 9)
        return struct.unpack(f">{count}H", receive(sock, head[8]))


def receive(sock, size):
    """Read so many bytes. Raises `OSError`."""
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, "the server has ended")
        data += piece
    return data


class IncomingHandler(exports.IncomingHandler):
    """The export wasi:http/incoming-handler."""

    def handle(self, request: IncomingRequest, response_out: ResponseOutparam) -> None:
        """Answer one request."""
        _, host, *numbers = (request.path_with_query() or "").split("/")
        try:
            said = str(read_registers(host, *map(int, numbers)))
        except OSError as error:
            said = f"{type(error).__name__} {errno.errorcode.get(error.errno or 0, error)}"
        response = OutgoingResponse(Fields())
        body = response.body()
        ResponseOutparam.set(response_out, Ok(response))
        with body.write() as stream:
            stream.blocking_write_and_flush(said.encode())
        OutgoingBody.finish(body, None)
