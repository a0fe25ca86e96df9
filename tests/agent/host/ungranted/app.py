"""Uses what nobody has granted: each path says in its answer what came of it."""

import errno
import os
import socket
import sys
import time
from pathlib import Path

from componentize_py_types import Ok
from wit_world import exports
from wit_world.imports.types import Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam


def sockets():
    """Connect to an address."""
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", 80))


def names():
    """Look a name up; as bytes, since this Python has no encoding for other names."""
    socket.getaddrinfo(b"example.test", 80)


def files():
    """Open a file below /data."""
    Path("/data/file").write_text("x")


def environment():
    """Read a variable and the clocks, which are there."""
    return f"{sorted(set(os.environ) - {'PYTHONUNBUFFERED'})} {time.time() > 0} {len(os.urandom(8))}"


USES = {"/sockets": sockets, "/names": names, "/files": files, "/environment": environment}


class IncomingHandler(exports.IncomingHandler):
    """The export wasi:http/incoming-handler."""

    def handle(self, request: IncomingRequest, response_out: ResponseOutparam) -> None:
        """Answer one request."""
        path = request.path_with_query()
        if path == "/throws":
            raise RuntimeError("thrown before the answer")
        try:
            said = USES[path]() if path in USES else "here"
        except OSError as error:
            said = f"denied: {type(error).__name__} {errno.errorcode.get(error.errno or 0, error.errno)}"
        print(said, file=sys.stderr)
        answer(response_out, f"{said}\n".encode())


def answer(response_out: ResponseOutparam, text: bytes) -> None:
    """Set the answer, then write its body."""
    response = OutgoingResponse(Fields())
    body = response.body()
    ResponseOutparam.set(response_out, Ok(response))
    with body.write() as stream:
        stream.blocking_write_and_flush(text)
    OutgoingBody.finish(body, None)
