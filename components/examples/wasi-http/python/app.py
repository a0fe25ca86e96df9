"""Greets, and gives back what is posted to /echo. The modules imported are what componentize-py makes of the WIT."""

from collections.abc import Iterable, Iterator

from componentize_py_types import Err, Ok
from wit_world import exports
from wit_world.imports.types import Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam

READ_BYTES = 64 * 1024
WRITE_BYTES = 4096  # limit of blocking_write_and_flush


class IncomingHandler(exports.IncomingHandler):
    """The export wasi:http/incoming-handler."""

    def handle(self, request: IncomingRequest, response_out: ResponseOutparam) -> None:
        """Answer one request."""
        match request.path_with_query():
            case "/":
                answer(response_out, 200, [b"hello from Python\n"])
            case "/echo":
                answer(response_out, 200, body_of(request))
            case _:
                answer(response_out, 404, [b"nothing here\n"])


def body_of(request: IncomingRequest) -> Iterator[bytes]:
    """Yield the request's body, as it is read."""
    with request.consume() as body, body.stream() as stream:
        try:
            while True:
                yield stream.blocking_read(READ_BYTES)
        except Err:  # the stream is closed: that was all
            return


def answer(response_out: ResponseOutparam, status: int, chunks: Iterable[bytes]) -> None:
    """Set the answer, then write its body."""
    response = OutgoingResponse(Fields.from_list([("content-type", b"text/plain")]))
    response.set_status_code(status)
    body = response.body()
    ResponseOutparam.set(response_out, Ok(response))
    with body.write() as stream:
        for chunk in chunks:
            for at in range(0, len(chunk), WRITE_BYTES):
                stream.blocking_write_and_flush(chunk[at : at + WRITE_BYTES])
    OutgoingBody.finish(body, None)
