"""The HTTP example in Python; the interpreter comes along in the component."""

from wit_world import exports
from wit_world.exports.handler import Request, Response


class Handler(exports.Handler):
    """Called for each request."""

    def handle(self, request: Request) -> Response:
        """Say hello, or give the body back at /echo."""
        if request.target == "/echo":
            return Response(200, "content-type: application/octet-stream\r\n", request.body)
        return Response(200, "content-type: text/plain\r\n", b"hello from Python\n")


class Health(exports.Health):
    """Asked before traffic."""

    def check(self) -> None:
        """Well."""
