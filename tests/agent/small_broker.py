"""Small simulated broker, over TCP or TLS on loopback."""

import asyncio
import base64
import contextlib
import hashlib
import struct


class Broker:
    """Broker with as much MQTT 3.1.1 as a client needs, which records received packets."""

    def __init__(self):
        self.connects, self.subscribed, self.published, self.writers, self.pings = [], [], [], [], 0
        self.acknowledged = 0
        self.accept = 0
        self.changed = asyncio.Event()

    async def start(self, ssl=None):
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=ssl)
        self.port = self.server.sockets[0].getsockname()[1]

    async def _serve(self, reader, writer):
        self.writers.append(writer)
        try:
            while True:
                kind = (await reader.readexactly(1))[0]
                length = shift = 0
                while True:
                    byte = (await reader.readexactly(1))[0]
                    length |= (byte & 127) << shift
                    shift += 7
                    if not byte & 128:
                        break
                self._packet(kind, await reader.readexactly(length), writer)
                self.changed.set()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            self.changed.set()

    def _packet(self, kind, body, writer):
        match kind >> 4:
            case 1:
                self.connects.append(body)
                writer.write(bytes([0x20, 2, 0, self.accept]))
            case 3:
                size = struct.unpack(">H", body[:2])[0]
                topic, rest = body[2 : 2 + size].decode(), body[2 + size :]
                writer.write(b"\x40\x02" + rest[:2])
                self.published.append((topic, rest[2:], bool(kind & 1)))
            case 4:
                self.acknowledged += 1
            case 8:
                self.subscribed.append(body)
                writer.write(b"\x90\x04" + body[:2] + b"\x01\x01")
            case 12:
                self.pings += 1
                writer.write(b"\xd0\x00")

    def say(self, topic, payload):
        self.writers[-1].write(self.packet(topic, payload))

    @staticmethod
    def packet(topic, payload):
        name = str(topic).encode()
        body = struct.pack(">H", len(name)) + name + struct.pack(">H", 7) + payload
        assert len(body) < 128
        return bytes([0x32, len(body)]) + body

    async def until(self, condition):
        async with asyncio.timeout(60):
            while not condition():
                self.changed.clear()
                await self.changed.wait()

    def drop(self):
        for writer in self.writers:
            if not writer.transport.is_closing():  # Python before 3.11.4 raises over TLS after two closes
                writer.transport.abort()

    async def stop(self):
        self.drop()
        self.server.close()


class WebSocketBroker(Broker):
    """The same over WebSocket (RFC 6455); `answer` replaces the answer to the handshake."""

    answer = b""

    async def _serve(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
            self.heads.append(head)
            self.changed.set()
            if self.answer:
                writer.write(self.answer)
                writer.close()
                return
            key = fields["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
            accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
            writer.write(
                b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                + f"Sec-WebSocket-Accept: {accept}\r\nSec-WebSocket-Protocol: mqtt\r\n\r\n".encode()
            )
            inner = asyncio.StreamReader()
            serving = asyncio.ensure_future(super()._serve(inner, _Framed(writer)))
            try:
                while True:
                    inner.feed_data(await self._frame(reader))
            finally:
                inner.feed_eof()
                await serving

    @staticmethod
    async def _frame(reader):
        _, length = await reader.readexactly(2)
        length &= 127
        if length == 126:
            length = struct.unpack(">H", await reader.readexactly(2))[0]
        mask = await reader.readexactly(4)
        body = await reader.readexactly(length)
        return bytes(byte ^ mask[index % 4] for index, byte in enumerate(body))

    def __init__(self):
        super().__init__()
        self.heads = []


class _Framed:
    """Writer whose pieces are binary frames."""

    def __init__(self, writer):
        self._writer, self.transport = writer, writer.transport

    def write(self, data):
        assert len(data) < 126
        self._writer.write(bytes([0x82, len(data)]) + data)

    def close(self):
        self._writer.close()
