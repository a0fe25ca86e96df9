"""Router in the process of a test, its clients, and simulated workers that speak frames over channels."""

import asyncio
import contextlib
import mmap
import socket
import struct

import msgspec

from agent.host.http import router
from agent.host.ipc import frames, framing, helper_api, stats_page
from agent.host.ipc.frames import TO_GUEST, Frame, FrameDecoder, Kind
from fleet.protocol.manifest import Limits

HEAD = b"200\r\ncontent-type: text/plain\r\n"
GET = b"GET /a HTTP/1.1\r\nhost: board\r\n\r\n"
TOKEN = b"0123456789abcdef"
REPORTS = msgspec.json.Decoder(helper_api.FromRouter)


class TokenDecoder:
    """Decoder that forgets everything up to a token."""

    def __init__(self, token):
        self._token, self._data, self._inner = token, b"", None

    def feed(self, data):
        if self._inner is None:
            self._data += data
            _, found, data = self._data.partition(self._token)
            if not found:
                return []
            self._inner = FrameDecoder(TO_GUEST)
        return self._inner.feed(data)


class Worker:
    """The worker's end of a channel: frames come in, and go out as the test says."""

    def __init__(self, number, sock, page):
        self.number = number
        self.page = page
        self.leaves = True  # its loop by itself, when it is asked to
        self.reader = self.writer = None
        self._sock = sock
        self._decoder = FrameDecoder(TO_GUEST)
        self._frames = asyncio.Queue()

    async def open(self):
        self.reader, self.writer = await asyncio.open_unix_connection(sock=self._sock)
        self._reading = asyncio.ensure_future(self._read())
        return self

    async def _read(self):
        while data := await self.reader.read(65536):
            for frame in self._decoder.feed(data):
                if frame.kind is Kind.YIELD and self.leaves:
                    self.say(Frame(Kind.END, 0))
                else:
                    self._frames.put_nowait(frame)
        self._frames.put_nowait(None)

    async def next(self, *kinds):
        """The next frame, which must be of one of these kinds; None at the end of the channel."""
        frame = await self._frames.get()
        assert frame is None or not kinds or frame.kind in kinds, frame
        return frame

    async def next_request(self):
        """The next frame that begins a request."""
        frame = None
        while frame is None or frame.kind not in {Kind.REQUEST, Kind.WHOLE_REQUEST}:
            frame = await self.next()
            assert frame is not None, "the channel has ended"
        return frame

    @property
    def has_more(self):
        return not self._frames.empty()

    def say(self, *said):
        self.writer.write(b"".join(frames.encode(frame) for frame in said))

    def answer(self, call, body=b"hi", *, head=HEAD, end=b"0 whole\r\n\r\n"):
        self.say(Frame(Kind.RESPONSE, call, head), Frame(Kind.BODY, call, body), Frame(Kind.END, call, end))

    def lose_place(self):
        """Forget everything up to the token: the store may have been in the middle of a frame."""
        self._decoder = TokenDecoder(TOKEN)

    def fail(self, outcome, why):
        """Report the end of the store, and read on behind the token."""
        self.lose_place()
        self.say(Frame(Kind.FAILED, 0, b"%b\r\n%b\r\n%b" % (outcome, why, TOKEN)))

    async def answer_next(self, client):
        """Answer the next request, which is this client's."""
        client.ask()
        self.answer((await self.next(Kind.WHOLE_REQUEST)).call)
        assert (await client.answer())[0] == 200

    async def answer_to(self, client):
        """Answer the request that this client has sent."""
        self.answer((await self.next(Kind.WHOLE_REQUEST)).call)
        assert (await client.answer())[0] == 200

    async def body(self):
        """The body of the request that has begun: read to its end, with credit for what was read."""
        got = b""
        while (frame := await self.next(Kind.BODY, Kind.END)).kind is Kind.BODY:
            got += frame.payload
            self.say(Frame(Kind.CREDIT, frame.call, struct.pack("<I", len(frame.payload))))
        return got

    def close(self):
        self.writer.close()


class Board:
    """A router with an instance `web` at a listener of its own, and the supervisor's end of its socket."""

    def __init__(self, sock, address):
        self.sock = sock
        self.address = address
        self._numbers = iter(range(1, 100))
        self._reports = asyncio.Queue()
        self._writers = []
        asyncio.get_running_loop().add_reader(sock, self._readable)

    def _readable(self):
        with contextlib.suppress(BlockingIOError):
            data, _ = framing.receive_packet(self.sock)
            self._reports.put_nowait(REPORTS.decode(data))

    async def report(self, kind):
        """The router's next report of this kind."""
        report = None
        while not isinstance(report, kind):
            report = await self._reports.get()
        return report

    def tell(self, message, *fds):
        framing.send_packet(self.sock, msgspec.json.encode(message), fds)

    def share(self, instance, directory):
        """An instance behind the shared port, which has no worker yet."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(directory / instance))
        listener.listen()
        self.tell(helper_api.AddListener(instance), listener.detach())
        self.tell(helper_api.RouteUpdate(instance, up=True))

    async def worker(self, *, instance="web", serve=True, reuses=False, whole=False, **limits):
        """A new worker with a channel."""
        ours, theirs = socket.socketpair()
        number, page_fd, own_fd = next(self._numbers), stats_page.create_page(instance), stats_page.create_page("own")
        message = helper_api.AddChannel(instance, number, Limits(**limits), reuses, whole)
        with theirs:
            self.tell(message, theirs.fileno(), page_fd, own_fd)
        worker = await Worker(number, ours, stats_page.StatsPage(page_fd)).open()
        worker.own = stats_page.StatsPage(own_fd)
        framing.close_all([page_fd, own_fd])
        if serve:
            self.tell(helper_api.ServeChannel(number))
        return worker

    async def client(self, *, shared=False):
        """A client of `web`, or of the shared port."""
        reader, writer = await asyncio.open_connection(*(self.shared if shared else self.address))
        self._writers.append(writer)
        return Client(reader, writer)


class Client:
    def __init__(self, reader, writer):
        self.reader, self.writer = reader, writer

    def ask(self, request=GET):
        self.writer.write(request)

    async def answer(self):
        """Status, fields and body of the next answer."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        status, _, rest = head.partition(b"\r\n")
        fields = dict(line.split(b": ", 1) for line in rest.split(b"\r\n") if line)
        if fields.get(b"transfer-encoding") == b"chunked":
            body = b""
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            fields[b"trailers"] = await self.reader.readuntil(b"\r\n")
        else:
            body = await self.reader.readexactly(int(fields.get(b"content-length", b"0")))
        return int(status.split()[1]), fields, body

    def close(self):
        self.writer.close()

    def reset(self):
        """Go away so that the router notices: an end of what is sent could be half of a conversation."""
        sock = self.writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def board(tmp_path):
    async with asyncio.timeout(30):
        ours, theirs = framing.socket_pair()
        ours.setblocking(False)
        shared = socket.create_server(("127.0.0.1", 0))
        the_router = router.Router(shared, theirs, router.SharedClients(mmap.mmap(-1, 4096)))
        running = asyncio.ensure_future(the_router.run())
        listener = socket.create_server(("127.0.0.1", 0))
        it = Board(ours, listener.getsockname())
        it.router, it.shared = the_router, shared.getsockname()
        it.tell(helper_api.AddListener("web"), listener.detach())
        yield it
        asyncio.get_running_loop().remove_reader(ours)
        ours.close()
        await running
